"""Words without their leading zeros, and back, against one long Python integer per group."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference

from fedcore.secagg.encode.bitpack import group_of, pack_words, packed_size, unpack_words


@st.composite
def words_of(draw: st.DrawFn) -> tuple[list[int], int]:
    bits = draw(st.integers(1, 64))
    groups = draw(st.integers(0, 9))
    top = 2**bits - 1
    value = st.one_of(st.integers(0, top), st.sampled_from([0, 1, top, top - 1 if bits > 1 else 0]))
    count = groups * group_of(bits)
    return draw(st.lists(value, min_size=count, max_size=count)), bits


@settings(max_examples=300)
@given(words_of())
def test_pack_words_is_the_reference_and_unpack_words_its_inverse(case):
    words, bits = case
    packed = pack_words(reference.uint64(words), bits)
    assert packed == reference.pack_words(words, bits)
    assert len(packed) == packed_size(len(words), bits)
    assert unpack_words(packed, bits, len(words)).tolist() == words
    assert unpack_words(memoryview(b"\xff" + packed)[1:], bits, len(words)).tolist() == words


@pytest.mark.parametrize("bits", range(1, 65))
def test_full_words_of_every_width_survive(bits):
    words = np.full(64, 2**bits - 1, dtype=np.uint64)
    packed = pack_words(words, bits)
    assert packed == b"\xff" * (8 * bits)
    assert (unpack_words(packed, bits, 64) == words).all()


@pytest.mark.parametrize("bits", [20, 40, 54, 59, 60])
def test_a_group_is_the_fewest_words_that_fill_bytes(bits):
    group = group_of(bits)
    assert group * bits % 8 == 0
    assert all(fewer * bits % 8 for fewer in range(1, group))


def test_no_bit_of_a_word_reaches_its_neighbours():
    for bits in (40, 54):
        words = np.zeros(16, dtype=np.uint64)
        for place in range(16):
            words[:] = 0
            words[place] = 2**bits - 1
            assert (unpack_words(pack_words(words, bits), bits, 16) == words).all()


def test_unpacked_words_are_below_the_width_whatever_the_bytes():
    noise = np.random.default_rng(0).bytes(packed_size(64, 54))
    words = unpack_words(noise, 54, 64)
    assert int(words.max()) < 2**54
    assert pack_words(words, 54) == noise
