"""Run a finished run again and say whether the bits are the same, or where they first differ."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedcore.comparison.api import compare, simulate
from fedcore.comparison.experiment import stored_job
from fedcore.environment import environment
from fedcore.files import read_json
from fedcore.run import Run, read_rounds
from fedcore.task import Task
from fedcore.types import Json

_MEASURED = ("seconds", "peak_memory")
"""Columns of a row that are measurements of this machine, not results."""


@dataclass(frozen=True)
class Reproduction:
    """same: every row and the model have the same bits. difference: the first that has not.

    environment: what differs between the two machines or checkouts, in words.
    """

    same: bool
    model_sha256: tuple[str, str]
    difference: str
    environment: tuple[str, ...]


def reproduce(
    directory: Path, *, task: Task | None = None, on_row: Callable[[Json], Any] | None = None
) -> Reproduction:
    """Run `directory`'s job again in a temporary directory and compare. Raises BadInput on no run."""
    old = read_json(directory / "result.json")
    job = stored_job(directory, task)
    with tempfile.TemporaryDirectory(prefix="fedcore-reproduce-") as folder:
        if old["kind"] == "compare":
            return _compare_again(old, job, Path(folder) / "run", task, on_row)
        layers = {k: v for k, v in job.items() if k not in ("task", "sites")}
        again: Run = simulate(
            task or job["task"],
            job["sites"] or None,
            out=Path(folder) / "run",
            on_round=on_row,
            **layers,
        )
        new, rows = again.result, again.rounds
    difference = _first_difference(read_rounds(directory), rows)
    hashes = (old["model_sha256"], new["model_sha256"])
    if not difference and hashes[0] != hashes[1]:
        difference = "every row is the same, but the final model differs"
    return Reproduction(not difference, hashes, difference, _changes(old, new))


def _compare_again(
    old: Json, job: Json, out: Path, task: Task | None, on_row: Callable[[Json], Any] | None
) -> Reproduction:
    layers = {k: v for k, v in job.items() if k not in ("task", "sites")}
    seeds = sorted({cell["seed"] for cell in old["cells"]})
    again = compare(
        task or job["task"], job["sites"] or None, seeds=seeds, out=out,
        on_cell=(lambda cell, _number, _all: on_row(cell)) if on_row else None, **layers,
    )  # fmt: skip
    new = again.result
    difference, hashes = "", ("", "")
    for a, b in zip(old["cells"], new["cells"], strict=False):
        hashes = (a["model_sha256"], b["model_sha256"])
        if a != b:
            difference = f"seed {a['seed']}, fold {a['fold']}: the split's arms differ"
            break
    return Reproduction(not difference, hashes, difference, _changes(old, new))


def _first_difference(old: Sequence[Json], new: Sequence[Json]) -> str:
    for a, b in zip(old, new, strict=False):
        for key in a:
            if key.startswith(_MEASURED):
                continue
            if a[key] != b.get(key):
                return f"round {a['round']}, arm {a['arm']}: {key} was {a[key]!r} and is {b.get(key)!r}"
    if len(old) != len(new):
        return f"found {len(new)} rows, expected {len(old)}"
    return ""


def _changes(old: Json, new: Json) -> tuple[str, ...]:
    found = []
    before: Mapping[str, Any] = old.get("environment", {})
    for key, value in environment().items():
        if before.get(key) != value:
            found.append(f"{key}: then {before.get(key)}, now {value}")
    if old["plan"]["digest"] != new["plan"]["digest"]:
        keys = [k for k, v in new["plan"].items() if old["plan"].get(k) != v and k != "digest"]
        found.append(f"plan: {', '.join(keys)} differ")
    return tuple(found)
