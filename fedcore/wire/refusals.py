"""An error on its way to the other side: a status and one line of details, which give the error again.

Invariant: only errors of `fedcore.errors` say what happened, because only those never hold a secret or
a value; any other exception travels as "the coordinator failed", and its text stays in the log there.
"""

from __future__ import annotations

import json

from fedcore import errors
from fedcore.errors import Abandoned, BadInput, FedcoreError, MalformedMessage, Refused
from fedcore.identity.verify import refusal_from

MOST = 600
"""Characters of a sentence: the details are a header, and headers have 8 KiB in all."""

_CLASSES: dict[int, type[FedcoreError]] = {
    errors.EXIT_BAD_INPUT: BadInput,
    errors.EXIT_REFUSED: Refused,
    errors.EXIT_ABANDONED: Abandoned,
}


def status_of(error: Exception) -> tuple[str, str]:
    """(name of a grpc.StatusCode, details) to end a call with."""
    if not isinstance(error, FedcoreError) or error.exit_code not in _CLASSES:
        return "INTERNAL", _details("the coordinator failed", "its log says why", 1)
    if isinstance(error, (BadInput, MalformedMessage)):
        code = "INVALID_ARGUMENT"
    else:
        code = "ABORTED" if isinstance(error, Abandoned) else "FAILED_PRECONDITION"
    return code, _details(str(error), error.remedy, error.exit_code)


def _details(line: str, hint: str, code: int) -> str:
    return json.dumps({"error": _short(line), "hint": _short(hint), "exit": code})


def error_of(details: str) -> FedcoreError | None:
    """The error that a call ended with, as the other side told it; None for grpc's own statuses.

    Its class gives the exit code; what it was there exactly is not told.
    """
    try:
        found = json.loads(details)
        line, hint, code = found["error"], found["hint"], found["exit"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not isinstance(line, str) or not isinstance(hint, str) or not isinstance(code, int):
        return None
    return _CLASSES.get(code, Refused)(_short(line), remedy=_short(hint))


def told(status: str, details: str) -> FedcoreError | None:
    """What the coordinator said of a call that ended with this grpc.StatusCode; None: grpc's own words."""
    if status == "PERMISSION_DENIED":
        return refusal_from(details)
    return error_of(details)


def _short(text: str) -> str:
    """One line that is safe in a terminal, whoever wrote it."""
    line = "".join(each if each.isprintable() else " " for each in text)
    return line if len(line) <= MOST else f"{line[: MOST - 3]}..."
