"""One site alone: its rows, its model, and its contribution to each round of a job.

A deployed site runs this in its training process; `prepare` does the same for every site of a
simulation. Invariant: built from the task, the job and one site's source alone, so a site finds the same
model and the same vectors wherever it runs.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fedcore.config import Job
from fedcore.learning.data.digest import rows_digest
from fedcore.learning.data.rows import RowLayout, Rows, load_rows
from fedcore.learning.data.split import Split, subsample
from fedcore.learning.data.statistics import Statistics
from fedcore.learning.guard import Guard, GuardRecord
from fedcore.learning.metric_sums import MetricTransport
from fedcore.learning.model import FlatModel, build_model
from fedcore.learning.optimisers import ServerState
from fedcore.learning.saved import model_bytes
from fedcore.learning.scoring import Scored, probe, score
from fedcore.learning.sitework import SiteRows, SiteWork, statistics_of
from fedcore.learning.state import JobState
from fedcore.learning.task import BUILT_IN, Task
from fedcore.learning.training import predict, task_code
from fedcore.secagg.plan import ModelShape, RoundPlan, canonical
from fedcore.secagg.protocol.schedule import PlannedRound, released_round
from fedcore.secagg.purposes import purpose_of
from fedcore.types import Contribution, FloatVector, SiteId


@dataclass(frozen=True)
class Unit:
    """Neutral statistics: mean 0, spread 1. They decide shapes only."""

    mean: Any
    std: Any

    @classmethod
    def of(cls, rows: Any) -> Unit:
        """For the columns of these rows."""
        size = len(rows.names)
        return cls(np.zeros(size), np.ones(size))


def standardised(rows: Any, scale: Any) -> Rows:
    """Rows as inputs, scaled by statistics or by `Unit`."""
    found: Rows = rows.standardise(scale)
    return found


def load_site(
    task: Task, split: Split, name: SiteId, index: int, source: Any, cap: int | None
) -> LoadedSite:
    """A site's rows, at most `cap` of them (None: all), split by the site's own rule.

    Raises BadInput for rows that cannot be used or dealt, TaskFailed where the task raises.
    """
    everything, test = whole = load_rows(task, source, name)
    if cap is not None:
        everything, test = subsample(split, everything, test, name, cap)
    train, tested = (everything, test) if test is not None else split.divide(everything, name)
    return LoadedSite(SiteRows(name, index, train, tested), everything, test, whole)


@dataclass(frozen=True)
class LoadedSite:
    """rows: split; everything: all that take part, but for the test part that the task brought itself.

    whole: the same two before rows above the public cap were left out.
    """

    rows: SiteRows
    everything: Rows
    test: Rows | None
    whole: tuple[Rows, Rows | None]

    @property
    def found(self) -> int:
        """All rows, also where there are more than the public cap."""
        return sum(len(part) for part in self.whole if part is not None)

    @property
    def note(self) -> str:
        """One line for the site's own log, or ""; never sent to the coordinator (PROTOCOL U)."""
        kept = len(self.rows.train) + len(self.rows.test)
        if kept == self.found:
            return ""
        return (
            f"Site {self.rows.id} has {self.found} rows, more than protect.max_examples = {kept}: it trains "
            f"and tests on a fixed choice of {kept} of them (hint: a larger cap in the job takes them all)."
        )


def first_rows(site: SiteRows) -> Rows:
    """Up to two rows, which fix shapes."""
    rows: Any = site.train.take(np.arange(min(2, len(site.train)), dtype=np.int64))
    return rows if rows.features is None else standardised(rows, Unit.of(rows))


def model_of(task: Task, job: Job, site: SiteRows) -> FlatModel:
    """The job's model as this site builds it: every site builds it under the same seed."""
    rows = first_rows(site)

    def first_pass(module: Any) -> None:
        predict(task, module, next(iter(rows.batches(len(rows), None))))

    with task_code(site.id, None, "model"):
        module = build_model(task.model, job.run.seed, first_pass)
    return FlatModel(module, job.round.buffers)


def sample_of(task: Task, job: Job, flat: FlatModel, site: SiteRows) -> Scored:
    """One scored batch, which fixes the number of outputs."""
    rows, seed = first_rows(site), job.run.seed
    return probe(task, flat.module, rows, seed=seed, round_=0, site=site.id)


def public_scale(rows: Any, standardise: str) -> Statistics | None:
    """The scale of the rows' declared ranges; None for rows without, and where statistics are federated."""
    if rows.features is None or standardise != "ranges":
        return None
    return Statistics.of_ranges(rows.names, rows.ranges)


def shape_of(
    task: Task, flat: FlatModel, transport: MetricTransport, rows: Any, standardise: str
) -> ModelShape:
    """The part of the plan that follows from a site's task and rows."""
    travels = rows.features is not None and standardise == "federated"
    return ModelShape(
        task.name, task.digest(), flat.parameters, flat.buffer_coordinates,
        len(rows.names) if travels else 0, _inputs_digest(rows), transport.wides,
    )  # fmt: skip


def _inputs_digest(rows: Any) -> str:
    """SHA-256 over how a table's raw columns become inputs; "" for rows that need no statistics.

    It is part of the plan, so sites that declare other ranges or categories do not share a sum.
    """
    layout: RowLayout | None = getattr(rows, "layout", None)
    return hashlib.sha256(canonical(asdict(layout))).hexdigest() if layout else ""


class LocalSite:
    """A site's task, rows and model for one job; `contribute` is called once for each vector.

    split: the site's own, independent of the job. note: for the site's log, or "".
    """

    def __init__(
        self, task: Task, job: Job, name: SiteId, source: Any, max_examples: int, split: Split
    ) -> None:
        self.task, self.job = task, job
        loaded = load_site(task, split, name, 0, source, max_examples)
        self.site, self.note = loaded.rows, loaded.note
        self.rows = rows_digest(*loaded.whole)
        self.public = public_scale(self.site.train, job.train.standardise)
        self.flat = model_of(task, job, self.site)
        self.transport = MetricTransport.of(
            task, sample_of(task, job, self.flat, self.site), max_examples
        )
        self.initial: FloatVector = self.flat.read()
        self.shape = shape_of(
            task, self.flat, self.transport, self.site.train, job.train.standardise
        )
        self._standardised: tuple[Statistics, SiteRows] | None = None
        self._guard: Guard | None = None

    def exported(self, state: JobState, *, public: bool = False) -> bytes:
        """The file of a released model, as `fedcore simulate` writes it.

        public: without where this site has its task, so that the bytes are the same at every site.
        """
        hidden = public and self.task.origin not in BUILT_IN
        task = replace(self.task, origin="") if hidden else self.task
        self.flat.write(state.server.model)  # also resets what training counted
        layout = getattr(self.site.train, "layout", None)
        return model_bytes(self.flat.module, task, state.statistics or self.public, layout)

    @property
    def columns(self) -> tuple[tuple[str, float, float], ...]:
        """(name, low, high) of each column that federated statistics are made of."""
        rows: Any = self.site.train
        if rows.features is None or self.public is not None:
            return ()
        return tuple((name, *bounds) for name, bounds in zip(rows.names, rows.ranges, strict=True))

    def contribute(
        self,
        plan: RoundPlan,
        step: PlannedRound,
        state: JobState,
        record: GuardRecord | None = None,
    ) -> Contribution:
        """The content of this site's vector for a step of the job, from the state it starts from.

        record: of this site's guard, which judges that state first and leaves its new memory there; None:
        it is not judged. Raises GuardTripped.
        """
        purpose = purpose_of(step.purpose)
        if record is not None and purpose.measures:
            self._judge(plan, state, record)
        return purpose.contribute(self, plan, step, state)

    def statistics(self) -> Contribution:
        """The sums over its columns as they are."""
        return statistics_of(self.site.train)

    def work(self, plan: RoundPlan, step: PlannedRound, state: JobState) -> SiteWork:
        """What it computes for a step, on its rows as inputs."""

        def metric_sums(site: SiteRows, server: ServerState) -> dict[str, list[int]]:
            return self.transport.sums(self.scored(server.model, site, step.training_round - 1))

        rows, seed = self.standard_rows(state), self.job.run.seed
        return SiteWork(self.task, plan, rows, self.flat, seed, metric_sums)

    def _judge(self, plan: RoundPlan, state: JobState, record: GuardRecord) -> None:
        site = self.standard_rows(state)
        if self._guard is None:
            self._guard = Guard(
                self.task, plan, site.id, site.train, self.flat, self.initial, self.job.run.seed
            )
        guard = self._guard
        guard.rules, guard.memory, guard.rows = record.rules, record.memory, site.train
        try:
            guard.judge(state.server, released_round(state.done))
        finally:
            record.memory = guard.memory

    def scored(self, model: FloatVector, site: SiteRows, round_: int) -> Scored | None:
        """The model on this site's test rows; None where it has none."""
        self.flat.write(model)
        if not len(site.test):
            return None
        return score(
            self.task, self.flat.module, site.test, seed=self.job.run.seed, round_=round_,
            site=site.id,
        )  # fmt: skip

    def standard_rows(self, state: JobState) -> SiteRows:
        """The site's rows as inputs; scaled once for the statistics they go by."""
        statistics = state.statistics or self.public
        if statistics is None:
            return self.site
        if self._standardised is None or self._standardised[0].to_json() != statistics.to_json():
            train = standardised(self.site.train, statistics)
            test = standardised(self.site.test, statistics)
            self._standardised = statistics, replace(self.site, train=train, test=test)
        return self._standardised[1]
