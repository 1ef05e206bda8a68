"""Refusals are recorded now and then: whoever is refused a thousand times a second must not fill the disk."""

import time
from collections.abc import Callable, Hashable

SECONDS, MOST = 60.0, 60
"""So many are recorded in so many seconds, and each kind once."""


class Seldom:
    """Which events are recorded. clock: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: dict[Hashable, float] = {}

    def allows(self, kind: Hashable) -> bool:
        """Whether an event of this kind is recorded now."""
        now = self._clock()
        self._last = {each: at for each, at in self._last.items() if now - at < SECONDS}
        if kind in self._last or len(self._last) >= MOST:
            return False
        self._last[kind] = now
        return True
