"""Where a simulation trains and evaluates (`device`): on the CPU, or on a GPU by CUDA or MPS.

Invariant: rows, the flat model, sums and scores are on the CPU; a module and the batches it takes are on the device.
On the CPU nothing is moved.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fedcore.errors import BadInput
from fedcore.learning.data.rows import ArrayRows, Rows

_CPU = torch.device("cpu")


def require_device(name: str) -> torch.device:
    """The device `cpu`, `cuda` or `mps`. Raises BadInput where torch does not find it."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not found.get(name, True):
        raise BadInput(
            f"device: found {name!r}, which torch {torch.__version__} does not find on this machine",
            remedy='device = "cpu", or a build of torch for this GPU and its driver',
        )
    return torch.device(name)


def accelerator_in_use(name: str) -> bool:
    """Whether a process forked from this one could not use its GPU: a run on `name` has looked for one, or the
    task's own code uses one."""
    return name != "cpu" or bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]


def move_loss(loss: object, device: torch.device) -> None:
    """Move the weights of a loss that is a module, such as those of classes."""
    if isinstance(loss, nn.Module):
        loss.to(device)


@contextmanager
def repeatable() -> Iterator[None]:
    """Have CUDA's convolutions in full precision and by algorithms that give the same bits again."""
    with torch.backends.cudnn.flags(
        enabled=torch.backends.cudnn.enabled, benchmark=False, deterministic=True, allow_tf32=False
    ):
        yield


def device_of(module: nn.Module) -> torch.device:
    """Where a module's parameters are."""
    return next((parameter.device for parameter in module.parameters()), _CPU)


def beside(module: nn.Module, batch: Any) -> Any:
    """A batch on the module's device: its tensors, also those in tuples, lists and mappings, and what has a method
    `to` as tensors do."""
    device = device_of(module)
    return batch if device == _CPU else moved(batch, device)


def rows_beside(module: nn.Module, rows: Rows) -> Rows:
    """Rows for a task's own loop: arrays on the module's device. A dataset's batches stay where it makes them."""
    device = device_of(module)
    if device == _CPU or not isinstance(rows, ArrayRows):
        return rows
    return replace(rows, x=rows.x.to(device), y=rows.y.to(device))


def moved(batch: Any, device: torch.device) -> Any:
    """A batch on a device."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(part, device) for part in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(moved(part, device) for part in batch)
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: moved(part, device) for key, part in batch.items()}
    return batch
