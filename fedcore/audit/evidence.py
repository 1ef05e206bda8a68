"""What files from elsewhere show about a trail: receipts, the coordinator's trail, trails of other sites, copies.

Invariant: a file counts only if every signature in it does: a receipt is the coordinator's, a trail is whole and of a
party of the federation. What one party says of another's trail is in lines that it signed itself. Of a site whose key
has left the roster, because it was revoked or replaced, lines from then on count for nothing: whoever has the key can
write them.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from fedcore.audit.coordinator_keys import coordinator_keys
from fedcore.audit.keys import site_key
from fedcore.audit.lines import Line, line_hash, text_of
from fedcore.audit.receipt import Receipt, read_receipts
from fedcore.audit.verification import Anchor, Verdict, Witness, verify
from fedcore.errors import BadInput, Refused
from fedcore.identity.signed_roster import KeptPin

COORDINATOR = ""
"""Whose trail is checked: this, or a site's name."""


@dataclass(frozen=True)
class Evidence:
    """anchors: lines that the trail must have; witnesses: rounds that it must have; notes: what does not count."""

    anchors: tuple[Anchor, ...] = ()
    witnesses: tuple[Witness, ...] = ()
    notes: tuple[str, ...] = ()

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(
            self.anchors + other.anchors, self.witnesses + other.witnesses, self.notes + other.notes
        )


@dataclass(frozen=True)
class TrustedParties:
    """What is needed to believe a file. of: the party whose trail is checked; pins: the sites' public keys, those of
    sites that have left as well, until then."""

    name: str
    authority_pem: bytes
    pins: Collection[KeptPin]
    of: str

    def read(self, path: Path) -> Evidence:
        """What a file shows. Raises BadInput for one that is neither receipts nor a trail, Refused for one whose
        signatures do not count."""
        try:
            data = path.read_bytes()
        except OSError as error:
            raise BadInput(f"--receipts: {path} cannot be read ({error.strerror})") from error
        try:
            Receipt.parse(data.partition(b"\n")[0])
        except BadInput:
            return self._of_trail(path, data)
        return Evidence(tuple(self._anchor(path, each) for each in read_receipts(data)))

    def _anchor(self, path: Path, receipt: Receipt) -> Anchor:
        receipt.check(self.authority_pem, self.name)
        if self.of == COORDINATOR:
            return receipt.of_coordinator
        if receipt.site != self.of:
            raise Refused(
                f"--receipts: {path}: found one of site {receipt.site}, expected site {self.of}"
            )
        return receipt.of_site

    def _of_trail(self, path: Path, data: bytes) -> Evidence:
        keys = coordinator_keys(data, self.authority_pem, self.name)
        if keys:
            lines = _whole(path, verify(data, keys))
            found = self._released(lines, "the coordinator's trail")
            return found + Evidence(tuple(_confirmed(lines, self.of)))
        for pin in self.pins:
            if f'"key":"{site_key(pin.key)}"'.encode() in data.partition(b"\n")[0]:
                every = _whole(path, verify(data, {site_key(pin.key)}))
                lines = _before(every, pin.until)
                noted = Evidence(notes=_notes(pin, every, lines))
                if pin.site != self.of:
                    return noted + self._released(lines, f"the trail of site {pin.site}")
                heads = (Anchor(*head, f"the copy {path.name}") for head in _heads(lines))
                return noted + Evidence(tuple(heads))
        raise BadInput(
            f"--receipts: found in {path} neither receipts nor a trail of this federation",
            remedy="give a site's audit.receipts.jsonl, or the audit.jsonl of another party",
        )

    def _released(self, lines: tuple[Line, ...], source: str) -> Evidence:
        """The releases that a party recorded and in which the one that is checked took part."""
        return Evidence(
            witnesses=tuple(
                Witness(
                    text_of(line.facts["header"]), line.time,
                    f"{source}, line {line.sequence}, has release {line.facts['number']} of "
                    f"job {line.facts['job']}",
                )
                for line in lines
                if line.event == "released"
                and (self.of == COORDINATOR or self.of in text_of(line.facts["survivors"]).split(","))
            )
        )  # fmt: skip


def _whole(path: Path, verdict: Verdict) -> tuple[Line, ...]:
    if verdict.findings:
        raise Refused(
            f"--receipts: {path}: {verdict.findings[0]}",
            remedy="what has been changed itself shows nothing: get the file again from its party",
        )
    return verdict.lines


def _before(lines: tuple[Line, ...], until: str) -> tuple[Line, ...]:
    """The lines before the first one that is later."""
    return tuple(takewhile(lambda line: not until or line.time <= until, lines))


def _notes(pin: KeptPin, every: tuple[Line, ...], lines: tuple[Line, ...]) -> tuple[str, ...]:
    if len(every) == len(lines):
        return ()
    first = every[len(lines)].sequence
    return (
        f"the trail of site {pin.site} from line {first} on counts for nothing: its key left the roster at {pin.until}",
    )


def _heads(lines: tuple[Line, ...]) -> list[tuple[int, str]]:
    """Number and hash of the last line, if there is one."""
    return [(line.sequence, line_hash(line.to_bytes())) for line in lines[-1:]]


def _confirmed(lines: tuple[Line, ...], site: str) -> list[Anchor]:
    """What a coordinator's trail has of a site's."""
    return [
        Anchor(
            int(text_of(line.facts["number"])), text_of(line.facts["hash"]),
            f"line {line.sequence} of the coordinator's trail ({line.time[:19]})",
        )
        for line in lines
        if line.event == "receipt" and line.facts.get("site") == site
    ]  # fmt: skip
