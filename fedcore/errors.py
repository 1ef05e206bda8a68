"""Every error Fedcore raises, split by whose fault it is, each with the exit code of the command line.

    FedcoreError
    |-- TaskFailed            1  the user's own task raised, or produced NaN
    |-- BadInput              2  a key, a path, a file or rows that cannot be used
    |   |-- UnknownName       2  a task, protection or key nobody knows; carries the nearest one
    |   `-- AlreadyExists     2  a directory that would be overwritten
    |-- Refused               3  understood, but a plan or policy says no
    |   |-- PlanRefused       3  no packing proves headroom; carries the largest value that fits
    |   |-- Unavailable       3  a protection whose library is missing or broken here
    |   `-- PeerRefused       3  bytes from the other side break a rule of the round
    |       |-- ChunkRefused  3  truncated, oversized, foreign or malformed ciphertext chunk
    |       `-- TagRefused    3  the sum is not of exactly the listed survivors, this round, each once
    `-- Abandoned             4  a round or run ended without a result

Invariant: a message says what, found and expected, and never contains a key, a share or an update's
value. `remedy` is the sentence the command line prints behind `hint:`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_DONE = 0
EXIT_TASK_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_REFUSED = 3
EXIT_ABANDONED = 4
EXIT_INTERRUPTED = 130


class FedcoreError(Exception):
    """Base of the tree: `str(error)` is one line; `remedy` is the next step, or empty."""

    exit_code = EXIT_BAD_INPUT

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy
        if remedy:
            self.add_note(f"hint: {remedy}")  # for notebooks; the command line prints it itself


class TaskFailed(FedcoreError):
    """The user's task raised; `user_traceback` starts at the user's own frame."""

    exit_code = EXIT_TASK_FAILED

    def __init__(self, message: str, *, user_traceback: str = "", remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.user_traceback = user_traceback


class BadInput(FedcoreError):
    """Something the caller gave cannot be used."""


class UnknownName(BadInput):
    """A name outside a closed list; the hint offers the nearest known one, or the whole list."""

    def __init__(self, what: str, found: str, known: Iterable[str]) -> None:
        names = sorted(known)
        near = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
        remedy = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(names)}"
        super().__init__(f"{what}: found {found!r}, which is not known", remedy=remedy)


class AlreadyExists(BadInput):
    """A directory that holds something already."""


class Refused(FedcoreError):
    """The request is understood and a rule says no."""

    exit_code = EXIT_REFUSED


class PlanRefused(Refused):
    """The plan cannot be proved safe, or breaks a rule of its protection."""


class Unavailable(Refused):
    """A protection that this machine cannot run; the others still can."""


class PeerRefused(Refused):
    """Material from the other side of a round breaks one of its rules."""


class ChunkRefused(PeerRefused):
    """A chunk of a protected vector is truncated, oversized, foreign or malformed."""


class TagRefused(PeerRefused):
    """PROTOCOL T: the opened sum is not the sum of the listed survivors of this round, each once."""


class Abandoned(FedcoreError):
    """The run ended without a result, and nothing was opened."""

    exit_code = EXIT_ABANDONED
