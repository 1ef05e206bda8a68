"""The arrays of a Flower app as a torch module, and back: what the engine trains, quantises and sums.

Floating arrays are parameters and travel; integer and Boolean ones (BatchNorm's counters) are buffers that keep their
initial values, as in every task. Invariant: a record made of the module has the names, shapes, dtypes and order of
the app's initial arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray
from torch import nn

from fedcore.errors import BadInput

AppArrays = Mapping[str, NDArray[Any]]
"""{name: values}, in the app's order."""


class AppModel(nn.Module):
    """The arrays under their names: `state_dict()` is what the app's own model loads."""

    def forward(self, *_: object) -> torch.Tensor:
        """Raises BadInput: how inputs become outputs is known to the app only."""
        raise BadInput(
            "model: found the arrays of a Flower app, whose code computes the outputs, expected a torch module",
            remedy="load model.safetensors (or the arrays of --out) into the app's own model",
        )


def module_of(arrays: AppArrays) -> AppModel:
    """A module with these values. Raises BadInput for a name that a module cannot have."""
    model = AppModel()
    for name, values in arrays.items():
        *path, leaf = name.split(".")
        module: nn.Module = model
        try:
            for part in path:
                if part not in dict(module.named_children()):
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            tensor = torch.from_numpy(np.array(values, order="C"))
            if tensor.is_floating_point():
                module.register_parameter(leaf, nn.Parameter(tensor))
            else:
                module.register_buffer(leaf, tensor)
        except KeyError as error:
            raise BadInput(
                f"Flower app: found an array with the name {name!r}, expected one that a torch module can have",
                remedy="rename it in the app: a model's state_dict() has such names",
            ) from error
    return model


def record_of(module: nn.Module, like: AppArrays) -> ArrayRecord:
    """What the module has now, as the app knows it: with the names, order and dtypes of `like`."""
    now = module.state_dict()
    return ArrayRecord(
        {n: Array(now[n].detach().cpu().numpy().astype(v.dtype)) for n, v in like.items()}
    )


def arrays_in(record: object, where: str) -> dict[str, NDArray[Any]]:
    """The arrays of a record. Raises BadInput for one that is not of finite numbers, and for no array at all."""
    if not isinstance(record, ArrayRecord):
        raise BadInput(
            f"{where}: found {type(record).__name__}, expected an ArrayRecord",
            remedy="ArrayRecord(model.state_dict()), or ArrayRecord(list_of_ndarrays)",
        )
    found: dict[str, NDArray[Any]] = {}
    for name, array in record.items():
        if np.dtype(array.dtype).kind not in "fiub":
            raise BadInput(
                f"{where}: found array {name!r} of dtype {array.dtype}, expected real numbers",
                remedy="send what is no number in a ConfigRecord, or keep it in context.state",
            )
        found[name] = array.numpy()
        if not np.isfinite(found[name]).all():
            raise BadInput(
                f"{where}: found NaN or infinity in array {name!r}, expected finite numbers",
                remedy="a smaller learning rate in the app; look for missing values in its data",
            )
    if not any(values.dtype.kind == "f" for values in found.values()):
        raise BadInput(
            f"{where}: found no array of floating-point numbers, expected at least one",
            remedy="a model has parameters: ArrayRecord(model.state_dict())",
        )
    return found


@torch.no_grad()
def load(module: nn.Module, arrays: AppArrays, like: AppArrays, where: str) -> None:
    """Write what local training sent into the module. Raises BadInput where names or shapes are others."""
    if list(arrays) != list(like):
        missing, new = set(like) - set(arrays), set(arrays) - set(like)
        what = f"without {min(missing)!r}" if missing else "in another order"
        what = f"with {min(new)!r} besides" if new else what
        raise BadInput(
            f"{where}: found arrays {what}, expected those that it got",
            remedy="the reply's ArrayRecord has the same arrays in every round, in one order",
        )
    state = module.state_dict()
    for name, values in arrays.items():
        if values.shape != like[name].shape:
            raise BadInput(
                f"{where}: found {name!r} of shape {values.shape}, expected {like[name].shape} as it got it",
                remedy="training changes values only: a model of one shape in every round and at every site",
            )
        if like[name].dtype.kind == "f":
            if values.dtype.kind != "f":
                raise BadInput(
                    f"{where}: found {name!r} of dtype {values.dtype}, expected {like[name].dtype} as it got it",
                    remedy="a float array stays one: .astype(np.float32) where the app computes in another type",
                )
            state[name].copy_(torch.from_numpy(np.array(values, order="C")))
