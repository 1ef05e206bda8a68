"""The chunks in which BFV ciphertexts travel: their form, their sizes, and what is refused before SEAL reads them.

A vector's last ciphertext carries as many slots as are in use: decrypting coefficient i takes coefficient i of the
first polynomial and the whole second one, so the others of the first do not travel.
Invariant: the size of every chunk is a pure function of the plan, and of the number of summands for a sum that has
their seeds, so any other size is refused.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import BadInput, ChunkRefused
from fedcore.secagg.encode.bitpack import WHOLE, Words, pack_words, packed_size, unpack_words
from fedcore.secagg.packing import Ring

BLOCKS_PER_CHUNK = 64
"""Ciphertexts in one chunk: about 0.9 MB up at N = 2048, and large runs for the bit packing."""

_CHUNK_HEADER = struct.Struct("<4sBBH8sI")
_MAGIC = b"FCB2"
SEEDED, FULL, SUMMED = 1, 2, 3
"""Kinds of chunks: of an upload; of a sum, with the words of both polynomials (the number of polynomials of these two
is their kind); of a sum, with the summands' seeds in place of the second polynomial."""
_MOST_SEEDS = 255
"""Summands that the header of a chunk can count."""
SEED_BYTES = 65
"""Bytes of the seed block that travel: the generator's type and the seed itself."""

GENERATORS = frozenset({1, 2})
"""The types of generators that SEAL 4 expands seeds with, Blake2xb and SHAKE256: any seed of these expands, so a chunk
that was read is not refused later."""


class Parameters(Protocol):
    """What chunks depend on: the ring, and 8 bytes that name all encryption parameters."""

    @property
    def ring(self) -> Ring: ...

    @property
    def digest(self) -> bytes: ...


@dataclass(frozen=True)
class Place:
    """Where a chunk is in a vector: its first ciphertext, how many, and how many slots they carry (all of theirs, but
    of a vector's last ciphertext those in use)."""

    first: int
    count: int
    slots: int


def places(ring: Ring, slots: int, first_chunk: int = 0) -> list[Place]:
    """Of the chunks of a vector of so many slots, or of its part from that chunk on. Raises BadInput unless the slots
    are a multiple of 8, which fill whole bytes."""
    blocks, first = blocks_of(ring, slots), first_chunk * BLOCKS_PER_CHUNK
    found = []
    for start in range(0, blocks, BLOCKS_PER_CHUNK):
        end = min(start + BLOCKS_PER_CHUNK, blocks)
        used = min(end * ring.degree, slots) - start * ring.degree
        found.append(Place(first + start, end - start, used))
    return found


def blocks_of(ring: Ring, slots: int) -> int:
    """The number of ciphertexts of a vector. Raises BadInput unless `slots` is a multiple of 8."""
    if slots % WHOLE:
        raise BadInput(f"vector: found {slots} slots, expected a multiple of {WHOLE}")
    return -(-slots // ring.degree)


def chunk_size(ring: Ring, kind: int, place: Place) -> int:
    """Bytes of the chunk of this place: a pure function, so any other size is refused."""
    seeds = SEED_BYTES * place.count if kind == SEEDED else 0
    words = place.slots + (kind - 1) * place.count * ring.degree
    return _CHUNK_HEADER.size + seeds + packed_size(words, ring.modulus_bits)


def vector_size(ring: Ring, slots: int, kind: int) -> int:
    """Bytes of all chunks of a vector of so many slots; kind 1 is an upload, 2 a sum of two polynomials."""
    return sum(chunk_size(ring, kind, place) for place in places(ring, slots))


def sum_size(ring: Ring, slots: int, sites: int) -> int:
    """Bytes of all chunks of a sum of so many sites: with their seeds where it is one chunk and that is shorter."""
    found = places(ring, slots)
    if len(found) == 1 and seeds_are_shorter(ring, sites):
        return _summed_size(ring, found[0], sites)
    return vector_size(ring, slots, FULL)


def seeds_are_shorter(ring: Ring, summands: int) -> bool:
    """Whether so many seeds are fewer bytes than the words of a polynomial."""
    short = SEED_BYTES * summands < packed_size(ring.degree, ring.modulus_bits)
    return summands <= _MOST_SEEDS and short


def _summed_size(ring: Ring, place: Place, summands: int) -> int:
    """Bytes of the chunk of a sum with the seeds of so many summands for each ciphertext."""
    words = packed_size(place.slots, ring.modulus_bits)
    return _CHUNK_HEADER.size + SEED_BYTES * summands * place.count + words


def write_chunk(
    public: Parameters, kind: int, place: Place, seeds: Sequence[bytes], words: Words
) -> bytes:
    """A chunk. words: (polynomials, count, N), the second polynomials before the first ones, each below the modulus;
    of the first polynomials the words behind the slots in use stay here."""
    header = _CHUNK_HEADER.pack(_MAGIC, kind, 0, place.count, public.digest, place.first)
    return header + b"".join(seeds) + _packed(public.ring, place, words)


def write_summed(
    public: Parameters, place: Place, seeds: Sequence[Sequence[bytes]], words: Words
) -> bytes:
    """A sum's only chunk: the seeds of all summands of each ciphertext, and the words (1, count, N) of the first
    polynomials."""
    header = _CHUNK_HEADER.pack(_MAGIC, SUMMED, len(seeds[0]), place.count, public.digest, 0)
    flat = b"".join(seed for each in seeds for seed in each)
    return header + flat + _packed(public.ring, place, words)


def _packed(ring: Ring, place: Place, words: Words) -> bytes:
    unused = place.count * ring.degree - place.slots
    return pack_words(words.reshape(-1)[: words.size - unused], ring.modulus_bits)


def read_summed(
    public: Parameters, chunk: bytes, place: Place
) -> tuple[NDArray[np.uint8], Words] | None:
    """The seeds (count, summands, 65) and first polynomials (count, N) of a sum's only chunk; None for one of another
    kind. Raises ChunkRefused."""
    if len(chunk) < _CHUNK_HEADER.size:
        return None
    magic, kind, summands, count, digest, first = _CHUNK_HEADER.unpack_from(chunk)
    if (magic, kind) != (_MAGIC, SUMMED):
        return None
    ring, start = public.ring, _CHUNK_HEADER.size
    if (count, digest, first) != (place.count, public.digest, 0) or not summands:
        raise ChunkRefused("sum: found a chunk of other ciphertexts or parameters")
    if len(chunk) != _summed_size(ring, place, summands):
        expected = _summed_size(ring, place, summands)
        raise ChunkRefused(f"sum: found {len(chunk)} bytes, expected {expected}")
    seeds = np.frombuffer(chunk, np.uint8, SEED_BYTES * summands * count, start)
    (words,) = _unpacked(ring, place, memoryview(chunk)[start + len(seeds) :], 1)
    return seeds.reshape(count, summands, SEED_BYTES), words


def read_chunk(
    public: Parameters, kind: int, chunk: bytes, place: Place
) -> tuple[NDArray[np.uint8], Words]:
    """The seeds (count, 65), none when full, and words (polynomials, count, N) of a chunk, the second polynomials
    before the first ones, checked before SEAL reads it. Words that did not travel are 0. Raises ChunkRefused."""
    expected, at = chunk_size(public.ring, kind, place), f"chunk at ciphertext {place.first}"
    if len(chunk) != expected:
        raise ChunkRefused(f"{at}: found {len(chunk)} bytes, expected {expected}")
    magic, found_kind, zero, count, digest, first = _CHUNK_HEADER.unpack_from(chunk)
    if (magic, zero) != (_MAGIC, 0):
        raise ChunkRefused(f"{at}: it is not a Fedcore ciphertext chunk")
    if digest != public.digest:
        raise ChunkRefused(
            f"{at}: it was made under other encryption parameters",
            remedy="compare the plan digests of both sides",
        )
    if (found_kind, count, first) != (kind, place.count, place.first):
        raise ChunkRefused(
            f"{at}: found kind {found_kind} with {count} ciphertexts at {first}, expected kind {kind} with "
            f"{place.count} at {place.first}"
        )
    start = _CHUNK_HEADER.size
    seeds = np.frombuffer(chunk, np.uint8, SEED_BYTES * count if kind == SEEDED else 0, start)
    words = _unpacked(public.ring, place, memoryview(chunk)[start + len(seeds) :], kind)
    rows = seeds.reshape(-1, SEED_BYTES)
    unknown = sorted(set(rows[:, 0].tolist()) - GENERATORS)
    if unknown:
        raise ChunkRefused(
            f"{at}: found a seed for generator {unknown[0]}, expected one of SEAL's: 1 or 2"
        )
    return rows, words


def _unpacked(ring: Ring, place: Place, packed: memoryview, polynomials: int) -> Words:
    """The inverse of `_packed`, with 0 for what did not travel. Raises ChunkRefused for a word that is no
    coefficient."""
    words = np.zeros((polynomials, place.count, ring.degree), dtype=np.uint64)
    used = words.size - (place.count * ring.degree - place.slots)
    flat = words.reshape(-1)[:used]
    flat[:] = unpack_words(packed, ring.modulus_bits, used)
    if (flat >= ring.modulus).any():
        raise ChunkRefused(
            f"chunk at ciphertext {place.first}: a coefficient is not below the modulus"
        )
    return words
