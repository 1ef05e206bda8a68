"""A site has the end of its audit trail confirmed by the coordinator, and keeps the receipts.

Invariant: a receipt is kept only if the coordinator's certificate and signature count, and if it is for a line that
this trail has; the next line of the trail names it.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from fedcore.audit.receipt import Receipt
from fedcore.audit.trail import Recorder
from fedcore.errors import Refused, StoreProblem
from fedcore.files.disk import refusals
from fedcore.identity.kit import Kit
from fedcore.identity.verify import fingerprint
from fedcore.wire.frames import TrailHead, TrailReceipt

LOG = logging.getLogger("fedcore.site")

LINES, SECONDS = 32, 10.0
"""A receipt is asked for after so many new lines, or so long after a new one: at most these are unconfirmed."""


class Receipts:
    """The receipts of one site. send: a frame, if there is a session; clock: monotonic seconds."""

    def __init__(
        self,
        audit: Recorder,
        folder: Path,
        kit: Kit,
        send: Callable[[TrailHead], object],
        clock: Callable[[], float],
    ) -> None:
        self._audit, self._folder, self._kit, self._send, self._clock = (
            audit, folder, kit, send, clock,
        )  # fmt: skip
        self._asked: TrailHead | None = None
        self._confirmed, self._at = 0, clock()
        """Number of the line after the last receipt, and when one was last asked for."""

    def ask(self) -> None:
        """Have the last line confirmed."""
        number, digest = self._audit.head
        if number:
            self._asked, self._at = TrailHead(number, bytes.fromhex(digest)), self._clock()
            self._send(self._asked)

    def tick(self) -> None:
        """Ask if there is enough that is not confirmed."""
        new = self._audit.head[0] - self._confirmed
        late = self._clock() - self._at >= SECONDS
        if new >= LINES or (new > 0 and late):
            self.ask()

    def take(self, frame: TrailReceipt) -> None:
        """Keep a receipt. One that does not count is logged and dropped; as is one where the disk refuses."""
        asked, peer = self._asked, self._kit.peer
        found = Receipt(
            peer.federation, peer.name, frame.number, frame.hash.hex(), frame.own_number,
            frame.own_hash.hex(), frame.time_ms, frame.certificate.decode(errors="replace"),
            frame.signature,
        )  # fmt: skip
        if asked is None or (asked.number, asked.hash) != (frame.number, frame.hash):
            LOG.warning("audit: found a receipt for another line than was sent; dropped")
            return
        try:
            found.check(self._kit.authority_pem, peer.federation)
            with refusals("audit", self._folder):
                found.append(self._folder)
            by = fingerprint(frame.certificate)
            about = {"hash": found.hash, "time": found.when, "coordinator": by}
            self._audit.record("receipt", number=found.number, **about)
        except (Refused, StoreProblem) as error:
            LOG.warning("audit: %s; dropped", error)
            return
        self._asked, self._confirmed = None, self._audit.head[0]
