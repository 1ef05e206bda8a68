"""A finished model on disk, safetensors with the statistics and columns that raw rows need; and an unfinished run.

Invariant: what `load_model` reads of `model_bytes` predicts the same bits. The metadata names the task, the
statistics and the column order. The file contains no code, so the architecture comes from the task, which is
loaded from the run's own location, never from the current folder.
"""

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from torch.nn.parameter import is_lazy

from fedcore.errors import BadInput
from fedcore.files import read_json
from fedcore.learning.data.rows import RowLayout, array_features, array_inputs, array_layout
from fedcore.learning.data.statistics import Statistics
from fedcore.learning.data.tabular import Table, number
from fedcore.learning.task import Task, load_task
from fedcore.types import Json

FILE = "model.safetensors"
Module = nn.Module
"""The type of a model, for modules that do not import torch."""

_CLASSIFICATION = {"accuracy", "auc", "balanced_accuracy"}


def model_bytes(
    module: nn.Module, task: Task, statistics: Statistics | None, layout: RowLayout | None
) -> bytes:
    """The file's bytes: the state dict, with the statistics and columns as metadata."""
    numbers = None
    if layout and not layout.description:  # an array task with statistics: low, high, indicated
        numbers = [(*pair, gap) for pair, gap in zip(layout.ranges, layout.indicated, strict=True)]
    about: Json = {
        "task": task.origin,
        "task_name": task.name,
        "metrics": list(task.metrics),
        "statistics": statistics.to_json() if statistics else None,
        "columns": list(layout.columns) if layout else None,
        "reader": layout.description if layout else "",
        "numbers": numbers,
    }
    tensors = {
        name: value.detach().contiguous().clone() for name, value in module.state_dict().items()
    }
    data: bytes = save(tensors, {"fedcore": json.dumps(about)})
    return data


@dataclass(frozen=True)
class SavedModel:
    """A model in evaluation mode and how raw rows become its inputs."""

    module: nn.Module
    about: Json

    def predict(self, rows: Any) -> NDArray[np.float64]:
        """Raw rows to probabilities (classification) or outputs; see `fedcore.Run.predict`. Raises BadInput
        for rows that training would have refused too."""
        x = self._inputs(rows)
        own = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), x.dtype)
        if x.is_floating_point():
            # A model in double or half precision got its batches cast by the task's own `predict`.
            x = x.to(own)
        with torch.no_grad():
            outputs = self.module(x).to(torch.float64).numpy()
        if outputs.ndim == 2 and outputs.shape[1] == 1:
            outputs = outputs[:, 0]
        if not _CLASSIFICATION & set(self.about["metrics"]):
            return np.asarray(outputs)
        if outputs.ndim == 1:
            return np.asarray(1 / (1 + np.exp(-outputs)))
        shifted = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))

    def _inputs(self, rows: Any) -> torch.Tensor:
        found = self.about["statistics"]
        if found is None:
            return array_inputs(_array(rows), "predict")
        statistics = Statistics.from_json(found)
        if self.about["reader"]:
            table = Table.from_json(self.about["reader"])
            return torch.from_numpy(table.inputs(rows, statistics))
        numbers = self.about["numbers"]
        layout = array_layout([number(low, high, may_be_missing=m) for low, high, m in numbers])
        features = array_features(_array(rows), len(numbers), "predict")
        none_fixed = np.zeros((len(features), 0), np.float32)
        return torch.from_numpy(layout.inputs(features, none_fixed, statistics))


def _array(rows: Any) -> Any:
    """Tensors as they are; lists, frames and whatever else NumPy can read as an array."""
    if isinstance(rows, torch.Tensor):
        return rows
    try:
        return np.asarray(rows)
    except ValueError as error:
        raise BadInput(
            f"predict: found rows that make no array ({error})",
            remedy="every row needs the same number of values",
        ) from error


def load_model(directory: Path, task: Task | None) -> SavedModel:
    """Build the task's module and fill it. Raises BadInput where the task or the file is missing.

    A task given by a relative path is loaded from the run's own base folder (job.json), or from `directory`
    without a job.json: the current folder may have an unrelated file of that name.
    """
    path = directory / FILE
    if not path.is_file():
        raise BadInput(f"run: found no {FILE} in {directory}", remedy="the run did not finish")
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["fedcore"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    if task is None:
        if not about["task"]:
            raise BadInput(
                f"model: task {about['task_name']!r} was made in memory, so its architecture is not on disk",
                remedy="fedcore.load(RUN, task=your_task)",
            )
        job = directory / "job.json"
        base = read_json(job).get("base") if job.is_file() else None
        task = load_task(about["task"], Path(base) if isinstance(base, str) else directory)
    module = task.model()
    for name, parameter in [*module.named_parameters(), *module.named_buffers()]:
        if is_lazy(parameter):
            parameter.materialize(tensors[name].shape)
    module.load_state_dict(tensors)
    return SavedModel(module.eval(), about)


def checkpoint_bytes(state: Any) -> bytes:
    """The state of an unfinished run as bytes: dicts, lists, tuples and numbers, with arrays or tensors in them."""
    buffer = io.BytesIO()
    torch.save(_to_tensors(state), buffer)
    return buffer.getvalue()


def read_checkpoint(data: bytes) -> Any:
    """The inverse of `checkpoint_bytes`; arrays come back as tensors. Loads weights only, never pickled code."""
    return torch.load(io.BytesIO(data), weights_only=True)


def _to_tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return {key: _to_tensors(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_tensors(part) for part in value)
    return value
