"""Downloads that wait for the sum of a round: a site asks before the sum exists, and need not ask when it does.

Invariant (PROTOCOL D): no byte of a sum leaves here before its announcement is on disk and sent to that site.
"""

import asyncio

from fedcore.store.spool import Stored
from fedcore.types import SiteId


class AnnouncedSums:
    """Of one job: the sum of the round under way, and the sites that wait for it, each with one download."""

    def __init__(self) -> None:
        self._told: dict[SiteId, tuple[bytes, Stored]] = {}
        self._waiting: dict[SiteId, tuple[bytes, asyncio.Future[Stored | None]]] = {}

    async def wait(self, site: SiteId, header: bytes) -> Stored | None:
        """The sum of this round, once it is announced to the site; None where the round ends before, or the site asks
        again."""
        of, stored = self._told.get(site, (b"", None))
        if of == header:
            return stored
        self._answer(site, None)
        waiting: asyncio.Future[Stored | None] = asyncio.get_running_loop().create_future()
        self._waiting[site] = header, waiting
        return await waiting

    def announce(self, site: SiteId, header: bytes, stored: Stored | None) -> None:
        """The announcement is being sent to this site. stored: None for a sum that is not on this machine."""
        if stored is not None:
            self._told[site] = header, stored
        of, _ = self._waiting.get(site, (b"", None))
        self._answer(site, stored if of == header else None)

    def over(self) -> None:
        """The round has ended, or is read from disk again: who waits is told that there is no sum."""
        self._told.clear()
        for site in list(self._waiting):
            self._answer(site, None)

    def _answer(self, site: SiteId, stored: Stored | None) -> None:
        _, waiting = self._waiting.pop(site, (b"", None))
        if waiting is not None and not waiting.done():  # the call may have ended
            waiting.set_result(stored)
