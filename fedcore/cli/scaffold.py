"""`fedcore new DIR`: writes a task, a job and three small tables that run unchanged.

Invariant: the directory is written atomically, and no file is overwritten without `force`. The tables are
computed by the formula in README.md, so every run of them is the same.
"""

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fedcore.errors import AlreadyExists, BadInput
from fedcore.files import write_atomic

TASK = '''"""What is learned: rows in, a model, a loss. Run it with `fedcore simulate job.toml`."""

import torch

import fedcore

# Every column the model may see, declared once for all sites. The inputs follow from this text and
# never from the rows, so a site that has no smokers gets the same model as one that has many.
# CHANGE: the columns of your own tables, each with a range that anybody may know.
read = fedcore.table(
    target="ill",  # holds 0 or 1; for names of classes: classes=("healthy", "ill")
    columns={
        "age": fedcore.number(0, 120),
        "pressure": fedcore.number(50, 250, may_be_missing=True),
        "smoker": fedcore.category("never", "former", "current"),
    },
)


def data(source):
    """The rows of ONE site. `source` is what stands behind its name under [sites] in job.toml."""
    return read(source)  # a .csv or .parquet path, or a pandas DataFrame


def model():
    """Any torch module. CHANGE: add layers, or use fedcore.linear(features, classes)."""
    return torch.nn.Sequential(
        torch.nn.Linear(len(read.columns), 8), torch.nn.ReLU(), torch.nn.Linear(8, 1)
    )


def loss(outputs, targets):
    """Any torch loss. One output per row is the logit of class 1."""
    return torch.nn.functional.binary_cross_entropy_with_logits(
        outputs.squeeze(1), targets.float()
    )


task = fedcore.Task(
    name="my-task",  # CHANGE: it names the directories under runs/
    data=data,
    model=model,
    loss=loss,
    metrics=("accuracy", "auc"),
)
'''

_TEXTS = Path(__file__).with_name("new_project")
"""The folder of job.toml and README.md as they are written."""

SITES = {"north": 45, "south": 55, "coast": 65}
"""{site: its middle age}: the sites differ, as real ones do."""

ROWS = 120


def create(directory: Path, force: bool = False) -> list[Path]:
    """Write task.py, job.toml, README.md and data/*.csv; returns their paths.

    Raises AlreadyExists for a directory with files in it, unless `force`, which overwrites files of the
    same names and keeps all others.
    """
    directory = Path(directory).expanduser()
    if directory.exists() and not directory.is_dir():
        raise AlreadyExists(f"new: found the file {directory}, expected no such path")
    held = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    if held and not force:
        raise AlreadyExists(
            f"new: found {directory} holding {', '.join(held[:3])}"
            + (", ..." if len(held) > 3 else "")
            + ", expected an empty or a new directory",
            remedy="choose another name, or add --force to overwrite files of the same names",
        )
    contents = {name: (_TEXTS / name).read_text("utf-8") for name in ("job.toml", "README.md")}
    contents["task.py"] = TASK
    for seed, (name, age) in enumerate(SITES.items(), start=1):
        contents[f"data/{name}.csv"] = table_text(seed, age)
    try:
        if held:
            _write(directory, contents)
        else:
            _create_whole(directory, contents)
    except OSError as error:
        raise BadInput(
            f"new: cannot write {directory}: {error.strerror}", remedy="choose another place"
        ) from error
    return [directory / name for name in contents]


def _create_whole(directory: Path, contents: dict[str, str]) -> None:
    """Fill a temporary directory and rename it, so that an interruption leaves nothing."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        _write(beside, contents)
        beside.chmod(0o755)  # mkdtemp makes it private, which mkdir would not
        os.replace(beside, directory)  # noqa: PTH105 - works onto an empty directory too
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write(directory: Path, contents: dict[str, str]) -> None:
    for name, text in contents.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(directory / name, text.encode())


def table_text(seed: int, middle_age: float) -> str:
    """One site's table by the formula in README.md, as CSV text."""
    u = _uniform(seed)
    lines = ["age,pressure,smoker,ill"]
    for _ in range(ROWS):
        age = round(middle_age + 40 * (next(u) - 0.5) + 20 * (next(u) - 0.5))
        pressure = round(100 + age / 2 + 40 * (next(u) - 0.5))
        measured = next(u) >= 0.1
        habit = next(u)
        smoker = "never" if habit < 0.5 else "former" if habit < 0.8 else "current"
        z = (age - 55) / 8 + (pressure - 128) / 12 + (2 if smoker == "current" else 0)
        ill = int(next(u) < 1 / (1 + math.exp(-z)))
        lines.append(f"{age},{pressure if measured else ''},{smoker},{ill}")
    return "\n".join(lines) + "\n"


def _uniform(state: int) -> Iterator[float]:
    """The generator of ISO C's example `rand`: short enough to write down in a README."""
    while True:
        state = (1103515245 * state + 12345) % 2**31
        yield state / 2**31
