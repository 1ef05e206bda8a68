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
from fedcore.types import Json


def progress(line: str) -> None:
    """Print one line of progress to stderr; stdout is for the JSON."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def require_at_least(flag: str, found: int, least: int, why: str = "") -> None:
    """Raise BadInput for a number below `least`."""
    if found < least:
        raise BadInput(f"{flag}: found {found}, expected at least {least}{why}")


def document(kind: str, **facts: Any) -> Json:
    """The JSON of a benchmark: its kind, its facts in their order, the machine."""
    return {"schema": 1, "kind": f"bench-{kind}", **facts, "environment": environment()}


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
