"""The runs that are compared: centralised, local-only, federated with float averaging, federated.

Invariant: equal splits, seeds, initial model, local epochs and examples seen per round; only what
crosses between sites differs. Centralised and local-only arms keep their optimiser from round to
round, as somebody training on one machine would; a site of a federation starts a fresh one.
Local-only sites standardise with their own statistics, the others with the federated ones.
Absences are of a federation: both federated arms have the same survivors in every round, and neither
moves in one that was abandoned; centralised and local-only training goes on.

Every arm has a `budget`; `step` advances it one round and returns its own columns of the round's row,
`evaluate` scores its present model on every site's test rows, `validate` on the rows kept apart, and `save` returns
all that a resumed run needs, as tensors and plain values, for `restore`. `models` is what its scores follow from, as
bytes, and `go_back` takes them again: an arm of which the best round is released. Counts and costs stay.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import cycle
from typing import Any

import numpy as np

from fedcore.errors import RoundAbandoned
from fedcore.experiment.exposure import observe, watch_one
from fedcore.experiment.prepare import Prepared
from fedcore.experiment.simulation import Release
from fedcore.learning.data.rows import Rows
from fedcore.learning.data.targets import TargetScale
from fedcore.learning.guard import GuardMemory
from fedcore.learning.kept import KeptValues
from fedcore.learning.robust import trimmed_mean
from fedcore.learning.rules import rules_of
from fedcore.learning.rules.parts import Summed
from fedcore.learning.saved import checkpoint_bytes, read_checkpoint
from fedcore.learning.scoring import Scored
from fedcore.learning.site import SiteRows
from fedcore.learning.state import JobState
from fedcore.learning.training import OwnModel, TrainReport
from fedcore.results import AbandonedRound, Columns, UpdateExposure
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.secagg.summing import sites_of
from fedcore.types import SiteId, WideVector

Scoring = Sequence[Scored | None]
"""An arm's scores: one for each site, None for a site without test rows."""


def mean_of(pairs: Iterable[tuple[float | None, int]]) -> float | None:
    """The mean of losses, each weighted by its rows; None without any, and where it is NaN or infinite, which
    JSON has no word for."""
    known = [(loss, rows) for loss, rows in pairs if loss is not None and rows]
    if not known:
        return None
    mean = sum(loss * rows for loss, rows in known) / sum(rows for _, rows in known)
    return mean if math.isfinite(mean) else None


def loss_of(scoring: Scoring) -> float | None:
    """Mean loss over all test rows."""
    return mean_of((each.loss, len(each.targets)) for each in scoring if each is not None)


def kept_bytes(sites: Sequence[KeptValues]) -> bytes:
    """What sites keep, for a checkpoint, which cannot have empty bytes."""
    return checkpoint_bytes([kept.to_bytes() or None for kept in sites])


def read_kept(data: bytes) -> list[KeptValues]:
    """The inverse of `kept_bytes`."""
    return [KeptValues.from_bytes(kept or b"") for kept in read_checkpoint(data)]


@dataclass
class Budget:
    """Optimiser steps and rows seen, epochs counted, over all sites of an arm."""

    steps: int = 0
    examples: int = 0

    def add(self, reports: Sequence[TrainReport]) -> float | None:
        """Count the reports; returns their mean loss weighted by examples."""
        self.steps += sum(r.steps for r in reports)
        self.examples += sum(r.examples for r in reports)
        return mean_of((r.loss, r.examples) for r in reports)


def score_shared(
    prepared: Prepared,
    state: JobState,
    round_: int,
    kept: Sequence[KeptValues],
    *,
    validation: bool = False,
) -> Scoring:
    """The scores of a state's model on every site's test rows, or on the rows kept apart. kept: by the sites."""
    sites = (site.validated() if validation else site for site in prepared.sites)
    return [
        trainer.score_model(state.server.model, site, round_, own.at(state.summed.get(site.id, 0)))
        for trainer, site, own in zip(prepared.federation.sites, sites, kept, strict=True)
    ]


class Alone:
    """Parties that train alone, each with an optimiser that it keeps.

    pooled: the rows of one party with all of them, which scores on every site's (`centralised`): what pooling would
    give. Otherwise every site on its own rows (`local_only`): what not joining would give.
    """

    def __init__(
        self, prepared: Prepared, sites: Sequence[SiteRows], pooled: Rows | None = None
    ) -> None:
        self.budget, self._sites = Budget(), sites
        self._task, self._seed = prepared.task, prepared.job.run.seed
        self._parties = {site.id: site.train for site in sites}
        if pooled is not None:
            self._parties = {SiteId(""): pooled}
        initial, plan = prepared.federation.sites[0].initial, prepared.plan
        self._own = [
            OwnModel(self._task, prepared.flat, initial, plan.train, plan.rounds)
            for _ in self._parties
        ]

    def step(self, round_: int) -> Columns:
        reports = [
            own.train(rows, seed=self._seed, round_=round_, site=name)
            for own, (name, rows) in zip(self._own, self._parties.items(), strict=True)
        ]
        return {"train_loss": self.budget.add(reports)}

    def evaluate(self, round_: int) -> Scoring:
        return self._scored(self._sites, round_)

    def validate(self, round_: int) -> Scoring:
        return self._scored([site.validated() for site in self._sites], round_)

    def _scored(self, sites: Sequence[SiteRows], round_: int) -> Scoring:
        return [
            site.scored(self._task, own.module, self._seed, round_)
            for site, own in zip(sites, cycle(self._own), strict=False)
        ]

    def models(self) -> tuple[bytes, ...]:
        return tuple(checkpoint_bytes(own.save()) for own in self._own)

    def go_back(self, models: Sequence[bytes]) -> None:
        self.restore([read_checkpoint(model) for model in models])

    def save(self) -> Any:
        return [own.save() for own in self._own]

    def restore(self, saved: Any) -> None:
        for own, part in zip(self._own, saved, strict=True):
            own.restore(part)


class Federated:
    """The protected federation, and its twin: the model that the plain integer sum of the last round
    leads to. unequal_rounds counts rounds whose opened sum was not the plain integer sum.

    survivors: roster indices of the last round's sum, none if it was abandoned.
    summed: {site: in how many rounds' sums it was}.
    abandoned: the rounds that were.
    seen: what each party held of one site's update in the first round that can show it (`exposure.py`).
    """

    def __init__(self, prepared: Prepared) -> None:
        self._prepared, self.federation = prepared, prepared.federation
        self.twin = self.federation.state
        self.budget = Budget()
        self.clipped = self.contributions = self.unequal_rounds = 0
        self.bytes_up = self.bytes_down = 0
        self.survivors: tuple[int, ...] = ()
        self.summed = dict.fromkeys(prepared.plan.sites, 0)
        self.abandoned: list[AbandonedRound] = []
        self.seen: UpdateExposure | None = None
        self.release: Release | None = None

    @property
    def state(self) -> JobState:
        """Of the last release."""
        return self.federation.state

    @property
    def target_scale(self) -> TargetScale | None:
        """Of the targets of a regression."""
        return self.federation.sites[0].target_scale(self.state)

    @property
    def clipped_fraction(self) -> float:
        """Coordinates beyond the range, over all survivors of all rounds."""
        values = self.contributions * self._prepared.plan.coordinates
        return self.clipped / values if values else 0.0

    def step(self, round_: int) -> Columns:
        federation, plan, bound = self.federation, self._prepared.plan, self.state.server.bound
        assert federation.step is not None
        assert federation.step.training_round == round_
        before = dict(federation.watch.seconds)
        witness = None
        # Of groups its view would be of its own group.
        shows = (
            federation.engine.as_planned and plan.server.groups is None and not plan.server.cohort
        )
        if self.seen is None and shows:
            witness = watch_one(plan.sites, federation.absent(round_))
        try:
            self.release = federation.advance(witness)
        except RoundAbandoned as abandoned:
            self.release = None
            columns = self._abandon(round_, abandoned)
        else:
            columns = self._released(self.release)
            if witness is not None:
                self.seen = observe(witness, plan, federation.engine.sealer, round_)
        seconds = federation.watch.seconds
        spent = {f"seconds_{stage}": seconds[stage] - before[stage] for stage in seconds}
        return columns | {"range": bound} | spent

    def _released(self, release: Release) -> Columns:
        plan, total = self._prepared.plan, release.total
        clipped = total.opened.wides["over_range"][0]
        self.twin, self.survivors = release.twin, total.survivors
        self.unequal_rounds += release.twin is not release.state
        self.clipped += clipped
        self.contributions += len(total.survivors)
        names = sites_of(plan.sites, total.survivors)
        for site in names:
            self.summed[site] += 1
        self.bytes_up, self.bytes_down = total.bytes_up, total.bytes_down
        return {
            "train_loss": self.budget.add(release.reports),
            "survivors": names,
            "clipped_fraction": clipped / (len(names) * plan.coordinates),
            "bytes_up": total.bytes_up,
            "bytes_down": total.bytes_down,
        }

    def _abandon(self, round_: int, abandoned: RoundAbandoned) -> Columns:
        """The round's number is used up and nothing else changes, the budget included."""
        stage, left = abandoned.stage, abandoned.left
        self.survivors = ()
        self.abandoned.append(AbandonedRound(round=round_, stage=stage, left=left))
        sites, needed = self._prepared.plan.per_round, abandoned.threshold
        unmeasured = ("train_loss", "clipped_fraction", "bytes_up", "bytes_down")
        return {
            **dict.fromkeys(unmeasured),
            "survivors": [],
            "abandoned": f"at {stage}: {left} of {sites} sites stayed, {needed} needed",
        }

    def evaluate(self, round_: int) -> Scoring:
        # What the sites computed for their vectors is used again (`SiteTrainer.scored`).
        return self.federation.executor.scores(self.federation.sites, self.state, round_)

    def validate(self, round_: int) -> Scoring:
        return score_shared(self._prepared, self.state, round_, self._own, validation=True)

    @property
    def _own(self) -> list[KeptValues]:
        return [site.kept for site in self.federation.sites]

    def models(self) -> tuple[bytes, ...]:
        twin = () if self.twin is self.state else (self.twin.to_bytes(),)
        return (self.state.to_bytes(), self._kept(), *twin)

    def _kept(self) -> bytes:
        return kept_bytes(self._own)

    def _keep(self, kept: bytes) -> None:
        for site, each in zip(self.federation.sites, read_kept(kept), strict=True):
            site.kept = each

    def go_back(self, models: Sequence[bytes]) -> None:
        """What was shown of the sites' metrics stays known: the metrics-only round goes by it."""
        state, kept, *twin = models
        states = [replace(JobState.from_bytes(m), shown=self.state.shown) for m in (state, *twin)]
        self.federation.state, self.twin = states[0], states[-1]
        self._keep(kept)

    def evaluate_twin(self, round_: int) -> Scoring:
        """Scores of the plain-integer twin: those of `evaluate` only if the sums were identical."""
        if self.twin is self.state:
            return self.evaluate(round_)
        return score_shared(self._prepared, self.twin, round_, self._own)

    def save(self) -> Any:
        return {
            "state": self.state.to_bytes(),
            "twin": None if self.twin is self.state else self.twin.to_bytes(),
            "step": astuple(self.federation.step) if self.federation.step is not None else None,
            "counts": (self.clipped, self.contributions, self.unequal_rounds),
            "bytes": (self.bytes_up, self.bytes_down),
            "abandoned": [each.to_json() for each in self.abandoned],
            "summed": dict(self.summed),
            "seen": self.seen.to_json() if self.seen is not None else None,
            "kept": self._kept(),
            "guards": [guard.memory.to_json() for guard in self.federation.guards],
            "seconds": dict(self.federation.watch.seconds),
        }

    def restore(self, saved: Any) -> None:
        federation = self.federation
        federation.state = self.twin = JobState.from_bytes(saved["state"])
        if saved["twin"] is not None:
            self.twin = JobState.from_bytes(saved["twin"])
        federation.step = PlannedRound(*saved["step"]) if saved["step"] is not None else None
        self.clipped, self.contributions, self.unequal_rounds = saved["counts"]
        self.bytes_up, self.bytes_down = saved["bytes"]
        self.seen = UpdateExposure.from_json(saved["seen"]) if saved["seen"] else None
        self.abandoned = [AbandonedRound.from_json(each) for each in saved["abandoned"]]
        self.summed = dict(saved["summed"])
        self._keep(saved["kept"])
        for guard, memory in zip(federation.guards, saved["guards"], strict=True):
            guard.memory = GuardMemory.from_json(memory)
        federation.watch.seconds.update(saved["seconds"])


def _float_mean(plan: RoundPlan, sums: Mapping[SiteId, tuple[WideVector, int]]) -> WideVector:
    """The weighted mean of the sites' updates, or the trimmed mean of those of groups. sums: {site: (update times
    weight, weight)}."""
    groups = (
        [list(sums)] if plan.server.groups is None else plan.server.groups.survivors(list(sums))
    )
    means = []
    for group in groups:
        total, weight = np.zeros(plan.coordinates), 0
        for site in group:
            total += sums[site][0]
            weight += sums[site][1]
        means.append(total / weight)
    return means[0] if plan.server.groups is None else trimmed_mean(means, plan.server.groups.trim)


class FederatedFloat:
    """The same federation with float averaging: no quantisation, no protection.

    beside: the protected federation, whose survivors of each round it averages; it steps first.
    """

    def __init__(self, prepared: Prepared, beside: Federated) -> None:
        self._prepared, self._beside = prepared, beside
        self.state, self.budget = beside.state, Budget()
        self._kept = [KeptValues() for _ in prepared.federation.sites]

    def step(self, round_: int) -> Columns:
        plan, sites = self._prepared.plan, self._prepared.federation.sites
        reports: list[TrainReport | None] = []
        sums: dict[SiteId, tuple[WideVector, int]] = {}
        survivors = self._beside.survivors
        executor = self._prepared.federation.executor
        trained = executor.ready([sites[k] for k in survivors], plan, self.state, round_)
        for index, site in zip(survivors, trained, strict=True):
            beside, site.kept = site.kept, self._kept[index]
            update = site.train(plan, self.state, round_)
            self._kept[index], site.kept = site.kept.settled(), beside
            own = plan.weight_of(len(site.site.train))
            sums[site.site.id] = update.astype(np.float64) * own, own
            reports.append(site.report)
        if sums:
            apply, summed = rules_of(plan.train).apply, Summed(len(survivors), round_)
            server = apply(plan, self.state.server, _float_mean(plan, sums), summed)
            self.state = replace(self.state, server=server)
        return {"train_loss": self.budget.add([each for each in reports if each is not None])}

    def evaluate(self, round_: int) -> Scoring:
        return score_shared(self._prepared, self.state, round_, self._kept)

    def validate(self, round_: int) -> Scoring:
        return score_shared(self._prepared, self.state, round_, self._kept, validation=True)

    def models(self) -> tuple[bytes, ...]:
        return (self.state.to_bytes(), kept_bytes(self._kept))

    def go_back(self, models: Sequence[bytes]) -> None:
        self.restore(models)

    def save(self) -> Any:
        return self.models()

    def restore(self, saved: Any) -> None:
        state, kept = saved
        self.state, self._kept = JobState.from_bytes(state), read_kept(kept)
