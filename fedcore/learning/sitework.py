"""The computations of one site in a job: the content of its vector for each purpose of a round.

`simulate` runs this code for every site in turn, a deployed site for itself in its training process, so both
give the same bits. `learning/released.py` applies an opened sum.

Invariant: results depend only on the site's rows, the plan, the state at the start and the job's seed, not on
the process that runs it or on other sites.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from fedcore.errors import BadInput
from fedcore.learning.adaptive_range import exceedance_counts, exceeds
from fedcore.learning.data.rows import Rows, TableRows
from fedcore.learning.data.statistics import site_sums
from fedcore.learning.model import FlatModel
from fedcore.learning.optimisers import ServerState
from fedcore.learning.stopwatch import Stopwatch
from fedcore.learning.task import Task
from fedcore.learning.training import TrainReport, local_train
from fedcore.secagg.encode.quantise import quantise
from fedcore.secagg.plan import EXCEEDS, RoundPlan
from fedcore.seeds import generator
from fedcore.types import Contribution, FloatVector, SiteId, WideVector


@dataclass(frozen=True)
class SiteRows:
    """One site's rows, split, ready to train on: `index` is its place in the roster."""

    id: SiteId
    index: int
    train: Rows
    test: Rows


MetricSums = Callable[[SiteRows, ServerState], Mapping[str, Sequence[int]]]
"""The wide integers of a site's metrics of the model a round starts from."""

NO_COORDINATES = np.empty(0, dtype=np.uint64)


def statistics_of(rows: Rows) -> Contribution:
    """A `statistics` vector: counts, sums and sums of squares of each feature (PROTOCOL W)."""
    assert isinstance(rows, TableRows)
    return NO_COORDINATES, site_sums(rows.features, rows.ranges)


@dataclass
class SiteWork:
    """One site's side of the rounds of one job.

    flat: the model's one flat view, overwritten at each use; seed: the job's.
    """

    task: Task
    plan: RoundPlan
    site: SiteRows
    flat: FlatModel
    seed: int
    metric_sums: MetricSums
    watch: Stopwatch = field(default_factory=Stopwatch)

    def train(self, model: FloatVector, round_: int) -> tuple[FloatVector, TrainReport]:
        """Train locally: update = local - global, (d,) float32. Raises BadInput on NaN or infinity."""
        site = self.site
        with self.watch("train"):
            self.flat.write(model)
            report = local_train(
                self.task, self.flat.module, site.train, self.plan.train,
                seed=self.seed, round_=round_, site=site.id,
            )  # fmt: skip
            update = self.flat.read() - model
        if not np.isfinite(update).all():
            bad = int(np.count_nonzero(~np.isfinite(update)))
            raise BadInput(
                f"site {site.id}, round {round_}: found NaN or infinity in {bad} of {len(update)} "
                "coordinates of the update, expected finite numbers",
                remedy="lower train.lr, or look for unscaled or missing values in the site's data",
            )
        return update, report

    def weighted(self, update: FloatVector) -> WideVector:
        """The update times weight / max_examples, so that a weighted mean is one sum (float64)."""
        return update.astype(np.float64) * (self.weight / self.plan.max_examples)

    @property
    def weight(self) -> int:
        """The weight of this site's updates: its training rows in the plan's steps."""
        return self.plan.weight_of(len(self.site.train))

    def exceeding(self, state: ServerState) -> Contribution:
        """A `range` vector: round 1 is trained, and how far its update reaches is counted."""
        update, _ = self.train(state.model, 1)
        counts = exceedance_counts(self.weighted(update).astype(np.float32))
        return NO_COORDINATES, {"exceeding": counts}

    def update(self, state: ServerState, round_: int) -> tuple[Contribution, TrainReport]:
        """An `update` vector: the quantised weighted update and what rides with it."""
        update, report = self.train(state.model, round_)
        with self.watch("encode"):
            rounding = generator(self.seed, round_, self.site.id, "rounding")
            quantised = quantise(
                self.weighted(update), self.plan.packing.bits, state.bound, rounding
            )
        wides = {
            "weight": [self.weight],
            "over_range": [quantised.over],
            "over_half_range": [quantised.over_half],
            EXCEEDS: [int(exceeds(quantised.over, self.plan.coordinates))],
            **self.metric_sums(self.site, state),
        }
        return (quantised.fields, wides), report

    def metrics(self, state: ServerState) -> Contribution:
        """A `metrics` vector: the metric sums of the final model."""
        return NO_COORDINATES, self.metric_sums(self.site, state)
