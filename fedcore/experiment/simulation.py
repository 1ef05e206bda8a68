"""Federated rounds in one process: every site, the coordinator, and real encoding and protection.

Read `Federation.round` first: train and quantise (`sitework.py`), sum under protection, dequantise and
apply (`learning/released.py`). What happens between quantised fields and their opened sum (pack, tag,
protect, fold, open, check) is `in_process.InProcessFederation.protected_sum`.

Invariant: the opened sum is compared with the plain integer sum of the same fields, slot for slot, in
every round (`RoundOutcome.twin`), so "protection costs no accuracy" is measured and never assumed.
A round counts its survivors only: who is not in the sum is in no mean, no range and no metric.
Nothing here depends on the other arms; `experiment/arms.py` runs them as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedcore.learning.data.rows import TableRows
from fedcore.learning.data.statistics import Statistics, statistics_vector
from fedcore.learning.guard import Guard, judge_all
from fedcore.learning.model import FlatModel
from fedcore.learning.optimisers import ServerState
from fedcore.learning.possible import check_possible
from fedcore.learning.released import applied, calibrated, finished
from fedcore.learning.sitework import MetricSums, SiteRows, SiteWork, statistics_of
from fedcore.learning.stopwatch import Stopwatch
from fedcore.learning.task import Task
from fedcore.learning.training import TrainReport
from fedcore.secagg.encode.pack import Opened
from fedcore.secagg.in_process import Contribute, InProcessFederation, ProtectedTotal, RoundTrace
from fedcore.secagg.plan import RoundPlan, VectorSpec, canonical
from fedcore.secagg.protocol.absences import STAGES, Absence, Absences, earliest
from fedcore.seeds import generator
from fedcore.types import Contribution, SiteId

PREPARATORY = 0
"""The training round of what comes before round 1: the statistics and the calibration of the range."""


def federated_statistics(
    epoch: InProcessFederation,
    sites: Sequence[SiteRows],
    watch: Stopwatch,
    *,
    allow_few_sites: bool,
) -> tuple[Statistics, ProtectedTotal]:
    """Means and spreads of the table's features over all sites' training rows (PROTOCOL W)."""
    first = sites[0].train
    assert isinstance(first, TableRows)

    def contribute(index: int) -> Contribution:
        with watch("encode"):
            return statistics_of(sites[index].train)

    columns = [(name, *bounds) for name, bounds in zip(first.names, first.ranges, strict=True)]
    spec = statistics_vector(len(columns), epoch.plan.max_examples)

    def finish(opened: Opened, contributors: int) -> Statistics:
        return finished(epoch.plan, columns, opened, contributors, allow_few_sites=allow_few_sites)

    def lead(opened: Opened, contributors: int) -> bytes:
        return canonical(finish(opened, contributors).to_json())

    total = epoch.protected_sum(spec, PREPARATORY, contribute, b"", watch, lead=lead)
    return finish(total.opened, len(total.survivors)), total


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
        drawn = self._drawn(training_round, sites) if training_round <= rounds else []
        return earliest([*self.named, *drawn], training_round)

    def _drawn(self, training_round: int, sites: Sequence[SiteId]) -> list[Absence]:
        found = []
        for site in sites:
            chance = generator(self.seed, training_round, site, "dropout")
            if chance.random() < self.chance:
                found.append(Absence(training_round, STAGES[chance.integers(len(STAGES))], site))
        return found


@dataclass(frozen=True)
class RoundOutcome:
    """What a round leaves: the new state, its twin from the plain integer sum, and the measurements.

    survivors: roster indices, ascending; reports: of their training, in this order.
    """

    state: ServerState
    twin: ServerState
    survivors: tuple[int, ...]
    reports: tuple[TrainReport, ...]
    clipped: int
    bytes_up: int
    bytes_down: int
    metric_sums: Mapping[str, list[int]]


@dataclass
class Federation:
    """The sites and the coordinator of one federated run.

    metric_sums: `metric_sums(site, state)`, the wide integers of a site's metrics of the model the
    round starts from (they ride in the round's vector). statistics: canonical bytes of the federated
    statistics, which the state tag covers with the rest of what a site starts from.
    guards: of the sites, in their order; none where nobody looks. released: the last released round.
    """

    task: Task
    plan: RoundPlan
    epoch: InProcessFederation
    sites: Sequence[SiteRows]
    flat: FlatModel
    seed: int
    metric_sums: MetricSums
    statistics: bytes = b""
    leaving: Leaving = field(default_factory=Leaving)
    watch: Stopwatch = field(default_factory=Stopwatch)
    guards: Sequence[Guard] = ()
    released: int = 0

    def judge(self, state: ServerState) -> None:
        """Every site's guard looks at the last released state. Raises GuardTripped."""
        with self.watch("evaluate"):
            judge_all(self.guards, state, self.released)

    def work(self, site: SiteRows) -> SiteWork:
        """What this site computes, on the run's one module."""
        return SiteWork(
            self.task, self.plan, site, self.flat, self.seed, self.metric_sums, self.watch
        )

    def calibrate(self, state: ServerState) -> ServerState:
        """R_0 from protected counts over 24 powers of two; sites train round 1 again afterwards."""

        def contribute(index: int) -> Contribution:
            return self.work(self.sites[index]).exceeding(state)

        def lead(opened: Opened, contributors: int) -> ServerState:
            return calibrated(self.plan, state, opened, contributors)

        total = self._sum(self.plan.range_vector, PREPARATORY, contribute, state, lead)
        return lead(total.opened, len(total.survivors))

    def round(
        self, state: ServerState, round_: int, witness: RoundTrace | None = None
    ) -> RoundOutcome:
        """One round from `state`: every arrow of the way of one update, in order.

        witness: filled with what others hold of one site, for `experiment/exposure.py`.
        Raises RoundAbandoned where fewer sites than the threshold stay; `state` is then the next one's.
        Raises GuardTripped, before anything is trained, where a site does not trust `state`.
        """
        self.judge(state)
        plan, reports = self.plan, dict[int, TrainReport]()

        def contribute(index: int) -> Contribution:
            found, reports[index] = self.work(self.sites[index]).update(state, round_)
            return found

        def lead(opened: Opened, contributors: int) -> ServerState:
            return applied(plan, state, opened, contributors)

        absences = self.absent(round_)
        total = self._sum(plan.update_vector, round_, contribute, state, lead, absences, witness)
        survivors = total.survivors
        with self.watch("unprotect"):
            released = applied(plan, state, total.opened, len(survivors))
            twin = released
            if total.twin is not total.opened:
                twin = applied(plan, state, total.twin, len(survivors))
        self.released = round_
        wides = total.opened.wides
        return RoundOutcome(
            released, twin, survivors, tuple(reports[index] for index in survivors),
            wides["over_range"][0], total.bytes_up, total.bytes_down,
            {wide.name: wides[wide.name] for wide in plan.metric_sums},
        )  # fmt: skip

    def final_metrics(self, state: ServerState) -> ProtectedTotal:
        """The protected metrics-only round after the last one: the metric sums of the final model.

        It is training round R + 1, also of a run that was stopped before round R. Raises
        RoundAbandoned, and GuardTripped where a site does not trust the final model.
        """
        self.judge(state)

        def contribute(index: int) -> Contribution:
            return self.work(self.sites[index]).metrics(state)

        def lead(opened: Opened, contributors: int) -> ServerState:
            check_possible(self.plan, self.plan.metrics_vector, opened, contributors)
            return state

        last, spec = self.plan.rounds + 1, self.plan.metrics_vector
        total = self._sum(spec, last, contribute, state, lead, self.absent(last))
        lead(total.opened, len(total.survivors))  # `plain` has no site that looks before it is used
        return total

    def absent(self, training_round: int) -> Absences:
        """Who leaves this training round, and at which stage."""
        return self.leaving.of(training_round, self.plan.sites, self.plan.rounds)

    def _sum(
        self,
        spec: VectorSpec,
        training_round: int,
        contribute: Contribute,
        state: ServerState,
        lead: Callable[[Opened, int], ServerState],
        absences: Absences | None = None,
        witness: RoundTrace | None = None,
    ) -> ProtectedTotal:
        """lead: the state that a sum of so many sites leads to, which the release certificate names."""

        def released(opened: Opened, contributors: int) -> bytes:
            return self._canonical(lead(opened, contributors))

        return self.epoch.protected_sum(
            spec, training_round, contribute, self._canonical(state), self.watch, lead=released,
            absences=absences, witness=witness,
        )  # fmt: skip

    def _canonical(self, state: ServerState) -> bytes:
        """All that a site starts from (PROTOCOL S)."""
        return state.canonical() + self.statistics
