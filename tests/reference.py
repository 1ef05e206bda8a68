"""Slow, obvious versions of the fast paths: Python integers and loops, written from the documents alone.

Nothing here calls the code it is compared with, except for sizes (`Layout.blocks`, `tag_slots`), which
have tests of their own.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedcore.encode.pack import Layout

TAG_PRIME = 2**61 - 1


def uint64(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


# ------------------------------------------------------------------------------------- encoding


def pack_words(words: Sequence[int], bits: int) -> bytes:
    """One long integer per group of words that fills whole bytes, sliced into 8-byte lanes."""
    group = 8 // math.gcd(bits, 8)
    columns = len(words) // group
    rows = [
        sum(words[place * columns + column] << (place * bits) for place in range(group)).to_bytes(
            group * bits // 8, "little"
        )
        for column in range(columns)
    ]
    lanes = range(0, group * bits // 8, 8)
    return b"".join(row[lane : lane + 8] for lane in lanes for row in rows)


def limbs(value: int, wide_bits: int, bits: int) -> list[int]:
    """Digits of `value` in base 2^bits, least significant first."""
    digits = []
    for _ in range(math.ceil(wide_bits / bits)):
        value, digit = divmod(value, 2**bits)
        digits.append(digit)
    assert value == 0
    return digits


def places(layout: Layout) -> Iterator[tuple[int, int]]:
    """(slot, row) of data field 0, 1, 2, ...: row 0 skips canaries, no row enters the tag's slots."""
    size = layout.packing.slots_per_block
    end = layout.blocks * size - layout.tag_slots
    for row in range(layout.packing.fields_per_slot):
        for slot in range(end):
            if row > 0 or slot % size:
                yield slot, row


def place_of(layout: Layout, field: int) -> tuple[int, int]:
    """(slot, shift in bits) of one data field."""
    for index, (slot, row) in enumerate(places(layout)):
        if index == field:
            return slot, row * layout.packing.field_width
    raise IndexError(field)


def data_fields(layout: Layout, coordinates: Sequence[int], wides: dict, site: int) -> list[int]:
    """Coordinates, then wide limbs in the spec's order, then one mark per roster place."""
    bits = layout.packing.bits
    data = list(coordinates)
    for wide in layout.spec.wides:
        for value in wides[wide.name]:
            data += limbs(value, wide.bits, bits)
    return data + [int(index == site) for index in range(layout.sites)]


def pack(layout: Layout, coordinates: Sequence[int], wides: dict, site: int) -> list[int]:
    """One site's slots, field by field."""
    size, width = layout.packing.slots_per_block, layout.packing.field_width
    slots = [0] * (layout.blocks * size)
    for block in range(layout.blocks):
        slots[block * size] = 2**layout.packing.bits - 1
    data = data_fields(layout, coordinates, wides, site)
    for (slot, row), value in zip(places(layout), data, strict=False):
        slots[slot] += value << (row * width)
    return slots


def unpack(layout: Layout, total: Sequence[int]) -> list[int]:
    """All data fields of a sum, in the order of `data_fields`."""
    width = layout.packing.field_width
    found = []
    for slot, row in places(layout):
        if len(found) == layout.data_fields:
            break
        found.append((int(total[slot]) >> (row * width)) % 2**width)
    return found


def quantise(
    values: Sequence[float], bits: int, bound: float, uniforms: Sequence[float]
) -> list[int]:
    """Stochastic rounding of one coordinate after the other, with given uniform numbers."""
    levels = 2 ** (bits - 1) - 1
    fields = []
    for value, uniform in zip(values, uniforms, strict=True):
        clipped = min(max(value, -bound), bound)
        level = math.floor(clipped * (levels / bound) + uniform)
        fields.append(min(max(level, -levels), levels) + 2 ** (bits - 1))
    return fields


def dequantise(total: Sequence[int], bits: int, bound: float, contributors: int) -> list[Fraction]:
    """Exact: (field sum - contributors * offset) * R / (2^(b-1) - 1)."""
    step = Fraction(bound) / (2 ** (bits - 1) - 1)
    return [(int(value) - contributors * 2 ** (bits - 1)) * step for value in total]


# --------------------------------------------------------------------------------------- sum tag


def hkdf(key: bytes, salt: bytes, info: bytes, length: int) -> bytes:
    """RFC 5869 with SHA-256, sections 2.2 and 2.3."""
    secret = hmac.digest(salt or bytes(32), key, "sha256")
    block, out = b"", b""
    for counter in range(1, -(-length // 32) + 1):
        block = hmac.digest(secret, block + info + bytes([counter]), "sha256")
        out += block
    return out[:length]


def tag_coefficients(key: bytes, header: bytes, state: bytes, count: int) -> list[int]:
    """r: 61 bits of each 8 bytes of AES-256-CTR, counter from zero, block by block with AES-ECB."""
    info = b"fedcore/1 sum tag coefficients\x00" + state
    aes = Cipher(algorithms.AES(hkdf(key, header, info, 32)), modes.ECB()).encryptor()
    stream = b"".join(aes.update(i.to_bytes(16, "big")) for i in range(-(-count // 2)))
    return [int.from_bytes(stream[8 * i : 8 * i + 8], "little") >> 3 for i in range(count)]


def tag_pad(key: bytes, header: bytes, state: bytes, site: str) -> int:
    info = b"fedcore/1 sum tag pad " + site.encode() + b"\x00" + state
    return int.from_bytes(hkdf(key, header, info, 24), "little") % TAG_PRIME


def tag(key: bytes, header: bytes, state: bytes, slots: Sequence[int], site: str) -> int:
    """T_i = pad_i + sum_s r_s v_s mod 2^61 - 1, in Python integers."""
    r = tag_coefficients(key, header, state, len(slots))
    product = sum(a * int(b) for a, b in zip(r, slots, strict=True))
    return (tag_pad(key, header, state, site) + product) % TAG_PRIME


# -------------------------------------------------------------------------------------- headroom


def proves(sites: int, slot_bits: int, modulus: int) -> bool:
    """n noises of 21 and n roundings of 1/2, and one subtraction of 1/2, below half a plaintext step."""
    noise = sites * (21 + Fraction(1, 2)) + Fraction(1, 2)
    return noise < Fraction(modulus, 2 * 2**slot_bits)


def cheapest(bits: int, sites: int, rings: Sequence[tuple[int, int]]) -> Fraction | None:
    """Fewest wire bits per coordinate over all rings (degree, modulus) and fields per slot."""
    width = bits + math.ceil(math.log2(sites))
    prices = [
        Fraction(modulus.bit_length(), k)
        for _, modulus in rings
        for k in range(1, 60)
        # SEAL's plain modulus 2^s has s + 1 bits, at most 60; the tag's field wants slots below 2^60
        if k * width <= 59 and proves(sites, k * width, modulus)
    ]
    return min(prices, default=None)


# ------------------------------------------------------------------------- ring arithmetic by hand


def negacyclic_product(poly: np.ndarray, ternary: Sequence[int], modulus: int) -> list[int]:
    """poly * ternary in Z_q[x]/(x^N + 1), coefficient by coefficient of the ternary factor."""
    total = np.zeros(len(poly), dtype=object)
    wide = poly.astype(object)
    for shift, sign in enumerate(ternary):
        if sign:
            total += sign * np.concatenate((-wide[len(wide) - shift :], wide[: len(wide) - shift]))
    return [int(value) % modulus for value in total]


def digest(*arrays: np.ndarray) -> str:
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()
