"""What an attack is carried out on: short recorded rounds of the job, as each party sees them, and the truth beside it.

Every round here is one of the simulation with the real encoding and protection. Where an attack is about a step on a
few rows, every site trains on that many of its rows, in one step; nothing else of the job is changed.

Invariant: an attack gets a party's view; the rows that it is about are for scoring it alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from fedcore.config import Job, PrivacySection
from fedcore.errors import BadInput
from fedcore.experiment.exposure import BOTH, COORDINATOR, held
from fedcore.experiment.prepare import Prepared, prepare
from fedcore.experiment.simulation import Federation
from fedcore.learning.data.rows import ArrayRows, pool
from fedcore.learning.gradient_matching import Prior, Search
from fedcore.learning.model import single_thread
from fedcore.learning.schedules import learning_rate
from fedcore.learning.site import SiteTrainer
from fedcore.learning.task import Task
from fedcore.secagg.encode.quantise import step_size
from fedcore.secagg.protections import Protection
from fedcore.secagg.summing import RoundTrace
from fedcore.seeds import generator
from fedcore.types import Json, WideVector

UPLOAD, SUM = "the upload", "the sum"

_LEAST_SIDE = 7
"""Flat rows of a square number of values are pictures from this side on."""


@dataclass(frozen=True)
class GradientView:
    """What one party reads as the gradient of one step.

    party: who; source: UPLOAD or SUM; gradient: (d,) float64, the mean over `rows` rows; exact: magnitudes below the
    first are rounding, above the second clipped.
    """

    party: str
    source: str
    gradient: WideVector
    rows: int
    exact: tuple[float, float]


@dataclass(frozen=True)
class StepRound:
    """One round of one step a site. start: (d,) float32, the model it began with, which every party but the
    coordinator of an encrypted job has; rows: the target's, as inputs: the truth; rate: of the round."""

    start: np.ndarray[tuple[int], np.dtype[np.float32]]
    rows: ArrayRows
    views: tuple[GradientView, ...]
    rate: float


@dataclass(frozen=True)
class Effort:
    """How much an attack takes. batches: rows of a step; local_steps: on the largest of them; rows: reconstructed for
    each batch, analytically and by a search; search: how, for the same gradient; behind: how, for given features."""

    batches: tuple[int, ...] = (1, 4)
    local_steps: tuple[int, ...] = (4,)
    analytic_rows: int = 16
    searched_rows: int = 4
    search: Search = field(default_factory=lambda: Search(steps=200))
    behind: Search = field(default_factory=lambda: Search(steps=400, starts=4))
    reference_pairs: int = 2
    """Of the likelihood ratio."""


PRESETS = {
    "quick": Effort(),
    "full": Effort(
        (1, 2, 4, 8),
        (2, 4, 16),
        64,
        32,
        Search(steps=2000, starts=4),
        Search(steps=2000, starts=16),
        reference_pairs=8,
    ),
}


@dataclass
class Scene:
    """A job under attack. rates: false positive rates that were asked for. found: what attacks share, computed at the
    first use."""

    task: Task
    job: Job
    effort: Effort = PRESETS["quick"]
    rates: tuple[float, ...] = ()
    found: Json = field(default_factory=dict)

    @property
    def seed(self) -> int:
        return self.job.run.seed

    @property
    def protections(self) -> tuple[str, ...]:
        """The job's own, after `plain` as the control without any, in which no noise is either."""
        own = self.job.protect.protection
        return ("plain", own) if Protection.of(own).protects else (own,)

    def of(self, protection: str) -> Job:
        """The job under a protection of `protections`."""
        own = self.job.protect
        if protection == own.protection:
            return self.job
        without = own.model_copy(
            update={"protection": protection, "cipher": "bfv", "lattice": "standard"}
        )
        return replace(self.job, protect=without, privacy=PrivacySection())

    @cached_property
    def prepared(self) -> Prepared:
        """The job as it is, before its first round of training."""
        return prepare(self.task, self.job)

    @cached_property
    def inputs(self) -> ArrayRows:
        """The training rows of all sites as the model takes them. Raises BadInput where they are no arrays."""
        found = self.prepared.pooled()
        if not isinstance(found, ArrayRows):
            raise BadInput(
                f"attack: found rows of task {self.task.name!r} that are read item by item, expected arrays or a table",
                remedy="return (X, y) arrays from task.data",
            )
        return found

    @cached_property
    def span(self) -> tuple[float, float]:
        """The smallest and largest input: a valid range that is public knowledge for pixels and declared tables."""
        x = self.inputs.x.numpy()
        return float(x.min()), float(x.max())

    @cached_property
    def prior(self) -> Prior:
        """What the adversary takes rows to be like: learnt on the test rows of all sites, which stand for public rows
        of the same kind and are trained on nowhere."""
        tested = pool(
            [s.test for s in self.prepared.sites if len(s.test)] or [self.inputs.take(np.arange(0))]
        )
        assert isinstance(tested, ArrayRows)
        return Prior.of(tested.x.numpy(), self.picture, self.span)

    @cached_property
    def picture(self) -> tuple[int, ...] | None:
        """(height, width) or (channels, height, width) of a row that is a picture, else None."""
        shape = tuple(self.inputs.x.shape[1:])
        if self.prepared.federation.sites[0].layout is not None:
            return None
        if len(shape) == 1:
            side = int(np.sqrt(shape[0]))
            return (side, side) if side * side == shape[0] and side >= _LEAST_SIDE else None
        return shape if len(shape) in (2, 3) else None

    def pixels(self, row: WideVector) -> tuple[int, ...]:
        """(values,) of a picture as 0 to 255."""
        low, high = self.span
        return tuple(np.rint((row - low) / (high - low) * 255).clip(0, 255).astype(int).tolist())

    def why_no_step(self) -> str | None:
        """Why a round of one step shows no gradient of a few rows; None where it does."""
        train, task = self.job.train, self.task
        if task.train is not None or task.app is not None or task.predict is not None:
            return f"task {task.name!r} has loops of its own, so an update is not known to be one step's gradient"
        if train.optimiser != "sgd":
            return f"the first step of {train.optimiser} is not a multiple of the gradient"
        if train.algorithm != "averaging" or train.local_parameters:
            return f"algorithm {train.algorithm!r} sends something else than one step's gradient"
        return None

    def steps(self, protection: str, rows: int, rounds: int, local: int = 1) -> Iterator[StepRound]:
        """Rounds of the job in which every site takes one step, or `local` ones, on `rows` of its training rows, others
        each round; the target is another site each time."""
        job = self.of(protection)
        job = replace(
            job,
            train=job.train.model_copy(update={"epochs": local, "batch_size": rows}),
            round=job.round.model_copy(update={"rounds": rounds, "drop": (), "dropout": 0.0}),
        )
        with single_thread():
            federation = prepare(self.task, job).federation
            honest = federation.sites
            for turn in range(rounds):
                federation.sites = [self._dealt(site, rows, turn) for site in honest]
                while federation.purpose is not None and not federation.purpose.trains:
                    federation.advance()
                yield _recorded(federation, turn, rows)

    def _dealt(self, trainer: SiteTrainer, rows: int, turn: int) -> SiteTrainer:
        """The site with some of its training rows only."""
        site = trainer.site
        order = generator(self.seed, 0, site.id, "attacked rows").permutation(len(site.train))
        picked = np.take(order, np.arange(turn * rows, (turn + 1) * rows), mode="wrap")
        return replace(trainer, site=replace(site, train=site.train.take(picked)))


def _recorded(federation: Federation, turn: int, rows: int) -> StepRound:
    """The next round, as each party sees the update of one site."""
    plan, start, step = federation.plan, federation.state, federation.step
    assert step is not None
    target = turn % len(plan.sites)
    trace = RoundTrace(target, (target + 1) % len(plan.sites))
    federation.advance(trace)
    bits, bound, sites = plan.packing.bits, start.server.bound, len(trace.survivors)
    size = plan.parameters
    rate = learning_rate(plan.train, step.training_round, plan.rounds)
    if plan.privacy:  # the sum over the rows, not their mean
        scale = 1 / plan.privacy.scale(plan.train.lr, plan.max_examples) / rows
    else:
        scale = plan.max_examples / plan.weight_of(rows) / rate
    model = start.server.model
    # Of several steps it is part of what is simulated.
    decay = 0.0 if plan.privacy or plan.train.epochs > 1 else plan.train.weight_decay
    exact = (4 * step_size(bits, bound) * scale, 0.999 * bound * scale)

    def view(party: str, source: str, fields: np.ndarray, of: int) -> GradientView:
        centred = fields[:size].astype(np.float64) - (1 << (bits - 1))
        gradient = -centred * step_size(bits, bound) * scale - decay * model[:size]
        return GradientView(party, source, gradient, of, exact)

    found = []
    for party, has in held(trace, plan, federation.engine.sealer).items():
        if has.upload is not None:
            found.append(view(party, UPLOAD, has.upload, rows))
        if has.mean is not None and party != BOTH:  # together they have the site's sum
            of = rows * (sites if party == COORDINATOR else sites - 1)
            found.append(view(party, SUM, has.mean, of))
    site = federation.sites[target].standard_rows(start).train
    assert isinstance(site, ArrayRows)
    return StepRound(model, site, tuple(found), rate)
