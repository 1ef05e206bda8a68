"""The running sum of a job's round under way: uploads are folded as they arrive, masks removed at the end."""

import asyncio
import contextlib
from collections.abc import Callable

from fedcore_server.folding import FoldPool, JobFold
from fedcore_server.job_disk import JobDisk

from fedcore.errors import ChunkRefused, DataLost, FedcoreError, StoreFull
from fedcore.secagg.plan import Packing, RoundHeader
from fedcore.secagg.protocol.effects import RemoveMasks
from fedcore.secagg.protocol.job.coordinator.events import Folded, SumMade
from fedcore.secagg.protocol.job.coordinator.facts import KeptFile
from fedcore.types import SiteId


class JobSum:
    """One job's sums in the fold pool. retry_seconds: between attempts while the disk is full."""

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
