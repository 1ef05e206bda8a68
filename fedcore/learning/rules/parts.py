"""What the rules of an algorithm are made of.

Invariant: `train` is a function of the round and of what the site has kept, and returns what is to be kept instead;
it changes nothing itself. `apply` runs at every site on the same released sum and must give the same bits everywhere:
NumPy float64, element-wise, as in `learning/optimisers.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from fedcore.learning.optimisers import ServerState, apply_update
from fedcore.secagg.plan import RoundPlan
from fedcore.types import FloatVector, WideVector

Values = Mapping[str, FloatVector]
"""Vectors that a site keeps, by name, each float32."""


@dataclass(frozen=True)
class GradientTerm:
    """Added to the gradient of every batch: shift + pull (w - anchor), over the trained parameters.

    shift: (parameters,) float32, None for zeros. anchor: (parameters,) float32, None for the parameters that
    training begins with.
    """

    shift: FloatVector | None = None
    pull: float = 0.0
    anchor: FloatVector | None = None


class LocalRound(Protocol):
    """One site's training in one round, as the rules use it.

    start: (d,) float32, the released model. server: the state that it is of. lr: step size of the round. steps:
    optimiser steps that the last `train` took.
    """

    @property
    def plan(self) -> RoundPlan: ...
    @property
    def start(self) -> FloatVector: ...
    @property
    def server(self) -> ServerState: ...
    @property
    def round(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def steps(self) -> int: ...

    @property
    def local(self) -> FloatVector:
        """What stays at the site of the model that was trained last, float32."""
        ...

    def train(
        self,
        term: GradientTerm | None = None,
        *,
        start: FloatVector | None = None,
        local: FloatVector | None = None,
    ) -> FloatVector:
        """(d,) float32: the model after the round's epochs on the site's rows.

        start: (d,) float32, another model to begin with than the released one. local: what stays at the site, None for
        the seed's. Raises TaskFailed and BadInput.
        """
        ...


@dataclass(frozen=True)
class Summed:
    """What a released sum is of. sites: how many; round: the training round, from 1."""

    sites: int
    round: int


Used = tuple[FloatVector, FloatVector | None]
"""A model, (d,) float32, and what stays at the site of it, None for the seed's."""


@dataclass(frozen=True)
class Rules:
    """One algorithm.

    train: (the round, what the site kept) -> what the site sends, before weighting: (d,) float32, with the second block
    behind it, and what it keeps if that is in the released sum. init: (plan) -> the vectors of the server beside the
    optimiser's moments, each (parameters,) float64. apply: (plan, state, weighted mean of what was sent, what it is
    of) -> the state after the server step. largest_step: (plan, largest step of the optimiser, largest mean) ->
    bound on what one round adds to a parameter. uses: (the released model, what the site kept) -> the model that the
    site evaluates and hands out.
    """

    train: Callable[[LocalRound, Values], tuple[FloatVector, Values]]
    init: Callable[[RoundPlan], Mapping[str, WideVector]]
    apply: Callable[[RoundPlan, ServerState, WideVector, Summed], ServerState]
    largest_step: Callable[[RoundPlan, float, float], float]
    uses: Callable[[FloatVector, Values], Used] = lambda model, kept: (model, None)


def plain_train(round_: LocalRound, kept: Values) -> tuple[FloatVector, Values]:
    """The update, and nothing that is kept."""
    return round_.train() - round_.start, kept


def optimised(plan: RoundPlan, state: ServerState, mean: WideVector) -> ServerState:
    """The step of the plan's server optimiser; vectors of the algorithm's own stay as they are."""
    moved = apply_update(state, mean, plan.parameters, plan.server)
    own = {name: value for name, value in state.moments.items() if name not in moved.moments}
    return replace(moved, moments={**moved.moments, **own})
