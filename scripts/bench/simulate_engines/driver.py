"""How an engine's process is driven by `fedcore bench simulate`: through its standard input and output.

`round` runs the next round and answers its seconds, `model PATH` writes the flat parameters, the end of the input ends
the process. Nothing else is written to that output: what a library prints goes to the log.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np


class Driver:
    """This process's end of the pipe to the benchmark."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._began = 0.0

    def say(self, **facts: object) -> None:
        self._out.write(json.dumps(facts) + "\n")

    def rounds(self, model: Callable[[], np.ndarray]) -> Iterator[None]:
        """Yields when a round is to run, and answers its seconds when it has; models are written in between."""
        for text in sys.stdin:
            command, _, path = text.strip().partition(" ")
            if command == "model":
                np.save(path, model())
                self.say(done=command)
                continue
            began = time.perf_counter()
            yield
            self.say(seconds=time.perf_counter() - began)
