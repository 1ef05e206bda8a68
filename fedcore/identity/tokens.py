"""A signing key inside a token: a hardware security module, a smart card, or SoftHSM, by PKCS#11 (version 2.40).

The key is named by a URI of RFC 7512, as `pkcs11:token=heart;object=authority?module-path=/usr/lib/softhsm.so`.
Invariants: the key is made in the token as sensitive and not extractable, signs there, and never leaves it; a PIN comes
from the same places as a passphrase, and a URI that has one is refused. A wrong PIN is tried once in a process: a token
locks itself after a few.
ECDSA on P-256 only: what the federation's authority signs with.
"""

from __future__ import annotations

import hashlib
import importlib
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never, Self
from urllib.parse import unquote, unquote_to_bytes

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, utils

from fedcore.errors import AlreadyExists, BadInput, StoreProblem, require_extra
from fedcore.secagg.crypto.secret import SecretBytes

SCHEME = "pkcs11:"
_NUMBER = 32
"""Bytes of each of the two numbers of a signature on P-256."""
_EXAMPLE = "pkcs11:token=heart;object=authority?module-path=/usr/lib/softhsm/libsofthsm2.so"


@dataclass(frozen=True)
class TokenUri:
    """Where a key is. module: the PKCS#11 library of the token's maker; token, serial: which token; object, id: which
    key, by its label or its identifier. "" and b"" where they do not matter."""

    module: Path
    token: str = ""
    serial: str = ""
    object: str = ""
    id: bytes = b""

    @classmethod
    def parse(cls, text: str, where: str) -> Self:
        """where: for messages, which do not quote the text. Raises BadInput."""
        path, _, query = text.removeprefix(SCHEME).partition("?")
        found: dict[str, str] = {}
        for part in [*filter(None, path.split(";")), *filter(None, query.split("&"))]:
            name, equals, value = part.partition("=")
            if name in {"pin-value", "pin-source"}:
                raise _refused(where, f"the attribute {name}", "a URI without a PIN", _PIN)
            if not equals or name in found:
                raise _refused(where, "an attribute without a value, or twice", "NAME=VALUE once")
            found[name] = value
        if found.pop("type", "private") != "private":
            raise _refused(where, "the type of another object", "type=private")
        known = {"module-path", "token", "serial", "object", "id"}
        unknown = sorted(found.keys() - known)
        if not text.startswith(SCHEME) or unknown:
            what = f"the attribute {unknown[0][:20]!r}" if unknown else "no pkcs11: before it"
            raise _refused(where, what, f"a URI of RFC 7512 with {', '.join(sorted(known))}")
        named = {name: unquote(value) for name, value in found.items() if name != "id"}
        module = Path(named.pop("module-path", ""))
        uri = cls(module, id=unquote_to_bytes(found.get("id", "")), **named)
        if not module.is_absolute() or not (uri.token or uri.serial) or not (uri.object or uri.id):
            missing = "module-path, token (or serial) and object (or id)"
            raise _refused(where, "a URI that lacks one of them", missing)
        return uri

    def __str__(self) -> str:
        """In words; there is no secret in it."""
        return (
            f"key {self.object or self.id.hex()!r} in token {self.token or self.serial!r} "
            f"of {self.module}"
        )


def _refused(where: str, found: str, expected: str, remedy: str = f"as {_EXAMPLE}") -> BadInput:
    return BadInput(f"{where}: found {found}, expected {expected}", remedy=remedy)


_PIN = "name the place of the PIN beside it: unlock = ..., or --passphrase-file FILE"


class TokenKey(ec.EllipticCurvePrivateKey):
    """A key that signs in its token. Thread-safe. Prints redacted."""

    def __init__(
        self, uri: TokenUri, session: Any, key: Any, public: ec.EllipticCurvePublicKey
    ) -> None:
        """session: an open one, which is closed when nothing uses this object any more; key: an object of it."""
        self._uri, self._key, self._public = uri, key, public
        self._busy = threading.Lock()
        weakref.finalize(self, session.close)

    def __repr__(self) -> str:
        return f"<TokenKey: {self._uri}>"

    def public_key(self) -> ec.EllipticCurvePublicKey:
        return self._public

    @property
    def curve(self) -> ec.EllipticCurve:
        return self._public.curve

    @property
    def key_size(self) -> int:
        return self._public.key_size

    def sign(self, data: Any, signature_algorithm: ec.EllipticCurveSignatureAlgorithm) -> bytes:
        """ECDSA with SHA-256, DER. Raises StoreProblem where the token does not answer, or not with this key's
        signature."""
        if not isinstance(signature_algorithm.algorithm, hashes.SHA256):
            raise UnsupportedAlgorithm("a token's key signs with SHA-256")
        pkcs11, digest = _library(), hashlib.sha256(data).digest()
        with self._busy, _refusals(pkcs11, self._uri):
            pair = self._key.sign(digest, mechanism=pkcs11.Mechanism.ECDSA)
        numbers = (int.from_bytes(pair[:_NUMBER], "big"), int.from_bytes(pair[_NUMBER:], "big"))
        return utils.encode_dss_signature(*numbers)

    def exchange(self, algorithm: ec.ECDH, peer_public_key: ec.EllipticCurvePublicKey) -> Never:  # noqa: ARG002
        raise UnsupportedAlgorithm("a token's key signs only")

    def private_numbers(self) -> Never:
        raise UnsupportedAlgorithm("a token's key does not leave it")

    def private_bytes(
        self,
        encoding: serialization.Encoding,  # noqa: ARG002
        format: serialization.PrivateFormat,  # noqa: A002, ARG002 - the name in the base class
        encryption_algorithm: serialization.KeySerializationEncryption,  # noqa: ARG002
    ) -> Never:
        raise UnsupportedAlgorithm("a token's key does not leave it")

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self


def open_token_key(uri: TokenUri, pin: Callable[[], SecretBytes]) -> TokenKey:
    """The key that a token has. pin: called once. Raises BadInput for a token, a key or a PIN that is not the right
    one, StoreProblem for a token that fails."""
    with _session(uri, pin) as (pkcs11, session):
        return _found(pkcs11, session, uri)


def make_token_key(uri: TokenUri, pin: Callable[[], SecretBytes]) -> TokenKey:
    """A new key, made in the token. Raises AlreadyExists where it has a key of this name; otherwise as above."""
    names = {"label": uri.object or None, "id": uri.id or None}
    with _session(uri, pin) as (pkcs11, session):
        if list(session.get_objects(_search(pkcs11, uri, "PRIVATE_KEY"))):
            raise AlreadyExists(
                f"token: found {uri} already, expected none: it is never overwritten",
                remedy="name another object, or remove that key with the tools of the token, if nothing uses it",
            )
        curves = importlib.import_module("pkcs11.util.ec")
        parameters = session.create_domain_parameters(
            pkcs11.KeyType.EC,
            {pkcs11.Attribute.EC_PARAMS: curves.encode_named_curve_parameters("secp256r1")},
            local=True,
        )
        closed = {pkcs11.Attribute.SENSITIVE: True, pkcs11.Attribute.EXTRACTABLE: False}
        parameters.generate_keypair(
            store=True, capabilities=pkcs11.MechanismFlag.SIGN | pkcs11.MechanismFlag.VERIFY,
            private_template=closed, **{key: value for key, value in names.items() if value},
        )  # fmt: skip
        return _found(pkcs11, session, uri)


def _found(pkcs11: Any, session: Any, uri: TokenUri) -> TokenKey:
    """The key of a session. Raises BadInput."""
    key, public = (_one(pkcs11, session, uri, kind) for kind in ("PRIVATE_KEY", "PUBLIC_KEY"))
    if key[pkcs11.Attribute.EXTRACTABLE] or not key[pkcs11.Attribute.SENSITIVE]:
        raise BadInput(
            f"token: found {uri} extractable, expected one that cannot leave its token",
            remedy="make one there: fed-coordinator init --key, or pkcs11-tool --keypairgen --sensitive",
        )
    return TokenKey(uri, session, key, _public(uri, bytes(public[pkcs11.Attribute.EC_POINT])))


@contextmanager
def _session(uri: TokenUri, pin: Callable[[], SecretBytes]) -> Iterator[tuple[Any, Any]]:
    """The library, and a session in which the PIN was given; it is closed where what is inside fails. Raises BadInput,
    StoreProblem."""
    pkcs11 = _library()
    session = _logged_in(pkcs11, uri, pin)
    try:
        with _refusals(pkcs11, uri):
            yield pkcs11, session
    except BaseException:
        session.close()
        raise


def _logged_in(pkcs11: Any, uri: TokenUri, pin: Callable[[], SecretBytes]) -> Any:
    """A new session. Raises BadInput."""
    named = {"token_label": uri.token or None, "token_serial": uri.serial.encode() or None}
    try:
        token = pkcs11.lib(str(uri.module)).get_token(**{k: v for k, v in named.items() if v})
    except pkcs11.PKCS11Error as error:
        raise BadInput(
            f"token: found no answer for {uri} ({_reason(error)}), expected one token",
            remedy="`pkcs11-tool --module MODULE --list-slots` shows the tokens that this user can reach",
        ) from None
    secret = pin().reveal()
    try:
        return token.open(rw=True, user_pin=secret.decode())
    except pkcs11.UserAlreadyLoggedIn:  # a token knows the process, not the session
        return token.open(rw=True)
    except (pkcs11.PinIncorrect, pkcs11.PinInvalid, pkcs11.PinLenRange, UnicodeDecodeError):
        raise BadInput(
            f"token: found a PIN that does not open {uri}",
            remedy="look at it before the next attempt: a token locks itself after a few",
        ) from None
    except pkcs11.PKCS11Error as error:
        raise BadInput(f"token: found {uri} closed ({_reason(error)}), expected it open") from None


@contextmanager
def _refusals(pkcs11: Any, uri: TokenUri) -> Iterator[None]:
    """Raise StoreProblem for every error of the token inside."""
    try:
        yield
    except pkcs11.PKCS11Error as error:
        raise StoreProblem(
            f"token: found {uri} unusable ({_reason(error)}), expected it to answer",
            remedy="look whether the token is there and open to this user, then start again",
        ) from None


def _reason(error: Exception) -> str:
    """The error's own words, or its name where it has none."""
    return str(error).partition("\n")[0] or type(error).__name__


def _search(pkcs11: Any, uri: TokenUri, kind: str) -> dict[Any, Any]:
    named = {pkcs11.Attribute.LABEL: uri.object, pkcs11.Attribute.ID: uri.id}
    wanted = {name: value for name, value in named.items() if value}
    return wanted | {pkcs11.Attribute.CLASS: getattr(pkcs11.ObjectClass, kind)}


def _one(pkcs11: Any, session: Any, uri: TokenUri, kind: str) -> Any:
    """The only object of a kind with the URI's names. Raises BadInput."""
    found = list(session.get_objects(_search(pkcs11, uri, kind)))
    if len(found) != 1:
        raise BadInput(
            f"token: found {len(found)} objects {kind.lower().replace('_', ' ')} as {uri}, expected one",
            remedy="name it by object and id; a key needs its public half in the token as well",
        )
    return found[0]


def _public(uri: TokenUri, point: bytes) -> ec.EllipticCurvePublicKey:
    """A public key from CKA_EC_POINT: the point in an octet string, or, from some tokens, the bare point."""
    bare = point[2:] if len(point) == 2 * _NUMBER + 3 else point
    try:
        return ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), bare)
    except ValueError:
        raise BadInput(f"token: found {uri} not on the curve P-256, expected a key there") from None


def _library() -> Any:
    """The Python binding, which is an extra. Raises BadInput."""
    require_extra("pkcs11", "pkcs11", "pkcs11")
    return importlib.import_module("pkcs11")
