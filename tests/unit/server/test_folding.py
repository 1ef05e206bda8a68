"""The fold in worker processes: the bits of one plain sum, whatever is refused, killed or repeated."""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from fedcore_server.fold_worker import (
    QUIET_SECONDS,
    _Part,
    _work_ahead,
    chunk_slots,
    packing_form,
)
from fedcore_server.folding import FoldPool

from fedcore.errors import BadInput, ChunkRefused, StoreFull, StoreProblem
from fedcore.secagg.crypto.bfv import (
    EncryptedFold,
    EncryptedSealer,
    PublicContext,
    SecretContext,
)
from fedcore.secagg.crypto.bfv_chunks import BLOCKS_PER_CHUNK
from fedcore.secagg.crypto.masked import MaskedFold, MaskedSealer
from fedcore.secagg.crypto.masking import add_masks, mask_sum
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.packing import Packing, solve_packing
from fedcore.store import container
from fedcore.store.container import to_bytes, vector_digest
from fedcore.store.spool import Spool

H = b"h" * 32
PROTECTIONS = ("layered", "masked")
PACKINGS = {name: solve_packing(12, 5, name) for name in PROTECTIONS}


@pytest.fixture(params=(1, 2, 3), ids=lambda workers: f"{workers}-workers")
def any_pool(request, pools):
    return pools[request.param]


@pytest.fixture(scope="module")
def pools(tmp_path_factory):
    """Workers take a fifth of a second to start, so tests that do them no harm share them."""
    started = {n: FoldPool(n, tmp_path_factory.mktemp("scratch") / "s") for n in (1, 2, 3)}
    yield started
    for pool in started.values():
        pool.close()


@pytest.fixture
def pool(tmp_path):
    with FoldPool(2, tmp_path / "scratch") as pool:
        yield pool


@pytest.fixture
def spool(tmp_path):
    return Spool(tmp_path / "spool")


@dataclass
class Round:
    """Vectors of some sites in a spool, their masks, and the oracle: the plain sum."""

    packing: Packing
    slots: int
    sealer: EncryptedSealer | MaskedSealer
    vectors: list[np.ndarray]
    masks: list[tuple[SecretBytes, int]]
    paths: list[Path]

    def plain(self, *sites: int) -> np.ndarray:
        """The sum of these sites' vectors before masks, slot for slot."""
        total = sum(self.vectors[site] for site in sites)
        return total & np.uint64((1 << self.packing.slot_bits) - 1)

    def masks_of(self, *sites: int) -> list[tuple[SecretBytes, int]]:
        return [self.masks[site] for site in sites]

    def open(self, stored) -> np.ndarray:
        return self.sealer.open(container.read(stored.path), self.slots)


def make(spool: Spool, protection: str, blocks: int, sites: int = 3) -> Round:
    packing = PACKINGS[protection]
    slots = blocks * packing.slots_per_block
    if packing.ring is None:
        sealer = MaskedSealer(packing)
    else:
        sealer = EncryptedSealer(SecretContext(PublicContext.of(packing)))
    rng, made = np.random.default_rng(blocks), Round(packing, slots, sealer, [], [], [])
    for site in range(sites):
        vector = rng.integers(0, 1 << (packing.slot_bits - 3), slots, dtype=np.uint64)
        seed, sign = secrets.token_bytes(32), 1 if site % 2 else -1
        masked = vector.copy()
        add_masks(masked, [(seed, sign)], packing.slot_bits)
        made.vectors.append(vector)
        made.masks.append((SecretBytes(seed), sign))
        made.paths.append(spool.put("job", f"v{site}", sealer.protect(masked), header=H).path)
    return made


def job_of(pool: FoldPool, made: Round):
    return pool.job("job", made.packing, made.slots)


def storing(spool: Spool):
    return lambda chunks: spool.put("job", "sum", chunks, header=H)


# -------------------------------------------------------------------------------------- same bits


def blocks_of(protection: str) -> list[int]:
    """Chunks of 64 blocks: less than one, one and a little, odd numbers of them, and a whole number."""
    return {"layered": [1, 63, 65, 129, 197, 256], "masked": [1, 65, 129, 321, 448]}[protection]


@pytest.mark.parametrize(
    ("protection", "blocks"), [(name, n) for name in PROTECTIONS for n in blocks_of(name)]
)
def test_the_sum_is_that_of_one_fold_and_of_the_plain_slots(any_pool, spool, protection, blocks):
    made = make(spool, protection, blocks)

    async def go():
        job = job_of(any_pool, made)
        await asyncio.gather(*map(job.add, reversed(made.paths)))
        return await job.total(made.paths, made.masks, storing(spool))

    stored = asyncio.run(go())
    assert (made.open(stored) == made.plain(0, 1, 2)).all()
    if made.packing.ring is None:
        oracle = MaskedFold(made.packing, made.slots)
    else:
        public = PublicContext.of(made.packing)
        oracle = EncryptedFold(public, made.slots, seeds=blocks <= BLOCKS_PER_CHUNK)
    for path in made.paths:
        for index, chunk in enumerate(container.read(path)):
            oracle.add(index, chunk)
    masks = [(seed.reveal(), sign) for seed, sign in made.masks]
    oracle.remove(mask_sum(masks, made.slots, made.packing.slot_bits))
    expected = list(oracle.total())
    assert list(container.read(stored.path)) == expected  # the same bytes, ciphertexts included
    assert stored.digest == vector_digest(expected)


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_without_the_masks_the_sum_is_not_the_plain_one(pools, spool, protection):
    """The control: masks are on every vector, and it matters which are taken off."""
    made = make(spool, protection, 65)

    async def go(masks):
        stored = await job_of(pools[2], made).total(made.paths, masks, storing(spool))
        return (made.open(stored) == made.plain(0, 1, 2)).mean()

    assert asyncio.run(go(())) < 0.01
    assert asyncio.run(go(made.masks_of(0, 1))) < 0.01
    assert asyncio.run(go(made.masks)) == 1


def test_a_mask_of_a_part_is_the_part_of_the_mask():
    masks = [(secrets.token_bytes(32), 1), (secrets.token_bytes(32), -1)]
    whole = mask_sum(masks, 50_000, 44)
    for first, size in ((0, 10), (2, 7), (16_384, 20_000), (40_000, 10_000)):
        assert (mask_sum(masks, size, 44, first=first) == whole[first : first + size]).all()
    with pytest.raises(BadInput, match="from slot 3"):
        mask_sum(masks, 10, 44, first=3)


# -------------------------------------------------------------------- exactly the uploads that count


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_total_is_of_exactly_the_uploads_it_is_given(pools, spool, protection):
    made = make(spool, protection, 129, sites=4)

    async def go():
        job, pids = job_of(pools[2], made), pools[2].pids
        for path in (*made.paths[:3], made.paths[0], made.paths[0]):  # none is counted twice
            await job.add(path)
        for sites in ((0, 1, 2), (0, 2), (1, 2, 3), (0, 1, 2, 3)):
            uploads = [made.paths[site] for site in (*sites, sites[0])]
            stored = await job.total(uploads, made.masks_of(*sites), storing(spool))
            assert (made.open(stored) == made.plain(*sites)).all()
            again = await job.total(uploads, made.masks_of(*sites), storing(spool))
            assert again == stored
            await job.add(made.paths[1])  # ahead of the next total, wanted or not
        assert pools[2].pids == pids
        await job.end()
        with pytest.raises(BadInput, match="no upload"):
            await job.total([], [], storing(spool))

    asyncio.run(go())


def broken(protection: str, chunks: list[bytes]) -> list[list[bytes]]:
    """Uploads that a site could sign; all but the first two are wrong in their last chunk only."""
    last = chunks[-1]
    start = chunks[:-1]
    wrong = [start, [*chunks, last], [*start, last[:-1]], [*start, b""]]
    if protection == "layered":
        wrong += [
            [*start, chunks[0][: len(last)]],  # its first chunk again
            [*start, last[:-2000] + b"\xff" * 2000],  # a coefficient that is not below the modulus
            [*start, last[:20] + b"\xee" + last[21:]],  # a seed for a generator that does not exist
        ]
    return wrong


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_an_upload_that_is_refused_is_in_no_workers_sum(pools, spool, protection):
    made = make(spool, protection, 129)

    async def go():
        job = job_of(pools[2], made)
        await job.add(made.paths[0])
        cases = broken(protection, list(container.read(made.paths[1])))
        for chunks in cases:
            path = spool.put("job", "wrong", chunks, header=H).path
            with pytest.raises(ChunkRefused):
                await job.add(path)
        pids = pools[2].pids
        await job.add(made.paths[2])
        stored = await job.total(
            [made.paths[0], made.paths[2]], made.masks_of(0, 2), storing(spool)
        )
        assert (made.open(stored) == made.plain(0, 2)).all()
        assert pools[2].pids == pids  # and none of them ended a worker

    asyncio.run(go())


def test_a_worker_makes_a_sum_ready_between_requests_and_reads_it_only_when_none_comes(spool):
    """Seeds are expanded at once; that they are all known is assumed after a moment without a request."""
    made = make(spool, "layered", 3)
    about = {
        "packing": packing_form(made.packing), "slots": made.slots, "first": 0, "chunks": 1, "of": 2,
    }  # fmt: skip
    parts = {"idle": _Part(about), "job": _Part(about)}
    fold = parts["job"]._sum
    assert _work_ahead({}, 0.0) is None
    for path in made.paths:
        for index, chunk in enumerate(container.read(path)):
            fold.add(index, chunk)
    assert [_work_ahead(parts, 0.0) for _ in range(3)] == [0.0] * 3
    assert _work_ahead(parts, 0.04) == pytest.approx(QUIET_SECONDS - 0.04)
    assert all(each is not None for each in fold._expanded)
    assert [_work_ahead(parts, QUIET_SECONDS) for _ in range(4)] == [0.0] * 3 + [None]
    assert not any(each is not None for each in fold._expanded)


def test_jobs_do_not_meet(pools, spool):
    made = make(spool, "masked", 129)

    async def go():
        one, two = (pools[2].job(name, made.packing, made.slots) for name in ("one", "two"))
        await one.add(made.paths[0])
        await two.add(made.paths[1])
        await one.add(made.paths[2])
        stored = await one.total(
            [made.paths[0], made.paths[2]], made.masks_of(0, 2), storing(spool)
        )
        assert (made.open(stored) == made.plain(0, 2)).all()
        stored = await two.total([made.paths[1]], made.masks_of(1), storing(spool))
        assert (made.open(stored) == made.plain(1)).all()

    asyncio.run(go())


# ---------------------------------------------------------------------------------------- deaths


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_a_worker_that_dies_between_two_steps_is_replaced_and_the_sum_made_again(
    pool, spool, protection
):
    made = make(spool, protection, 129)

    async def go():
        job = job_of(pool, made)
        for path in made.paths:
            os.kill(pool.pids[0], signal.SIGKILL)
            await job.add(path)
        before = pool.pids
        os.kill(before[1], signal.SIGKILL)
        stored = await job.total(made.paths, made.masks, storing(spool))
        assert (made.open(stored) == made.plain(0, 1, 2)).all()
        assert len(pool.pids) == 2 and pool.pids[0] == before[0] and pool.pids[1] != before[1]

    asyncio.run(go())


def test_workers_killed_at_any_instant_change_no_bit(pool, spool):
    made = make(spool, "layered", 129)
    over = threading.Event()
    rng = np.random.default_rng(0)
    kills = []

    def killer():
        pause = 1.0  # longer and longer: on a slow machine too, sums are made between two deaths
        while not over.wait(pause * rng.uniform(0.2, 0.6)):
            pause *= 1.1
            for pid in pool.pids[:1]:
                os.kill(pid, signal.SIGKILL)
                kills.append(pid)

    async def go():
        done = 0
        while done < 3 or len(kills) < 3:
            job = job_of(pool, made)
            try:
                for path in made.paths:
                    await job.add(path)
                stored = await job.total(made.paths, made.masks, storing(spool))
            except (ChunkRefused, StoreProblem):  # three deaths in a row: said, and not guessed
                continue
            assert (made.open(stored) == made.plain(0, 1, 2)).all()
            done += 1
        return done

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        assert asyncio.run(asyncio.wait_for(go(), 240)) >= 3
    finally:
        over.set()
        thread.join()
    assert len(kills) >= 3


def test_an_upload_that_ends_every_worker_is_refused_and_the_rest_goes_on(pool, spool):
    made = make(spool, "masked", 129)
    poison = made.paths[1]
    poison.unlink()
    os.mkfifo(poison)  # a worker that reads it waits, which gives the time to kill it

    async def go():
        job = job_of(pool, made)
        await job.add(made.paths[0])
        adding = asyncio.create_task(job.add(poison))
        while not adding.done():
            await asyncio.sleep(0.4)
            for pid in pool.pids:
                os.kill(pid, signal.SIGKILL)
        with pytest.raises(ChunkRefused, match="ended 3 fold workers"):
            await adding
        await job.add(made.paths[2])
        stored = await job.total(
            [made.paths[0], made.paths[2]], made.masks_of(0, 2), storing(spool)
        )
        assert (made.open(stored) == made.plain(0, 2)).all()

    asyncio.run(go())


def test_a_task_that_is_cancelled_leaves_the_sum_whole(pool, spool):
    made = make(spool, "layered", 129)

    async def go():
        job = job_of(pool, made)
        await job.add(made.paths[0])
        for delay in (0, 0.002, 0.01):
            for path in made.paths[1:]:
                adding = asyncio.create_task(job.add(path))
                await asyncio.sleep(delay)
                adding.cancel()
        stored = await job.total(made.paths, made.masks, storing(spool))
        assert (made.open(stored) == made.plain(0, 1, 2)).all()

    asyncio.run(go())


def test_workers_end_with_their_coordinator_and_not_with_its_terminal(tmp_path):
    code = """
    import sys, time
    from pathlib import Path
    from fedcore_server.folding import FoldPool
    pool = FoldPool(2, Path(sys.argv[1]))
    print(*pool.pids, flush=True)
    time.sleep(60)
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "s")],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    pids = list(map(int, process.stdout.readline().split()))
    assert len(pids) == 2 and all(map(running, pids))
    until(lambda: all(map(ignores_interrupts, pids)))
    process.kill()
    process.wait()
    process.stdout.close()
    until(lambda: not any(map(running, pids)))


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def ignores_interrupts(pid: int) -> bool:
    line = next(x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if "SigIgn" in x)
    return bool(int(line.split()[1], 16) & 1 << (signal.SIGINT - 1))


def until(condition, seconds: float = 240) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.02)


# ------------------------------------------------------------------------------- room and memory


def peak_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) / 1024


@pytest.mark.parametrize(("protection", "blocks"), [("masked", 448), ("layered", 129)])
def test_memory_does_not_grow_with_the_number_of_sites(pool, spool, protection, blocks):
    made = make(spool, protection, blocks)
    mb = 2 * 8 * made.slots / 2**20 if protection == "layered" else 8 * made.slots / 2**20
    uploads = []
    for copy in range(20):
        uploads.append(made.paths[copy % 3].with_name(f"copy{copy}"))
        uploads[-1].hardlink_to(made.paths[copy % 3])

    async def go(paths):
        job = job_of(pool, made)
        for path in paths:
            await job.add(path)
        await job.total(paths, made.masks, storing(spool))
        return [peak_mb(pid) for pid in (*pool.pids, os.getpid())]

    few, many = asyncio.run(go(uploads[:4])), asyncio.run(go(uploads))
    growth = [after - before for before, after in zip(few, many, strict=True)]
    assert max(growth) < mb, (few, many)  # sixteen more vectors of `mb` each went through


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_no_room_for_a_part_of_the_sum_is_said_and_the_sum_can_be_asked_for_again(pool, spool):
    made = make(spool, "masked", 129)

    async def go():
        job = job_of(pool, made)
        blocked = pool._scratch / "part-0"
        blocked.symlink_to("/dev/full")
        with pytest.raises(StoreFull):
            await job.total(made.paths, made.masks, storing(spool))
        assert not blocked.is_symlink()
        stored = await job.total(made.paths, made.masks, storing(spool))
        assert (made.open(stored) == made.plain(0, 1, 2)).all()
        assert list(pool._scratch.iterdir()) == []

    asyncio.run(go())


def test_a_spooled_upload_that_vanished_or_was_damaged_is_named(pool, spool):
    made = make(spool, "masked", 129)

    async def go():
        job = job_of(pool, made)
        for path in made.paths:
            await job.add(path)
        os.kill(pool.pids[0], signal.SIGKILL)
        good = made.paths[1].read_bytes()
        made.paths[1].write_bytes(to_bytes([b"damaged"] * 2))
        with pytest.raises(StoreProblem, match="cannot be read") as caught:
            await job.total(made.paths, made.masks, storing(spool))
        assert str(made.paths[1]) in caught.value.remedy
        made.paths[1].unlink()
        with pytest.raises(StoreProblem, match="unusable"):
            await job.total(made.paths, made.masks, storing(spool))
        made.paths[1].write_bytes(good)
        stored = await job.total(made.paths, made.masks, storing(spool))
        assert (made.open(stored) == made.plain(0, 1, 2)).all()

    asyncio.run(go())


def test_a_closed_pool_says_so_and_a_pool_needs_a_worker(tmp_path, spool):
    made = make(spool, "masked", 1)
    pool = FoldPool(2, tmp_path / "s")
    job = job_of(pool, made)
    pids = pool.pids
    pool.close()
    pool.close()
    assert pool.pids == () and not any(map(running, pids))
    with pytest.raises(StoreProblem, match="expected them to run"):
        asyncio.run(job.add(made.paths[0]))
    with pytest.raises(BadInput, match="expected at least 1"):
        FoldPool(0, tmp_path / "s")


def test_chunk_slots_are_those_of_the_folds(spool):
    for protection in PROTECTIONS:
        packing = PACKINGS[protection]
        made = make(spool, protection, 129, sites=1)
        assert container.count(made.paths[0]) == -(-made.slots // chunk_slots(packing))
