"""A finished model on disk, safetensors with the statistics and columns that raw rows need; and an unfinished run.

Invariant: what `load_model` reads of `model_bytes` predicts the same bits. The metadata names the task and
its hash, the statistics and the column order. The file contains no code, so the architecture comes from the task,
which is loaded from the run's own location, never from the current folder.
"""

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from torch.nn.parameter import is_lazy

from fedcore.errors import BadInput, printable
from fedcore.files import CHECKPOINTS, RESULT_FILE, read_json
from fedcore.learning.data.array_files import read_array
from fedcore.learning.data.arrays import array_features, array_inputs, array_layout
from fedcore.learning.data.rows import RowLayout, TableRows
from fedcore.learning.data.statistics import Statistics
from fedcore.learning.data.tabular import Table, number
from fedcore.learning.data.targets import TargetScale
from fedcore.learning.metrics import METRICS
from fedcore.learning.task import Task, load_task, user_code
from fedcore.types import Json

FILE = "model.safetensors"
Module = nn.Module
"""The type of a model, for modules that do not import torch."""

Tensor = torch.Tensor
"""The type of a model's inputs, for them."""


def model_bytes(
    module: nn.Module,
    task: Task,
    statistics: Statistics | None,
    layout: RowLayout | None,
    scale: TargetScale | None = None,
) -> bytes:
    """The file's bytes: the state dict, with the statistics, the columns and the targets' scale as metadata."""
    numbers = None
    if layout and not layout.description:  # an array task with statistics: low, high, indicated
        numbers = [(*pair, gap) for pair, gap in zip(layout.ranges, layout.indicated, strict=True)]
    about: Json = {
        "task": task.origin,
        "task_name": task.name,
        "task_digest": task.digest(),
        "metrics": list(task.metrics),
        "statistics": statistics.to_json() if statistics else None,
        "columns": list(layout.columns) if layout else None,
        "reader": layout.description if layout else "",
        "numbers": numbers,
    }
    if task.given:
        about["task_settings"] = dict(task.given)
    if scale is not None:
        about["target"] = asdict(scale)
    tensors = {
        name: value.detach().cpu().contiguous().clone()
        for name, value in module.state_dict().items()
    }
    data: bytes = save(tensors, {"fedcore": json.dumps(about)})
    return data


@dataclass(frozen=True)
class SavedModel:
    """A model in evaluation mode and how raw rows become its inputs. task: which its architecture comes from."""

    module: nn.Module
    about: Json
    task: Task

    @property
    def warning(self) -> str:
        """What to say where the code of the task is another than the one that the model was trained with."""
        known = self.about.get("task_digest")  # absent in a file of an earlier version
        same = known is None or known == self.task.digest()
        return "" if same else "the code of the task changed since the model was trained"

    @property
    def table(self) -> Table | None:
        """The reader of the task's tables; None for a task of arrays or of a dataset."""
        return Table.from_json(self.about["reader"]) if self.about["reader"] else None

    @property
    def statistics(self) -> Statistics | None:
        """What raw columns are scaled by; None where the model takes rows as they are."""
        found = self.about["statistics"]
        return None if found is None else Statistics.from_json(found)

    @property
    def scale(self) -> TargetScale | None:
        """How the targets of a regression were scaled in training."""
        found = self.about.get("target")  # absent in a file of an earlier version
        return None if found is None else TargetScale(**found)

    @property
    def classifies(self) -> bool:
        """Whether outputs are logits of classes, so that `predict` gives probabilities."""
        named = (METRICS.get(name) for name in self.about["metrics"])
        return any(metric is not None and not metric.of_values for metric in named)

    def predict(self, rows: Any) -> NDArray[np.float64]:
        """Raw rows to probabilities (classification) or outputs; see `fedcore.Run.predict`. Raises BadInput
        for rows that training would have refused too."""
        return self.scores(self.inputs(rows))

    def scores(self, x: torch.Tensor) -> NDArray[np.float64]:
        """What `predict` returns, from the model's inputs. Raises BadInput where the model does not take them."""
        try:
            with torch.no_grad():
                outputs = self.module(x).to(torch.float64).numpy()
        except Exception as error:
            text = (str(error).splitlines() or [""])[0]
            raise BadInput(
                f"predict: found rows of shape {list(x.shape[1:])} and type {str(x.dtype)[6:]}, which the model "
                f"does not take ({type(error).__name__}: {printable(text, 200)})",
                remedy="a row has the form of one row of a batch's x in training",
            ) from error
        if outputs.ndim == 2 and outputs.shape[1] == 1:
            outputs = outputs[:, 0]
        if not self.classifies:
            return np.asarray(outputs if self.scale is None else self.scale.to_unit(outputs))
        if outputs.ndim == 1:
            return np.asarray(1 / (1 + np.exp(-outputs)))
        shifted = np.exp(outputs - outputs.max(axis=1, keepdims=True))
        return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))

    def class_names(self, classes: int) -> tuple[str, ...]:
        """The classes' names: those that the table declares, else 0, 1, 2, ..."""
        declared = self.table.classes if self.table else None
        return declared or tuple(str(index) for index in range(classes))

    def inputs(self, rows: Any) -> torch.Tensor:
        """What `module` takes for these raw rows: (rows, ...), scaled and encoded as in training. Raises BadInput."""
        statistics, table = self.statistics, self.table
        if statistics is None:
            x = array_inputs(_array(rows, keeps_integers=self._embeds), "predict")
        elif table is not None:
            read = rows if isinstance(rows, TableRows) else table.without_target(rows)
            x = read.standardise(statistics).x
        else:
            numbers = self.about["numbers"]
            layout = array_layout([number(low, high, may_be_missing=m) for low, high, m in numbers])
            features = self.raw_array(rows)
            none_fixed = np.zeros((len(features), 0), np.float32)
            x = torch.from_numpy(layout.inputs(features, none_fixed, statistics))
        own = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), x.dtype)
        # A model in double or half precision got its batches cast by the task's own `predict`.
        return x.to(own) if x.is_floating_point() else x

    def raw_array(self, rows: Any) -> NDArray[np.float64]:
        """Raw rows of an array task that declares its columns: (rows, columns), NaN = missing. Raises BadInput."""
        return array_features(_array(rows), len(self.about["numbers"]), "predict")

    @property
    def _embeds(self) -> bool:
        """Whether the model looks integers up, so that an array of them is no table of numbers."""
        return any(isinstance(m, nn.Embedding | nn.EmbeddingBag) for m in self.module.modules())


def _array(rows: Any, *, keeps_integers: bool = False) -> Any:
    """Tensors as they are; files of arrays, lists, frames and whatever else NumPy can read as an array."""
    if isinstance(rows, torch.Tensor):
        return rows
    if isinstance(rows, str | Path):
        rows = read_array(Path(rows).expanduser())
    try:
        found = np.asarray(rows)
    except ValueError as error:
        raise BadInput(
            f"predict: found rows that make no array ({error})",
            remedy="every row needs the same number of values",
        ) from error
    whole = keeps_integers and found.dtype.kind in "iu"
    return torch.from_numpy(found.astype(np.int64)) if whole else found


def load_model(path: Path, task: Task | None) -> SavedModel:
    """Build the task's module and fill it. path: a run's directory, or a model's file. Raises BadInput where the
    task or the file is missing, or one is not the other's.

    A task given by a relative path is loaded from the run's own base folder (job.json), or from the file's folder
    without a job.json: the current folder may have an unrelated file of that name.
    """
    directory, file = (path, path / FILE) if path.is_dir() else (path.parent, path)
    if directory.name == CHECKPOINTS:
        directory = directory.parent
    about, tensors = read_model_file(file)
    if task is None:
        if not about["task"]:
            raise BadInput(
                f"model: task {about['task_name']!r} was made in memory or is not in the file, so its "
                "architecture is not on disk",
                remedy="fedcore.load(RUN, task=your_task); on the command line --task FILE",
            )
        job = directory / "job.json"
        base = read_json(job).get("base") if job.is_file() else None
        task = load_task(about["task"], Path(base) if isinstance(base, str) else directory)
    task = task.with_settings(about.get("task_settings", {}))
    with user_code("task.model"):
        module = task.model()
    try:
        for name, parameter in [*module.named_parameters(), *module.named_buffers()]:
            if is_lazy(parameter):
                parameter.materialize(tensors[name].shape)
        module.load_state_dict(tensors)
    except (KeyError, RuntimeError) as error:
        found = " ".join(str(error).split()).partition(": ")[2]
        raise BadInput(
            f"{file}: the task {task.name!r} makes another model than the one in the file ({printable(found, 200)})",
            remedy="it needs the task that the model was trained with",
        ) from error
    return SavedModel(module.eval(), about, task)


def read_model_file(path: Path, what: str = "run") -> tuple[Json, dict[str, torch.Tensor]]:
    """Metadata and tensors of a model's file. Raises BadInput, of `what` a person asked for."""
    if not path.is_file():
        result = path.parent / RESULT_FILE
        kind = read_json(result).get("kind") if result.is_file() else ""
        remedy = "the run did not finish: `fedcore simulate --resume RUN`"
        if kind == "compare":
            remedy = "a comparison keeps no model: `fedcore simulate` with the same job makes one"
        elif not path.parent.is_dir() or path.name != FILE:
            remedy = "the folder of a run, or the file of a released model"
        raise BadInput(f"{what}: found no {path.name} in {path.parent}", remedy=remedy)
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["fedcore"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, KeyError, ValueError) as error:
        raise BadInput(
            f"{what}: {path}: found no model of Fedcore in it ({type(error).__name__})",
            remedy=f"{FILE} of a run, or the file that `fed-site model` wrote",
        ) from error
    return about, tensors


def checkpoint_bytes(state: Any) -> bytes:
    """The state of an unfinished run as bytes: dicts, lists, tuples and numbers, with arrays or tensors in them."""
    buffer = io.BytesIO()
    torch.save(_to_tensors(state), buffer)
    return buffer.getvalue()


def read_checkpoint(data: bytes) -> Any:
    """The inverse of `checkpoint_bytes`; arrays come back as tensors. Loads weights only, never pickled code."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _to_tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return {key: _to_tensors(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_tensors(part) for part in value)
    return value
