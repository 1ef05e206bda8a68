"""What is wrong with an audit trail, and at which line. Nothing is needed but files.

Without the signing key no line can be changed or added unnoticed, none deleted, and none moved: each has a signature,
a number and the hash of the line before. That lines are missing at the end, and that a holder of the key wrote the end
again, only a statement made elsewhere shows: an `Anchor`, of a receipt or of another party's trail.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from fedcore.audit.lines import NOTHING, Line, line_hash
from fedcore.errors import BadInput


@dataclass(frozen=True)
class Flaw:
    """line: of the file, from 1; for lines that are missing, the one before which they were."""

    line: int
    what: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.what}"


@dataclass(frozen=True)
class Anchor:
    """The number and hash that a trail's line had, as somebody else signed it. source: who and where."""

    sequence: int
    hash: str
    source: str


@dataclass(frozen=True)
class Witness:
    """A round of which the trail must have a line. header: digest of its header, hex; time: of the release, UTC."""

    header: str
    time: str
    source: str


@dataclass(frozen=True)
class Verdict:
    """lines: of the file; head: number and hash of the last one; proven: number of the last line that a receipt
    confirms, 0 without; findings: what is wrong, in the order of the file."""

    lines: tuple[Line, ...]
    head: tuple[int, str]
    proven: int
    findings: tuple[Flaw, ...]


@dataclass
class _Reader:
    """The state after some lines. numbers: {sequence: (line of the file, hash)}."""

    trusted: Collection[str]
    key: str = ""
    sequence: int = 0
    hash: str = NOTHING
    bad: int = 0
    """How many lines just before cannot be believed; each stands for a number, or was inserted."""
    lines: list[Line] = field(default_factory=list)
    numbers: dict[int, tuple[int, str]] = field(default_factory=dict)
    places: list[int] = field(default_factory=list)
    """Of `lines`: where each is in the file."""
    findings: list[Flaw] = field(default_factory=list)

    def take(self, number: int, raw: bytes) -> None:
        """The next line of the file."""
        digest = line_hash(raw)
        try:
            line = Line.parse(raw)
        except BadInput:
            self._bad(number, "changed or inserted: it is no line of a trail")
            return
        key = str(line.facts.get("key", "")) if line.event == "opened" else self.key
        if key not in self.trusted:
            self._bad(number, _unknown(key, line))
            return
        if not line.signed_by(key):
            self._bad(number, "changed or inserted: its signature is not that of the trail's key")
            return
        self._place(number, line)
        self.key, self.sequence, self.hash, self.bad = key, line.sequence, digest, 0
        self.lines.append(line)
        self.places.append(number)
        self.numbers.setdefault(line.sequence, (number, digest))

    def _place(self, number: int, line: Line) -> None:
        expected, found = self.sequence + 1, line.sequence
        if found < expected:
            self._find(
                number, f"moved or repeated: it is number {found}, behind number {self.sequence}"
            )
        elif found > expected + self.bad:
            self._find(number, f"before it {_numbers(expected + self.bad, found - 1)} missing")
        elif line.before != self.hash and not self.bad:
            what = (
                f"number {self.sequence} before it is another line than when this one was written"
            )
            self._find(number, what)

    def _bad(self, number: int, what: str) -> None:
        self._find(number, what)
        self.bad += 1

    def _find(self, number: int, what: str) -> None:
        self.findings.append(Flaw(number, what))


def verify(
    data: bytes,
    trusted: Collection[str],
    anchors: Iterable[Anchor] = (),
    witnesses: Iterable[Witness] = (),
) -> Verdict:
    """Check a trail's bytes. trusted: the keys that may have signed it, as `opened` lines name them."""
    whole, _, rest = data.rpartition(b"\n")
    rows = whole.split(b"\n") if whole else []
    reader = _Reader(trusted)
    for number, raw in enumerate(rows, 1):
        reader.take(number, raw)
    if rest:
        what = "cut off, or still being written: it does not end with a line feed"
        reader.findings.append(Flaw(len(rows) + 1, what))
    proven, found = _anchored(reader, len(rows) + bool(rest), anchors)
    missing = _missing(reader, len(rows) + bool(rest), witnesses)
    findings = tuple(sorted([*reader.findings, *found, *missing], key=lambda each: each.line))
    return Verdict(tuple(reader.lines), (reader.sequence, reader.hash), proven, findings)


def _anchored(reader: _Reader, lines: int, anchors: Iterable[Anchor]) -> tuple[int, list[Flaw]]:
    """The number of the last line that is confirmed, and what contradicts the anchors."""
    proven, findings = 0, []
    for anchor in anchors:
        number, digest = reader.numbers.get(anchor.sequence, (0, ""))
        if digest == anchor.hash:
            proven = max(proven, anchor.sequence)
        elif number:
            what = f"number {anchor.sequence} is another line than {anchor.source} confirms"
            findings.append(Flaw(number, what))
        elif anchor.sequence > reader.sequence:
            missing = _numbers(reader.sequence + 1, anchor.sequence)
            findings.append(
                Flaw(lines + 1, f"cut off: {missing} missing, which {anchor.source} confirms")
            )
    return proven, findings


def _missing(reader: _Reader, lines: int, witnesses: Iterable[Witness]) -> list[Flaw]:
    """The rounds without a line. Those before the trail began are none of it."""
    headers = {line.facts.get("header") for line in reader.lines}
    found = []
    for witness in witnesses:
        if witness.header in headers or not reader.lines or witness.time < reader.lines[0].time:
            continue
        later = (
            place for line, place in zip(reader.lines, reader.places, strict=True)
            if line.time > witness.time
        )  # fmt: skip
        found.append(
            Flaw(next(later, lines + 1), f"before it no line of a round is there: {witness.source}")
        )
    return found


def _unknown(key: str, line: Line) -> str:
    if not key:
        return "no line before it says that the trail was opened: the beginning is missing"
    if line.event == "opened":
        return f"opened with another key than this party's ({key[:24]}...)"
    return "signed under another key than this party's"


def _numbers(first: int, last: int) -> str:
    return f"number {first} is" if first == last else f"numbers {first} to {last} are"
