"""Seconds spent at each stage of a simulated round."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

STAGES = ("train", "encode", "protect", "fold", "unprotect", "evaluate")


class Stopwatch:
    """Seconds spent per stage, summed over sites and rounds."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start
