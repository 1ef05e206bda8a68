"""`fedcore bench engine`: the cost of a round of a deployed federation without training.

A coordinator and the sites as processes on loopback, with mutual TLS, journals and spools on disk, and
every message, key, mask and ciphertext of the protection; the sites send an update drawn once. Seconds
of a round are measured by the coordinator, from its announcement to the certificate.

Invariant: the first round of training (which allocates buffers) and rounds without training are not timed.
Abandoned rounds are counted and not timed. The peak memory is that of whole processes. CPU seconds are the
cost for each side, independent of the load of the machine.
"""

import json
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import RenderableType

from fedcore.bench import document, progress, protection_of, require_at_least, table_page
from fedcore.config import build_job, narrowest_policy
from fedcore.errors import Abandoned, BadInput
from fedcore.experiment.environment import peak_memory_of
from fedcore.learning.task import Task
from fedcore.local_deployment import COORDINATOR, Deployment, Running, running, write
from fedcore.secagg.protections import MAX_MASKED_SITES, MIN_SITES, Protection, refuse_unknown
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.secagg.purposes import trains
from fedcore.store.journal import Journal
from fedcore.types import Json, SiteId

COMMITS = 50

STALLED_SECONDS = 600.0
"""Timeout without a round: after it the coordinator has given up on a stage."""


def _nothing(*_: Any) -> Any:
    """Data, model and loss of a task that is never trained."""


STAND_IN = Task(name="bench", data=_nothing, model=_nothing, loss=_nothing)
"""The task of the job; the sites of this benchmark never load it."""


def run(
    sites: int = 4,
    parameters: int = 10,
    rounds: int = 50,
    protection: str = "layered",
    cipher: str = "bfv",
    bits: int = 16,
    per_process: int = 1,
) -> Json:
    """Run the rounds and time them. per_process: sites that share one process.

    Returns the JSON of kind bench-engine. Raises BadInput, PlanRefused, and Abandoned if no round was
    released.
    """
    _check(sites, rounds, protection, per_process)
    names = [SiteId(f"site-{number:03d}") for number in range(sites)]
    task = {"task": "fedcore.bench.engine:STAND_IN", "sha256": STAND_IN.digest()}
    with tempfile.TemporaryDirectory(prefix="fedcore-bench-") as place:
        # With a stated range and no columns every round but the last carries an update.
        job = build_job({
            "protection": protection, "cipher": cipher, "rounds": rounds, "bits": bits, "range": 0.5,
            "adaptive_range": False, "max_examples": 16, "resamples": 0,
        })  # fmt: skip
        deployment = write(
            Path(place),
            "bench",
            {name: {STAND_IN.name: task} for name in names},
            {k: v for k, v in job.to_json().items() if k != "base"} | {"task": task["task"]},
            policy=narrowest_policy(job, sites),
        )
        with running(deployment, _commands(deployment, parameters, per_process)) as parties:
            progress(f"bench engine: {sites} sites, {parameters:,} parameters, {rounds} rounds")
            name = str(parties.ask("submit", str(deployment.job))["job"])
            rows, wall, cpu = _watch(parties, name, rounds)
            memory = _memory(parties)
        commit = _commit_ms(Path(place) / "commits")
    timed = [r for r in rows if trains(r["purpose"]) and "abandoned" not in r][1:]
    if not timed:
        raise Abandoned(f"bench: found no released round after the first of {rounds}")
    taken = sorted(row["seconds"] for row in timed)
    p95 = round(taken[-(-95 * len(taken) // 100) - 1], 4)
    stages = {
        name: round(median(row["seconds_by_stage"].get(name, 0.0) for row in timed), 5)
        for name in timed[-1]["seconds_by_stage"]
    }
    return document(
        "engine", sites=sites, parameters=parameters, rounds=rounds, timed_rounds=len(timed),
        abandoned_rounds=sum("abandoned" in row for row in rows),
        least_survivors=min(len(row["survivors"]) for row in timed), protection=protection,
        cipher=cipher if Protection.of(protection).encrypts else None, bits=bits,
        sites_per_process=per_process, seconds_per_round={"median": round(median(taken), 4), "p95": p95},
        seconds_between_certificates=wall, seconds_by_stage=stages,
        cpu_seconds_per_round=cpu, bytes_up_per_site=timed[-1].get("bytes_up"),
        bytes_down_per_site=timed[-1].get("bytes_down"), rss_mb=memory, commit_ms=commit,
    )  # fmt: skip


def _check(sites: int, rounds: int, protection: str, per_process: int) -> None:
    require_at_least("--sites", sites, MIN_SITES)
    refuse_unknown(protection)
    layers = Protection.of(protection)
    if layers.masks and sites > MAX_MASKED_SITES:
        raise BadInput(
            f"--sites: found {sites}, expected at most {MAX_MASKED_SITES} under {protection!r}",
            remedy="--protection encrypted has no such limit",
        )
    if not layers.protects:
        raise BadInput(f"--protection: found {protection!r}, expected layered, masked or encrypted")
    require_at_least("--rounds", rounds, 2, ": the first is not timed")
    require_at_least("--per-process", per_process, 1)


def _commands(deployment: Deployment, parameters: int, per_process: int) -> dict[str, list[str]]:
    coordinator, *sites = deployment.commands().items()
    found = dict([coordinator])
    for group in (sites[i : i + per_process] for i in range(0, len(sites), per_process)):
        name, (python, unlisted, module, *_) = group[0]
        words = [word for _, line in group for word in line[-2:]]
        found[name] = [
            python, unlisted, module, "fedcore_clients.bench_sites", *words, "--parameters", str(parameters),
        ]  # fmt: skip
    return found


def _watch(
    parties: Running, job: str, rounds: int
) -> tuple[list[Json], float | None, dict[str, float] | None]:
    """Wait for the last round; returns its rows, and the mean time and CPU from one certificate to the next.

    Reads the coordinator's own file, so that no `watch` process uses the machine.
    """
    path = parties.deployment.state(COORDINATOR) / "jobs" / job / "rounds.jsonl"
    rows: list[Json] = []
    ends: list[float] = []
    used: list[dict[str, float]] = []
    heard = time.monotonic()
    while not rows or trains(rows[-1]["purpose"]):
        parties.check()
        time.sleep(0.02)
        text = path.read_text() if path.is_file() else ""
        found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        if len(found) == len(rows):
            if time.monotonic() - heard > STALLED_SECONDS:
                raise Abandoned(f"bench: found no round for {STALLED_SECONDS:.0f} s")
            continue
        heard = time.monotonic()
        for row in found[len(rows) :]:
            if trains(row["purpose"]):
                ends.append(heard)
                used.append(_cpu(parties))
                if len(ends) % max(1, rounds // 5) == 0:
                    progress(f"round {row['round']}/{rounds}  {row['seconds']:.3f} s")
        rows = found
    if len(ends) < 2:
        return rows, None, None
    steps = len(ends) - 1
    cpu = {who: round((used[-1][who] - used[0][who]) / steps, 4) for who in used[0]}
    return rows, round((ends[-1] - ends[0]) / steps, 4), cpu


def _cpu(parties: Running) -> dict[str, float]:
    """CPU seconds used so far by the coordinator, its fold workers, and all processes of sites."""
    coordinator, *sites = [each.pid for each in parties.processes.values()]
    return {
        "coordinator": _cpu_seconds(coordinator),
        "fold_workers": sum(map(_cpu_seconds, children_of(coordinator))),
        "sites": sum(map(_cpu_seconds, sites)),
    }


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process in seconds; 0 if the system does not report it."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0.0
    user, system = text.rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _memory(parties: Running) -> dict[str, float | None]:
    """Peak resident MB of the coordinator, of its fold workers together, and of the largest site."""
    coordinator, *sites = [each.pid for each in parties.processes.values()]
    site = [peak for pid in sites if (peak := peak_memory_of(pid)) is not None]
    children = map(peak_memory_of, children_of(coordinator))
    workers = [peak for peak in children if peak is not None]
    return {
        "coordinator": peak_memory_of(coordinator),
        "fold_workers": round(sum(workers), 1) if workers else None,
        "site": max(site, default=None),
    }


def children_of(pid: int) -> list[int]:
    """The processes that a process has started and not ended; none where the system does not report them."""
    found: list[int] = []
    for thread in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            found += map(int, thread.read_text().split())
    return found


def _commit_ms(folder: Path) -> float:
    """Median of one journal commit of one record, on the same file system."""
    taken = []
    with Journal.open(folder / "journal.sqlite", party="bench") as journal:
        for number in range(COMMITS):
            start = time.perf_counter()
            journal.append("bench", "round", [PlannedRound("update", number)])
            taken.append(time.perf_counter() - start)
    return round(1000 * median(taken), 3)


def page(found: Json) -> RenderableType:
    """The output of `fedcore bench engine` for a terminal."""
    head = (
        "sites", "parameters", "median, s", "p95, s", "coordinator, MB", "site, MB", "commit, ms",
    )  # fmt: skip
    seconds, memory = found["seconds_per_round"], found["rss_mb"]
    row = (
        found["sites"], f"{found['parameters']:,}", f"{seconds['median']:.3f}", f"{seconds['p95']:.3f}",
        memory["coordinator"], memory["site"], f"{found['commit_ms']:.2f}",
    )  # fmt: skip
    stages = ", ".join(f"{name} {value:.3f}" for name, value in found["seconds_by_stage"].items())
    note = (
        f"{found['timed_rounds']} rounds under {protection_of(found)} at {found['bits']} bits, separate "
        f"processes, mutual TLS, training excluded; seconds by stage: {stages}"
    )
    cpu = found["cpu_seconds_per_round"]
    if cpu is not None:
        note += (
            f"; CPU seconds a round: coordinator {cpu['coordinator']:.2f}, its fold workers "
            f"{cpu['fold_workers']:.2f}, all sites {cpu['sites']:.2f}"
        )
    return table_page(head, [row], note)
