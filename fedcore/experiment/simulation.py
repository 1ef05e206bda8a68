"""A job in one process: every site, the order of its rounds, and real encoding and protection.

Read `Federation.advance` first: the next step of the schedule, each site's vector for it (`learning/site.py`),
their protected sum (`secagg/in_process.py`), and the state that the sum leads to (`secagg/purposes.py`), as in a
deployed job.

Invariant: the opened sum is compared with the plain integer sum of the same fields, slot for slot, in
every round (`Release.twin`), so "protection costs no accuracy" is measured and never assumed.
A round counts its survivors only: who is not in the sum is in no mean, no range and no metric.
Nothing here depends on the other arms; `experiment/arms.py` runs them as well.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedcore.errors import RoundAbandoned
from fedcore.learning.executor import Executor, Sequential
from fedcore.learning.guard import Guard, judge_all
from fedcore.learning.site import SiteTrainer
from fedcore.learning.state import JobState
from fedcore.learning.stopwatch import Stopwatch
from fedcore.learning.training import TrainReport
from fedcore.secagg.encode.pack import Opened
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol.absences import STAGES, Absence, Absences, earliest
from fedcore.secagg.protocol.schedule import PlannedRound, first_step, released_round, step_after
from fedcore.secagg.purposes import Purpose, purpose_of
from fedcore.secagg.summing import ProtectedTotal, RoundTrace, SumEngine, sites_of
from fedcore.seeds import generator
from fedcore.types import Contribution, FloatVector, SiteId


@dataclass(frozen=True)
class Leaving:
    """Simulated absences of a job: the ones it names, and the chance of one in every round of training.

    Invariant: a pure function of the job, so every protection and every arm has the same absences.
    """

    named: tuple[Absence, ...] = ()
    chance: float = 0.0
    seed: int = 0

    def of(self, training_round: int, sites: Sequence[SiteId], rounds: int) -> Absences:
        """{site: the stage from which it sends nothing}. The metrics-only round, `rounds` + 1, has
        named ones only."""
        found = list(self.named)
        for site in sites if training_round <= rounds else ():
            chance = generator(self.seed, training_round, site, "dropout")
            if chance.random() < self.chance:
                found.append(Absence(training_round, STAGES[chance.integers(len(STAGES))], site))
        return earliest(found, training_round)


@dataclass(frozen=True)
class Release:
    """What a released round leaves: the new state, its twin from the plain integer sum, and measurements.

    twin: `state` itself where the sums are equal. reports: of the survivors' training, in the order of `total`.
    """

    state: JobState
    twin: JobState
    reports: tuple[TrainReport, ...]
    total: ProtectedTotal


class Federation:
    """The sites and the coordinator of one job.

    initial: (d,) float32, the model that the job begins with. allow_few_sites: whether statistics of a column
    that fewer than 3 sites have are taken. step: the round that comes next, None after the last one.
    """

    def __init__(
        self,
        plan: RoundPlan,
        sites: Sequence[SiteTrainer],
        engine: SumEngine,
        initial: FloatVector,
        leaving: Leaving,
        watch: Stopwatch,
        *,
        allow_few_sites: bool = False,
    ) -> None:
        self.plan, self.sites, self.engine = plan, sites, engine
        self.leaving, self.watch, self.allow_few_sites = leaving, watch, allow_few_sites
        self.executor: Executor = Sequential()
        self.columns = sites[0].columns
        self.state = JobState.initial(plan, initial)
        self.step: PlannedRound | None = first_step(plan, len(self.columns))
        self.guards: Sequence[Guard] = ()
        """Of the sites, in their order; none where no site judges."""

    @property
    def purpose(self) -> Purpose | None:
        return None if self.step is None else purpose_of(self.step.purpose)

    def absent(self, training_round: int) -> Absences:
        """Which sites leave this training round, and at which stage."""
        return self.leaving.of(training_round, self.plan.sites, self.plan.rounds)

    def judge(self) -> None:
        """Every site's guard judges the last released state. Raises GuardTripped."""
        with self.watch("evaluate"):
            for site, guard in zip(self.sites, self.guards, strict=False):
                guard.local = site.local(self.state)
            judge_all(self.guards, self.state.server, released_round(self.state.done))

    def advance(self, witness: RoundTrace | None = None) -> Release:
        """The next round of the job, every step of the way of one update in order.

        witness: filled with what others hold of one site, for `experiment/exposure.py`.
        Raises RoundAbandoned where fewer sites than the threshold stay: the state is then the next round's.
        Raises GuardTripped, before anything is trained, where a site does not trust the state.
        """
        plan, step, start, purpose = self.plan, self.step, self.state, self.purpose
        assert step is not None
        assert purpose is not None
        if purpose.measures:
            self.judge()
        led: dict[int, JobState] = {}

        def contribute(indices: Sequence[int]) -> Iterator[tuple[int, Contribution]]:
            return self.executor.run([self.sites[k] for k in indices], plan, step, start)

        def lead(opened: Opened, survivors: Sequence[SiteId]) -> bytes:
            led[id(opened)] = found = start.after(
                plan, step, opened, survivors, self.columns, allow_few_sites=self.allow_few_sites
            )
            return found.canonical()

        try:
            total = self.engine.sum(
                purpose.vector(plan, len(self.columns)), step.training_round, contribute,
                start.canonical(), self.watch, lead=lead, witness=witness,
                absences={} if purpose.needed else self.absent(step.training_round),
            )  # fmt: skip
        except RoundAbandoned:
            self._next(step, released=False)
            raise
        if total.twin is not total.opened:
            lead(total.twin, sites_of(plan.sites, total.survivors))
        self.state = led[id(total.opened)]
        self._next(step, released=True)
        reports = (self.sites[k].report for k in total.survivors) if purpose.trains else ()
        return Release(self.state, led[id(total.twin)], tuple(filter(None, reports)), total)

    def measure(self) -> Release:
        """The metrics-only round, also of a job that was stopped before its last round of training."""
        while self.step is not None and purpose_of(self.step.purpose).trains:
            self._next(self.step, released=False)
        return self.advance()

    def _next(self, step: PlannedRound, *, released: bool) -> None:
        self.step = step_after(self.plan, len(self.columns), step, released=released)
