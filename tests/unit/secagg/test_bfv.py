"""BFV sums bit for bit, its two bounds, the bytes of a chunk, and everything that must be refused."""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import pickle
import re
import stat
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chunks import read_chunk, write_chunk

from fedcore.errors import BadInput, ChunkRefused, EnvelopeRefused, PlanRefused, Unavailable
from fedcore.secagg.crypto import bfv, bfv_chunks
from fedcore.secagg.crypto.bfv import (
    Courier,
    EncryptedFold,
    EncryptedSealer,
    PublicContext,
    SecretContext,
    load_seal,
    self_test,
)
from fedcore.secagg.crypto.bfv_chunks import FULL, SEEDED, Place, chunk_size, sum_size, vector_size
from fedcore.secagg.encode.pack import Layout
from fedcore.secagg.packing import RINGS, Packing, Ring, field_width, solve_packing
from fedcore.secagg.plan import VectorSpec

pytest.importorskip("tenseal.sealapi")

SMALL, LARGE = RINGS


def fold_of(public, slots, uploads):
    fold = EncryptedFold(public, slots)
    for chunks in uploads:
        for index, chunk in enumerate(chunks):
            fold.add(index, chunk)
    return fold


# ------------------------------------------------------------------------------------ exact sums


@st.composite
def encrypted_packings(draw: st.DrawFn) -> Packing:
    """Any bits and sites, in either ring, with any number of fields the proof allows."""
    bits, sites = draw(st.integers(2, 24)), draw(st.integers(1, 200))
    ring = draw(st.sampled_from(RINGS))
    width = field_width(bits, sites)
    fits = [k for k in range(1, 60 // width + 1) if ring.proves(sites, k * width)]
    return Packing(bits, sites, draw(st.sampled_from(fits)), ring)


@settings(max_examples=40)
@given(encrypted_packings(), st.integers(0, 2**32), st.booleans(), st.data())
def test_the_encrypted_sum_is_the_integer_sum_bit_for_bit(packing, seed, worst, data):
    """Random n, bits and d, d = 1 and whole blocks included, folded in any order."""
    rng, sites = np.random.default_rng(seed), min(packing.max_sites, 5)
    probe = Layout(VectorSpec("update", 0), packing, sites)
    block = packing.slots_per_block
    full = (block - probe.tag_slots) * packing.fields_per_slot - 1 - sites
    size = data.draw(st.sampled_from([1, 2, block - 1, block, block + 1, full, full + 1]))
    layout = Layout(VectorSpec("update", size), packing, sites)
    top = 2**packing.bits - 1
    rows = [
        np.full(size, top, np.uint64) if worst else rng.integers(0, top + 1, size, np.uint64)
        for _ in range(sites)
    ]
    public = PublicContext.of(packing)
    sealer = EncryptedSealer(SecretContext(public))
    uploads = []
    for site, row in enumerate(rows):
        slots = layout.pack(row, {}, site)
        layout.put_tag(slots, 2**61 - 2)
        uploads.append(list(sealer.protect(slots)))
    fold = fold_of(public, layout.slots, data.draw(st.permutations(uploads)))
    opened = layout.unpack(sealer.open(fold.total(), layout.slots), range(sites))
    assert opened.coordinates.tolist() == sum(rows).tolist()


@pytest.mark.parametrize(
    ("bits", "sites"), [(16, 32), (15, 64), (16, 64), (13, 128), (12, 200), (24, 200), (2, 200)]
)
def test_as_many_sites_as_the_packing_promises_each_with_the_largest_slots(bits, sites):
    """Every slot as large as its fields can be, in as many fresh ciphertexts as may be summed."""
    packing = solve_packing(bits, sites, "encrypted")
    public = PublicContext.of(packing)
    sealer, degree = EncryptedSealer(SecretContext(public)), packing.slots_per_block
    top = 2**bits - 1
    slot = sum(top << (row * packing.field_width) for row in range(packing.fields_per_slot))
    widest = np.full(degree, slot, dtype=np.uint64)
    fold = EncryptedFold(public, degree)
    for _ in range(sites):
        fold.add(0, next(sealer.protect(widest)))
    assert sites * slot < 2**packing.slot_bits
    assert (sealer.open(fold.total(), degree) == sites * slot).all()


@pytest.mark.parametrize(("ring", "slot_bits"), [(SMALL, 1), (SMALL, 46), (LARGE, 52), (LARGE, 1)])
def test_every_coefficient_of_the_ring_survives(ring, slot_bits):
    """Random and extreme slots over the whole of Z_t; a sum beyond t wraps as the ring does."""
    public = PublicContext(ring, slot_bits)
    sealer, t = EncryptedSealer(SecretContext(public)), 1 << slot_bits
    rng = np.random.default_rng(1)
    rows = [
        rng.integers(0, t, ring.degree, dtype=np.uint64),
        np.full(ring.degree, t - 1, dtype=np.uint64),
        np.zeros(ring.degree, dtype=np.uint64),
        np.eye(1, ring.degree, 0, dtype=np.uint64)[0],
        np.eye(1, ring.degree, ring.degree - 1, dtype=np.uint64)[0],
    ]
    for row in rows:
        fold = fold_of(public, ring.degree, [sealer.protect(row)])
        assert (sealer.open(fold.total(), ring.degree) == row).all()
    fold = fold_of(public, ring.degree, [sealer.protect(row) for row in rows])
    assert (sealer.open(fold.total(), ring.degree) == sum(rows) % np.uint64(t)).all()


@pytest.fixture
def blocks_per_chunk(monkeypatch):
    """blocks_per_chunk(n): chunks are so short that a small vector has several."""
    return lambda count: monkeypatch.setattr(bfv_chunks, "BLOCKS_PER_CHUNK", count)


@pytest.mark.parametrize("last", [2048, 2040, 8])
def test_vectors_of_several_chunks(blocks_per_chunk, last):
    """Of the last ciphertext as many slots travel as are in use: all, some, or as few as fill whole bytes."""
    blocks_per_chunk(2)
    public = PublicContext(SMALL, 40)
    sealer, size = EncryptedSealer(SecretContext(public)), 4 * 2048 + last
    rows = np.random.default_rng(2).integers(0, 2**38, (3, size), dtype=np.uint64)
    uploads = [list(sealer.protect(row)) for row in rows]
    assert [len(chunk) for chunk in uploads[0]] == [
        20 + 2 * 65 + 2 * 13_824, 20 + 2 * 65 + 2 * 13_824, 20 + 65 + last * 54 // 8
    ]  # fmt: skip
    places = [(i, chunks[i]) for i in (2, 0, 1) for chunks in uploads]
    fold = EncryptedFold(public, size)
    for index, chunk in places:
        fold.add(index, chunk)
    released = list(fold.total())
    assert sum(map(len, released)) == vector_size(SMALL, size, 2)
    assert len(released[-1]) == 20 + 13_824 + last * 54 // 8
    assert (sealer.open(iter(released), size) == rows.sum(axis=0)).all()
    for wrong in (released[:2], [*released, released[0]], released[::-1], []):
        with pytest.raises(ChunkRefused):
            sealer.open(wrong, size)


def test_sizes_are_the_sum_of_their_parts():
    # A 20-byte header; 65 bytes of seed and 2048 words of 54 bits a ciphertext, of the last one those in use.
    whole, short = Place(0, 3, 3 * 2048), Place(0, 3, 2 * 2048 + 16)
    assert chunk_size(SMALL, 1, whole) == 20 + 3 * (65 + 2048 * 54 // 8)
    assert chunk_size(SMALL, 1, short) == 20 + 3 * 65 + (2 * 2048 + 16) * 54 // 8
    assert chunk_size(SMALL, 2, whole) == 20 + 3 * 2 * 2048 * 54 // 8
    assert chunk_size(SMALL, 2, short) == 20 + (5 * 2048 + 16) * 54 // 8
    assert vector_size(SMALL, 130 * 2048, 1) == 3 * 20 + 130 * (65 + 13824)
    assert vector_size(SMALL, 129 * 2048 + 8, 1) == 3 * 20 + 129 * (65 + 13824) + 65 + 54
    assert vector_size(LARGE, 4096, 2) == 20 + 2 * 4096 * 60 // 8
    assert vector_size(LARGE, 24, 2) == 20 + (4096 + 24) * 60 // 8


def test_a_vector_that_does_not_fill_whole_bytes_is_refused_rather_than_cut():
    public = PublicContext(SMALL, 40)
    sealer = EncryptedSealer(SecretContext(public))
    for slots in (1, 2047, 2049):
        with pytest.raises(BadInput, match=f"found {slots} slots, expected a multiple of 8"):
            list(sealer.protect(np.ones(slots, dtype=np.uint64)))
        with pytest.raises(BadInput):
            sealer.open([], slots)
        with pytest.raises(BadInput):
            EncryptedFold(public, slots)


# ------------------------------------------------------------- what SEAL does, word by word


def plaintext(public, coefficients):
    """A SEAL plaintext of (N,) uint64 below 2^slot_bits, from its uncompressed stream."""
    count = len(coefficients)
    body = struct.pack("<4QQd", 0, 0, 0, 0, count, 1.0)
    body += bfv._seal_header(24 + 8 * count) + struct.pack("<Q", count)
    return Courier().give(
        public.api.Plaintext(), public.seal, body + coefficients.astype("<u8").tobytes()
    )


def seals_sum(public, uploads, mask):
    """The words (ciphertexts, 2, N) that SEAL's own operations give: loaded, added, one plaintext subtracted."""
    evaluator, courier, degree = public.api.Evaluator(public.seal), Courier(), public.ring.degree
    found = []
    for block in range(len(mask) // degree):
        total = None
        for chunk in uploads:
            seeds, (words,) = bfv_chunks.read_chunk(
                public, SEEDED, chunk, Place(0, len(mask) // degree, len(mask))
            )
            one = bfv._load_seeded(courier, public, words[block], seeds[block].tobytes())
            if total is None:
                total = one
            else:
                evaluator.add_inplace(total, one)
        evaluator.sub_plain_inplace(
            total, plaintext(public, mask[block * degree : (block + 1) * degree])
        )
        found.append(bfv._words_of(public, FULL, courier.take(total)).reshape(2, degree))
    return np.stack(found)


@pytest.mark.parametrize(
    ("ring", "slot_bits", "sites"),
    [(SMALL, 40, 4), (SMALL, 46, 3), (LARGE, 52, 3), (SMALL, 40, 2 * bfv.MOST_LATER + 3)],
)
def test_a_fold_has_the_words_of_seal_whatever_is_done_ahead(ring, slot_bits, sites):
    """Adding words, expanding seeds later and taking masks off by hand change no bit, in any order of the steps."""
    public, size = PublicContext(ring, slot_bits), 2 * ring.degree
    sealer, rng = EncryptedSealer(SecretContext(public)), np.random.default_rng(13)
    rows = rng.integers(0, 1 << slot_bits, (sites, size), dtype=np.uint64)
    mask = rng.integers(0, 1 << slot_bits, size, dtype=np.uint64)
    mask[:4] = (0, (1 << slot_bits) - 1, 1 << slot_bits >> 1, 1)
    uploads = [next(iter(sealer.protect(row))) for row in rows]
    expected = seals_sum(public, uploads, mask)
    ahead = EncryptedFold.expand_ahead, EncryptedFold.read_ahead
    for steps in ([], ahead[:1], ahead, [*ahead, *ahead] * 2):
        for merged in (False, True):
            fold = EncryptedFold(public, size)
            for chunk in uploads:
                if merged:
                    beside = EncryptedFold(public, size)
                    beside.add(0, chunk)
                    for step in steps[1:]:
                        step(beside)
                    fold.merge(beside)
                else:
                    fold.add(0, chunk)
                for step in steps:
                    step(fold)
            fold.remove(mask)
            (chunk,) = fold.total()
            _, (seconds, firsts) = bfv_chunks.read_chunk(public, FULL, chunk, Place(0, 2, size))
            assert (np.stack([firsts, seconds], axis=1) == expected).all()
            assert not fold.expand_ahead() and not fold.read_ahead()


def test_nothing_is_left_to_be_done_ahead_of_a_sum_that_has_its_seeds():
    public = PublicContext(SMALL, 40)
    fold = EncryptedFold(public, 2048, seeds=True)
    (upload,) = EncryptedSealer(SecretContext(public)).protect(np.arange(2048, dtype=np.uint64))
    fold.add(0, upload)
    assert not fold.expand_ahead() and not fold.read_ahead()


# ------------------------------------------------------------------------- encryptions made ahead


@pytest.mark.parametrize(
    ("ring", "slot_bits"),
    [(SMALL, bits) for bits in (1, 2, 16, 17, 40, 46)]
    + [(LARGE, bits) for bits in (1, 16, 52, 59)],
)
def test_a_plaintext_is_added_to_an_encryption_of_zero_as_seal_adds_it(ring, slot_bits):
    """Word by word what SEAL makes of the same encryption, for the least, the largest and random plaintexts."""
    public, t = PublicContext(ring, slot_bits), 1 << slot_bits
    sealer, courier = EncryptedSealer(SecretContext(public)), Courier()
    slots = np.random.default_rng(7).integers(0, t, ring.degree, dtype=np.uint64)
    slots[:4] = (0, t - 1, t >> 1, 1)
    words, seed = sealer._encrypted_zero()
    tail = words.astype("<u8").tobytes() + bfv._seal_header(81) + seed
    ciphertext = bfv._load(courier, public, SEEDED, tail)
    plain = plaintext(public, slots)
    public.api.Evaluator(public.seal).add_plain_inplace(ciphertext, plain)
    expected = bfv._words_of(public, FULL, courier.take(ciphertext))[: ring.degree]
    ours = words.copy()
    bfv._add(public, ours, bfv._scaled(public, slots))
    assert ours.tolist() == expected.tolist()
    assert words.tolist() != expected.tolist()


def test_what_was_encrypted_ahead_is_used_for_one_ciphertext_and_sums_stay_exact():
    public = PublicContext(SMALL, 40)
    sealer, made = EncryptedSealer(SecretContext(public)), []
    honest = sealer._encrypted_zero

    def counted():
        made.append(honest())
        return made[-1]

    sealer._encrypted_zero = counted
    sealer.prepare(3 * 2048)
    sealer.prepare(3 * 2048)
    assert len(made) == 3, "no more than one vector needs"
    rows = np.random.default_rng(8).integers(0, 2**38, (2, 3 * 2048), dtype=np.uint64)
    first = list(sealer.protect(rows[0]))
    assert len(made) == 3, "none was made while the vector was protected"
    second = list(sealer.protect(rows[1]))
    assert len(made) == 6, "none is used again"
    assert len({seed for _, seed in made}) == 6
    opened = sealer.open(fold_of(public, 3 * 2048, [first, second]).total(), 3 * 2048)
    assert (opened == rows.sum(axis=0)).all()


def test_a_forked_child_does_not_use_what_its_parent_encrypted_ahead():
    sealer = EncryptedSealer(SecretContext(PublicContext(SMALL, 40)))
    sealer.prepare(2048)
    child = os.fork()
    if child == 0:
        found = 1
        with contextlib.suppress(Unavailable):
            next(sealer.protect(np.zeros(2048, dtype=np.uint64)))
            found = 2
        os._exit(0 if found == 1 else found)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(sealer._ahead) == 1


def test_no_more_is_encrypted_ahead_than_fits_the_memory_set_aside():
    sealer = EncryptedSealer(SecretContext(PublicContext(SMALL, 40)))
    sealer.prepare(5 * 2048, most=2)
    assert len(sealer._ahead) == 2


# --------------------------------------------------------------------- sums with summands' seeds


@pytest.mark.parametrize("ring", [SMALL, LARGE])
@pytest.mark.parametrize(("blocks", "unused"), [(1, 0), (1, 2000), (3, 0), (3, 2040)])
def test_a_sum_with_the_summands_seeds_opens_to_the_same_slots_in_fewer_bytes(ring, blocks, unused):
    """The words of the second polynomial are what the seeds expand to, added up: with masks off, in any order."""
    public, size = PublicContext(ring, 40), blocks * ring.degree - unused
    sealer, rng = EncryptedSealer(SecretContext(public)), np.random.default_rng(9)
    rows = rng.integers(0, 2**38, (4, size), dtype=np.uint64)
    mask = rng.integers(0, 2**40, size, dtype=np.uint64)
    uploads = [next(iter(sealer.protect(row))) for row in rows]
    sums = []
    for seeds in (False, True):
        fold, beside = (EncryptedFold(public, size, seeds=seeds) for _ in range(2))
        for place in (2, 0, 1):
            fold.add(0, uploads[place])
        beside.add(0, uploads[3])
        fold.merge(beside)
        fold.remove(mask)
        sums.append(list(fold.total()))
    (full,), (short,) = sums
    assert (
        len(short)
        == sum_size(ring, size, 4)
        == len(full) - blocks * (ring.degree * ring.modulus_bits // 8 - 4 * 65)
    )
    expected = (rows.sum(axis=0) - mask) % np.uint64(2**40)
    for chunk in (full, short):
        assert (sealer.open([chunk], size) == expected).all()
    seeds, words = bfv_chunks.read_summed(public, short, Place(0, blocks, size))
    for row in range(blocks):
        summed = bfv._words_of(public, FULL, Courier().take(sealer._summed(seeds[row], words[row])))
        assert summed.tolist() == read_chunk(public, FULL, full, blocks, size).words[row].tolist()


def test_seeds_are_sent_only_where_they_are_shorter_and_the_vector_is_one_chunk(blocks_per_chunk):
    public = PublicContext(SMALL, 40)
    (upload,) = EncryptedSealer(SecretContext(public)).protect(np.arange(2048, dtype=np.uint64))
    for sites, short in ((212, True), (213, False)):  # 13,824 bytes of words, 65 a seed
        fold = EncryptedFold(public, 2048, seeds=True)
        for _ in range(sites):
            fold.add(0, upload)
        (total,) = fold.total()
        assert len(total) == sum_size(SMALL, 2048, sites)
        assert (len(total) < vector_size(SMALL, 2048, 2)) == short
    blocks_per_chunk(2)
    assert sum_size(SMALL, 3 * 2048, 4) == vector_size(SMALL, 3 * 2048, 2)


def test_a_sum_with_seeds_that_is_cut_changed_or_of_other_parameters_is_refused():
    public, size = PublicContext(SMALL, 40), 2 * 2048
    sealer = EncryptedSealer(SecretContext(public))
    fold = EncryptedFold(public, size, seeds=True)
    for _ in range(2):
        fold.add(0, next(sealer.protect(np.arange(size, dtype=np.uint64))))
    (good,) = fold.total()
    sealer.open([good], size)
    other = PublicContext(SMALL, 41).digest
    top = good[: 20 + 2 * 2 * 65] + b"\xff" * (2 * 13_824)
    wrong = {
        "cut": good[:-1], "longer": good + b"x", "no seed": good[:5] + b"\x00" + good[6:],
        "three seeds": good[:5] + b"\x03" + good[6:], "one block": good[:6] + b"\x01\x00" + good[8:],
        "parameters": good[:8] + other + good[16:], "another place": good[:16] + b"\x01" + good[17:],
        "beyond the modulus": top, "empty": b"", "another kind": good[:4] + b"\x04" + good[5:],
    }  # fmt: skip
    for chunk in wrong.values():
        with pytest.raises(ChunkRefused):
            sealer.open([chunk], size)
    with pytest.raises(ChunkRefused):  # it is a sum, and no upload
        EncryptedFold(public, size).add(0, good)


# --------------------------------------------------------------- masks taken off an encrypted sum


def last_proved(ring, slot_bits):
    """The most ciphertexts whose sum, less one plaintext, is proved exact: 43 n + 1 < q / t."""
    return (ring.modulus - 1 - 2**slot_bits) // (43 * 2**slot_bits)


@pytest.mark.parametrize(
    ("ring", "slot_bits"),
    [(ring, bits) for ring, top in ((SMALL, 46), (LARGE, 52)) for bits in range(top - 3, top + 1)],
)
def test_masked_sums_are_exact_at_the_last_proved_number_of_sites(ring, slot_bits):
    """Any residue in any slot, as masks leave them, and one subtraction of any residues from the sum."""
    sites = last_proved(ring, slot_bits)
    assert ring.proves(sites, slot_bits) and not ring.proves(sites + 1, slot_bits)
    assert sites in (5, 11, 23, 47)
    rng, t = np.random.default_rng(slot_bits), 1 << slot_bits
    rows = rng.integers(0, t, (sites, ring.degree), dtype=np.uint64)
    rows[0], rows[1, :2] = t - 1, (0, t >> 1)
    mask = rng.integers(0, t, ring.degree, dtype=np.uint64)
    mask[:4] = (0, t - 1, t >> 1, 1)
    public = PublicContext(ring, slot_bits)
    sealer = EncryptedSealer(SecretContext(public))
    fold = fold_of(public, ring.degree, map(sealer.protect, rows))
    fold.remove(mask)
    expected = (rows.sum(axis=0) - mask) % np.uint64(t)
    assert (sealer.open(fold.total(), ring.degree) == expected).all()


def test_a_plain_modulus_far_beyond_the_proof_gives_wrong_sums():
    """The control: such a sum can go wrong, silently. Two to four bits beyond, it happens not to."""
    rng, public = np.random.default_rng(4), PublicContext(SMALL, 49)
    sealer = EncryptedSealer(SecretContext(public))
    rows = rng.integers(0, 2**49, (16, 2048), dtype=np.uint64)
    fold = fold_of(public, 2048, map(sealer.protect, rows))
    fold.remove(rows[0])
    assert (sealer.open(fold.total(), 2048) != rows[1:].sum(axis=0) % np.uint64(2**49)).any()


@pytest.mark.parametrize(
    ("ring", "slot_bits"), [(SMALL, 40), (SMALL, 46), (LARGE, 52), (LARGE, 44)]
)
def test_a_subtraction_moves_each_coefficient_by_at_most_half_more_than_it_should(ring, slot_bits):
    """The half that `packing.py` reserves for it, read off the words: c0 falls by q m / t, c1 stays."""
    public, t = PublicContext(ring, slot_bits), 1 << slot_bits
    sealer = EncryptedSealer(SecretContext(public))
    mask = np.random.default_rng(5).integers(0, t, ring.degree, dtype=np.uint64)
    mask[:4] = (0, t - 1, t >> 1, 1)
    fold = fold_of(public, ring.degree, [sealer.protect(mask)])
    (before,) = fold.total()
    fold.remove(mask)
    (after,) = fold.total()
    old, new = (read_chunk(public, FULL, chunk).words[0] for chunk in (before, after))
    assert (old[ring.degree :] == new[ring.degree :]).all()
    for value, was, now in zip(mask.tolist(), old.tolist(), new.tolist(), strict=False):
        fall = (was - now) % ring.modulus
        # |fall - q m / t| <= 1/2, multiplied by 2 t.
        assert abs(2 * t * fall - 2 * ring.modulus * value) <= t


def test_masks_of_several_chunks_come_off_in_any_order_of_folding(blocks_per_chunk):
    blocks_per_chunk(2)
    public, size = PublicContext(SMALL, 40), 5 * 2048
    sealer = EncryptedSealer(SecretContext(public))
    rng = np.random.default_rng(6)
    rows = rng.integers(0, 2**40, (3, size), dtype=np.uint64)
    mask = rng.integers(0, 2**64, size, dtype=np.uint64)  # taken mod t
    uploads = [list(sealer.protect(row)) for row in rows]
    sums = []
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        fold = EncryptedFold(public, size)
        for index, site in zip(order * 3, [s for s in order for _ in range(3)], strict=True):
            fold.add(index, uploads[site][index])
        fold.remove(mask)
        sums.append(list(fold.total()))
    assert sums[0] == sums[1] == sums[2]
    expected = (rows.sum(axis=0) - mask) % np.uint64(2**40)
    assert (sealer.open(sums[0], size) == expected).all()


def test_masks_come_off_once_whole_and_from_a_whole_sum(blocks_per_chunk):
    blocks_per_chunk(1)
    public = PublicContext(SMALL, 40)
    sealer = EncryptedSealer(SecretContext(public))
    slots, mask = np.arange(4096, dtype=np.uint64), np.ones(4096, dtype=np.uint64)
    first, second = sealer.protect(slots)
    fold = EncryptedFold(public, 4096)
    for missing, chunk in ((0, first), (1, second)):
        with pytest.raises(ChunkRefused, match=f"ciphertext {missing} was never added"):
            fold.remove(mask)
        fold.add(missing, chunk)
    whole = list(fold.total())
    for wrong in (mask[:2048], mask[:4095], np.ones(4097, np.uint64), mask.astype(np.int64)):
        with pytest.raises(BadInput, match=r"expected uint64 of shape \(4096,\)"):
            fold.remove(wrong)
    assert list(fold.total()) == whole
    fold.remove(mask)
    with pytest.raises(BadInput, match="found a second removal, expected one"):
        fold.remove(mask)
    with pytest.raises(ChunkRefused, match="the masks are already off this sum"):
        fold.add(0, first)
    opened = sealer.open(fold.total(), 4096)
    assert opened[0] == 2**40 - 1 and (opened[1:] == slots[:-1]).all()


# ------------------------------------------------------------------------------- refused chunks


class Setting:
    def __init__(self):
        self.public = PublicContext(SMALL, 40)
        self.sealer = EncryptedSealer(SecretContext(self.public))
        self.slots = np.arange(4096, dtype=np.uint64)
        (self.up,) = self.sealer.protect(self.slots)
        (self.down,) = fold_of(self.public, 4096, [[self.up]]).total()

    def refused_by_fold(self, chunk, match="", index=0):
        """Refused before anything is added, on an empty sum and on a running one."""
        for before in ([], [[self.up]]):
            fold = fold_of(self.public, 4096, before)
            with pytest.raises(ChunkRefused, match=match):
                fold.add(index, chunk)
            if before:
                assert list(fold.total()) == [self.down]
            else:
                assert fold._summands == [0, 0]


@pytest.fixture(scope="module")
def setting():
    return Setting()


def test_truncated_and_oversized_chunks_are_refused(setting):
    for size in (0, 1, 19, 20, 21, len(setting.up) - 1):
        setting.refused_by_fold(
            setting.up[:size], f"found {size} bytes, expected {len(setting.up)}"
        )
        with pytest.raises(ChunkRefused, match=f"found {size} bytes"):
            setting.sealer.open([setting.down[:size]], 4096)
    for more in (b"\x00", bytes(10_000), setting.up):
        setting.refused_by_fold(setting.up + more, "bytes, expected")
        with pytest.raises(ChunkRefused, match="bytes, expected"):
            setting.sealer.open([setting.down + more], 4096)


def test_foreign_material_is_refused(setting):
    size = len(setting.up)
    setting.refused_by_fold(bytes(size), "not a Fedcore ciphertext chunk")
    setting.refused_by_fold(b"PK\x03\x04" + setting.up[4:], "not a Fedcore ciphertext chunk")
    spoiled = bytearray(setting.up)
    spoiled[5] = 1  # the reserved byte
    setting.refused_by_fold(bytes(spoiled), "not a Fedcore ciphertext chunk")
    setting.refused_by_fold(os.urandom(size), "chunk at ciphertext 0")


@pytest.mark.parametrize("ring", [SMALL, LARGE])
def test_ciphertexts_under_other_parameters_are_refused_by_name(setting, ring):
    other = PublicContext(ring, 41 if ring is SMALL else 40)
    (chunk,) = EncryptedSealer(SecretContext(other)).protect(np.zeros(ring.degree, np.uint64))
    fold = EncryptedFold(setting.public, 2048)
    # The same length, were the rings of one size: the digest names the reason.
    match = "other encryption parameters" if ring is SMALL else "bytes, expected"
    with pytest.raises(ChunkRefused, match=match):
        fold.add(0, chunk)
    moved = chunk[:8] + setting.public.digest + chunk[16:]
    if ring is SMALL:
        fold.add(0, moved)  # the control: only the digest told them apart


def test_a_chunk_of_another_place_or_count_is_refused(setting, blocks_per_chunk):
    blocks_per_chunk(1)
    first, second = setting.sealer.protect(setting.slots)
    fold = EncryptedFold(setting.public, 4096)
    for index, chunk in ((0, second), (1, first)):
        with pytest.raises(ChunkRefused, match=r"ciphertexts at \d"):
            fold.add(index, chunk)
    for index in (-1, 2, 3, 1 << 40):
        with pytest.raises(ChunkRefused, match=f"chunk {index}: expected chunks 0 to 1"):
            fold.add(index, first)
    assert fold._summands == [0, 0]
    fold.add(0, first)
    with pytest.raises(ChunkRefused, match="ciphertext 1 was never added"):
        list(fold.total())
    whole = write_chunk(setting.public, SEEDED, np.zeros(2048, np.uint64), [first[20:85]])
    assert len(whole) == len(first)
    relabelled = bytearray(first)
    relabelled[6] = 2  # claims two ciphertexts
    with pytest.raises(ChunkRefused, match="with 2 ciphertexts"):
        fold.add(0, bytes(relabelled))


def test_a_full_chunk_is_no_upload_and_a_seeded_one_no_sum(setting):
    setting.refused_by_fold(setting.down, "bytes, expected")
    with pytest.raises(ChunkRefused, match="bytes, expected"):
        setting.sealer.open([setting.up], 4096)
    # Cut or padded to the right length: the kind in the header is refused too.
    kinds = r"found kind {} with 2 ciphertexts at 0, expected kind {}"
    setting.refused_by_fold(setting.down[: len(setting.up)], kinds.format(2, 1))
    padded = setting.up + bytes(len(setting.down) - len(setting.up))
    with pytest.raises(ChunkRefused, match=kinds.format(1, 2)):
        setting.sealer.open([padded], 4096)


@pytest.mark.parametrize("excess", [0, 1, (1 << 54) - 1 - SMALL.modulus])
@pytest.mark.parametrize("place", [0, 2047, 2048, 4095])
def test_a_coefficient_at_or_above_the_modulus_is_refused(setting, excess, place):
    parsed = read_chunk(setting.public, SEEDED, setting.up, 2)
    words = parsed.words.reshape(-1).copy()
    seeds = [seed.tobytes() for seed in parsed.seeds]
    words[place] = SMALL.modulus + excess
    forged = write_chunk(setting.public, SEEDED, words, seeds)
    setting.refused_by_fold(forged, "a coefficient is not below the modulus")
    words[place] = SMALL.modulus - 1  # the control: the largest coefficient there is
    EncryptedFold(setting.public, 4096).add(0, write_chunk(setting.public, SEEDED, words, seeds))
    full = read_chunk(setting.public, FULL, setting.down, 2).words.reshape(-1).copy()
    full[2 * place] = SMALL.modulus + excess
    with pytest.raises(ChunkRefused, match="not below the modulus"):
        setting.sealer.open([write_chunk(setting.public, FULL, full)], 4096)


@pytest.mark.parametrize("ciphertext", [0, 1])
@pytest.mark.parametrize("kind", [0, 3, 4, 127, 255])
def test_a_seed_of_an_unknown_generator_is_refused(setting, kind, ciphertext):
    forged = bytearray(setting.up)
    forged[20 + 65 * ciphertext] = kind
    setting.refused_by_fold(bytes(forged), f"found a seed for generator {kind}")


@settings(max_examples=300)
@given(data=st.data())
def test_no_bytes_of_a_chunk_raise_anything_but_chunk_refused(setting, data):
    """Bits flipped in the header, the seeds and the words; runs cut out, doubled or overwritten."""
    up = data.draw(st.booleans())
    chunk = bytearray(setting.up if up else setting.down)
    for _ in range(data.draw(st.integers(1, 4))):
        last = data.draw(st.sampled_from([19, 160, len(chunk) - 1]))
        place = data.draw(st.integers(0, min(last, len(chunk) - 1)))
        chunk[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([None, None, None, "cut", "doubled"]))
    if cut:
        start, size = data.draw(st.integers(0, len(chunk) - 1)), data.draw(st.integers(1, 100))
        middle = b"" if cut == "cut" else bytes(chunk[start : start + size]) * 2
        chunk[start : start + size] = middle
    try:
        if up:
            EncryptedFold(setting.public, 4096).add(0, bytes(chunk))
        else:
            setting.sealer.open([bytes(chunk)], 4096)
    except ChunkRefused:
        pass


def test_an_all_zero_sum_opens_to_zeros_for_the_tag_to_refuse(setting):
    blank = setting.down[:20] + bytes(len(setting.down) - 20)
    assert not setting.sealer.open([blank], 4096).any()


# -------------------------------------------------------------------------------------- contexts


def test_a_public_context_survives_bytes_and_pickle():
    for public in (PublicContext(SMALL, 40), PublicContext.of(solve_packing(16, 64, "encrypted"))):
        data = public.to_bytes()
        assert len(data) == 16
        for copied in (PublicContext.from_bytes(data), pickle.loads(pickle.dumps(public))):
            assert (copied.ring, copied.slot_bits) == (public.ring, public.slot_bits)
            assert copied.digest == public.digest
            degree = public.ring.degree
            sealer = EncryptedSealer(SecretContext(public))
            fold = fold_of(copied, degree, [sealer.protect(np.arange(degree, dtype=np.uint64))])
            assert (sealer.open(fold.total(), degree) == np.arange(degree)).all()


def test_digests_tell_every_parameter_apart():
    contexts = [PublicContext(SMALL, 40), PublicContext(SMALL, 41), PublicContext(LARGE, 40)]
    assert len({context.digest for context in contexts}) == 3
    assert all(len(context.digest) == 8 for context in contexts)


@pytest.mark.parametrize("size", [0, 15, 17, 1000])
def test_public_bytes_of_another_length_are_refused(size):
    with pytest.raises(ChunkRefused, match=f"found {size} bytes, expected 16"):
        PublicContext.from_bytes(bytes(size))


@settings(max_examples=150)
@given(
    degree=st.sampled_from([0, 1024, 2047, 2048, 4096, 8192, 2**31]),
    slot_bits=st.sampled_from([0, 1, 20, 46, 53, 54, 59, 60, 61, 2**31]),
    modulus=st.one_of(
        st.sampled_from([0, 1, 2, 3, 12289, SMALL.modulus, LARGE.modulus, 2**54 - 1, 2**64 - 1]),
        st.integers(0, 2**64 - 1),
    ),
)
def test_public_bytes_give_a_context_or_a_refusal(degree, slot_bits, modulus):
    data = degree.to_bytes(4, "little") + slot_bits.to_bytes(4, "little")
    try:
        context = PublicContext.from_bytes(data + modulus.to_bytes(8, "little"))
    except PlanRefused:
        return
    assert context.ring.modulus_bits <= {1024: 27, 2048: 54, 4096: 109, 8192: 218}[degree]
    assert 1 <= slot_bits <= 59


@pytest.mark.parametrize("slot_bits", [-1, 0, 60, 64])
def test_a_plain_modulus_seal_cannot_hold_is_refused(slot_bits):
    with pytest.raises(PlanRefused, match=r"plain modulus: found 2\^"):
        PublicContext(LARGE, slot_bits)


def test_seal_itself_refuses_a_modulus_the_table_forbids(monkeypatch):
    """Both lines of defence hold alone: ours (test_plan), and SEAL's with ours out of the way."""
    monkeypatch.setitem(bfv.Ring.__init__.__globals__, "SECURITY_TABLE", {2048: 60})
    sealapi = load_seal()
    (prime,) = sealapi.CoeffModulus.Create(2048, [55])
    with pytest.raises(PlanRefused, match="SEAL refuses it"):
        PublicContext(Ring(2048, prime.value()), 40)


def test_a_plain_packing_has_no_context():
    with pytest.raises(PlanRefused, match="found no ring"):
        PublicContext.of(solve_packing(16, 4, "plain"))


def test_secrets_are_redacted_and_never_compared_copied_or_pickled():
    public = PublicContext(SMALL, 40)
    one, two = SecretContext(public), SecretContext(public)
    assert repr(one) == str(one) == f"{one}" == "SecretContext(<redacted>)"
    assert str([one]) == "[SecretContext(<redacted>)]"
    for refused in (lambda: one == two, lambda: one != two, lambda: hash(one), lambda: one == 1):
        with pytest.raises(TypeError):
            refused()
    for refused in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="never pickled"):
            refused(one)
    with pytest.raises(TypeError):
        pickle.dumps(EncryptedSealer(one))
    # One byte form, for the sealed envelopes of a key epoch.
    assert [name for name in dir(one) if re.search("byte|payload|save", name)] == [
        "from_payload",
        "to_payload",
    ]


@pytest.mark.parametrize(("ring", "slot_bits"), [(SMALL, 46), (LARGE, 52)])
def test_a_key_epoch_s_payload_is_the_same_key_elsewhere(ring, slot_bits):
    """Encrypted under one, opened under the other, both ways, and one group secret."""
    public = PublicContext(ring, slot_bits)
    made = SecretContext(public)
    payload = made.to_payload()
    assert len(payload) == 8 * ring.degree + 32
    assert payload[-32:] == made.group.to_bytes()
    again = SecretContext.from_payload(PublicContext.from_bytes(public.to_bytes()), payload)
    assert again.to_payload() == payload == made.to_payload()
    assert again.group.derive(b"s", b"i", 32) == made.group.derive(b"s", b"i", 32)
    rows = np.random.default_rng(7).integers(0, 2**slot_bits, (4, ring.degree), dtype=np.uint64)
    sealers = (EncryptedSealer(made), EncryptedSealer(again))
    fold = fold_of(public, ring.degree, [sealers[i % 2].protect(rows[i]) for i in range(3)])
    fold.remove(rows[3])
    released = list(fold.total())
    expected = (rows[:3].sum(axis=0) - rows[3]) % np.uint64(1 << slot_bits)
    for sealer in sealers:
        assert (sealer.open(released, ring.degree) == expected).all()
    stranger = EncryptedSealer(SecretContext(public))
    assert (stranger.open(released, ring.degree) != expected).any()


def test_payloads_are_of_fresh_keys_and_group_secrets():
    public = PublicContext(SMALL, 40)
    one, two = SecretContext(public).to_payload(), SecretContext(public).to_payload()
    assert one[:-32] != two[:-32] and one[-32:] != two[-32:]


def with_words(payload, changes):
    words = np.frombuffer(payload[:-32], "<u8").copy()
    for place, value in changes.items():
        words[place] = value
    return words.tobytes() + payload[-32:]


@pytest.mark.parametrize(
    "spoil",
    {
        "empty": lambda payload: b"",
        "group secret alone": lambda payload: payload[-32:],
        "truncated": lambda payload: payload[:-1],
        "oversized": lambda payload: payload + b"\0",
        "twice": lambda payload: payload * 2,
        "of the other ring": lambda _: SecretContext(PublicContext(LARGE, 40)).to_payload(),
        "first word": lambda payload: with_words(payload, {0: SMALL.modulus}),
        "last word": lambda payload: with_words(payload, {2047: 2**64 - 1}),
        "no key": lambda payload: bytes(len(payload) - 32) + payload[-32:],
    }.items(),
    ids=lambda named: named[0],
)
def test_a_payload_that_is_no_key_of_this_ring_is_refused(spoil):
    public = PublicContext(SMALL, 40)
    payload = SecretContext(public).to_payload()
    with pytest.raises(EnvelopeRefused, match="key epoch") as refused:
        SecretContext.from_payload(public, spoil[1](payload), sender="ann")
    assert refused.value.fault == "ann"
    with pytest.raises(EnvelopeRefused) as refused:
        SecretContext.from_payload(public, spoil[1](payload))
    assert refused.value.fault == "this site"
    # The control: the largest coefficient there is.
    SecretContext.from_payload(public, with_words(payload, {0: SMALL.modulus - 1}))


def test_no_word_of_a_refused_payload_is_in_the_refusal():
    public = PublicContext(SMALL, 40)
    payload = with_words(SecretContext(public).to_payload(), {5: 2**64 - 3})
    with pytest.raises(EnvelopeRefused) as refused:
        SecretContext.from_payload(public, payload)
    said = str(refused.value) + refused.value.remedy
    assert str(2**64 - 3) not in said
    assert not any(len(number) > 5 for number in re.findall(r"\d+", said))


def test_a_key_that_seal_lays_out_otherwise_is_not_sent(monkeypatch):
    secret = SecretContext(PublicContext(SMALL, 40))
    monkeypatch.setattr(bfv, "_key_prefix", lambda _: bytes(72))
    with pytest.raises(Unavailable, match="layout unknown"):
        secret.to_payload()


def test_the_fold_holds_public_material_only():
    """An attribute walk over everything the coordinator's object can reach."""
    public = PublicContext(SMALL, 40)
    sealer = EncryptedSealer(SecretContext(public))
    fold = fold_of(public, 2048, [sealer.protect(np.zeros(2048, dtype=np.uint64))])
    assert fold.expand_ahead()
    found, queue = set(), [fold]
    while queue:
        thing = queue.pop()
        for value in vars(thing).values() if hasattr(thing, "__dict__") else ():
            for item in value if isinstance(value, list) else [value]:
                if type(item).__name__ not in found and not isinstance(item, type(sys)):
                    found.add(type(item).__name__)
                    queue.append(item)
    assert {"PublicContext", "Ciphertext", "Evaluator"} <= found
    assert not {"SecretContext", "GroupSecret", "SecretKey", "Decryptor", "Encryptor"} & found


# --------------------------------------------------------------------------------------- courier


class Spy:
    """In place of a SEAL object: looks at the path while something lies there."""

    def __init__(self):
        self.seen = []

    def _look(self, path):
        info = Path(path).stat()
        self.seen.append((stat.S_IMODE(info.st_mode), info.st_size, path))

    def save(self, path):
        saved = load_seal().Plaintext("1x^3 + 5")
        saved.save(path)
        self._look(path)

    def load(self, context, path):
        self._look(path)
        raise RuntimeError("spoiled")


def test_the_private_file_is_private_and_nothing_stays_behind():
    courier = Courier(force_file=True)
    folder = Path(courier._path).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    spy = Spy()
    courier.take(spy)
    with pytest.raises(RuntimeError, match="spoiled"):
        courier.give(spy, None, b"a secret plaintext")
    assert all(mode == 0o600 and size > 0 for mode, size, _ in spy.seen)
    assert [path.name for path in folder.iterdir()] == ["seal"]
    assert Path(courier._path).stat().st_size == 0  # emptied after use, failed use included
    courier.close()
    assert not folder.exists()
    courier.close()


def test_a_courier_that_is_dropped_removes_its_folder():
    courier = Courier(force_file=True)
    folder = Path(courier._path).parent
    del courier
    gc.collect()
    assert not folder.exists()


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only")
def test_a_memfd_touches_no_disk():
    courier = Courier()
    assert courier._folder is None
    assert courier._path.startswith("/proc/self/fd/")
    spy = Spy()
    courier.take(spy)
    with pytest.raises(RuntimeError, match="spoiled"):
        courier.give(spy, None, b"a secret plaintext")
    assert os.fstat(courier._fd).st_size == 0
    courier.close()


def test_without_memfd_the_file_is_used_and_gives_the_same_sums(monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    public = PublicContext(SMALL, 40)
    secret = SecretContext(public)
    by_file = EncryptedSealer(secret)
    assert by_file._courier._folder is not None
    monkeypatch.undo()
    by_memory = EncryptedSealer(secret)
    slots = np.random.default_rng(3).integers(0, 2**38, 4096, dtype=np.uint64)
    for sealer, opener in ((by_file, by_memory), (by_memory, by_file)):
        for courier in (Courier(force_file=True), Courier()):
            fold = EncryptedFold(public, 4096, courier)
            for _ in range(3):
                fold.add(0, next(sealer.protect(slots)))
            assert (opener.open(fold.total(), 4096) == 3 * slots).all()


def test_a_forked_child_does_not_write_into_its_parents_path(monkeypatch):
    for force_file in (False, True):
        courier = Courier(force_file=force_file)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            for use in (lambda c: c.take(Spy()), lambda c: c.give(Spy(), None, b"x")):
                with pytest.raises(Unavailable, match="ciphertext path") as refused:
                    use(courier)
                assert "spawn" in refused.value.remedy
        courier.take(Spy())
        os.pwrite(courier._fd, b"the parent's", 0)
        kept = os.dup(courier._fd)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            courier.close()
        assert os.pread(kept, 100, 0) == b"the parent's"
        assert Path(courier._path).exists() == force_file
        os.close(kept)
        if courier._folder is not None:
            courier._folder.cleanup()  # what the parent would do


# ---------------------------------------------------------------------------- tenseal is missing


@pytest.fixture
def no_tenseal(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "tenseal"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tenseal", None)


def test_a_missing_tenseal_disables_encryption_with_one_line(no_tenseal):
    for use in (load_seal, lambda: PublicContext(SMALL, 40), self_test):
        with pytest.raises(Unavailable) as refused:
            use()
        reason = "protections 'encrypted' and 'layered': tenseal cannot be used here"
        assert reason in str(refused.value)
        assert "\n" not in str(refused.value)
        assert "`--protection masked` and `plain` run without it" in refused.value.remedy


def test_what_has_no_lattice_runs_where_tenseal_is_missing_or_broken(tmp_path):
    """A fresh interpreter in which `import tenseal` fails the way a broken wheel does."""
    package = tmp_path / "tenseal"
    package.mkdir()
    (package / "__init__.py").write_text(
        "raise OSError('libtenseal.so: cannot open\\nshared file')"
    )
    code = """
        import sys
        from dataclasses import replace
        import numpy as np
        from fedcore.secagg import in_process as loopback
        from fedcore.secagg.summing import one_by_one
        from fedcore.learning.stopwatch import Stopwatch
        from fedcore.errors import Unavailable
        from fedcore.secagg.packing import solve_packing
        from fedcore.secagg.plan import RangePlan, RoundPlan, ServerPlan, TrainPlan
        from fedcore.secagg.crypto.masked import MaskedFold, MaskedSealer

        plan = RoundPlan(
            "task", "", ("a", "b", "c"), "plain", solve_packing(16, 3, "plain"), 3, 0, 16, 1,
            TrainPlan(), ServerPlan(), RangePlan(),
        )
        wides = {"weight": [1], "over_range": [0], "over_half_range": [0], "exceeds": [0]}
        site = lambda i: (np.array([i, 1, 2], dtype=np.uint64), wides)
        epoch = loopback.sum_engine("job", plan)
        total = epoch.sum(plan.update_vector, 1, one_by_one(site), b"", Stopwatch())
        assert total.opened.coordinates.tolist() == [3, 3, 6]

        packing = solve_packing(16, 3, "masked")
        sealer, fold = MaskedSealer(packing), MaskedFold(packing, 2048)
        for index, chunk in enumerate(sealer.protect(np.arange(2048, dtype=np.uint64))):
            fold.add(index, chunk)
        fold.remove(np.ones(2048, dtype=np.uint64))
        assert sealer.open(fold.total(), 2048)[1:].tolist() == list(range(2047))

        for protection in ("encrypted", "layered"):
            stream = replace(
                plan, protection=protection, cipher="keystream",
                packing=solve_packing(16, 3, protection, cipher="keystream"),
            )
            epoch = loopback.InProcessFederation("job", stream)
            total = epoch.sum(plan.update_vector, 1, one_by_one(site), b"", Stopwatch())
            assert total.opened.coordinates.tolist() == [3, 3, 6]
        assert "tenseal" not in sys.modules

        packing = solve_packing(16, 3, "layered")
        try:
            loopback.InProcessFederation("job", replace(plan, protection="layered", packing=packing))
        except Unavailable as error:
            print(error, "hint:", error.remedy)
    """
    root = Path(bfv.__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "'encrypted' and 'layered': tenseal cannot be used here (OSError" in done.stdout
    assert done.stdout.count("\n") == 1


def test_the_self_test_is_exact():
    assert self_test()["exact"] is True


@pytest.mark.parametrize("place", [0, 32, 41, 72, 89])
@pytest.mark.parametrize("kind", [1, 2])
def test_a_stream_laid_out_otherwise_is_refused(place, kind):
    """A later SEAL may move the words: better no upload than the wrong bytes of one."""
    public = PublicContext(SMALL, 36)
    body = bytearray(public.prefixes[kind] + bytes(kind * 8 * 2048 + 81))
    assert len(bfv._words_of(public, kind, bytes(body))) == kind * 2048
    body[place] ^= 1
    with pytest.raises(Unavailable, match="layout unknown"):
        bfv._words_of(public, kind, bytes(body))
