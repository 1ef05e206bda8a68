"""The site's end of its training process: asks, waits without blocking, starts it again if it died.

Invariant: one request at a time; a process that died is a `TrainingFailed` of this request only, and
the next request finds a new one. A request that nobody waits for any more is answered to its end and the
answer dropped, since a new process would have to import and load everything again; one that has not begun
is never asked. What failed inside is written to the site's log and nowhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fedcore.errors import GuardTripped
from fedcore.learning.guard import GuardMemory, GuardRecord
from fedcore.learning.state import Column, JobState
from fedcore.secagg.plan import ModelShape, RoundPlan, Wide
from fedcore.secagg.protocol.job_messages import UNABLE
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.types import Contribution, FloatVector, Json

LOG = logging.getLogger("fedcore.site.training")
_LENGTH = struct.Struct(">I")

OVERTAKEN_SECONDS = 60.0
"""How long a request that nobody waits for may keep the process from the next one: about what a new
process costs at worst, to import torch and load the rows. A task that hangs is ended then."""


class TrainingFailed(Exception):
    """The task, its data or the process failed. reason: one of protocol/job.py REASONS."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Loaded:
    """What a site found when it loaded a job's task and rows. rows: SHA-256 of the rows, hex, in whatever
    order; it stays at the site."""

    shape: ModelShape
    columns: tuple[Column, ...]
    initial: FloatVector
    rows: str


class Training:
    """One training process, started when it is first asked for."""

    def __init__(self, command: Sequence[str] | None = None) -> None:
        self._command = command or (sys.executable, "-P", "-m", "fedcore_clients.worker")
        self._process: asyncio.subprocess.Process | None = None
        self._one = asyncio.Lock()
        self._loads: dict[str, Json] = {}
        self._turns: set[asyncio.Task[tuple[Json, list[bytes]]]] = set()
        self._at_work: asyncio.Task[tuple[Json, list[bytes]]] | None = None
        self._late: asyncio.TimerHandle | None = None
        """Set while the process is at something that nobody waits for."""

    async def start(self) -> None:
        """Start the process now: before grpc, which makes starting one later less sure."""
        async with self._one:
            if not self._alive():
                await self._start()

    async def task_digest(self, task: str, base: str) -> tuple[str, str]:
        """(name, digest) of an installed task."""
        head, _ = await self._ask({"do": "digest", "task": task, "base": base})
        return str(head["name"]), str(head["digest"])

    async def load(
        self,
        job: str,
        *,
        task: str,
        base: str,
        digest: str,
        settings: Mapping[str, Any],
        site: str,
        source: Any,
        split: Json,
    ) -> Loaded:
        """Load the task and the site's rows. split: the site's own. Raises TrainingFailed."""
        asked = {
            "do": "load", "job": job, "task": task, "base": base, "digest": digest,
            "settings": dict(settings), "site": site, "source": source, "split": split,
        }  # fmt: skip
        head, blobs = await self._ask(asked)
        self._loads[job] = asked
        if head["note"]:
            LOG.info("%s", head["note"])
        shape = head["shape"]
        sums = tuple(Wide(**wide) for wide in shape["metric_sums"])
        columns = tuple((str(n), float(low), float(high)) for n, low, high in head["columns"])
        initial = np.frombuffer(blobs[0], dtype="<f4").astype(np.float32)
        return Loaded(ModelShape(**shape | {"metric_sums": sums}), columns, initial, head["rows"])

    async def contribute(
        self, job: str, plan: RoundPlan, step: PlannedRound, state: JobState, record: GuardRecord
    ) -> Contribution:
        """The content of the site's vector for a step of the job; record: of its guard, which judges the
        state first and whose memory is replaced. Raises TrainingFailed and GuardTripped."""
        asked = {
            "do": "contribute", "job": job, "plan": plan.to_json(),
            "step": [step.purpose, step.training_round],
            "rules": asdict(record.rules), "memory": record.memory.to_json(),
        }  # fmt: skip
        head, blobs = await self._ask(asked, [state.to_bytes()], needs=job)
        record.memory = GuardMemory.from_json(head["memory"])
        if "tripped" in head:
            about = head["tripped"]
            site = self._loads[job]["site"]
            raise GuardTripped((site,), about["round"], about["cause"], found=about["found"])
        return np.frombuffer(blobs[0], dtype="<u8").astype(np.uint64), head["wides"]

    async def track(
        self,
        job: str,
        plan: RoundPlan,
        step: PlannedRound,
        state: JobState,
        wides: Mapping[str, Sequence[int]],
        sites: int,
    ) -> Json:
        """What the site can say of accuracy after a released step. Raises TrainingFailed."""
        asked = {
            "do": "track", "job": job, "plan": plan.to_json(),
            "step": [step.purpose, step.training_round], "sites": sites,
            "wides": {name: [int(value) for value in values] for name, values in wides.items()},
        }  # fmt: skip
        head, _ = await self._ask(asked, [state.to_bytes()], needs=job)
        row: Json = head["row"]
        return row

    async def export(self, job: str, state: JobState) -> bytes:
        """The file of a model that is given away. Raises TrainingFailed."""
        _, blobs = await self._ask({"do": "export", "job": job}, [state.to_bytes()], needs=job)
        return blobs[0]

    async def forget(self, job: str) -> None:
        """Free what is held of a job; a process that is still at work for nobody is ended."""
        if self._loads.pop(job, None) is None:
            return
        if self._late is not None:
            self._kill()
        elif self._alive():
            with contextlib.suppress(TrainingFailed):  # a process that died just now holds nothing
                await self._ask({"do": "forget", "job": job})

    def _alive(self) -> bool:
        return self._process is not None and self._process.returncode is None

    async def _ask(
        self, asked: Json, blobs: Sequence[bytes] = (), needs: str = ""
    ) -> tuple[Json, list[bytes]]:
        turn = asyncio.get_running_loop().create_task(self._turn(asked, blobs, needs))
        self._turns.add(turn)
        turn.add_done_callback(self._over)
        try:
            return await asyncio.shield(turn)
        except asyncio.CancelledError:
            self._overtake(turn)
            raise

    def _over(self, turn: asyncio.Task[tuple[Json, list[bytes]]]) -> None:
        self._turns.discard(turn)
        if not turn.cancelled():
            turn.exception()  # where nobody waits for it any more, it is in the log already

    def _overtake(self, turn: asyncio.Task[tuple[Json, list[bytes]]]) -> None:
        """Nobody waits for it any more."""
        if turn is not self._at_work:
            turn.cancel()
        elif self._late is None:
            loop = asyncio.get_running_loop()
            self._late = loop.call_later(OVERTAKEN_SECONDS, self._kill)

    async def _turn(
        self, asked: Json, blobs: Sequence[bytes], needs: str
    ) -> tuple[Json, list[bytes]]:
        async with self._one:
            self._at_work = asyncio.current_task()
            try:
                if not self._alive():
                    await self._start()
                    if needs:  # a new process: what the job needs is loaded again
                        _told(*await self._exchange(self._loads[needs], ()))
                return _told(*await self._exchange(asked, blobs))
            except (
                asyncio.IncompleteReadError,
                ConnectionError,
                BrokenPipeError,
                OSError,
            ) as error:
                await self._end()
                LOG.warning("the training process ended while it was asked to %s", asked["do"])
                raise TrainingFailed(UNABLE) from error
            except asyncio.CancelledError:
                await self._end()  # its answer would be taken for the next one's
                raise
            finally:
                self._at_work = None
                if self._late is not None:
                    self._late.cancel()
                    self._late = None

    async def _start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *self._command, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
            limit=1 << 20,
        )  # fmt: skip

    async def _exchange(self, asked: Json, blobs: Sequence[bytes]) -> tuple[Json, list[bytes]]:
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        data = json.dumps(asked | {"blobs": [len(blob) for blob in blobs]}).encode()
        process.stdin.write(_LENGTH.pack(len(data)) + data)
        for blob in blobs:
            process.stdin.write(blob)
        await process.stdin.drain()
        (size,) = _LENGTH.unpack(await process.stdout.readexactly(_LENGTH.size))
        head: Json = json.loads(await process.stdout.readexactly(size))
        return head, [await process.stdout.readexactly(length) for length in head["blobs"]]

    def _kill(self) -> None:
        """Whoever reads its answer finds the end of it, and waits for the process."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _end(self) -> None:
        self._kill()
        process, self._process = self._process, None
        if process is not None:
            await process.wait()

    async def close(self) -> None:
        """End the process, and whatever is asked of it."""
        turns = list(self._turns)
        for turn in turns:
            turn.cancel()
        await asyncio.gather(*turns, return_exceptions=True)
        await self._end()


def _told(head: Json, blobs: list[bytes]) -> tuple[Json, list[bytes]]:
    if "failed" in head:
        LOG.error("%s: %s", head["failed"], head["text"])
        raise TrainingFailed(str(head["failed"]))
    return head, blobs
