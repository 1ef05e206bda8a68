"""Ciphertext chunks taken apart and put together again: what forgeries are made of, and what bytes show.

The product reads and writes chunks only as part of an upload or a sum; these are the two functions inside.
"""

from __future__ import annotations

from types import SimpleNamespace

from fedcore.secagg.crypto import bfv_chunks
from fedcore.secagg.crypto.bfv_chunks import FULL


def read_chunk(public, kind, chunk, count=1):
    """The seeds and words (count, kind * N) of the chunk at ciphertext 0, checked as the product does."""
    seeds, words = bfv_chunks.read_chunk(public, kind, chunk, 0, count)
    return SimpleNamespace(seeds=seeds, words=words)


def write_chunk(public, kind, words, seeds=()):
    """The bytes of the chunk at ciphertext 0 with these words, of whatever shape."""
    return bfv_chunks.write_chunk(public, kind, 0, list(seeds), words.reshape(-1))


def tampered(public, chunk, count, block, coefficient, delta):
    """A sum's chunk with `delta` added to one coefficient of c1 of one block: bytes alone, no key."""
    words = read_chunk(public, FULL, chunk, count).words.copy()
    place = public.ring.degree + coefficient
    words[block, place] = (int(words[block, place]) + delta) % public.ring.modulus
    return write_chunk(public, FULL, words)
