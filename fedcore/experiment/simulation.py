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

from fedcore.errors import BadInput, RoundAbandoned
from fedcore.experiment.forked import fork_refusal
from fedcore.experiment.workers import Dealing, Workers, refusal
from fedcore.learning.executor import Choice, Executor, Sequential, choose
from fedcore.learning.guard import Guard, judge_all
from fedcore.learning.site import SiteTrainer
from fedcore.learning.state import JobState
from fedcore.learning.stopwatch import Stopwatch
from fedcore.learning.training import TrainReport
from fedcore.secagg.encode.pack import Opened
from fedcore.secagg.encode.partial import PartialSum
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol.absences import STAGES, Absence, Absences, earliest
from fedcore.secagg.protocol.schedule import PlannedRound, first_step, released_round, step_after
from fedcore.secagg.purposes import Purpose, purpose_of
from fedcore.secagg.summing import ExactSum, ProtectedTotal, RoundTrace, SumEngine, sites_of
from fedcore.seeds import generator
from fedcore.types import Contribution, FloatVector, Json, SiteId


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
        for site in sites if self.chance and training_round <= rounds else ():
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
        self.choice: Choice | None = None
        self.dealing: Dealing | None = None
        self.columns = sites[0].columns
        self.state = JobState.initial(plan, initial)
        self.step: PlannedRound | None = first_step(plan, len(self.columns))
        self.guards: Sequence[Guard] = ()
        """Of the sites, in their order; none where no site judges."""

    def choose_executor(self, wanted: str) -> None:
        """How sites are trained from now on, by the job's setting; after the federated statistics, which rows need."""
        self.choice = choose(wanted, self.sites, self.plan, self.state)
        if self.choice is not None:
            self.executor = self.choice.executor

    def use_workers(self, count: int) -> None:
        """Train and score the sites in so many processes from now on. Raises BadInput where that cannot be."""
        device = self.sites[0].job.run.device
        why = fork_refusal(accelerator=device != "cpu") or self.dealing_refusal
        if why:
            raise BadInput(f"workers: found {count}, but {why}")
        self.deal(Workers(self.executor, self.sites, self.plan, count))

    @property
    def dealing_refusal(self) -> str:
        """Why the sites cannot be trained by several processes, whoever starts them; "" where they can."""
        exact, app = isinstance(self.engine, ExactSum), self.sites[0].task.app is not None
        return refusal(self.plan, exact=exact, app=app)

    def deal(self, dealing: Dealing) -> None:
        """Train and score the sites in its processes from now on."""
        self.executor = self.dealing = dealing

    def close(self) -> None:
        """End the processes that the sites are dealt to."""
        if self.dealing is not None:
            self.dealing.close()

    @property
    def about_executor(self) -> Json | None:
        """As `result.json` has it; None where one process trains the sites one after the other."""
        chosen = None if self.choice is None else self.choice.to_json()
        if self.dealing is None:
            return chosen
        return (chosen or {"name": "sequential"}) | {self.dealing.called: self.dealing.count}

    @property
    def purpose(self) -> Purpose | None:
        return None if self.step is None else purpose_of(self.step.purpose)

    def absent(self, training_round: int) -> Absences:
        """Which sites leave this training round, and at which stage."""
        sites = self.plan.sites
        if self.plan.server.cohort:
            sites = tuple(sites_of(sites, self.cohort(training_round)))
        return self.leaving.of(training_round, sites, self.plan.rounds)

    def cohort(self, training_round: int) -> Sequence[int]:
        """Roster indices of the sites that a round is of: all, or those that the job's seed draws for it; of round 0
        are the sums before the first."""
        sites, wanted = len(self.plan.sites), self.plan.server.cohort
        if not wanted:
            return range(sites)
        drawn = generator(self.leaving.seed, training_round, "", "cohort")
        return sorted(drawn.choice(sites, wanted, replace=False).tolist())

    def judge(self, cohort: Sequence[int] | None = None) -> None:
        """The guards of all sites, or of a round's, judge the last released state. Raises GuardTripped."""
        if not self.guards:
            return
        judging = range(len(self.sites)) if cohort is None else cohort
        with self.watch("evaluate"):
            for index in judging:
                self.guards[index].local = self.sites[index].local(self.state)
            guards = [self.guards[index] for index in judging]
            judge_all(guards, self.state.server, released_round(self.state.done))

    def advance(self, witness: RoundTrace | None = None) -> Release:
        """The next round of the job, every step of the way of one update in order.

        witness: filled with what others hold of one site, for `experiment/exposure.py`.
        Raises RoundAbandoned where fewer sites than the threshold stay: the state is then the next round's.
        Raises GuardTripped, before anything is trained, where a site does not trust the state.
        """
        plan, step, start, purpose = self.plan, self.step, self.state, self.purpose
        assert step is not None
        assert purpose is not None
        cohort = self.cohort(step.training_round)
        if purpose.measures:
            self.judge(cohort)
        led: dict[int, JobState] = {}

        def contribute(indices: Sequence[int]) -> Iterator[tuple[int, Contribution]]:
            return self.executor.run([self.sites[k] for k in indices], plan, step, start)

        def add_up(indices: Sequence[int]) -> Iterator[PartialSum]:
            return self.executor.sums([self.sites[k] for k in indices], plan, step, start)

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
                roster=cohort, add_up=add_up,
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
