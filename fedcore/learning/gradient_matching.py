"""Training rows from the gradient of one step: what a party that reads an update can work out (`fedcore attack`).

`linear_inputs`: the gradient of a linear layer's weights is, for one row, the outer product of what comes out of the
layer and the row, so each line of it divided by the gradient of the bias is the row (Phong et al. 2018,
ePrint 2017/715, section 3). `match`: inputs are searched whose gradient points the same way, with a penalty on their
total variation (Geiping et al. 2020, arXiv:2003.14053, equation 4). `labels`: the classes of the rows, from the last
bias (Zhao et al. 2020, arXiv:2001.02610, for one row; by expected counts for several).

Invariant: nothing here reads the rows that are attacked, only the module, the task's loss and the gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from fedcore.learning.data.rows import ArrayRows
from fedcore.learning.model import seeded
from fedcore.learning.task import Task
from fedcore.learning.training import Adam, loss_of
from fedcore.secagg.plan import TrainPlan
from fedcore.types import WideVector

Inputs = NDArray[np.float32]
"""(rows, ...) as the model takes them."""

_SAME = 0.05
"""Two candidates for a row are the same one where their root mean square distance is below this share of the width of
the valid range."""

_LEAST_PUBLIC = 20
"""Rows from which a covariance is worth more than none."""

_NEAR, _TOGETHER, _FLOOR = 2.0, 0.1, 0.003
"""Of a picture's prior beside the covariance of the public rows: how far pixels go together, how much of that there is,
and how much noise, as shares of the width of the valid range."""

_OUTSIDE = 0.01
"""The weight of values outside the valid range, which they are cut to in the end."""


@dataclass(frozen=True)
class Search:
    """How rows are searched. steps: of Adam; starts: from so many points, of which the best is taken; rate: first step
    size, in standard deviations of the prior; prior: weight of its negative logarithm at first and in the end;
    variation: weight of the total variation."""

    steps: int = 400
    starts: int = 2
    rate: float = 0.05
    prior: tuple[float, float] = (1e-4, 1e-6)
    variation: float = 1e-3


@dataclass(frozen=True)
class LocalSteps:
    """What is known of a site's local training on a batch. count: steps on it; rate, momentum, decay: of SGD."""

    count: int = 1
    rate: float = 0.0
    momentum: float = 0.0
    decay: float = 0.0

    @property
    def gradients(self) -> float:
        """How many times a gradient that stays the same is in the update."""
        m = self.momentum
        return sum(m ** (step - each) for step in range(self.count) for each in range(step + 1))


@dataclass(frozen=True)
class Prior:
    """What an adversary takes rows of this kind to be like: a Gaussian, in whose coordinates it searches.

    mean: (values,); root: (values, values), times its transpose the covariance; span: the valid range.
    """

    mean: Tensor
    root: Tensor
    span: tuple[float, float]

    @classmethod
    def of(cls, public: Inputs, picture: Sequence[int] | None, span: tuple[float, float]) -> Prior:
        """Learnt on (rows, ...) public rows; of the middle of the range alone where these are few."""
        (low, high), flat = span, public.reshape(len(public), -1).astype(np.float64)
        width, size = high - low, flat.shape[1]
        if len(flat) < _LEAST_PUBLIC:
            mean, covariance = np.full(size, (low + high) / 2), np.eye(size) * (width / 3) ** 2
        else:
            mean, covariance = flat.mean(axis=0), np.cov(flat.T).reshape(size, size)
            covariance = covariance + np.eye(size) * (_FLOOR * width) ** 2
        if picture is not None:
            places = np.indices(picture).reshape(len(picture), -1).T
            apart = np.sqrt(((places[:, None, -2:] - places[None, :, -2:]) ** 2).sum(axis=2))
            same = (places[:, None, :-2] == places[None, :, :-2]).all(axis=2)
            covariance = covariance + np.exp(-apart / _NEAR) * same * (_TOGETHER * width) ** 2
        root = np.linalg.cholesky(covariance)
        return cls(torch.from_numpy(mean).float(), torch.from_numpy(root).float(), span)

    def starts(self, count: int, rows: int) -> Tensor:
        """(count, rows, values) standardised: the mean, then draws near it."""
        found = torch.randn(count, rows, len(self.mean)) / 2
        found[0] *= 0.2  # rows that begin alike stay alike
        return found

    def rows(self, free: Tensor) -> Tensor:
        """(..., values) inputs of standardised ones, not cut to the valid range."""
        return self.mean + free @ self.root.T

    def penalty(self, free: Tensor, inputs: Tensor, share: float, search: Search) -> Tensor:
        """Of all rows, after a share of the steps: how unlikely they are, and how far out of the valid range."""
        first, last = search.prior
        width = self.span[1] - self.span[0]
        outside = ((inputs - inputs.clamp(*self.span)) / width).square().sum()
        weight = first * math.pow(last / first, share)
        return free.square().sum() * weight + outside * _OUTSIDE


def _descended(
    free: Tensor, search: Search, far: Callable[[Tensor, float], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """(free inputs, their distances) after Adam with a rate that falls. far: the (starts,) distances and what is
    minimised, of free inputs after a share of the steps."""
    guess = nn.Parameter(free)
    optimiser = Adam([guess], TrainPlan(lr=search.rate))
    distances = torch.zeros(len(free))
    for step in range(search.steps):
        share = step / search.steps
        optimiser.param_groups[0]["lr"] = search.rate * (
            0.02 + 0.49 * (1 + math.cos(math.pi * share))
        )
        distances, whole = far(guess, share)
        guess.grad = torch.autograd.grad(whole, guess)[0]
        optimiser.step()
    return guess.detach(), distances.detach()


def _parts(module: nn.Module, gradient: WideVector) -> dict[str, Tensor]:
    """{name: gradient} of the trained parameters, from a flat one in the order of `FlatModel`."""
    found, done = {}, 0
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            size = parameter.numel()
            part = torch.from_numpy(gradient[done : done + size].astype(np.float32))
            found[name], done = part.view(parameter.shape), done + size
    return found


def _linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers with trained weights and bias, in order."""
    for name, layer in module.named_modules():
        own = dict(layer.named_parameters(recurse=False))
        if (
            isinstance(layer, nn.Linear)
            and len(own) == 2
            and all(p.requires_grad for p in own.values())
        ):
            yield name, layer


def first_linear(module: nn.Module, size: int) -> bool | None:
    """Whether the first trained layer is linear over the rows themselves, of `size` numbers; None for a model without
    any linear layer with a bias, of which `linear_inputs` has nothing to work on."""
    layers = [m for m in module.modules() if any(True for _ in m.parameters(recurse=False))]
    first = next(iter(_linear_layers(module)), None)
    if first is None:
        return None
    return layers[0] is first[1] and first[1].in_features == size


def linear_inputs(
    module: nn.Module,
    gradient: WideVector,
    exact: tuple[float, float],
    rows: int,
    span: tuple[float, float] | None,
) -> Inputs:
    """(k, size) candidates for what the first linear layer got of the rows of a step, at most `rows` of them, the
    likeliest first.

    A unit that one row alone makes active gives that row, one that several make active a mixture of these. Two units
    that give the same are probably of the first kind; so are values in the valid range `span`, None where none is
    known. exact: gradients of a bias of a smaller magnitude are rounding, larger ones were clipped. The module must
    have such a layer (`first_linear`).
    """
    name = next(iter(_linear_layers(module)))[0]
    parts = _parts(module, gradient)
    weights, bias = (parts[f"{name}.{each}".lstrip(".")].numpy() for each in ("weight", "bias"))
    whole = np.abs(weights) < exact[1]
    usable = np.flatnonzero(
        (np.abs(bias) > exact[0]) & (np.abs(bias) < exact[1]) & whole.all(axis=1)
    )
    if rows == 1:  # every unit gives the one row: all that was not clipped is weighed together
        trusted = whole & ((np.abs(bias) > exact[0]) & (np.abs(bias) < exact[1]))[:, None]
        products, squares = (weights * bias[:, None] * trusted), (bias**2)[:, None] * trusted
        known = trusted.any(axis=0)
        row = products.sum(axis=0) / np.where(known, squares.sum(axis=0), 1.0)
        only: Inputs = row.clip(*(span or (-np.inf, np.inf))).astype(np.float32)[None]
        return only[: int(known.any())]
    usable = usable[np.argsort(-np.abs(bias[usable]), kind="stable")]
    found = (weights[usable] / bias[usable, None]).astype(np.float64)
    if not len(found):
        return np.zeros((0, weights.shape[1]), dtype=np.float32)
    low, high = span or (-np.inf, np.inf)
    width = high - low if span else float(found.std()) + 1e-12
    apart = np.sqrt(((found[:, None, :] - found[None, :, :]) ** 2).mean(axis=2)) / width
    np.fill_diagonal(apart, np.inf)
    outside = np.sqrt((np.clip(found, low, high) - found) ** 2).mean(axis=1) / width
    doubt = np.minimum(apart.min(axis=1), 1.0) + outside
    taken: list[int] = []
    for index in np.argsort(doubt, kind="stable"):
        if all(apart[index, other] > _SAME for other in taken):
            taken.append(int(index))
        if len(taken) == rows:
            break
    return np.asarray(np.clip(found[taken], low, high), dtype=np.float32)


def inputs_behind(
    module: nn.Module,
    features: Inputs,
    shape: Sequence[int],
    prior: Prior,
    search: Search,
    *,
    seed: int,
) -> Inputs:
    """(k, *shape) inputs for which the first linear layer gets these (k, size) features, each searched by itself.

    shape: of one row. The layers before are those of the module in evaluation mode.
    """
    module.eval()
    got: list[Tensor] = []
    if not len(features):  # of random numbers every bias may be out of its range
        return np.zeros((0, *shape), dtype=np.float32)
    layer = next(iter(_linear_layers(module)))[1]
    handle = layer.register_forward_pre_hook(lambda _, arguments: got.append(arguments[0]))
    wanted = torch.from_numpy(features)
    size = wanted.square().sum(dim=1) + 1e-12

    def far(free: Tensor, share: float) -> tuple[Tensor, Tensor]:
        inputs = prior.rows(free)
        got.clear()
        module(inputs.reshape(-1, *shape))
        apart = (got[0].reshape(*free.shape[:2], -1) - wanted).square().sum(dim=2) / size
        return apart, apart.sum() + prior.penalty(free, inputs, share, search)

    try:
        with seeded(seed, 0, "", "attack inputs"):
            starts = prior.starts(search.starts, len(features))
            free, distances = _descended(starts, search, far)
    finally:
        handle.remove()
    best = free[distances.argmin(dim=0), torch.arange(len(features))]
    return prior.rows(best).clamp(*prior.span).reshape(-1, *shape).numpy()


def labels(
    module: nn.Module, gradient: WideVector, rows: int, shape: Sequence[int], span: tuple[float, float],
    *, seed: int,
) -> NDArray[np.int64] | None:  # fmt: skip
    """(rows,) classes, ascending; None for a model whose last layer is not linear with a bias.

    The gradient of the last bias is the mean probability of a class minus its share of the rows, and the mean
    probability hardly depends on the inputs while the model is new: it is taken on random ones.
    """
    layers = list(_linear_layers(module))
    if not layers:
        return None
    bias = _parts(module, gradient)[f"{layers[-1][0]}.bias".lstrip(".")].double().numpy()
    with seeded(seed, 0, "", "attack labels"), torch.no_grad():
        inputs = torch.rand(64, *shape) * (span[1] - span[0]) + span[0]
        outputs = module(inputs)
        one = outputs.ndim == 1 or outputs.shape[-1] == 1
        likely = torch.sigmoid(outputs).reshape(-1, 1) if one else torch.softmax(outputs, -1)
    share = likely.double().mean(dim=0).numpy() - bias
    if one:
        ones = int(np.clip(np.rint(share[0] * rows), 0, rows))
        return np.repeat(np.array([0, 1], dtype=np.int64), [rows - ones, ones])
    left, found = share * rows, []
    for _ in range(rows):
        found.append(int(np.argmax(left)))
        left[found[-1]] -= 1
    return np.sort(np.array(found, dtype=np.int64))


def match(
    task: Task, module: nn.Module, gradient: WideVector, exact: tuple[float, float], classes: NDArray[np.int64],
    like: ArrayRows, picture: Sequence[int] | None, prior: Prior, search: Search, *, seed: int,
    local: LocalSteps | None = None,
) -> tuple[Inputs, float]:  # fmt: skip
    """((rows, ...) inputs whose gradient is closest to the given one, 1 - cosine of the two).

    exact: as in `linear_inputs`; what was clipped is not compared. classes: of the rows, in the order of the inputs.
    like: rows of the task, for shapes and types only. picture: (height, width) or (channels, height, width) of one
    row, None where it is none. seed: of the random starts. local: steps that are simulated for each candidate, where
    `gradient` is an update of several, over the rate and with its sign turned.
    """
    module.train()
    wanted = torch.cat([part.reshape(-1) for part in _parts(module, gradient).values()])
    whole = wanted.abs() < exact[1]
    wanted = wanted * whole
    size, shape, width = wanted.norm(), tuple(like.x.shape[1:]), prior.span[1] - prior.span[0]
    local = local or LocalSteps()
    trained: dict[str, Tensor] = {n: p for n, p in module.named_parameters() if p.requires_grad}
    targets = torch.from_numpy(classes).to(like.y.dtype).reshape(-1, *like.y.shape[1:])

    def far(free: Tensor, share: float) -> tuple[Tensor, Tensor]:
        inputs = prior.rows(free)
        now, speed, done = trained, list[Tensor](), list[Tensor]()
        for _ in range(local.count):
            outputs = functional_call(module, now, (inputs.reshape(-1, *shape),))
            mine = torch.autograd.grad(
                loss_of(task, like, outputs, targets), list(now.values()),
                create_graph=True, allow_unused=True, materialize_grads=True,
            )  # fmt: skip
            slope = [g + local.decay * p for g, p in zip(mine, now.values(), strict=True)]
            speed = (
                [g + local.momentum * v for g, v in zip(slope, speed, strict=True)]
                if speed
                else slope
            )
            done = [d + v for d, v in zip(done, speed, strict=True)] if done else speed
            now = {n: p - local.rate * v for (n, p), v in zip(now.items(), speed, strict=True)}
        flat = torch.cat([part.reshape(-1) for part in done]) * whole
        apart = 1 - flat @ wanted / (flat.norm() * size + 1e-20)
        rough = search.variation * _variation(inputs[0], picture, width)
        return apart[None], apart + prior.penalty(free, inputs, share, search) + rough

    with seeded(seed, 0, "", "attack inputs"):
        found = [
            _descended(start[None], search, far)
            for start in prior.starts(search.starts, len(classes))
        ]
    free, distance = min(found, key=lambda each: float(each[1]))
    return prior.rows(free[0]).clamp(*prior.span).reshape(-1, *shape).numpy(), float(distance)


def _variation(inputs: Tensor, picture: Sequence[int] | None, width: float) -> Tensor:
    """Mean difference of neighbouring pixels, as a share of the valid range."""
    if picture is None:
        return inputs.new_zeros(())
    images = inputs.reshape(len(inputs), -1, *picture[-2:])
    down, across = images.diff(dim=2).abs().mean(), images.diff(dim=3).abs().mean()
    return (down + across) / width
