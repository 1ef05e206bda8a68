"""Words of 1 to 64 significant bits, packed without their leading zeros: the last step before the wire.

Invariant: `unpack_words(pack_words(w, bits), bits, len(w)) == w` for words below 2^bits.
A group of g = 8 / gcd(bits, 8) words fills whole bytes and is stored in lanes: the words are divided into g
equal runs, one word of each run makes a group, and lane l holds bits 64 l .. 64 l + 63 of every group. So
all work is a few shifts over contiguous memory (54 bits: four words in 27 bytes).
"""

from math import gcd

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

WHOLE = 8
"""Words in a multiple of which every width fills whole bytes."""


def packed_size(count: int, bits: int) -> int:
    """Bytes of `count` packed words; `count` must be a multiple of `group_of(bits)`."""
    return count * bits // 8


def group_of(bits: int) -> int:
    """The smallest number of words that fills whole bytes."""
    return 8 // gcd(bits, 8)


def pack_words(words: Words, bits: int) -> bytes:
    """Pack (m,) uint64, each below 2^bits and m a multiple of `group_of(bits)`, into m * bits / 8 bytes."""
    group = group_of(bits)
    runs = words.reshape(group, -1)
    lanes = np.zeros((-(-group * bits // 64), runs.shape[1]), dtype="<u8")
    for place in range(group):
        lane, shift = divmod(place * bits, 64)
        lanes[lane] |= runs[place] << np.uint64(shift)
        if shift + bits > 64:
            lanes[lane + 1] |= runs[place] >> np.uint64(64 - shift)
    tail = group * bits // 8 % 8
    if not tail:
        return lanes.tobytes()
    last = lanes[-1].view(np.uint8).reshape(-1, 8)[:, :tail]
    return b"".join((lanes[:-1].tobytes(), last.tobytes()))


def unpack_words(data: bytes | memoryview, bits: int, count: int) -> Words:
    """(count,) uint64; the inverse of `pack_words`. `len(data)` must be `packed_size(count, bits)`."""
    group = group_of(bits)
    columns = count // group
    lanes = np.zeros((-(-group * bits // 64), columns), dtype="<u8")
    tail = group * bits // 8 % 8
    full = len(lanes) - bool(tail)
    raw = np.frombuffer(data, dtype=np.uint8)
    lanes[:full] = raw[: full * columns * 8].view("<u8").reshape(full, columns)
    if tail:
        last = lanes[-1].view(np.uint8).reshape(-1, 8)
        last[:, :tail] = raw[full * columns * 8 :].reshape(columns, tail)
    runs = np.empty((group, columns), dtype=np.uint64)
    mask = np.uint64((1 << bits) - 1)
    for place in range(group):
        lane, shift = divmod(place * bits, 64)
        runs[place] = lanes[lane] >> np.uint64(shift)
        if shift + bits > 64:
            runs[place] |= lanes[lane + 1] << np.uint64(64 - shift)
    runs &= mask
    return runs.reshape(-1)
