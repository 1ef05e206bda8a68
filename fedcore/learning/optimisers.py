"""Server optimisers as `init` and `apply` pairs: FedAvg, FedAvgM, FedAdam, FedYogi.

They run at every site on the same released sum, so they must give the same bits everywhere
(PROTOCOL F). Invariant: NumPy float64, element-wise + - * / sqrt only, no reduction, no fused
operation, no power: beta^t is kept by repeated multiplication. The model is one cast to float32.
FedAvg: McMahan et al. 2017, algorithm 1. FedAvgM: Hsu et al. 2019 (arXiv 1909.06335), section 4.3.
FedAdam, FedYogi: Reddi et al. 2021 (arXiv 2003.00295), algorithm 2, with Adam's bias correction.
"""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from fedcore.errors import UnknownName
from fedcore.secagg.plan import ServerPlan
from fedcore.types import FloatVector, WideVector

BETA1, BETA2, TAU = 0.9, 0.99, 1e-3
"""Reddi et al. 2021, section 5: beta1 = 0.9, beta2 = 0.99, tau = 1e-3."""


@dataclass(frozen=True)
class ServerState:
    """parameters: (d,) float64 master copy; moments: further (parameters,) float64 vectors by name.

    scalars: the running powers of beta. bound: R, the quantiser's range in the coming round.
    first_bound: R_0, what the plan stated or the calibration found; 0 before it.
    """

    parameters: WideVector
    moments: Mapping[str, WideVector]
    scalars: Mapping[str, float]
    bound: float
    first_bound: float

    @property
    def model(self) -> FloatVector:
        """(d,) float32: the one cast."""
        return self.parameters.astype(np.float32)

    def canonical(self) -> bytes:
        """The bytes the state tag covers: little-endian, in a fixed order."""
        parts = [self.parameters.astype("<f8").tobytes()]
        parts += [self.moments[name].astype("<f8").tobytes() for name in sorted(self.moments)]
        parts += [struct.pack("<d", self.scalars[name]) for name in sorted(self.scalars)]
        parts.append(struct.pack("<dd", self.bound, self.first_bound))
        return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


Moments = dict[str, WideVector]
Scalars = dict[str, float]
Apply = Callable[[WideVector, Moments, Scalars, ServerPlan], tuple[WideVector, Moments, Scalars]]


@dataclass(frozen=True)
class ServerOptimiser:
    """init(p) -> moments and scalars; apply(mean update, ...) -> the step to add, and the new ones."""

    init: Callable[[int], tuple[Moments, Scalars]]
    apply: Apply


def _fedavgm(
    mean: WideVector, moments: Moments, scalars: Scalars, plan: ServerPlan
) -> tuple[WideVector, Moments, Scalars]:
    velocity = moments["velocity"] * plan.momentum + mean
    return velocity * plan.lr, {"velocity": velocity}, scalars


def _adaptive(second: Callable[[WideVector, WideVector], WideVector]) -> Apply:
    """second: the new second moment, of the old one and the square of the mean update."""

    def apply(
        mean: WideVector, moments: Moments, scalars: Scalars, plan: ServerPlan
    ) -> tuple[WideVector, Moments, Scalars]:
        first = moments["first"] * BETA1 + mean * (1.0 - BETA1)
        variance = second(moments["second"], mean * mean)
        powers = {"beta1": scalars["beta1"] * BETA1, "beta2": scalars["beta2"] * BETA2}
        unbiased = first / (1.0 - powers["beta1"])
        spread = np.sqrt(variance / (1.0 - powers["beta2"]))
        return unbiased * plan.lr / (spread + TAU), {"first": first, "second": variance}, powers

    return apply


def _adaptive_init(size: int) -> tuple[Moments, Scalars]:
    return {"first": np.zeros(size), "second": np.zeros(size)}, {"beta1": 1.0, "beta2": 1.0}


OPTIMISERS = {
    "fedavg": ServerOptimiser(
        lambda size: ({}, {}),
        lambda mean, moments, scalars, plan: (mean * plan.lr, moments, scalars),
    ),
    "fedavgm": ServerOptimiser(lambda size: ({"velocity": np.zeros(size)}, {}), _fedavgm),
    "fedadam": ServerOptimiser(
        _adaptive_init, _adaptive(lambda old, square: old * BETA2 + square * (1.0 - BETA2))
    ),
    "fedyogi": ServerOptimiser(
        _adaptive_init,
        _adaptive(lambda old, square: old - square * np.sign(old - square) * (1.0 - BETA2)),
    ),
}


def optimiser_of(plan: ServerPlan) -> ServerOptimiser:
    """The pair the plan names; raises UnknownName."""
    if plan.optimiser not in OPTIMISERS:
        raise UnknownName("round.server", plan.optimiser, OPTIMISERS)
    return OPTIMISERS[plan.optimiser]


MOST_ADAPTIVE = (1.0 - BETA1) / math.sqrt(1.0 - BETA2) / (1.0 - BETA1 / math.sqrt(BETA2))
"""Most of |first moment| / sqrt(second moment) of FedAdam and FedYogi, whatever the updates were.

For every past update g, j rounds ago, second >= (1 - BETA2) BETA2^j g^2 in both (in Yogi it falls by the
factor BETA2 a round at most, and is at least (1 - BETA2) g^2 after g), so
|first| <= sum (1 - BETA1) BETA1^j |g| <= sqrt(second) times the sum of a geometric series. The correction
of the bias, sqrt(1 - BETA2^t) / (1 - BETA1^t), is at most 1."""


def largest_step(plan: ServerPlan, mean: float) -> float:
    """Bound on what one round adds to a parameter when no mean update ever exceeded `mean`."""
    match plan.optimiser:
        case "fedavgm":
            return plan.lr * mean / (1.0 - plan.momentum) if plan.momentum < 1.0 else math.inf
        case "fedadam" | "fedyogi":
            return plan.lr * min(MOST_ADAPTIVE, mean / TAU)
    return plan.lr * mean


def init_state(model: FloatVector, parameters: int, plan: ServerPlan, bound: float) -> ServerState:
    """The state before round 1. The first `parameters` coordinates are optimised, buffers averaged."""
    moments, scalars = optimiser_of(plan).init(parameters)
    return ServerState(model.astype(np.float64), moments, scalars, bound, bound)


def apply_update(
    state: ServerState, mean: WideVector, parameters: int, plan: ServerPlan
) -> ServerState:
    """One server step from the weighted mean update, (d,) float64.

    Buffers (coordinates from `parameters` on) take the plain mean: a moment of a running variance
    could turn it negative.
    """
    step, moments, scalars = optimiser_of(plan).apply(
        mean[:parameters], dict(state.moments), dict(state.scalars), plan
    )
    moved = state.parameters.copy()
    moved[:parameters] += step
    moved[parameters:] += mean[parameters:]
    return replace(state, parameters=moved, moments=moments, scalars=scalars)
