"""A configuration file in TOML as a frozen, validated model; paths in it count from its folder.

Invariant: an error names the file, the key with its path, what was found and what was expected, and for
an unknown key the nearest one. A value that may be a secret has no place in such a file: keys are files.
"""

import re
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from fedcore.errors import BadInput, UnknownName


class Section(BaseModel):
    """A table of a file. Unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    refused: ClassVar[Mapping[str, str]] = {}
    """Keys that one might expect, each with the hint why there is none."""
    missing: ClassVar[str] = "`fedcore up` writes one to start from"
    """The hint where there is no such file."""


_PASSWORD = re.compile(r"(//[^:/@\s]*:).*@")
"""Of a URL: it is not shown."""

_LENGTH = re.compile(r"^\w+ should have (at \w+ \d+ items?) after validation.*")
"""Pydantic's words on the length of a list."""

S = TypeVar("S", bound=Section)


def read_toml(model: type[S], path: Path, *, paths: Collection[str], **more: Any) -> S:
    """A file as `model`. paths: keys whose values are paths; more: values that the file does not hold.

    Raises BadInput and UnknownName.
    """
    try:
        tables = read_tables(path)
    except BadInput as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise BadInput(f"{path}: found no such file", remedy=model.missing) from error
    here = path.resolve().parent
    for key in paths:
        if isinstance(tables.get(key), str):
            tables[key] = str(here / tables[key])
    for key in more:
        if key in tables:
            raise UnknownName(f"{path.name}: key", key, set(model.model_fields) - set(more))
    try:
        return model.model_validate({**tables, **more})
    except ValidationError as error:
        raise _refused(model, path, error) from error


def read_tables(path: Path) -> dict[str, Any]:
    """The tables of a TOML file. Raises BadInput if it cannot be read, or not as TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: it cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: it cannot be read as TOML ({error})") from error


def _refused(model: type[Section], path: Path, error: ValidationError) -> BadInput:
    found = error.errors()  # a mistyped key says more than the one that is missing for it
    first = next((each for each in found if each["type"] == "extra_forbidden"), found[0])
    place = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        beside = ".".join(map(str, first["loc"][:-1]))
        known = [f"{beside}.{name}".lstrip(".") for name in _fields(model, first["loc"][:-1])]
        return UnknownName(f"{path.name}: key", place, known, remedy=_elsewhere(model, place))
    if first["type"] == "missing":
        return BadInput(f"{path.name}: {place}: found nothing, expected a value")
    line = _line(path, place)
    remedy = f"line {line} of {path}" if line else ""
    return BadInput(f"{path.name}: {place}: {found_and_expected(first)}", remedy=remedy)


def _line(path: Path, place: str) -> int:
    """The number of the line with a key, or the key above it that stands in the file; 0 where none is found."""
    table, found, depth = "", 0, 0
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if header := re.match(r"\s*\[([^\[\]]+)\]", text):
            table = f"{header[1].strip()}."
        elif key := re.match(r"\s*([A-Za-z0-9_.-]+)\s*=", text):
            name = table + key[1]
            if f"{place}.".startswith(f"{name}.") and len(name) > depth:
                found, depth = number, len(name)
    return found


def found_and_expected(error: ErrorDetails) -> str:
    """What pydantic found at one place, and what it expected there."""
    words = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    words = words.removeprefix("a valid ").partition(", unable")[0]
    words = _LENGTH.sub(r"\1", words)
    found = _PASSWORD.sub(r"\1***@", repr(error["input"]))
    return f"found {found}, expected {words[:1].lower()}{words[1:]}"


def _elsewhere(model: type[Section], place: str) -> str:
    """A hint for a key of the top level that is refused or belongs in one of the model's tables, or ""."""
    if place in model.refused:
        return model.refused[place]
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section) and place in kind.model_fields:
            return f"write `{place}` under [{name}]"
    return ""


def _fields(model: Any, place: tuple[int | str, ...]) -> list[str]:
    """The keys of the table at a place: of the section itself, or of a mapping's values."""
    for step in place:
        fields = getattr(model, "model_fields", {})
        if step in fields:
            model = fields[step].annotation
        elif get_args(model):
            model = get_args(model)[-1]
    return list(getattr(model, "model_fields", {}))
