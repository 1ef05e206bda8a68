"""All rounds of a run, its files as it goes, and going on after an interrupt.

Invariant: after every whole round a checkpoint is on disk, from which the run goes on to the same bits.
"""

import json
import time
from collections.abc import Callable
from contextlib import closing, nullcontext
from datetime import UTC, datetime
from pathlib import Path

from fedcore.errors import Abandoned, GuardTripped
from fedcore.experiment.advance import Experiment
from fedcore.experiment.outcome import build_result
from fedcore.experiment.prepare import Prepared, job_json
from fedcore.experiment.tensorboard import Events
from fedcore.files import (
    RESULT_FILE,
    ROUNDS_FILE,
    append_row,
    read_rounds,
    write_atomic,
    write_json,
)
from fedcore.learning import checkpoint
from fedcore.learning.model import single_thread
from fedcore.learning.saved import FILE as MODEL_FILE
from fedcore.results import RoundRow, RunResult

STOP = object()
"""Return it from `on_round` to end the run after the present round."""

OnRound = Callable[[RoundRow], object]


class RunWriter:
    """Writes a run's files as it goes: rows as they come, a checkpoint after each round."""

    def __init__(self, directory: Path, prepared: Prepared) -> None:
        self.directory = directory
        self._prepared = prepared
        self._events = Events(directory)

    def start(self) -> None:
        """plan.json and job.json, before anything is trained."""
        write_json(self.directory / "plan.json", self._prepared.plan_json())
        write_json(self.directory / "job.json", job_json(self._prepared.task, self._prepared.job))
        (self.directory / ROUNDS_FILE).touch()

    def row(self, row: RoundRow) -> None:
        """Append one line to rounds.jsonl."""
        append_row(self.directory, row)
        self._events.row(row)

    def close(self) -> None:
        """Flush what is buffered."""
        self._events.close()

    def checkpoint(self, experiment: Experiment) -> None:
        """The state after a whole round, replacing the one before."""
        write_atomic(self.directory / "checkpoint.pt", checkpoint.to_bytes(experiment.save()))

    def forget(self) -> None:
        """There is nothing to go on from: the rows stay, the checkpoint goes."""
        (self.directory / "checkpoint.pt").unlink(missing_ok=True)

    def resume(self, experiment: Experiment) -> None:
        """Back to the last checkpoint: state restored, rows after it dropped."""
        path = self.directory / "checkpoint.pt"
        if path.is_file():
            experiment.restore(checkpoint.from_bytes(path.read_bytes()))
        rows = [r for r in read_rounds(self.directory) if r.round <= experiment.round]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomic(self.directory / ROUNDS_FILE, text.encode())

    def finish(self, experiment: Experiment, result: RunResult) -> None:
        """The model and the result; the checkpoint goes."""
        model = experiment.federation.sites[0].exported(experiment.federated.state)
        write_atomic(self.directory / MODEL_FILE, model)
        write_json(self.directory / RESULT_FILE, result.to_json())
        self.forget()


def run_experiment(
    prepared: Prepared,
    writer: RunWriter | None,
    on_round: OnRound | None = None,
    *,
    resume: bool = False,
) -> tuple[Experiment, RunResult]:
    """All rounds of all arms, then the result. Interrupts leave a checkpoint of the last whole round.

    Raises Abandoned where no round was released, GuardTripped where a site leaves the job; then there is
    nothing to go on from.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    try:
        with single_thread(), closing(writer) if writer else nullcontext():
            experiment = Experiment(prepared)
            if writer is not None and resume:
                writer.resume(experiment)
            last = list(experiment.arms)[-1]
            for row in experiment.rounds():
                if writer is not None:
                    writer.row(row)
                if on_round is not None and on_round(row) is STOP:
                    experiment.stopped = f"on_round returned STOP in round {row.round}"
                if row.arm == last and writer is not None:
                    writer.checkpoint(experiment)
        experiment.require_a_release()
        result = build_result(experiment, started, time.perf_counter() - clock)
    except (Abandoned, GuardTripped):
        if writer is not None:
            writer.forget()
        raise
    return experiment, result
