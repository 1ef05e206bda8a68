"""The keys that sign audit trails: a site's Ed25519 identity, and the coordinator's TLS key (ECDSA, P-256, SHA-256).

The coordinator has no identity key. Its TLS key signs instead of a new one, because a site can check it offline
against the authority's certificate, which it has: nothing further is to be pinned, distributed or protected.
Invariant: what is signed begins with `fedcore/1 ` and a label, so that a signature is of no other use of these keys
(TLS 1.3 signs 64 spaces first, RFC 8446, section 4.4.3). A signature has one form only: of the two valid values of s
in ECDSA the lower one counts (RFC 8032 requires the same of Ed25519), so no byte of a line can be changed.
"""

from typing import Protocol

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import (
    decode_dss_signature,
    encode_dss_signature,
)

from fedcore.errors import BadInput, SignatureRefused
from fedcore.identity.kit import Kit
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.crypto.identity_key import verify as verify_ed25519

_ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
"""Of P-256 (SEC 2, section 2.4.2)."""

_ED25519, _P256 = "ed25519:", "p256:"


class Signer(Protocol):
    """Signs the lines of one trail. public: the key as lines name it, `ed25519:HEX` or `p256:HEX`."""

    @property
    def public(self) -> str: ...

    def sign(self, label: bytes, message: bytes, /) -> bytes:
        """The signature over label and message."""
        ...


class SiteSigner:
    """A site's identity key."""

    def __init__(self, identity: IdentityKey) -> None:
        self._identity = identity
        self.public = site_key(identity.public)

    def sign(self, label: bytes, message: bytes, /) -> bytes:
        """64 bytes."""
        return self._identity.sign(label, message)


class CoordinatorSigner:
    """The key of a coordinator's certificate. certificate: the certificate, PEM."""

    def __init__(self, kit: Kit) -> None:
        """Raises BadInput for a key that is not of P-256."""
        key = serialization.load_pem_private_key(kit.key_pem.reveal(), password=None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise BadInput(f"{kit.key_path}: found a key of another kind, expected one of P-256")
        self._key, self.certificate = key, kit.certificate_pem
        self.public = _p256_text(key.public_key())

    def sign(self, label: bytes, message: bytes, /) -> bytes:
        """70 to 72 bytes, DER."""
        found = self._key.sign(_signed(label, message), ec.ECDSA(hashes.SHA256()))
        r, s = decode_dss_signature(found)
        return encode_dss_signature(r, min(s, _ORDER - s))


def site_key(public: bytes) -> str:
    """A site's 32-byte public key, as the lines of its trail name it."""
    return _ED25519 + public.hex()


def certificate_key(pem: bytes) -> str:
    """The key of a coordinator's certificate, as the lines of its trail name it. Raises BadInput."""
    try:
        found = x509.load_pem_x509_certificate(pem).public_key()
    except ValueError:
        raise BadInput("audit: found no certificate, expected one in PEM form") from None
    if not isinstance(found, ec.EllipticCurvePublicKey):
        raise BadInput("audit: found a certificate of another key, expected one of P-256")
    return _p256_text(found)


def signature_holds(public: str, label: bytes, message: bytes, signature: bytes) -> bool:
    """Whether the signature is that of this key over label and message."""
    try:
        if public.startswith(_ED25519):
            key = bytes.fromhex(public.removeprefix(_ED25519))
            verify_ed25519(key, label, message, signature, signer="audit")
            return True
        if not public.startswith(_P256):
            return False
        point = bytes.fromhex(public.removeprefix(_P256))
        key_ec = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), point)
        key_ec.verify(signature, _signed(label, message), ec.ECDSA(hashes.SHA256()))
        r, s = decode_dss_signature(signature)
    except (ValueError, InvalidSignature, SignatureRefused):
        return False
    return 2 * s < _ORDER and encode_dss_signature(r, s) == signature


def _signed(label: bytes, message: bytes) -> bytes:
    return b"fedcore/1 " + label + b"\x00" + message


def _p256_text(key: ec.EllipticCurvePublicKey) -> str:
    form = serialization.PublicFormat.CompressedPoint
    return _P256 + key.public_bytes(serialization.Encoding.X962, form).hex()
