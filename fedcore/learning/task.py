"""What a federation learns: a frozen record of ordinary functions, and how a name becomes one.

Invariant: a user's file is loaded under a private module name, so that it and an unrelated `server.py` or
`clients/` in its folder cannot shadow each other.
"""

import hashlib
import importlib
import importlib.util
import inspect
import math
import os
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from fedcore.errors import BadInput, FedcoreError, TaskFailed, UnknownName, require_extra
from fedcore.learning import task_code, task_settings
from fedcore.learning.metrics import METRICS
from fedcore.learning.metrics.counting import CONFUSION
from fedcore.results import is_column

BUILT_IN = {
    "heart": "fedcore.learning.data.heart:task",
    "digits": "fedcore.learning.data.digits:task",
    "fashion": "fedcore.learning.data.fashion:task",
    "thyroid": "fedcore.learning.data.thyroid:task",
    "loans": "fedcore.learning.data.loans:task",
}


class TaskApp(Protocol):
    """What a task that is an app of another framework has beside its functions (`learning/flower_apps`)."""

    @property
    def notes(self) -> Sequence[tuple[str, str]]:
        """(warning, hint) of what the app asks for and does not get here."""
        ...

    @property
    def declared(self) -> str:
        """What the digest covers beside the code and the task's parts."""
        ...

    def with_settings(self, given: Mapping[str, object]) -> "Task":
        """The task with other values of its settings, which it applies itself."""
        ...

    def at_source(self, task: "Task", source: Any) -> "Task":
        """The task, with what only the data of a site tells: the names of its metrics."""
        ...

    def pooled(self, parts: Sequence[Any]) -> Any:
        """The rows of all sites as those of one party. parts: the sites' training rows. Raises BadInput and
        TaskFailed where the app does not give them."""
        ...

    def of_arm(self, arm: str) -> AbstractContextManager[None]:
        """Meanwhile what the app keeps is that of an arm of a run, apart from the arm `federated`."""
        ...

    def save(self, arm: str = "federated") -> bytes:
        """What the app keeps at the sites of this process between rounds; b"" for nothing."""
        ...

    def restore(self, saved: bytes, arm: str = "federated") -> None:
        """The inverse of `save`."""
        ...


@dataclass(frozen=True)
class Task:
    """One learning problem, as functions.

    name: a short word; it names run directories.
    data: `data(source)` returns the rows of ONE site: `(X, y)` arrays or tensors, the rows of
        `fedcore.table(...)`, a map-style torch Dataset, a Hugging Face Dataset, a DataLoader, or a
        `(train, test)` pair of any of these. Without a pair the run's seed and fold split the rows.
    model: `model()` returns a fresh `torch.nn.Module`; lazy modules are allowed.
    loss: `loss(outputs, targets)` returns a scalar tensor: any torch loss.
    metrics: names from `fedcore.learning.metrics.METRICS`, or those that `evaluate` returns; `confusion_matrix`
        beside a metric of classes.
    predict: `predict(model, batch) -> (outputs, targets)`; the default is `x, y = batch`.
    train: `train(model, rows, fit)` replaces the local training loop; it changes `model` in place.
    evaluate: `evaluate(model, rows) -> {metric: (total, count)}` replaces the evaluation loop; one with a further
        parameter `round` gets that of the model, 0 before the first.
    statistics: one public `(low, high)` or `fedcore.number(low, high, ...)` per column of an array
        task that asks for federated imputation and standardisation; tables bring their own.
    sites: default sites of a simulation: `{site id: source}`, or a function of the `[sites]` keys.
    defaults: settings that suit the task, such as `{"lr": 0.1}`; a job's own settings win.
    lower_is_better: which metrics of its own `evaluate` are errors, so that a gap's sign is right.
    settings: parameters that a job may set, with their defaults, such as `{"hidden": 64}`: numbers, texts,
        truth values or lists of them. A function gets those that it names: `def model(hidden)`.
    given: the values that differ from these defaults; `with_settings` fills it.
    target_range: the public `(low, high)` of a regression's target, which the loss then sees scaled: its middle
        as 0 and an eighth of its width as 1. Metrics and predictions stay in the target's unit.
    app: of an app of another framework, which makes the task.
    """

    name: str
    data: Callable[[Any], Any]
    model: Callable[[], Any]
    loss: Callable[[Any, Any], Any]
    metrics: tuple[str, ...] = ("accuracy",)
    predict: Callable[[Any, Any], tuple[Any, Any]] | None = None
    train: Callable[[Any, Any, Any], Any] | None = None
    evaluate: Callable[..., Mapping[str, tuple[float, float]]] | None = None
    statistics: tuple[Any, ...] | None = None
    sites: Mapping[str, Any] | Callable[..., Mapping[str, Any]] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    lower_is_better: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    given: Mapping[str, Any] = field(default_factory=dict)
    target_range: tuple[float, float] | None = None
    app: TaskApp | None = field(default=None, compare=False)
    origin: str = field(default="", compare=False)
    home: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.name or not self.name.replace("-", "").replace("_", "").isalnum():
            raise BadInput(
                f"task.name: found {self.name!r}, expected letters, digits, '-' or '_'",
                remedy="it names the run's directory",
            )
        if isinstance(self.metrics, str):
            raise BadInput(
                f"task.metrics: found the string {self.metrics!r}, expected a tuple of names",
                remedy=f'write metrics=("{self.metrics}",)',
            )
        object.__setattr__(self, "metrics", tuple(self.metrics))
        if taken := next(filter(is_column, self.metrics), None):
            raise BadInput(
                f"task.metrics: found {taken!r}, which every run has beside the metrics, expected another name",
                remedy=f"such as eval_{taken}",
            )
        if self.has_confusion:
            self._check_confusion()
        for part in ("data", "model", "loss"):
            value = getattr(self, part)
            if hasattr(value, "fit") and hasattr(value, "get_params"):
                raise BadInput(
                    f"task.{part}: found the scikit-learn estimator {type(value).__name__}, "
                    "expected a function that returns a torch module",
                    remedy="fedcore.linear(features, classes) is the linear model in torch; "
                    "federated averaging needs parameters and a gradient",
                )
            if (
                part == "model"
                and hasattr(value, "named_parameters")
                and not isinstance(value, type)
            ):
                raise BadInput(
                    f"task.model: found a {type(value).__name__} itself, expected a function that makes one",
                    remedy="write a function that returns a new one at each call: every site and arm starts from it",
                )
            if not callable(value):
                raise BadInput(f"task.{part}: found {type(value).__name__}, expected a function")
        if self.app is None:
            task_settings.check_declared(self.settings)
        if self.settings and self.app is None:
            parts = {part: getattr(self, part) for part in _PARTS}
            for part, bound in task_settings.bind(parts, self.values).items():
                object.__setattr__(self, part, bound)
        if self.target_range is not None:
            self._check_target_range(self.target_range)

    @property
    def values(self) -> dict[str, Any]:
        """Every setting with its value in force."""
        return {**self.settings, **self.given}

    def with_settings(self, given: Mapping[str, object]) -> "Task":
        """This task with other values of its settings; those that are not given have their defaults. Raises
        UnknownName for one that it does not declare, BadInput for a value of another type."""
        found = task_settings.typed(self.name, self.settings, given)
        if found == self.given:
            return self
        return replace(self, given=found) if self.app is None else self.app.with_settings(found)

    def at_source(self, source: Any) -> "Task":
        """This task, complete: an app knows the names of its metrics only once it has evaluated the data of a site."""
        return self if self.app is None or self.metrics else self.app.at_source(self, source)

    @property
    def has_confusion(self) -> bool:
        """Whether it asks for the confusion matrix over all sites."""
        return self.evaluate is None and CONFUSION in self.metrics

    @property
    def scores(self) -> tuple[str, ...]:
        """The metrics that are one number each, the first one first."""
        return tuple(n for n in self.metrics if not (self.has_confusion and n == CONFUSION))

    def _check_confusion(self) -> None:
        known = [METRICS.get(name) for name in self.scores]
        if all(metric is not None and metric.of_values for metric in known):
            raise BadInput(
                f"task.metrics: found {CONFUSION} {'beside ' + ', '.join(self.scores) if known else 'alone'}, "
                "expected a metric of classes beside it",
                remedy=f'write metrics=("accuracy", "{CONFUSION}"); a regression has no classes to count',
            )

    def _check_target_range(self, found: object) -> None:
        try:
            low, high = (float(value) for value in found)  # type: ignore[attr-defined]
        except (TypeError, ValueError):
            low = high = math.nan
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise BadInput(
                f"task.target_range: found {found!r}, expected (low, high) with finite low < high",
                remedy="a public range that every site can know without looking at its rows",
            )
        object.__setattr__(self, "target_range", (low, high))
        if not self.is_regression:
            raise BadInput(
                f"task.target_range: found it beside the metrics {', '.join(self.metrics)}"
                f"{' and loops of its own' if self.train or self.evaluate else ''}, expected a regression that "
                "fedcore trains and scores",
                remedy="metrics such as mae, rmse or r2, without `train` and `evaluate`, which scale for themselves",
            )

    @property
    def is_regression(self) -> bool:
        """Whether Fedcore's own loops train and score it, by metrics of values alone."""
        known = [METRICS.get(name) for name in self.metrics]
        ours = self.train is None and self.evaluate is None
        return ours and all(metric is not None and metric.of_values for metric in known)

    def digest(self) -> str:
        """SHA-256 over the task's name, its metrics and its code: 64 hex digits.

        The code of a task from a file is the whole file, that of a task from a package all `.py` files of the
        package; every module they import that is neither installed in site-packages nor part of Python or
        Fedcore counts with its package in the same way. `covers` names them. That of an app is its package and its
        declared settings. A task without a file (from a
        notebook) has the source of its functions, and nothing that they call. Data files are not covered.
        """
        metrics = self.metrics if self.app is None else self.app.declared
        text = [f"fedcore task 2 {self.name} {metrics!r} {self.statistics!r}"]
        if self.target_range is not None:
            text.append(f"target_range={self.target_range!r}")
        hashes = (
            (name, hashlib.sha256(path.read_bytes()).hexdigest()) for name, path in self._code()
        )
        text += sorted(f"{name}={of_file}" for name, of_file in hashes)
        for part in _PARTS if self.app is None else ():  # two tasks of one file differ in them
            function = task_settings.own(getattr(self, part))
            text.append(f"{part}={'' if function is None else _source_of(function)}")
        return hashlib.sha256("\x00".join(text).encode()).hexdigest()

    def covers(self) -> str:
        """What `digest` covers, in words: `task.py`, `task.py and mylib (3 files)`."""
        names = sorted(name for name, _ in self._code())
        tops = Counter(name.partition("/")[0] for name in names)
        alone = {name.partition("/")[0]: name for name in names}
        said = [f"{top} ({n} files)" if n > 1 else alone[top] for top, n in tops.items()]
        return " and ".join(said) or "the source of its functions, without what they call"

    def _code(self) -> list[tuple[str, Path]]:
        """The files of the task, by a name that is the same on every machine."""
        functions = (task_settings.own(getattr(self, part)) for part in _PARTS)
        modules = {each.__module__ for each in functions if inspect.isfunction(each)}
        return task_code.files_of(self.home, filter(self._is_of, modules))

    def _is_of(self, module: str) -> bool:
        """Whether a module is the user's; one of Fedcore only where this very task stands in it."""
        found = vars(sys.modules[module]) if module in sys.modules else {}
        return not module.startswith("fedcore.") or any(each is self for each in found.values())


_PARTS = tuple(task_settings.ARGUMENTS)


def _source_of(function: Any) -> str:
    if is_dataclass(function) and not isinstance(function, type):
        return repr(function)
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        kind = function if hasattr(function, "__qualname__") else type(function)
        return f"{kind.__module__}.{kind.__qualname__}"


def load_task(spec: str, base: Path | None = None) -> Task:
    """Turn `heart`, `path/to/file.py[:attribute]`, `package.module:attribute` or `flower:path/to/app` into a `Task`.

    A relative path counts from `base` (the folder of the job file) or the current folder. Without an
    attribute a file must define `task`. Raises UnknownName, BadInput, or TaskFailed when the user's
    own code raises while it is imported.
    """
    if spec.startswith(task_code.FLOWER):
        return _flower_task(spec, base or Path.cwd())
    target = BUILT_IN.get(spec, spec)
    place, _, attribute = target.partition(":")
    if place.endswith(".py"):
        module = _module_from_file((base or Path.cwd()) / Path(place).expanduser())
    elif ":" in target:
        module = _module_from_package(place)
    else:
        raise UnknownName("task", spec, BUILT_IN)
    name = attribute or "task"
    if not hasattr(module, name):
        raise BadInput(
            f"task {spec!r}: found no attribute {name!r} in {place}",
            remedy=f"define `{name} = fedcore.Task(...)`, or name another one: {place}:ATTRIBUTE",
        )
    found = getattr(module, name)
    if not isinstance(found, Task):
        raise BadInput(
            f"task {spec!r}: found {type(found).__name__} in attribute {name!r}, expected fedcore.Task",
            remedy=f"write `{name} = fedcore.Task(...)`",
        )
    object.__setattr__(found, "origin", spec)
    object.__setattr__(found, "home", module.__name__)
    return found


def _flower_task(spec: str, base: Path) -> Task:
    require_extra("--flower-app", "flower", "flwr")
    found = importlib.import_module("fedcore.learning.flower_apps.flower_task")
    task: Task = found.app_task(base / Path(spec.removeprefix(task_code.FLOWER)).expanduser(), spec)
    return task


def _module_from_file(path: Path) -> Any:
    path = path.resolve()
    if not path.is_file():
        raise BadInput(
            f"task file: found no file {path}", remedy="`fedcore new DIR` writes one to start from"
        )
    name = task_code.FROM_A_FILE + hashlib.sha256(str(path).encode()).hexdigest()[:16]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Registered so that the file's own classes can be pickled by data-loading workers.
    sys.modules[name] = module
    try:
        with _seeded_import():
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        if isinstance(error, FedcoreError):
            # An error of our own for what the file builds; only the file's name is added.
            raise BadInput(f"{path.name}: {error}", remedy=error.remedy) from error
        remedy = _NO_SCRIPT if isinstance(error, SystemExit) else ""
        if isinstance(error, ModuleNotFoundError) and _is_beside(error.name, path.parent):
            remedy = "the task's folder is not searched for modules; make a package and install it"
        raise TaskFailed(
            f"task file {path.name}: {type(error).__name__} while it was loaded",
            user_traceback=user_traceback(error),
            remedy=remedy,
        ) from error
    return module


def _seeded_import() -> AbstractContextManager[None]:
    """What a module draws while it is imported is the same in every process."""
    from fedcore.learning.model import seeded  # torch, which a task imports anyway

    return seeded(0, 0, "", "import")


def _is_beside(module: str | None, folder: Path) -> bool:
    top = (module or "").partition(".")[0]
    return bool(top) and ((folder / f"{top}.py").is_file() or (folder / top).is_dir())


def _module_from_package(place: str) -> Any:
    try:
        with nullcontext() if place.startswith("fedcore.") else _seeded_import():
            return importlib.import_module(place)
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__} while it was imported"
        if isinstance(error, ModuleNotFoundError):
            what = str(error)
            if error.name and (place == error.name or place.startswith(error.name + ".")):
                raise BadInput(
                    f"task package: found no module {place!r}",
                    remedy="install the package into this environment",
                ) from error
        raise TaskFailed(
            f"task package {place}: {what}",
            user_traceback=user_traceback(error),
            remedy=_NO_SCRIPT if isinstance(error, SystemExit) else "",
        ) from error


_NO_SCRIPT = 'put what it does as a script below `if __name__ == "__main__":`'


@contextmanager
def user_code(what: str, *, remedy: str = "") -> Iterator[None]:
    """Raise TaskFailed, with the user's traceback, for an exception of the user's code inside, and for its
    `sys.exit`, which would end the program with a code of its own."""
    try:
        yield
    except FedcoreError:
        raise
    except SystemExit as error:
        raise TaskFailed(
            f"{what} called sys.exit({'' if error.code is None else repr(error.code)})",
            user_traceback=user_traceback(error),
            remedy=remedy or "raise an error where the task cannot go on",
        ) from error
    except Exception as error:
        text = str(error).strip().split("\n")[0]
        brief = type(error).__name__ + (f": {text[:200]}" if text else "")
        raise TaskFailed(
            f"{what} raised {brief}", user_traceback=user_traceback(error), remedy=remedy
        ) from error


def user_traceback(error: BaseException) -> str:
    """The traceback of `error` from the user's first frame on: our own frames come out of it. Where no frame
    is the user's, the libraries' frames stay and ours go."""
    ours = str(Path(__file__).resolve().parent) + os.sep
    frames = traceback.extract_tb(error.__traceback__)
    # importlib's own frames are called <frozen ...>, but for its first; <stdin> and <string> are the user's.
    libraries = (ours, "<frozen ", importlib.__file__)
    foreign = [not frame.filename.startswith(libraries) for frame in frames]
    users = [
        theirs and "site-packages" not in frame.filename
        for theirs, frame in zip(foreign, frames, strict=True)
    ]
    start = next((i for i, theirs in enumerate(users) if theirs), None)
    if start is None:
        start = next((i for i, theirs in enumerate(foreign) if theirs), len(frames))
    shown = frames[start:]
    lines = ["Traceback (most recent call last):\n", *traceback.format_list(shown)] if shown else []
    return "".join(lines + traceback.format_exception_only(type(error), error))
