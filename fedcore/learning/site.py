"""One site of a job: its rows, its model, and its vector for each purpose of a round.

Read `SiteTrainer.update` first: train, quantise, count what rides with it. A deployed site runs this in its
training process, a simulation for every site in turn (`executor.py`), so both give the same bits.

Invariant: results depend only on the task, the job, the site's rows and the state at the start, not on the
process that runs it or on other sites.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fedcore.config import Job, train_plan
from fedcore.errors import BadInput
from fedcore.learning import findings
from fedcore.learning.adaptive_range import exceedance_counts, exceeds
from fedcore.learning.data.loading import load_rows
from fedcore.learning.data.rows import DatasetRows, RowLayout, Rows, TableRows, rows_digest
from fedcore.learning.data.split import Split, ValidationPart, capped, divided
from fedcore.learning.data.statistics import Column, Statistics, finish_statistics, site_sums
from fedcore.learning.data.targets import SIZES, TargetScale, sizes
from fedcore.learning.device import require_device
from fedcore.learning.findings import Look
from fedcore.learning.guard import Guard, GuardRecord
from fedcore.learning.kept import KeptValues
from fedcore.learning.local_round import SiteRound, TrainedAhead
from fedcore.learning.metric_sums import MetricTransport
from fedcore.learning.model import FlatModel, build_model, norm_statistics, seeded
from fedcore.learning.own_statistics import average_own, use_own_statistics
from fedcore.learning.private_gradients import clipped, clipped_sum, refuse_site
from fedcore.learning.private_scores import with_metric_noise
from fedcore.learning.rules import rules_of
from fedcore.learning.rules.parts import Values
from fedcore.learning.saved import Module, model_bytes
from fedcore.learning.schedules import at_full_rate
from fedcore.learning.scoring import Scored, probe, score
from fedcore.learning.state import JobState
from fedcore.learning.stopwatch import Stopwatch
from fedcore.learning.task import BUILT_IN, Task
from fedcore.learning.training import TrainReport, predict, task_code
from fedcore.learning.warm_start import start_from
from fedcore.secagg.algorithms import refuse_own_train
from fedcore.secagg.crypto.entropy import Entropy, OsEntropy
from fedcore.secagg.encode.quantise import quantise
from fedcore.secagg.plan import EXCEEDS, ModelShape, RoundPlan, canonical
from fedcore.secagg.privacy.mechanism import with_noise
from fedcore.secagg.privacy.noise import sample
from fedcore.secagg.privacy.privacy_plan import SITE, PrivacyPlan
from fedcore.secagg.protocol.schedule import PlannedRound, released_round
from fedcore.secagg.purposes import purpose_of
from fedcore.seeds import generator
from fedcore.types import Contribution, FloatVector, SiteId, WideVector

NO_COORDINATES = np.empty(0, dtype=np.uint64)


@dataclass(frozen=True)
class SiteRows:
    """One site's rows, split: `index` is its place in the roster.

    validation: rows of the training part that no arm trains on, None where the job keeps none apart.
    """

    id: SiteId
    index: int
    train: Rows
    test: Rows
    validation: Rows | None = None

    def __len__(self) -> int:
        return sum(
            len(part) for part in (self.train, self.test, self.validation) if part is not None
        )

    def validated(self) -> SiteRows:
        """The site with its validation part in the place of the test part, for `scored`."""
        return self if self.validation is None else replace(self, test=self.validation)

    def scored(self, task: Task, module: Module, seed: int, round_: int) -> Scored | None:
        """A model on the test rows; None where there are none. Raises TaskFailed and BadInput."""
        if not len(self.test):
            return None
        return score(task, module, self.test, seed=seed, round_=round_, site=self.id)


def load_site(
    task: Task,
    split: Split,
    name: SiteId,
    index: int,
    source: Any,
    cap: int | None,
    validation: ValidationPart | None = None,
) -> LoadedSite:
    """A site's rows, at most `cap` of them (None: all), split by the site's own rule.

    Raises BadInput for rows that cannot be used or dealt, TaskFailed where the task raises.
    """
    with seeded(0, 0, name, "data"):  # of no job: every job has the same rows
        everything, test = whole = load_rows(task, source, name)
        everything, test = capped(split, everything, test, name, cap)
        train, tested, apart = divided(split, everything, test, name, validation)
    return LoadedSite(SiteRows(name, index, train, tested, apart), everything, test, whole)


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
    def note(self) -> str:
        """One line for the site's own log, or ""; never sent to the coordinator (PROTOCOL U)."""
        kept = len(self.rows)
        found = sum(len(part) for part in self.whole if part is not None)
        if kept == found:
            return ""
        return (
            f"Site {self.rows.id} has {found} rows, more than protect.max_examples = {kept}: it trains "
            f"and tests on a fixed choice of {kept} of them (hint: a larger cap in the job takes them all)."
        )

    @property
    def class_counts(self) -> dict[str, int]:
        """{class: rows}, over all that take part; empty where targets are no classes."""
        parts = [rows.labels() for rows in (self.everything, self.test) if rows is not None]
        known = [part for part in parts if part is not None]
        if not known:
            return {}
        values, counts = np.unique(np.concatenate(known), return_counts=True)
        return {str(int(v)): int(c) for v, c in zip(values, counts, strict=True)}

    @property
    def groups(self) -> int:
        """How many groups the site's rows are of, 0 where every row stands for itself."""
        parts = [rows.groups for rows in (self.everything, self.test) if rows is not None]
        return len({group for part in parts if part is not None for group in part.tolist()})

    def look(self, task: Task, job: Job, flat: FlatModel) -> Look:
        """What is probably wrong with the task here. Raises BadInput and TaskFailed for what certainly is."""
        parts = [part for part in (self.everything, self.test) if part is not None]
        reads = isinstance(self.rows.train, DatasetRows)
        rows = first_rows(self.rows, findings.ROWS_READ if reads else findings.ROWS)
        if task.target_range is not None and not isinstance(rows, TableRows):
            rows = rows.for_loss(TargetScale.of_range(*task.target_range), adds_rows=False)
        return findings.look_at(
            task, flat, self.rows.id, rows, parts, job.run.seed, train_rows=len(self.rows.train),
            scales=learns_scale(task, job, self.rows.train),
        )  # fmt: skip

    @property
    def unknown(self) -> dict[str, int]:
        """Rows per column of a table whose category was not declared (only where > 0)."""
        return self.everything.unknown if isinstance(self.everything, TableRows) else {}


def learns_scale(task: Task, job: Job, rows: Rows) -> bool:
    """Whether the scale of a regression's targets comes from federated statistics: where the job asks for them, the
    task declares no range, and targets are in memory."""
    return (
        job.train.standardise == "federated"
        and task.is_regression
        and task.target_range is None
        and task.predict is None
        and not isinstance(rows, DatasetRows)
    )


def first_rows(site: SiteRows, most: int = 2) -> Rows:
    """Up to `most` rows; two fix shapes."""
    rows = site.train.take(np.arange(min(most, len(site.train)), dtype=np.int64))
    if not isinstance(rows, TableRows):
        return rows
    return rows.standardise(Statistics.of_ranges(rows.layout.names, rows.layout.ranges))


def model_of(task: Task, job: Job, site: SiteRows) -> FlatModel:
    """The job's model as this site builds it: under the seed of all sites, or a released model (`initial`).

    Raises BadInput where that is another one."""
    rows = first_rows(site)

    def first_pass(module: Any) -> None:
        predict(task, module, next(iter(rows.batches(len(rows), None))))

    with task_code(site.id, None, "model"):
        module = build_model(task.model, job.run.seed, first_pass)
    device, untrained = require_device(job.run.device), None
    stays, fixed = job.train.local_parameters, job.train.frozen_parameters
    if job.run.initial is not None:
        untrained = FlatModel(module, job.round.buffers, None, stays, fixed).read()
        layout = site.train.layout if isinstance(site.train, TableRows) else None
        start_from(Path(job.run.initial), module, layout)
    return FlatModel(module.to(device), job.round.buffers, untrained, stays, fixed)


def sample_of(task: Task, job: Job, flat: FlatModel, site: SiteRows) -> Scored:
    """One scored batch, which fixes the number of outputs."""
    rows, seed = first_rows(site), job.run.seed
    return probe(task, flat.module, rows, seed=seed, round_=0, site=site.id)


def _names_and_ranges(
    columns: Sequence[Column],
) -> tuple[list[str], list[tuple[float, float]]]:
    return [name for name, *_ in columns], [(low, high) for _, low, high in columns]


def _equal(one: Statistics | None, other: Statistics | None) -> bool:
    if one is None or other is None:
        return one is other
    return one is other or one.to_json() == other.to_json()


@dataclass
class SiteTrainer:
    """One site's side of the rounds of one job.

    site: its rows as they are. flat: the model's one flat view, overwritten at each use. initial: (d,) float32,
    the model that the job begins with. watch: counts seconds. note: for the site's log, or "". rows: SHA-256
    of the rows, hex. report: of the last training. digests: of the model at the start; empty in one process,
    which compares the models themselves. adds_rows: as in `ArrayRows`. kept: what it keeps under the job's algorithm.
    ahead: its next training, where an executor has done it beside that of other sites. own_vectors: whether its class
    makes vectors in a way of its own, and not from `train` and `beside`.
    """

    task: Task
    job: Job
    site: SiteRows
    flat: FlatModel
    transport: MetricTransport
    initial: FloatVector
    watch: Stopwatch = field(default_factory=Stopwatch)
    note: str = ""
    rows: str = ""
    report: TrainReport | None = None
    digests: tuple[str, ...] = ()
    adds_rows: bool = False
    kept: KeptValues = field(default_factory=KeptValues)
    ahead: TrainedAhead | None = None
    own_vectors: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.task.train is not None:
            refuse_own_train(self.job.train.algorithm, self.task.name)
        if (private := self.job.privacy).epsilon is not None:
            refuse_site(self.task, self.flat.module, self.site.train, private.unit, self.site.id)
        self._rules = rules_of(train_plan(self.job.train))
        self._learns_scale = learns_scale(self.task, self.job, self.site.train)
        self._inputs: tuple[Statistics | None, SiteRows] | None = None
        self._scored: tuple[object, int, Scored | None] = (None, 0, None)
        self._guard: Guard | None = None

    @classmethod
    def load(
        cls, task: Task, job: Job, name: SiteId, source: Any, max_examples: int, split: Split
    ) -> SiteTrainer:
        """A site by itself. split: its own, independent of the job. Raises BadInput and TaskFailed."""
        task = task.at_source(source)
        loaded = load_site(task, split, name, 0, source, max_examples)
        flat = model_of(task, job, loaded.rows)
        initial, digests = flat.read(), flat.digests()
        look = loaded.look(task, job, flat)
        said = findings.lines(look.findings)
        note = " ".join(
            filter(None, [loaded.note, *(f"{text} (hint: {hint})." for text, hint in said)])
        )
        transport = MetricTransport.of(task, sample_of(task, job, flat, loaded.rows), max_examples)
        return cls(
            task, job, loaded.rows, flat, transport, initial,
            note=note, rows=rows_digest(*loaded.whole), digests=digests,
            adds_rows=look.adds_rows,
        )  # fmt: skip

    @property
    def layout(self) -> RowLayout | None:
        """How a table's raw columns become inputs; None for rows that need no statistics."""
        return self.site.train.layout if isinstance(self.site.train, TableRows) else None

    @cached_property
    def public(self) -> Statistics | None:
        """The scale of the rows' declared ranges, where the job goes by these."""
        if self.layout is None or self.job.train.standardise != "ranges":
            return None
        return Statistics.of_ranges(self.layout.names, self.layout.ranges)

    @property
    def columns(self) -> tuple[Column, ...]:
        """(name, low, high) of each column that federated statistics are made of: the inputs, then the target's."""
        target = (SIZES,) if self._learns_scale else ()
        if self.layout is None or self.public is not None:
            return target
        pairs = zip(self.layout.names, self.layout.ranges, strict=True)
        return (*((name, *bounds) for name, bounds in pairs), *target)

    @property
    def shape(self) -> ModelShape:
        """The part of the plan that follows from a site's task and rows; its `inputs` are SHA-256, so that
        sites that declare other ranges or categories do not share a sum."""
        layout = canonical(asdict(self.layout)) if self.layout is not None else None
        return ModelShape(
            self.task.name, self.task.digest(), self.flat.parameters, self.flat.buffer_coordinates,
            len(self.columns), hashlib.sha256(layout).hexdigest() if layout else "", self.transport.wides,
            self.digests,
        )  # fmt: skip

    def standard_rows(self, state: JobState) -> SiteRows:
        """The site's rows as inputs; scaled once for the statistics they go by."""
        statistics, found = self._statistics_of(state), self._inputs
        if found is None or not _equal(found[0], statistics):
            self._inputs = found = statistics, self._scaled(statistics)
        return found[1]

    def target_scale(self, state: JobState) -> TargetScale | None:
        """How a regression's targets are scaled; None where they are not."""
        return self._target_scale(self._statistics_of(state))

    def _target_scale(self, statistics: Statistics | None) -> TargetScale | None:
        if self.task.target_range is not None:
            return TargetScale.of_range(*self.task.target_range)
        if not self._learns_scale or statistics is None:
            return None
        return TargetScale.of_sizes(float(statistics.mean[-1]))

    def _statistics_of(self, state: JobState) -> Statistics | None:
        return state.statistics or self.public

    def _of_inputs(self, statistics: Statistics | None) -> Statistics | None:
        """Without the target's."""
        if statistics is None or self.layout is None:
            return None
        return statistics.first(len(self.layout.names))

    def rows_alone(self) -> SiteRows:
        """The rows as the arm `local_only` has them: by the public scale of all arms, or the site's own."""
        own = self.public
        if self.columns:
            names, ranges = _names_and_ranges(self.columns)
            own = finish_statistics(names, ranges, self._sums(), allow_few_sites=True)
        return self._scaled(own)

    def _scaled(self, statistics: Statistics | None) -> SiteRows:
        """The rows as the loops take them; as they are before the statistics that they need."""
        inputs, scale = self._of_inputs(statistics), self._target_scale(statistics)

        def scaled(rows: Rows) -> Rows:
            if inputs is not None:
                assert isinstance(rows, TableRows)
                rows = rows.standardise(inputs)
            if isinstance(rows, TableRows):
                return rows
            return rows.for_loss(scale, adds_rows=self.adds_rows)

        site = self.site
        apart = None if site.validation is None else scaled(site.validation)
        return replace(site, train=scaled(site.train), test=scaled(site.test), validation=apart)

    def _sums(self) -> dict[str, list[int]]:
        """Counts, sums and sums of squares of each of `columns` of the rows as they are (PROTOCOL W)."""
        train, features = self.site.train, np.empty((len(self.site.train), 0))
        if isinstance(train, TableRows) and self.public is None:
            features = train.features
        if self._learns_scale:
            assert not isinstance(train, DatasetRows)
            features = np.concatenate([features, sizes(train.y)], axis=1)
        return site_sums(features, _names_and_ranges(self.columns)[1])

    def scored(self, state: JobState, round_: int) -> Scored | None:
        """The state's model on this site's test rows; None where it has none. The last answer is kept."""
        server, known, found = self._scored
        if server is not state.server or known != round_:
            rows = self.standard_rows(state)
            with self.watch("evaluate"):
                found = self.score_model(state.server.model, rows, round_, self.kept_at(state))
            self._scored = state.server, round_, found
        return found

    def keep_scored(self, state: JobState, round_: int, found: Scored | None) -> None:
        """What `scored` gives, found by another process."""
        self._scored = state.server, round_, found

    def kept_at(self, state: JobState) -> Values:
        """What this site has kept, as a state has it."""
        return self.kept.at(state.summed.get(self.site.id, 0))

    def score_model(
        self, model: FloatVector, rows: SiteRows, round_: int, kept: Values
    ) -> Scored | None:
        """A released model, given flat, as this site uses it with what it kept, on the test rows of `rows`, this site's
        as inputs; None where there are none."""
        self.write(model, rows, kept)
        return rows.scored(self.task, self.flat.module, self.job.run.seed, round_)

    def write(self, model: FloatVector, rows: SiteRows, kept: Values) -> None:
        """Fill the module as this site uses it: with what it kept, and its own statistics where the job has them stay
        here."""
        self.flat.write(*self._rules.uses(model, kept))
        self.use_own_statistics(rows)

    def use_own_statistics(self, rows: SiteRows) -> None:
        """Give the module its own statistics where the job has them stay here."""
        if self.job.round.buffers == "local":
            use_own_statistics(
                self.task, self.flat.module, rows.train, seed=self.job.run.seed, site=self.site.id
            )

    def guard(self, plan: RoundPlan, state: JobState) -> Guard:
        rows = self.standard_rows(state).train
        if self._guard is None:
            self._guard = Guard(
                self.task, plan, self.site.id, rows, self.flat, self.initial, self.job.run.seed
            )
        self._guard.rows, self._guard.local = rows, self.local(state)
        return self._guard

    def local(self, state: JobState) -> FloatVector | None:
        """What stays here of a state's model; None for the seed's."""
        return self._rules.uses(state.server.model, self.kept_at(state))[1]

    def exported(self, state: JobState, *, public: bool = False) -> bytes:
        """The file of a released model as this site uses it: with what the job has stay here.

        public: without these, and without where this site has its task, so that the bytes are the same at every
        site.
        """
        hidden = public and self.task.origin not in BUILT_IN
        task = replace(self.task, origin="") if hidden else self.task
        if public:
            self.flat.write(state.server.model)  # also resets what training counted
        else:
            self.write(state.server.model, self.standard_rows(state), self.kept_at(state))
        return self._file(state, task)

    def exported_average(self, state: JobState, sites: Sequence[SiteTrainer]) -> bytes:
        """The file of a released model with the mean of what the sites have of their own. sites: of a simulation."""
        of_sites = []
        for site in sites:
            site.write(state.server.model, site.standard_rows(state), site.kept_at(state))
            values = {n: t.clone() for n, t in self.flat.module.state_dict().items()}
            of_sites.append((values, len(site.site.train)))
        self.flat.write(state.server.model)
        own = norm_statistics(self.flat.module) if self.job.round.buffers == "local" else []
        average_own(self.flat.module, of_sites, [*own, *self.flat.local_names])
        return self._file(state, self.task)

    def _file(self, state: JobState, task: Task) -> bytes:
        statistics = self._statistics_of(state)
        return model_bytes(
            self.flat.module,
            task,
            self._of_inputs(statistics),
            self.layout,
            self._target_scale(statistics),
        )

    def contribute(
        self,
        plan: RoundPlan,
        step: PlannedRound,
        state: JobState,
        record: GuardRecord | None = None,
    ) -> Contribution:
        """The content of this site's vector for a step of the job, from the state it starts from.

        record: of this site's guard, which judges that state first and leaves its new memory there; None:
        it is not judged. Nor is it in a job with privacy: leaving would tell of the rows, without noise, and what
        the guard protects is bounded there. Raises GuardTripped.
        """
        purpose = purpose_of(step.purpose)
        if record is not None and purpose.measures and plan.privacy is None:
            guard = self.guard(plan, state)
            guard.rules, guard.memory = record.rules, record.memory
            try:
                guard.judge(state.server, released_round(state.done))
            finally:
                record.memory = guard.memory
        return purpose.contribute(self, plan, step, state)

    def statistics(self) -> Contribution:
        with self.watch("encode"):
            return NO_COORDINATES, self._sums()

    def exceeding(self, plan: RoundPlan, state: JobState) -> Contribution:
        """Round 1 is trained, and how far its update reaches is counted. Nothing of it is kept."""
        kept = self.kept
        with self.watch("train"):
            update = self.train(replace(plan, train=at_full_rate(plan.train)), state, 1)
        self.kept = kept
        counts = exceedance_counts(self._weighted(plan, update).astype(np.float32))
        return NO_COORDINATES, {"exceeding": counts}

    def update(self, plan: RoundPlan, step: PlannedRound, state: JobState) -> Contribution:
        """The quantised weighted update and what rides with it."""
        if plan.privacy is not None:
            return self._private_update(plan, plan.privacy, step, state)
        with self.watch("train"):
            update = self.train(plan, state, step.training_round)
        with self.watch("encode"):
            rounding = generator(self.job.run.seed, step.training_round, self.site.id, "rounding")
            quantised = quantise(
                self._weighted(plan, update), plan.packing.bits, state.server.bound, rounding
            )
        return quantised.fields, self.beside(plan, step, state, quantised.over, quantised.over_half)

    def beside(
        self, plan: RoundPlan, step: PlannedRound, state: JobState, over: int, over_half: int
    ) -> Mapping[str, list[int]]:
        """What rides with an update of which so many coordinates are beyond the range, and beyond half of it."""
        return {
            "weight": [self._weight(plan)],
            "over_range": [over],
            "over_half_range": [over_half],
            EXCEEDS: [int(exceeds(over, plan.coordinates))],
            **self.metric_sums(step, state),
        }

    def _private_update(
        self, plan: RoundPlan, privacy: PrivacyPlan, step: PlannedRound, state: JobState
    ) -> Contribution:
        """The clipped sum with this site's noise in it. What rides with it tells nothing of the rows."""
        entropy = OsEntropy()
        with self.watch("train"):
            total = self._clipped(plan, privacy, step, state, entropy)
        with self.watch("encode"):
            seed = self.job.run.seed
            rounding = generator(seed, step.training_round, self.site.id, "rounding")
            fields = with_noise(total, plan, rounding, entropy)
        return fields, {
            "weight": [plan.max_examples],
            "over_range": [0],
            "over_half_range": [0],
            EXCEEDS: [0],
            **self._private_metrics(plan, privacy, step, state, entropy, trains=True),
        }

    def _private_metrics(
        self, plan: RoundPlan, privacy: PrivacyPlan, step: PlannedRound, state: JobState, entropy: Entropy,
        *, trains: bool,
    ) -> Mapping[str, list[int]]:  # fmt: skip
        """The metric sums of the model that the step starts from, with noise; zeros where the plan has none."""
        if not privacy.measures(trains=trains):
            return {wide.name: [0] * wide.count for wide in plan.metric_sums}
        return with_metric_noise(plan, self.metric_sums(step, state), entropy)

    def _clipped(
        self, plan: RoundPlan, privacy: PrivacyPlan, step: PlannedRound, state: JobState, entropy: Entropy
    ) -> WideVector:  # fmt: skip
        """Minus the sum of this site's clipped gradients, or its clipped update where the unit is a site."""
        if privacy.unit == SITE:
            return clipped(self.train(plan, state, step.training_round), privacy.clip)
        self.flat.write(state.server.model)
        total, self.report = clipped_sum(
            self.task, self.flat.module, self.standard_rows(state).train, clip=privacy.clip, unit=privacy.unit,
            seed=self.job.run.seed, round_=step.training_round, site=self.site.id,
            sample=lambda units: sample(units, privacy.sample_rate, entropy),
        )  # fmt: skip
        return -total

    def metrics(self, plan: RoundPlan, step: PlannedRound, state: JobState) -> Contribution:
        """The metric sums of the model that the step starts from; with noise in a job with privacy."""
        if plan.privacy is not None:
            entropy = OsEntropy()
            return NO_COORDINATES, self._private_metrics(
                plan, plan.privacy, step, state, entropy, trains=False
            )
        return NO_COORDINATES, self.metric_sums(step, state)

    def metric_sums(self, step: PlannedRound, state: JobState) -> Mapping[str, list[int]]:
        """The wide integers of this site's metrics of the model that the step starts from."""
        return self.transport.sums(self.scored(state, step.training_round - 1))

    def train(self, plan: RoundPlan, state: JobState, round_: int) -> FloatVector:
        """Train locally by the plan's algorithm: what is sent, (coordinates,) float32, of which the first are
        update = local - global. What is kept changes with the release. Raises BadInput on NaN or infinity."""
        kept = self.kept_at(state)
        ahead, self.ahead = self.ahead, None
        if ahead is not None and ahead.of(plan, state, round_):
            (update, self.report), made = ahead.result, kept
        else:
            update, made = self._rules.train(SiteRound(self, plan, state, round_), kept)
        if not np.isfinite(update).all():
            bad = int(np.count_nonzero(~np.isfinite(update)))
            raise BadInput(
                f"site {self.site.id}, round {round_}: found NaN or infinity in {bad} of {len(update)} "
                "coordinates of the update, expected finite numbers",
                remedy="lower train.lr, or look for unscaled or missing values in the site's data",
            )
        self.kept = KeptValues(kept, round_, made)
        return update

    def _weighted(self, plan: RoundPlan, update: FloatVector) -> WideVector:
        """The update times weight / max_examples, so that a weighted mean is one sum (float64)."""
        return update.astype(np.float64) * self.factor(plan)

    def factor(self, plan: RoundPlan) -> float:
        """What this site's updates are multiplied by: its share of the largest weight, 0 to 1."""
        return self._weight(plan) / plan.max_examples

    def _weight(self, plan: RoundPlan) -> int:
        """The weight of this site's updates: its training rows in the plan's steps."""
        return plan.weight_of(len(self.site.train))
