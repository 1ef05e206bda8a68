"""The process between the TUN devices of `fedcore/bench/wan.py`: it delays IP packets and limits their rate.

A packet leaves when the ones before it have left, at the rate of the link, and arrives one delay later. One that finds
more than the buffer waiting is dropped, as a router does.
"""

import os
import select
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

LONGEST = 2048
"""Bytes read of a packet at most: more than the MTU."""


@dataclass
class Direction:
    """One direction of a link. source, target: devices; delay: seconds; rate: bytes a second; buffer: bytes."""

    source: int
    target: int
    delay: float
    rate: float
    buffer: int
    _free_at: float = 0.0
    _under_way: deque[tuple[float, bytes]] = field(default_factory=deque)

    def take(self, packet: bytes, now: float) -> None:
        """A packet at the source."""
        start = max(now, self._free_at)
        if (start - now) * self.rate > self.buffer:
            return
        self._free_at = start + len(packet) / self.rate
        self._under_way.append((self._free_at + self.delay, packet))

    def due(self, now: float) -> list[bytes]:
        """The packets that have arrived."""
        found = []
        while self._under_way and self._under_way[0][0] <= now:
            found.append(self._under_way.popleft()[1])
        return found

    @property
    def next(self) -> float:
        """When the next packet arrives."""
        return self._under_way[0][0] if self._under_way else float("inf")


def forward(directions: Sequence[Direction]) -> None:
    """Pass packets on until a device ends."""
    sources = {each.source: each for each in directions}
    while True:
        now = time.monotonic()
        wait = min(each.next for each in directions) - now
        ready, _, _ = select.select([*sources], [], [], max(0.0, min(wait, 60.0)))
        now = time.monotonic()
        for source in ready:
            with suppress(BlockingIOError):
                while packet := os.read(source, LONGEST):
                    sources[source].take(packet, now)
        now = time.monotonic()
        for each in directions:
            for packet in each.due(now):
                with suppress(OSError):  # a device that is not up yet takes none
                    os.write(each.target, packet)


def main(words: Sequence[str]) -> None:
    """`python -m fedcore.bench.slow_link DELAY RATE BUFFER DEVICE DEVICE ...`: two open devices for each link."""
    delay, rate, buffer = float(words[0]), float(words[1]), int(words[2])
    opened = [int(each) for each in words[3:]]
    both = zip(opened[::2], opened[1::2], strict=True)
    forward([Direction(*way, delay, rate, buffer) for a, b in both for way in ((a, b), (b, a))])


if __name__ == "__main__":
    main(sys.argv[1:])
