"""Training rows from the gradient of one step: what a party that reads an update can work out (`fedcore attack`).

`linear_inputs`: the gradient of a linear layer's weights is, for one row, the outer product of what comes out of the
layer and the row, so each line of it divided by the gradient of the bias is the row (Phong et al. 2018,
ePrint 2017/715, section 3). `match`: inputs are searched whose gradient points the same way, with a penalty on their
total variation (Geiping et al. 2020, arXiv:2003.14053, equation 4). `labels`: the classes of the rows, from the last
bias (Zhao et al. 2020, arXiv:2001.02610, for one row; by expected counts for several).

Invariant: nothing here reads the rows that are attacked, only the module, the task's loss and the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

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


_BEHIND = 50
"""The weight of the total variation where features are compared, which leave more of a picture open than a gradient."""


@dataclass(frozen=True)
class Search:
    """How `match` searches. steps: of Adam on the sign of the gradient; starts: from so many random inputs, of which
    the best is taken; rate: first step size, as a share of the width of the valid range; variation: weight of the
    total variation."""

    steps: int = 400
    starts: int = 2
    rate: float = 0.1
    variation: float = 1e-3


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
    usable = np.flatnonzero((np.abs(bias) > exact[0]) & (np.abs(bias) < exact[1]))
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
    if rows == 1:
        doubt[:] = np.arange(
            len(found)
        )  # all are of the one row: the largest gradient is the most exact
    taken: list[int] = []
    for index in np.argsort(doubt, kind="stable"):
        if all(apart[index, other] > _SAME for other in taken):
            taken.append(int(index))
        if len(taken) == rows:
            break
    return np.asarray(np.clip(found[taken], low, high), dtype=np.float32)


def inputs_behind(
    module: nn.Module, features: Inputs, like: ArrayRows, picture: Sequence[int] | None, span: tuple[float, float],
    search: Search, *, seed: int,
) -> Inputs:  # fmt: skip
    """(k, ...) inputs for which the first linear layer gets these (k, size) features, each searched by itself.

    like, picture, span: as in `match`. The layers before are those of the module in evaluation mode.
    """
    module.eval()
    (low, high), got, shape = span, [], tuple(like.x.shape[1:])
    if not len(features):  # of random numbers every bias may be out of its range
        return np.zeros((0, *shape), dtype=np.float32)
    layer = next(iter(_linear_layers(module)))[1]
    handle = layer.register_forward_pre_hook(lambda _, arguments: got.append(arguments[0]))
    wanted = torch.from_numpy(features)
    size = wanted.square().mean(dim=1) + 1e-12
    best, least = torch.zeros(len(features), *shape), torch.full((len(features),), torch.inf)
    try:
        with seeded(seed, 0, "", "attack inputs"):
            for _ in range(search.starts):
                guess = nn.Parameter(torch.full((len(features), *shape), (low + high) / 2))
                guess.data += torch.randn_like(guess) * (high - low) / 10
                rate = search.rate * (high - low)
                optimiser = Adam([guess], TrainPlan(lr=rate))
                for step in range(2 * search.steps):
                    optimiser.param_groups[0]["lr"] = rate * 0.1 ** (step / search.steps)
                    got.clear()
                    module(guess)
                    far = (got[0].reshape(len(features), -1) - wanted).square().mean(dim=1) / size
                    whole = far.sum() + _BEHIND * search.variation * len(features) * _variation(
                        guess, picture, high - low
                    )
                    guess.grad = torch.autograd.grad(whole, guess)[0]
                    optimiser.step()
                    with torch.no_grad():
                        guess.clamp_(low, high)
                better = far.detach() < least
                best[better], least[better] = guess.detach()[better], far.detach()[better]
    finally:
        handle.remove()
    return best.numpy()


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
    task: Task, module: nn.Module, gradient: WideVector, classes: NDArray[np.int64], like: ArrayRows,
    picture: Sequence[int] | None, span: tuple[float, float], search: Search, *, seed: int,
) -> tuple[Inputs, float]:  # fmt: skip
    """((rows, ...) inputs whose gradient is closest to the given one, 1 - cosine of the two).

    classes: of the rows, in the order of the inputs. like: rows of the task, for shapes and types only. picture:
    (height, width) or (channels, height, width) of one row, None where it is none. seed: of the random starts.
    """
    module.train()
    wanted = torch.cat([part.reshape(-1) for part in _parts(module, gradient).values()])
    size, shape, (low, high) = wanted.norm(), tuple(like.x.shape[1:]), span
    trained = [p for p in module.parameters() if p.requires_grad]
    targets = torch.from_numpy(classes).to(like.y.dtype).reshape(-1, *like.y.shape[1:])
    best: tuple[float, Tensor] | None = None
    with seeded(seed, 0, "", "attack inputs"):
        for _ in range(search.starts):
            guess = nn.Parameter(torch.rand(len(classes), *shape) * (high - low) + low)
            rate = search.rate * (high - low)
            optimiser = Adam([guess], TrainPlan(lr=rate))
            for step in range(search.steps):
                optimiser.param_groups[0]["lr"] = rate * 0.1 ** (4 * step // search.steps)
                loss = loss_of(task, like, module(guess), targets)
                mine = torch.autograd.grad(
                    loss, trained, create_graph=True, allow_unused=True, materialize_grads=True
                )
                flat = torch.cat([part.reshape(-1) for part in mine])
                far = 1 - flat @ wanted / (flat.norm() * size + 1e-20)
                whole = far + search.variation * _variation(guess, picture, high - low)
                guess.grad = torch.autograd.grad(whole, guess)[0].sign()
                optimiser.step()
                with torch.no_grad():
                    guess.clamp_(low, high)
            distance = float(far.detach())
            if best is None or distance < best[0]:
                best = distance, guess.detach().clone()
    assert best is not None
    return best[1].numpy(), best[0]


def _variation(inputs: Tensor, picture: Sequence[int] | None, width: float) -> Tensor:
    """Mean difference of neighbouring pixels, as a share of the valid range."""
    if picture is None:
        return inputs.new_zeros(())
    images = inputs.reshape(len(inputs), -1, *picture[-2:])
    down, across = images.diff(dim=2).abs().mean(), images.diff(dim=3).abs().mean()
    return (down + across) / width
