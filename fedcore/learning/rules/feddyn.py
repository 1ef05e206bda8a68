"""FedDyn: each site's loss is changed from round to round so that its minimum moves to the common one.

Acar et al. 2021 (arXiv:2111.04263), algorithm 1. A site minimises L_i(w) - <g_i, w> + alpha/2 |w - w_t|^2 from w_t on,
and then has g_i <- g_i - alpha (w - w_t). The server has h <- h - alpha |S|/N mean(w - w_t), and the model
w_t + mean(w - w_t) - h / alpha. Means are weighted by rows, as the loss that is minimised is; the paper's are over
sites of equal weight. Only w - w_t travels, as in averaging; g_i never leaves the site.
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
from fedcore.secagg.plan import RoundPlan
from fedcore.types import FloatVector, WideVector

GRADIENT, DRIFT = "gradient", "drift"


def train(round_: LocalRound, kept: Values) -> tuple[FloatVector, Values]:
    """As `Rules.train`: the update; keeps g_i."""
    plan = round_.plan
    gradient = kept.get(GRADIENT, np.zeros(plan.parameters, dtype=np.float32))
    end = round_.train(GradientTerm(shift=-gradient, pull=plan.train.feddyn_alpha))
    update = end - round_.start
    moved = update[: plan.parameters] * np.float32(plan.train.feddyn_alpha)
    return update, {GRADIENT: gradient - moved}


def apply(plan: RoundPlan, state: ServerState, mean: WideVector, summed: Summed) -> ServerState:
    """As `Rules.apply`."""
    alpha, share = plan.train.feddyn_alpha, summed.sites / len(plan.sites)
    drift = state.moments[DRIFT] - mean[: plan.parameters] * (alpha * share)
    stepped = mean.copy()
    stepped[: plan.parameters] -= drift / alpha
    moved = optimised(plan, state, stepped)
    return replace(moved, moments={**moved.moments, DRIFT: drift})


RULES = Rules(
    train=train,
    init=lambda plan: {DRIFT: np.zeros(plan.parameters)},
    apply=apply,
    # The drift is alpha times the sum of all mean updates so far.
    largest_step=lambda plan, step, mean: step + plan.rounds * mean,
)
