"""The rate of a site's transfers: `max_mbit` and `max_mbit_hours` of its policy, for vectors, sums and checkpoints.

Messages of the session are small and pass. What is limited is the average: a part of at most 1 MiB travels at the speed
of the line, after the time that it takes at the limit.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime

from fedcore_clients.hours import Hours, when
from fedcore_clients.resources import MachineSection

LOG = logging.getLogger("fedcore.site.rate")

MBIT = 1_000_000
"""Bits: the unit of lines and of providers, and no power of two."""

_SECOND = 1_000_000_000


class TokenBucket:
    """Credit in bits, which grows with time up to `burst` bytes. Whole numbers only: no rounding adds up.

    now: nanoseconds of any clock that does not run backwards, with which it begins full."""

    def __init__(self, burst: int, now: int) -> None:
        self._most = 8 * burst * _SECOND
        self._credit, self._at = self._most, now
        """In bits times nanoseconds."""

    def take(self, size: int, rate: int, now: int) -> int:
        """Nanoseconds to wait before so many bytes may go, at a rate in bits a second. They are taken at once: those
        that are asked for meanwhile wait for both."""
        self._credit = min(self._most, self._credit + max(0, now - self._at) * rate)
        self._at = max(self._at, now)
        self._credit -= 8 * size * _SECOND
        return max(0, -(self._credit // rate))


class Pace:
    """What every transfer of a site passes. rules: the policy in force now; clock: nanoseconds."""

    BURST = 1 << 16
    """Bytes that go at once after a pause: a small vector whole."""

    def __init__(
        self,
        rules: Callable[[], MachineSection] = MachineSection,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._rules, self._now, self._clock = rules, now, clock
        self._up, self._down = (TokenBucket(self.BURST, clock()) for _ in range(2))
        self._told = ""

    async def sent(self, size: int) -> None:
        """Return once so many bytes may be sent."""
        await self._passed(self._up, size)

    async def received(self, size: int) -> None:
        """Return once the next may be read, after so many bytes: the coordinator then waits, by HTTP/2's windows."""
        await self._passed(self._down, size)

    async def _passed(self, bucket: TokenBucket, size: int) -> None:
        rate = self.rate
        self._tell()
        if rate is not None and (delay := bucket.take(size, rate, self._clock())):
            await asyncio.sleep(delay / _SECOND)

    @property
    def rate(self) -> int | None:
        """Bits a second now; None for no limit."""
        rules = self._rules()
        if rules.max_mbit is None or _begins(rules, self._now()) is not None:
            return None
        return round(rules.max_mbit * MBIT)

    @property
    def text(self) -> str:
        """In words, for the log and the status; "" without a limit."""
        return limit_text(self._rules(), self._now())

    def _tell(self) -> None:
        text = self.text
        if text != self._told:
            LOG.info("transfers: %s", text or "no limit any more")
        self._told = text


def limit_text(rules: MachineSection, now: datetime) -> str:
    """The limit in force, or the next one, in words; "" where the policy has none."""
    if rules.max_mbit is None:
        return ""
    limit = f"at most {rules.max_mbit:g} Mbit/s each way"
    begins = _begins(rules, now)
    if begins is not None:
        return f"no limit now; {limit} from {when(begins)}"
    return f"{limit}, {rules.max_mbit_hours or 'always'}"


def _begins(rules: MachineSection, now: datetime) -> datetime | None:
    """When the limit is in force again; None where it is now."""
    return Hours.of(rules.max_mbit_hours, rules.time_zone).closed_until(now)
