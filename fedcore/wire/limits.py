"""Limits of frame fields, annotated at the field: `Annotated[str, text(1, 64)]`.

Invariant: `found` describes a refused value by its type and length and never quotes it, so that a peer
cannot write into a log through an error message.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Annotated, Any

KIB, MIB = 1 << 10, 1 << 20

MAX_RECORD = 16 * MIB
"""Bytes of one protocol message. The largest known are the grants of a key epoch among 500 sites, 8.5 MiB at
17 KiB each; a delivery to one of 64 sites is below 0.5 MiB."""

SITE_RECORD = 256 * KIB
"""Bytes of a site's message of any type but grants: 64 key shares are about 0.1 MiB. Decoding the worst case
takes the coordinator 0.06 s; at 4 MiB it would take 1 s."""

SITE_WORDS = 32 * KIB
"""Bytes of a site's message about itself alone, such as its keys of an epoch: 1.4 KiB."""

GRANT = 48 * KIB
"""Bytes of one grant of a key epoch: 17 KiB at ring degree 2048, 33 KiB at 4096, and the longest names."""

MOST_ITEMS = 1024
"""Items of one list in a record of a site: one for a site, a metric or a block of metric sums."""

PART = MIB
"""Bytes of one part of a vector or file; every part but the last has exactly this length."""

INLINE = 64 * KIB
"""Bytes up to which a vector travels inside the session."""

SMALL = INLINE + 4 * KIB
"""Bytes of any other frame of a session."""

MAX_JSON, MAX_TOML = MIB, 256 * KIB

MAX_ROSTER = MIB
"""Bytes of a signed roster; a site has about 150."""

MAX_SIZE = 1 << 40
"""Bytes of a vector: above any model, and far below 2^64."""


@dataclass(frozen=True)
class Limit:
    """One rule for a field's value. expected: its text in an error; allows: whether a value of the right type fits."""

    expected: str
    allows: Callable[[Any], bool]


def found(value: object) -> str:
    """A description of a refused value that does not quote it."""
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
    """Printable characters, safe in a log and a terminal: no line break, escape or direction mark."""
    return Limit(
        f"{least} to {most} printable characters, none of them a blank at an end",
        lambda value: (
            least <= len(value) <= most and value.isprintable() and value == value.strip()
        ),
    )


def matching(pattern: str, expected: str) -> Limit:
    """Text that matches the whole pattern."""
    return Limit(expected, lambda value: re.fullmatch(pattern, value) is not None)


def one_of(words: Collection[str]) -> Limit:
    """A string of a fixed list."""
    return Limit(f"one of: {', '.join(words)}", lambda value: value in words)


def length(least: int, most: int) -> Limit:
    """A number of bytes or items in a closed range."""
    expected = f"{least}" if least == most else f"{least} to {most}"
    return Limit(expected, lambda value: least <= len(value) <= most)


def within(least: int, most: int) -> Limit:
    """A number in a closed range."""
    return Limit(f"{least} to {most}", lambda value: least <= value <= most)


Id = Annotated[str, text(1, 64)]
"""Name of a job, a site, a task or a federation."""

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
"""One path component without a leading dot: a received file stays in its target folder."""
