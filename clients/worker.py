"""The training process of a site: runs the task's own code, away from the session and from every key.

Started by `training.py` as `python -P -m fedcore_clients.worker`; it imports `fedcore` and the task, has
no key, no certificate and no connection, and speaks frames over its standard input and output: 4 bytes
of length, JSON, then the blobs whose lengths the JSON names. No pickle.

Invariant: whatever the task prints goes to standard error, so nothing of it can be taken for an answer;
an exception becomes the one word `unable`, with its message and traceback for the site's own log.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from fedcore.errors import BadInput, GuardTripped
from fedcore.secagg.protocol.job_messages import UNABLE
from fedcore.types import Json, SiteId

_LENGTH = struct.Struct(">I")
MAX_HEAD = 1 << 24
"""Bytes of JSON: the wide integers of a statistics vector are the longest."""


def write_frame(out: IO[bytes], head: Json, blobs: Sequence[bytes] = ()) -> None:
    """One frame: the head names the blobs' lengths under "blobs"."""
    data = json.dumps(head | {"blobs": [len(blob) for blob in blobs]}, allow_nan=False).encode()
    out.write(_LENGTH.pack(len(data)) + data)
    for blob in blobs:
        out.write(blob)
    out.flush()


def read_frame(source: IO[bytes]) -> tuple[Json, list[bytes]] | None:
    """The next frame, or None at the end. Raises EOFError inside one."""
    first = source.read(_LENGTH.size)
    if not first:
        return None
    head: Json = json.loads(_exactly(source, _LENGTH.unpack(first)[0]))
    return head, [_exactly(source, size) for size in head["blobs"]]


def _exactly(source: IO[bytes], size: int) -> bytes:
    data = source.read(size)
    if len(data) != size:
        raise EOFError("the other side ended inside a frame")
    return data


class Worker:
    """What the process holds: the loaded site of each job."""

    def __init__(self) -> None:
        self.sites: dict[str, Any] = {}
        self.trackers: dict[str, Any] = {}

    def serve(self, requests: IO[bytes], answers: IO[bytes]) -> None:
        """Answer until the other side closes."""
        while (frame := read_frame(requests)) is not None:
            asked, blobs = frame
            try:
                head, out = self.answer(asked, blobs)
            except Exception as error:  # noqa: BLE001 - the task may raise anything; the site goes on
                text = getattr(error, "user_traceback", "") or traceback.format_exc()
                head, out = {"failed": UNABLE, "text": f"{error}\n{text}"}, []
            try:
                write_frame(answers, head, out)
            except BrokenPipeError:  # whoever asked is gone
                return

    def answer(self, asked: Json, blobs: Sequence[bytes]) -> tuple[Json, list[bytes]]:
        """One request. Raises whatever the task raises."""
        match asked["do"]:
            case "digest":
                from fedcore.learning.task import load_task

                task = load_task(asked["task"], Path(asked["base"]))
                return {"name": task.name, "digest": task.digest()}, []
            case "load":
                return self._load(asked)
            case "contribute":
                return self._contribute(asked, blobs[0])
            case "track":
                return self._track(asked, blobs[0])
            case "export":
                from fedcore.learning.state import JobState

                site = self.sites[asked["job"]]
                return {}, [site.exported(JobState.from_bytes(blobs[0]), public=True)]
            case "forget":
                self.trackers.pop(asked["job"], None)
                self.sites.pop(asked["job"], None)
                return {}, []
        raise BadInput(f"worker: found the request {asked['do']!r}")

    def _load(self, asked: Json) -> tuple[Json, list[bytes]]:
        from dataclasses import asdict

        from fedcore.config import build_job
        from fedcore.learning.data.split import split_from_json
        from fedcore.learning.site import LocalSite
        from fedcore.learning.task import load_task

        task = load_task(asked["task"], Path(asked["base"]))
        if asked["digest"] != task.digest():
            return {"failed": "task differs", "text": f"found {task.digest()}"}, []
        job = build_job(asked["settings"])  # complete: the task's defaults are in it
        cap = job.protect.max_examples
        if cap is None:
            raise BadInput("protect.max_examples: found none, expected the public cap on rows")
        split = split_from_json(asked["split"])  # this site's, whatever the job asks for
        site = LocalSite(task, job, SiteId(asked["site"]), asked["source"], cap, split)
        self.sites[asked["job"]] = site
        head = {
            "shape": asdict(site.shape), "columns": [list(column) for column in site.columns],
            "rows": site.rows, "note": site.note,
        }  # fmt: skip
        return head, [site.initial.astype("<f4").tobytes()]

    def _track(self, asked: Json, state: bytes) -> tuple[Json, list[bytes]]:
        from fedcore.learning.state import JobState
        from fedcore.learning.tracking import Tracker
        from fedcore.secagg.plan import RoundPlan
        from fedcore.secagg.protocol.schedule import PlannedRound

        name = asked["job"]
        if name not in self.trackers:
            self.trackers[name] = Tracker(self.sites[name], RoundPlan.from_json(asked["plan"]))
        step = PlannedRound(asked["step"][0], asked["step"][1])
        found = self.trackers[name].row(
            step, JobState.from_bytes(state), asked["wides"], asked["sites"]
        )
        return {"row": found}, []

    def _contribute(self, asked: Json, state: bytes) -> tuple[Json, list[bytes]]:
        from fedcore.learning.guard import GuardMemory, GuardRecord, GuardRules
        from fedcore.learning.state import JobState
        from fedcore.secagg.plan import RoundPlan
        from fedcore.secagg.protocol.schedule import PlannedRound

        site = self.sites[asked["job"]]
        step = PlannedRound(asked["step"][0], asked["step"][1])
        plan = RoundPlan.from_json(asked["plan"])
        record = GuardRecord(GuardRules(**asked["rules"]), GuardMemory.from_json(asked["memory"]))
        try:
            fields, wides = site.contribute(plan, step, JobState.from_bytes(state), record)
        except GuardTripped as tripped:
            about = {"round": tripped.round, "cause": tripped.cause, "found": tripped.found}
            return {"tripped": about, "memory": record.memory.to_json()}, []
        whole = {name: [int(value) for value in values] for name, values in wides.items()}
        head = {"wides": whole, "memory": record.memory.to_json()}
        return head, [np.ascontiguousarray(fields, dtype="<u8").tobytes()]


def main() -> int:
    """Answer requests until the other side closes."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever is printed from here on is no answer
    requests = os.fdopen(os.dup(0), "rb")
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)  # a task that reads its standard input finds the end of it
    from fedcore.learning.model import single_thread

    worker = Worker()
    with single_thread():  # the same bits as in every other process of this federation
        worker.serve(requests, answers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
