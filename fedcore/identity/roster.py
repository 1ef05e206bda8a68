"""The roster of a job, fixed with it, and the roster of a file, reloaded while a process runs.

A job keeps the sites and identity keys that it began with, whatever the federation's roster is later: at both ends they
are in the journal with it. `RosterFile` has the newest, which the next job gets.

Invariant: a file that is unreadable, malformed or refused never changes the roster: the last valid one stays in force,
and the problem is reported once for each change of the file.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Self

from fedcore.errors import RosterRefused
from fedcore.files import WatchedFile
from fedcore.identity.signed_roster import read_pins
from fedcore.secagg.crypto.identity_key import roster_digest
from fedcore.secagg.plan import canonical
from fedcore.types import SiteId

ROSTER_KEY = "roster"
"""The key of a job's roster in a journal."""


@dataclass(frozen=True)
class PinnedRoster:
    """Sites with their pinned keys. sites: {site: 32-byte Ed25519 public key}, in the roster's order.

    number: of a signed roster, 1 or more; 0 for a file without a signature. document: the signed file.
    """

    sites: Mapping[SiteId, bytes]
    number: int = 0
    document: bytes = field(default=b"", repr=False, compare=False)

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 over names and keys in order. Raises RosterRefused."""
        return roster_digest(self.sites)

    def to_bytes(self) -> bytes:
        """For a journal; without the document."""
        rows = [[name, key.hex()] for name, key in self.sites.items()]
        return canonical({"number": self.number, "sites": rows})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """What `to_bytes` gave."""
        found = json.loads(data)
        sites = {SiteId(name): bytes.fromhex(key) for name, key in found["sites"]}
        return cls(sites, found["number"])

    def follows(self, before: "PinnedRoster", where: str) -> None:
        """Return if this roster may take the place of an earlier one.

        Raises RosterRefused for an older number, the same number with other content, and a roster without a number
        after a signed one.
        """
        found, expected = f"number {self.number}", f"{before.number} or newer, the newest seen here"
        if self.number == before.number and self.number and self.digest != before.digest:
            found, expected = f"number {self.number} with other sites", "one roster of each number"
        elif self.number >= before.number:
            return
        elif not self.number:
            found, expected = "a roster without a number", f"number {expected}"
        raise RosterRefused(
            where, found, expected, "coordinator",
            remedy="an older or a second roster may list a site that was removed: ask the federation's operator",
        )  # fmt: skip


def read_file(path: Path, authority_pem: bytes, federation: str) -> PinnedRoster:
    """The roster of a file, verified where it is signed. Raises BadInput, SignatureRefused, RosterRefused."""
    sites, signed = read_pins(path, authority_pem, federation)
    if signed is None:
        return PinnedRoster(sites)
    return PinnedRoster(sites, signed.number, signed.to_toml())


class RosterFile(Collection[SiteId]):
    """The newest roster, as last read from a file; a collection of the names of its sites.

    current: the roster to begin with. path: the file, None where nothing is reloaded. authority_pem, federation: what a
    signed roster is verified against.
    """

    def __init__(
        self,
        current: PinnedRoster,
        path: Path | None = None,
        authority_pem: bytes = b"",
        federation: str = "",
    ) -> None:
        self.current = current
        self._file, self._authority, self._federation = WatchedFile(path), authority_pem, federation

    def known(self) -> None:
        """The file as it is now is no change: `current` was chosen with it in mind."""
        self._file.known()

    def refresh(self) -> bool:
        """Reload the file if it changed; True if the roster is another one now. Costs one stat.

        Raises BadInput, SignatureRefused and RosterRefused, once for each change of the file; the roster stays as it
        was.
        """
        path = self._file.path
        if path is None or not self._file.changed():
            return False
        found = read_file(path, self._authority, self._federation)
        found.follows(self.current, str(path))
        if (found.number, found.digest) == (self.current.number, self.current.digest):
            return False
        self.current = found
        return True

    def __contains__(self, name: object) -> bool:
        return name in self.current.sites

    def __iter__(self) -> Iterator[SiteId]:
        return iter(self.current.sites)

    def __len__(self) -> int:
        return len(self.current.sites)
