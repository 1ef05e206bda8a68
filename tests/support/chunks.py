"""Ciphertext chunks taken apart and put together again: what forgeries are made of, and what bytes show.

The product reads and writes chunks only as part of an upload or a sum; these are the two functions inside.
"""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from fedcore.secagg.crypto import bfv_chunks
from fedcore.secagg.crypto.bfv_chunks import FULL


def read_chunk(public, kind, chunk, count=1, slots=0):
    """The seeds and words (count, kind * N) of the chunk at ciphertext 0, checked as the product does. slots: those in
    use, of `count` whole ciphertexts without it."""
    place = bfv_chunks.Place(0, count, slots or count * public.ring.degree)
    seeds, words = bfv_chunks.read_chunk(public, kind, chunk, place)
    return SimpleNamespace(seeds=seeds, words=np.concatenate(words[::-1], axis=1))


def write_chunk(public, kind, words, seeds=(), slots=0):
    """The bytes of the chunk at ciphertext 0 with these words, as `read_chunk` gives them."""
    polynomials = words.reshape(-1, kind, public.ring.degree)
    place = bfv_chunks.Place(0, len(polynomials), slots or len(polynomials) * public.ring.degree)
    in_order = np.ascontiguousarray(polynomials.transpose(1, 0, 2)[::-1])
    return bfv_chunks.write_chunk(public, kind, place, list(seeds), in_order)


def tampered(public, chunk, slots, block, coefficient, delta):
    """A sum's chunk with `delta` added to one coefficient of c1 of one block: bytes alone, no key."""
    count = -(-slots // public.ring.degree)
    words = read_chunk(public, FULL, chunk, count, slots).words.copy()
    place = public.ring.degree + coefficient
    words[block, place] = (int(words[block, place]) + delta) % public.ring.modulus
    return write_chunk(public, FULL, words, slots=slots)
