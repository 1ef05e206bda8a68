"""Server optimisers as `init` and `apply` pairs: FedAvg, FedAvgM, FedAdam, FedYogi, FedAdagrad.

They run at every site on the same released sum, so they must give the same bits everywhere
(PROTOCOL F). Invariant: NumPy float64, element-wise + - * / sqrt only, no reduction, no fused
operation, no power: beta^t is kept by repeated multiplication. The model is one cast to float32.
FedAvg: McMahan et al. 2017, algorithm 1. FedAvgM: Hsu et al. 2019 (arXiv 1909.06335), section 4.3.
FedAdam, FedYogi, FedAdagrad: Reddi et al. 2021 (arXiv 2003.00295), algorithm 2; by default FedAdam and FedYogi with
Adam's bias correction (Kingma and Ba 2015, algorithm 1).
"""

import math
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from fedcore.errors import UnknownName
from fedcore.secagg.plan import ServerPlan
from fedcore.types import FloatVector, WideVector


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


Second = Callable[[WideVector, WideVector, float], WideVector]
"""The new second moment, of the old one, the square of the mean update, and beta2."""


def _adaptive(second: Second, *, corrected: bool = True) -> Apply:
    """corrected: whether the plan's correction applies; a second moment that only grows has no bias."""

    def apply(
        mean: WideVector, moments: Moments, scalars: Scalars, plan: ServerPlan
    ) -> tuple[WideVector, Moments, Scalars]:
        first = moments["first"] * plan.beta1 + mean * (1.0 - plan.beta1)
        variance = second(moments["second"], mean * mean, plan.beta2)
        powers = {"beta1": scalars["beta1"] * plan.beta1, "beta2": scalars["beta2"] * plan.beta2}
        step = (
            _corrected(first, variance, powers, plan)
            if corrected
            else _ratio(first, variance, plan)
        )
        return step, {"first": first, "second": variance}, powers

    return apply


def _ratio(first: WideVector, variance: WideVector, plan: ServerPlan) -> WideVector:
    return first * plan.lr / (np.sqrt(variance) + plan.tau)


def _corrected(
    first: WideVector, variance: WideVector, powers: Scalars, plan: ServerPlan
) -> WideVector:
    if plan.correction == "none":
        return _ratio(first, variance, plan)
    if plan.correction == "flower":  # flwr 1.42, FedAdam: powers of server_round + 1
        spread = math.sqrt(1.0 - powers["beta2"] * plan.beta2)
        rate = plan.lr * spread / (1.0 - powers["beta1"] * plan.beta1)
        return first * rate / (np.sqrt(variance) + plan.tau)
    unbiased = first / (1.0 - powers["beta1"])
    return unbiased * plan.lr / (np.sqrt(variance / (1.0 - powers["beta2"])) + plan.tau)


def _adaptive_init(size: int) -> tuple[Moments, Scalars]:
    return {"first": np.zeros(size), "second": np.zeros(size)}, {"beta1": 1.0, "beta2": 1.0}


OPTIMISERS = {
    "fedavg": ServerOptimiser(
        lambda size: ({}, {}),
        lambda mean, moments, scalars, plan: (mean * plan.lr, moments, scalars),
    ),
    "fedavgm": ServerOptimiser(lambda size: ({"velocity": np.zeros(size)}, {}), _fedavgm),
    "fedadam": ServerOptimiser(
        _adaptive_init, _adaptive(lambda old, square, beta: old * beta + square * (1.0 - beta))
    ),
    "fedyogi": ServerOptimiser(
        _adaptive_init,
        _adaptive(lambda old, square, beta: old - square * np.sign(old - square) * (1.0 - beta)),
    ),
    "fedadagrad": ServerOptimiser(
        _adaptive_init, _adaptive(lambda old, square, beta: old + square, corrected=False)
    ),
}


def optimiser_of(plan: ServerPlan) -> ServerOptimiser:
    """The pair the plan names; raises UnknownName."""
    if plan.optimiser not in OPTIMISERS:
        raise UnknownName("round.server", plan.optimiser, OPTIMISERS)
    return OPTIMISERS[plan.optimiser]


def most_adaptive(plan: ServerPlan) -> float:
    """Most of |first moment| / sqrt(second moment), with the correction, whatever the updates were.

    For every past update g, j rounds ago, the second moment is at least c beta2^j g^2: it falls by the factor beta2
    a round at most, and is at least c g^2 after g, where c is 1 - beta2 of FedAdam and the smaller of 1 - beta2 and
    beta2 of FedYogi. So |first| <= sum (1 - beta1) beta1^j |g| <= sqrt(second) times a geometric series. FedAdagrad's
    second moment is the sum of all squares, and the weights of the first add up to at most 1.
    A correction multiplies by sqrt(1 - beta2^t) / (1 - beta1^t) for a t >= 1: at most 1 where
    beta2 >= beta1 (2 - beta1), because (2 - beta1)^t >= 2 - beta1^t; else at most 1 / (1 - beta1).
    """
    if plan.optimiser == "fedadagrad":
        return 1.0
    least = 1.0 - plan.beta2
    if plan.optimiser == "fedyogi":
        least = min(least, plan.beta2)
    decay = plan.beta1 / math.sqrt(plan.beta2) if plan.beta2 else math.inf
    if plan.beta1 == 0.0:
        decay = 0.0
    if least == 0.0 or decay >= 1.0:
        return math.inf
    series = (1.0 - plan.beta1) / math.sqrt(least) / (1.0 - decay)
    rises = plan.correction != "none" and plan.beta2 < plan.beta1 * (2.0 - plan.beta1) - 1e-12
    return series / (1.0 - plan.beta1) if rises else series


def largest_step(plan: ServerPlan, mean: float) -> float:
    """Bound on what one round adds to a parameter when no mean update ever exceeded `mean`."""
    match plan.optimiser:
        case "fedavgm":
            return plan.lr * mean / (1.0 - plan.momentum) if plan.momentum < 1.0 else math.inf
        case "fedadam" | "fedyogi" | "fedadagrad":
            return plan.lr * min(most_adaptive(plan), mean / plan.tau)
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
