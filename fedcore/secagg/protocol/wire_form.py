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
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from itertools import repeat
from operator import attrgetter
from typing import (
    Any,
    NamedTuple,
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
    """How a record type is written. head: the first bytes, which are its name; fields: those written; values: of
    these fields of a record; signed: whether the last one is a signature."""

    name: str
    head: bytes
    fields: tuple[str, ...]
    values: Callable[[Any], Iterable[Any]]
    signed: bool


_FORMS: dict[type[Any], _Form] = {}
_TYPES: dict[str, type[Any]] = {}

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
        head = b"RS" + _LENGTH(len(label)) + label
        signed = written[-1:] == ("signature",)
        _FORMS[form] = _Form(name, head, written, _values_of(written), signed)
        _TYPES[name] = form
        return form

    return register


def _values_of(names: Sequence[str]) -> Callable[[Any], Iterable[Any]]:
    """These attributes of an object."""
    if len(names) > 1:
        return attrgetter(*names)
    return lambda value: [getattr(value, name) for name in names]


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


_BYTES, _UNSIGNED, _DIGEST = "_bytes", "_unsigned", "_digest"
"""What a frozen record keeps beside its fields, once it was made: a message is signed, hashed, journalled, recorded and
sent, and those of 64 sites are checked many times. Bytes with a secret in them are never kept."""


def encode(value: Any) -> bytes:
    """The byte form of a record, tuple, string, bytes, int or None."""
    kept: bytes | None = getattr(value, "__dict__", _EMPTY).get(_BYTES)
    if kept is not None:
        return kept
    parts: list[bytes] = []
    _write(parts.append, value)
    return b"".join(parts)


def encode_message(message: Any) -> bytes:
    """`encode`, once in the life of a message. Only for what has no secret."""
    return _kept(message, _BYTES, lambda: encode(message))


def digest(value: Any) -> bytes:
    """SHA-256 over the byte form: 32 bytes."""
    return _kept(value, _DIGEST, lambda: hashlib.sha256(encode(value)).digest())


def unsigned(message: Any) -> bytes:
    """What a signature of the message covers: its byte form with an empty `signature`, which is the last field."""
    return _kept(message, _UNSIGNED, lambda: _cut(encode_message(message), message))


def _cut(data: bytes, message: Any) -> bytes:
    if not _FORMS[type(message)].signed:
        raise TypeError(f"{type_name(type(message))} does not end with a signature")
    return data[: len(data) - len(message.signature) - len(_NO_LENGTH)] + _NO_LENGTH


def with_signature(message: R, signature: bytes) -> R:
    """The message with this signature."""
    signed: Any = message
    found: R = replace(signed, signature=signature)
    covered = unsigned(message)
    tail = _LENGTH(len(signature)) + signature
    vars(found).update({_UNSIGNED: covered, _BYTES: covered[: -len(_NO_LENGTH)] + tail})
    return found


def _kept(value: Any, name: str, make: Callable[[], bytes]) -> bytes:
    kept: dict[str, bytes] | None = getattr(value, "__dict__", None)
    if kept is None:  # a tuple
        return make()
    if name not in kept:
        kept[name] = make()
    return kept[name]


_EMPTY: Mapping[str, bytes] = types.MappingProxyType({})
_LENGTH, _INTEGER = struct.Struct(">I").pack, struct.Struct(">q").pack
_NO_LENGTH = _LENGTH(0)


def _write(out: Callable[[bytes], None], value: Any) -> None:
    kind = type(value)
    form = _FORMS.get(kind)
    if form is not None:
        kept = getattr(value, "__dict__", _EMPTY).get(_BYTES)
        if kept is not None:
            out(kept)
            return
        out(form.head)
        parts: Iterable[Any] = form.values(value)
    elif kind is tuple:
        out(b"L" + _LENGTH(len(value)))
        parts = value
    else:
        parts = (value,)
    # In a loop: most parts are plain, and a call for each takes longer than all else.
    for part in parts:
        kind = type(part)
        if kind is bytes:
            out(b"B" + _LENGTH(len(part)))
            out(part)
        elif kind is str:
            data = part.encode()
            out(b"S" + _LENGTH(len(data)) + data)
        elif kind is int:
            if not -(1 << 63) <= part < 1 << 63:
                raise TypeError("an integer beyond 64 bits has no byte form")
            out(b"I" + _INTEGER(part))
        elif part is None:
            out(b"N")
        elif kind is tuple or kind in _FORMS:
            _write(out, part)
        elif kind is SecretBytes:
            out(b"X" + _LENGTH(len(part.reveal())) + part.reveal())
        else:  # a bool too: the two cases have names of their own
            raise TypeError(f"{kind.__name__} has no byte form")


@dataclass
class _Source:
    """The bytes that are read, their sender, and how many items a list may have. most: None for any number; secret:
    whether one was read."""

    data: bytes
    sender: str
    most: int | None
    secret: bool = False


class _Place(NamedTuple):
    """What one place of a message takes. readers: by first byte; items: the types of a tuple's items;
    classes: the records; where: words for a refusal."""

    hint: Any
    where: str
    readers: Mapping[bytes, Callable[..., tuple[Any, int]]]
    items: tuple[Any, ...]
    classes: tuple[type[Any], ...]


def decode(
    data: bytes, expected: type[R], *, sender: str = "this site", most_items: int | None = None
) -> R:
    """The inverse of `encode` for a record of type `expected`. Raises MalformedMessage.

    Reading stops at the first item of another type than its field has, and at a list of more than
    `most_items`, so that what it costs does not grow with a lying length.
    """
    hint: Any = expected
    value: R
    value, end = _read(_Source(data, sender, most_items), 0, 0, _place(hint, ""))
    if end != len(data):
        raise _malformed(f"{len(data) - end} bytes behind the message", "none", sender)
    return value


def _malformed(found: object, expected: object, sender: str) -> MalformedMessage:
    return MalformedMessage("message", found=found, expected=expected, fault=sender)


def _mistyped(found: str, place: _Place, source: _Source) -> MalformedMessage:
    return _malformed(f"{found}{place.where}", type_name(place.hint), source.sender)


def _read(source: _Source, at: int, depth: int, place: _Place) -> tuple[Any, int]:
    """The value at a position, and its end. One of another type is refused before any of it is read."""
    if depth > MAX_DEPTH:
        raise _malformed("deeper nesting", f"at most {MAX_DEPTH} levels", source.sender)
    kind = source.data[at : at + 1]
    reader = place.readers.get(kind)
    if reader is not None:
        return reader(source, at + 1, depth, place)
    if kind in _KINDS:
        raise _mistyped(_KINDS[kind], place, source)
    raise _malformed(f"the kind {kind!r}", "one of N I B S L R", source.sender)


def _take(source: _Source, at: int, size: int) -> bytes:
    part = source.data[at : at + size]
    if len(part) != size:
        raise _malformed(f"{len(part)} bytes", f"{size}", source.sender)
    return part


def _read_none(_source: _Source, at: int, *_: object) -> tuple[None, int]:
    return None, at


def _read_integer(source: _Source, at: int, *_: object) -> tuple[int, int]:
    return int.from_bytes(_take(source, at, 8), "big", signed=True), at + 8


def _read_bytes(source: _Source, at: int, *_: object) -> tuple[bytes, int]:
    size = int.from_bytes(_take(source, at, 4), "big")
    return _take(source, at + 4, size), at + 4 + size


def _read_secret(source: _Source, at: int, *_: object) -> tuple[SecretBytes, int]:
    body, end = _read_bytes(source, at)
    source.secret = True
    return SecretBytes(body), end


def _read_text(source: _Source, at: int, *_: object) -> tuple[str, int]:
    body, end = _read_bytes(source, at)
    try:
        return body.decode(), end
    except UnicodeDecodeError as error:
        raise _malformed("bytes that are not UTF-8", "text", source.sender) from error


def _read_items(source: _Source, at: int, depth: int, place: _Place) -> tuple[tuple[Any, ...], int]:
    size, at = int.from_bytes(_take(source, at, 4), "big"), at + 4
    if source.most is not None and size > source.most:
        raise _malformed(f"a list of {size}", f"at most {source.most} items", source.sender)
    if place.items[1:] == (Ellipsis,):
        each: Iterable[_Place] = repeat(_place(place.items[0], " in a list"), size)
    elif len(place.items) == size:
        each = [_place(hint, " in a list") for hint in place.items]
    else:
        raise _mistyped("tuple", place, source)
    items, at = _read_each(source, at, depth + 1, each)
    return tuple(items), at


def _read_each(
    source: _Source, at: int, depth: int, places: Iterable[_Place]
) -> tuple[list[Any], int]:
    """The values from a position on, one for each place, and the end of the last.

    Whole bytes, texts and integers are read here, because most values are; `_read` reads and refuses the others.
    """
    data, found, flat = source.data, [], depth <= MAX_DEPTH
    for place in places:  # a lying count ends at the first missing item
        kind = data[at : at + 1]
        value: Any = None
        end = at
        if flat and kind in _SIZED and kind in place.readers:
            start = at + 5
            end = start + int.from_bytes(data[at + 1 : start], "big")
            if end <= len(data):
                value = data[start:end] if kind == b"B" else _text(data[start:end])
        elif flat and kind == b"I" and kind in place.readers and at + 9 <= len(data):
            end = at + 9
            value = int.from_bytes(data[at + 1 : end], "big", signed=True)
        if value is None:
            value, end = _read(source, at, depth, place)
        found.append(value)
        at = end
    return found, at


def _text(data: bytes) -> str | None:
    """None for bytes that are not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None


def _read_record(source: _Source, at: int, depth: int, place: _Place) -> tuple[Any, int]:
    start = at - 1
    name, at = _read(source, at, depth + 1, _place(str, " for a record's name"))
    cls: Any = _TYPES.get(name)
    if cls is None:
        raise _malformed("an unknown record", "a record of this version", source.sender)
    if not issubclass(cls, place.classes):
        raise _mistyped(name, place, source)
    before, source.secret = source.secret, False
    values, at = _read_each(source, at, depth + 1, _fields(cls))
    found = cls(*values)
    if not source.secret and (depth == 0 or _FORMS[cls].signed):
        vars(found)[_BYTES] = source.data[start:at]
    source.secret |= before
    return found, at


_KINDS = {
    b"N": "NoneType", b"I": "int", b"B": "bytes", b"S": "str", b"L": "tuple", b"X": "SecretBytes",
    b"R": "record",
}  # fmt: skip
_SIZED = {b"B", b"S"}
_PLAIN: dict[Any, bytes] = {
    None: b"N", type(None): b"N", int: b"I", bytes: b"B", str: b"S", SecretBytes: b"X", tuple: b"L",
}  # fmt: skip
_READERS: dict[bytes, Callable[..., tuple[Any, int]]] = {
    b"N": _read_none, b"I": _read_integer, b"B": _read_bytes, b"S": _read_text, b"L": _read_items,
    b"X": _read_secret, b"R": _read_record,
}  # fmt: skip


@cache
def _fields(cls: type[Any]) -> tuple[_Place, ...]:
    label = _FORMS[cls].name
    return tuple(_place(hint, f" in {label}.{name}") for name, hint in fields_of(cls))


def fields_of(cls: type[Any]) -> tuple[tuple[str, Any], ...]:
    """(field, type) of a record, in order, without the fields that have no byte form."""
    hints = get_type_hints(cls)  # not before first use: annotations may name later classes
    return tuple((name, hints[name]) for name in _FORMS[cls].fields)


@cache
def _place(hint: Any, where: str) -> _Place:
    kinds = {b"R"}  # every place reads a record's name, to refuse it by name
    items: tuple[Any, ...] = (Any, ...)
    classes: tuple[type[Any], ...] = ()
    for each in _members(hint):
        if each is Any or each is object:
            kinds, classes = set(_KINDS), (object,)
            continue
        kind = _PLAIN.get(get_origin(each) or each, b"R")
        kinds.add(kind)
        items = (kind == b"L" and get_args(each)) or items
        classes += (each,) if kind == b"R" and isinstance(each, type) else ()
    return _Place(hint, where, {kind: _READERS[kind] for kind in kinds}, items, classes)


def _members(hint: Any) -> tuple[Any, ...]:
    hint = getattr(hint, "__supertype__", hint)  # NewType
    if get_origin(hint) in {Union, types.UnionType}:
        return tuple(each for part in get_args(hint) for each in _members(part))
    return (hint,)
