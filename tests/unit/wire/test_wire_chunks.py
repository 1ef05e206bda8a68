"""Long vectors in parts: any offset, exact sizes, no trickle, and files of a result."""

from __future__ import annotations

import io
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import MalformedMessage, VectorRefused
from fedcore.wire import chunks
from fedcore.wire.chunks import Incoming, download, file_parts, in_order, upload
from fedcore.wire.frames import DOWNLOAD, UPLOAD, DownloadHead, FilePart, Part, UploadStart
from fedcore.wire.limits import PART

DATA = random.Random(3).randbytes(3 * PART + 77)
SIZE = len(DATA)
H = b"h" * 32


def start(offset=0, size=SIZE):
    return UploadStart("job", H, H, size, offset)


def received(frames, codec, sender="va"):
    """What comes out of packed frames, and the receiver."""
    first, *rest = [codec.unpack(each, sender=sender) for each in frames]
    incoming = Incoming(first, sender=sender)
    return b"".join(incoming.take(each) for each in rest), incoming


@pytest.mark.parametrize("offset", [0, 1, PART, PART + 5, 3 * PART, len(DATA) - 1, len(DATA)])
def test_both_ways_from_any_offset(offset):
    data, incoming = received(upload(start(offset), io.BytesIO(DATA)), UPLOAD)
    assert data == DATA[offset:] and incoming.offset == incoming.size == len(DATA)
    head = DownloadHead(H, len(DATA), offset)
    data, incoming = received(download(head, io.BytesIO(DATA)), DOWNLOAD, "coordinator")
    assert data == DATA[offset:] and incoming.offset == incoming.size


@given(st.integers(0, len(DATA)), st.data())
@settings(max_examples=20)
def test_cut_anywhere_and_resumed_it_is_the_same(offset, data):
    """What was taken before the cut is kept, and the rest is asked for from there."""
    frames = list(upload(start(), io.BytesIO(DATA)))
    heard = frames[: data.draw(st.integers(1, len(frames)))]
    first, incoming = received(heard, UPLOAD)
    kept = first[: min(offset, len(first))]  # perhaps not all of it reached the disk
    again, incoming = received(upload(start(len(kept)), io.BytesIO(DATA)), UPLOAD)
    assert kept + again == DATA and incoming.offset == incoming.size


def test_a_file_that_ends_early_is_noticed_where_it_is_sent():
    frames = upload(start(size=len(DATA) + 1), io.BytesIO(DATA))
    with pytest.raises(VectorRefused, match="fault: this site"):
        list(frames)


def test_bytes_behind_the_size_are_not_sent():
    data, incoming = received(upload(start(size=PART + 9), io.BytesIO(DATA)), UPLOAD)
    assert data == DATA[: PART + 9] and incoming.offset == incoming.size


def test_memory_is_one_part(monkeypatch):
    sizes = []

    class Source(io.BytesIO):
        def read(self, size=-1):
            sizes.append(size)
            return super().read(size)

    list(upload(start(), Source(DATA)))
    assert max(sizes) == PART and min(sizes) > 0


@pytest.mark.parametrize(
    ("size", "parts", "error"),
    [
        (10, [b"x" * 11], VectorRefused),
        (PART, [b"x" * PART, b"x"], VectorRefused),
        (10, [b"x"], MalformedMessage),  # a trickle
        (2 * PART, [b"x" * PART, b"x" * (PART - 1)], MalformedMessage),
    ],
)
def test_parts_that_do_not_add_up(size, parts, error):
    *before, last = map(Part, parts)
    incoming = Incoming(start(size=size), sender="va")
    for each in before:
        incoming.take(each)
    with pytest.raises(error, match="fault: va"):
        incoming.take(last)


def test_a_refused_part_leaves_the_offset():
    incoming = Incoming(start(size=PART + 1), sender="va")
    incoming.take(Part(b"x" * PART))
    with pytest.raises(VectorRefused):
        incoming.take(Part(b"xx"))
    assert incoming.offset == PART and incoming.offset != incoming.size


def test_a_second_start_and_an_offset_beyond_the_size():
    incoming = Incoming(start(), sender="va")
    with pytest.raises(MalformedMessage, match="a second UploadStart"):
        incoming.take(start())
    with pytest.raises(MalformedMessage, match="at most 5"):
        Incoming(start(offset=6, size=5), sender="va")


# ------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 2 * PART])
def test_files_arrive_whole(size):
    data = DATA[:size]
    parts = take_all(file_parts("model.safetensors", io.BytesIO(data)))
    assert b"".join(each.data for each in parts) == data
    assert [each.last for each in parts] == [False] * (len(parts) - 1) + [True]


def part(name, offset=0, data=b"x", last=True):
    return FilePart(name, offset, data, last)


def test_files_one_after_the_other_in_any_number_up_to_the_limit():
    take_all([part("a", last=False), part("a", 1), part("b", data=b"")])
    take_all([part(f"f{k}") for k in range(chunks.MAX_FILES)])


@pytest.mark.parametrize(
    "parts",
    [
        [part("a", 1)],
        [part("a", last=False), part("b")],
        [part("a", last=False), part("a", 0)],
        [part("a", last=False), part("a", 2)],
        [part("a"), part("a")],
        [part(f"f{k}") for k in range(chunks.MAX_FILES + 1)],
    ],
    ids=["offset", "another", "again", "gap", "twice", "too many"],
)
def test_files_out_of_order_are_refused(parts):
    with pytest.raises(MalformedMessage, match="fault: coordinator"):
        take_all(parts)


def take_all(parts):
    return list(in_order(parts, sender="coordinator"))
