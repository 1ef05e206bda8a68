"""Where else a run's rows go while it trains: TensorBoard, MLflow, Weights & Biases (`[track] to`).

Invariant: rounds.jsonl has every row whatever happens here. A destination that cannot begin is refused before
round 1; one that fails later is left out with one warning, and the run goes on.
"""

import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from fedcore.errors import BadInput, printable
from fedcore.files import read_json, write_json
from fedcore.results import RoundRow
from fedcore.types import Json

IDS_FILE = "destinations.json"
"""In a run's directory: its id at each service, so that a resumed run goes on there."""


class Destination(Protocol):
    """One place that gets each row of a run."""

    def row(self, row: RoundRow) -> None: ...
    def close(self, *, failed: bool) -> None: ...


def scalars(row: RoundRow) -> Iterator[tuple[str, float]]:
    """(name, value) of each number of a row, but for its round."""
    for name, value in row.items():
        if isinstance(value, int | float) and name != "round":
            yield name, value


class TensorBoard:
    """Event files in the run's directory: each number as a scalar, in one folder per arm so that the arms lie
    over each other."""

    def __init__(self, directory: Path) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._directory = directory / "tensorboard"
        self._event, self._summary, self._writer = Event, Summary, EventFileWriter
        self._writers: dict[str, Any] = {}

    def row(self, row: RoundRow) -> None:
        if row.arm not in self._writers:
            self._writers[row.arm] = self._writer(str(self._directory / row.arm))
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in scalars(row)]
        summary = self._summary(value=values)
        event = self._event(wall_time=time.time(), step=row.round, summary=summary)
        self._writers[row.arm].add_event(event)

    def close(self, *, failed: bool) -> None:  # noqa: ARG002 - an event file has no outcome
        for writer in self._writers.values():
            writer.close()


class Mlflow:
    """One MLflow run, at MLFLOW_TRACKING_URI: settings as parameters, numbers as metrics `arm/name` by round. Its
    experiment is MLFLOW_EXPERIMENT_NAME, or the task's name."""

    def __init__(self, directory: Path, job: Json, ids: dict[str, str]) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric, self._client = Metric, MlflowClient()
        if "mlflow" not in ids:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or job["task_name"]
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            made = self._client.create_run(experiment, run_name=directory.name)
            ids["mlflow"] = made.info.run_id
            params = [Param(key, value[:500]) for key, value in _flat(job)]
            self._client.log_batch(ids["mlflow"], params=params)
        self._run = ids["mlflow"]
        self._client.update_run(self._run, status="RUNNING")

    def row(self, row: RoundRow) -> None:
        now = int(time.time() * 1000)
        metrics = [
            self._metric(re.sub(r"[^\w\-. /]", "_", f"{row.arm}/{name}"), value, now, row.round)
            for name, value in scalars(row)
        ]
        self._client.log_batch(self._run, metrics=metrics)

    def close(self, *, failed: bool) -> None:
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class Wandb:
    """One run of Weights & Biases: settings as its configuration, numbers as `arm/name` by round. Its project is
    WANDB_PROJECT, or the task's name; WANDB_MODE=offline keeps it in the run's directory."""

    def __init__(self, directory: Path, job: Json, ids: dict[str, str]) -> None:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or job["task_name"], name=directory.name,
            dir=str(directory), id=ids.get("wandb"), resume="allow", config=dict(_flat(job)),
        )  # fmt: skip
        ids["wandb"] = self._run.id

    def row(self, row: RoundRow) -> None:
        self._run.log({f"{row.arm}/{name}": value for name, value in scalars(row)}, step=row.round)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def _flat(job: Json) -> Iterator[tuple[str, str]]:
    """(`section.key`, value) of each setting."""
    for key, value in job.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{name}", str(each)) for name, each in value.items())
        elif value is not None:
            yield key, str(value)


class Destinations:
    """All of a run's. With an empty `to` there is TensorBoard where it can be imported, and nothing otherwise."""

    def __init__(self, directory: Path, job: Json) -> None:
        path, wanted = directory / IDS_FILE, job["track"]["to"]
        ids: dict[str, str] = dict(read_json(path)) if path.is_file() else {}
        makers: dict[str, Callable[[], Destination]] = {
            "tensorboard": lambda: TensorBoard(directory),
            "mlflow": lambda: Mlflow(directory, job, ids),
            "wandb": lambda: Wandb(directory, job, ids),
        }
        self._open: dict[str, Destination] = {}
        for name in wanted or ("tensorboard",):
            try:
                self._open[name] = makers[name]()
            except (
                Exception
            ) as error:  # absent, or broken: a protobuf that does not fit raises TypeError
                if wanted:
                    self.close()
                    raise _unable(name, error) from error
        if ids:
            write_json(path, ids)

    def row(self, row: RoundRow) -> None:
        self._each(lambda destination: destination.row(row))

    def close(self) -> None:
        """Flush and close; safe to call twice. While an exception is on its way, the run counts as failed."""
        failed = sys.exception() is not None
        self._each(lambda destination: destination.close(failed=failed))
        self._open.clear()

    def _each(self, do: Callable[[Destination], None]) -> None:
        for name, destination in list(self._open.items()):
            try:
                do(destination)
            except Exception as error:  # noqa: BLE001 - a service may fail in any way; the run goes on
                del self._open[name]
                text = f"track.to: {name} gets no more rows ({_brief(error)}); rounds.jsonl has all of them"
                warnings.warn(text, stacklevel=2)


def _unable(name: str, error: Exception) -> BadInput:
    if isinstance(error, ImportError):
        return BadInput(
            f"track.to: found {name!r}, whose package cannot be imported ({_brief(error)})",
            remedy=f"pip install {name}",
        )
    return BadInput(
        f"track.to: {name} cannot begin a run ({_brief(error)})",
        remedy='its own environment variables say where it is; without it: --to ""',
    )


def _brief(error: Exception) -> str:
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {printable(text, 200)}"
