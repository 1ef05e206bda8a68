"""The site's end of its training process: sends requests, waits without blocking, restarts it if it died.

Invariant: one request at a time, in a thread of its own; a process that died is a `TrainingFailed` of this request
only, and the next request starts a new process. The answer of a cancelled request is drained, since a new process
would have to import and load everything again; a request that has not begun is dropped. Failures inside are written
to the site's log and nowhere else.
"""

import asyncio
import contextlib
import logging
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fedcore.errors import GuardTripped
from fedcore.learning.data.statistics import Column
from fedcore.learning.guard import GuardMemory, GuardRecord
from fedcore.learning.state import JobState
from fedcore.results import SiteRow
from fedcore.runtime.pipes import Child, ChildEnded, Frame, python
from fedcore.secagg.plan import ModelShape, RoundPlan, Wide
from fedcore.secagg.protocol.job.effects import Track
from fedcore.secagg.protocol.job_messages import UNABLE
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.seeds import FIXED_HASHES
from fedcore.types import Contribution, FloatVector, Json

LOG = logging.getLogger("fedcore.site.training")

OVERTAKEN_SECONDS = 60.0
"""How long a cancelled request may delay the next one: about the longest start of a new process, which imports torch
and loads the rows. A process that hangs is killed then."""


class TrainingFailed(Exception):
    """The task, its data or the process failed. reason: one of protocol/job.py REASONS."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Loaded:
    """A job's task and rows. columns: (name, low, high) of each standardised column; initial: (d,) float32; rows:
    SHA-256 of the rows in any order, hex, which stays at the site."""

    shape: ModelShape
    columns: tuple[Column, ...]
    initial: FloatVector
    rows: str


class Training:
    """One training process, started with the first request."""

    def __init__(
        self, command: Sequence[str] | None = None, overtaken_seconds: float = OVERTAKEN_SECONDS
    ) -> None:
        command = command or python("fedcore_clients.worker")
        self.child = Child("the training process", command, FIXED_HASHES)
        self._line = ThreadPoolExecutor(1, "training")  # bwrap ends with the thread that started it
        self._loads: dict[str, Json] = {}
        self._shapes: dict[str, ModelShape] = {}
        self._overtaken_seconds = overtaken_seconds
        self._overtaken: Future[Frame] | None = None
        """The last request that was cancelled while it ran."""
        self._closed = False
        self._limits: Json = {}
        """Those that the present process has."""

    def limits(self) -> Json:
        """What the process may use: {"threads": ..., "memory_mb": ...}, None for no limit; {} for none at all."""
        return {}

    async def start(self) -> None:
        """Start the process now: before grpc, which makes starting one later less sure."""
        await asyncio.wrap_future(self._line.submit(self._begin))

    def _begin(self) -> None:
        """Start the process unless it is alive; its limits come before any code of a task."""
        if not self.child.alive:
            self.child.start()
            self._limits = {}
        if (limits := self.limits()) != self._limits:
            self.child.call({"do": "limit", **limits})
            self._limits = limits

    async def task_digest(self, task: str, base: str) -> tuple[str, str]:
        """(name, digest) of an installed task."""
        head, _ = await self._ask({"do": "digest", "task": task, "base": base})
        return str(head["name"]), str(head["digest"])

    async def load_task(self, job: str, **about: Any) -> Loaded:
        """Load the task and the site's rows. Raises TrainingFailed.

        about: task and base (where it is), digest (its hash), settings (of the job), site, source (its rows), split
        (the site's own), as `worker.py` reads them.
        """
        asked = {"do": "load", "job": job, **about}
        head, blobs = await self._ask(asked)
        self._loads[job], self._shapes[job] = asked, (shape := _shape_of(head))
        if head["note"]:
            LOG.info("%s", head["note"])
        columns = tuple((str(n), float(low), float(high)) for n, low, high in head["columns"])
        initial = np.frombuffer(blobs[0], dtype="<f4").astype(np.float32)
        return Loaded(shape, columns, initial, head["rows"])

    async def contribute(
        self, job: str, plan: RoundPlan, step: PlannedRound, state: JobState, record: GuardRecord
    ) -> Contribution:
        """The content of the site's vector for a step of the job; record: of its guard, which judges the
        state first and whose memory is replaced, and what the site keeps. Raises TrainingFailed and GuardTripped."""
        rules, memory = asdict(record.rules), record.memory.to_json()
        asked = _about("contribute", job, plan, step) | {"rules": rules, "memory": memory}
        head, blobs = await self._ask(asked, [state.to_bytes(), record.kept], needs=job)
        record.memory = GuardMemory.from_json(head["memory"])
        if "tripped" in head:
            about, site = head["tripped"], self._loads[job]["site"]
            raise GuardTripped(
                (site,),
                about["round"],
                about["cause"],
                found=about["found"],
                calmer=about["calmer"],
            )
        fields, record.kept = blobs
        return np.frombuffer(fields, dtype="<u8").astype(np.uint64), head["wides"]

    async def track(self, job: str, plan: RoundPlan, asked: Track, kept: bytes) -> SiteRow:
        """The accuracy after a release, with what the site keeps. Raises TrainingFailed."""
        wides = {name: [int(value) for value in values] for name, values in asked.wides.items()}
        about = _about("track", job, plan, asked.step) | {"sites": asked.sites, "wides": wides}
        blobs = [asked.state.to_bytes(), kept]
        head, _ = await self._ask(about, blobs, needs=job)
        return SiteRow.from_json(head["row"])

    async def export(self, job: str, state: JobState) -> bytes:
        """The file of a model for the coordinator. Raises TrainingFailed."""
        _, blobs = await self._ask({"do": "export", "job": job}, [state.to_bytes()], needs=job)
        return blobs[0]

    async def forget(self, job: str) -> None:
        """Free what is held of a job; a process that still runs a cancelled request is killed."""
        if self._loads.pop(job, None) is None:
            return
        self._shapes.pop(job, None)
        if self._overtaken is not None and not self._overtaken.done():
            self.child.kill()
        elif self.child.alive:
            with contextlib.suppress(TrainingFailed):  # a process that died just now holds nothing
                await self._ask({"do": "forget", "job": job})

    async def _ask(self, asked: Json, blobs: Sequence[bytes] = (), needs: str = "") -> Frame:
        request = self._line.submit(self._turn, asked, blobs, needs)
        try:
            return await asyncio.wrap_future(request)
        except asyncio.CancelledError:
            if not request.cancel():  # it is under way
                self._overtaken = request
                asyncio.get_running_loop().call_later(self._overtaken_seconds, self._end, request)
            raise

    def _end(self, request: Future[Frame]) -> None:
        if not request.done():
            self.child.kill()

    def _turn(self, asked: Json, blobs: Sequence[bytes], needs: str) -> Frame:
        try:
            anew = not self.child.alive
            self._begin()
            if anew and needs:  # a new process: what the job needs is loaded again
                head, _ = _answer_of(*self.child.call(self._loads[needs]))
                self._require_same(needs, _shape_of(head))
            return _answer_of(*self.child.call(asked, blobs))
        except (ChildEnded, OSError) as error:
            if not self._closed:
                LOG.warning("%s; it was asked to %s", error, asked["do"])
            raise TrainingFailed(UNABLE) from error

    def _require_same(self, job: str, found: ModelShape) -> None:
        """Raise TrainingFailed where a new process makes another model of a job than the one before."""
        if found == self._shapes[job]:
            return
        what = found.initial_differs(self._shapes[job])
        LOG.error(
            "job %s: found %s in a new training process, expected the model of the one before", job,
            f"other {what} at the start" if what else "another model or other columns",
        )  # fmt: skip
        self.child.kill()
        raise TrainingFailed(UNABLE)

    async def close(self) -> None:
        """End the process and its requests."""
        self._closed = True
        self._line.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.child.close)


def _about(do: str, job: str, plan: RoundPlan, step: PlannedRound) -> Json:
    return {
        "do": do, "job": job, "plan": plan.to_json(), "step": [step.purpose, step.training_round]
    }  # fmt: skip


def _shape_of(head: Json) -> ModelShape:
    shape = head["shape"]
    sums = tuple(Wide(**wide) for wide in shape["metric_sums"])
    return ModelShape(**shape | {"metric_sums": sums, "initial": tuple(shape["initial"])})


def _answer_of(head: Json, blobs: list[bytes]) -> Frame:
    if "failed" in head:
        LOG.error("%s: %s", head["failed"], head["text"])
        raise TrainingFailed(str(head["failed"]))
    return head, blobs
