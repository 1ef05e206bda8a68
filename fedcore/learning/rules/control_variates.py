"""SCAFFOLD: sites correct their gradients for the direction in which their own rows pull.

Karimireddy et al. 2020 (arXiv:1910.06378), algorithm 1 with option II. A site takes K steps of rate eta from x to y
along g - c_i + c, and then has c_i+ = c_i - c + (x - y) / (K eta). The server steps along the mean of y - x, and adds
|S|/N times the mean of c_i+ - c_i to c. Both means are weighted by rows, as the loss that is minimised is; the paper's
are over sites of equal weight.

The change of c_i travels as a second block of the same protected vector, times eta and the most steps that a site can
take, so that it has about the size of an update and one range holds both. c_i itself never leaves the site.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fedcore.learning.optimisers import ServerState
from fedcore.learning.rules.parts import (
    GradientTerm,
    LocalRound,
    Rules,
    Summed,
    Values,
    optimised,
)
from fedcore.learning.schedules import learning_rate
from fedcore.secagg.plan import RoundPlan
from fedcore.types import FloatVector, WideVector

CONTROL = "control"


def scale(plan: RoundPlan, round_: int) -> float:
    """What a change of a control variate is multiplied by while it travels: eta times the steps of the largest site
    that the plan allows."""
    batches = -(-plan.max_examples // plan.train.batch_size)
    return learning_rate(plan.train, round_, plan.rounds) * plan.train.epochs * batches


def train(round_: LocalRound, kept: Values) -> tuple[FloatVector, Values]:
    """As `Rules.train`: the update, the change of the control variate, scaled; keeps the new one."""
    size, common = round_.plan.parameters, round_.server.moments[CONTROL]
    own = kept[CONTROL].astype(np.float64) if CONTROL in kept else np.zeros(size)
    end = round_.train(GradientTerm(shift=(common - own).astype(np.float32)))
    update = end - round_.start
    change = -common - update[:size].astype(np.float64) / (max(1, round_.steps) * round_.lr)
    if not round_.steps:  # no row, no step: nothing was learnt of the gradient
        change = np.zeros(size)
    second = (change * scale(round_.plan, round_.round)).astype(np.float32)
    return np.concatenate([update, second]), {CONTROL: (own + change).astype(np.float32)}


def apply(plan: RoundPlan, state: ServerState, mean: WideVector, summed: Summed) -> ServerState:
    """As `Rules.apply`."""
    size = plan.model_coordinates
    moved = optimised(plan, state, mean[:size])
    change = mean[size:] * (summed.sites / len(plan.sites) / scale(plan, summed.round))
    return replace(moved, moments={**moved.moments, CONTROL: state.moments[CONTROL] + change})


RULES = Rules(
    train=train,
    init=lambda plan: {CONTROL: np.zeros(plan.parameters)},
    apply=apply,
    largest_step=lambda plan, step, mean: step,
)
