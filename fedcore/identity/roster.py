"""The roster of a job, fixed with it, and the roster of a file, reloaded while a process runs.

A job keeps the sites and identity keys that it began with, whatever the federation's roster is later: at both ends they
are in the journal with it. `RosterFile` has the newest, which the next job gets.

Invariant: a file that is unreadable, malformed or refused never changes the roster: the last valid one stays in force,
and the problem is reported once for each change of the file.
"""

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from fedcore.files import stamp_of
from fedcore.identity.identities import read_roster
from fedcore.secagg.crypto.identity_key import roster_digest
from fedcore.secagg.plan import canonical
from fedcore.types import SiteId

ROSTER_KEY = "roster"
"""The key of a job's roster in a journal."""


@dataclass(frozen=True)
class Roster:
    """Sites with their pinned keys. sites: {site: 32-byte Ed25519 public key}, in the roster's order.

    number: of a signed roster, 1 or more; 0 for a file without a signature.
    """

    sites: Mapping[SiteId, bytes]
    number: int = 0

    @cached_property
    def digest(self) -> str:
        """Hex SHA-256 over names and keys in order. Raises RosterRefused."""
        return roster_digest(self.sites)

    def to_bytes(self) -> bytes:
        """For a journal."""
        rows = [[name, key.hex()] for name, key in self.sites.items()]
        return canonical({"number": self.number, "sites": rows})

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """What `to_bytes` gave."""
        found = json.loads(data)
        sites = {SiteId(name): bytes.fromhex(key) for name, key in found["sites"]}
        return cls(sites, found["number"])

    def changes(self, before: "Roster") -> list[str]:
        """What differs from an earlier roster, in words: one line each for sites added, removed, with another key."""
        old, new = before.sites, self.sites
        added, gone = [n for n in new if n not in old], [n for n in old if n not in new]
        rekeyed = [n for n in new if n in old and old[n] != new[n]]
        lines = [
            f"{len(names)} site{'s' * (len(names) > 1)} {what}: {', '.join(names)}"
            for names, what in ((added, "added"), (gone, "removed"), (rekeyed, "with another key"))
            if names
        ]
        if not lines and list(old) != list(new):
            lines.append("the order of the sites is another one")
        return lines


class RosterFile(Collection[SiteId]):
    """The newest roster, as last read from a file; a collection of the names of its sites.

    current: the roster to begin with. path: the file, None where nothing is reloaded. read: the roster of the file, as
    it may follow `current`; raises BadInput or Refused.
    """

    def __init__(
        self,
        current: Roster,
        path: Path | None = None,
        read: Callable[[Path, Roster], Roster] = lambda path, _: Roster(read_roster(path)),
    ) -> None:
        self.current = current
        self._path, self._read = path, read
        self._stamp: tuple[int, ...] = ()

    def refresh(self) -> bool:
        """Reload the file if it changed; True if the roster is another one now. Costs one stat.

        Raises what `read` raises, once for each change of the file; the roster stays as it was.
        """
        if self._path is None:
            return False
        stamp = stamp_of(self._path)
        if stamp == self._stamp:
            return False
        self._stamp = stamp  # before reading: a change while reading is seen next time
        found = self._read(self._path, self.current)
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
