"""The training process of a site: runs the task's own code, apart from the session and from all keys.

Started by `trainer.py` as `python -P -m fedcore_clients.worker`; it imports `fedcore` and the task, has no key, no
certificate and no connection, and exchanges frames over its standard input and output.

Invariant: what the task prints goes to standard error, so it cannot be taken for an answer; an exception becomes the
reason `unable`, with its message and traceback for the site's own log.
"""

import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from fedcore_clients.resources import limit, ran_out, too_much

from fedcore.errors import BadInput, FedcoreError, GuardTripped, with_hint
from fedcore.learning.guard import GuardMemory, GuardRecord, GuardRules
from fedcore.learning.state import JobState
from fedcore.runtime.pipes import Parent
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol.job_messages import UNABLE
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.types import Json, SiteId

if TYPE_CHECKING:
    from fedcore.learning.site import SiteTrainer
    from fedcore.learning.tracking import Tracker


READING_SECONDS = 30.0
"""Between two lines on how far reading a dataset's items has come."""


class ReadingLog:
    """Tells the site's log how far reading a dataset item by item has come, where it takes long."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, where: str, done: int, total: int) -> None:
        """As `reading.OnRead`."""
        now = time.monotonic()
        if now - self._said >= READING_SECONDS:
            self._said = now
            sys.stderr.write(f"{where}: reading rows, {done:,}/{total:,} rows done\n")
            sys.stderr.flush()


class Worker:
    """The loaded site of each job."""

    def __init__(self) -> None:
        self.sites: dict[str, SiteTrainer] = {}
        self.trackers: dict[str, Tracker] = {}
        self._memory_mb: int | None = None

    def answer(self, asked: Json, blobs: Sequence[bytes]) -> tuple[Json, list[bytes]]:
        """The answer to a request; what the task raises becomes an answer."""
        try:
            return self._answer(asked, blobs)
        except Exception as error:  # noqa: BLE001 - the task may raise anything; the site goes on
            return {"failed": UNABLE, "text": self._text(error)}, []

    def _text(self, error: Exception) -> str:
        """What the site's log has of an error."""
        if self._memory_mb is not None and ran_out(error):
            return too_much(self._memory_mb)
        if isinstance(error, FedcoreError):
            # with the traceback of the task at most: ours says nothing about it
            return "\n".join(filter(None, [with_hint(error), getattr(error, "user_traceback", "")]))
        return f"{error}\n{''.join(traceback.format_exception(error))}"

    def _answer(self, asked: Json, blobs: Sequence[bytes]) -> tuple[Json, list[bytes]]:
        """One request. Raises whatever the task raises."""
        match asked["do"]:
            case "limit":
                self._memory_mb = asked["memory_mb"]
                limit(asked["threads"], self._memory_mb)
                return {}, []
            case "digest":
                from fedcore.learning.task import load_task

                task = load_task(asked["task"], Path(asked["base"]))
                return {"name": task.name, "digest": task.digest()}, []
            case "load":
                return self._load(asked)
            case "contribute":
                self._restore_kept(asked["job"], blobs[1])
                return self._contribute(asked, blobs[0])
            case "track":
                self._restore_kept(asked["job"], blobs[1])
                return self._track(asked, blobs[0])
            case "export":
                site = self.sites[asked["job"]]
                return {}, [site.exported(JobState.from_bytes(blobs[0]), public=True)]
            case "forget":
                self.trackers.pop(asked["job"], None)
                self.sites.pop(asked["job"], None)
                return {}, []
        raise BadInput(f"worker: found the request {asked['do']!r}")

    def _load(self, asked: Json) -> tuple[Json, list[bytes]]:
        from fedcore.config import build_job
        from fedcore.learning.data.reading import reporting_to
        from fedcore.learning.data.split import split_from_json
        from fedcore.learning.site import SiteTrainer
        from fedcore.learning.task import load_task

        task = load_task(asked["task"], Path(asked["base"]))
        if asked["digest"] != task.digest():
            return {"failed": "task differs", "text": f"found {task.digest()}"}, []
        job = build_job(asked["settings"])  # complete: the task's defaults are in it
        task = task.with_settings(job.task_settings)
        cap = job.protect.max_examples
        if cap is None:
            raise BadInput("protect.max_examples: found none, expected the public cap on rows")
        split = split_from_json(asked["split"])  # this site's, not the job's
        name, source = SiteId(asked["site"]), asked["source"]
        with reporting_to(ReadingLog()):
            site = SiteTrainer.load(task, job, name, source, cap, split)
        self.sites[asked["job"]] = site
        head = {
            "shape": asdict(site.shape), "columns": [list(column) for column in site.columns],
            "rows": site.rows, "note": site.note,
        }  # fmt: skip
        return head, [site.initial.astype("<f4").tobytes()]

    def _track(self, asked: Json, state: bytes) -> tuple[Json, list[bytes]]:
        from fedcore.learning.tracking import Tracker

        name = asked["job"]
        if name not in self.trackers:
            self.trackers[name] = Tracker(self.sites[name], RoundPlan.from_json(asked["plan"]))
        step = PlannedRound(asked["step"][0], asked["step"][1])
        found = self.trackers[name].row(
            step, JobState.from_bytes(state), asked["wides"], asked["sites"]
        )
        return {"row": found}, []

    def _contribute(self, asked: Json, state: bytes) -> tuple[Json, list[bytes]]:
        site = self.sites[asked["job"]]
        step = PlannedRound(asked["step"][0], asked["step"][1])
        plan = RoundPlan.from_json(asked["plan"])
        record = GuardRecord(GuardRules(**asked["rules"]), GuardMemory.from_json(asked["memory"]))
        try:
            fields, wides = site.contribute(plan, step, JobState.from_bytes(state), record)
        except GuardTripped as tripped:
            about = {
                "round": tripped.round, "cause": tripped.cause, "found": tripped.found, "calmer": tripped.calmer,
            }  # fmt: skip
            return {"tripped": about, "memory": record.memory.to_json()}, []
        app = site.task.app
        whole = {name: [int(value) for value in values] for name, values in wides.items()}
        head = {"wides": whole, "memory": record.memory.to_json()}
        kept = site.kept.to_bytes() if app is None else app.save()
        return head, [np.ascontiguousarray(fields, dtype="<u8").tobytes(), kept]

    def _restore_kept(self, job: str, kept: bytes) -> None:
        """What an algorithm or an app keeps, as the site has it: this process may be a new one, or have trained a
        round that was given up."""
        from fedcore.learning.kept import KeptValues

        site = self.sites[job]
        if site.task.app is not None:
            site.task.app.restore(kept)
        else:
            site.kept = KeptValues.from_bytes(kept)


def main() -> int:
    """Answer requests until the other side closes."""
    parent = Parent.of_this_process()
    from fedcore.learning.model import single_thread

    with single_thread():  # the same bits as in every other process of this federation
        parent.serve(Worker().answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
