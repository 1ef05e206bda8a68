"""The keyed sum tag: proof that an opened sum is of exactly the listed survivors (PROTOCOL T).

Invariant: with p = 2^61 - 1, secret coefficients r and pads, site i sends
`T_i = pad_i + sum_s r_s v_(i,s) mod p`, and a sum V is accepted only if
`sum_i T_i = sum_(i listed) pad_i + sum_s r_s V_s mod p`. A vector added, dropped, repeated or altered by a
party without G is detected except with probability 1/p: a linear universal hash with a one-time pad per
site and round (Wegman & Carter 1981). It does not stop a site that contributes false values.

r and the pads come from HKDF-SHA256 over G with salt h (the round header's digest) and the site's own
state tag, so another round, purpose, roster, plan or model has unrelated keys.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fedcore.errors import EnvelopeRefused, TagRefused
from fedcore.secagg.crypto.secret import Secret
from fedcore.secagg.crypto.symmetric import Label, derive, hkdf, keystream
from fedcore.secagg.plan import RoundHeader
from fedcore.types import SiteId, Slots

PRIME = (1 << 61) - 1
"""A Mersenne prime above every slot (at most 60 bits)."""

GROUP_SECRET_BYTES = 32

_BLOCK = 1 << 16
"""Slots per pass: 20-bit by 21-bit products, 2^16 of them, stay below 2^64."""

_LOW_20, _LOW_21 = np.uint64((1 << 20) - 1), np.uint64((1 << 21) - 1)


class GroupSecret(Secret):
    """G: 32 random bytes the sites share and the coordinator never has. Prints redacted.

    Its byte form goes into the sealed envelopes of a key epoch and the sites' own journals only.
    """

    __slots__ = ("_key",)

    def __init__(self, key: bytes | None = None) -> None:
        self._key = os.urandom(GROUP_SECRET_BYTES) if key is None else key

    def to_bytes(self) -> bytes:
        """The payload of a key epoch; under the cipher `bfv` the end of it, behind the secret key."""
        return self._key

    @classmethod
    def from_bytes(cls, payload: bytes, *, sender: str = "this site") -> GroupSecret:
        """The inverse of `to_bytes`. Raises EnvelopeRefused on another length.

        sender: the party at fault then; left out for the site's own journal.
        """
        if len(payload) != GROUP_SECRET_BYTES:
            found = f"{len(payload)} bytes"
            raise EnvelopeRefused("group secret", found, GROUP_SECRET_BYTES, sender)
        return cls(payload)

    def derive(self, salt: bytes, info: bytes, length: int) -> bytes:
        """HKDF-SHA256(G, salt, info): `length` bytes (RFC 5869)."""
        return hkdf(self._key, salt, b"fedcore/1 " + info, length)

    def derive_labelled(self, label: Label, *parts: bytes, salt: bytes) -> bytes:
        """32 bytes of `symmetric.derive` under G. Its info begins with a length, that of `derive` above
        with a word, so the two never meet."""
        return derive(self._key, label, *parts, salt=salt)

    def authenticate(self, label: bytes, message: bytes) -> bytes:
        """HMAC-SHA256 under a key derived for `label`: 32 bytes."""
        return hmac.digest(self.derive(b"", b"hmac " + label, 32), message, "sha256")

    def authenticator(self, label: bytes) -> hmac.HMAC:
        """`authenticate` of a message that comes part by part."""
        return hmac.new(self.derive(b"", b"hmac " + label, 32), digestmod="sha256")


def key_id(payload: bytes) -> bytes:
    """The name of a key epoch's payload: SHA-256, 32 bytes (PROTOCOL E). Public: the payload ends in 32
    random bytes, so the hash reveals nothing about it."""
    return hashlib.sha256(b"key id" + payload).digest()


def state_tag(group: GroupSecret, job: str, round_: int, state: bytes) -> bytes:
    """HMAC(G, "state", job, round, state), which binds a vector to the model it started from (PROTOCOL S).

    state: the canonical bytes of parameters, optimiser state and range, as the site itself holds them.
    """
    head = f"{len(job)}:{job}:{round_}:".encode()
    return group.authenticate(b"state", head + state)


def state_mac(group: GroupSecret, header: bytes, state: bytes) -> bytes:
    """HMAC under G of the state that a round's sum leads to. header: digest of the round's header."""
    return group.authenticate(b"new state", header + state)


@dataclass(frozen=True)
class SumTag:
    """The tag keys of one header and state, at one site."""

    group: GroupSecret = field(repr=False)
    header: RoundHeader
    state: bytes = field(repr=False)

    def tag(self, slots: Slots, site: SiteId) -> int:
        """T_i of one site's packed slots: an int in [0, p)."""
        product = self.product()
        product.take(slots)
        return (self._pad(site) + product.value) % PRIME

    def check(
        self,
        total: Slots,
        tag_sum: int,
        survivors: Sequence[SiteId],
        product: Product | None = None,
    ) -> None:
        """Accept the sum of `survivors` or raise TagRefused, whose text has nothing of the values. A list
        that names a site twice, or one off the roster, has a tag too: it is refused first.

        product: of these slots, where it was computed while they came.
        """
        if product is None:
            product = self.product()
            product.take(total)
        listed = set(survivors)
        known = len(listed) == len(survivors) and listed <= set(self.header.roster)
        expected = (sum(map(self._pad, survivors)) + product.value) % PRIME
        found, due = (value.to_bytes(8, "little") for value in (tag_sum % PRIME, expected))
        if not known or not hmac.compare_digest(found, due):
            raise TagRefused(
                "sum: its tag is not that of the listed survivors, this round, each once",
                remedy="nothing was applied; the next round needs a new key epoch",
            )

    def _pad(self, site: SiteId) -> int:
        info = b"sum tag pad " + site.encode()
        return int.from_bytes(self._derive(info, 24), "little") % PRIME

    def _derive(self, info: bytes, length: int) -> bytes:
        return self.group.derive(self.header.digest, info + b"\x00" + self.state, length)

    def product(self) -> Product:
        """Of no slots yet."""
        return Product(self._derive(b"sum tag coefficients", 32))


class Product:
    """sum_s r_s v_s mod p of a vector v whose slots come in order, part by part. key: of the coefficients r."""

    def __init__(self, key: bytes) -> None:
        self._stream, self.value = keystream(key), 0

    def take(self, slots: Slots) -> None:
        """The next slots, (s,) uint64, in 20/21-bit limbs (the slow reference is in the tests)."""
        for start in range(0, len(slots), _BLOCK):
            v = slots[start : start + _BLOCK]
            r = np.frombuffer(self._stream.update(bytes(8 * len(v))), dtype="<u8") >> np.uint64(3)
            self.value = (self.value + _dot(r, v)) % PRIME


def _dot(r: Slots, v: Slots) -> int:
    """sum r v as an exact integer, r below 2^61 and v below 2^60, at most 2^16 terms."""
    r_limbs = (r & _LOW_21, (r >> np.uint64(21)) & _LOW_20, r >> np.uint64(41))
    v_limbs = (v & _LOW_20, (v >> np.uint64(20)) & _LOW_20, v >> np.uint64(40))
    return sum(
        int(np.dot(a, b)) << (a_shift + b_shift)
        for a, a_shift in zip(r_limbs, (0, 21, 41), strict=True)
        for b, b_shift in zip(v_limbs, (0, 20, 40), strict=True)
    )
