"""The spool: uploads that go on where they stood, whole files or none, and never more than the quota."""

from __future__ import annotations

import os
import random
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import BadInput, OffsetRefused, StoreFull, StoreProblem, VectorRefused
from fedcore.store import container
from fedcore.store.container import overhead, to_bytes, vector_digest
from fedcore.store.spool import Spool

H, OTHER = b"h" * 32, b"o" * 32
CHUNKS = [bytes([each]) * (1000 + each) for each in range(7)] + [b""]
DIGEST, DATA = vector_digest(CHUNKS), to_bytes(CHUNKS)
SIZE = len(DATA)

PRELUDE = """
import os, resource, sys
from pathlib import Path
from fedcore.errors import StoreFull
from fedcore.store import container
from fedcore.store.spool import Spool
H = b"h" * 32
spool = Spool(Path(sys.argv[1]))
"""


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-u", "-c", PRELUDE + textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture
def spool(tmp_path: Path) -> Spool:
    return Spool(tmp_path / "spool")


def begin(spool: Spool, site="va", digest=DIGEST, size=SIZE, header=H):
    return spool.upload("job", header, site, digest, size)


def send(spool: Spool, data=DATA, **options):
    incoming = begin(spool, size=len(data), **options)
    incoming.write(0, data)
    return incoming.finish()


def files(spool: Spool) -> list[Path]:
    return [each for each in spool.folder.rglob("*") if each.is_file()]


# ----------------------------------------------------------------------------------- containers


@settings(max_examples=60)
@given(chunks=st.lists(st.binary(max_size=40), max_size=6), data=st.data())
def test_a_container_gives_its_chunks_back_from_any_place(tmp_path_factory, chunks, data):
    path = tmp_path_factory.mktemp("c") / "vector"
    with path.open("wb") as file:
        written = container.write(file, iter(chunks))
    size = sum(map(len, chunks))
    assert written == container.Vector(vector_digest(chunks), size, len(chunks))
    assert container.check(path, fault="va") == written
    assert path.read_bytes() == to_bytes(chunks)
    assert len(to_bytes(chunks)) == size + overhead(len(chunks))
    first = data.draw(st.integers(0, len(chunks)))
    count = data.draw(st.none() | st.integers(0, len(chunks) - first))
    end = None if count is None else first + count
    assert list(container.read(path, first, count)) == chunks[first:end]
    assert container.count(path) == len(chunks)


@settings(max_examples=200)
@given(data=st.one_of(st.binary(max_size=40), st.lists(st.sampled_from(
    [struct.pack(">I", n) for n in (0, 1, 2, 3, 5, 2**31, 2**32 - 1)] + [b"x", b"yy"]
)).map(b"".join)))  # fmt: skip
def test_whatever_is_uploaded_is_a_container_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("c") / "vector"
    path.write_bytes(data)
    try:
        found = container.check(path, fault="va")
    except VectorRefused:
        return
    chunks = list(container.read(path))
    assert to_bytes(chunks) == data and vector_digest(chunks) == found.digest


def test_a_chunk_that_would_not_fit_into_memory_is_refused(spool):
    huge = [bytes(container.MAX_CHUNK + 1)]
    with pytest.raises(VectorRefused, match="a chunk of"):
        send(spool, to_bytes(huge), digest=vector_digest(huge))
    largest = [huge[0][1:]]
    stored = send(spool, to_bytes(largest), digest=vector_digest(largest))
    assert list(container.read(stored.path)) == largest


def test_a_damaged_file_of_our_own_is_nobodys_fault(spool):
    stored = spool.put("job", "sum", CHUNKS)
    with stored.path.open("r+b") as file:
        file.truncate(2000)
    with pytest.raises(StoreProblem, match="cut short"):
        list(container.read(stored.path))
    with pytest.raises(StoreProblem, match="chunks"):
        spool.find("job", "sum")
    with pytest.raises(StoreProblem):
        list(container.read(stored.path, 0, 9))


# -------------------------------------------------------------------------------------- uploads


@settings(max_examples=30)
@given(parts=st.lists(st.tuples(st.integers(0, 3000), st.booleans()), max_size=8))
def test_an_upload_in_any_parts_over_any_restarts(tmp_path_factory, parts):
    folder = tmp_path_factory.mktemp("spool")
    incoming = begin(Spool(folder))
    for length, restart in [*parts, (len(DATA), False)]:
        end = min(incoming.offset + length, len(DATA))
        incoming.write(incoming.offset, DATA[incoming.offset : end])
        if restart:
            incoming = begin(Spool(folder))
        assert incoming.offset == end
    stored = incoming.finish()
    assert (stored.digest, stored.size, stored.chunks) == (
        DIGEST,
        sum(map(len, CHUNKS)),
        len(CHUNKS),
    )
    assert stored.travels == len(DATA) == stored.path.stat().st_size
    assert stored.path.read_bytes() == DATA
    assert Spool(folder).complete("job", H) == {"va": stored.path}


def test_a_part_at_another_place_is_told_the_right_one(spool):
    incoming = begin(spool)
    incoming.write(0, DATA[:100])
    for offset in (0, 99, 101, 10**12):
        with pytest.raises(OffsetRefused) as caught:
            incoming.write(offset, b"zz")
        assert caught.value.expected == 100 and caught.value.fault == "va"
    with pytest.raises(OffsetRefused) as caught:
        incoming.finish()
    assert caught.value.expected == 100
    incoming.write(100, DATA[100:])
    assert incoming.finish().digest == DIGEST


def test_more_than_was_announced_is_refused_and_not_written(spool):
    incoming = begin(spool)
    incoming.write(0, DATA[:-1])
    with pytest.raises(VectorRefused) as caught:
        incoming.write(len(DATA) - 1, b"xx")
    assert not isinstance(caught.value, OffsetRefused) and incoming.offset == len(DATA) - 1
    incoming.write(len(DATA) - 1, DATA[-1:])
    assert incoming.finish().digest == DIGEST


@pytest.mark.parametrize(
    "data",
    [
        DATA[:-5] + b"x" + DATA[-4:],  # the last chunk is empty: this changes the one before
        to_bytes([*CHUNKS[:-2], CHUNKS[-2] + CHUNKS[-1]]),  # the same bytes, cut elsewhere
        DATA + b"x",
        b"\0\0\0\7" + DATA[4:],
        b"\xff\xff\xff\xff" + DATA[4:],
        b"",
        b"\0\0",
    ],
)
def test_what_is_not_the_announced_vector_is_refused_and_begins_anew(spool, data):
    incoming = begin(spool, size=len(data))
    incoming.write(0, data)
    with pytest.raises(VectorRefused) as caught:
        incoming.finish()
    assert caught.value.fault == "va" and spool.complete("job", H) == {} and spool.used == 0
    with pytest.raises(VectorRefused):
        incoming.write(0, b"")
    assert begin(spool).offset == 0
    assert send(spool).digest == DIGEST


def test_a_complete_upload_is_said_again_and_never_replaced(spool):
    first = send(spool)
    again = begin(Spool(spool.folder))
    assert again.complete and again.offset == len(DATA)
    assert again.finish() == first == again.finish()
    with pytest.raises(OffsetRefused):
        again.write(0, DATA)
    other = [b"another vector"]
    with pytest.raises(VectorRefused, match="another one than came before"):
        begin(spool, digest=vector_digest(other), size=len(to_bytes(other)))
    assert spool.complete("job", H) == {"va": first.path}


def test_another_vector_replaces_one_that_never_got_complete(spool):
    begin(spool).write(0, DATA[:100])
    other = [b"another vector"]
    assert send(spool, to_bytes(other), digest=vector_digest(other)).size == 14
    assert [each.name[:5] for each in files(spool)] == ["whole"]
    assert spool.used == len(to_bytes(other))


def test_only_the_newest_connection_of_a_site_writes(spool):
    old = begin(spool)
    old.write(0, DATA[:10])
    new = begin(spool)
    for refused in (lambda: old.write(10, DATA[10:]), old.finish):
        with pytest.raises(VectorRefused, match="upload that is over"):
            refused()
    assert new.offset == 10
    new.write(10, DATA[10:])
    assert new.finish().digest == DIGEST


def test_an_older_connection_does_not_finish_over_a_newer_ones_vector(spool, stand_in):
    old = begin(spool)
    old.write(0, DATA)
    other, check, begun = [b"another vector"], container.check, []

    def meanwhile(path, **options):
        """A newer connection, while a thread reads what the older one brought."""
        found = check(path, **options)
        if not begun:
            begun.append(begin(spool, digest=vector_digest(other), size=len(to_bytes(other))))
        return found

    stand_in(container, check=meanwhile)
    with pytest.raises(VectorRefused, match="upload that is over"):
        old.finish()
    (new,) = begun
    new.write(0, to_bytes(other))
    stored = new.finish()
    assert Spool(spool.folder).complete("job", H) == {"va": stored.path}
    assert files(spool) == [stored.path]


def test_uploads_of_many_sites_lie_side_by_side(spool):
    names = [f"{n}-x" for n in range(12)]
    sent = {name: send(spool, site=name).path for name in names}
    begin(spool, "late").write(0, DATA[:5])
    for found in (spool, Spool(spool.folder)):
        assert found.complete("job", H) == dict(sorted(sent.items()))
        assert found.uploaded("job", H, "3-x", DIGEST) == sent["3-x"]
        assert found.uploaded("job", H, "3-x", bytes(32)) is None
        assert found.uploaded("job", H, "late", DIGEST) is None
        assert found.uploaded("job", OTHER, "3-x", DIGEST) is None
        assert begin(found, "late").offset == 5


UPLOADER = """
data = Path(sys.argv[2]).read_bytes()
incoming = spool.upload("job", H, "va", bytes.fromhex(sys.argv[3]), len(data))
print(incoming.offset, flush=True)
while incoming.offset < len(data):
    incoming.write(incoming.offset, data[incoming.offset : incoming.offset + 50_000])
    print(incoming.offset, flush=True)
incoming.finish()
print("finished", flush=True)
"""


def test_killed_at_any_instant_an_upload_goes_on_from_what_was_acknowledged(tmp_path):
    chunks = [random.Random(each).randbytes(1 << 20) for each in range(24)]
    data, digest = to_bytes(chunks), vector_digest(chunks)
    (tmp_path / "vector").write_bytes(data)
    acknowledged, kills, rng = 0, 0, random.Random(1)
    while True:
        process = child(UPLOADER, tmp_path / "spool", tmp_path / "vector", digest.hex())
        assert process.stdout is not None
        assert int(process.stdout.readline()) >= acknowledged
        if kills < 4:
            threading.Timer(rng.uniform(0.001, 0.01), process.kill).start()
        lines = process.stdout.read().splitlines()
        process.wait()
        if lines and lines[-1] == "finished":
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
        acknowledged = max([acknowledged, *map(int, lines)])
        (part,) = (tmp_path / "spool").rglob("part-*")
        assert part.stat().st_size >= acknowledged
        assert data.startswith(part.read_bytes())
    assert kills >= 1
    (path,) = Spool(tmp_path / "spool").complete("job", H).values()
    assert list(container.read(path)) == chunks


# ----------------------------------------------------------------------- sums, checkpoints, own


def test_puts_are_found_replaced_and_removed(spool):
    first = spool.put("job", "checkpoint", CHUNKS)
    assert spool.find("job", "checkpoint") == first and first.travels == len(DATA)
    assert list(container.read(first.path)) == CHUNKS
    second = spool.put("job", "checkpoint", iter(CHUNKS[:2]))
    assert spool.find("job", "checkpoint") == second != first
    assert spool.find("job", "checkpoint", header=H) is None
    of_round = spool.put("job", "checkpoint", CHUNKS, header=H)
    assert spool.used == second.travels + of_round.travels
    assert all(each.stat().st_mode & 0o777 == 0o600 for each in files(spool))
    spool.discard("job", H)
    assert spool.find("job", "checkpoint") == second and spool.used == second.travels
    spool.remove("job", "checkpoint")
    spool.remove("job", "checkpoint")
    assert spool.find("job", "checkpoint") is None and spool.used == 0


def test_killed_at_any_instant_a_put_is_there_whole_or_as_before(tmp_path):
    putter = """
    number = 0
    print("ready", flush=True)
    while True:
        number += 1
        spool.put("job", "checkpoint", [bytes([number % 251]) * 100_000] * 20)
        print(number, flush=True)
    """
    rng, numbers = random.Random(2), []
    for _ in range(4):
        process = child(putter, tmp_path / "spool")
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        threading.Timer(rng.uniform(0.01, 0.08), process.kill).start()
        lines = process.stdout.read().splitlines()
        assert process.wait() == -signal.SIGKILL
        spool = Spool(tmp_path / "spool")
        found = spool.find("job", "checkpoint")
        assert len(files(spool)) == (1 if found else 0)  # and nothing half-written is left
        if lines:
            assert found is not None
            (value,) = set(container.read(found.path))
            assert value[0] in {int(lines[-1]) % 251, (int(lines[-1]) + 1) % 251}
            numbers.append(int(lines[-1]))
    assert numbers


def test_a_put_whose_chunks_fail_leaves_the_earlier_one(spool):
    first = spool.put("job", "sum", CHUNKS)

    def failing():
        yield b"a"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        spool.put("job", "sum", failing())
    assert spool.find("job", "sum") == first and files(spool) == [first.path]
    assert spool.used == first.travels


def test_a_put_holds_one_chunk_in_memory(spool):
    size = 1 << 20
    tracemalloc.start()
    try:
        stored = spool.put("job", "sum", (os.urandom(size) for _ in range(24)))
        spool.find("job", "sum")
        for _ in container.read(stored.path):
            pass
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * size


# ---------------------------------------------------------------------------- syncs, power cuts


@pytest.fixture
def synced(stand_in):
    """What was synced, by its path from the spool's parent."""
    seen, real = [], os.fsync

    def fsync(handle):
        seen.append(Path(f"/proc/self/fd/{handle}").readlink().name)
        real(handle)

    stand_in(os, fsync=fsync)
    return seen


def test_what_is_reported_as_there_is_synced_and_every_folder_above_it(tmp_path, synced):
    spool = Spool(tmp_path / "spool")
    synced.clear()
    first = begin(spool)
    first.write(0, DATA)
    assert synced == []  # a part is acknowledged, and asked for again after a power cut
    part = first._part.name
    first.finish()
    assert synced == [part, "in", H.hex(), "job", "spool"]
    synced.clear()
    send(spool, site="vb")
    assert len(synced) == 2 and synced[1] == "in"  # the folders' own names are durable by now
    synced.clear()
    begin(spool).finish()
    assert synced == ["in"]  # said again: what synced it the first time may not have come that far
    synced.clear()
    spool.put("job", "sum", CHUNKS, header=H)
    assert len(synced) == 2 and synced[1] == H.hex()
    spool.discard("job", H)
    synced.clear()
    spool.put("job", "sum", CHUNKS, header=H)
    assert synced[1:] == [H.hex(), "job"]  # a folder of that name, and a new one


def test_only_small_files_are_left_without_a_sync(tmp_path, synced):
    spool = Spool(tmp_path / "spool")
    synced.clear()
    incoming = begin(spool)
    incoming.write(0, DATA)
    first = incoming.finish(unsynced=SIZE)
    assert incoming.complete and begin(spool).finish(unsynced=SIZE) == first
    assert spool.uploaded("job", H, "va", DIGEST) == first.path
    with pytest.raises(VectorRefused, match="another one than came before"):
        begin(spool, digest=bytes(32))
    spool.put("job", "sum", CHUNKS, header=H, unsynced=SIZE)
    assert synced == [] and spool.find("job", "sum", header=H) is not None
    incoming = begin(spool, "vb")
    incoming.write(0, DATA)
    incoming.finish(unsynced=SIZE - 1)
    spool.put("job", "model", CHUNKS, header=H, unsynced=SIZE - 1)
    assert len([name for name in synced if name.startswith((".model", "part"))]) == 2
    assert {"in", H.hex(), "job", "spool"} < set(synced)
    assert sorted(spool.complete("job", H)) == ["va", "vb"]
    # A power cut may have left anything in the one that was not synced: the next process has it not.
    assert list(Spool(spool.folder).complete("job", H)) == ["vb"]


def test_an_upload_that_was_not_synced_can_be_later(tmp_path, synced):
    spool = Spool(tmp_path / "spool")
    spool.give_back("job", H, "va", DATA)
    synced.clear()
    stored = begin(spool).finish()
    assert synced[0].startswith("small-") and synced[1] == "in"
    assert Spool(spool.folder).complete("job", H) == {"va": stored.path}
    assert begin(spool).finish(unsynced=SIZE).path == stored.path


@pytest.mark.parametrize("left", [None, b"", DATA[:-1], DATA[:-1] + b"x", DATA, "part"])
def test_an_upload_kept_elsewhere_is_given_back_whatever_a_power_cut_left(tmp_path, left):
    spool = Spool(tmp_path / "spool")
    if left == "part":
        begin(spool).write(0, DATA[:7])
    else:
        path = send(spool).path
        path.unlink() if left is None else path.write_bytes(left)
    again = Spool(spool.folder)
    for _ in range(2):
        again.give_back("job", H, "va", DATA)
        (path,) = again.complete("job", H).values()
        assert path.read_bytes() == DATA and files(again) == [path] and again.used == SIZE


# -------------------------------------------------------------------------------------- removal


def test_a_discarded_round_is_gone_and_others_stay(spool):
    gone, stays = begin(spool), send(spool, header=OTHER)
    gone.write(0, DATA[:10])
    late = begin(spool, "vb")
    assert spool.rounds("job") == [H, OTHER] and spool.jobs() == ["job"]
    spool.discard("job", H)
    begin(spool).write(0, DATA[:10])
    for refused in (lambda: gone.write(10, DATA[10:]), lambda: late.write(0, DATA)):
        with pytest.raises(VectorRefused, match="upload that is over"):
            refused()  # neither into the new one nor into a folder that is gone
    Spool(spool.folder).discard("job", H)
    spool.discard("job", H)
    assert files(spool) == [stays.path] and spool.used == len(DATA) == Spool(spool.folder).used
    assert spool.rounds("job") == [OTHER]
    spool.discard("job", H)
    spool.drop("job")
    assert list(spool.folder.iterdir()) == [] and spool.used == 0


def test_what_a_crash_left_of_a_discard_goes_at_the_start(spool):
    send(spool)
    (spool.folder / "job").rename(spool.folder / ".gone-1")
    assert list(Spool(spool.folder).folder.iterdir()) == []


# ----------------------------------------------------------------------------- room and names


def test_the_quota_counts_what_was_promised(tmp_path):
    size = len(DATA)
    spool = Spool(tmp_path, 2 * size + 100)
    first = begin(spool, "va")
    send(spool, site="vb")
    with pytest.raises(StoreFull, match=f"found {2 * size} of {2 * size + 100} bytes"):
        begin(spool, "vc")
    begin(
        Spool(tmp_path, 2 * size + 100), "va"
    )  # the part is empty: after a restart only it counts
    with pytest.raises(StoreFull):
        spool.put("job", "sum", CHUNKS)
    small = spool.put("job", "sum", [b"small"])
    with pytest.raises(StoreFull):
        spool.put("job", "sum", CHUNKS)
    assert spool.find("job", "sum") == small
    assert begin(spool, "va").offset == 0  # asking again for the same promise is no second one
    first = begin(spool, "va")
    first.write(0, DATA)
    assert first.finish().digest == DIGEST
    spool.discard("job", H)
    assert spool.used == small.travels
    assert begin(spool, "vc").offset == 0


def test_a_full_disk_cuts_the_part_back_and_the_upload_goes_on_later(tmp_path):
    code = """
    chunks = [b"x" * 400_000]
    data, digest = container.to_bytes(chunks), container.vector_digest(chunks)
    kept = spool.put("job", "sum", [b"kept"])
    incoming = spool.upload("job", H, "va", digest, len(data))
    resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, resource.RLIM_INFINITY))
    try:
        while True:
            incoming.write(incoming.offset, data[incoming.offset : incoming.offset + 100_000])
    except StoreFull as error:
        print(error)
        print(error.remedy)
    (part,) = spool.folder.rglob("part-*")
    print(incoming.offset, part.stat().st_size)
    try:
        spool.put("job", "sum", chunks)
    except StoreFull as error:
        print(error)
    print(spool.find("job", "sum") == kept, len([p for p in spool.folder.rglob("*") if p.is_file()]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    incoming.write(incoming.offset, data[incoming.offset :])
    print(incoming.finish().digest == digest)
    """
    process = child(code, tmp_path / "spool")
    lines = process.communicate(timeout=300)[0].splitlines()
    assert process.returncode == 0 and len(lines) == 6
    assert "no room" in lines[0] and "free some space" in lines[1]
    assert lines[2] == "200000 200000"
    assert "no room" in lines[3] and lines[4] == "True 2" and lines[5] == "True"


@pytest.mark.parametrize(
    "site",
    ["va", "..", ".", "../../va", "a/b", "%2F", ".hidden", "köln", "病" * 64, "a b", "part-x"],
)
def test_names_come_back_and_never_leave_the_folder(tmp_path, site):
    spool = Spool(tmp_path / "in" / "spool")
    stored = spool.upload(site, H, site, DIGEST, len(DATA))
    stored.write(0, DATA)
    path = stored.finish().path
    assert spool.complete(site, H) == {site: path} and spool.jobs() == [site]
    spool.put(site, site, [b"x"])
    assert spool.find(site, site) is not None
    outside = [each for each in tmp_path.rglob("*") if each.is_file()]
    assert sorted(outside) == sorted(files(spool)) and len(outside) == 2
    spool.drop(site)
    assert files(spool) == []


def test_names_that_cannot_be_files_are_refused(spool):
    for name in ("", "x" * 201):
        with pytest.raises(BadInput):
            spool.put("job", name, [])
    with pytest.raises(BadInput, match="header digest"):
        spool.upload("job", b"short", "va", DIGEST, 10)
