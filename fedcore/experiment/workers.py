"""Sites of a simulation trained and scored by several processes, each forked once and with one torch thread.

The state that a round starts from is in memory that all share, and so is the sum that a process makes of some sites;
what goes through pipes are roster indices, the integers beside the updates, and reports.

Invariant: which sites are trained together follows from the round's sites alone, and sums are of integers, so their
order is nothing: 1, 2 or 3 processes give the same bits. A process that dies is replaced and its sites are trained
again; what it did of them is in no sum.
"""

from __future__ import annotations

import math
import mmap
import multiprocessing
import os
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess
from typing import Any

import numpy as np

from fedcore.errors import BadInput
from fedcore.experiment.forked import forked, portable, settle
from fedcore.learning.executor import Executor
from fedcore.learning.model import single_thread
from fedcore.learning.rules import rules_of
from fedcore.learning.rules.averaging import RULES as AVERAGING
from fedcore.learning.scoring import Scored
from fedcore.learning.site import SiteTrainer
from fedcore.learning.state import JobState
from fedcore.learning.training import TrainReport
from fedcore.secagg.encode.partial import PartialSum
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.types import Contribution, Fields

PARTS = 8
"""Into how many pieces of work a round is divided at least, where that leaves each of them LEAST sites."""

LEAST, MOST = 16, 64
"""Sites of a piece. With fewer, training many at once would gain little; with more, processes would wait for the last
one."""

DEATHS = 2
"""After so many processes that died over the same sites, the run ends."""

_SPARE_BYTES = 1 << 20


def refusal(plan: RoundPlan, *, exact: bool, app: bool) -> str:
    """Why a job's sites cannot be trained in other processes; "" where they can. exact: whether sums are made without
    the protocol; app: whether the task is a Flower app."""
    if plan.server.groups is not None:
        return "sums are of groups of sites (round.aggregate)"
    if not exact and plan.layers.protects:
        return f"sums are protected ({plan.protection}), and the protocol plays in one process: --sum exact"
    if not exact:
        return (
            f"with protection {plan.protection!r} and no cohort the run shows what each party holds, from vectors in "
            "one process: --cohort, or another protection with --sum exact"
        )
    if app:
        return "a Flower app keeps its state in one process"
    if rules_of(plan.train) is not AVERAGING:
        return f"the algorithm {plan.train.algorithm!r} keeps values at each site"
    return ""


def pieces(sites: Sequence[SiteTrainer], most: int = MOST) -> list[list[SiteTrainer]]:
    """The sites of a round, those with many rows first, in pieces of about the same number of them, at most `most`: a
    function of the sites alone."""
    ordered = sorted(sites, key=lambda site: (-len(site.site.train), site.site.index))
    size = min(most, max(LEAST, math.ceil(len(sites) / PARTS)))
    count = math.ceil(len(sites) / size)
    ends = [len(sites) * k // count for k in range(count + 1)] if count else [0]
    return [ordered[a:b] for a, b in pairwise(ends)]


@dataclass
class _Work:
    """A piece for one process. state: which one it starts from, by its number and length in the shared memory. step:
    None to score the sites' test rows."""

    sites: tuple[int, ...]
    step: PlannedRound | None
    round: int
    state: tuple[int, int]
    deaths: int = 0


@dataclass
class Found:
    """The answer to some sites. indices, wides, reports: of the sum, of which a process of `Workers` has so many
    coordinates in its memory; scored: by the sites; seconds: by the stages of the watch; took: seconds in all."""

    coordinates: int = 0
    wides: list[Any] = field(default_factory=list)
    indices: tuple[int, ...] = ()
    reports: list[TrainReport | None] = field(default_factory=list)
    scored: list[Scored | None] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    took: float = 0.0
    error: BaseException | None = None


def computed(
    inner: Executor,
    sites: Sequence[SiteTrainer],
    plan: RoundPlan,
    step: PlannedRound | None,
    round_: int,
    state: JobState,
) -> tuple[Fields, Found]:
    """The sum of these sites for a step, and what is beside it; without a step their scores."""
    if step is None:
        found = Found(indices=tuple(site.site.index for site in sites))
        found.scored = [site.scored(state, round_) for site in sites]
        return np.zeros(0, dtype=np.uint64), found
    parts = list(inner.sums(sites, plan, step, state))
    total: Fields = np.zeros(len(parts[0].coordinates), dtype=np.uint64)
    for part in parts:
        total += part.coordinates
    found = Found(len(total), [wides for part in parts for wides in part.wides])
    found.indices = tuple(index for part in parts for index in part.indices)
    by_index = {site.site.index: site for site in sites}
    found.reports = [by_index[index].report for index in found.indices]
    return total, found


@dataclass
class _Process:
    process: ForkProcess
    connection: Connection[Any, Any]
    memory: mmap.mmap
    work: _Work | None = None


class Dealing(ABC):
    """An executor that deals pieces of a round to several processes, called so in `result.json`.

    inner: how each of them trains its sites. sites: all of the job. count: of processes.
    """

    called: str

    def __init__(
        self, inner: Executor, sites: Sequence[SiteTrainer], plan: RoundPlan, count: int
    ) -> None:
        self.inner, self.count, self.most = inner, count, min(MOST, getattr(inner, "chunk", MOST))
        self._sites, self._plan = sites, plan

    def ready(
        self, sites: Sequence[SiteTrainer], plan: RoundPlan, state: JobState, round_: int
    ) -> Iterator[SiteTrainer]:
        return self.inner.ready(sites, plan, state, round_)

    def run(
        self, sites: Sequence[SiteTrainer], plan: RoundPlan, step: PlannedRound, state: JobState
    ) -> Iterator[tuple[int, Contribution]]:
        return self.inner.run(sites, plan, step, state)

    def sums(
        self, sites: Sequence[SiteTrainer], plan: RoundPlan, step: PlannedRound, state: JobState
    ) -> Iterator[PartialSum]:
        assert plan is self._plan
        for total, found in self._dealt(pieces(sites, self.most), step, 0, state):
            for index, report in zip(found.indices, found.reports, strict=True):
                self._sites[index].report = report
            yield PartialSum(found.indices, total, found.wides)

    def scores(
        self, sites: Sequence[SiteTrainer], state: JobState, round_: int
    ) -> list[Scored | None]:
        scored: dict[int, Scored | None] = {}
        for _, found in self._dealt(pieces(sites), None, round_, state):
            scored.update(zip(found.indices, found.scored, strict=True))
        for site in sites:
            site.keep_scored(state, round_, scored[site.site.index])
        return [scored[site.site.index] for site in sites]

    @abstractmethod
    def close(self) -> None:
        """End the processes. Idempotent."""

    @abstractmethod
    def _dealt(
        self,
        some: Sequence[Sequence[SiteTrainer]],
        step: PlannedRound | None,
        round_: int,
        state: JobState,
    ) -> Iterator[tuple[Fields, Found]]:
        """`computed` of all pieces, in any order. Raises what the first piece raises that raises anything."""


class Workers(Dealing):
    """The costliest piece first, by what earlier rounds took, to processes that are forked at the first round, when
    the sites have their rows as inputs."""

    called = "workers"

    def __init__(
        self, inner: Executor, sites: Sequence[SiteTrainer], plan: RoundPlan, count: int
    ) -> None:
        super().__init__(inner, sites, plan, count)
        self._processes: list[_Process] = []
        self._memory: mmap.mmap | None = None
        self._state: JobState | None = None
        self._numbered = 0, 0
        self._rates: dict[int, float] = {}
        """{roster index: seconds a row when the site was last trained}."""

    def close(self) -> None:
        """End the processes."""
        for each in self._processes:
            each.process.kill()
        for each in self._processes:
            each.process.join()
            each.connection.close()
        self._processes = []

    def _dealt(
        self,
        some: Sequence[Sequence[SiteTrainer]],
        step: PlannedRound | None,
        round_: int,
        state: JobState,
    ) -> Iterator[tuple[Fields, Found]]:
        self._share(state)
        work = [
            _Work(tuple(s.site.index for s in piece), step, round_, self._numbered)
            for piece in some
        ]
        waiting = deque(sorted(work, key=self._cost, reverse=True))
        failed: list[tuple[tuple[int, ...], BaseException]] = []
        try:
            while waiting or any(each.work for each in self._processes):
                for each in self._processes:
                    if each.work is None and waiting:
                        self._send(each, waiting.popleft())
                busy = [each for each in self._processes if each.work is not None]
                ready = wait([each.connection for each in busy])
                for each in [each for each in busy if each.connection in ready]:
                    done, found = self._received(each)
                    if found is None:
                        waiting.appendleft(done)
                        continue
                    if found.error is not None:
                        failed.append((done.sites, found.error))
                        waiting.clear()
                        continue
                    self._learn(done, found)
                    total = np.frombuffer(each.memory, np.uint64, found.coordinates).copy()
                    if waiting:
                        self._send(each, waiting.popleft())
                    if not failed:
                        yield total, found
            if failed:
                raise min(failed, key=lambda each: each[0])[1]
        finally:
            if any(
                each.work for each in self._processes
            ):  # their answers would be taken for later ones
                self.close()

    def _cost(self, work: _Work) -> float:
        """Seconds that a piece will take; without experience, its rows."""
        rates = self._rates
        usual = sum(rates.values()) / len(rates) if rates else 1.0
        rows = {index: len(self._sites[index].site.train) for index in work.sites}
        return sum(count * rates.get(index, usual) for index, count in rows.items())

    def _learn(self, work: _Work, found: Found) -> None:
        rows = sum(len(self._sites[index].site.train) for index in work.sites)
        if work.step is not None and rows:
            self._rates |= dict.fromkeys(work.sites, found.took / rows)
        watch = self._sites[0].watch
        for stage, seconds in found.seconds.items():
            watch.seconds[stage] += seconds

    def _share(self, state: JobState) -> None:
        """Put a state where the processes read it, and start them where they are not there."""
        if state is not self._state or self._memory is None:
            data = state.to_bytes()
            if self._memory is None or len(data) > len(self._memory):
                self.close()  # they have the memory of their start
                self._memory = mmap.mmap(-1, 2 * len(data) + _SPARE_BYTES)
            self._memory[: len(data)] = data
            self._numbered, self._state = (self._numbered[0] + 1, len(data)), state
        while len(self._processes) < self.count:
            self._processes.append(self._start())

    def _start(self) -> _Process:
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        memory = mmap.mmap(-1, max(8, 8 * self._plan.coordinates))
        others = [ours, *(each.connection for each in self._processes)]
        process = forked(self._serve, (theirs, memory, others), "fedcore worker")
        theirs.close()
        return _Process(process, ours, memory)

    def _send(self, to: _Process, work: _Work) -> None:
        to.work = work
        with suppress(BrokenPipeError):  # it died: what is read next tells so
            to.connection.send(work)

    def _received(self, each: _Process) -> tuple[_Work, Found | None]:
        """A process's answer to its work; None where it died, in whose place there is another one then."""
        work = each.work
        assert work is not None
        each.work = None
        with suppress(EOFError, ConnectionResetError):
            found: Found = each.connection.recv()
            return work, found
        each.process.join()
        code = each.process.exitcode or 0
        each.connection.close()
        self._processes.remove(each)
        work.deaths += 1
        if work.deaths == DEATHS:
            how = (
                f"was killed by {signal.Signals(-code).name}"
                if code < 0
                else f"ended with code {code}"
            )
            names = ", ".join(self._plan.sites[index] for index in work.sites[:3])
            raise BadInput(
                f"workers: the process that trained {len(work.sites)} sites ({names}, ...) {how}, and so did the one "
                "that tried again",
                remedy="if memory ran out: fewer --workers; without --workers the task's own error is shown",
            )
        self._processes.append(self._start())
        return work, None

    def _serve(
        self, connection: Connection[Any, Any], memory: mmap.mmap, others: Sequence[Any]
    ) -> None:
        """The whole life of a process."""
        settle(others)
        # Files of its own: a thread of the parent may have held the locks of these at the fork.
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
        number, state = 0, self._state
        watch = self._sites[0].watch
        gone = EOFError, BrokenPipeError, ConnectionResetError  # what the parent's end raises
        with single_thread(), suppress(*gone):
            while True:
                work: _Work = connection.recv()
                found, started = Found(), time.perf_counter()
                watch.seconds = dict.fromkeys(watch.seconds, 0.0)
                try:
                    if work.state[0] != number:
                        assert self._memory is not None
                        number, length = work.state
                        state = JobState.from_bytes(self._memory[:length])
                    assert state is not None
                    sites = [self._sites[index] for index in work.sites]
                    total, found = computed(
                        self.inner, sites, self._plan, work.step, work.round, state
                    )
                    np.frombuffer(memory, np.uint64)[: len(total)] = total
                except BaseException as error:  # noqa: BLE001 - it is raised again in the parent
                    found.error = portable(error, "a worker")
                found.took, found.seconds = time.perf_counter() - started, dict(watch.seconds)
                connection.send(found)
        os._exit(0)
