"""Revoked certificates: a text file, reloaded while the coordinator runs.

One serial number or SHA-256 fingerprint a line, in hexadecimal, colons allowed; `#` begins a comment:

    # va's laptop was stolen
    3f:a9:04:...:11

Invariant: an unreadable or malformed file never removes an entry: the last valid list stays in force, and the
problem is reported once for each change of the file.
"""

import re
from pathlib import Path

from fedcore.errors import BadInput, CertificateRefused
from fedcore.files import WatchedFile
from fedcore.identity.kit import read_limited
from fedcore.identity.peer import Peer

EMPTY = b"# serial numbers or SHA-256 fingerprints of withdrawn certificates, one a line\n"
"""A list without entries. An empty file is refused: an editor may be about to write it."""

_FINGERPRINT_DIGITS = 64
_ENTRY = re.compile(f"[0-9a-f]{{1,40}}|[0-9a-f]{{{_FINGERPRINT_DIGITS}}}")
"""A serial number has at most 20 bytes (RFC 5280 section 4.1.2.2), a fingerprint 32."""


class Revocations:
    """The revoked certificates, as last read from a file; none without a file."""

    def __init__(self, path: Path | None = None) -> None:
        """Read the list. Raises BadInput for a missing or malformed file, so that the coordinator does not start."""
        self._file = WatchedFile(path)
        self._revoked: frozenset[str] = frozenset()
        self.refresh()

    def refresh(self) -> bool:
        """Reload the file if it changed; True if it did. Costs one stat. Raises BadInput, once for each change of the
        file; the last valid list stays in force."""
        path = self._file.path
        if path is None or not self._file.changed():
            return False
        self._revoked = _parse(path)
        return True

    def check(self, peer: Peer) -> None:
        """Raise CertificateRefused if the certificate is revoked. Reads no file."""
        if {peer.serial, peer.fingerprint} & self._revoked:
            raise CertificateRefused(
                f"certificate of {peer}: found it withdrawn, expected one in force",
                check="revoked",
                remedy="ask the operator why; a new certificate has a new serial number",
            )


def _parse(path: Path) -> frozenset[str]:
    try:
        text = read_limited(path, "a list of serial numbers").decode()
    except BadInput as error:
        raise _trouble(str(error)) from error
    except UnicodeDecodeError:
        raise _trouble(f"{path}: found bytes that are no text, expected UTF-8") from None
    if not text.endswith("\n"):
        raise _trouble(
            f"{path}: found no end of line at its end, expected a file written to its end"
        )
    revoked = set()
    for number, line in enumerate(text.split("\n"), start=1):
        entry = line.partition("#")[0].strip().replace(":", "").lower()
        if not entry:
            continue
        if not _ENTRY.fullmatch(entry):
            found = f"{path}: line {number}: found {line.strip()[:80]!r}"
            expected = "a serial number or a SHA-256 fingerprint in hexadecimal"
            raise _trouble(f"{found}, expected {expected}")
        is_fingerprint = len(entry) == _FINGERPRINT_DIGITS
        revoked.add(entry if is_fingerprint else f"{int(entry, 16):x}")
    return frozenset(revoked)


def _trouble(found: str) -> BadInput:
    return BadInput(
        f"{found}; the list read before stays in force",
        remedy="write a new file beside it and rename it; a list of nobody is one comment line",
    )
