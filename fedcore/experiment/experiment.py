"""One run: load the sites, solve the plan, advance the arms a round at a time, write what was found.

Invariant: nothing is chosen on test rows; every arm sees the same split, the same initial model and the
same number of rows per round. After every round the run can be interrupted and resumed to the same bits.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from fedcore.config import Job, build_job, is_json, packing_of, plan_of
from fedcore.environment import environment, peak_memory_mb
from fedcore.errors import Abandoned, BadInput, GuardTripped, RoundAbandoned, UnknownName
from fedcore.experiment.arms import (
    Arm,
    Bench,
    Centralised,
    Evaluation,
    Federated,
    FederatedFloat,
    LocalOnly,
)
from fedcore.experiment.gap import PARTS, bootstrap_gap
from fedcore.experiment.simulation import Federation, Leaving, federated_statistics
from fedcore.experiment.tensorboard import Events
from fedcore.files import append_row, read_json, write_atomic, write_json
from fedcore.learning import checkpoint
from fedcore.learning import metrics as metric_list
from fedcore.learning.data.rows import RowLayout, Rows, pool
from fedcore.learning.data.split import FoldSplit
from fedcore.learning.data.statistics import (
    MIN_CONTRIBUTORS,
    Statistics,
    finish_statistics,
    site_sums,
)
from fedcore.learning.guard import Guard
from fedcore.learning.metric_sums import MetricTransport
from fedcore.learning.model import FlatModel, model_summary, single_thread
from fedcore.learning.optimisers import ServerState, init_state
from fedcore.learning.saved import save_model
from fedcore.learning.site import (
    load_site,
    model_of,
    public_scale,
    sample_of,
    shape_of,
    standardised,
)
from fedcore.learning.sitework import SiteRows
from fedcore.learning.state import model_digest
from fedcore.learning.task import Task, load_task
from fedcore.learning.training import task_code
from fedcore.report import warnings
from fedcore.results import (
    RESULT_FILE,
    ROUNDS_FILE,
    AbandonedRound,
    Absences,
    ArmResult,
    ByMetric,
    Columns,
    Cost,
    Interval,
    ModelFacts,
    Origin,
    ProtectedMetrics,
    RoundRow,
    RowCounts,
    RunResult,
    SiteResult,
    SumFacts,
    read_rounds,
)
from fedcore.secagg.encode.pack import Layout as VectorLayout
from fedcore.secagg.in_process import InProcessFederation, sites_of
from fedcore.secagg.label import Terms, label_of, label_warnings
from fedcore.secagg.plan import RoundPlan, canonical, check_threshold, refuse_roster
from fedcore.secagg.protocol.absences import parse_absence
from fedcore.stopwatch import Stopwatch
from fedcore.types import ARMS, Json, SiteId

STOP = object()
"""Return it from `on_round` to end the run after the present round."""

OnRound = Callable[[RoundRow], object]

BESIDE = {"local_only": ("centralised", "local_only")}
"""Beside the parts of the gap: what staying alone loses against pooling."""

_GROUPING_KEYS = {"n", "by", "alpha", "seed"}


# ---------------------------------------------------------------------------------------- set-up


def resolve_sites(task: Task, job: Job) -> dict[SiteId, Any]:
    """{site id: source} from the job, else the task's own. Raises BadInput where there is none."""
    wanted = dict(job.sites)
    if callable(task.sites) and (not wanted or "n" in wanted or set(wanted) <= _GROUPING_KEYS):
        for key in wanted:
            if key not in _GROUPING_KEYS:
                raise UnknownName("key", f"sites.{key}", [f"sites.{k}" for k in _GROUPING_KEYS])
        with task_code("(all)", None, "sites"):
            wanted = dict(task.sites(**wanted))
    elif not wanted and task.sites is not None and not callable(task.sites):
        wanted = dict(task.sites)
    elif wanted and set(wanted) <= _GROUPING_KEYS:
        raise BadInput(
            f"sites: found {', '.join(sorted(wanted))}, but task {task.name!r} cannot make sites itself",
            remedy='give [sites] as `id = "source"` lines, or the task a `sites` function',
        )
    if not wanted:
        raise BadInput(
            f"sites: task {task.name!r} names none, and neither does the job",
            remedy='add [sites] to the job file (`id = "source"`), or pass sites={...}',
        )
    wanted = {str(name): source for name, source in wanted.items()}
    for name in wanted:
        if not name.strip() or len(name) > 64 or not name.isprintable():
            raise BadInput(f"sites: found the id {name!r}, expected 1 to 64 visible characters")
    return {SiteId(name): source for name, source in wanted.items()}


@dataclass
class Loaded:
    """The sites' rows, split, and what was seen on the way.

    largest: rows of the largest site; own_test_rows: every site brought its own test part. notes: of
    sites with more rows than the cap.
    """

    sites: list[SiteRows]
    largest: int
    own_test_rows: bool
    class_counts: dict[SiteId, dict[str, int]]
    unknown_categories: dict[str, int]
    notes: list[str]


@dataclass
class Prepared:
    """Everything of a run before round 1."""

    job: Job
    task: Task
    plan: RoundPlan
    sites: list[SiteRows]
    local_sites: list[SiteRows]
    flat: FlatModel
    epoch: InProcessFederation
    transport: MetricTransport
    statistics: Statistics | None
    layout: RowLayout | None
    watch: Stopwatch
    loaded: Loaded
    leaving: Leaving

    @property
    def label(self) -> str:
        """The run's label, computed from the plan."""
        few: list[str] = []
        if self.statistics is not None and not self.statistics.public:
            counts = zip(self.statistics.names, self.statistics.sites, strict=True)
            few = [name for name, sites in counts if sites < MIN_CONTRIBUTORS]
        return label_of(Terms.of_plan(self.plan), few)

    @property
    def own_test_rows(self) -> bool:
        """Whether every site brings its own test part, so that folds do nothing."""
        return self.loaded.own_test_rows

    def plan_json(self) -> Json:
        """`plan.json`: the plan, its digest, the proof, the forecast, the label."""
        lattice = self.job.protect.lattice
        about = {
            "label": self.label,
            "lattice": lattice,
            "warnings": label_warnings(Terms.of_plan(self.plan)),
        }
        return describe_plan(self.plan) | about | {"buffers_policy": self.flat.policy}


def describe_plan(plan: RoundPlan) -> Json:
    """A plan as people read it: flat numbers, the headroom inequality, bytes per site and round."""
    packing = plan.packing
    layout = VectorLayout(plan.update_vector, packing, len(plan.sites))
    forecast = _forecast(plan, layout)
    out: Json = plan.to_json() | {
        "digest": plan.digest,
        "bits": packing.bits,
        "max_sites": packing.max_sites,
        "field_width": packing.field_width,
        "fields_per_slot": packing.fields_per_slot,
        "slot_bits": packing.slot_bits,
        "degree": packing.ring.degree if packing.ring else None,
        "coeff_modulus": packing.ring.modulus if packing.ring else None,
        "coordinates": plan.coordinates,
        "ciphertexts": layout.blocks if packing.ring else 0,
        "used_fraction": layout.used_fraction,
        "headroom": None,
        **forecast,
    }
    if packing.ring:
        needed, available = packing.ring.headroom(packing.max_sites, packing.slot_bits)
        out["headroom"] = {
            "rule": "43 n + 1 < q / t",
            "bound": needed >> packing.slot_bits,
            "limit": available >> packing.slot_bits,
        }
    return out


def _forecast(plan: RoundPlan, layout: VectorLayout) -> Json:
    """Exact bytes of one site's upload and download in a round, from sizes alone."""
    if plan.packing.ring is None:
        size = layout.slots * plan.packing.slot_bits // 8
        return {"bytes_up": size, "bytes_down": size}
    from fedcore.secagg.crypto.bfv import vector_size

    return {
        "bytes_up": vector_size(plan.packing.ring, layout.blocks, 1),
        "bytes_down": vector_size(plan.packing.ring, layout.blocks, 2),
    }


def prepare(task: Task, job: Job, say: Callable[[str], None] = lambda _: None) -> Prepared:
    """Load and split the sites, build the model, solve the plan, run the federated statistics."""
    sources = resolve_sites(task, job)
    # RoundPlan refuses it too; asking here spares the loading of every site's rows.
    refuse_roster(len(sources), job.protect.protection)
    packing = packing_of(job, len(sources))  # refused before any site is loaded
    if job.protect.threshold is not None:
        check_threshold(job.protect.threshold, len(sources))
    leaving = _leaving(job, list(sources))
    if packing.ring is not None:
        from fedcore.secagg.crypto.bfv import load_seal

        load_seal()
    loaded = _load_sites(task, job, sources, say)
    sites = loaded.sites
    max_examples = job.protect.max_examples or 1 << max(4, (loaded.largest - 1).bit_length())
    flat, sample = _build(task, job, sites)
    transport = MetricTransport.of(task, sample, max_examples)
    shape = shape_of(task, flat, transport, sites[0].train, job.train.standardise)
    plan = plan_of(job, shape, tuple(s.id for s in sites), max_examples)
    epoch = InProcessFederation(uuid.uuid4().hex, plan)
    prepared = Prepared(
        job=job,
        task=task,
        plan=plan,
        sites=sites,
        local_sites=sites,
        flat=flat,
        epoch=epoch,
        transport=transport,
        statistics=None,
        layout=None,
        watch=Stopwatch(),
        loaded=loaded,
        leaving=leaving,
    )
    if sites[0].train.features is not None:
        _standardise_all(prepared, say)
    return prepared


def _leaving(job: Job, sites: Sequence[SiteId]) -> Leaving:
    """The job's absences, against its sites and rounds. Raises BadInput and UnknownName."""
    named = tuple(parse_absence(text, sites, job.round.rounds) for text in job.round.drop)
    return Leaving(named, job.round.dropout, job.run.seed)


def _load_sites(
    task: Task, job: Job, sources: Mapping[SiteId, Any], say: Callable[[str], None]
) -> Loaded:
    loaded = Loaded([], 0, True, {}, {}, [])
    for index, (name, source) in enumerate(sources.items()):
        say(f"loading site {name}")
        split = FoldSplit(job.run.seed, job.run.fold, job.run.folds)
        one = load_site(task, split, name, index, source, job.protect.max_examples)
        everything, test = one.everything, one.test
        loaded.class_counts[name] = _class_counts(everything, test)
        for column, count in getattr(everything, "unknown", {}).items():
            before = loaded.unknown_categories.get(column, 0)
            loaded.unknown_categories[column] = before + count
        loaded.own_test_rows &= test is not None
        loaded.largest = max(loaded.largest, len(everything) + len(test or ()))
        loaded.sites.append(one.rows)
        loaded.notes += [one.note] if one.note else []
    return loaded


def _class_counts(everything: Rows, test: Rows | None) -> dict[str, int]:
    parts = [rows.labels() for rows in (everything, test) if rows is not None]
    known = [part for part in parts if part is not None]
    if not known:
        return {}
    values, counts = np.unique(np.concatenate(known), return_counts=True)
    return {str(int(v)): int(c) for v, c in zip(values, counts, strict=True)}


def _build(task: Task, job: Job, sites: Sequence[SiteRows]) -> tuple[FlatModel, Any]:
    """The run's module, its flat view, and one scored batch (which fixes the number of outputs).

    Every site builds the model under the same seed; a site whose model differs is named.
    """
    flat = model_of(task, job, sites[0])
    for site in sites[1:]:
        other = model_of(task, job, site)
        if (other.parameters, other.buffer_coordinates) != (
            flat.parameters,
            flat.buffer_coordinates,
        ):
            raise BadInput(
                f"site {site.id}: found a model of {other.coordinates} coordinates, expected "
                f"{flat.coordinates} as at site {sites[0].id}",
                remedy="every site must have the same columns and build the same model",
            )
    sample = sample_of(task, job, flat, sites[0])
    return flat, sample


def _standardise_all(prepared: Prepared, say: Callable[[str], None]) -> None:
    """Scale every site's rows: by the declared ranges, the same for all arms, or by statistics."""
    sites = prepared.sites
    rows: Any = sites[0].train
    prepared.layout = rows.layout
    public = public_scale(rows, prepared.plan.standardise)
    if public is not None:
        prepared.statistics = public
        prepared.sites = prepared.local_sites = [
            replace(s, train=standardised(s.train, public), test=standardised(s.test, public))
            for s in sites
        ]
        return
    say("federated statistics")
    # Under `plain` nothing is hidden anyway, so few sites may contribute; the label says so.
    plain = prepared.plan.protection == "plain"
    allow = plain or prepared.job.protect.single_site_features
    found, _ = federated_statistics(prepared.epoch, sites, prepared.watch, allow_few_sites=allow)
    prepared.statistics = found
    prepared.sites = [
        replace(s, train=standardised(s.train, found), test=standardised(s.test, found))
        for s in sites
    ]
    local = []
    for site in sites:
        raw: Any = site.train
        own = finish_statistics(
            raw.names, raw.ranges, site_sums(raw.features, raw.ranges), allow_few_sites=True
        )
        local.append(
            replace(site, train=standardised(site.train, own), test=standardised(site.test, own))
        )
    prepared.local_sites = local


# ---------------------------------------------------------------------------------------- the run


class Experiment:
    """The arms of one run, advanced round by round."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        job, plan, flat = prepared.job, prepared.plan, prepared.flat
        self.initial = flat.read()
        bench = Bench(prepared.task, plan, flat, prepared.sites, job.run.seed, self.initial)
        self.federation = Federation(
            task=prepared.task,
            plan=plan,
            epoch=prepared.epoch,
            sites=prepared.sites,
            flat=flat,
            seed=job.run.seed,
            metric_sums=self._metric_sums,
            statistics=canonical(prepared.statistics.to_json()) if prepared.statistics else b"",
            leaving=prepared.leaving,
            watch=prepared.watch,
            guards=tuple(
                Guard(prepared.task, plan, s.id, s.train, flat, self.initial, job.run.seed)
                for s in prepared.sites
            ),
        )
        # The float arm must not add its training seconds to the protected arm's.
        floating = replace(self.federation, watch=Stopwatch())
        state = init_state(self.initial, plan.parameters, plan.server, plan.range.start or 0.0)
        self.federated = Federated(bench, self.federation, state)
        makers: dict[str, Callable[[], Arm]] = {
            "centralised": lambda: Centralised(bench, pool([s.train for s in prepared.sites])),
            "local_only": lambda: LocalOnly(bench, prepared.local_sites),
            "federated_float": lambda: FederatedFloat(bench, floating, state, self.federated),
            "federated": lambda: self.federated,
        }
        wanted = [arm for arm in ARMS if arm in job.track.arms or arm == "federated"]
        self.arms: dict[str, Arm] = {name: makers[name]() for name in wanted}
        self.round = 0
        self.stopped: str | None = None

    def _metric_sums(self, site: SiteRows, state: ServerState) -> Mapping[str, Sequence[int]]:
        evaluation = self.federated.evaluate(self.round)
        assert state is self.federated.state
        return self.prepared.transport.sums(evaluation.parts[site.index])

    def calibrate(self) -> None:
        """Find R before round 1 unless the plan states it."""
        if self.prepared.plan.range.start is None:
            state = self.federation.calibrate(self.federated.state)
            self.federated.state = self.federated.twin = state

    def rounds(self) -> Iterator[RoundRow]:
        """Advance every arm one round at a time; yields each arm's row."""
        if self.round == 0:
            self.calibrate()
        # The federated arm steps first, so that what is wrong with a site's update is said of it and
        # not of an arm beside it, and its survivors are known to the float arm; the rows still come
        # in the order of ARMS.
        order = sorted(self.arms, key=lambda name: name != "federated")
        while self.round < self.prepared.plan.rounds and self.stopped is None:
            current = self.round + 1
            columns = {}
            for name in order:
                columns[name] = self.arms[name].step(current)
                self.round = current
            for name, arm in self.arms.items():
                yield self._row(name, arm, current, columns[name])

    def _row(self, name: str, arm: Arm, round_: int, columns: Columns) -> RoundRow:
        evaluation = arm.evaluate(round_)
        row: Columns = {"arm": name, "round": round_, **self.values(evaluation)}
        row |= {"loss": evaluation.loss(), **columns}
        outcome = self.federated.outcome
        if name == "federated" and outcome is not None:
            before = self.prepared.transport.finish(outcome.metric_sums, len(outcome.survivors))
            row |= {f"protected_{metric}_before": value for metric, value in before.items()}
        row |= {"gradient_steps": arm.budget.steps, "examples_seen": arm.budget.examples}
        return RoundRow(row | {"peak_memory_mb": peak_memory_mb()})

    def values(self, evaluation: Evaluation) -> dict[str, float | None]:
        """{metric: value} over the union of test rows."""
        transport = self.prepared.transport
        scores = evaluation.scores()
        if scores is not None:
            return metric_list.evaluate_scores(scores, transport.metrics)
        if transport.own:
            return {name: _own_value(evaluation.parts, name) for name in transport.own}
        return dict.fromkeys(self.prepared.task.metrics)  # no site has a test row

    def absences(self) -> int:
        """How often a site left a round before its end, the metrics-only round included."""
        rounds = [*range(1, self.round + 1), self.prepared.plan.rounds + 1]
        return sum(len(self.federation.absent(round_)) for round_ in rounds)

    def require_a_release(self) -> None:
        """Raise Abandoned for a run of which no round was released: its model never learnt anything."""
        plan, abandoned = self.prepared.plan, self.federated.abandoned
        if len(abandoned) < self.round:
            return
        sites = len(plan.sites)
        lower = f", or a smaller --threshold ({sites // 2 + 1} or more)"
        raise Abandoned(
            f"run: found all {self.round} rounds abandoned, expected at least one with {plan.threshold} "
            f"of {sites} sites at every stage",
            remedy=f"fewer absences (--drop, --dropout){lower if plan.threshold > sites // 2 + 1 else ''}",
        )

    def save(self) -> Any:
        """All that a resumed run needs."""
        return {
            "round": self.round,
            "arms": {name: arm.save() for name, arm in self.arms.items()},
            "budgets": {name: (a.budget.steps, a.budget.examples) for name, a in self.arms.items()},
            "inputs": self._inputs(),
        }

    def _inputs(self) -> Json:
        """What a resumed run must find unchanged, by the name a person knows it under."""
        prepared = self.prepared
        sizes = {s.id: [len(s.train), len(s.test)] for s in prepared.sites}
        statistics = prepared.statistics.to_json() if prepared.statistics else None
        return {
            "task": prepared.plan.task_digest,
            "columns of the tables": prepared.plan.inputs,
            "rows of the sites": json.dumps([sizes, statistics]),
            "plan": prepared.plan.digest,
        }

    def restore(self, saved: Any) -> None:
        """Continue after the saved round. Raises BadInput if the task or its data have changed."""
        for name, value in self._inputs().items():
            if saved["inputs"][name] != value:
                raise BadInput(
                    f"--resume: the {name} changed since the run was interrupted",
                    remedy="start a new run, or restore what it was",
                )
        self.round = saved["round"]
        for name, arm in self.arms.items():
            arm.restore(saved["arms"][name])
            arm.budget.steps, arm.budget.examples = saved["budgets"][name]


def _own_value(parts: Sequence[Any], name: str) -> float | None:
    pairs = [part.own[name] for part in parts if part is not None]
    count = sum(c for _, c in pairs)
    return sum(t for t, _ in pairs) / count if count else None


# ---------------------------------------------------------------------------------------- the result


def build_result(experiment: Experiment, started: datetime, seconds: float) -> RunResult:
    """The result of a finished run, which has no folder yet."""
    prepared, job = experiment.prepared, experiment.prepared.job
    plan, federated = prepared.plan, experiment.federated
    with single_thread():
        evaluations = {
            name: arm.evaluate(experiment.round) for name, arm in experiment.arms.items()
        }
        twin = federated.evaluate_twin(experiment.round)
        protected = _protected_metrics(experiment)
    layout = VectorLayout(plan.update_vector, plan.packing, len(plan.sites))
    per_site = _per_site(experiment, evaluations)
    result = RunResult(
        task=prepared.task.name,
        protection=plan.protection,
        seed=job.run.seed,
        fold=job.run.fold,
        folds=job.run.folds,
        rounds=experiment.round,
        stopped=experiment.stopped,
        sites=plan.sites,
        metrics=tuple(prepared.task.metrics),
        rows=RowCounts(
            sum(len(s.train) for s in prepared.sites), sum(len(s.test) for s in prepared.sites)
        ),
        model=ModelFacts(model_summary(prepared.flat), plan.coordinates, prepared.flat.policy),
        model_sha256=model_digest(federated.state.model),
        arms={
            name: ArmResult(
                experiment.values(evaluations[name]),
                evaluations[name].loss(),
                arm.budget.steps,
                arm.budget.examples,
            )
            for name, arm in experiment.arms.items()
        },
        site_mean={
            name: metric_list.site_mean(site.arms[name] for site in per_site.values())
            for name in evaluations
        },
        gap=_gaps(experiment, evaluations, twin),
        per_site=per_site,
        lower_is_better=tuple(lower_is_better(prepared.task)),
        cost=Cost(
            bytes_up=federated.bytes_up,
            bytes_down=federated.bytes_down,
            bytes_per_parameter=federated.bytes_up / plan.coordinates,
            ciphertexts=layout.blocks if plan.packing.ring else 0,
            ciphertext_used=layout.used_fraction if plan.packing.ring else None,
            seconds=prepared.watch.seconds,
            seconds_total=seconds,
            peak_memory_mb=peak_memory_mb(),
        ),
        sums=SumFacts(federated.clipped_fraction, federated.unequal_rounds),
        absences=Absences(
            tuple(job.round.drop),
            job.round.dropout,
            experiment.absences(),
            tuple(federated.abandoned),
        ),
        seen=federated.seen,
        label=prepared.label,
        plan=prepared.plan_json(),
        train=asdict(plan.train),
        statistics=prepared.statistics.to_json() if prepared.statistics else None,
        origin=Origin(environment(), started.strftime("%Y-%m-%dT%H:%M:%SZ")),
        protected=protected,
    )
    of_plan = (*prepared.loaded.notes, *label_warnings(Terms.of_plan(plan)))
    of_rows = warnings.notes_on_rows(result, prepared.loaded.unknown_categories)
    result = replace(result, notes=(*of_plan, *of_rows))
    return replace(result, warnings=warnings.of_run(result))


def _protected_metrics(experiment: Experiment) -> ProtectedMetrics:
    """The metrics-only round."""
    transport = experiment.prepared.transport
    try:
        total = experiment.federation.final_metrics(experiment.federated.state)
    except RoundAbandoned as abandoned:
        last = AbandonedRound(stage=abandoned.stage, left=abandoned.left)
        return ProtectedMetrics(sites=(), abandoned=last)
    sums = total.opened.wides
    return ProtectedMetrics(
        transport.finish(sums, len(total.survivors)),
        transport.bounds(sums),
        transport.clipped(sums),
        tuple(sites_of(experiment.prepared.plan.sites, total.survivors)),
    )


def _per_site(
    experiment: Experiment, evaluations: Mapping[str, Evaluation]
) -> dict[str, SiteResult]:
    prepared = experiment.prepared
    undefined = dict.fromkeys(prepared.task.metrics)

    def score(evaluation: Evaluation, site: SiteRows) -> ByMetric:
        part = evaluation.parts[site.index]
        return undefined if part is None else experiment.values(Evaluation((part,)))

    return {
        site.id: SiteResult(
            rows=len(site.train) + len(site.test),
            train_rows=len(site.train),
            test_rows=len(site.test),
            class_counts=prepared.loaded.class_counts[site.id],
            rounds_in_sum=experiment.federated.summed[site.id],
            arms={name: score(each, site) for name, each in evaluations.items()},
        )
        for site in prepared.sites
    }


def _gaps(
    experiment: Experiment, evaluations: Mapping[str, Evaluation], twin: Evaluation
) -> dict[str, dict[str, Interval]]:
    transport, job = experiment.prepared.transport, experiment.prepared.job
    everything = {**evaluations, "federated_integer": twin}
    scores = {name: evaluation.scores() for name, evaluation in everything.items()}
    pooled = {name: found for name, found in scores.items() if found is not None}
    pairs = PARTS | BESIDE
    if pooled:
        return bootstrap_gap(pooled, transport.metrics, job.track.resamples, job.run.seed, pairs)
    values = {name: experiment.values(evaluation) for name, evaluation in everything.items()}
    errors = lower_is_better(experiment.prepared.task)
    return {part: _plain_gaps(values, *pair, transport.own, errors) for part, pair in pairs.items()}


def lower_is_better(task: Task) -> list[str]:
    """The task's metrics that are errors: built-in ones, and those it declares of its own."""
    known = metric_list.METRICS
    return [
        name
        for name in task.metrics
        if name in task.lower_is_better
        or (task.evaluate is None and name in known and not known[name].higher_is_better)
    ]


def _plain_gaps(
    values: Mapping[str, ByMetric],
    better: str,
    worse: str,
    names: Sequence[str],
    errors: Sequence[str],
) -> dict[str, Interval]:
    """Differences without an interval: a task's own `evaluate` gives no per-row values."""
    if better not in values or worse not in values:
        return {}
    method = "difference; no interval, since task.evaluate gives no per-row values"
    found = {}
    for name in names:
        a, b = values[better][name], values[worse][name]
        mean = None if a is None or b is None else (b - a if name in errors else a - b)
        found[name] = Interval(mean, None, None, method, 0)
    return found


# ---------------------------------------------------------------------------------------- the shell


class RunWriter:
    """Writes a run's files as it goes: rows as they come, a checkpoint after each round."""

    def __init__(self, directory: Path, prepared: Prepared) -> None:
        self.directory = directory
        self._prepared = prepared
        self._events = Events(directory)

    def start(self) -> None:
        """plan.json and job.json, before anything is trained."""
        write_json(self.directory / "plan.json", self._prepared.plan_json())
        write_json(self.directory / "job.json", job_json(self._prepared.task, self._prepared.job))
        (self.directory / ROUNDS_FILE).touch()

    def row(self, row: RoundRow) -> None:
        """Append one line to rounds.jsonl."""
        append_row(self.directory, row)
        self._events.row(row)

    def close(self) -> None:
        """Flush what is buffered."""
        self._events.close()

    def checkpoint(self, experiment: Experiment) -> None:
        """The state after a whole round, replacing the one before."""
        write_atomic(self.directory / "checkpoint.pt", checkpoint.to_bytes(experiment.save()))

    def forget(self) -> None:
        """There is nothing to go on from: the rows stay, the checkpoint goes."""
        (self.directory / "checkpoint.pt").unlink(missing_ok=True)

    def resume(self, experiment: Experiment) -> None:
        """Back to the last checkpoint: state restored, rows after it dropped."""
        path = self.directory / "checkpoint.pt"
        if path.is_file():
            experiment.restore(checkpoint.from_bytes(path.read_bytes()))
        rows = [r for r in read_rounds(self.directory) if r.round <= experiment.round]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomic(self.directory / ROUNDS_FILE, text.encode())

    def finish(self, experiment: Experiment, result: RunResult) -> None:
        """The model, the result and the report; the checkpoint goes."""
        prepared = experiment.prepared
        prepared.flat.write(experiment.federated.state.model)
        save_model(
            self.directory,
            prepared.flat.module,
            prepared.task,
            prepared.statistics,
            prepared.layout,
        )
        write_json(self.directory / RESULT_FILE, result.to_json())
        (self.directory / "checkpoint.pt").unlink(missing_ok=True)


def run_experiment(
    prepared: Prepared,
    writer: RunWriter | None,
    on_round: OnRound | None = None,
    *,
    resume: bool = False,
) -> tuple[Experiment, RunResult]:
    """All rounds of all arms, then the result. Interrupts leave a checkpoint of the last whole round.

    Raises Abandoned where no round was released, GuardTripped where a site leaves the job; then there is
    nothing to go on from.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    try:
        with single_thread(), closing(writer) if writer else nullcontext():
            experiment = Experiment(prepared)
            if writer is not None and resume:
                writer.resume(experiment)
            _run_rounds(experiment, writer, on_round)
        experiment.require_a_release()
        result = build_result(experiment, started, time.perf_counter() - clock)
    except (Abandoned, GuardTripped):
        if writer is not None:
            writer.forget()
        raise
    return experiment, result


def _run_rounds(experiment: Experiment, writer: RunWriter | None, on_round: OnRound | None) -> None:
    last = list(experiment.arms)[-1]
    for row in experiment.rounds():
        if writer is not None:
            writer.row(row)
        if on_round is not None and on_round(row) is STOP:
            experiment.stopped = f"on_round returned STOP in round {row.round}"
        if row.arm == last and writer is not None:
            writer.checkpoint(experiment)


def job_json(task: Task, job: Job, kind: str = "run") -> Json:
    """job.json: all it takes to run again. What was made in memory is marked by None."""
    in_memory = any(not is_json(source) for source in job.sites.values())
    sites = None if in_memory else dict(job.sites)
    about = {"task": task.origin or None, "task_name": task.name, "sites": sites, "kind": kind}
    return job.to_json() | about


def stored_job(directory: Path, task: Task | None) -> Json:
    """The job of a run directory as a layer of settings, with its `kind` beside them.

    Raises BadInput where the run was made from objects in memory, which no file can bring back.
    """
    found = read_json(directory / "job.json")
    name = found.pop("task_name")
    if found["sites"] is None or (task is None and found["task"] is None):
        raise BadInput(
            f"{directory}: task {name!r} or its sites were made in memory, so the command line cannot "
            "run it again",
            remedy="put the task into a file: `fedcore new DIR` shows how",
        )
    if not found["sites"]:
        del found["sites"]
    return {key: value for key, value in found.items() if value is not None}


def job_for(task: Task | None, *layers: Mapping[str, Any]) -> tuple[Task, Job]:
    """The task and the complete job: task defaults below, then the given layers in order."""
    layer: Mapping[str, Any] = next((each for each in reversed(layers) if "task" in each), {})
    named, base = layer.get("task", "heart"), Path(layer.get("base", Path.cwd()))
    found = task if task is not None else load_task(str(named), base)
    rest = [{k: v for k, v in layer.items() if k != "task"} for layer in layers]
    name = {"task": found.origin or found.name, "base": str(base)}
    return found, build_job(found.defaults, *rest, name)
