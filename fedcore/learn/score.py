"""Scoring a model on rows: per-row outputs for the built-in metrics, sums for a task's own.

Only sums ever leave a site; per-row outputs exist where the simulation stands in for all sites.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedcore.data.rows import Rows
from fedcore.errors import BadInput
from fedcore.learn.flat import seeded
from fedcore.learn.train import predict, task_code
from fedcore.task import Task

EVALUATION_BATCH = 1024


@dataclass(frozen=True)
class Scored:
    """outputs (n,) or (n, C) float64, targets (n,) float64 or int64; loss: mean over the rows.

    own: the task's own `{metric: (total, count)}` where it brings `evaluate`; outputs are then empty.
    """

    outputs: NDArray[np.float64]
    targets: NDArray[Any]
    loss: float | None
    own: dict[str, tuple[float, float]] | None = None


@torch.no_grad()
def score(
    task: Task, module: nn.Module, rows: Rows, *, seed: int, round_: int, site: str
) -> Scored:
    """Run `module` over `rows` in evaluation mode. Raises TaskFailed, or BadInput on odd shapes."""
    module.eval()
    with seeded(seed, round_, site, "evaluate"), task_code(site, round_, "evaluate"):
        if task.evaluate is not None:
            own = {k: (float(t), float(c)) for k, (t, c) in task.evaluate(module, rows).items()}
            return Scored(np.empty(0), np.empty(0), None, own)
        outputs, targets, losses = [], [], []
        for batch in rows.batches(EVALUATION_BATCH, None):
            out, target = predict(task, module, batch)
            losses.append((float(task.loss(out, target)), len(target)))
            outputs.append(_as_array(out))
            targets.append(np.asarray(target.detach().cpu().numpy()).reshape(len(target), -1))
    stacked = np.concatenate(outputs)
    flat_targets = np.concatenate(targets)
    if stacked.ndim > 2 or flat_targets.shape[1] != 1:
        raise BadInput(
            f"task.metrics: found outputs of shape {stacked.shape}, expected one row per example",
            remedy="give the task its own evaluate(model, rows) -> {metric: (total, count)}",
        )
    count = sum(n for _, n in losses)
    mean_loss = sum(value * n for value, n in losses) / count if count else None
    return Scored(stacked, flat_targets[:, 0], mean_loss)


def _as_array(outputs: torch.Tensor) -> NDArray[np.float64]:
    array = outputs.detach().cpu().to(torch.float64).numpy()
    return array[:, 0] if array.ndim == 2 and array.shape[1] == 1 else array
