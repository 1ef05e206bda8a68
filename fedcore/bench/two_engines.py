"""`fedcore bench flower`: the same Flower apps on Flower's deployment and on ours, one after the other.

Each app runs unmodified on a SuperLink with a SuperNode a site (`flower_engine.py`), and by `fedcore up --flower-app`
under layered protection: a coordinator and a process a site. Both train and evaluate at every site in every round.
A round lasts from the end of the one before: on Flower by the ServerApp's lines, here by the coordinator's
certificates. The first one is apart: it runs from the submission, and what is loaded for it is in it.

Invariant: both engines have the same app, run config, number of sites and rounds. Metrics are those of the last
model, means over the sites weighted by their number of test rows. A run without all sites in every round is refused.
"""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import median

from rich.console import Group, RenderableType
from rich.text import Text

from fedcore.bench import document, progress, require_at_least
from fedcore.bench.flower_engine import (
    process_of,
    program,
    programs,
    run_app,
    search_path,
    superlink,
    watched,
)
from fedcore.errors import Abandoned, BadInput, FedcoreError
from fedcore.learning.task import Task, load_task
from fedcore.learning.task_code import FLOWER
from fedcore.local_deployment import COORDINATOR, error_of
from fedcore.report.terminal import fitted, grid
from fedcore.secagg.protections import MIN_SITES
from fedcore.secagg.purposes import trains
from fedcore.types import Json

ROUNDS_KEY = "num-server-rounds"
"""Key of the run config for the number of rounds, by Flower's convention."""

PROTECTION = "layered"

PROJECT = "pyproject.toml"


def run(apps: Sequence[Path], rounds: int = 3, sites: int = 4) -> Json:
    """Run each app on both engines. rounds: for apps that declare ROUNDS_KEY; others run as many as they want.

    Returns the JSON of kind bench-flower. Raises BadInput, TaskFailed where an app fails, and Abandoned.
    """
    require_at_least("--rounds", rounds, 2, ": the first is not timed")
    require_at_least("--sites", sites, MIN_SITES)
    tasks = [(folder.resolve(), _task(folder, rounds, sites)) for folder in apps]
    programs()
    place = Path(tempfile.mkdtemp(prefix="fedcore-bench-flower-"))
    try:
        rows = [_row(app, task, sites, place / str(n)) for n, (app, task) in enumerate(tasks)]
    except FedcoreError:
        raise  # which names a log
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    shutil.rmtree(place, ignore_errors=True)
    return document(
        "flower", flwr=version("flwr"), sites=sites, protection=PROTECTION,
        tls={"flower": False, "fedcore": True}, rows=rows,
    )  # fmt: skip


def _task(folder: Path, rounds: int, sites: int) -> Task:
    """An app under the run config of this benchmark. Raises BadInput and TaskFailed, before anything is started."""
    if not (folder / PROJECT).is_file():
        raise BadInput(
            f"{folder}: found no {PROJECT} in it, expected the folder of a Flower app",
            remedy="the repository has some: docs/examples/flower-digits",
        )
    task = load_task(f"{FLOWER}{folder.resolve()}")
    assert task.app is not None
    if ROUNDS_KEY in task.settings:
        task = task.app.with_settings({ROUNDS_KEY: rounds})
    require_at_least(
        f"{folder}: its number of rounds", _rounds(task), 2, ": the first is not timed"
    )
    assert callable(task.sites)
    task.sites(sites)
    return task


def _rounds(task: Task) -> int:
    found = task.defaults["rounds"]
    assert isinstance(found, int)
    return found


def _row(app: Path, task: Task, sites: int, place: Path) -> Json:
    rounds, name = _rounds(task), task.name
    config = f"{ROUNDS_KEY}={rounds}" if ROUNDS_KEY in task.settings else ""
    flower = _on_flower(app, name, sites, rounds, config, place / "flower")
    ours = _here(app, name, sites, rounds, config, place / "fedcore")
    metrics = {
        each: {"flower": value, "fedcore": here, "difference": here - value}
        for each, value in flower.pop("metrics").items()
        if (here := ours["metrics"].get(each, ours["metrics"].get(f"eval_{each}"))) is not None
    }
    del ours["metrics"]
    return {
        "app": name,
        "rounds": rounds,
        "test_rows": ours.pop("test_rows"),
        "flower": flower,
        "fedcore": ours,
        "factor": round(flower["seconds_per_round"] / ours["seconds_per_round"], 1),
        "metrics": metrics,
    }


def _times(began: float, ends: Sequence[float]) -> Json:
    """load: the mean number of processes that wanted a core in the last minute, at the end."""
    later = [after - before for before, after in pairwise(ends)]
    return {
        "seconds_to_first_end": round(ends[0] - began, 3),
        "seconds_of_later_rounds": [round(each, 4) for each in later],
        "seconds_per_round": round(median(later), 4),
        "load": round(os.getloadavg()[0], 2),
    }


def _on_flower(app: Path, name: str, sites: int, rounds: int, config: str, folder: Path) -> Json:
    progress(f"{name} on Flower: a SuperLink and {sites} SuperNodes")
    with superlink(folder, sites) as link:
        log, began = run_app(link, app, name, sites, config)
    if len(log.ended) != rounds:
        raise Abandoned(
            f"{name} on Flower: found {len(log.ended)} rounds, expected {rounds}",
            remedy=f"the logs: {folder}",
        )
    evaluates = all("evaluate" in phases for phases in log.phases.values())
    times = _times(began, [log.ended[number] for number in sorted(log.ended)])
    return {
        **times,
        "seconds_by_its_own_clock": log.total,
        "evaluates": evaluates,
        "metrics": log.metrics.get(rounds, {}),
    }


def _here(app: Path, name: str, sites: int, rounds: int, config: str, folder: Path) -> Json:
    """`fedcore up` of the app. Raises its error, and Abandoned where a round was not one of all sites."""
    folder.mkdir(parents=True)
    out, log = folder / "run", folder / "up.log"
    line = [program("fedcore", search_path()), "up", "--flower-app", str(app)]
    line += ["--sites", str(sites), "--protection", PROTECTION, "--out", str(out)]
    line += ["--set", "track.arms=federated"]  # Flower trains no other arm beside it
    line += ["-c", config] if config else []
    jobs, submitted = out / "deployment" / COORDINATOR / "state" / "jobs", 0.0

    def rows() -> Path | None:
        nonlocal submitted
        for job in jobs.glob("*") if jobs.is_dir() else ():
            submitted = submitted or time.monotonic()
            if (found := job / "rounds.jsonl").is_file():
                return found
        return None

    progress(f"{name} on Fedcore: fedcore up")
    ends: list[float] = []
    with process_of(line, log) as process:
        for when, text in watched(process, rows, 0.005, lambda: f"{name} on Fedcore"):
            row = json.loads(text)
            if trains(row["purpose"]):
                if "abandoned" in row or len(row["survivors"]) != sites:
                    raise Abandoned(
                        f"{name}: found a round without all sites: {text}", remedy=f"its log: {log}"
                    )
                progress(f"{name} on Fedcore: round {row['round']}, {row['seconds']:.2f} s")
                ends.append(when)
    if process.returncode != 0:
        raise error_of(
            f"fedcore up --flower-app {app}", process.returncode, log.read_text(errors="replace")
        )
    if len(ends) != rounds:
        raise BadInput(
            f"{name} on Fedcore: found {len(ends)} rounds, expected {rounds}",
            remedy=f"its log: {log}",
        )
    result = json.loads((out / "result.json").read_text())
    return {
        **_times(submitted, ends),
        "metrics": result["protected_metrics"],
        "test_rows": sum(site["test_rows"] for site in result["per_site"].values()),
    }


def page(found: Json) -> RenderableType:
    """The output of `fedcore bench flower` for a terminal."""
    seconds = grid(
        "app", "rounds", "start, Flower", "Fedcore", "s a round, Flower", "Fedcore", "factor"
    )
    metrics = grid("app", "metric", "Flower", "Fedcore", "difference", "test rows")
    for row in found["rows"]:
        flower, ours = row["flower"], row["fedcore"]
        seconds.add_row(
            row["app"], str(row["rounds"]), f"{flower['seconds_to_first_end']:.1f}",
            f"{ours['seconds_to_first_end']:.1f}", f"{flower['seconds_per_round']:.2f}",
            f"{ours['seconds_per_round']:.3f}", f"{row['factor']:.0f}",
        )  # fmt: skip
        for name, each in row["metrics"].items():
            metrics.add_row(
                row["app"], name, f"{each['flower']:.4f}", f"{each['fedcore']:.4f}",
                f"{round(each['difference'], 4) + 0.0:+.4f}", f"{row['test_rows']:,}",
            )  # fmt: skip
    return Group(fitted(seconds), Text(), fitted(metrics), Text(), *map(Text, _notes(found)))


def _notes(found: Json) -> list[str]:
    about, rows = found["environment"], found["rows"]
    notes = [
        f"flwr {found['flwr']}, fedcore {about['fedcore']}, Python {about['python']}, {about['cores']} cores, "
        f"load {min(_loads(rows)):.1f} to {max(_loads(rows)):.1f}; {found['sites']} sites, a process each, loopback",
        f"Flower's deployment without TLS (--insecure) and without secure aggregation; Fedcore's with mutual TLS, "
        f"journals, and {found['protection']} protection",
        "a round: train and evaluate at every site, median of those after the first; start: from the "
        "submission to the end of round 1",
    ]
    if silent := [row["app"] for row in rows if not row["flower"]["evaluates"]]:
        notes.append(
            f"{', '.join(silent)}: no evaluation on Flower, as its strategy says; Fedcore's rounds evaluate"
        )
    return notes


def _loads(rows: Sequence[Mapping[str, Json]]) -> list[float]:
    return [row[engine]["load"] for row in rows for engine in ("flower", "fedcore")]
