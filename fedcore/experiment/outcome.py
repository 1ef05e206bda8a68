"""From a finished experiment to `result.json`: every number of a run, and of a comparison over its splits."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from fedcore.errors import RoundAbandoned
from fedcore.experiment.advance import Experiment
from fedcore.experiment.arms import Evaluation
from fedcore.experiment.environment import environment, peak_memory_mb
from fedcore.experiment.gap import (
    BESIDE,
    PARTS,
    bootstrap_gap,
    lower_is_better,
    over_splits,
    plain_gaps,
)
from fedcore.learning import metrics as metric_list
from fedcore.learning.model import model_summary, single_thread
from fedcore.learning.site import SiteRows
from fedcore.learning.state import model_digest
from fedcore.report import warnings
from fedcore.results import (
    AbandonedRound,
    Absences,
    ArmResult,
    ByMetric,
    ComparisonResult,
    Cost,
    Interval,
    ModelFacts,
    Origin,
    ProtectedMetrics,
    RowCounts,
    RunResult,
    SiteResult,
    SplitResult,
    SumFacts,
)
from fedcore.secagg.encode.pack import Layout as VectorLayout
from fedcore.secagg.label import Terms, label_warnings
from fedcore.secagg.summing import sites_of

R = TypeVar("R", RunResult, ComparisonResult)


def in_folder(result: R, directory: Path) -> R:
    """The result with its folder, and what to type to make it again whatever the folder is called."""
    line = f"fedcore reproduce {shlex.quote(str(directory))}"
    return replace(result, origin=replace(result.origin, run=str(directory), reproduce=line))


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
        model_sha256=model_digest(federated.state.server.model),
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
            seconds=prepared.federation.watch.seconds,
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
        release = experiment.federation.measure()
    except RoundAbandoned as abandoned:
        last = AbandonedRound(stage=abandoned.stage, left=abandoned.left)
        return ProtectedMetrics(sites=(), abandoned=last)
    sums, sites = release.wides, sites_of(experiment.prepared.plan.sites, release.survivors)
    metrics = transport.finish(sums, len(sites))
    return ProtectedMetrics(metrics, transport.bounds(sums), transport.clipped(sums), tuple(sites))


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
    return {part: plain_gaps(values, *pair, transport.own, errors) for part, pair in pairs.items()}


# ------------------------------------------------------------------------------------- several splits


def split_result(result: RunResult, seed: int, fold: int) -> SplitResult:
    """One run as a split of a comparison."""
    return SplitResult(
        seed=seed,
        fold=fold,
        model_sha256=result.model_sha256,
        arms={arm: found.metrics for arm, found in result.arms.items()},
        gap={part: {m: gap.mean for m, gap in by.items()} for part, by in result.gap.items()},
        per_site={site: found.arms for site, found in result.per_site.items()},
    )


def comparison_result(
    results: Sequence[RunResult],
    cells: Sequence[SplitResult],
    seeds: int,
    folds: int,
    *,
    own_test_rows: bool,
) -> ComparisonResult:
    """All splits together, without a folder. cells: the results as splits, in their order."""
    first, rows = results[0], [r.rows for r in results if r.rows is not None]
    found = over_splits(cells, sum(r.test for r in rows) / max(1, sum(r.train for r in rows)))
    abandoned = tuple(
        replace(each, seed=r.seed, fold=r.fold) for r in results for each in r.absences.abandoned
    )
    result = ComparisonResult(
        task=first.task,
        protection=first.protection,
        rounds=first.rounds,
        sites=first.sites,
        metrics=first.metrics,
        lower_is_better=first.lower_is_better,
        seeds=seeds,
        folds=folds,
        cells=tuple(cells),
        arms=found.arms,
        gap=found.gap,
        per_site=found.per_site,
        model=first.model,
        cost=replace(first.cost, bytes_per_parameter=None, seconds=None, peak_memory_mb=None),
        sums=SumFacts(
            max(r.sums.clipped_fraction or 0.0 for r in results),
            sum(r.sums.unequal_rounds for r in results),
        ),
        absences=replace(
            first.absences, count=sum(r.absences.count for r in results), abandoned=abandoned
        ),
        label=first.label,
        plan=first.plan,
        train=first.train,
    )
    rounds = sum(r.rounds for r in results)
    said = warnings.of_comparison(result, rounds, first.notes, own_test_rows=own_test_rows)
    return replace(result, warnings=said)
