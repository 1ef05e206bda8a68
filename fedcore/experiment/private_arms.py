"""The arms beside a federated one with privacy: its steps without noise.

A round of such a job is one step along the sum of the gradients of all rows, so these arms take the same steps, over
the rows that they have: what differs is what privacy took. A step over the rows of all sites is that over pooled rows,
so federation costs nothing there but the rounding of floats.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fedcore.experiment.arms import Budget, Federated, Scoring
from fedcore.experiment.prepare import Prepared
from fedcore.learning.private_gradients import clipped_sum
from fedcore.learning.released import decayed
from fedcore.learning.rules import rules_of
from fedcore.learning.rules.parts import Summed
from fedcore.learning.state import JobState
from fedcore.learning.training import TrainReport
from fedcore.results import Columns
from fedcore.secagg.encode.quantise import dequantise, quantise
from fedcore.seeds import generator
from fedcore.types import WideVector

_UNCLIPPED = sys.float_info.max


class Steps:
    """Parties that step without noise. parties: of each, the places of its sites in the roster, which share a model.

    beside: the federated arm, of whose sums only the survivors take part; it steps first. quantised: clipped to the
    norm and rounded to the grid, as vectors with noise are. companion: steps beside this arm, for the split of the gap.
    """

    def __init__(
        self,
        prepared: Prepared,
        parties: Sequence[Sequence[int]],
        beside: Federated | None = None,
        *,
        quantised: bool = False,
    ) -> None:
        self.budget, self._prepared, self._parties = Budget(), prepared, parties
        self._beside, self._quantised = beside, quantised
        self._states = [prepared.federation.state for _ in parties]
        self.companion: Steps | None = None

    @classmethod
    def of_sum(cls, prepared: Prepared, beside: Federated) -> Steps:
        """The arm `federated_float`, and beside it the steps that are clipped and rounded."""
        everybody = [range(len(prepared.sites))]
        found = cls(prepared, everybody, beside)
        found.companion = cls(prepared, everybody, beside, quantised=True)
        return found

    def step(self, round_: int) -> Columns:
        plan, reports = self._prepared.plan, list[TrainReport]()
        for party, members in enumerate(self._parties):
            here = [i for i in members if self._beside is None or i in self._beside.survivors]
            if not here:
                continue
            state, total = self._states[party], np.zeros(plan.coordinates)
            for place in here:
                total += self._moved(place, state, round_, reports)
            mean = decayed(plan, state.server, total / len(here))
            server = rules_of(plan.train).apply(plan, state.server, mean, Summed(len(here), round_))
            self._states[party] = replace(state, server=server)
        if self.companion is not None:
            self.companion.step(round_)
        return {"train_loss": self.budget.add(reports)}

    def _moved(
        self, place: int, state: JobState, round_: int, reports: list[TrainReport]
    ) -> WideVector:
        """One site's part of the step."""
        plan, trainer = self._prepared.plan, self._prepared.federation.sites[place]
        privacy, site = plan.privacy, self._prepared.sites[place]
        assert privacy is not None
        assert plan.range.start is not None
        trainer.flat.write(state.server.model)
        total, report = clipped_sum(
            trainer.task, trainer.flat.module, site.train,
            clip=privacy.clip if self._quantised else _UNCLIPPED, unit=privacy.unit,
            seed=trainer.job.run.seed, round_=round_, site=site.id,
        )  # fmt: skip
        reports.append(report)
        # Every row is in every step here, whatever the sample rate.
        moved = -total * replace(privacy, sample_rate=1.0).scale(plan.train.lr, plan.max_examples)
        if not self._quantised:
            return moved
        bits, bound = plan.packing.bits, plan.range.start
        rounding = generator(trainer.job.run.seed, round_, site.id, "rounding")
        return dequantise(quantise(moved, bits, bound, rounding).fields, bits, bound, 1)

    def evaluate(self, round_: int) -> Scoring:
        return self._scored(round_, validation=False)

    def validate(self, round_: int) -> Scoring:
        return self._scored(round_, validation=True)

    def _scored(self, round_: int, *, validation: bool) -> Scoring:
        of_site = {place: i for i, members in enumerate(self._parties) for place in members}
        found = []
        for place, (trainer, site) in enumerate(
            zip(self._prepared.federation.sites, self._prepared.sites, strict=True)
        ):
            model = self._states[of_site[place]].server.model
            rows = site.validated() if validation else site
            found.append(trainer.score_model(model, rows, round_, {}))
        return found

    def models(self) -> tuple[bytes, ...]:
        beside = () if self.companion is None else self.companion.models()
        return (*(state.to_bytes() for state in self._states), *beside)

    def go_back(self, models: Sequence[bytes]) -> None:
        self.restore(models)

    def save(self) -> Any:
        return self.models()

    def restore(self, saved: Any) -> None:
        own = len(self._states)
        self._states = [JobState.from_bytes(each) for each in saved[:own]]
        if self.companion is not None:
            self.companion.restore(saved[own:])
