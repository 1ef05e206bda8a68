"""Benchmarks of the cost of protection: size and seconds compared with CKKS, and the memory of a fold.

Each returns raw JSON with its configuration and machine, and checks no threshold.
"""

import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fedcore.errors import BadInput
from fedcore.experiment.environment import environment
from fedcore.report.terminal import fitted, grid
from fedcore.secagg.packing import solve_packing
from fedcore.secagg.plan import RangePlan, RoundPlan, ServerPlan, TrainPlan
from fedcore.types import Json, SiteId


def progress(line: str) -> None:
    """Print one line of progress to stderr; stdout is for the JSON."""
    sys.stderr.write(line + "\n")


def require_at_least(flag: str, found: int, least: int, why: str = "") -> None:
    """Raise BadInput for a number below `least`."""
    if found < least:
        raise BadInput(f"{flag}: found {found}, expected at least {least}{why}")


def document(kind: str, **facts: Any) -> Json:
    """The JSON of a benchmark: its kind, its facts in their order, the machine."""
    return {"schema": 1, "kind": f"bench-{kind}", **facts, "environment": environment()}


def plan_of(
    parameters: int, sites: int, bits: int, protection: str, cipher: str, fields: int | None = None
) -> RoundPlan:
    """A plan of one round of updates with neither metrics nor buffers. fields: as for `solve_packing`."""
    names = tuple(SiteId(f"site-{index:02d}") for index in range(sites))
    return RoundPlan(
        task="bench", task_digest="", sites=names, protection=protection,
        packing=solve_packing(bits, sites, protection, fields, cipher=cipher), parameters=parameters,
        buffer_coordinates=0, max_examples=1 << 20, rounds=1, train=TrainPlan(),
        server=ServerPlan(), range=RangePlan(), cipher=cipher,
    )  # fmt: skip


def protection_of(found: Json) -> str:
    """The protection of a benchmark's JSON, with its cipher unless that is bfv."""
    return repr(found["protection"]) + (" (keystream)" if found["cipher"] == "keystream" else "")


def table_page(
    head: Sequence[str], rows: Iterable[Sequence[object]], *notes: str
) -> RenderableType:
    """The output of a benchmark for a terminal: a table, and a paragraph for each note."""
    table = grid(*head)
    for row in rows:
        table.add_row(*map(str, row))
    return Group(fitted(table), Text(), *map(Text, notes))
