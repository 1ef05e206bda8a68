"""The fold in worker processes: SEAL holds the GIL, and would block every connection.

A job's vectors are split into ranges of chunks, one range for each worker. A worker keeps one running sum of its
range, reads uploads from the spool by their paths, expands only its own range of each mask, and writes
its chunks of the sum to a file; the coordinator's process never holds a vector.
Invariants: an upload is in the sum of every worker or of none; `total` is the sum of exactly the uploads
it is given, whatever was folded before and whichever worker died meanwhile; memory, in all processes, does
not grow with the number of sites. The bits are those of one fold over the whole vector: sums are exact,
and chunks are independent.

Workers are started as commands and not forked, and before grpc: a fork under grpc hangs. They read
requests from their standard input and end with it, so none outlives this process, even if it is killed.
The contents of an upload are not trusted: if it crashes a worker, that worker is restarted and the upload refused.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar

from fedcore_server import fold_worker
from fedcore_server.fold_worker import ERRORS, chunk_slots, packing_form
from fedcore_server.job_disk import JobDisk

from fedcore.errors import BadInput, ChunkRefused, DataLost, FedcoreError, StoreFull, StoreProblem
from fedcore.files.disk import make_folder, refusals
from fedcore.runtime.pipes import Child, ChildEnded, python
from fedcore.secagg.packing import Packing
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol.effects import Mask, RemoveMasks
from fedcore.secagg.protocol.job.coordinator.events import Folded, SumMade
from fedcore.secagg.protocol.job.coordinator.facts import KeptFile
from fedcore.store import container
from fedcore.types import Json, SiteId

T = TypeVar("T")

ANSWER_SECONDS = 300.0
"""Timeout of one answer, in seconds: a hundred times what ten million parameters take on one slow core."""

_ATTEMPTS = 3
"""A worker may die of another cause than the present upload; not three times."""


class FoldPool:
    """Worker processes. Start it before grpc; its jobs may come and go.

    workers: processes, at least 1. scratch: a folder on the spool's file system for parts of sums.
    One operation runs at a time, in a thread of its own, on all workers at once: an awaiting task that
    is cancelled leaves it to end by itself.
    """

    def __init__(self, workers: int, scratch: Path) -> None:
        if workers < 1:
            raise BadInput(f"fold workers: found {workers}, expected at least 1")
        self._scratch = scratch
        with refusals("fold", scratch):
            make_folder(scratch)
            for left in scratch.glob("part-*"):
                left.unlink()
        self._workers = [_worker(number) for number in range(workers)]
        self.closed = False
        self._line = ThreadPoolExecutor(1, "fold")
        self._hands = ThreadPoolExecutor(workers, "fold-worker")

    def job(self, name: str, packing: Packing, slots: int) -> JobFold:
        """The running sum of a vector of `slots` slots; it starts empty. `name` is unique in the pool."""
        return JobFold(self, name, packing, slots)

    @property
    def pids(self) -> tuple[int, ...]:
        """The workers that are alive."""
        return tuple(worker.pid for worker in self._workers if worker.alive)

    def close(self) -> None:
        """End the workers; pending requests raise StoreProblem."""
        self.closed = True
        for worker in self._workers:
            worker.close()
        self._line.shutdown(wait=True, cancel_futures=True)
        self._hands.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class _Shard:
    """One worker's range of chunks of one job, and which uploads are in its sum. life: of the worker, when the sum
    was begun; another one means that the sum is gone."""

    worker: Child
    first: int
    chunks: int
    slots: int
    life: int = -1
    held: list[Path] = field(default_factory=list)


class JobFold:
    """The running sum of one round's vectors. Made by `FoldPool.job`."""

    def __init__(self, pool: FoldPool, name: str, packing: Packing, slots: int) -> None:
        self._pool, self._name, self._packing = pool, name, packing
        self._held: list[Path] = []
        self._given_up = False
        each = chunk_slots(packing)
        self._chunks = -(-slots // each)
        workers = pool._workers[: max(1, self._chunks)]
        # Rounded down, so that the last range is the longer one: its last chunk is seldom whole.
        bounds = [place * self._chunks // len(workers) for place in range(len(workers) + 1)]
        self._shards = [
            _Shard(worker, first, end - first, min(slots, end * each) - first * each)
            for worker, first, end in zip(workers, bounds, bounds[1:], strict=False)
        ]

    async def add(self, path: Path) -> None:
        """Fold a complete upload before `total`. Idempotent.

        Raises ChunkRefused for a file that is no vector of this plan, and then nothing of it is in the sum.
        Call it before the round takes the upload: the protocol's machine cannot undo that.
        """
        await self._alone(lambda: self._add(path))

    async def total(
        self, uploads: Iterable[Path], masks: Sequence[Mask], store: Callable[[Iterator[bytes]], T]
    ) -> T:
        """The sum of exactly these uploads without these masks: `store` gets its chunks, in order.

        store: such as `lambda chunks: spool.put(job, "sum", chunks)`; called in a thread, and what it
        returns comes back. The running sum is empty afterwards. May be repeated, with the same bits.
        Raises StoreProblem, StoreFull.
        """
        wanted = list(dict.fromkeys(uploads))
        seeds = b"".join(seed.reveal() + (b"+" if sign == 1 else b"-") for seed, sign in masks)
        return await self._alone(lambda: self._total(wanted, seeds, store))

    async def end(self) -> None:
        """Forget the running sum."""
        await self._alone(self._end)

    def give_up(self) -> None:
        """Cancel this sum even if a worker hangs; it takes no further request.

        The workers are killed, and restarted by the next job's first request.
        """
        self._given_up = True
        for shard in self._shards:
            shard.worker.kill()

    async def _alone(self, work: Callable[[], T]) -> T:
        self._require_open()
        return await asyncio.get_running_loop().run_in_executor(self._pool._line, work)

    def _require_open(self) -> None:
        if self._pool.closed or self._given_up:
            raise StoreProblem("fold: found its workers ended, expected them to run")

    def _add(self, path: Path) -> None:
        if path in self._held:
            return
        # With one shard there is no other sum to keep in step, so one request does both.
        alone = len(self._shards) == 1
        op = "add" if alone else "prepare"
        refused = [error for error in self._each(lambda s: self._prepare(s, path, op)) if error]
        if refused:
            raise refused[0]
        self._held.append(path)
        if alone:
            self._shards[0].held.append(path)
        else:
            self._each(lambda shard: self._commit(shard, path))

    def _total(self, uploads: list[Path], masks: bytes, store: Callable[[Iterator[bytes]], T]) -> T:
        if not uploads:
            raise BadInput("sum: found no upload, expected at least one")
        parts = [self._part(shard) for shard in self._shards]
        self._held = uploads
        try:
            self._each(lambda shard: self._write(shard, self._part(shard), masks))
            return store(chunk for part in parts for chunk in container.read(part))
        finally:
            self._held = []
            for shard in self._shards:
                shard.life = -1
            for part in parts:
                part.unlink(missing_ok=True)

    def _end(self) -> None:
        self._held = []
        for shard in self._shards:
            shard.life = -1
        self._each(self._forget)

    def _part(self, shard: _Shard) -> Path:
        return self._pool._scratch / f"part-{shard.first}"

    def _each(self, work: Callable[[_Shard], T]) -> list[T]:
        """On all workers at once; returns or raises only when all of them are done."""
        if len(self._shards) == 1:
            return [work(self._shards[0])]
        running = [self._pool._hands.submit(work, shard) for shard in self._shards]
        wait(running)
        return [each.result() for each in running]

    def _prepare(self, shard: _Shard, path: Path, op: str) -> FedcoreError | None:
        """Read an upload beside the running sum, or into it; what is wrong with it, or None."""
        try:
            self._trying(shard, lambda: self._call(shard, {"op": op, "path": str(path)}))
        except ChildEnded:
            return ChunkRefused(
                f"vector: found that reading it ended {_ATTEMPTS} fold workers, expected one to read it",
                remedy="the coordinator's log has their last words; is memory short?",
            )
        except FedcoreError as error:
            return error
        return None

    def _commit(self, shard: _Shard, path: Path) -> None:
        """Add it to the sum. If the worker died since, the sum is made again when it is needed."""
        if shard.life == shard.worker.life:
            with contextlib.suppress(ChildEnded):
                self._call(shard, {"op": "commit"})
                shard.held.append(path)

    def _write(self, shard: _Shard, part: Path, masks: bytes) -> None:
        """This shard's chunks of the sum, into a file of their own."""
        request = {"op": "sum", "path": str(part)}
        try:
            self._trying(shard, lambda: self._call(shard, request, masks))
        except ChildEnded as error:
            raise StoreProblem(
                f"fold: found that its worker ended {_ATTEMPTS} times, expected a sum",
                remedy="the coordinator's log has its last words; is memory short?",
            ) from error

    def _forget(self, shard: _Shard) -> None:
        """A worker that died has forgotten the sum already."""
        if shard.worker.alive:
            with contextlib.suppress(ChildEnded):
                self._call(shard, {"op": "end"})

    def _trying(self, shard: _Shard, work: Callable[[], None]) -> None:
        """`work` on a shard whose sum is that of the held uploads; retried if its worker dies."""
        for _ in range(_ATTEMPTS - 1):
            with contextlib.suppress(ChildEnded):
                self._settle(shard)
                work()
                return
        self._settle(shard)
        work()

    def _settle(self, shard: _Shard) -> None:
        """Make the shard's sum that of the held uploads: from the spool, as far as it is not yet."""
        self._require_open()
        worker = shard.worker
        if not (worker.alive and shard.life == worker.life and set(shard.held) <= set(self._held)):
            worker.start()
            begin = {
                "op": "begin", "packing": packing_form(self._packing), "slots": shard.slots,
                "first": shard.first, "chunks": shard.chunks, "of": self._chunks,
            }  # fmt: skip
            self._call(shard, begin)
            shard.life, shard.held = worker.life, []
        for path in self._held:
            if path not in shard.held:
                try:
                    self._call(shard, {"op": "prepare", "path": str(path)})
                except ChunkRefused as error:
                    raise StoreProblem(
                        f"fold: found a spooled upload that cannot be read ({error})",
                        remedy=f"look at {path}: it was taken before it was folded, or damaged since",
                    ) from error
                self._call(shard, {"op": "commit"})
                shard.held.append(path)

    def _call(self, shard: _Shard, request: Json, payload: bytes = b"") -> None:
        """Raises what the worker raised, and ChildEnded."""
        request = {"job": self._name, **request}
        answer, _ = shard.worker.call(request, [payload], timeout=ANSWER_SECONDS)
        if "error" in answer:
            raise ERRORS[answer["error"]](answer["text"], remedy=answer["remedy"])


def _worker(number: int) -> Child:
    """A fold worker, running: each is one thread of arithmetic."""
    env = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    worker = Child(f"fold worker {number}", python(fold_worker.__name__), env)
    worker.start()
    return worker


class JobSum:
    """One job's sums in the fold pool: uploads are folded as they arrive, masks removed at the end.

    retry_seconds: between attempts while the disk is full.
    """

    def __init__(self, pool: FoldPool, disk: JobDisk, retry_seconds: float) -> None:
        self._pool, self._disk, self._retry_seconds = pool, disk, retry_seconds
        self._fold: JobFold | None = None

    def open(self, header: RoundHeader, packing: Packing, slots: int) -> None:
        """Prepare an empty sum for this round."""
        self._disk.begin_round(header.digest)
        self._fold = self._pool.job(f"{header.job}-{header.round}", packing, slots)

    async def add(self, site: SiteId, digest: bytes) -> Folded:
        """Fold a complete upload of this site."""
        assert self._fold is not None
        try:
            await self._fold.add(self._disk.uploads[digest].path)
        except ChunkRefused as error:
            return Folded(site, refused=str(error))
        return Folded(site)

    async def make(
        self, asked: RemoveMasks, late: Callable[[], bool], full: Callable[[str], None]
    ) -> SumMade:
        """The sum of exactly these uploads; retries while the disk is full.

        late: whether it takes longer than a stage may; full: called with the reason before each retry. Raises
        StoreProblem, and StoreFull once it is late.
        """
        assert self._fold is not None
        disk, header = self._disk, asked.header.digest
        while True:
            try:
                disk.sum = await self._fold.total(
                    disk.summands(asked), asked.masks, lambda chunks: disk.keep_sum(header, chunks)
                )
            except StoreFull as error:  # nothing of the round is lost
                full(str(error))
                if late():
                    raise
                await asyncio.sleep(self._retry_seconds)
            else:
                return SumMade(header, KeptFile(disk.sum.digest, disk.sum.size))

    def give_up(self, number: int, seconds: float) -> None:
        """End the workers: one of them or the disk hangs. Raises DataLost."""
        if self._fold is not None:
            self._fold.give_up()
        raise DataLost(
            f"sum of round {number}: found none after {seconds:.0f} s, expected it within the limit of a stage",
            remedy="look at the disk and the fold workers, and raise limits.stage_seconds if they are slow",
        )

    async def end(self) -> None:
        """Free the running sum."""
        if self._fold is not None:
            with contextlib.suppress(FedcoreError):
                await self._fold.end()
