"""From a finished experiment to `result.json`: every number of a run, and of a comparison over its splits."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import RoundAbandoned
from fedcore.experiment.arms import Scoring, loss_of, mean_of
from fedcore.experiment.convergence import LEAST_ROUNDS, diverged, trends
from fedcore.experiment.environment import environment, peak_memory_mb
from fedcore.experiment.gap import (
    BESIDE,
    PARTS,
    PRIVATE_PARTS,
    bootstrap_gap,
    lower_is_better,
    over_splits,
    plain_gaps,
)
from fedcore.experiment.prepare import made_in_memory
from fedcore.experiment.private_arms import Steps
from fedcore.experiment.selection import VALIDATION, chosen_by, mean_best
from fedcore.files import read_json
from fedcore.learning.constant import constant_values, training_targets
from fedcore.learning.data.groups import codes_of
from fedcore.learning.metrics import Scores, site_mean
from fedcore.learning.model import model_summary, norm_statistics, single_thread
from fedcore.learning.own_statistics import WORSE, losses_by_statistics
from fedcore.learning.private_scores import without_offset
from fedcore.learning.scoring import pooled
from fedcore.learning.site import LoadedSite, SiteRows
from fedcore.learning.state import model_digest
from fedcore.report import warnings
from fedcore.report.phrases import metric_name
from fedcore.results import (
    AbandonedRound,
    Absences,
    ArmResult,
    ComparisonResult,
    ConstantResult,
    Convergence,
    Cost,
    Interval,
    Judged,
    ModelFacts,
    Origin,
    ProtectedMetrics,
    RowCounts,
    RunResult,
    SiteResult,
    SplitResult,
    SumFacts,
)
from fedcore.secagg.algorithms import algorithm_of
from fedcore.secagg.label import Terms, label_warnings
from fedcore.secagg.summing import sites_of

if TYPE_CHECKING:
    from fedcore.experiment.loop import Experiment

R = TypeVar("R", RunResult, ComparisonResult)


def in_folder(result: R, directory: Path) -> R:
    """The result with its folder, and what to type to make it again whatever the folder is called: nothing for a
    job that was made in memory."""
    again = not made_in_memory(read_json(directory / "job.json"))
    line = f"fedcore reproduce {shlex.quote(str(directory))}" if again else ""
    return replace(result, origin=replace(result.origin, run=str(directory), reproduce=line))


def build_result(experiment: Experiment, started: datetime, seconds: float) -> RunResult:
    """The result of a finished run, which has no folder yet."""
    prepared, job = experiment.prepared, experiment.prepared.job
    plan, federated = prepared.plan, experiment.federated
    with single_thread():
        protected = None
        if (
            plan.server.judge is not None
        ):  # the last judgement, which may lead back to the best model
            protected = _protected_metrics(experiment)
            experiment.settle()
        scorings = experiment.evaluated()
        twin = federated.evaluate_twin(experiment.go_back()["federated"])
        protected = protected or _protected_metrics(experiment)
        constant = _constant(experiment, pooled(scorings["federated"]))
    about = prepared.plan_json()
    per_site = _per_site(experiment, scorings)
    rounds = [*range(1, experiment.round + 1), plan.rounds + 1]  # the metrics-only round included
    result = RunResult(
        task=prepared.task.name,
        protection=plan.protection,
        seed=job.run.seed,
        fold=job.run.fold,
        folds=None if prepared.own_test_rows else job.run.folds,
        rounds=experiment.round,
        stopped=experiment.stopped,
        convergence=_convergence(experiment),
        sites=plan.sites,
        metrics=prepared.task.scores,
        rows=_row_counts(prepared.sites, prepared.loaded),
        model=ModelFacts(
            model_summary(prepared.flat), plan.model_coordinates, prepared.flat.policy
        ),
        model_sha256=model_digest(federated.state.server.model),
        arms={
            name: ArmResult(
                prepared.transport.values(scorings[name]),
                loss_of(scorings[name]),
                arm.budget.steps,
                arm.budget.examples,
                prepared.transport.confusion(scorings[name]),
            )
            for name, arm in experiment.arms.items()
        },
        site_mean={
            name: site_mean([site.arms[name] for site in per_site.values()]) for name in scorings
        },
        gap=_gaps(experiment, scorings, twin),
        per_site=per_site,
        judged=Judged(
            constant,
            experiment.selection.result() if experiment.selection is not None else None,
            "best" if experiment.kept else None,
        ),
        lower_is_better=tuple(lower_is_better(prepared.task)),
        cost=Cost(
            bytes_up=federated.bytes_up,
            bytes_down=federated.bytes_down,
            bytes_per_parameter=federated.bytes_up / plan.model_coordinates,
            ciphertexts=about["ciphertexts"],
            ciphertext_used=about["used_fraction"] if plan.packing.ring else None,
            seconds=prepared.federation.watch.seconds,
            seconds_total=seconds,
            peak_memory_mb=peak_memory_mb(),
        ),
        sums=SumFacts(federated.clipped_fraction, federated.unequal_rounds),
        absences=Absences(
            tuple(job.round.drop),
            job.round.dropout,
            sum(len(prepared.federation.absent(round_)) for round_ in rounds),
            tuple(federated.abandoned),
        ),
        seen=federated.seen,
        label=prepared.label,
        plan=about,
        train=about["train"],
        statistics=prepared.statistics.to_json() if prepared.statistics else None,
        origin=Origin(environment(), started.strftime("%Y-%m-%dT%H:%M:%SZ")),
        protected=protected,
        sum=None if prepared.federation.engine.as_planned else job.run.sum,
        executor=prepared.federation.about_executor,
    )
    capped = [one.note for one in prepared.loaded if one.note]
    found = [f"{text[:1].upper()}{text[1:]} (hint: {hint})." for text, hint in prepared.findings]
    unknown: Counter[str] = sum((Counter(one.unknown) for one in prepared.loaded), Counter())
    with single_thread():
        found += _notes_on_statistics(experiment) + _notes_on_judgement(experiment)
    found += _notes_on_divergence(experiment)
    of_plan, of_rows = label_warnings(Terms.of_plan(plan)), warnings.notes_on_rows(result, unknown)
    result = replace(result, notes=(*capped, *prepared.notes_on_start, *found, *of_plan, *of_rows))
    return replace(result, warnings=warnings.of_run(result))


def _convergence(experiment: Experiment) -> Convergence | None:
    task, validated = experiment.prepared.task, experiment.selection is not None
    if experiment.round < LEAST_ROUNDS:
        return None
    metric = chosen_by(task.scores)
    column = (VALIDATION if validated else "") + metric
    found = trends(experiment.history, column, lower=metric in lower_is_better(task))
    return Convergence(metric, validated, found)


def _row_counts(sites: Sequence[SiteRows], loaded: Sequence[LoadedSite]) -> RowCounts:
    apart = [len(site.validation) for site in sites if site.validation is not None]
    train, test = sum(len(site.train) for site in sites), sum(len(site.test) for site in sites)
    known = [one.groups for one in loaded if one.groups]
    return RowCounts(train, test, sum(apart) if apart else None, sum(known) if known else None)


def _notes_on_statistics(experiment: Experiment) -> list[str]:
    """What the statistics of normalisation layers give reason to say: where they stay at the sites, what the model's
    file has; else, whether they fit the sites' training rows."""
    prepared, model = experiment.prepared, experiment.federated.state.server.model
    if keeps := (prepared.plan.train.personal and prepared.plan.train.keeps):
        return [
            f"Each site's scores are with {keeps}. model.safetensors has the common model, and the mean of parameters "
            "that stay; the model of each site is beside it, as model-SITE.safetensors."
        ]
    if not norm_statistics(prepared.flat.module):
        return []
    if prepared.job.round.buffers == "local":
        return [
            "Each site's scores are with its own statistics of normalisation layers. model.safetensors has their "
            "mean; the model of each site is beside it, as model-SITE.safetensors."
        ]
    found = []
    for site in prepared.sites:
        prepared.flat.write(model)
        losses = losses_by_statistics(
            prepared.task,
            prepared.flat.module,
            site.train,
            seed=prepared.job.run.seed,
            site=site.id,
        )
        found += [(*losses, len(site.train))] if losses is not None else []
    shared, own = (mean_of((each[k], each[2]) for each in found) for k in (0, 1))
    if shared is None or own is None or shared <= WORSE * own:
        return []
    return [
        f"The statistics of normalisation layers (BatchNorm) do not fit the sites' rows: the loss on training rows is "
        f"{shared:.3g} with those of the model and {own:.3g} with each site's own "
        '(hint: buffers = "local" leaves them at the sites; GroupNorm and LayerNorm have none).'
    ]


def _notes_on_divergence(experiment: Experiment) -> list[str]:
    """Where rounds made the model worse, and what to change."""
    if (found := diverged(experiment.history)) is None:
        return []
    calmer = algorithm_of(experiment.prepared.plan.train.algorithm).calmer
    return [
        f"The federated arm diverges: its loss on test rows was least after round {found.round}, {found.least:.3g}, "
        f"and ended at {found.last:.3g} (hint: {calmer}, or train fewer rounds)."
    ]


def _notes_on_judgement(experiment: Experiment) -> list[str]:
    """What was chosen by released metrics, and on which rows."""
    plan, found = experiment.prepared.plan.server.judge, experiment.federated.state.judgement
    if plan is None or found is None:
        return []
    name, best = metric_name(plan.metric), f"round {found.round}" if found.round else "the start"
    what = f"The best model by the released {name} was that of {best}"
    if experiment.federated.state.at_best:
        what += ", and it is the run's"
    return [
        f"{what}.",
        "The sites judged released models by their test rows, the ones that every score here is of, so the federated "
        "arm's scores are too good (hint: in a simulation `validate` keeps other rows apart for it).",
    ]


def _protected_metrics(experiment: Experiment) -> ProtectedMetrics:
    """The metrics-only round."""
    transport = experiment.prepared.transport
    plan = experiment.prepared.plan
    if plan.privacy is not None and not plan.metric_noise:  # they would leave without noise
        return ProtectedMetrics(sites=())
    try:
        release = experiment.federation.measure()
    except RoundAbandoned as abandoned:
        last = AbandonedRound(stage=abandoned.stage, left=abandoned.left)
        return ProtectedMetrics(sites=(), abandoned=last)
    total = release.total
    if experiment.prepared.plan.server.judge is not None:
        experiment.federated.twin = release.twin
    sites = sites_of(plan.sites, total.survivors)
    sums = without_offset(plan, total.opened.wides, len(sites))
    metrics = transport.finish(sums, len(sites), experiment.federated.target_scale)
    return ProtectedMetrics(
        metrics,
        transport.bounds(sums) if not plan.metric_noise else {},
        transport.clipped(sums),
        tuple(sites),
        confusion=transport.summed_confusion(sums),
    )


def _per_site(experiment: Experiment, scorings: Mapping[str, Scoring]) -> dict[str, SiteResult]:
    prepared, values = experiment.prepared, experiment.prepared.transport.values
    return {
        site.id: SiteResult(
            rows=len(site),
            train_rows=len(site.train),
            test_rows=len(site.test),
            validation_rows=None if site.validation is None else len(site.validation),
            class_counts=loaded.class_counts,
            rounds_in_sum=experiment.federated.summed[site.id],
            arms={name: values([each[site.index]]) for name, each in scorings.items()},
        )
        for site, loaded in zip(prepared.sites, prepared.loaded, strict=True)
    }


def _tested_groups(sites: Sequence[SiteRows]) -> NDArray[np.int64] | None:
    """The groups of all sites' test rows, in the order of `scoring.pooled`; None where no site has groups."""
    if all(site.test.groups is None for site in sites):
        return None
    found, seen = [np.empty(0, dtype=np.int64)], 0
    for site in sites:
        groups = site.test.groups
        codes = np.arange(len(site.test)) if groups is None else codes_of(groups)
        found.append(codes + seen)
        seen += int(codes.max(initial=-1)) + 1
    return np.concatenate(found)


def _constant(experiment: Experiment, tested: Scores | None) -> ConstantResult | None:
    """None without a row to test on, and where the task evaluates itself."""
    prepared, metrics = experiment.prepared, experiment.prepared.transport.metrics
    if tested is None:
        return None
    module, seed = prepared.flat.module, prepared.job.run.seed
    known = [training_targets(prepared.task, module, site, seed) for site in prepared.sites]
    predicts = "mean" if all(metric.of_values for metric in metrics) else "class"
    return ConstantResult(predicts, constant_values(metrics, np.concatenate(known), tested))


def _gaps(
    experiment: Experiment, scorings: Mapping[str, Scoring], twin: Scoring
) -> dict[str, dict[str, Interval]]:
    transport, job = experiment.prepared.transport, experiment.prepared.job
    everything, pairs = {**scorings, "federated_integer": twin}, PARTS | BESIDE
    if experiment.prepared.plan.privacy is not None:
        pairs = PRIVATE_PARTS | BESIDE
        if isinstance(steps := experiment.arms.get("federated_float"), Steps) and steps.companion:
            everything["federated_quantised"] = steps.companion.evaluate(experiment.round)
        else:  # of an update of a site, clipping and rounding are not told apart from the noise
            pairs |= {"privacy": ("federated_float", "federated_integer")}
    scores = {n: found for n, each in everything.items() if (found := pooled(each)) is not None}
    if scores:
        groups = _tested_groups(experiment.prepared.sites)
        return bootstrap_gap(
            scores, transport.metrics, job.track.resamples, job.run.seed, pairs, groups
        )
    values = {name: transport.values(each) for name, each in everything.items()}
    errors = lower_is_better(experiment.prepared.task)
    return {part: plain_gaps(values, *pair, transport.own, errors) for part, pair in pairs.items()}


def split_result(result: RunResult, seed: int, fold: int) -> SplitResult:
    """One run as a split of a comparison."""
    return SplitResult(
        seed=seed,
        fold=fold,
        model_sha256=result.model_sha256,
        arms={arm: found.metrics for arm, found in result.arms.items()},
        gap={part: {m: gap.mean for m, gap in by.items()} for part, by in result.gap.items()},
        per_site={site: found.arms for site, found in result.per_site.items()},
        constant=result.constant,
        best=result.best,
        convergence=result.convergence,
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
    ratio = sum(r.test for r in rows) / max(1, sum(r.train for r in rows))
    arms, gap, per_site = over_splits(cells, ratio)
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
        arms=arms,
        gap=gap,
        per_site=per_site,
        judged=Judged(
            _mean_constant(cells),
            mean_best([cell.best for cell in cells if cell.best is not None]),
            first.kept,
        ),
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
    notes = [
        note if all(note in each.notes for each in results) else f"In the first split: {note}"
        for note in first.notes
    ]
    said = warnings.of_comparison(result, rounds, notes, own_test_rows=own_test_rows)
    return replace(result, warnings=said)


def _mean_constant(cells: Sequence[SplitResult]) -> ConstantResult | None:
    """Over the splits in which a metric is defined."""
    known = [cell.constant for cell in cells if cell.constant is not None]
    if not known:
        return None
    return ConstantResult(known[0].predicts, site_mean([each.metrics for each in known]))
