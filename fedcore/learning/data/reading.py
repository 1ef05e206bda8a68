"""Reading a dataset item by item before training, and who is told how far it has come.

Labels, digests and ids that a dataset does not list mean one pass over all of its items, which may be files.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

REPORT_SECONDS = 1.0
"""Between two reports of one pass; a shorter pass has none."""

OnRead = Callable[[str, int, int], object]
"""Told whose rows are read, how many were, and out of how many."""

_clock = time.monotonic

_on_read: ContextVar[OnRead | None] = ContextVar("on_read", default=None)


@contextmanager
def reporting_to(on_read: OnRead) -> Iterator[None]:
    """Call `on_read` about every second while the block reads items, and at the end of each pass that it heard of."""
    token = _on_read.set(on_read)
    try:
        yield
    finally:
        _on_read.reset(token)


def each_item(dataset: Any, picked: Sequence[int], where: str) -> Iterator[Any]:
    """The items at these places, in their order. where: whose they are. Raises what the dataset raises."""
    on_read, said = _on_read.get(), _clock()
    told = False
    for read, index in enumerate(picked, start=1):
        yield dataset[index]
        if on_read is None:
            continue
        now, last = _clock(), read == len(picked)
        if now - said >= REPORT_SECONDS or (told and last):
            said, told = now, True
            on_read(where, read, len(picked))
