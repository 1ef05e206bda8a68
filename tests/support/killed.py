"""A process that is killed between any two of its steps on the disk."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

STEPS = frozenset(
    {"open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"}
)
"""Audit events of Python that are raised before a step is made. Reading is one, too."""

KILLED, FAILED = 9, 1


def killed_before(step: int, work: Callable[[], object]) -> bool:
    """Do the work in a child process that ends, with nothing cleaned up, before this step on the disk, counted from 0;
    False if it came to its end. Raises AssertionError if the work failed."""
    child = os.fork()
    if not child:
        left = step

        def ends(event: str, _: tuple[object, ...]) -> None:
            nonlocal left
            if event in STEPS:
                if left == 0:
                    os._exit(KILLED)
                left -= 1

        code = FAILED
        try:
            sys.addaudithook(ends)
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, KILLED), f"the work failed before step {step}"
    return code == KILLED
