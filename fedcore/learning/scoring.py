"""Scoring a model on rows: per-row outputs for the built-in metrics, sums for a task's own.

Only sums leave a site; per-row outputs are used in simulations only.
Invariant: what `score` returns is finite, except for a mean loss that overflowed.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedcore.errors import BadInput, TaskFailed
from fedcore.learning.data.kinds import kind_of
from fedcore.learning.data.rows import Rows, copied
from fedcore.learning.data.targets import TargetScale
from fedcore.learning.device import rows_beside
from fedcore.learning.metrics import Scores
from fedcore.learning.model import seeded
from fedcore.learning.task import Task
from fedcore.learning.task_settings import takes
from fedcore.learning.training import (
    LOOP_CODE,
    batch_norm_needs_two,
    lone_row_breaks,
    loss_of,
    per_row,
    place,
    predict,
    task_code,
    trained_norms,
)

EVALUATION_BATCH = 1024

MOST_ROWS = 4096
"""Training rows whose mean loss judges a model, evenly spaced where a site has more: it is known well
enough, and the pass stays short beside an epoch."""


@dataclass(frozen=True)
class Scored:
    """outputs (n,) or (n, C) float64, targets (n,) float64 or int64, both in the target's unit; loss: mean over the
    rows, of scaled targets where there is a scale.

    own: `{metric: (total, count)}` of every name in `task.metrics` where the task brings `evaluate`;
    outputs are then empty.
    """

    outputs: NDArray[np.float64]
    targets: NDArray[Any]
    loss: float | None
    own: dict[str, tuple[float, float]] | None = None
    scale: TargetScale | None = None


def score(
    task: Task, module: nn.Module, rows: Rows, *, seed: int, round_: int, site: str
) -> Scored:
    """Run `module` over `rows` in evaluation mode.

    Raises TaskFailed where the task's code raises or the model's outputs are not finite, BadInput on
    odd shapes and on what a task's own `evaluate` may not return. Each names the site and the round.
    """
    found = probe(task, module, rows, seed=seed, round_=round_, site=site)
    where = place(site, round_)
    for name, pair in (found.own or {}).items():
        wrong = next((value for value in pair if not math.isfinite(value)), None)
        if wrong is not None:
            raise _not_a_sum(where, f"{wrong}", name)
    bad = int(np.count_nonzero(~np.isfinite(found.outputs)))
    if bad:
        raise TaskFailed(
            f"{where}: found {bad} of {found.outputs.size} model outputs not finite, "
            "expected finite numbers",
            remedy="lower train.lr, or look for unscaled values in the site's data",
        )
    return found


@torch.no_grad()
def probe(
    task: Task, module: nn.Module, rows: Rows, *, seed: int, round_: int, site: str
) -> Scored:
    """`score` without a look at the values: the shapes that a model not yet trained, on rows not yet
    standardised, gives."""
    module.eval()
    part = "evaluate" if task.evaluate is not None else LOOP_CODE
    with seeded(seed, round_, site, "evaluate"), task_code(site, round_, part):
        if task.evaluate is not None:
            given = {"round": round_} if takes(task.evaluate, "round") else {}
            found = task.evaluate(module, rows_beside(module, copied(rows)), **given)
            own = _own_sums(task, found, place(site, round_))
            return Scored(np.empty(0), np.empty(0), None, own)
        outputs, targets, losses = [], [], []
        for batch in rows.batches(EVALUATION_BATCH, None):
            out, target = predict(task, module, batch)
            loss = per_row(rows, float(loss_of(task, rows, out, target)), len(target))
            losses.append((loss, len(target)))
            outputs.append(_as_array(out))
            targets.append(np.asarray(target.detach().cpu().numpy()).reshape(len(target), -1))
    stacked = np.concatenate(outputs)
    flat_targets = np.concatenate(targets)
    if stacked.ndim > 2 or flat_targets.shape[1] != 1:
        name, shape = "outputs", stacked.shape
        if flat_targets.shape[1] != 1:
            name, shape = "targets", flat_targets.shape
        raise BadInput(
            f"{place(site, round_)}: found {name} of shape {shape}, expected one row per example",
            remedy="give the task its own evaluate(model, rows) -> {metric: (total, count)}",
        )
    count = sum(n for _, n in losses)
    mean_loss = sum(value * n for value, n in losses) / count if count else None
    if rows.scale is not None:
        stacked = rows.scale.to_unit(stacked)
    return Scored(stacked, flat_targets[:, 0], mean_loss, scale=rows.scale)


def pooled(parts: Sequence[Scored | None]) -> Scores | None:
    """The outputs of several sites together, each None where it has no test row; None without any, and where
    the task evaluates itself. Raises BadInput where the sites' outputs have different shapes."""
    found = {k: part for k, part in enumerate(parts) if part is not None and part.own is None}
    shapes = {part.outputs.shape[1:] for part in found.values()}
    if len(shapes) > 1:
        raise BadInput(
            f"scores: found outputs of {len(shapes)} different shapes, expected the same "
            "model outputs at every site"
        )
    if not found:
        return None
    return Scores(
        np.concatenate([part.outputs for part in found.values()]),
        np.concatenate([part.targets for part in found.values()]),
        np.repeat(list(found), [len(part.targets) for part in found.values()]),
    )


def _own_sums(task: Task, found: Any, where: str) -> dict[str, tuple[float, float]]:
    if not isinstance(found, Mapping):
        raise BadInput(
            f"{where}: task.evaluate returned {kind_of(found)}, expected {{metric: (total, count)}}",
            remedy="sums over the site's rows, so that sites can be added up",
        )
    missing = [name for name in task.metrics if name not in found]
    if missing:
        names = ", ".join(map(str, found)) or "no metrics"
        raise BadInput(
            f"{where}: task.evaluate: found {names}, expected {', '.join(missing)} too",
            remedy="return every name of task.metrics at every site, (0, 0) where it is undefined, "
            "or name what it returns in metrics=(...)",
        )
    sums = {}
    for name in task.metrics:
        try:
            total, count = (float(value) for value in found[name])
        except (TypeError, ValueError, RuntimeError):
            raise _not_a_sum(where, repr(found[name]), name) from None
        sums[name] = (total, count)
    return sums


def _not_a_sum(where: str, shown: str, name: str) -> BadInput:
    text = " ".join(shown.split())
    return BadInput(
        f"{where}: task.evaluate returned {text[:60]} for {name!r}, "
        "expected a finite (total, count)",
        remedy="(0, 0) where it is undefined; lower train.lr where the model diverged",
    )


def _as_array(outputs: torch.Tensor) -> NDArray[np.float64]:
    array = outputs.detach().cpu().to(torch.float64).numpy()
    return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array


def has_loss(task: Task) -> bool:
    """Whether the task's loss is meaningful: a task with its own `train` and `evaluate` may not use it."""
    return task.train is None or task.evaluate is None


@torch.no_grad()
def training_loss(
    task: Task, module: nn.Module, rows: Rows, *, seed: int, round_: int, site: str
) -> float:
    """Mean loss of a model over training rows, without chance and with the statistics that training uses.

    Everything runs in evaluation mode (training mode would make it depend on chance, as dropout does), but
    normalisation layers: those take each batch's own statistics, as in training. Running statistics fit
    the parameters only after many rounds, or never where buffers keep their initial values, so the loss
    with them does not describe an honestly trained model. The module is left unchanged, in evaluation mode.
    The loss may be NaN or infinite. Raises TaskFailed, and BadInput for BatchNorm with a batch of one row.
    """
    total, count = 0.0, 0
    picked = np.linspace(0, len(rows) - 1, min(len(rows), MOST_ROWS)).astype(np.int64)
    batch_size = getattr(rows, "batch_size", None) or EVALUATION_BATCH
    if lone_row_breaks(module, len(picked), batch_size):
        picked = picked[:-1]
    with (
        _batch_statistics(module),
        seeded(seed, round_, site, "guard"),
        task_code(site, round_, LOOP_CODE),
        batch_norm_needs_two(place(site, round_)),
    ):
        for batch in rows.batches(EVALUATION_BATCH, picked):
            outputs, targets = predict(task, module, batch)
            size = len(targets)
            total += per_row(rows, float(loss_of(task, rows, outputs, targets)), size) * size
            count += size
    return total / count if count else 0.0


@contextmanager
def _batch_statistics(module: nn.Module) -> Iterator[None]:
    """Evaluation mode except for normalisation layers that the module's training mode trains; all buffers
    are restored afterwards."""
    normalising = trained_norms(module)
    kept = [(buffer, buffer.clone()) for layer in normalising for buffer in layer.buffers()]
    for layer in normalising:
        layer.training = True
    try:
        yield
    finally:
        module.eval()
        for buffer, before in kept:
            buffer.copy_(before)
