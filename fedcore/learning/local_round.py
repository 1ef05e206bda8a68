"""One site's training in one round, as the rules of an algorithm ask for it (`rules/parts.py`, LocalRound)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedcore.learning.optimisers import ServerState
from fedcore.learning.rules.parts import GradientTerm
from fedcore.learning.schedules import learning_rate
from fedcore.learning.state import JobState
from fedcore.learning.training import TrainReport, local_train
from fedcore.secagg.plan import RoundPlan, TrainPlan
from fedcore.types import FloatVector

if TYPE_CHECKING:
    from fedcore.learning.site import SiteTrainer


@dataclass
class SiteRound:
    """A training round at a site, from a state. steps: optimiser steps of the last training."""

    site: SiteTrainer
    plan: RoundPlan
    state: JobState
    round: int
    steps: int = 0

    @property
    def server(self) -> ServerState:
        return self.state.server

    @property
    def start(self) -> FloatVector:
        """(d,) float32: the released model."""
        return self.state.server.model

    @property
    def lr(self) -> float:
        return learning_rate(self.plan.train, self.round, self.plan.rounds)

    @property
    def local(self) -> FloatVector:
        """What stays at the site of the model that was trained last, float32."""
        return self.site.flat.read_local()

    def train(
        self,
        term: GradientTerm | None = None,
        *,
        start: FloatVector | None = None,
        local: FloatVector | None = None,
    ) -> FloatVector:
        """As `LocalRound.train`. The site's report is that of the round's first training."""
        site, rows = self.site, self.site.standard_rows(self.state)
        site.flat.write(self.start if start is None else start, local)
        if site.task.train is not None:  # it may evaluate the model in between
            site.use_own_statistics(rows)
        report = local_train(
            site.task, site.flat.module, rows.train, self.plan.train,
            seed=site.job.run.seed, round_=self.round, rounds=self.plan.rounds, site=site.site.id, term=term,
        )  # fmt: skip
        if not self.steps:
            site.report = report
        self.steps = report.steps
        return site.flat.read()


@dataclass(frozen=True)
class TrainedAhead:
    """A site's training in one round from one state. result: the update, (d,) float32, and the report."""

    plan: TrainPlan
    state: JobState
    round: int
    result: tuple[FloatVector, TrainReport]

    def of(self, plan: RoundPlan, state: JobState, round_: int) -> bool:
        """Whether it is the training that is asked for."""
        return self.state is state and (self.plan, self.round) == (plan.train, round_)
