"""What the commands of a site's operator read from its folder: status, jobs, and the released model.

Invariant: nothing is locked and nothing that the site's process has is changed, so these commands never disturb it.
"""

import os
import time
from collections.abc import Iterator
from pathlib import Path

from fedcore_clients.app import RECIPE_FILE, STATUS_FILE, job_folder, require_job
from fedcore_clients.config import SiteConfig
from fedcore_clients.control import veto
from fedcore_clients.offers import approve_offer
from fedcore_clients.rosters import roster_lines
from fedcore_clients.state_files import StateFiles

from fedcore.cli.console import ago, waiting_text
from fedcore.errors import BadInput, Refused
from fedcore.files import read_json, write_atomic
from fedcore.results import SiteRow
from fedcore.secagg.protocol.schedule import released_round
from fedcore.types import Json, SiteId

STALE_SECONDS = 15.0
"""A process writes its status every second; older than this, it hangs or is gone."""


def read_status(folder: Path) -> Json:
    """The last status, with `running` made true to this moment. Raises BadInput where there is none."""
    path = folder / STATUS_FILE
    if not path.is_file():
        raise BadInput(
            f"status: found no {path}, expected one: this site has not run yet",
            remedy="start it: fed-site run --config site.toml",
        )
    found = read_json(path)
    return found | {"running": _lives(found)}


def read_jobs(folder: Path) -> list[Json]:
    """The jobs of the last status; none where this site's process never ran."""
    return read_status(folder)["jobs"] if (folder / STATUS_FILE).is_file() else []


def runs(folder: Path) -> bool:
    """Whether a process of this site runs on this machine."""
    return (folder / STATUS_FILE).is_file() and bool(read_status(folder)["running"])


def _lives(status: Json) -> bool:
    if not status.get("running") or time.time() - status["written"] > STALE_SECONDS:
        return False
    try:
        os.kill(int(status["process"]), 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # another user's process: it runs
    return True


def export_model(config: SiteConfig, name: str, out: Path) -> Json:
    """Write the last released model of a job, as the file that `fedcore simulate` writes: it predicts on raw rows.

    Only a certified state is exported. The path, the round of training after which it was released, and its hash.
    Raises BadInput, UnknownName, Refused, TaskFailed.
    """
    from fedcore.config import build_job
    from fedcore.learning.data.split import split_from_json
    from fedcore.learning.kept import KeptValues
    from fedcore.learning.model import single_thread
    from fedcore.learning.site import SiteTrainer
    from fedcore.learning.state import JobState
    from fedcore.learning.task import load_task

    known = [path.parent.name for path in job_folder(config.folder, "").glob(f"*/{RECIPE_FILE}")]
    require_job(name, known, "`fed-site jobs` lists the jobs this site was offered")
    folder = job_folder(config.folder, name)
    recipe, files = read_json(folder / RECIPE_FILE), StateFiles(folder, config.file_sealer())
    there = files.current.is_file()
    state = JobState.from_bytes(files.read(files.current)) if there else None
    done = state.done if state else None
    if state is None or done is None or not released_round(done):
        raise BadInput(
            f"job {name}: found no released model at this site, expected one round to be over",
            remedy="`fed-site status` shows how far it is",
        )
    allowed = config.tasks.get(recipe["task"])
    if allowed is None:
        raise Refused(
            f"job {name}: found its task {recipe['task']!r} not in site.toml, expected [tasks.{recipe['task']}]",
            remedy="the architecture comes from the task: allow it again",
        )
    task = load_task(allowed.task, config.base)
    if task.digest() != recipe["task_sha256"]:
        raise Refused(
            f"job {name}: found {allowed.task} changed since it trained, expected sha256 "
            f"{recipe['task_sha256']}",
            remedy="install the version of the task that trained this model; `fed-site check` prints hashes",
        )
    job = build_job(recipe["settings"])
    task = task.with_settings(job.task_settings)
    cap = job.protect.max_examples
    assert cap is not None
    split = split_from_json(config.split.of(config.read_identity()))
    with single_thread():
        site = SiteTrainer.load(task, job, SiteId(config.site), allowed.source, cap, split)
        if (personal := StateFiles(folder).personal).is_file():
            site.kept = KeptValues.from_bytes(personal.read_bytes())
        data = site.exported(state)
    write_atomic(out, data)
    return {"path": str(out), "round": released_round(done), "model_sha256": state.model_sha256}


def status_lines(status: Json) -> Iterator[str]:
    """The status in words."""
    now, name = time.time(), status["site"]
    if not status["running"]:
        yield f"site {name}: not running (last status {ago(now - status['written'])} ago)"
    elif status.get("away") and not status["connected_since"]:
        yield f"site {name}: running, away (process {status['process']})"
    elif status["connected_since"]:
        since = ago(now - status["connected_since"])
        yield f"site {name}: connected to {status['coordinator']} for {since} (process {status['process']})"
    else:
        yield f"site {name}: running, not connected to {status['coordinator']} (process {status['process']})"
    if status.get("away"):
        yield status["away"]
    if status.get("second"):
        yield status["second"]
    if status.get("control_problem"):
        yield f"control: {status['control_problem']}"
    if status.get("policy_problem"):
        yield f"policy: {status['policy_problem']}"
    if status.get("rate"):
        yield f"transfers: {status['rate']}"
    if status["last_error"]:
        yield f"last error: {status['last_error']}"
    if "roster" in status:  # an older process wrote none
        yield from roster_lines(status["roster"])
    if not status["jobs"]:
        yield "no jobs yet"
    for job in status["jobs"]:
        yield from _job_lines(job, now)


def jobs_lines(jobs: list[Json]) -> Iterator[str]:
    """Every job that this site was offered, the oldest first, in words."""
    if not jobs:
        yield "no jobs yet: a running site (fed-site run) is offered them by the coordinator"
    for row in jobs:
        asked = f"task {row['task']}, {row['protection'] or 'no plan fits'}, {row['rounds']} rounds"
        yield f"job {row['job']}: {_where(row)} ({asked})"
        if row["refused"]:
            yield f"  refused: {row['refused']}"
        elif row["label"]:
            yield f"  {row['label'][0]}"


def approve(folder: Path, job: str) -> Json:
    """Approve the offer that this site has under an id; its row of the status, as it was then.

    Raises UnknownName or BadInput for an id that this site was not offered, Refused for a job that is
    over or that the policy refuses, StoreProblem.
    """
    rows = {row["job"]: row for row in read_jobs(folder)}
    require_job(job, rows, "`fed-site jobs` lists the jobs that this site was offered")
    row: Json = rows[job]
    if row["refused"]:
        raise Refused(
            f"job {job}: found it refused by the policy of this site, expected one that waits: "
            f"{row['refused']}",
            remedy="an approval does not widen the policy: change the key in policy.toml, or in site.toml and restart",
        )
    if row["stage"] == "over":
        raise Refused(
            f"job {job}: found it over ({row['outcome']}), expected one that waits",
            remedy="`fed-site jobs` lists the jobs that wait for approval",
        )
    approve_offer(folder, job, row["offer"])
    return row


def under_way(folder: Path) -> list[str]:
    """The jobs of a site that are not over, by its last status; none where its process never ran."""
    return [row["job"] for row in read_jobs(folder) if row["stage"] != "over"]


def veto_job(folder: Path, job: str) -> Json:
    """Say no to a job that this site was offered; its row of the status. Raises as `approve`."""
    rows = {row["job"]: row for row in read_jobs(folder)}
    require_job(job, rows, "`fed-site jobs` lists the jobs that this site was offered")
    row: Json = rows[job]
    if row["stage"] == "over":
        raise Refused(
            f"job {job}: found it over ({row['outcome']}), expected one under way",
            remedy="`fed-site jobs` lists the jobs of this site",
        )
    veto(folder, job)
    return row


def _where(row: Json) -> str:
    if row["stage"] == "over":
        return f"over ({row['outcome']})"
    if row["refused"]:
        return "refused"
    if row["left"]:
        return "left"
    if row["approval"] == "waiting":
        return f"waiting for approval: fed-site approve {row['job']}"
    if row["round"] is not None:
        return f"round {row['round']} of {row['rounds']}, {row['stage']}"
    return str(row["stage"])


def _job_lines(job: Json, now: float) -> Iterator[str]:
    yield f"job {job['job']}: {_where(job)}"
    if job["stage"] != "over":
        yield from about_lines(job)
        if job.get("waiting"):
            yield f"  {waiting_text(job['waiting'], now)}"
    if job["model_sha256"] and job["model_round"]:
        yield f"  last model: after round {job['model_round']}, sha256 {job['model_sha256']}"
    if job.get("tracked"):
        yield from _tracked_lines(SiteRow.from_json(job["tracked"]))
    if job["last_error"]:
        yield f"  last error: {job['last_error']}"


def about_lines(job: Json) -> Iterator[str]:
    """What a job takes: its label, and what leaves the site."""
    yield from (f"  {line}" for line in job["label"])
    yield from (f"  leaves: {line}" for line in job["leaves"])


def _tracked_lines(row: SiteRow) -> Iterator[str]:
    """What the last release is worth: here, against training alone, and over all sites."""
    for name, here in row.here.items():
        words = [f"{name} here {_value(here)}"]
        if row.alone[name] is not None:
            words.append(f"alone {_value(row.alone[name])}, gained {_value(row.gained[name], '+')}")
        before = _value(row.everywhere_before.get(name))
        words.append(f"all {row.sites} sites, a round before: {before}")
        yield f"  {'; '.join(words)}"
    if row.clipped_fraction and row.next_range is not None:
        share, bound = 100 * row.clipped_fraction, row.next_range
        yield f"  {share:.3g} % of all coordinates of round {row.round} clipped; range {bound:g} next"
    if (to := row.reference) is not None:
        yield f"  {to.metric} of {to.source}: {_value(to.value)}; gap {_value(to.gap, '+')}"


def _value(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.3f}"
