"""The coordinator confirms the sites' audit trails: a line of its own trail, then a receipt.

Invariant: what a receipt confirms is in the coordinator's trail before the receipt is sent. A site whose trail is
shorter than what was confirmed before, or another one, gets its receipt, and the line says so.
"""

import logging
import time
from collections.abc import Callable

from fedcore.audit.keys import CoordinatorSigner
from fedcore.audit.receipt import Receipt, confirmed_heads
from fedcore.audit.trail import AuditTrail
from fedcore.errors import StoreProblem
from fedcore.wire import frames

LOG = logging.getLogger("fedcore.coordinator")

PAUSE_SECONDS = 0.5
"""Between two receipts of a site; a head that comes earlier is not confirmed, and the next one is."""


class Receipts:
    """The receipts of one coordinator."""

    def __init__(
        self,
        trail: AuditTrail,
        signer: CoordinatorSigner,
        federation: str,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._trail, self._signer, self._federation, self._clock = trail, signer, federation, clock
        self._heads = dict(confirmed_heads(trail.read()))
        self._given: dict[str, float] = {}

    def confirm(self, site: str, head: frames.TrailHead) -> frames.TrailReceipt | None:
        """The receipt for the head of a site's trail; None where one was given just now, or the disk refuses."""
        now, digest = self._clock(), head.hash.hex()
        if now - self._given.get(site, -PAUSE_SECONDS) < PAUSE_SECONDS:
            return None
        number, known = self._heads.get(site, (0, ""))
        word = "confirmed"
        if head.number < number or (head.number == number and digest != known):
            word = "shorter than confirmed" if head.number < number else "other than confirmed"
            LOG.warning(
                "site %s: its audit trail ends at number %d, expected the one confirmed up to number %d",
                site, head.number, number,
            )  # fmt: skip
        try:
            self._trail.record("receipt", site=site, number=head.number, hash=digest, word=word)
        except StoreProblem as error:
            LOG.warning("receipt for site %s: not given: %s", site, error)
            return None
        self._given[site], self._heads[site] = now, (head.number, digest)
        found = Receipt(
            self._federation, site, head.number, digest, *self._trail.head,
            int(time.time() * 1000), self._signer.certificate.decode(),
        ).signed(self._signer)  # fmt: skip
        return frames.TrailReceipt(
            found.number, head.hash, found.time_ms, found.own_number,
            bytes.fromhex(found.own_hash), self._signer.certificate, found.signature,
        )  # fmt: skip
