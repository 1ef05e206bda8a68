"""A job that begins with a released model (`initial`) in place of the seed's.

Invariant: every tensor of the file goes into the tensor of the model that has its name and its shape, and none of
the model is left out, so the job begins with the file's model and no other.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from fedcore.errors import BadInput
from fedcore.learning.data.rows import RowLayout
from fedcore.learning.data.statistics import Statistics
from fedcore.learning.data.targets import TargetScale
from fedcore.learning.saved import FILE, read_model_file
from fedcore.types import Json


def start_from(path: Path, module: nn.Module, layout: RowLayout | None) -> None:
    """Fill a module from a model's file, or from the folder of a run.

    layout: of the rows that the module takes, None for rows without columns. Raises BadInput, by the name of the
    tensor, where the file is of another model, and for other columns.
    """
    about, tensors = read_model_file(_file(path), what="initial")
    columns, own = about.get("columns"), list(layout.columns) if layout else None
    if columns != own:
        raise BadInput(
            f"initial: {path} was trained on {_columns(columns, own)}, "
            f"expected {_columns(own, columns)}",
            remedy="a model of the same task with the same columns",
        )
    state: dict[str, Tensor] = module.state_dict()
    _refuse(path, (n for n in state if n not in tensors), lambda n: f"no tensor {n}, expected one")
    _refuse(path, (n for n in tensors if n not in state), lambda n: f"a tensor {n}, expected none")

    def shapes(name: str) -> str:
        return f"{_shape(tensors[name])} in {name}, expected {_shape(state[name])}"

    _refuse(path, (n for n in state if tensors[n].shape != state[n].shape), shapes)
    numbers = [n for n in tensors if tensors[n].is_floating_point()]
    broken = (n for n in numbers if not torch.isfinite(tensors[n]).all())
    _refuse(path, broken, lambda n: f"NaN or infinity in {n}, expected finite numbers")
    module.load_state_dict(tensors)


def scale_note(path: Path, statistics: Statistics | None, targets: TargetScale | None) -> str:
    """A warning where the model was trained on numbers or targets in another scale than these, else ""."""
    about = read_model_file(_file(path), what="initial")[0]
    found: Json | None = about.get("statistics")
    now = statistics.to_json() if statistics else None
    same = found is None or now is None or all(found[n] == now[n] for n in ("mean", "std"))
    if same and about.get("target") == (asdict(targets) if targets else None):
        return ""
    what = "targets" if same else "numbers"
    return (
        f"The initial model was trained on {what} in another scale (other ranges or statistics), so the first "
        "rounds may be worse than it was."
    )


def _file(path: Path) -> Path:
    return path / FILE if path.is_dir() else path


def _refuse(path: Path, names: Iterable[str], found: Callable[[str], str]) -> None:
    wrong = list(names)
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise BadInput(
            f"initial: {path}: found {found(wrong[0])}{more}",
            remedy="a model of the same task; task.model may load parts of another one itself",
        )


def _shape(tensor: Tensor) -> str:
    return f"({', '.join(map(str, tensor.shape))})"


def _columns(these: Sequence[str] | None, others: Sequence[str] | None) -> str:
    """The columns in words: the first that the others do not have, or how many there are."""
    if these is None:
        return "rows without columns"
    own = [name for name in these if name not in (others or ())]
    return f"{len(these)} columns" + (f" with {own[0]!r}" if own else " in another order")
