"""The sum of clipped gradients of one site's training rows: what differential privacy adds noise to.

Invariant: adding or removing one unit (a row, or all rows of one group) changes the sum by at most the clip norm in
L2, whatever the unit's rows are: gradients are taken of each row alone, added up for each unit, and scaled down to the
norm. A unit whose gradient is not finite counts as zero.
Abadi et al. 2016 (arXiv 1607.00133), algorithm 1, with every unit in every step, or each with the same probability.
Gradients of many rows at once by
`vmap(grad(functional_call))` in float64; where a task's code cannot be vectorised, row by row as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fedcore.errors import BadInput
from fedcore.learning.data.groups import codes_of
from fedcore.learning.data.rows import ArrayRows, Rows
from fedcore.learning.device import beside
from fedcore.learning.model import seeded
from fedcore.learning.task import Task
from fedcore.learning.training import LOOP_CODE, TrainReport, loss_of, predict, task_code
from fedcore.secagg.privacy.privacy_plan import COLUMN, SITE
from fedcore.types import FloatVector, WideVector

_SHRINK = 1.0 - 1e-6
"""Clipped vectors are a little shorter than the norm, by more than the last bits of all rows' gradients together can
change with the rows beside them: kernels for other sizes of a batch round differently, in float64 by about 1e-15 a row.
In float32 the gradients of 10,000 rows would change by a share of the clip norm that counts."""

_ELEMENTS = 1 << 22
"""Gradients in memory at once, in numbers: 32 MB."""

Sample = Callable[[int], NDArray[np.bool_]]
"""For so many units: which are in the round."""


def _everyone(units: int) -> NDArray[np.bool_]:
    return np.ones(units, dtype=np.bool_)


Gradients = NDArray[np.float64]
"""(rows, d): the gradient of each row's loss, parameters in the order of a flat model."""


def refuse_site(task: Task, module: nn.Module, rows: Rows, unit: str, site: str) -> None:
    """Raise BadInput for a task or rows of a site without gradients of this unit: before anything is sent or spent."""
    if unit != SITE:
        refuse_task(task, module)
        _codes(rows, unit, site)


def refuse_task(task: Task, module: nn.Module) -> None:
    """Raise BadInput for a task whose rows have no gradients of their own."""
    own = "train" if task.train is not None else "app" if task.app is not None else ""
    if own:
        raise BadInput(
            f"privacy: task {task.name!r} has a `{own}` of its own, expected the loop of Fedcore, which takes the "
            "gradient of each row alone",
            remedy="give model and loss, and leave the training to Fedcore",
        )
    mixing = [
        type(layer).__name__
        for layer in module.modules()
        if isinstance(layer, _NormBase) and not type(layer).__name__.startswith("InstanceNorm")
    ]
    if mixing:
        raise BadInput(
            f"privacy: found {mixing[0]} in the model, expected layers that treat each row alone: the statistics of a "
            "batch mix rows, so no row has a gradient of its own",
            remedy="GroupNorm or LayerNorm in its place",
        )


def clipped_sum(
    task: Task, module: nn.Module, rows: Rows, *, clip: float, unit: str, seed: int, round_: int, site: str,
    sample: Sample = _everyone,
) -> tuple[WideVector, TrainReport]:  # fmt: skip
    """(d,) float64: the sum over units of the gradient of the unit's loss, of norm at most `clip`.

    rows: as inputs; unit: "record", or "column" for the groups of the rows; sample: which units are in this round.
    Raises BadInput for rows without groups under "column", for `refuse_task`, and TaskFailed.
    """
    refuse_task(task, module)
    module.train()
    size = sum(p.numel() for p in module.parameters() if p.requires_grad)
    codes = _codes(rows, unit, site)
    order = np.argsort(codes, kind="stable")
    order = order[sample(int(codes.max(initial=-1)) + 1)[codes[order]]]
    total, losses = np.zeros(size), 0.0
    open_unit, unfinished = -1, np.zeros(size)
    with seeded(seed, round_, site, "train"), task_code(site, round_, LOOP_CODE):
        for start, (gradients, loss) in _batches(task, module, rows, order, size):
            losses += loss
            here = codes[order[start : start + len(gradients)]]
            first = np.flatnonzero(np.diff(here, prepend=-1))
            sums = np.add.reduceat(gradients, first, axis=0)
            if here[0] == open_unit:  # its rows began in the batch before
                sums[0] += unfinished
            elif open_unit >= 0:
                total += _clipped(unfinished[None], clip)
            total += _clipped(sums[:-1], clip)
            open_unit, unfinished = int(here[-1]), sums[-1]
    if open_unit >= 0:
        total += _clipped(unfinished[None], clip)
    return total, TrainReport(1, len(order), losses / len(order) if len(order) else None)


def clipped_rows(
    task: Task, module: nn.Module, rows: Rows, *, clip: float, seed: int, round_: int, site: str
) -> Gradients:
    """(rows, d) float64: the gradient of each row's loss, of norm at most `clip`: what `clipped_sum` adds up where
    the unit is a record. Raises as it does."""
    refuse_task(task, module)
    module.train()
    size = sum(p.numel() for p in module.parameters() if p.requires_grad)
    with seeded(seed, round_, site, "train"), task_code(site, round_, LOOP_CODE):
        found = [g for _, (g, _) in _batches(task, module, rows, np.arange(len(rows)), size)]
    return _each_clipped(np.concatenate(found), clip) if found else np.empty((0, size))


def clipped(update: FloatVector, clip: float) -> WideVector:
    """(d,) float64: a site's update, scaled down to the norm; zeros where it is not finite."""
    return _clipped(update.astype(np.float64)[None], clip)


def _codes(rows: Rows, unit: str, site: str) -> NDArray[np.int64]:
    """The unit that each row is of, as numbers from 0."""
    if unit != COLUMN:
        return np.arange(len(rows), dtype=np.int64)
    if rows.groups is None:
        raise BadInput(
            f"privacy.unit: found 'column', but the rows of site {site} have no group column",
            remedy='fedcore.table(..., group="patient"), or unit = "record"',
        )
    return codes_of(rows.groups)


def _clipped(gradients: Gradients, clip: float) -> WideVector:
    """(d,): the sum of (units, d) gradients, each scaled down to the norm."""
    return np.asarray(_each_clipped(gradients, clip).sum(axis=0), dtype=np.float64)


def _each_clipped(gradients: Gradients, clip: float) -> Gradients:
    norms = np.sqrt(np.square(gradients).sum(axis=1))
    finite = np.isfinite(norms)
    scale = np.where(finite, np.minimum(1.0, clip / np.maximum(norms, clip)) * _SHRINK, 0.0)
    usable = np.where(finite[:, None], gradients, 0.0)
    return np.asarray(usable * scale[:, None], dtype=np.float64)


def _batches(
    task: Task, module: nn.Module, rows: Rows, order: NDArray[np.int64], size: int
) -> Iterator[tuple[int, tuple[Gradients, float]]]:
    """(place in the order, (gradients of the next rows, sum of their losses))."""
    at_once = max(1, _ELEMENTS // size)
    many = None
    if isinstance(rows, ArrayRows) and task.predict is None:
        many = _vectorised(task, module, rows)
    start = 0
    while start < len(order):
        picked = order[start : start + at_once]
        found = None
        if many is not None:
            try:
                found = many(*next(iter(rows.batches(len(picked), picked))))
            except RuntimeError:  # code that vmap cannot vectorise, such as `.item()`
                many = None
        if found is None:
            found = _one_by_one(task, module, rows, picked)
        yield start, found
        start += len(picked)


def _vectorised(
    task: Task, module: nn.Module, rows: Rows
) -> Callable[[Tensor, Tensor], tuple[Gradients, float]]:
    from torch.func import functional_call, grad_and_value, vmap

    values = {
        name: tensor.detach().double() if tensor.is_floating_point() else tensor.detach()
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]
    }
    parameters = {n: values.pop(n) for n, p in module.named_parameters() if p.requires_grad}

    def loss(parameters: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        outputs = functional_call(module, parameters | values, (x.unsqueeze(0),))
        found: Tensor = loss_of(task, rows, outputs, y.unsqueeze(0))
        return found

    each = vmap(grad_and_value(loss), in_dims=(None, 0, 0), randomness="different")

    def of_batch(x: Tensor, y: Tensor) -> tuple[Gradients, float]:
        x, y = (t.double() if t.is_floating_point() else t for t in beside(module, (x, y)))
        gradients, losses = each(parameters, x, y)
        flat = torch.cat([gradients[n].reshape(len(x), -1) for n in parameters], dim=1)
        return flat.cpu().numpy(), float(losses.sum())

    return of_batch


def _one_by_one(
    task: Task, module: nn.Module, rows: Rows, picked: NDArray[np.int64]
) -> tuple[Gradients, float]:
    trained = [p for p in module.parameters() if p.requires_grad]
    found, losses = [], 0.0
    for row in picked:
        outputs, targets = predict(task, module, next(iter(rows.batches(1, np.array([row])))))
        loss: Any = loss_of(task, rows, outputs, targets)
        parts = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
        found.append(
            torch.cat([part.detach().reshape(-1) for part in parts]).double().cpu().numpy()
        )
        losses += float(loss.detach())
    return np.stack(found), losses
