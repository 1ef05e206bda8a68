"""The runs that are compared: centralised, local-only, federated with float averaging, federated.

Invariant: equal splits, seeds, initial model, local epochs and examples seen per round; only what
crosses between sites differs. Centralised and local-only arms keep their optimiser from round to
round, as somebody training on one machine would; a site of a federation starts a fresh one.
Local-only sites standardise with their own statistics, the others with the federated ones.
Absences are of a federation: both federated arms have the same survivors in every round, and neither
moves in one that was abandoned; centralised and local-only training goes on.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, Protocol

import numpy as np

from fedcore.errors import RoundAbandoned
from fedcore.experiment.exposure import observe, watch_one
from fedcore.experiment.simulation import Federation, Release
from fedcore.learning.baseline import OwnModel
from fedcore.learning.data.rows import Rows
from fedcore.learning.guard import GuardMemory
from fedcore.learning.metrics import Scores
from fedcore.learning.model import FlatModel
from fedcore.learning.optimisers import apply_update
from fedcore.learning.scoring import Scored, score
from fedcore.learning.site import SiteRows
from fedcore.learning.state import JobState
from fedcore.learning.task import Task
from fedcore.learning.training import TrainReport
from fedcore.results import AbandonedRound, Columns, UpdateExposure
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.secagg.summing import sites_of
from fedcore.types import FloatVector


def finite(value: float | None) -> float | None:
    """A diverged arm's loss may be NaN or infinite, which JSON has no word for: None then."""
    return value if value is not None and math.isfinite(value) else None


@dataclass
class Budget:
    """Optimiser steps and rows seen, epochs counted, over all sites of an arm."""

    steps: int = 0
    examples: int = 0

    def add(self, reports: Sequence[TrainReport]) -> float | None:
        """Count the reports; returns their mean loss weighted by examples."""
        self.steps += sum(r.steps for r in reports)
        self.examples += sum(r.examples for r in reports)
        losses = [(r.loss, r.examples) for r in reports if r.loss is not None and r.examples]
        total = sum(n for _, n in losses)
        return finite(sum(loss * n for loss, n in losses) / total) if total else None


@dataclass(frozen=True)
class Evaluation:
    """An arm's scores: one `Scored` per site, None for a site without test rows."""

    parts: tuple[Scored | None, ...]

    def scores(self) -> Scores | None:
        """Pooled per-row outputs, aligned across arms; None where the task evaluates itself."""
        found = [
            Scores(s.outputs, s.targets, np.full(len(s.targets), index, dtype=np.int64))
            for index, s in enumerate(self.parts)
            if s is not None and s.own is None
        ]
        return Scores.concatenate(found) if found else None

    def loss(self) -> float | None:
        """Mean loss over all test rows."""
        parts = [
            (s.loss, len(s.targets)) for s in self.parts if s is not None and s.loss is not None
        ]
        total = sum(n for _, n in parts)
        return finite(sum(loss * n for loss, n in parts) / total) if total else None


class Arm(Protocol):
    """One run that is advanced a round at a time."""

    name: str
    budget: Budget

    def step(self, round_: int) -> Columns:
        """Advance one round; returns the arm's own columns of its row."""
        ...

    def evaluate(self, round_: int) -> Evaluation:
        """Score the present model on every site's test rows."""
        ...

    def save(self) -> Any:
        """Everything a resumed run needs, as tensors and plain values."""
        ...

    def restore(self, saved: Any) -> None:
        """The inverse of `save`."""
        ...


@dataclass
class Bench:
    """What all arms share: the task, the plan, one resident module, the sites' rows, the seed."""

    task: Task
    plan: RoundPlan
    flat: FlatModel
    sites: Sequence[SiteRows]
    seed: int
    initial: FloatVector

    def evaluate(self, models: Sequence[Any], sites: Sequence[SiteRows], round_: int) -> Evaluation:
        """models: one module per site."""
        parts: list[Scored | None] = []
        for module, site in zip(models, sites, strict=True):
            rows = site.test
            found = None
            if len(rows):
                found = score(self.task, module, rows, seed=self.seed, round_=round_, site=site.id)
            parts.append(found)
        return Evaluation(tuple(parts))

    def own_model(self) -> OwnModel:
        """A model of one party's own, at the common start."""
        return OwnModel(self.task, self.flat, self.initial, self.plan.train)

    def evaluate_vector(self, model: FloatVector, round_: int) -> Evaluation:
        """Score one shared model, given flat."""
        self.flat.write(model)
        return self.evaluate([self.flat.module] * len(self.sites), self.sites, round_)


class Alone:
    """Parties that train alone, each with an optimiser that it keeps.

    `centralised` is one party with all rows, which scores on every site's: what pooling would give.
    `local_only` is every site on its own rows and its own statistics: what not joining would give.

    parties: {name: training rows}; tested: the sites' test rows, by the model of the one party or of each.
    """

    def __init__(
        self, bench: Bench, name: str, parties: Mapping[str, Rows], tested: Sequence[SiteRows]
    ) -> None:
        self.name, self.budget = name, Budget()
        self._bench, self._parties, self._tested = bench, parties, tested
        self._own = [bench.own_model() for _ in parties]

    def step(self, round_: int) -> Columns:
        reports = [
            own.train(rows, seed=self._bench.seed, round_=round_, site=name)
            for own, (name, rows) in zip(self._own, self._parties.items(), strict=True)
        ]
        return {"train_loss": self.budget.add(reports)}

    def evaluate(self, round_: int) -> Evaluation:
        each = len(self._tested) // len(self._own)
        modules = [own.module for own in self._own] * each
        return self._bench.evaluate(modules, self._tested, round_)

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

    name = "federated"

    def __init__(self, bench: Bench, federation: Federation) -> None:
        self._bench, self.federation = bench, federation
        self.twin = federation.state
        self.budget = Budget()
        self.clipped = self.contributions = self.unequal_rounds = 0
        self.bytes_up = self.bytes_down = 0
        self.survivors: tuple[int, ...] = ()
        self.summed = dict.fromkeys(bench.plan.sites, 0)
        self.abandoned: list[AbandonedRound] = []
        self.seen: UpdateExposure | None = None
        self.release: Release | None = None

    @property
    def state(self) -> JobState:
        """Of the last release."""
        return self.federation.state

    @property
    def clipped_fraction(self) -> float:
        """Coordinates beyond the range, over all survivors of all rounds."""
        values = self.contributions * self._bench.plan.coordinates
        return self.clipped / values if values else 0.0

    def step(self, round_: int) -> Columns:
        federation, plan, bound = self.federation, self._bench.plan, self.state.server.bound
        assert federation.step is not None
        assert federation.step.training_round == round_
        before = dict(federation.watch.seconds)
        witness = None
        if self.seen is None:
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
        plan, clipped = self._bench.plan, release.wides["over_range"][0]
        self.twin, self.survivors = release.twin, release.survivors
        self.unequal_rounds += release.twin is not release.state
        self.clipped += clipped
        self.contributions += len(release.survivors)
        names = sites_of(plan.sites, release.survivors)
        for site in names:
            self.summed[site] += 1
        self.bytes_up, self.bytes_down = release.bytes_up, release.bytes_down
        return {
            "train_loss": self.budget.add(release.reports),
            "survivors": names,
            "clipped_fraction": clipped / (len(names) * plan.coordinates),
            "bytes_up": release.bytes_up,
            "bytes_down": release.bytes_down,
        }

    def _abandon(self, round_: int, abandoned: RoundAbandoned) -> Columns:
        """The round's number is used up and nothing else changes, the budget included."""
        stage, left = abandoned.stage, abandoned.left
        self.survivors = ()
        self.abandoned.append(AbandonedRound(round=round_, stage=stage, left=left))
        sites, needed = len(self._bench.plan.sites), abandoned.threshold
        unmeasured = ("train_loss", "clipped_fraction", "bytes_up", "bytes_down")
        return {
            **dict.fromkeys(unmeasured),
            "survivors": [],
            "abandoned": f"at {stage}: {left} of {sites} sites stayed, {needed} needed",
        }

    def evaluate(self, round_: int) -> Evaluation:
        # What the sites computed for their vectors is used again (`SiteTrainer.scored`).
        sites = self.federation.sites
        return Evaluation(tuple(site.scored(self.state, round_) for site in sites))

    def evaluate_twin(self, round_: int) -> Evaluation:
        """Scores of the plain-integer twin: those of `evaluate` only if the sums were identical."""
        if self.twin is self.state:
            return self.evaluate(round_)
        return self._bench.evaluate_vector(self.twin.server.model, round_)

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
        for guard, memory in zip(federation.guards, saved["guards"], strict=True):
            guard.memory = GuardMemory.from_json(memory)
        federation.watch.seconds.update(saved["seconds"])


class FederatedFloat:
    """The same federation with float averaging: no quantisation, no protection.

    beside: the protected federation, whose survivors of each round it averages; it steps first.
    """

    name = "federated_float"

    def __init__(self, bench: Bench, beside: Federated, state: JobState) -> None:
        self._bench, self._beside = bench, beside
        self.state, self.budget = state, Budget()

    def step(self, round_: int) -> Columns:
        plan, sites = self._bench.plan, self._beside.federation.sites
        total, weight, reports = np.zeros(plan.coordinates), 0, []
        for site in (sites[index] for index in self._beside.survivors):
            update = site.train(plan, self.state, round_)
            own = plan.weight_of(len(site.site.train))
            total += update.astype(np.float64) * own
            weight += own
            reports.append(site.report)
        if weight:
            server = apply_update(self.state.server, total / weight, plan.parameters, plan.server)
            self.state = replace(self.state, server=server)
        return {"train_loss": self.budget.add([each for each in reports if each is not None])}

    def evaluate(self, round_: int) -> Evaluation:
        return self._bench.evaluate_vector(self.state.server.model, round_)

    def save(self) -> Any:
        return self.state.to_bytes()

    def restore(self, saved: Any) -> None:
        self.state = JobState.from_bytes(saved)
