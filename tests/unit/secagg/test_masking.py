"""Masks against their slow reference, and what a mask generator must not lose (facts: entropy, uniformity)."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference_keys as reference

from fedcore.errors import BadInput
from fedcore.secagg.crypto import masking
from fedcore.secagg.crypto.masking import add_masks, mask_sum
from fedcore.secagg.crypto.symmetric import keystream

SEED, OTHER = bytes(range(32)), bytes(range(32, 64))


def seeds(count: int, word: str = "") -> list[bytes]:
    return [hashlib.sha256(f"{word} {k}".encode()).digest() for k in range(count)]


def ring_sum(slots: list[int], masks: list[tuple[bytes, int]], slot_bits: int) -> list[int]:
    """Python integers: slots + sum of sign * stream, reduced once."""
    streams = [(sign, reference.stream(key, len(slots))) for key, sign in masks]
    return [
        (slot + sum(sign * stream[k] for sign, stream in streams)) % 2**slot_bits
        for k, slot in enumerate(slots)
    ]


# -------------------------------------------------------------------------------- the mask itself


@settings(max_examples=40)
@given(
    data=st.data(),
    slot_bits=st.integers(1, 60),
    masks=st.lists(
        st.tuples(st.binary(min_size=32, max_size=32), st.sampled_from([1, -1])), max_size=5
    ),
)
def test_masks_are_the_reference(data, slot_bits, masks):
    slots = data.draw(st.lists(st.integers(0, 2**slot_bits - 1), max_size=20))
    found = np.array(slots, dtype=np.uint64)
    add_masks(found, masks, slot_bits)
    assert found.tolist() == ring_sum(slots, masks, slot_bits)


@pytest.mark.parametrize("extra", [-1, 0, 1])
@pytest.mark.parametrize("passes", [1, 2])
def test_the_stream_goes_on_across_passes(extra, passes):
    size = passes * masking._BLOCK + extra
    masks = [(SEED, 1), (OTHER, -1)]
    found = mask_sum(masks, size, 44)
    assert found.tolist() == ring_sum([0] * size, masks, 44)


def test_no_slots_and_no_masks():
    assert mask_sum([(SEED, 1)], 0, 40).tolist() == []
    slots = np.array([3, 2**40 - 1], dtype=np.uint64)
    add_masks(slots, [], 40)
    assert slots.tolist() == [3, 2**40 - 1]


def test_masks_may_come_from_a_generator_and_work_in_place():
    slots = np.full(100, 7, dtype=np.uint64)
    view = slots[10:90]
    add_masks(view, (pair for pair in [(SEED, 1)]), 40)
    assert slots[:10].tolist() == slots[90:].tolist() == [7] * 10
    assert view.tolist() == ring_sum([7] * 80, [(SEED, 1)], 40)


# ------------------------------------------------------------------------------------ cancellation


@pytest.mark.parametrize("slot_bits", [1, 16, 40, 44, 60])
def test_a_mask_taken_off_leaves_the_slots(slot_bits):
    slots = np.random.default_rng(1).integers(0, 2**slot_bits, 1000, dtype=np.uint64)
    slots[:2] = 0, 2**slot_bits - 1
    masked = slots.copy()
    add_masks(masked, [(SEED, 1)], slot_bits)
    assert (masked != slots).any()
    assert int(masked.max()) < 2**slot_bits
    add_masks(masked, [(SEED, -1)], slot_bits)
    assert (masked == slots).all()


@given(count=st.integers(2, 6), slot_bits=st.sampled_from([20, 40, 60]))
def test_pairwise_masks_cancel_and_self_masks_come_off_by_one_subtraction(count, slot_bits):
    slots = np.random.default_rng(count).integers(0, 2**16, (count, 50), dtype=np.uint64)
    pairs = {(i, j): seed for i in range(count) for j, seed in enumerate(seeds(count, str(i)))}
    selves = seeds(count, "self")
    total = np.zeros(50, dtype=np.uint64)
    for site in range(count):
        masked = slots[site].copy()
        masks = [(selves[site], 1)]
        masks += [(pairs[site, other], 1) for other in range(site + 1, count)]
        masks += [(pairs[other, site], -1) for other in range(site)]
        add_masks(masked, masks, slot_bits)
        assert (masked != slots[site]).sum() > 45
        total = (total + masked) % np.uint64(2**slot_bits)
    taken_off = mask_sum([(seed, 1) for seed in selves], 50, slot_bits)
    assert ((total - taken_off) % np.uint64(2**slot_bits)).tolist() == slots.sum(axis=0).tolist()


# ------------------------------------------------------------- security: entropy and uniformity


def test_seeds_that_differ_in_any_one_bit_give_unrelated_masks():
    masks = [mask_sum([(SEED, 1)], 64, 60)]
    for bit in range(256):
        flipped = (int.from_bytes(SEED, "little") ^ (1 << bit)).to_bytes(32, "little")
        masks.append(mask_sum([(flipped, 1)], 64, 60))
    # 257 masks of 64 slots of 60 bits: with full entropy no slot value ever comes twice.
    assert len(np.unique(np.concatenate(masks))) == 257 * 64


def test_seeds_that_fold_to_one_another_give_different_masks():
    # What a generator seeded by XOR-folding to 32 bits gives away: equal masks for unequal seeds.
    def folded(seed: bytes) -> int:
        return int(np.bitwise_xor.reduce(np.frombuffer(seed, "<u4")))

    swapped = SEED[4:8] + SEED[:4] + SEED[8:]
    assert folded(swapped) == folded(SEED)
    halves = bytes(16)
    assert folded(halves + halves) == folded(bytes(range(16)) * 2) == 0
    found = [
        mask_sum([(key, 1)], 8, 60) for key in (SEED, swapped, bytes(32), bytes(range(16)) * 2)
    ]
    assert len({mask.tobytes() for mask in found}) == 4


@pytest.mark.parametrize("length", [0, 16, 24, 31, 33, 64])
def test_a_seed_of_another_length_is_refused(length):
    # AES with 16 or 24 bytes works, and would have less than 256 bits of entropy.
    with pytest.raises(BadInput, match=f"{length} bytes"):
        mask_sum([(bytes(length), 1)], 8, 40)


SAMPLES = 1 << 18


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("slot_bits", [1, 17, 32, 40, 44, 60])
def test_every_bit_of_the_ring_is_masked_evenly(slot_bits, sign):
    mask = mask_sum([(SEED, sign)], SAMPLES, slot_bits)
    assert int(mask.max()) < 2**slot_bits
    for bit in range(slot_bits):
        ones = int((mask >> np.uint64(bit) & np.uint64(1)).sum())
        assert abs(ones - SAMPLES / 2) < 5 * SAMPLES**0.5 / 2, bit  # five standard deviations


@pytest.mark.parametrize("slot_bits", [8, 40, 60])
def test_values_are_uniform_over_the_whole_ring(slot_bits):
    mask = mask_sum([(SEED, 1)], SAMPLES, slot_bits)
    for shift in {0, slot_bits - 8}:  # the low and the high byte, 256 cells of 1024 expected
        cells = np.bincount((mask >> np.uint64(shift) & np.uint64(255)).astype(np.int64))
        statistic = float(((cells - SAMPLES / 256) ** 2 / (SAMPLES / 256)).sum())
        assert len(cells) == 256
        assert 140 < statistic < 395  # chi-squared with 255 degrees: 1e-8 on either side


@pytest.mark.parametrize("sign", [0, 2, -2])
def test_a_sign_is_one_or_minus_one(sign):
    with pytest.raises(BadInput, match=f"sign {sign}"):
        mask_sum([(SEED, sign)], 8, 40)


def test_the_stream_starts_at_zero_unless_told():
    zeros = bytes(64)
    assert keystream(SEED).update(zeros) == keystream(SEED, bytes(16)).update(zeros)
    later = keystream(SEED, (2).to_bytes(16, "big")).update(bytes(32))
    assert keystream(SEED).update(zeros)[32:] == later
