"""One site's training in one round, as the rules of an algorithm ask for it (`rules/parts.py`, LocalRound)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedcore.learning.optimisers import ServerState
from fedcore.learning.rules.parts import GradientTerm
from fedcore.learning.schedules import learning_rate
from fedcore.learning.state import JobState
from fedcore.learning.training import local_train
from fedcore.secagg.plan import RoundPlan
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

    def train(self, term: GradientTerm | None = None) -> FloatVector:
        """(d,) float32: the model after the round's epochs on the site's rows. Raises TaskFailed and BadInput."""
        site, rows = self.site, self.site.standard_rows(self.state)
        if site.task.train is None:
            site.flat.write(self.start)
        else:  # it may evaluate the model in between
            site.write(self.start, rows)
        site.report = local_train(
            site.task, site.flat.module, rows.train, self.plan.train,
            seed=site.job.run.seed, round_=self.round, rounds=self.plan.rounds, site=site.site.id, term=term,
        )  # fmt: skip
        self.steps = site.report.steps
        return site.flat.read()
