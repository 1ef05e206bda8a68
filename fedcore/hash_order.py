"""The order of a set of text: Python draws it anew for every process, unless PYTHONHASHSEED is set.

A task that numbers words by the order of a set trains another model in every process. So the processes that train
have one order: training processes of a site are started with it, and the `fedcore` command starts itself once more.

Invariant: a user's own PYTHONHASHSEED is kept, but for the training processes of a site: those of all sites must
agree.
"""

import os
import sys

_NAME = "PYTHONHASHSEED"

FIXED = {_NAME: "0"}
"""Environment of a process that trains."""

TRAINING_COMMANDS = frozenset(
    {"simulate", "compare", "reproduce", "up", "check", "predict", "export"}
)
"""Of `fedcore`: those that run a task's code. The others start without the 30 ms that it takes."""


def hash_seed() -> str:
    """The seed of this process's hashes: a number, or "random"."""
    found = os.environ.get(_NAME, "random")
    return found if found.isdigit() and not sys.flags.ignore_environment else "random"


def fix_hash_order() -> None:
    """Replace this process by one with the fixed order, unless PYTHONHASHSEED is set. Only for the start of a
    program: what it did until now is done again."""
    if _NAME not in os.environ and sys.executable and sys.orig_argv:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | FIXED)  # noqa: S606
