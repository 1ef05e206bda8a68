"""`plain`: exact sums, exact sizes, and chunks that do not fit refused before anything is added."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import ChunkRefused
from fedcore.secagg.crypto.plain import PlainFold, PlainSealer
from fedcore.secagg.crypto.words import SLOTS_PER_CHUNK
from fedcore.secagg.packing import solve_packing


@settings(max_examples=50)
@given(
    bits=st.integers(2, 24), sites=st.integers(1, 200), blocks=st.integers(1, 4),
    seed=st.integers(0, 2**32), data=st.data(),
)  # fmt: skip
def test_the_opened_sum_is_the_integer_sum_in_any_order(bits, sites, blocks, seed, data):
    packing = solve_packing(bits, sites, "plain")
    contributors, rng = min(sites, 5), np.random.default_rng(seed)
    rows = [
        rng.integers(0, 2**packing.slot_bits // sites, blocks * 2048, dtype=np.uint64)
        for _ in range(contributors)
    ]
    sealer, fold = PlainSealer(packing), PlainFold(packing, blocks * 2048)
    chunks = [(i, c) for row in rows for i, c in enumerate(sealer.protect(row))]
    for index, chunk in data.draw(st.permutations(chunks)):
        fold.add(index, chunk)
    assert (sealer.open(fold.total(), blocks * 2048) == sum(rows)).all()


@pytest.fixture
def three_chunks():
    """Three full chunks, so that places in the middle exist."""
    packing = solve_packing(16, 4, "plain")
    slots = np.arange(3 * SLOTS_PER_CHUNK, dtype=np.uint64)
    return packing, slots, list(PlainSealer(packing).protect(slots))


def test_a_chunk_costs_its_bits(three_chunks):
    packing, _, chunks = three_chunks
    assert [len(chunk) for chunk in chunks] == [SLOTS_PER_CHUNK * packing.slot_bits // 8] * 3


@pytest.mark.parametrize("index", [-3, -1, 3, 4])
def test_a_chunk_off_the_vector_is_refused_and_nothing_is_added(three_chunks, index):
    packing, slots, chunks = three_chunks
    fold = PlainFold(packing, len(slots))
    for chunk in (chunks[0], b""):
        with pytest.raises(ChunkRefused, match=f"chunk {index}: "):
            fold.add(index, chunk)
    assert not PlainSealer(packing).open(fold.total(), len(slots)).any()


@pytest.mark.parametrize("spoil", [lambda c: c[:-1], lambda c: c + b"\x00", lambda _: b""])
def test_a_truncated_or_oversized_chunk_is_refused(three_chunks, spoil):
    packing, slots, chunks = three_chunks
    sealer, fold = PlainSealer(packing), PlainFold(packing, len(slots))
    with pytest.raises(ChunkRefused, match=rf"chunk 1: found \d+ bytes, expected {len(chunks[1])}"):
        fold.add(1, spoil(chunks[1]))
    assert not sealer.open(fold.total(), len(slots)).any()
    with pytest.raises(ChunkRefused, match="chunk 1"):
        sealer.open([chunks[0], spoil(chunks[1]), chunks[2]], len(slots))


def test_a_sum_of_too_few_or_too_many_chunks_is_refused(three_chunks):
    packing, slots, chunks = three_chunks
    sealer = PlainSealer(packing)
    assert (sealer.open(chunks, len(slots)) == slots).all()
    for wrong in (chunks[:2], [], [*chunks, chunks[0]], [*chunks, b""]):
        with pytest.raises(ChunkRefused):
            sealer.open(wrong, len(slots))


def test_a_hostile_slot_stays_in_its_place():
    """Slots beyond the headroom wrap in the ring, as they do under encryption; neighbours are safe."""
    packing = solve_packing(16, 4, "plain")
    slots = np.zeros(2048, dtype=np.uint64)
    slots[5] = 2**packing.slot_bits - 1
    fold, sealer = PlainFold(packing, 2048), PlainSealer(packing)
    for _ in range(3):
        fold.add(0, next(sealer.protect(slots)))
    expected = np.zeros(2048, dtype=np.uint64)
    expected[5] = 3 * (2**packing.slot_bits - 1) % 2**packing.slot_bits
    assert (sealer.open(fold.total(), 2048) == expected).all()
