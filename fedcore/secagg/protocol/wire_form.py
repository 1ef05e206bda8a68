"""The one byte form of a message: what is signed, hashed, journalled and published in the vectors.

    value  = 'N' | 'I' int64 | 'B' length bytes | 'S' length UTF-8 | 'L' count value... | 'R' name value...
           | 'X' length bytes      a secret, in journal records only

Lengths and counts are 4 bytes, integers 8, all big-endian; a record is the name that `@record(NAME)`
gives its type, and then its fields in order. That name never changes, because signatures and journals
hold it; the class may be renamed. `tests/vectors/records.json` lists all records with their fields.

Invariant: one value has one byte form, and `decode` takes nothing else: no tail, no other type, no
unknown record, no length beyond the input. Nothing but registered frozen records, tuples, strings, bytes
and integers has a form, so a message cannot bring code along; a message type has no field that takes a
secret, so it cannot carry one out.
"""

import hashlib
import struct
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import (
    Any,
    TypeVar,
    Union,
    dataclass_transform,
    get_args,
    get_origin,
    get_type_hints,
)

from fedcore.errors import MalformedMessage
from fedcore.secagg.crypto.secret import SecretBytes


@dataclass(frozen=True)
class _Form:
    """How a record type is written. head: the first bytes, which are its name; fields: those written."""

    name: str
    head: bytes
    fields: tuple[str, ...]


_FORMS: dict[type[Any], _Form] = {}
_TYPES: dict[str, type[Any]] = {}
_FIELDS: dict[type[Any], tuple[tuple[str, Any], ...]] = {}

MAX_DEPTH = 12
"""Nesting of real messages stays below 8."""

R = TypeVar("R")


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def record(name: str) -> Callable[[type[R]], type[R]]:
    """Make a class a frozen dataclass with a byte form under a name that no later version changes.

    A class that is a dataclass already stays as it is. The decorator raises TypeError for a name that is
    taken, and for a class that has one. Fields with the metadata `byte_form: False` are left out.
    """

    def register(cls: type[R]) -> type[R]:
        if name in _TYPES or cls in _FORMS:
            raise TypeError(f"record {name!r}: expected a name that is not taken, for one class")
        form: type[Any] = (
            cls if "__dataclass_fields__" in vars(cls) else dataclass(frozen=True)(cls)
        )
        label = name.encode()
        written = tuple(f.name for f in fields(form) if f.metadata.get("byte_form", True))
        _FORMS[form] = _Form(name, b"RS" + _LENGTH(len(label)) + label, written)
        _TYPES[name] = form
        return form

    return register


def records() -> Mapping[str, type[Any]]:
    """Every record type registered so far, by its name."""
    return types.MappingProxyType(_TYPES)


def type_name(hint: Any) -> str:
    """A type or annotation in words: for a record its frozen name, `tuple[Keys, ...]`, `bytes | NoneType`.

    A type without a byte form keeps its Python name.
    """
    if hint in _FORMS:
        return _FORMS[hint].name
    hint = getattr(hint, "__supertype__", hint)  # NewType
    if hint in _PLAIN:
        return _KINDS[_PLAIN[hint]]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in {Union, types.UnionType}:
        return " | ".join(map(type_name, arguments))
    if origin is tuple:
        return f"tuple[{', '.join('...' if a is Ellipsis else type_name(a) for a in arguments)}]"
    return str(getattr(hint, "__name__", hint))


def encode(value: Any) -> bytes:
    """The byte form of a record, tuple, string, bytes, int or None."""
    parts: list[bytes] = []
    _write(parts.append, value)
    return b"".join(parts)


def digest(value: Any) -> bytes:
    """SHA-256 over the byte form: 32 bytes."""
    return _kept(value, "_digest", lambda: hashlib.sha256(encode(value)).digest())


def unsigned(message: Any) -> bytes:
    """What a signature of the message covers: its byte form with an empty `signature`."""
    return _kept(message, "_unsigned", lambda: encode(replace(message, signature=b"")))


def _kept(value: Any, name: str, make: Callable[[], bytes]) -> bytes:
    """Made once for a frozen record: a bundle of 64 sites is hashed and checked many times."""
    kept: dict[str, bytes] | None = getattr(value, "__dict__", None)
    if kept is None:  # a tuple
        return make()
    if name not in kept:
        kept[name] = make()
    return kept[name]


_LENGTH, _INTEGER = struct.Struct(">I").pack, struct.Struct(">q").pack


def _write(out: Callable[[bytes], None], value: Any) -> None:
    kind = type(value)
    if kind is bytes:
        out(b"B" + _LENGTH(len(value)))
        out(value)
    elif kind is str:
        data = value.encode()
        out(b"S" + _LENGTH(len(data)) + data)
    elif kind is tuple:
        out(b"L" + _LENGTH(len(value)))
        for item in value:
            _write(out, item)
    elif kind is int:
        if not -(1 << 63) <= value < 1 << 63:
            raise TypeError("an integer beyond 64 bits has no byte form")
        out(b"I" + _INTEGER(value))
    elif value is None:
        out(b"N")
    elif kind is SecretBytes:
        out(b"X" + _LENGTH(len(value.reveal())) + value.reveal())
    elif kind in _FORMS:
        form = _FORMS[kind]
        out(form.head)
        for each in form.fields:
            _write(out, getattr(value, each))
    else:  # a bool too: the two cases have names of their own
        raise TypeError(f"{kind.__name__} has no byte form")


@dataclass(frozen=True)
class _Source:
    """Whose bytes are read, and how many items a list of them may have. most: None for any number."""

    sender: str
    most: int | None


def decode(
    data: bytes, expected: type[R], *, sender: str = "this site", most_items: int | None = None
) -> R:
    """The inverse of `encode` for a record of type `expected`. Raises MalformedMessage.

    Reading stops at the first item of another type than its field has, and at a list of more than
    `most_items`, so that what it costs does not grow with a lying length.
    """
    source = _Source(sender, most_items)
    if data[:1] != b"R":  # a record is told by its name, once it is read
        _check_kind(data, 0, expected, "", source)
    value, end = _read(data, 0, source, 0, expected)
    if end != len(data):
        raise _malformed(f"{len(data) - end} bytes behind the message", "none", sender)
    kind: Any = expected
    if not _checker(kind)(value):
        raise _malformed(type_name(type(value)), type_name(expected), sender)
    return value  # type: ignore[no-any-return]


def _malformed(found: object, expected: object, sender: str) -> MalformedMessage:
    return MalformedMessage("message", found=found, expected=expected, fault=sender)


def _read(data: bytes, at: int, source: _Source, depth: int, hint: Any) -> tuple[Any, int]:
    sender = source.sender
    if depth > MAX_DEPTH:
        raise _malformed("deeper nesting", f"at most {MAX_DEPTH} levels", sender)
    kind, at = data[at : at + 1], at + 1
    if kind == b"N":
        return None, at
    if kind == b"I":
        body = _take(data, at, 8, sender)
        return struct.unpack(">q", body)[0], at + 8
    if kind in {b"B", b"S", b"L", b"X"}:
        size = struct.unpack(">I", _take(data, at, 4, sender))[0]
        at += 4
        if kind == b"L":
            return _read_items(data, at, source, depth, hint, size)
        body = _take(data, at, size, sender)
        return _LEAVES[kind](body, sender), at + size
    if kind == b"R":
        return _read_record(data, at, source, depth)
    raise _malformed(f"the kind {kind!r}", "one of N I B S L R", sender)


def _read_items(
    data: bytes, at: int, source: _Source, depth: int, hint: Any, size: int
) -> tuple[tuple[Any, ...], int]:
    if source.most is not None and size > source.most:
        raise _malformed(f"a list of {size}", f"at most {source.most} items", source.sender)
    each, items = _item_hint(hint), []
    check = _checker(each) if each is not Any else None
    for _ in range(size):  # a lying count ends at the first missing item
        _check_kind(data, at, each, " in a list", source)
        item, at = _read(data, at, source, depth + 1, each)
        if check is not None and not check(item):
            found = f"{type_name(type(item))} in a list"
            raise _malformed(found, type_name(each), source.sender)
        items.append(item)
    return tuple(items), at


def _read_record(data: bytes, at: int, source: _Source, depth: int) -> tuple[Any, int]:
    sender = source.sender
    name, at = _read(data, at, source, depth + 1, Any)
    cls = _TYPES.get(name) if isinstance(name, str) else None
    if cls is None:
        raise _malformed("an unknown record", "a record of this version", sender)
    values = []
    for field_name, hint in fields_of(cls):
        _check_kind(data, at, hint, f" in {name}.{field_name}", source)
        value, at = _read(data, at, source, depth + 1, hint)
        if not _checker(hint)(value):
            found = f"{type_name(type(value))} in {name}.{field_name}"
            raise _malformed(found, type_name(hint), sender)
        values.append(value)
    return cls(*values), at


_KINDS = {
    b"N": "NoneType", b"I": "int", b"B": "bytes", b"S": "str", b"L": "tuple", b"X": "SecretBytes",
    b"R": "record",
}  # fmt: skip
_PLAIN: dict[Any, bytes] = {
    None: b"N", type(None): b"N", int: b"I", bytes: b"B", str: b"S", SecretBytes: b"X",
}  # fmt: skip


def _check_kind(data: bytes, at: int, hint: Any, where: str, source: _Source) -> None:
    """Refuse a value of another kind than its field's, before any of it is read."""
    kind = data[at : at + 1]
    if kind in _KINDS and kind not in _kinds(hint):
        raise _malformed(f"{_KINDS[kind]}{where}", type_name(hint), source.sender)


@cache
def _kinds(hint: Any) -> frozenset[bytes]:
    """The first bytes that a value of an annotated type may have."""
    hint = getattr(hint, "__supertype__", hint)  # NewType
    origin = get_origin(hint)
    if origin in {Union, types.UnionType}:
        return frozenset().union(*map(_kinds, get_args(hint)))
    if hint in _PLAIN:
        return frozenset({_PLAIN[hint]})
    if origin is tuple or hint is tuple:
        return frozenset({b"L"})
    if hint is Any or hint is object:
        return frozenset(_KINDS)
    return frozenset({b"R"})


@cache
def _item_hint(hint: Any) -> Any:
    """The type of every item of a tuple that may be of any length, else Any."""
    hint = getattr(hint, "__supertype__", hint)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return arguments[0]
    return Any


def _take(data: bytes, at: int, size: int, sender: str) -> bytes:
    part = data[at : at + size]
    if len(part) != size:
        raise _malformed(f"{len(part)} bytes", f"{size}", sender)
    return part


def _text(body: bytes, sender: str) -> str:
    try:
        return body.decode()
    except UnicodeDecodeError as error:
        raise _malformed("bytes that are not UTF-8", "text", sender) from error


_LEAVES: dict[bytes, Callable[[bytes, str], Any]] = {
    b"B": lambda body, _: body,
    b"S": _text,
    b"X": lambda body, _: SecretBytes(body),
}


def fields_of(cls: type[Any]) -> tuple[tuple[str, Any], ...]:
    """(field, type) of a record, in order, without the fields that have no byte form."""
    if cls not in _FIELDS:  # not before first use: annotations may name later classes
        hints = get_type_hints(cls)
        _FIELDS[cls] = tuple((name, hints[name]) for name in _FORMS[cls].fields)
    return _FIELDS[cls]


@cache
def _checker(hint: Any) -> Callable[[Any], bool]:
    """Whether a decoded value is of an annotated type; the annotation is read once."""
    hint = getattr(hint, "__supertype__", hint)  # NewType
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in {Union, types.UnionType}:
        some = tuple(map(_checker, arguments))
        return lambda value: any(each(value) for each in some)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        item = _checker(arguments[0])
        return lambda value: isinstance(value, tuple) and all(map(item, value))
    if origin is tuple:
        parts = tuple(map(_checker, arguments))
        return lambda value: (
            isinstance(value, tuple)
            and len(value) == len(parts)
            and all(check(each) for check, each in zip(parts, value, strict=True))
        )
    if hint is None or hint is type(None):
        return lambda value: value is None
    return lambda value: isinstance(hint, type) and isinstance(value, hint)
