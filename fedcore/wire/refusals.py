"""An error on the wire: a gRPC status and details from which the other side makes the error again.

Invariant: only the text of errors of `fedcore.errors` is sent, because only those never contain a secret or
a value; any other exception is sent as "the coordinator failed", and its text stays in the log there.
"""

import json

from fedcore import errors
from fedcore.errors import (
    BadInput,
    CertificateRefused,
    FedcoreError,
    PeerRefused,
    Refused,
    printable,
)

MOST = 600
"""Characters of one text: the details are a header, and all headers together have 8 KiB."""

_CLASSES: dict[int, type[FedcoreError]] = {
    errors.EXIT_BAD_INPUT: BadInput, errors.EXIT_REFUSED: Refused,
    errors.EXIT_ABANDONED: errors.Abandoned,
}  # fmt: skip


def status_of(error: Exception) -> tuple[str, str]:
    """(name of a grpc.StatusCode, details as JSON) to end a call with."""
    if not isinstance(error, FedcoreError) or error.exit_code not in _CLASSES:
        return "INTERNAL", _details("the coordinator failed", "its log says why", 1)
    if isinstance(error, (BadInput, errors.MalformedMessage)):
        code = "INVALID_ARGUMENT"
    else:
        code = "ABORTED" if isinstance(error, errors.Abandoned) else "FAILED_PRECONDITION"
    return code, _details(str(error), error.remedy, error.exit_code)


def _details(line: str, hint: str, code: int) -> str:
    return json.dumps({"error": printable(line, MOST), "hint": printable(hint, MOST), "exit": code})


def error_of(details: str) -> FedcoreError | None:
    """The error from the details of a call's status; None for statuses of grpc itself. Its class has the exit
    code of the original; the exact class is not sent."""
    try:
        found = json.loads(details)
        line, hint, code = found["error"], found["hint"], found["exit"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not isinstance(line, str) or not isinstance(hint, str) or not isinstance(code, int):
        return None
    return _CLASSES.get(code, Refused)(printable(line, MOST), remedy=printable(hint, MOST))


def refusal_text(error: PeerRefused) -> str:
    """A refusal as text for the other side: the check, the line and the hint."""
    check = error.check if isinstance(error, CertificateRefused) else ""
    return f"{check}\n{error}\n{error.remedy}"


def refusal_from(text: str) -> CertificateRefused:
    """The inverse of `refusal_text`, total on any text: the sender is not trusted."""
    check, _, rest = text.partition("\n")
    line, _, remedy = rest.partition("\n")
    if not line:
        check, line = "accepted", text
    return CertificateRefused(
        f"refused by the coordinator: {printable(line)}",
        check=printable(check),
        remedy=printable(remedy),
    )


def told(status: str, details: str) -> FedcoreError | None:
    """The coordinator's error for a call that ended with this grpc.StatusCode; None for grpc's own statuses."""
    if status == "PERMISSION_DENIED":
        return refusal_from(details)
    return error_of(details)
