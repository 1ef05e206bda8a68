"""Where the run's randomness comes from: one function of (seed, round, site, purpose), and the order of sets of text.

Invariant: the same four words always give the same numbers, whatever ran before, in whatever order or
process. Only training, rounding and splits draw from here: nothing under `secagg/crypto/` may (PROTOCOL Z).

Python draws the order of a set of text anew for every process, unless PYTHONHASHSEED is set. A task that numbers
words by the order of a set trains another model in every process. So the processes that train have one order:
training processes of a site are started with it, and the `fedcore` command starts itself once more.
Invariant: a user's own PYTHONHASHSEED is kept, but for the training processes of a site: those of all sites must
agree.
"""

from __future__ import annotations

import hashlib
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command fixes the order of sets before it imports anything
    import numpy as np

_NAME = "PYTHONHASHSEED"

FIXED_HASHES = {_NAME: "0"}
"""Environment of a process that trains."""

TRAINING_COMMANDS = frozenset(
    {"simulate", "compare", "reproduce", "up", "check", "predict", "export"}
)
"""Of `fedcore`: those that run a task's code. The others start without the 30 ms that it takes."""


def derive_seed(seed: int, round_: int, site: str, purpose: str) -> int:
    """A 63-bit seed: the first bytes of SHA-256 over the four words, each with its length."""
    words = (str(seed), str(round_), site, purpose)
    text = "".join(f"{len(word)}:{word}," for word in words)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, round_: int, site: str, purpose: str) -> np.random.Generator:
    """A counter-based NumPy generator (Philox) for these four words."""
    import numpy as np

    return np.random.Generator(np.random.Philox(derive_seed(seed, round_, site, purpose)))


def hash_seed() -> str:
    """The seed of this process's hashes: a number, or "random"."""
    found = os.environ.get(_NAME, "random")
    return found if found.isdigit() and not sys.flags.ignore_environment else "random"


def fix_hash_order() -> None:
    """Replace this process by one with the fixed order, unless PYTHONHASHSEED is set. Only for the start of a
    program: what it did until now is done again."""
    if _NAME not in os.environ and sys.executable and sys.orig_argv:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | FIXED_HASHES)  # noqa: S606
