"""What shipped implementations got wrong about masks (security.md s1, a and b), on the machine's own masks."""

from __future__ import annotations

import numpy as np
import pytest
from kit import world_at

from fedcore.secagg.crypto import masking
from fedcore.secagg.crypto.masking import mask_sum


def stream(seed, bits, slots=64):
    return mask_sum(((seed, 1),), slots, bits)


def distinct_streams(seed, bits):
    flipped = [seed] + [
        seed[: b // 8] + bytes([seed[b // 8] ^ (1 << b % 8)]) + seed[b // 8 + 1 :]
        for b in range(256)
    ]
    return len({stream(each, bits).tobytes() for each in flipped})


def test_every_one_of_256_seed_bits_changes_the_mask(without):
    world = world_at("submit")
    seed = world.masks["ann"][1][0]
    assert len(seed) == 32
    assert distinct_streams(seed, world.bits) == 257
    real = masking.keystream  # control: a generator that folds its seed to 32 bits, as one did
    without(masking, keystream=lambda key, at: real(key[:4] * 8, at))
    assert distinct_streams(seed, world.bits) == 33


def ring_is_filled(words, bits):
    """Every bit of the ring set about half the time, the top ones included."""
    share = [(words >> np.uint64(b) & np.uint64(1)).mean() for b in range(bits)]
    return all(0.45 < s < 0.55 for s in share)


def test_masks_fill_the_whole_ring():
    world = world_at("submit")
    for seed, _ in world.masks["ann"]:
        words = stream(seed, world.bits, 8192)
        assert ring_is_filled(words, world.bits)
        assert not ring_is_filled(words >> np.uint64(1), world.bits), "control: half the ring"
        assert not words.max() >> np.uint64(world.bits)


def test_pair_masks_cancel_and_self_masks_are_the_sites_own():
    world = world_at("submit")
    count = {}
    for masks in world.masks.values():
        for seed, sign in masks:
            count.setdefault(seed, []).append(sign)
    assert sorted(map(sorted, count.values())) == [[-1, 1]] * 10 + [[1]] * 5
    own = [world.masks[name][0] for name in world.roster]
    assert np.array_equal(world.minus(world.roster, own), world.plain_sum(world.roster))


@pytest.mark.parametrize("protection", ["masked", "layered"])
def test_a_masked_vector_says_nothing_and_an_encrypted_one_has_no_masks(protection):
    """The control: under `encrypted` whoever has the group's key reads a site's vector as it is."""
    world = world_at("submit", protection=protection)
    for name in world.roster:
        assert np.mean(world.masked[name] == world.plain[name]) < 0.1
    bare = world_at("submit", protection="encrypted")
    assert all(np.array_equal(bare.masked[n], bare.plain[n]) for n in bare.roster)
