"""The chunks in which BFV ciphertexts travel: their form, their sizes, and what is refused before SEAL reads them.

Invariant: the size of every chunk is a pure function of the plan, and of the number of summands for a sum that has
their seeds, so any other size is refused.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import BadInput, ChunkRefused
from fedcore.secagg.encode.bitpack import Words, pack_words, packed_size, unpack_words
from fedcore.secagg.packing import Ring

BLOCKS_PER_CHUNK = 64
"""Ciphertexts in one chunk: about 0.9 MB up at N = 2048, and large runs for the bit packing."""

_CHUNK_HEADER = struct.Struct("<4sBBH8sI")
_MAGIC = b"FCB1"
SEEDED, FULL, SUMMED = 1, 2, 3
"""Kinds of chunks: of an upload; of a sum, with the words of both polynomials (the number of polynomials of these two
is their kind); of a sum, with the summands' seeds in place of the second polynomial."""
_MOST_SEEDS = 255
"""Summands that the header of a chunk can count."""
SEED_BYTES = 65
"""Bytes of the seed block that travel: the generator's type and the seed itself."""


class Parameters(Protocol):
    """What chunks depend on: the ring, and 8 bytes that name all encryption parameters."""

    @property
    def ring(self) -> Ring: ...

    @property
    def digest(self) -> bytes: ...


def chunk_size(ring: Ring, kind: int, count: int) -> int:
    """Bytes of a chunk of `count` ciphertexts: a pure function, so any other size is refused."""
    seeds = SEED_BYTES * count if kind == SEEDED else 0
    words = count * kind * ring.degree
    return _CHUNK_HEADER.size + seeds + packed_size(words, ring.modulus_bits)


def vector_size(ring: Ring, blocks: int, kind: int) -> int:
    """Bytes of all chunks of a vector of `blocks` ciphertexts; kind 1 is an upload, 2 a sum of two polynomials."""
    return sum(chunk_size(ring, kind, count) for _, count in places(blocks))


def sum_size(ring: Ring, blocks: int, sites: int) -> int:
    """Bytes of all chunks of a sum of so many sites: with their seeds where it is one chunk and that is shorter."""
    if blocks <= BLOCKS_PER_CHUNK and seeds_are_shorter(ring, sites):
        return _summed_size(ring, blocks, sites)
    return vector_size(ring, blocks, FULL)


def seeds_are_shorter(ring: Ring, summands: int) -> bool:
    """Whether so many seeds are fewer bytes than the words of a polynomial."""
    short = SEED_BYTES * summands < packed_size(ring.degree, ring.modulus_bits)
    return summands <= _MOST_SEEDS and short


def _summed_size(ring: Ring, count: int, summands: int) -> int:
    """Bytes of a chunk of `count` summed ciphertexts, with the seeds of so many summands each."""
    return _CHUNK_HEADER.size + count * (
        SEED_BYTES * summands + packed_size(ring.degree, ring.modulus_bits)
    )


def write_chunk(
    public: Parameters, kind: int, first: int, seeds: list[bytes], words: Words
) -> bytes:
    """The chunk at ciphertext `first`. words: (count * N * polynomials,), each below the modulus."""
    count = len(words) // (public.ring.degree * kind)
    header = _CHUNK_HEADER.pack(_MAGIC, kind, 0, count, public.digest, first)
    return header + b"".join(seeds) + pack_words(words, public.ring.modulus_bits)


def write_summed(public: Parameters, seeds: Sequence[Sequence[bytes]], words: Words) -> bytes:
    """A sum's only chunk: the seeds of all summands of each ciphertext, and the words of the first polynomials."""
    header = _CHUNK_HEADER.pack(_MAGIC, SUMMED, len(seeds[0]), len(seeds), public.digest, 0)
    flat = b"".join(seed for each in seeds for seed in each)
    return header + flat + pack_words(words, public.ring.modulus_bits)


def read_summed(
    public: Parameters, chunk: bytes, count: int
) -> tuple[NDArray[np.uint8], Words] | None:
    """The seeds (count, summands, 65) and first polynomials (count, N) of a sum's only chunk; None for one of another
    kind. Raises ChunkRefused."""
    if len(chunk) < _CHUNK_HEADER.size:
        return None
    magic, kind, summands, found, digest, first = _CHUNK_HEADER.unpack_from(chunk)
    if (magic, kind) != (_MAGIC, SUMMED):
        return None
    ring, place = public.ring, _CHUNK_HEADER.size
    if (found, digest, first) != (count, public.digest, 0) or not summands:
        raise ChunkRefused("sum: found a chunk of other ciphertexts or parameters")
    if len(chunk) != _summed_size(ring, count, summands):
        expected = _summed_size(ring, count, summands)
        raise ChunkRefused(f"sum: found {len(chunk)} bytes, expected {expected}")
    seeds = np.frombuffer(chunk, np.uint8, SEED_BYTES * summands * count, place)
    words = unpack_words(
        memoryview(chunk)[place + len(seeds) :], ring.modulus_bits, count * ring.degree
    )
    if (words >= ring.modulus).any():
        raise ChunkRefused("sum: a coefficient is not below the modulus")
    return seeds.reshape(count, summands, SEED_BYTES), words.reshape(count, -1)


def read_chunk(
    public: Parameters, kind: int, chunk: bytes, first: int, count: int
) -> tuple[NDArray[np.uint8], Words]:
    """The seeds (count, 65), none when full, and words (count, polynomials * N) of a chunk, checked before
    SEAL reads it. Raises ChunkRefused."""
    expected = chunk_size(public.ring, kind, count)
    if len(chunk) != expected:
        raise ChunkRefused(
            f"chunk at ciphertext {first}: found {len(chunk)} bytes, expected {expected}"
        )
    magic, found_kind, zero, found_count, digest, found_first = _CHUNK_HEADER.unpack_from(chunk)
    if (magic, zero) != (_MAGIC, 0):
        raise ChunkRefused(f"chunk at ciphertext {first}: it is not a Fedcore ciphertext chunk")
    if digest != public.digest:
        raise ChunkRefused(
            f"chunk at ciphertext {first}: it was made under other encryption parameters",
            remedy="compare the plan digests of both sides",
        )
    if (found_kind, found_count, found_first) != (kind, count, first):
        raise ChunkRefused(
            f"chunk at ciphertext {first}: found kind {found_kind} with {found_count} ciphertexts at "
            f"{found_first}, expected kind {kind} with {count} at {first}"
        )
    place = _CHUNK_HEADER.size
    seeds = np.frombuffer(chunk, np.uint8, SEED_BYTES * count if kind == SEEDED else 0, place)
    packed, length = memoryview(chunk)[place + len(seeds) :], count * public.ring.degree * kind
    words = unpack_words(packed, public.ring.modulus_bits, length)
    if (words >= public.ring.modulus).any():
        raise ChunkRefused(f"chunk at ciphertext {first}: a coefficient is not below the modulus")
    return seeds.reshape(-1, SEED_BYTES), words.reshape(count, -1)


def blocks_of(ring: Ring, slots: int) -> int:
    """The number of ciphertexts of a vector. Raises BadInput unless `slots` is a multiple of N."""
    if slots % ring.degree:
        raise BadInput(f"vector: found {slots} slots, expected a multiple of {ring.degree}")
    return slots // ring.degree


def places(blocks: int) -> Iterator[tuple[int, int]]:
    """(first, count) of each chunk of a vector of `blocks` ciphertexts."""
    for first in range(0, blocks, BLOCKS_PER_CHUNK):
        yield first, min(BLOCKS_PER_CHUNK, blocks - first)
