"""Settings that a task declares and a job may change: `Task(settings={"hidden": 64})`.

A function of the task gets those that it names as parameters, beside its own: `def model(hidden)`,
`def train(model, rows, fit, hidden)`. The default fixes the type.

Invariant: a function never sees a setting that is not declared, nor a value of another type than its default.
"""

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

from fedcore.errors import BadInput, UnknownName

ARGUMENTS = {"data": 1, "model": 0, "loss": 2, "predict": 2, "train": 3, "evaluate": 2}
"""{function of a task: how many arguments it is called with}; settings come behind them."""

_KINDS: tuple[tuple[type, str], ...] = (
    (bool, "true or false"),
    (int, "a whole number"),
    (float, "a number"),
    (str, "a text"),
)


class WithSettings(functools.partial[Any]):
    """A function of a task with the values of the settings that it takes; `func` is the user's own."""


def own(function: Any) -> Any:
    """The function as the user wrote it."""
    return function.func if isinstance(function, WithSettings) else function


def bind(parts: Mapping[str, Any], values: Mapping[str, object]) -> dict[str, Any]:
    """{part: its function with the settings that it takes}. Raises BadInput for one that no function takes."""
    taken: dict[str, list[str]] = {}
    for part, function in parts.items():
        if function is not None:
            taken[part] = [
                name for name in _parameters(own(function), ARGUMENTS[part]) if name in values
            ]
    used = {name for names in taken.values() for name in names}
    if unused := [name for name in values if name not in used]:
        raise BadInput(
            f"task.settings: found {unused[0]!r}, which no function of the task takes",
            remedy=f"a function gets it as a parameter: def model({unused[0]}): ...",
        )
    return {
        part: WithSettings(own(parts[part]), **{name: values[name] for name in names})
        for part, names in taken.items()
        if names
    }


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of this name, which is no setting that it already has."""
    return name in _parameters(own(function), 0) and name not in getattr(function, "keywords", {})


def _parameters(function: Callable[..., Any], called_with: int) -> list[str]:
    """Names that may be given by keyword, beside the arguments that the function is called with."""
    try:
        found = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # made in C
        return []
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    first = [each.name for each in found if each.kind in by_place][:called_with]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return [each.name for each in found if each.kind in named and each.name not in first]


def check_declared(declared: Mapping[str, object]) -> None:
    """Raises BadInput for a name that is no parameter, or a default that no job file can hold."""
    if not isinstance(declared, Mapping):
        raise BadInput(
            f"task.settings: found {type(declared).__name__}, expected names with their defaults",
            remedy='write settings={"hidden": 64}',
        )
    for name, default in declared.items():
        if not name.isidentifier():
            raise BadInput(f"task.settings: found the name {name!r}, expected that of a parameter")
        values = default if isinstance(default, list | tuple) else (default,)
        if not all(isinstance(value, bool | int | float | str) for value in values):
            raise BadInput(
                f"task.settings: found {default!r} as the default of {name!r}, expected a number, a text, "
                "true or false, or a list of them"
            )


def typed(
    task: str, declared: Mapping[str, object], given: Mapping[str, object]
) -> dict[str, object]:
    """The given values that are not the defaults, as the types of these. Raises UnknownName and BadInput."""
    found: dict[str, object] = {}
    for name, value in given.items():
        if not declared:
            raise BadInput(
                f"task.{name}: task {task!r} declares no settings",
                remedy=f'Task(settings={{"{name}": default}}) declares it',
            )
        if name not in declared:
            raise UnknownName("key", f"task.{name}", [f"task.{known}" for known in declared])
        default = declared[name]
        if isinstance(default, list | tuple):
            if not isinstance(value, list | tuple):
                raise _wrong(name, value, "a list", default)
            first = next(iter(default), None)
            checked: object = tuple(_one(name, each, first, default) for each in value)
            same = checked == tuple(default)
        else:
            checked = _one(name, value, default, default)
            same = checked == default
        if not same:
            found[name] = checked
    return found


def _one(name: str, value: object, like: object, default: object) -> object:
    if like is None:  # an empty list says nothing of what is in it
        return value
    kind, words = next((kind, words) for kind, words in _KINDS if isinstance(like, kind))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    exact = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not exact or (isinstance(value, float) and not math.isfinite(value)):
        raise _wrong(name, value, words, default)
    return value


def _wrong(name: str, value: object, words: str, default: object) -> BadInput:
    return BadInput(
        f"task.{name}: found {value!r}, expected {words}, as its default {default!r}",
        remedy=f"`--set task.{name}=...`, or [task_settings] in the job file",
    )
