"""Masks: seeds expanded into slots, added at the sites and taken off the sum (PROTOCOL P).

Invariant: a mask is `stream(seed) mod 2^slot_bits`, uniform over the whole ring because 2^slot_bits
divides 2^64, and it keeps all 256 bits of its seed. Adding a mask and subtracting it gives the slots back.

The stream is AES-256-CTR from counter 0, 8 bytes to a slot, little-endian: 0.65 ms for the 500 000 slots
of a million parameters, addition included, where ChaCha20 takes 0.77 (x86 with AES instructions). Each
seed is used for one vector only; the KDFs of `pairwise` ensure it.

**The cipher `keystream`** is one more mask over each vector, whose seed follows from the sites' secret.

`c_i = v_i + AES-256-CTR(k_i)` in the slot ring, with `k_i = HKDF(G, salt h; site, state tag, s_i)` and a
salt s_i drawn anew for every vector, is additively homomorphic: the sum of the c_i less the streams of the
sites in it is the sum of the v_i (Castelluccia, Mykletun, Tsudik 2005; PROTOCOL X). Every holder of G can
make every stream; the coordinator has no G, and to it one vector and the sum of any are uniform in the ring.

A stream key is used for one vector only. The salt alone ensures it: it is 32 bytes of
`Entropy`, never derived, also where a site makes a vector of the same round again.
A stream gives no integrity: what is added to a vector is added to the sum, and the sum tag (`sumtag.py`)
detects it.
"""

from collections.abc import Iterable

import numpy as np

from fedcore.errors import BadInput
from fedcore.secagg.crypto.entropy import Entropy
from fedcore.secagg.crypto.sumtag import GroupSecret
from fedcore.secagg.crypto.symmetric import Label, keystream
from fedcore.secagg.plan import SALT_BYTES
from fedcore.types import SiteId, Slots

_BLOCK = 1 << 14
"""Slots per pass, 128 KiB, so that slots and stream stay in the cache while all masks are applied."""

_CIPHER_BLOCK = 16


def add_masks(
    slots: Slots, masks: Iterable[tuple[bytes, int]], slot_bits: int, *, first: int = 0
) -> None:
    """In place: slots += sum of sign * stream(seed) mod 2^slot_bits, for (32-byte seed, +1 or -1).

    slots: (s,) uint64, the part of a vector that begins at slot `first`, an even one. Wraps in uint64
    and is reduced once, at the end. Raises BadInput.
    """
    block, odd = divmod(8 * first, _CIPHER_BLOCK)
    if odd:
        raise BadInput(f"mask: found a part from slot {first}, expected an even one")
    start_at = block.to_bytes(_CIPHER_BLOCK, "big")
    streams = []
    for key, sign in masks:
        if sign not in {1, -1}:
            raise BadInput(f"mask: found sign {sign}, expected 1 or -1")
        streams.append((keystream(key, start_at), np.add if sign == 1 else np.subtract))
    ring = np.uint64((1 << slot_bits) - 1)
    zeros = memoryview(bytes(8 * _BLOCK))
    buffer = bytearray(8 * _BLOCK + _CIPHER_BLOCK - 1)  # update_into needs this much extra space
    words = np.frombuffer(buffer, "<u8", _BLOCK)
    for start in range(0, len(slots), _BLOCK):
        part = slots[start : start + _BLOCK]
        count = len(part)
        for stream, apply in streams:
            stream.update_into(zeros[: 8 * count], buffer)
            apply(part, words[:count], out=part)
        part &= ring


def mask_sum(
    masks: Iterable[tuple[bytes, int]], slots: int, slot_bits: int, *, first: int = 0
) -> Slots:
    """The sum of many masks as one (slots,) uint64 vector below 2^slot_bits: one subtraction."""
    total = np.zeros(slots, dtype=np.uint64)
    add_masks(total, masks, slot_bits, first=first)
    return total


def draw_salt(entropy: Entropy) -> bytes:
    """A fresh salt for one vector: 32 bytes."""
    return entropy.draw(SALT_BYTES)


def stream_key(
    group: GroupSecret, header: bytes, state_tag: bytes, site: SiteId, salt: bytes
) -> bytes:
    """The 32-byte seed of the stream over one site's vector. header: h; state_tag: the site's own."""
    return group.derive_labelled(Label.KEYSTREAM, site.encode(), state_tag, salt, salt=header)
