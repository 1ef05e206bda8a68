"""Receipts: the coordinator's signature over the last line of a site's trail, and over its own at that moment.

A trail's end can be cut off by anybody, and be written again by a holder of its key. A receipt that is kept elsewhere
shows both, up to the line that it is for. It is also the other way round: a site's receipts show whether the
coordinator's trail is the one that it had then.
Invariant: a receipt counts if its certificate was issued by the federation's authority to its coordinator; it names
the federation and the site, so that it is for one trail only.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

from fedcore.audit.coordinator_keys import trusted_key
from fedcore.audit.keys import Signer, signature_holds
from fedcore.audit.lines import Line, stamp
from fedcore.audit.verification import Anchor
from fedcore.errors import BadInput, CertificateRefused, Refused
from fedcore.files import append_row
from fedcore.secagg.crypto.symmetric import framed
from fedcore.types import Json

LABEL = b"audit receipt"
RECEIPTS_FILE = "audit.receipts.jsonl"


@dataclass(frozen=True)
class Receipt:
    """number, hash: of the site's last line; own_number, own_hash: of the coordinator's; time_ms: since 1970 UTC.

    certificate: of the coordinator, PEM; signature: under its key, empty while unsigned.
    """

    federation: str
    site: str
    number: int
    hash: str
    own_number: int
    own_hash: str
    time_ms: int
    certificate: str
    signature: bytes = field(default=b"", repr=False)

    def signed(self, signer: Signer) -> Self:
        """With the signature of this key."""
        return replace(self, signature=signer.sign(LABEL, self._body))

    def check(self, authority_pem: bytes, federation: str) -> None:
        """Raise Refused unless a coordinator of this federation signed it."""
        try:
            key = trusted_key(self.certificate.encode(), authority_pem, federation)
        except (BadInput, CertificateRefused) as error:
            raise _refused(f"a certificate that does not count ({error})") from error
        if self.federation != federation or not signature_holds(
            key, LABEL, self._body, self.signature
        ):
            raise _refused("one that the coordinator did not sign")

    @property
    def when(self) -> str:
        """Its time in UTC."""
        return stamp(self.time_ms / 1000)

    @property
    def of_site(self) -> Anchor:
        """What it confirms of the site's trail."""
        return Anchor(self.number, self.hash, f"the coordinator's receipt of {self.when[:19]}")

    @property
    def of_coordinator(self) -> Anchor:
        """What it confirms of the coordinator's trail."""
        source = f"the receipt of {self.when[:19]} that site {self.site} has"
        return Anchor(self.own_number, self.own_hash, source)

    @property
    def _body(self) -> bytes:
        numbers = (self.number, self.own_number, self.time_ms)
        texts = (self.federation, self.site, self.hash, self.own_hash, self.certificate)
        return framed(*(n.to_bytes(8, "big") for n in numbers), *(t.encode() for t in texts))

    def append(self, folder: Path) -> None:
        """Append it to the file of receipts. Raises OSError."""
        about = {
            "receipt": 1, "federation": self.federation, "site": self.site, "number": self.number,
            "hash": self.hash, "own_number": self.own_number, "own_hash": self.own_hash,
            "time_ms": self.time_ms, "certificate": self.certificate,
            "signature": base64.b64encode(self.signature).decode(),
        }  # fmt: skip
        append_row(folder, about, RECEIPTS_FILE)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The receipt of a line. Raises BadInput."""
        try:
            about: Json = json.loads(data)
            if about.pop("receipt") != 1:
                raise ValueError
            about["signature"] = base64.b64decode(about["signature"])
            found = cls(**about)
            found.signed(_Nothing())
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, binascii.Error):
            raise BadInput("audit: found bytes that are no receipt") from None
        return found


class _Nothing:
    """Signs nothing: what cannot be signed is no receipt."""

    public = ""

    def sign(self, _label: bytes, _message: bytes, /) -> bytes:
        return b""


def read_receipts(data: bytes) -> Iterator[Receipt]:
    """The receipts of a file; a last line that a crash cut off is left out. Raises BadInput."""
    for raw in data[: data.rfind(b"\n") + 1].splitlines():
        yield Receipt.parse(raw)


def confirmed_heads(data: bytes) -> Mapping[str, tuple[int, str]]:
    """{site: number and hash of the last line that was confirmed}, from a coordinator's trail."""
    found = {}
    for raw in data.splitlines():
        if b'"event":"receipt"' in raw:
            facts = Line.parse(raw).facts
            found[str(facts["site"])] = int(str(facts["number"])), str(facts["hash"])
    return found


def _refused(found: str) -> Refused:
    return Refused(
        f"receipt: found {found}, expected the signature of this federation's coordinator",
        remedy="take the receipts from the site's folder or the coordinator's trail, unchanged",
    )
