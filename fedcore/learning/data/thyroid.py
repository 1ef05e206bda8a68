"""Built-in task `thyroid`: five referral sources tell patients with a thyroid finding from those without.

UCI thyroid disease, 9,169 patients of one laboratory by who sent them: SVI 2,394, SVHC 956, STMW 255, SVHD 71, and
5,493 from elsewhere; the class is 1 where any diagnosis was written down. Source and licence are in
thyroid.PROVENANCE.md beside the file.

Invariant: the file is the one whose SHA-256 stands below, and `table` is declared without a look at any source's rows.
"""

import csv
import gzip
import io
import math
from functools import cache
from pathlib import Path

from torch import nn

from fedcore.errors import UnknownName
from fedcore.learning.data import tabular
from fedcore.learning.data.data_files import verified
from fedcore.learning.data.linear import logit_loss
from fedcore.learning.data.rows import TableRows
from fedcore.learning.data.tabular import category, number
from fedcore.learning.task import Task

FILE = Path(__file__).with_name("thyroid.csv.gz")

SHA256 = "827b8ccbf4ca58b669fb094360e8e91d8cad865340523d992c431773c17c3a73"
"""Of thyroid.csv.gz; thyroid.PROVENANCE.md has that of the CSV file in it, which is the source's own."""

SOURCES = {"other": "other", "svi": "SVI", "svhc": "SVHC", "stmw": "STMW", "svhd": "SVHD"}
"""Site id -> the value of the column `referral_source`. WEST is left out: it sent three patients."""

LABS = {
    "TSH": (-2.5, 3.0),
    "T3": (-1.5, 1.5),
    "TT4": (0.3, 2.8),
    "T4U": (-1.0, 0.5),
    "FTI": (0.0, 3.0),
}
"""Laboratory values and the public range of their decimal logarithms, from what the assays can measure: TSH is
log-normal, and by its plain range nearly all patients would have the same value. TBG is left out: 96 % are missing."""

FLAGS = (
    "on_thyroxine", "query_on_thyroxine", "on_antithyroid_meds", "sick", "pregnant", "thyroid_surgery",
    "I131_treatment", "query_hypothyroid", "query_hyperthyroid", "lithium", "goitre", "tumor", "hypopituitary",
    "psych",
)  # fmt: skip

OLDEST = 120
"""An age above it (four rows, up to 65,526) was not written down right: it counts as missing."""

# A raw table has no column `log_TSH`, so that raw rows are refused by name where the model wants logarithms.
table = tabular.table(
    target="diagnosis",
    columns={
        "age": number(0, OLDEST, may_be_missing=True),
        "sex": category("F", "M", may_be_missing=True),
        **{f"log_{name}": number(*ends, may_be_missing=True) for name, ends in LABS.items()},
        **{name: category("f", "t") for name in FLAGS},
    },
)


def data(source: str) -> TableRows:
    """The patients of one referral source, by site id. Raises UnknownName for any other."""
    if source not in SOURCES:
        raise UnknownName("thyroid: referral source", str(source), SOURCES)
    rows = [row for row in _rows() if row["referral_source"] == SOURCES[source]]
    columns: dict[str, list[object]] = {
        "diagnosis": [int(row["target"] != "-") for row in rows],
        "age": [row["age"] if float(row["age"]) <= OLDEST else "" for row in rows],
        **{name: [row[name] for row in rows] for name in ("sex", *FLAGS)},
    }
    for name in LABS:
        columns[f"log_{name}"] = [math.log10(float(r[name])) if r[name] else "" for r in rows]
    return table(columns)


@cache
def _rows() -> list[dict[str, str]]:
    raw = verified(FILE, SHA256, "the vendored data was changed; reinstall fedcore")
    return [*csv.DictReader(io.StringIO(gzip.decompress(raw).decode()))]


HIDDEN = (64, 32)


def model() -> nn.Module:
    """Inputs -> 64 -> 32 -> one logit, with ReLU."""
    first, second = HIDDEN
    return nn.Sequential(
        nn.Linear(len(table.columns), first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 1)
    )  # fmt: skip


task = Task(
    name="thyroid",
    data=data,
    model=model,
    loss=logit_loss,
    metrics=("accuracy", "auc"),
    sites={site: site for site in SOURCES},
    # The sources differ in how many of their patients are ill (12 to 52 %). A model that has taken few steps only says
    # what is common, is sure of it, and is worse at `stmw` than no model at all: its guard left, rightly. With four
    # passes a round the first released model knows the patients. What is left of the gap is drift, which SCAFFOLD
    # removes. How it was chosen: docs/tasks.md#how-their-settings-were-chosen.
    defaults={
        "train.algorithm": "scaffold",
        "train.lr": 0.3,
        "train.lr_schedule": "cosine",
        "train.epochs": 4,
        "train.batch_size": 32,
        "round.server": "fedavg",
        "round.rounds": 40,
    },
)
