"""One line of an audit trail, and its one byte form.

    {"seq":7,"time":"2026-11-30T09:15:02.120Z","event":"sent","facts":{...},"before":"<64 hex>","sig":"<base64>"}

before: SHA-256 of all bytes of the line before it, without its line feed; zeros in the first line. sig: over the label
`audit line` and the line's bytes without `,"sig":"..."`. Invariant: `parse` accepts exactly the bytes that `to_bytes`
makes, so that a line which was changed in any way is another line.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

from fedcore.audit.keys import signature_holds
from fedcore.errors import BadInput
from fedcore.types import Json

Fact = str | int | Sequence[str]
"""A name, a word, a digest; a size, a count, a yes or no; several names. Never a value of a model or of rows."""

LABEL = b"audit line"
NOTHING = "0" * 64
"""`before` of the first line."""

LONGEST = 4096
"""Characters of one fact (a certificate has about a thousand); the rest of a text is cut off."""

EVENTS = {
    "opened": "the trail was opened",
    "torn": "the end of the trail was damaged",
    "enrol": "enrolment",
    "roster": "the roster",
    "connect": "session",
    "decision": "decision",
    "sent": "left this party",
    "exposed": "a sum may be opened",
    "released": "release",
    "ended": "end of a job",
    "key": "key",
    "policy": "policy",
    "revoke": "revocation",
    "receipt": "receipt",
    "refused": "refused",
    "operator": "an operator's call",
}
"""{event: what it is about}. Further ones may be added; the names in files never change."""


_JSON = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
"""Made once: json.dumps makes an encoder for each line."""


@dataclass(frozen=True)
class Line:
    """One line. sequence: 1, 2, ...; time: UTC; before: hash of the line before; signature: empty while unsigned."""

    sequence: int
    time: str
    event: str
    facts: Mapping[str, Fact]
    before: str
    signature: bytes = field(default=b"", repr=False)

    @property
    def body(self) -> bytes:
        """What is signed."""
        about = {
            "seq": self.sequence, "time": self.time, "event": self.event, "facts": dict(self.facts),
            "before": self.before,
        }  # fmt: skip
        return _JSON(about).encode()

    def to_bytes(self) -> bytes:
        """The line without its line feed."""
        return signed_line(self.body, self.signature)

    def signed_by(self, key: str) -> bool:
        """Whether its signature is that of this key."""
        return signature_holds(key, LABEL, self.body, self.signature)

    @classmethod
    def parse(cls, data: bytes) -> Line:
        """The inverse of `to_bytes`. Raises BadInput for any other bytes."""
        try:
            about: Any = json.loads(data)
            found = cls(
                about["seq"], about["time"], about["event"], about["facts"], about["before"],
                base64.b64decode(about["sig"], validate=True),
            )  # fmt: skip
            if _typed(about) and found.to_bytes() == data:
                return found
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise BadInput("audit: found bytes that are no line of an audit trail")


def signed_line(body: bytes, signature: bytes) -> bytes:
    """The bytes of a line from its body and the signature over it."""
    return body[:-1] + b',"sig":"' + base64.b64encode(signature) + b'"}'


def line_hash(data: bytes) -> str:
    """The hash that the next line carries. data: a line without its line feed."""
    return hashlib.sha256(data).hexdigest()


def checked_facts(event: str, facts: Mapping[str, Fact]) -> dict[str, Fact]:
    """The facts as a line has them. Raises ValueError for an unknown event, TypeError for a fact of another type: a
    float may be a value of a model, and bytes may be a key."""
    if event not in EVENTS:
        raise ValueError(f"audit: found event {event!r}, expected one of {', '.join(EVENTS)}")
    return {name: _fact(name, value) for name, value in facts.items()}


def stamp(seconds: float) -> str:
    """A time in UTC, with milliseconds."""
    return f"{_second(int(seconds))}.{int(seconds * 1000) % 1000:03d}Z"


@lru_cache(maxsize=4)
def _second(seconds: int) -> str:
    """Lines of one second are many."""
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}"


def text_of(value: Fact) -> str:
    """A fact as one text."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int) else ",".join(value)


def _fact(name: str, value: object) -> Fact:
    if isinstance(value, str):
        return str(value)[:LONGEST]
    if isinstance(value, int):
        return value
    if isinstance(value, list | tuple):
        return [_text(name, each)[:LONGEST] for each in value]
    raise _wrong(name, value)


def _text(name: str, value: object) -> str:
    if not isinstance(value, str):
        raise _wrong(name, value)
    return str(value)


def _wrong(name: str, value: object) -> TypeError:
    return TypeError(f"audit: {name}: found {type(value).__name__}, expected text or an integer")


def _typed(about: Json) -> bool:
    """Whether the parts of a line have their types."""
    facts, before = about["facts"], about["before"]
    return (
        type(about["seq"]) is int
        and all(isinstance(about[name], str) for name in ("time", "event", "before"))
        and isinstance(facts, dict)
        and facts == {name: _fact(name, value) for name, value in facts.items()}
        and re.fullmatch("[0-9a-f]{64}", before) is not None
    )
