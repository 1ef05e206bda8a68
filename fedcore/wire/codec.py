"""Frames to bytes and back: protobuf, read strictly.

A call carries either one type of frame or, for a `oneof` of the .proto, one of several: then the bytes are
the frame's field number, its length and its bytes. These are written and read here without protobuf, so that
a part of 1 MiB is copied once and a frame's size is known before it is parsed. A message of a session may have several
frames, one after the other: each passes the same checks as alone, and none can be inside another.

Invariant: one frame has one byte form. What protobuf would accept otherwise (unknown fields, a field twice,
a long form of a number, another field order) is refused, because the frame's own bytes would differ.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Generic, TypeVar, cast, get_args, get_origin, get_type_hints

from google.protobuf.message import DecodeError

from fedcore import __version__
from fedcore.errors import MalformedMessage, VersionRefused
from fedcore.wire.limits import KIB, Limit, found

WIRE_VERSION = 7
"""Version of frames and calls. It is in field 1 of the first frame of a session and of every operator
request, in every version, so that a refusal can name both versions."""

TOGETHER = 128 * KIB
"""Bytes of a message with more than one frame."""

MOST_TOGETHER = 16
"""Frames of one message."""

ALONE = 4 * KIB
"""Bytes above which a frame is sent in a message of its own: over a slow line those before it arrive sooner."""

F = TypeVar("F")


@dataclass(frozen=True)
class Form(Generic[F]):
    """The wire form of one type of frame. message: its protobuf class, None for bare bytes.

    number: its field in the `oneof`, 0 without one. most: the largest size in bytes.
    """

    frame: type[F]
    message: Callable[[], Any] | None
    most: int
    number: int = 0


class Codec(Generic[F]):
    """The frames that one call carries in one direction. Field numbers of a `oneof` stay below 16."""

    def __init__(self, envelope: str, *forms: Form[Any]) -> None:
        self.envelope = envelope
        self.forms: Mapping[int, Form[Any]] = {form.number: form for form in forms}
        self._of: Mapping[type[Any], Form[Any]] = {form.frame: form for form in forms}

    def pack(self, frame: F) -> bytes:
        """Serialise a frame. Raises MalformedMessage (fault: this site) for one beyond its limits."""
        form = self._of.get(type(frame))
        if form is None:
            raise MalformedMessage(self.envelope, type(frame).__name__, _names(self), "this site")
        body = _write(frame, form)
        return _head(form.number, len(body)) + body if form.number else body

    def unpack(self, data: bytes, *, sender: str) -> F:
        """Parse the one frame of a message. Raises MalformedMessage, of which VersionRefused is one. sender: named as
        the fault."""
        if 0 in self.forms:
            return self._parsed(self.forms[0], data, 0, len(data), sender)
        form, start, end = self._frame_at(data, 0, sender)
        if end != len(data):
            raise self._other_length(sender)
        return self._parsed(form, data, start, end, sender)

    def unpack_each(self, data: bytes, *, sender: str) -> Iterator[F]:
        """Parse the frames of a message of a `oneof` in order, each when it is asked for: at most MOST_TOGETHER, and of
        TOGETHER bytes where there are several. Raises as `unpack`, at the frame that is not allowed there."""
        at = number = 0
        while not number or at < len(data):
            form, start, end = self._frame_at(data, at, sender)
            if not number and end < len(data) > TOGETHER:
                expected = f"one frame, or at most {TOGETHER} bytes"
                raise MalformedMessage(self.envelope, f"{len(data)} bytes", expected, sender)
            if number == MOST_TOGETHER:
                expected = f"at most {MOST_TOGETHER} frames"
                raise MalformedMessage(self.envelope, "more frames", expected, sender)
            yield self._parsed(form, data, start, end, sender)
            at, number = end, number + 1

    def _parsed(self, form: Form[Any], data: bytes, start: int, end: int, sender: str) -> F:
        if end - start > form.most:
            most = f"at most {form.most} bytes"
            raise MalformedMessage(form.frame.__name__, f"{end - start} bytes", most, sender)
        return cast("F", _read(data[start:end], form, sender))

    def _frame_at(self, data: bytes, at: int, sender: str) -> tuple[Form[Any], int, int]:
        """The frame that begins here: its form, and where its body begins and ends."""
        form = self.forms.get(data[at] >> 3) if at < len(data) else None
        if form is None:
            kind = "an unknown frame" if at < len(data) else "nothing"
            raise MalformedMessage(self.envelope, kind, _names(self), sender)
        size, start = 0, at + 1
        for digit, byte in enumerate(data[start : start + 5]):  # a length of 1 to 5 bytes
            size, start = size | (byte & 127) << 7 * digit, start + 1
            if byte < 128:
                break
        if _head(form.number, size) != data[at:start] or start + size > len(data):
            raise self._other_length(sender)
        return form, start, start + size

    def _other_length(self, sender: str) -> MalformedMessage:
        return MalformedMessage(
            self.envelope, "another length than stated", "the whole frame", sender
        )


def in_messages(packed: Iterable[bytes]) -> Iterator[bytes]:
    """Serialised frames of a `oneof` in order, as few messages as `unpack_each` takes."""
    found: list[bytes] = []
    size = 0
    for data in packed:
        if found and (len(found) == MOST_TOGETHER or max(size, len(data)) > ALONE):
            yield b"".join(found)
            found, size = [], 0
        found.append(data)
        size += len(data)
    if found:
        yield b"".join(found)


def _head(number: int, size: int) -> bytes:
    """Key of a length-delimited field, then its length in the short form; a size below 0 counts as 0."""
    out = bytearray((number << 3 | 2,))
    while size > 127:
        out.append(size & 127 | 128)
        size >>= 7
    out.append(max(size, 0))
    return bytes(out)


def _names(codec: Codec[Any]) -> str:
    return " or ".join(form.frame.__name__ for form in codec.forms.values())


def _write(frame: Any, form: Form[Any]) -> bytes:
    if form.message is None:
        (only,) = _rules(form.frame)
        return cast("bytes", _checked(frame, only))
    message = form.message()
    _fill(message, frame)
    return cast("bytes", message.SerializeToString(deterministic=True))


def _fill(message: Any, frame: Any) -> None:
    """Set a protobuf message's fields from a frame's, each within its limit."""
    for rule in _rules(type(frame)):
        value = _checked(frame, rule)
        if rule.of is None:
            setattr(message, rule.name, value)
        elif rule.many:
            for each in value:
                _fill(getattr(message, rule.name).add(), each)
        else:
            _fill(getattr(message, rule.name), value)


def _read(body: bytes, form: Form[Any], sender: str) -> Any:
    if form.message is None:
        (only,) = _rules(form.frame)
        _check(body, only, form.frame, sender)
        return form.frame(body)
    message, name = form.message(), form.frame.__name__
    try:
        message.MergeFromString(body)
    except DecodeError:
        raise MalformedMessage(name, "bytes that are no such frame", "protobuf", sender) from None
    _check_version(message, form.frame, sender)
    message.DiscardUnknownFields()  # or they would be written again, and the bytes be the same
    if message.SerializeToString(deterministic=True) != body:
        raise MalformedMessage(name, "another byte form", "the one its fields give", sender)
    return _taken(message, form.frame, sender)


def _taken(message: Any, cls: type[Any], sender: str) -> Any:
    """A frame from a protobuf message; checks each field's limit, counts before contents."""
    values: dict[str, Any] = {}
    for rule in _rules(cls):
        value = getattr(message, rule.name)
        if rule.many:
            _check(tuple(range(len(value))), rule, cls, sender)
            values[rule.name] = tuple(_taken(each, rule.of, sender) for each in value)  # type: ignore[arg-type]
        elif rule.of is not None:
            values[rule.name] = _taken(value, rule.of, sender)
        else:
            _check(value, rule, cls, sender)
            values[rule.name] = value
    return cls(**values)


def _check_version(message: Any, cls: type[Any], sender: str) -> None:
    """Raise VersionRefused for another version, before other checks: it may have other fields."""
    if all(each.name != "version" for each in fields(cls)) or message.version == WIRE_VERSION:
        return
    software = getattr(message, "software", "")
    known = software if software.isprintable() and 0 < len(software) <= 64 else "another Fedcore"
    raise VersionRefused(
        "wire version", f"{message.version} (of {known})",
        f"{WIRE_VERSION} (of fedcore {__version__})", sender,
        remedy="install the same version of Fedcore on both sides",
    )  # fmt: skip


@dataclass(frozen=True)
class _Rule:
    """One field of a frame. of: a nested frame's type; many: whether it is a list of them."""

    name: str
    kind: type[Any]
    of: type[Any] | None
    many: bool
    limit: Limit | None


_RULES: dict[type[Any], tuple[_Rule, ...]] = {}


def _rules(cls: type[Any]) -> tuple[_Rule, ...]:
    """The rules of a frame's fields, in order; cached by type."""
    if cls not in _RULES:
        hints = get_type_hints(cls, include_extras=True)
        _RULES[cls] = tuple(_rule(each.name, hints[each.name]) for each in fields(cls))
    return _RULES[cls]


def _rule(name: str, hint: Any) -> _Rule:
    limit = None
    if get_origin(hint) is Annotated:
        hint, limit = get_args(hint)
    if get_origin(hint) is tuple:
        return _Rule(name, tuple, get_args(hint)[0], many=True, limit=limit)
    nested = hint if hint not in {str, bytes, int, bool} else None
    if limit is None and nested is None and hint is not bool:
        raise TypeError(f"field {name} has no limit")
    return _Rule(name, hint, nested, many=False, limit=limit)


def _checked(frame: Any, rule: _Rule) -> Any:
    value = getattr(frame, rule.name)
    _check(value, rule, type(frame), "this site")
    return value


def _check(value: Any, rule: _Rule, cls: type[Any], sender: str) -> None:
    where = f"{cls.__name__}.{rule.name}"
    if type(value) is not rule.kind and not (rule.many and isinstance(value, tuple)):
        raise MalformedMessage(where, type(value).__name__, rule.kind.__name__, sender)
    if rule.limit is not None and not rule.limit.allows(value):
        raise MalformedMessage(where, found(value), rule.limit.expected, sender)
