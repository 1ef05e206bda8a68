"""`masked`: exact sums once the masks are off, in any order, and refusals that leave the sum alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import BadInput, ChunkRefused
from fedcore.secagg.crypto import words
from fedcore.secagg.crypto.masked import MaskedFold, MaskedSealer
from fedcore.secagg.crypto.plain import PlainFold, PlainSealer
from fedcore.secagg.crypto.words import SLOTS_PER_CHUNK
from fedcore.secagg.encode.pack import Layout
from fedcore.secagg.packing import solve_packing
from fedcore.secagg.plan import VectorSpec


@settings(max_examples=50)
@given(
    bits=st.integers(2, 24), sites=st.integers(3, 64), size=st.integers(0, 9000),
    seed=st.integers(0, 2**32), worst=st.booleans(), data=st.data(),
)  # fmt: skip
def test_the_sum_less_its_masks_is_the_integer_sum_in_any_order(
    bits, sites, size, seed, worst, data
):
    """Random fields and the largest of all sites; masks any residue, folded in any order."""
    packing = solve_packing(bits, sites, "masked", size or None)
    layout = Layout(VectorSpec("update", size), packing, sites)
    rng, ring = np.random.default_rng(seed), 1 << packing.slot_bits
    contributors = sites if worst else min(sites, 5)
    top = 2**bits - 1
    fields = [
        np.full(size, top, np.uint64) if worst else rng.integers(0, top + 1, size, np.uint64)
        for _ in range(contributors)
    ]
    masks = rng.integers(0, ring, (contributors, layout.slots), dtype=np.uint64)
    sealer, fold = MaskedSealer(packing), MaskedFold(packing, layout.slots)
    chunks = []
    for site in range(contributors):
        masked = (layout.pack(fields[site], {}, site) + masks[site]) % np.uint64(ring)
        chunks += enumerate(sealer.protect(masked))
    for index, chunk in data.draw(st.permutations(chunks)):
        fold.add(index, chunk)
    with np.errstate(over="ignore"):
        fold.remove(masks.sum(axis=0))  # wraps in uint64: taken mod 2^slot_bits
    total = sealer.open(fold.total(), layout.slots)
    opened = layout.unpack(total, range(contributors))
    assert opened.coordinates.tolist() == [sum(column) for column in zip(*fields, strict=True)]


@pytest.mark.parametrize(("bits", "sites"), [(16, 16), (24, 64), (2, 3), (15, 64)])
def test_residues_over_the_whole_ring_are_exact(bits, sites):
    packing = solve_packing(bits, sites, "masked")
    t = 1 << packing.slot_bits
    rng = np.random.default_rng(1)
    rows = rng.integers(0, t, (sites, 2048), dtype=np.uint64)
    rows[0], rows[1] = t - 1, 0
    mask = rng.integers(0, t, 2048, dtype=np.uint64)
    sealer, fold = MaskedSealer(packing), MaskedFold(packing, 2048)
    for row in rows:
        (chunk,) = sealer.protect(row)
        assert len(chunk) == 2048 * packing.slot_bits // 8
        fold.add(0, chunk)
    fold.remove(mask)
    expected = [
        (sum(column) - less) % t
        for column, less in zip(rows.T.tolist(), mask.tolist(), strict=True)
    ]
    assert sealer.open(fold.total(), 2048).tolist() == expected


def test_a_field_of_16_bits_for_16_sites_costs_at_most_2_6_bytes():
    packing = solve_packing(16, 16, "masked", 1_000_000)
    layout = Layout(VectorSpec("update", 1_000_000), packing, 16)
    chunks = list(MaskedSealer(packing).protect(np.zeros(layout.slots, dtype=np.uint64)))
    assert sum(map(len, chunks)) == layout.slots * packing.slot_bits // 8 <= 2_600_000


@pytest.fixture
def three_chunks():
    """Three full chunks, so that places in the middle exist."""
    packing = solve_packing(16, 4, "masked")
    slots = np.arange(3 * SLOTS_PER_CHUNK, dtype=np.uint64)
    return packing, slots, list(MaskedSealer(packing).protect(slots))


def folded(packing, chunks):
    fold = MaskedFold(packing, SLOTS_PER_CHUNK * len(chunks))
    for index, chunk in enumerate(chunks):
        fold.add(index, chunk)
    return fold


def test_masks_come_off_once_whole_and_from_a_whole_sum(three_chunks):
    packing, slots, chunks = three_chunks
    mask = np.ones(len(slots), dtype=np.uint64)
    fold = MaskedFold(packing, len(slots))
    for missing, chunk in zip((0, 1, 2), chunks, strict=True):
        for early in (lambda: fold.remove(mask), lambda: list(fold.total())):
            with pytest.raises(ChunkRefused, match=f"sum: chunk {missing} was never added"):
                early()
        fold.add(missing, chunk)
    for wrong in (
        mask[:-1],
        mask[:SLOTS_PER_CHUNK],
        np.ones(len(slots) + 1, np.uint64),
        mask.astype(float),
    ):
        with pytest.raises(BadInput, match=r"expected uint64 of shape \(393216,\)"):
            fold.remove(wrong)
    assert list(fold.total()) == chunks  # nothing of the refused ones came off
    fold.remove(mask)
    with pytest.raises(BadInput, match="found a second removal, expected one"):
        fold.remove(mask)
    with pytest.raises(ChunkRefused, match="chunk 1: the masks are already off this sum"):
        fold.add(1, chunks[1])
    opened = MaskedSealer(packing).open(fold.total(), len(slots))
    assert opened[0] == 2**packing.slot_bits - 1
    assert (opened[1:] == slots[:-1]).all()


@pytest.mark.parametrize("index", [-3, -1, 3, 4])
def test_a_chunk_off_the_vector_is_refused_and_counts_as_nothing(three_chunks, index):
    packing, _, chunks = three_chunks
    fold = folded(packing, chunks)
    for chunk in (chunks[0], b""):
        with pytest.raises(ChunkRefused, match=f"chunk {index}: "):
            fold.add(index, chunk)
    assert list(fold.total()) == chunks
    empty = MaskedFold(packing, 3 * SLOTS_PER_CHUNK)
    with pytest.raises(ChunkRefused):
        empty.add(index, chunks[0])
    with pytest.raises(ChunkRefused, match="chunk 0 was never added"):
        list(empty.total())


@pytest.mark.parametrize("spoil", [lambda c: c[:-1], lambda c: c + b"\x00", lambda _: b""])
def test_a_truncated_or_oversized_chunk_is_refused(three_chunks, spoil):
    packing, slots, chunks = three_chunks
    fold = MaskedFold(packing, len(slots))
    fold.add(0, chunks[0])
    fold.add(2, chunks[2])
    with pytest.raises(ChunkRefused, match=rf"chunk 1: found \d+ bytes, expected {len(chunks[1])}"):
        fold.add(1, spoil(chunks[1]))
    with pytest.raises(ChunkRefused, match="chunk 1 was never added"):
        fold.remove(slots)
    with pytest.raises(ChunkRefused, match="chunk 1"):
        MaskedSealer(packing).open([chunks[0], spoil(chunks[1]), chunks[2]], len(slots))


def test_a_sum_of_too_few_or_too_many_chunks_is_refused(three_chunks):
    packing, slots, chunks = three_chunks
    sealer = MaskedSealer(packing)
    assert (sealer.open(chunks, len(slots)) == slots).all()
    for wrong in (chunks[:2], [], [*chunks, chunks[0]], [*chunks, b""]):
        with pytest.raises(ChunkRefused):
            sealer.open(wrong, len(slots))


def test_what_a_coordinator_folds_under_masks_is_no_plain_fold():
    """A coordinator may make a MaskedFold: the two share functions and no class."""
    for masked, plain in ((MaskedFold, PlainFold), (MaskedSealer, PlainSealer)):
        assert not issubclass(masked, plain) and not issubclass(plain, masked)
        assert masked.__mro__[1:] == plain.__mro__[1:] == (object,)
    source = Path(words.__file__).parent
    assert "plain" not in _imports(source / "masked.py")
    assert "masked" not in _imports(source / "plain.py")


def _imports(path):
    lines = path.read_text().splitlines()
    return " ".join(line for line in lines if line.startswith(("import ", "from ")))
