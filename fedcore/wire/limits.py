"""What a field of a frame may hold, said beside the field: `Annotated[str, text(1, 64)]`.

Invariant: `found` describes a refused value by its kind and length and never repeats it, so a peer
cannot write into a log through an error message.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Any

KIB, MIB = 1 << 10, 1 << 20

MAX_RECORD = 16 * MIB
"""Of one protocol message. The largest known are the grants of a key epoch among 500 sites, 8.5 MiB at
17 KiB each; a delivery to one of 64 sites is below 0.5 MiB."""

SITE_RECORD = 256 * KIB
"""Of a site's message of any type but grants: 64 key shares are about 0.1 MiB. Decoding the worst that
fits takes the coordinator 0.06 s, and 1 s at 4 MiB."""

SITE_WORDS = 32 * KIB
"""Of a site's message about itself alone, such as its keys of an epoch: 1.4 KiB."""

GRANT = 48 * KIB
"""Of one grant of a key epoch: 17 KiB at ring degree 2048, 33 KiB at 4096, and room for the longest names."""

MOST_ITEMS = 1024
"""Of one list in a record of a site: it has one item for a site, a metric or a block of metric sums."""

PART = MIB
"""Of one part of a vector or file: every part but the last is exactly as long."""

INLINE = 64 * KIB
"""Of a vector that may travel inside the session."""

SMALL = INLINE + 4 * KIB
"""Of any other frame of a session, as bytes."""

MAX_JSON, MAX_TOML = MIB, 256 * KIB

MAX_SIZE = 1 << 40
"""Of a vector in bytes: above any model, and far from the end of 64 bits."""


@dataclass(frozen=True)
class Limit:
    """One rule for a field's value of the right type, and how it is told."""

    expected: str
    allows: Callable[[Any], bool]


def found(value: object) -> str:
    """A refused value in words that do not repeat it."""
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, int):
        return "a number outside"
    if isinstance(value, str):
        return f"{len(value)} characters" if value.isprintable() else "unprintable characters"
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    return f"{len(value)} items" if isinstance(value, tuple) else type(value).__name__


def text(least: int, most: int) -> Limit:
    """Characters that are safe in a log and a terminal: no line break, escape or direction mark."""
    return Limit(
        f"{least} to {most} printable characters, none of them a blank at an end",
        lambda value: (
            least <= len(value) <= most and value.isprintable() and value == value.strip()
        ),
    )


def matching(pattern: str, expected: str) -> Limit:
    """Text of exactly this form."""
    return Limit(expected, lambda value: re.fullmatch(pattern, value) is not None)


def one_of(words: Collection[str]) -> Limit:
    """A word of a fixed list."""
    return Limit(f"one of: {', '.join(words)}", lambda value: value in words)


def length(least: int, most: int) -> Limit:
    """So many bytes or items."""
    says = f"{least}" if least == most else f"{least} to {most}"
    return Limit(says, lambda value: least <= len(value) <= most)


def within(least: int, most: int) -> Limit:
    """A number in a closed range."""
    return Limit(f"{least} to {most}", lambda value: least <= value <= most)


Id = Annotated[str, text(1, 64)]
"""Of a job, a site, a task or a federation."""

Line = Annotated[str, text(0, 256)]
Hex = Annotated[str, matching("[0-9a-f]{64}", "64 lowercase hex digits")]
HexOrNone = Annotated[str, matching("([0-9a-f]{64})?", "64 lowercase hex digits, or nothing")]
Digest = Annotated[bytes, length(32, 32)]
Size = Annotated[int, within(1, MAX_SIZE)]
Offset = Annotated[int, within(0, MAX_SIZE)]
Number = Annotated[int, within(0, (1 << 53) - 1)]
FileName = Annotated[
    str,
    matching(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", "a plain file name: letters, digits, . _ -"),
]
"""One component, and no dot in front: a received name cannot leave the folder it is written to."""
