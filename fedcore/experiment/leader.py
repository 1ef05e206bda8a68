"""Sites of a simulation trained and scored by the ranks of a run under torchrun, on one machine or several.

Rank 0 has the run: its schedule, state, arms, files and output. The other ranks follow: each has all rows and settings,
and gets the state and which sites to train; what they sum is added to rank 0's by one reduction of integers, beside
which their reports travel.

Invariant: which sites are trained together follows from the round's sites alone (`workers.pieces`), and sums are of
integers, so any number of ranks gives the bits of one process with one worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fedcore.experiment.forked import portable
from fedcore.experiment.workers import Dealing, Found, computed
from fedcore.learning.device import repeatable
from fedcore.learning.executor import Executor
from fedcore.learning.model import single_thread
from fedcore.learning.ranks import Ranks
from fedcore.learning.site import SiteTrainer
from fedcore.learning.state import JobState
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.secagg.purposes import purpose_of
from fedcore.types import Fields

Piece = tuple[int, ...]
"""Roster indices of sites that are trained together."""


@dataclass(frozen=True)
class _Order:
    """What rank 0 asks of all ranks. pieces: by rank. step: None to score the sites' test rows. state: its bytes where
    it is another one than before."""

    pieces: tuple[tuple[Piece, ...], ...]
    step: PlannedRound | None
    round: int
    state: bytes | None


class Leader(Dealing):
    """Rank 0. The others work for it until `dismiss`, also after the last round; where it fails, they see it end."""

    called = "ranks"

    def __init__(
        self, inner: Executor, sites: Sequence[SiteTrainer], plan: RoundPlan, ranks: Ranks
    ) -> None:
        super().__init__(inner, sites, plan, ranks.count)
        self._ranks = ranks
        self._state: JobState | None = None

    def close(self) -> None:
        """Nothing: the others are not of this process."""

    def dismiss(self) -> None:
        """The run has its result: the others end as well. Raises RankLost."""
        self._ranks.broadcast(None)

    def _dealt(
        self,
        some: Sequence[Sequence[SiteTrainer]],
        step: PlannedRound | None,
        round_: int,
        state: JobState,
    ) -> Iterator[tuple[Fields, Found]]:
        data = None if state is self._state else state.to_bytes()
        work = _Order(shared_out(some, self.count), step, round_, data)
        self._ranks.broadcast(work)
        self._state = state
        total, answers = _answered(self._ranks, self.inner, self._sites, self._plan, work, state)
        watch, whole = self._sites[0].watch, Found(len(total))
        for rank, found in enumerate(answers):
            if found.error is not None:
                raise found.error
            whole.indices += found.indices
            whole.wides += found.wides
            whole.reports += found.reports
            whole.scored += found.scored
            for stage, seconds in found.seconds.items() if rank else ():
                watch.seconds[stage] += seconds
        if whole.indices:
            yield total, whole


def follow(ranks: Ranks, inner: Executor, sites: Sequence[SiteTrainer], plan: RoundPlan) -> None:
    """The life of every other rank: to do what rank 0 asks, until it asks for nothing more. Raises RankLost."""
    state: JobState | None = None
    with single_thread(), repeatable():
        while (work := ranks.broadcast(_ANSWER)) is not None:
            if work.state is not None:
                state = JobState.from_bytes(work.state)
            assert state is not None
            _answered(ranks, inner, sites, plan, work, state)


_ANSWER: _Order | None = None
"""What a rank that only receives puts into a broadcast."""


def shared_out(
    some: Sequence[Sequence[SiteTrainer]], ranks: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """The pieces of each rank: the largest one first, to the rank with the fewest rows so far."""
    rows, found = [0] * ranks, list[list[Piece]]([] for _ in range(ranks))
    sized = [(sum(len(site.site.train) for site in piece), piece) for piece in some]
    for size, piece in sorted(sized, key=lambda each: -each[0]):
        rank = rows.index(min(rows))
        rows[rank] += size
        found[rank].append(tuple(site.site.index for site in piece))
    return tuple(map(tuple, found))


def _answered(
    ranks: Ranks,
    inner: Executor,
    sites: Sequence[SiteTrainer],
    plan: RoundPlan,
    work: _Order,
    state: JobState,
) -> tuple[Fields, list[Found]]:
    """This rank's part of some work; at rank 0 the sum of all ranks' and their answers, in their order."""
    size = 0
    if work.step is not None:
        spec = purpose_of(work.step.purpose).vector(plan, len(sites[0].columns))
        size = spec.coordinates
    total: Fields = np.zeros(size, dtype=np.uint64)
    whole, watch = Found(), sites[0].watch
    before = dict(watch.seconds)
    try:
        for piece in work.pieces[ranks.rank]:
            these = [sites[index] for index in piece]
            part, found = computed(inner, these, plan, work.step, work.round, state)
            total += part
            whole.indices += found.indices
            whole.wides += found.wides
            whole.reports += found.reports
            whole.scored += found.scored
    except Exception as error:  # noqa: BLE001 - rank 0 raises it again
        whole.error = portable(error, f"rank {ranks.rank}") if ranks.rank else error
    whole.seconds = {stage: watch.seconds[stage] - seconds for stage, seconds in before.items()}
    if size:
        total = ranks.add(total)
    return total, ranks.gather(whole)
