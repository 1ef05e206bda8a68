"""How the sites of one process are trained: one after the other, or many at once (`batched.py`).

Invariant: `Sequential` is the reference, with the bits of a deployment. `Batched` gives its updates up to rounding: it
is compared with the reference on a few sites before a run uses it, and refused, or left, where they differ.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, starmap
from typing import Protocol, TypeVar

import numpy as np

from fedcore.errors import BadInput, FedcoreError
from fedcore.learning.batched import LastModule, Updates, chunk_size, obstacle, train_many
from fedcore.learning.encoded import encodes_together, together, update_sum
from fedcore.learning.local_round import TrainedAhead
from fedcore.learning.scoring import Scored
from fedcore.learning.site import SiteTrainer
from fedcore.learning.state import JobState
from fedcore.secagg.encode.partial import PartialSum
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.secagg.purposes import purpose_of
from fedcore.types import Contribution, FloatVector, Json

T = TypeVar("T")

TOLERANCE = 1e-3
"""Largest distance of a batched update from the sequential one, in lengths of that one. Rounding leaves some 1e-7,
where a max-pool takes another of two equal pixels 1e-4; a rule that differs, or padding that counts, far more."""

PROBED = 4
"""Sites whose updates are compared."""


class Executor(Protocol):
    """Computes the contributions of several sites to one step."""

    def ready(
        self, sites: Sequence[SiteTrainer], plan: RoundPlan, state: JobState, round_: int
    ) -> Iterator[SiteTrainer]:
        """Each site once, in this order, when its training in a round from a state may begin or is done already."""
        ...

    def run(
        self, sites: Sequence[SiteTrainer], plan: RoundPlan, step: PlannedRound, state: JobState
    ) -> Iterator[tuple[int, Contribution]]:
        """(roster index, contribution) of each site, in any order."""
        ...

    def sums(
        self, sites: Sequence[SiteTrainer], plan: RoundPlan, step: PlannedRound, state: JobState
    ) -> Iterator[PartialSum]:
        """The same contributions, added up some at a time."""
        ...

    def scores(
        self, sites: Sequence[SiteTrainer], state: JobState, round_: int
    ) -> list[Scored | None]:
        """`SiteTrainer.scored` of each site, in their order."""
        ...


class Sequential:
    """One site after the other, in this process."""

    def ready(
        self, sites: Sequence[SiteTrainer], plan: RoundPlan, state: JobState, round_: int
    ) -> Iterator[SiteTrainer]:
        del plan, state, round_
        yield from sites

    def run(
        self, sites: Sequence[SiteTrainer], plan: RoundPlan, step: PlannedRound, state: JobState
    ) -> Iterator[tuple[int, Contribution]]:
        trains = purpose_of(step.purpose).trains
        for site in self.ready(sites, plan, state, step.training_round) if trains else sites:
            yield site.site.index, site.contribute(plan, step, state)

    def sums(
        self, sites: Sequence[SiteTrainer], plan: RoundPlan, step: PlannedRound, state: JobState
    ) -> Iterator[PartialSum]:
        if not encodes_together(sites, plan, step):
            yield from starmap(PartialSum.of, self.run(sites, plan, step, state))
            return
        ready = self.ready(sites, plan, state, step.training_round)
        while some := list(islice(ready, together(plan))):
            yield update_sum(some, plan, step, state)

    def scores(
        self, sites: Sequence[SiteTrainer], state: JobState, round_: int
    ) -> list[Scored | None]:
        return [site.scored(state, round_) for site in sites]


class Batched(Sequential):
    """Chunks of sites at once, on stacked parameters. chunk: sites of each but the last."""

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk

    def ready(
        self, sites: Sequence[SiteTrainer], plan: RoundPlan, state: JobState, round_: int
    ) -> Iterator[SiteTrainer]:
        for at in range(0, len(sites), self.chunk):
            some = sites[at : at + self.chunk]
            with some[0].watch("train"):
                updates, reports = train_many(some, plan, state, round_)
            for site, update, report in zip(some, updates, reports, strict=True):
                site.ahead = TrainedAhead(plan.train, state, round_, (update, report))
                yield site


@dataclass(frozen=True)
class Choice:
    """Which executor a run uses, and why. name: `sequential` or `batched`. why: against `batched`, or "". facts: what
    was measured to choose."""

    executor: Executor
    name: str
    why: str
    facts: Json

    def to_json(self) -> Json:
        """As `result.json` has it."""
        return {"name": self.name, **({"why": self.why} if self.why else {}), **self.facts}


def choose(
    wanted: str, sites: Sequence[SiteTrainer], plan: RoundPlan, state: JobState
) -> Choice | None:
    """The executor of a run, by its setting: None for `sequential`, where nothing is to be chosen.

    `batched` and `auto` are tried on a few sites; `auto` takes the faster one. Raises BadInput where `batched` is asked
    for and cannot be had.
    """
    if wanted not in _CHOSEN:
        return None
    before = [(site.kept, site.report) for site in sites]
    facts: Json = {}
    why = obstacle(sites, plan, state)
    if not why:
        why, facts = _tried(sites, plan, state)
    for site, (kept, report) in zip(sites, before, strict=True):
        site.kept, site.report = kept, report
    if wanted == "batched" and why:
        raise BadInput(
            f"executor: found 'batched', but {why}",
            remedy='executor = "auto" trains the sites one after the other where they cannot be batched',
        )
    slower = wanted == "auto" and not why and facts["batched_ms"] >= facts["sequential_ms"]
    if why or slower:
        return Choice(Sequential(), "sequential", why, facts)
    return Choice(Batched(facts["chunk"]), "batched", "", facts)


_CHOSEN = ("batched", "auto")


def _tried(sites: Sequence[SiteTrainer], plan: RoundPlan, state: JobState) -> tuple[str, Json]:
    """(why the sites cannot be batched, or ""; milliseconds a site both ways, and the largest distance)."""
    by_rows = sorted(sites, key=lambda site: len(site.site.train))
    probed = [by_rows[k * (len(sites) - 1) // max(PROBED - 1, 1)] for k in range(PROBED)]
    probed = list({site.site.id: site for site in probed}.values())
    chunk = chunk_size(plan.parameters)
    module = sites[0].flat.module
    last = LastModule(module)
    try:
        found, _ = train_many(probed, plan, state, 1)
    except FedcoreError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever torch and the task raise under vmap
        return f"{last.name} cannot be stacked: {str(error).strip().splitlines()[0][:160]}", {}
    finally:
        last.close()
    one_by_one, sequential = _timed(lambda: [site.train(plan, state, 1) for site in probed])
    apart = _distance(found, one_by_one)
    if apart > TOLERANCE:
        return (
            f"the updates of sites trained at once differ by {apart:.2g} of their length from those of sites trained "
            f"one by one, expected at most {TOLERANCE:g}: the loss of a batch may not be a mean over its rows, or the "
            "model draws at random or changes itself while it trains"
        ), {}
    whole = sites[:chunk]
    _, together = _timed(lambda: train_many(whole, plan, state, 1))
    return "", {
        "chunk": chunk,
        "sequential_ms": round(1000 * sequential / len(probed), 3),
        "batched_ms": round(1000 * together / len(whole), 3),
        "difference": float(f"{apart:.2g}"),
    }


def _distance(found: Updates, expected: Sequence[FloatVector]) -> float:
    """The largest distance of two updates of a site, in lengths of the expected one."""
    pairs = zip(found, expected, strict=True)
    lengths = ((np.linalg.norm(a - b), np.linalg.norm(b)) for a, b in pairs)
    return max(float(apart / length) if length else float(apart) for apart, length in lengths)


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    found = work()
    return found, time.perf_counter() - started
