"""The base of the records that are written as JSON: results, the rows of deployed jobs, a guard's memory.

Invariant: `from_json(to_json())` is the same record.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import Field, fields
from functools import cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, ClassVar, get_args, get_origin, get_type_hints

if TYPE_CHECKING:  # it imports numpy, which the terminal does without
    from typing import Self

    from fedcore.types import Json


class JsonRecord(Mapping[str, Any]):
    """Base of the records: a frozen dataclass that can be read by the keys of its JSON form as well.

    _beside: fields whose entries lie beside the other keys in JSON, not under a key of their own.
    _left_out: fields that JSON has no key for while they are None.
    """

    _beside: ClassVar[tuple[str, ...]] = ()
    _left_out: ClassVar[tuple[str, ...]] = ()

    def to_json(self) -> Json:
        """Plain dictionaries, lists, text and numbers, in the order of the fields."""
        return {key: _plain(value) for key, value in self._entries()}

    def _entries(self) -> Iterator[tuple[str, Any]]:
        """Each key of the JSON form with the field's own value; of a key that comes twice the later counts."""
        for name, (key, _) in _keys(type(self)).items():
            value = getattr(self, name)
            if name in self._beside:
                record = isinstance(value, JsonRecord)
                yield from JsonRecord._entries(value) if record else value.items()
            elif value is not None or name not in self._left_out:
                yield key, value

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """The inverse of `to_json`; a key that is missing becomes the field's default.

        Raises TypeError for JSON of another shape, or without a key that has no default.
        """
        beside = {name: kind for name, (_, kind) in _keys(cls).items() if name in cls._beside}
        own = {name: place for name, place in _keys(cls).items() if name not in beside}
        keys = {key for key, _ in own.values()}
        others = {k: v for k, v in found.items() if k not in keys}
        values = {name: _read(kind, others, name) for name, kind in beside.items()}
        for name, (key, kind) in own.items():
            if key in found:
                values[name] = _read(kind, found[key], key)
        return cls(**values)

    def __getitem__(self, key: str) -> Any:
        found = [value for own, value in self._entries() if own == key]
        if not found:
            raise KeyError(key)
        return _plain(found[-1])

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(key for key, _ in self._entries()))

    def __len__(self) -> int:
        return sum(1 for _ in self)


@cache
def _keys(cls: type[JsonRecord]) -> dict[str, tuple[str, Any]]:
    """{field: (its key in JSON, its type)}, in order."""
    hints = get_type_hints(cls)
    found: tuple[Field[Any], ...] = fields(cls)  # type: ignore[arg-type]  # a dataclass
    return {each.name: (each.metadata.get("key", each.name), hints[each.name]) for each in found}


_PLAIN = frozenset({str, int, float, bool, NoneType})


def _plain(value: Any) -> Any:
    if type(value) in _PLAIN:  # nearly all; to ask an abstract class takes ten times as long
        return value
    if isinstance(value, JsonRecord):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


@cache  # a result has some thousand values of some hundred types
def _form(kind: Any) -> tuple[Any, tuple[Any, ...], bool, Any]:
    """Of a field's type: its origin, its arguments, whether it is a record, and what JSON has for it."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    record = isinstance(origin, type) and issubclass(origin, JsonRecord)
    forms: Any = {Mapping: dict, tuple: list, float: int | float, UnionType: kind}
    return origin, inner, record, dict if record else forms.get(origin, origin)


def _read(kind: Any, value: Any, where: str) -> Any:
    """A JSON value in the form that a field of this type has. Raises TypeError, naming the field."""
    origin, inner, record, form = _form(kind)
    if NoneType in inner:
        return None if value is None else _read(inner[0], value, where)
    if kind is Any:
        return value
    if not isinstance(value, form):
        raise TypeError(f"{where}: found {type(value).__name__}, expected {kind}")
    if record:
        return kind.from_json(value)
    if origin is Mapping:
        return {key: _read(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    return tuple(_read(inner[0], item, where) for item in value) if origin is tuple else value
