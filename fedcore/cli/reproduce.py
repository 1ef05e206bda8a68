"""`fedcore reproduce`: repeat a finished run and compare, row by row, whether the bits are the same."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedcore.experiment.api import compare, simulate
from fedcore.experiment.environment import environment, random_causes
from fedcore.experiment.forked import ticking
from fedcore.experiment.loop import STOP, OnStep
from fedcore.experiment.prepare import stored_job
from fedcore.files import read_result, read_rounds
from fedcore.learning.task import Task
from fedcore.results import ByMetric, ComparisonResult, Result, RoundRow, SplitResult
from fedcore.seeds import hash_seed

_MEASURED = ("seconds", "peak_memory")
"""Columns of a row that are measurements of this machine, not results."""


NOISE = (
    "the noise of a job with privacy, and its secret samples, which are new in every run, so the federated model and "
    "its metrics are other ones; its survivors and the other arms were compared"
)


@dataclass(frozen=True)
class Reproduction:
    """same: whether every row and the model have the same bits. difference: the first that differs, as text.

    environment: differences between the two machines or checkouts, as text. causes: what of a task is not
    seeded, as text. except_for: what no run can repeat, as text; it was not compared.
    """

    same: bool
    model_sha256: tuple[str, str]
    difference: str
    environment: tuple[str, ...]
    causes: str
    except_for: str = ""


def reproduce(
    directory: Path,
    *,
    task: Task | None = None,
    on_begin: Callable[[int, int, str], object] = lambda _rounds, _sites, _protection: None,
    on_row: Callable[[RoundRow | SplitResult], object] = lambda _: None,
    on_step: OnStep | None = None,
    on_tick: Callable[[], object] = lambda: None,
) -> Reproduction:
    """Run `directory`'s job again in a temporary directory and compare.

    on_begin: called with the numbers of rounds and sites of a run, and its protection. on_row: called with every
    row of it, or with every split of a comparison. on_step: as of `fedcore.simulate`. on_tick: called about every
    second. Raises BadInput where there is no finished run.
    """
    old = read_result(directory)
    job = stored_job(directory, task)
    for about in ("kind", "seeds"):
        job.pop(about, None)
    job["track"].pop("to", None)  # what is repeated is sent nowhere
    with tempfile.TemporaryDirectory(prefix="fedcore-reproduce-") as folder:
        out = Path(folder) / "run"
        if isinstance(old, ComparisonResult):
            seeds = list(dict.fromkeys(split.seed for split in old.cells))
            splits = compare(
                task,
                job=[job],
                seeds=seeds,
                out=out,
                on_cell=lambda split, _number, _of: on_row(split),
                on_tick=on_tick,
            ).result
            return _compared(old, splits)

        def until_the_same_round(row: RoundRow) -> object:
            on_row(row)
            return STOP if row.round >= old.rounds else None

        on_begin(old.rounds, len(old.sites), old.protection)
        with ticking(on_tick):
            again = simulate(
                task, job=[job], out=out, on_round=until_the_same_round, on_step=on_step
            )
        new, rows = again.result, again.rounds
    private = bool(old.plan["train"].get("privacy"))
    difference = _first_difference(read_rounds(directory), rows, private=private)
    hashes = (old.model_sha256, new.model_sha256)
    if private:
        return Reproduction(
            not difference, hashes, difference, _changes(old, new), _causes(old), NOISE
        )
    if not difference and hashes[0] != hashes[1]:
        difference = "every row is the same, but the final model differs"
    return Reproduction(not difference, hashes, difference, _changes(old, new), _causes(old))


def _compared(old: ComparisonResult, new: ComparisonResult) -> Reproduction:
    difference, hashes = "", ("", "")
    private = bool(old.plan["train"].get("privacy"))
    for a, b in zip(old.cells, new.cells, strict=False):
        hashes = (a.model_sha256, b.model_sha256)
        if (a != b) if not private else (_repeatable(a) != _repeatable(b)):
            difference = f"seed {a.seed}, fold {a.fold}: the split's arms differ"
            break
    return Reproduction(
        not difference,
        hashes,
        difference,
        _changes(old, new),
        _causes(old),
        NOISE if private else "",
    )


def _repeatable(split: SplitResult) -> object:
    """What of a split has no noise in it."""

    def others(arms: Mapping[str, ByMetric]) -> Mapping[str, ByMetric]:
        return {name: values for name, values in arms.items() if name != "federated"}

    of_sites = {site: others(arms) for site, arms in split.per_site.items()}
    return split.seed, split.fold, others(split.arms), of_sites, split.constant


def _first_difference(
    old: Sequence[RoundRow], new: Sequence[RoundRow], *, private: bool = False
) -> str:
    """private: whether the rows of the federated arm have noise in them that is new in every run."""
    for a, b in zip(old, new, strict=False):
        for key in a if not (private and a.arm == "federated") else ("arm", "round", "survivors"):
            if not key.startswith(_MEASURED) and a[key] != b.get(key):
                return f"round {a.round}, arm {a.arm}: {key} was {a[key]!r} and is {b.get(key)!r}"
    if len(old) != len(new):
        return f"found {len(new)} rows, expected {len(old)}"
    return ""


def _causes(old: Result) -> str:
    then = old.origin.environment.get("hash_seed", "random")  # it was, before it was recorded
    return random_causes(str(then), hash_seed())


def _changes(old: Result, new: Result) -> tuple[str, ...]:
    then, now = old.origin.environment, environment()
    found = [f"{k}: then {then[k]}, now {v}" for k, v in now.items() if then.get(k, v) != v]
    if old.plan["digest"] != new.plan["digest"]:
        keys = [k for k, v in new.plan.items() if old.plan.get(k) != v and k != "digest"]
        found.append(f"plan: {', '.join(keys)} differ")
    return tuple(found)
