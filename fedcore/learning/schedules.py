"""Learning-rate schedules: the rate of a round, from the plan, the round and the number of rounds.

Invariant: nothing else decides the rate, so every site and every arm trains a round with the same one. An arm
that trains alone sees as many rows in a round as the federation, so it has the same rate at the same work.
Cosine: Loshchilov and Hutter 2017 (arXiv:1608.03983), section 3, one period without restarts.
Warm-up: Goyal et al. 2017 (arXiv:1706.02677), section 2.2.
"""

import math
from dataclasses import replace

from fedcore.secagg.plan import TrainPlan


def learning_rate(plan: TrainPlan, round_: int, rounds: int) -> float:
    """The step size of a round, in (0, plan.lr]. round_: from 1, of `rounds` in all.

    In the W rounds of the warm-up it is plan.lr r / (W + 1). Then, with k rounds since the warm-up of n in all:
    constant: plan.lr. cosine: plan.lr (1 + cos(pi k / n)) / 2. linear: plan.lr (1 - k / n).
    exponential: plan.lr lr_decay^k. step: plan.lr lr_decay^floor(k / lr_step_rounds).
    """
    warmup = plan.warmup_rounds
    if round_ <= warmup:
        return plan.lr * round_ / (warmup + 1)
    done, total = round_ - warmup - 1, max(1, rounds - warmup)
    share = done / total
    match plan.lr_schedule:
        case "cosine":
            return plan.lr * (1 + math.cos(math.pi * share)) / 2
        case "linear":
            return plan.lr * (1 - share)
        case "exponential" | "step":
            return float(plan.lr * plan.lr_decay ** (done // (plan.lr_step_rounds or 1)))
    return plan.lr


def at_full_rate(plan: TrainPlan) -> TrainPlan:
    """The same training without a schedule, for the calibration of the range: the updates of a warm-up are
    small, and the range could not follow those after it."""
    return replace(plan, lr_schedule="constant", lr_decay=1.0, lr_step_rounds=None, warmup_rounds=0)
