"""What passes between a site that joins and the coordinator: the join line, the request, the answer.

    line      fedcore-join:HOST:PORT:SITE:FINGERPRINT:TOKEN, made by `fed-coordinator invite`, one word
    request   site, CSR of its TLS key (PKCS10, RFC 2986), public identity key, two signatures
    answer    the authority's certificate, the site's certificate, the signed roster, the coordinator's port

Invariant: private keys are made at the site and are in none of the three. The token is 32 random bytes, the seed of an
Ed25519 key: a request is signed with it, and the coordinator keeps the public half, so that the token itself is never
sent, and neither a request nor the coordinator's files let anyone else join. Both signatures are over the authority's
fingerprint, the site's name, the CSR and the identity key.

A request may be sent again: the same request has the same answer. Bytes of the other side are limited in length, and
refused as BadInput or PeerRefused.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedcore.errors import BadInput, CertificateRefused, Refused, SignatureRefused
from fedcore.identity.addresses import authority_of, endpoint
from fedcore.identity.authority import federation_of
from fedcore.identity.peer import check_sites, read_certificate
from fedcore.identity.signed_roster import SignedRoster
from fedcore.identity.verify import check_certificate
from fedcore.secagg.crypto.identity_key import IdentityKey, roster_digest, verify
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.crypto.symmetric import framed
from fedcore.types import Json, SiteId

MOST_REQUEST = 8 << 10
"""Bytes of a request; one has about a thousand."""

MOST_ANSWER = 2 << 20
"""Bytes of an answer: mostly the roster."""

_PREFIX = "fedcore-join:"
_TOKEN_BYTES = 32
_BY_IDENTITY, _BY_TOKEN = b"join request by identity", b"join request by token"

REFUSALS = {
    "token": (
        "found this line's token unknown there, expected the one made last for this site",
        "ask the operator for a new line: `fed-coordinator invite SITE`; a newer line replaces an older one",
    ),
    "expired": (
        "found this line expired, expected one in time",
        "ask the operator for a new line: `fed-coordinator invite SITE`",
    ),
    "used": (
        "found this line used before with other keys, expected its first use",
        "go on in the folder of the first attempt, or ask the operator for a new line; if this was not "
        "you, tell the operator at once: somebody else has joined with it",
    ),
    "joined": (
        "found a site of this name joined already, expected a new one",
        "the operator revokes it before it can join with new keys: `fed-coordinator revoke SITE`",
    ),
    "name": (
        "found a certificate request for another name, expected the name in the line",
        "use the line made for this site, in a folder of its own",
    ),
    "request": (
        "found the request malformed there, expected one of the same version of Fedcore",
        "install the same version at both ends",
    ),
    "busy": ("found it busy or its files locked, expected an answer", "try again in a minute"),
}
"""{word: (what is told to the person who joins, the next step)}; the coordinator answers with the word alone."""


class JoinRefused(Refused):
    """The coordinator does not let a site join. word: one of REFUSALS."""

    def __init__(self, word: str, about: str = "join") -> None:
        found, remedy = REFUSALS[word]
        super().__init__(f"{about}: {found} ({word})", remedy=remedy)
        self.word = word


@dataclass(frozen=True)
class JoinLine:
    """Where to join, as whom, and how to know the coordinator. fingerprint: SHA-256 of the authority's certificate."""

    host: str
    port: int
    site: str
    fingerprint: str
    token: SecretBytes = field(repr=False)

    @classmethod
    def create(cls, host: str, port: int, site: str, fingerprint: str) -> JoinLine:
        """A line with a new token."""
        return cls(host, port, site, fingerprint, SecretBytes(os.urandom(_TOKEN_BYTES)))

    @classmethod
    def parse(cls, text: str) -> JoinLine:
        """The line in a text; spaces and line breaks that e-mail put into it do not count. Raises BadInput, which
        does not quote it."""
        word = "".join(text.split())
        parts = word.removeprefix(_PREFIX).rsplit(":", 3)
        if not word.startswith(_PREFIX) or len(parts) != 4:
            raise _wrong("a text of another form")
        where, site, fingerprint, token = parts
        host, port = endpoint(where, "join line")
        check_sites([site], "join line", deployed=True)
        if not re.fullmatch("[0-9a-f]{64}", fingerprint):
            raise _wrong("no fingerprint of 64 digits")
        try:
            raw = base64.b64decode(f"{token}=", altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            raw = b""
        if len(raw) != _TOKEN_BYTES:
            raise _wrong("a token that is cut off or mistyped")
        return cls(host, port, site, fingerprint, SecretBytes(raw))

    def text(self) -> str:
        """The line, with the token: for stdout only."""
        token = base64.urlsafe_b64encode(self.token.reveal()).decode().rstrip("=")
        where = authority_of(self.host, self.port)
        return f"{_PREFIX}{where}:{self.site}:{self.fingerprint}:{token}"

    @property
    def token_key(self) -> bytes:
        """The public half of the token's key, 32 bytes: what the coordinator keeps."""
        return IdentityKey(self.token.reveal()).public


@dataclass(frozen=True)
class JoinRequest:
    """What a site asks with. csr: DER. identity: 32-byte public key. by_identity, by_token: signatures, 64 bytes."""

    site: str
    csr: bytes
    identity: bytes
    by_identity: bytes
    by_token: bytes

    @classmethod
    def create(
        cls, line: JoinLine, key: ec.EllipticCurvePrivateKey, identity: IdentityKey
    ) -> JoinRequest:
        """The request of the holder of both keys."""
        csr = make_csr(line.site, key)
        message = _message(line.fingerprint, line.site, csr, identity.public)
        token = IdentityKey(line.token.reveal())
        signatures = identity.sign(_BY_IDENTITY, message), token.sign(_BY_TOKEN, message)
        return cls(line.site, csr, identity.public, *signatures)

    def to_json(self) -> Json:
        """For the wire and for files."""
        return {
            "site": self.site, "csr": _text(self.csr), "identity": self.identity.hex(),
            "by_identity": _text(self.by_identity), "by_token": _text(self.by_token),
        }  # fmt: skip

    @classmethod
    def parse(cls, data: bytes) -> JoinRequest:
        """The request in bytes of any origin, its signatures not yet checked. Raises JoinRefused."""
        try:
            if len(data) > MOST_REQUEST:
                raise ValueError
            found = json.loads(data)
            site = found["site"]
            check_sites([site], deployed=True)
            identity = bytes.fromhex(found["identity"])
            roster_digest({SiteId(site): identity})
            rest = [
                base64.b64decode(found[key], validate=True)
                for key in ("csr", "by_identity", "by_token")
            ]
            return cls(site, rest[0], identity, *rest[1:])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, BadInput, Refused):
            raise JoinRefused("request") from None

    def check(self, fingerprint: str, token_key: bytes) -> ec.EllipticCurvePublicKey:
        """The TLS key that the certificate is for, if token, identity key and CSR prove it. Raises JoinRefused."""
        message = _message(fingerprint, self.site, self.csr, self.identity)
        try:
            verify(token_key, _BY_TOKEN, message, self.by_token, signer=self.site)
        except SignatureRefused:
            raise JoinRefused("token") from None
        try:
            verify(self.identity, _BY_IDENTITY, message, self.by_identity, signer=self.site)
        except SignatureRefused:
            raise JoinRefused("request") from None
        return read_csr(self.csr, self.site)


@dataclass(frozen=True)
class JoinAnswer:
    """What a site that joined receives. port: of the coordinator, for sites. certificate, authority: PEM."""

    authority: bytes
    certificate: bytes
    roster: bytes
    port: int

    def to_json(self) -> Json:
        """For the wire and for files."""
        return {
            "state": "joined", "authority": self.authority.decode(),
            "certificate": self.certificate.decode(), "roster": self.roster.decode(), "port": self.port,
        }  # fmt: skip

    @classmethod
    def parse(cls, data: bytes, about: str) -> JoinAnswer | None:
        """The answer in bytes of any origin, not yet checked; None: it waits for approval. Raises JoinRefused for a
        refusal, BadInput for anything else."""
        try:
            if len(data) > MOST_ANSWER:
                raise ValueError
            found = json.loads(data)
            if found["state"] == "waiting":
                return None
            if found["state"] == "refused" and found["word"] in REFUSALS:
                raise JoinRefused(found["word"], about)
            authority, certificate, roster = (
                found[key].encode() for key in ("authority", "certificate", "roster")
            )
            if found["state"] == "joined" and 0 < found["port"] < 65536:
                return cls(authority, certificate, roster, int(found["port"]))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            pass
        raise BadInput(
            f"{about}: found no answer to a request, expected one",
            remedy="install the same version of Fedcore at both ends",
        )

    def check(
        self,
        fingerprint: str,
        site: str,
        public: ec.EllipticCurvePublicKey,
        identity: bytes,
        now: datetime,
    ) -> SignedRoster:
        """The roster, if the answer is of the authority with this fingerprint and for these keys.

        Raises CertificateRefused, SignatureRefused, RosterRefused, BadInput.
        """
        federation = check_authority(self.authority, fingerprint)
        check_own(self.certificate, self.authority, site, public, now)
        roster = SignedRoster.parse(self.roster, "answer: roster")
        roster.verify(self.authority, federation)
        if roster.sites.get(SiteId(site)) != identity:
            raise BadInput(
                f"answer: found a roster without this identity key of {site!r}, expected it in it"
            )
        return roster


def check_authority(authority_pem: bytes, fingerprint: str) -> str:
    """The federation of the authority with this fingerprint. Raises CertificateRefused for another."""
    found = read_certificate(authority_pem).fingerprint(hashes.SHA256()).hex()
    alone = authority_pem.count(b"-----BEGIN ") == 1  # a second one would be trusted unseen
    if found != fingerprint or not alone:
        raise CertificateRefused(
            f"coordinator: found the authority {found[:16]}..., expected {fingerprint[:16]}... as in the "
            "join line",
            check="issuer",
            remedy="nothing was sent: this is not the coordinator that the line is for, or something "
            "between intercepts TLS; ask the operator for the fingerprint by another way",
        )
    return federation_of(authority_pem)


def check_own(
    certificate_pem: bytes,
    authority_pem: bytes,
    site: str,
    public: ec.EllipticCurvePublicKey,
    now: datetime,
) -> None:
    """Return if a certificate that was received is this site's, for its own key. Raises CertificateRefused."""
    federation = federation_of(authority_pem)
    peer = check_certificate(
        certificate_pem, authority_pem, federation=federation, role="site", now=now
    )
    if peer.name != site or read_certificate(certificate_pem).public_key() != public:
        raise CertificateRefused(
            f"certificate of {peer}: found it made out to another site or key, expected {site!r} and the "
            "key of this site",
            check="role",
        )


def key_fingerprint(public: bytes) -> str:
    """The first 16 digits of SHA-256 over a public identity key, for people at both ends to compare."""
    return hashlib.sha256(public).hexdigest()[:16]


def make_csr(site: str, key: ec.EllipticCurvePrivateKey) -> bytes:
    """A certificate signing request (DER) whose common name is the site's."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, site)])
    csr = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
    return csr.public_bytes(serialization.Encoding.DER)


def read_csr(csr: bytes, site: str) -> ec.EllipticCurvePublicKey:
    """The key of a request for this site's name. Raises JoinRefused: "request", or "name" for another's."""
    try:
        found = x509.load_der_x509_csr(csr)
        public = found.public_key()
        names = [each.value for each in found.subject]
        sound = found.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise JoinRefused("request") from None
    if (
        not sound
        or not isinstance(public, ec.EllipticCurvePublicKey)
        or public.curve.name != "secp256r1"
    ):
        raise JoinRefused("request")
    if names != [site]:
        raise JoinRefused("name")
    return public


def _message(fingerprint: str, site: str, csr: bytes, identity: bytes) -> bytes:
    return framed(fingerprint.encode(), site.encode(), hashlib.sha256(csr).digest(), identity)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _wrong(found: str) -> BadInput:
    return BadInput(
        f"join line: found {found}, expected {_PREFIX}HOST:PORT:SITE:FINGERPRINT:TOKEN",
        remedy="copy the whole line, as `fed-coordinator invite` printed it, in quotes",
    )
