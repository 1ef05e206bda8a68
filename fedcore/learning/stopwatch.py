"""Seconds spent at each stage of a simulated round."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STAGES = ("train", "encode", "protect", "fold", "unprotect", "evaluate")


class Stopwatch:
    """Seconds spent per stage, summed over sites and rounds. clock: in seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._clock = clock

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            self.seconds[stage] += self._clock() - start
