"""`fedcore bench engine`: the cost of a round of a deployed federation without training.

A coordinator and the sites as processes on loopback, with mutual TLS, journals and spools on disk, and
every message, key, mask and ciphertext of the protection; the sites send an update drawn once. Seconds
of a round are measured by the coordinator, from its announcement to the certificate.

Invariant: the first round of training (which allocates buffers) and rounds without training are not timed.
Abandoned rounds are counted and not timed. The peak memory is that of whole processes. CPU seconds are the
cost for each side, independent of the load of the machine.

With `--wan` every site has an emulated link (`fedcore/bench/wan.py`), and the same rounds run on loopback before: what
the links add to them beside the transfer is given in round trips.
"""

import json
import os
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from fedcore.bench import document, progress, protection_of, require_at_least, table_page
from fedcore.bench.wan import Links, LinkSpeed, links, require_namespaces
from fedcore.config import build_job, narrowest_policy
from fedcore.errors import Abandoned, BadInput
from fedcore.experiment.environment import peak_memory_of
from fedcore.learning.task import Task
from fedcore.local_deployment import (
    COORDINATOR,
    GATHER_SECONDS,
    Deployment,
    Running,
    running,
    write,
)
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


MOST_OF_A_LINK = 10_000.0
"""Of the milliseconds and of the Mbit/s of an emulated link."""

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
    wan: bool = False,
    delay: float = 150.0,
    mbit: float = 20.0,
) -> Json:
    """Run the rounds and time them. per_process: sites that share one process. wan: over emulated links; delay: their
    milliseconds there and back; mbit: their 10^6 bits a second in each direction.

    Returns the JSON of kind bench-engine. Raises BadInput, PlanRefused, and Abandoned if no round was
    released.
    """
    _check(sites, rounds, protection, per_process)
    asked = _Setup(sites, parameters, rounds, protection, cipher, bits, per_process)
    if not wan:
        return _measured(asked, None)
    _check_links(per_process, delay, mbit)
    require_namespaces()
    near = _measured(asked, None)
    if near["seconds_between_certificates"] is None:
        raise Abandoned(
            f"bench: found the {rounds} rounds on loopback over before the second was seen",
            remedy="a larger --rounds",
        )
    names = [SiteId(f"site-{number:03d}") for number in range(sites)]
    with links(names, LinkSpeed(delay, mbit)) as found:
        return _measured(asked, found) | {"loopback": _of_loopback(near)}


@dataclass(frozen=True)
class _Setup:
    """What is measured: the arguments of `run`."""

    sites: int
    parameters: int
    rounds: int
    protection: str
    cipher: str
    bits: int
    per_process: int


def _measured(asked: _Setup, far: Links | None) -> Json:
    """Run the rounds, on loopback or over these links."""
    sites, rounds, protection, cipher = asked.sites, asked.rounds, asked.protection, asked.cipher
    names = [SiteId(f"site-{number:03d}") for number in range(sites)]
    task = {"task": "fedcore.bench.engine:STAND_IN", "sha256": STAND_IN.digest()}
    with tempfile.TemporaryDirectory(prefix="fedcore-bench-") as place:
        # With a stated range and no columns every round but the last carries an update.
        job = build_job({
            "protection": protection, "cipher": cipher, "rounds": rounds, "bits": asked.bits, "range": 0.5,
            "adaptive_range": False, "max_examples": 16, "resamples": 0,
        })  # fmt: skip
        deployment = write(
            Path(place),
            "bench",
            {name: {STAND_IN.name: task} for name in names},
            {k: v for k, v in job.to_json().items() if k != "base"} | {"task": task["task"]},
            policy=narrowest_policy(job, sites),
            limits={"gather_seconds": GATHER_SECONDS},
            address=None if far is None else far.address,
        )
        commands = _commands(deployment, asked.parameters, asked.per_process)
        if far is not None:
            commands |= {name: far.command(name, commands[name]) for name in names}
        where = "loopback" if far is None else f"{far.line.delay_ms:g} ms, {far.line.mbit:g} Mbit/s"
        with running(deployment, commands) as parties:
            progress(
                f"bench engine: {sites} sites, {asked.parameters:,} parameters, {rounds} rounds, {where}"
            )
            name = str(parties.ask("submit", str(deployment.job))["job"])
            rows, cycle = _watch(parties, name, rounds, far)
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
    found = document(
        "engine", sites=sites, parameters=asked.parameters, rounds=rounds, timed_rounds=len(timed),
        abandoned_rounds=sum("abandoned" in row for row in rows),
        least_survivors=min(len(row["survivors"]) for row in timed), protection=protection,
        cipher=cipher if Protection.of(protection).encrypts else None, bits=asked.bits,
        sites_per_process=asked.per_process,
        seconds_per_round={"median": round(median(taken), 4), "p95": p95},
        seconds_between_certificates=cycle.seconds,
        seconds_of_cycle={"median": cycle.median, "least": cycle.least}, seconds_by_stage=stages,
        cpu_seconds_per_round=cycle.cpu, bytes_up_per_site=timed[-1].get("bytes_up"),
        bytes_down_per_site=timed[-1].get("bytes_down"), rss_mb=memory, commit_ms=commit,
    )  # fmt: skip
    if far is not None:
        found["wan"] = far.about() | {"bytes_per_round": cycle.carried}
    return found


def _of_loopback(near: Json) -> Json:
    """What a benchmark over links keeps of the same rounds on loopback."""
    kept = "seconds_per_round", "seconds_of_cycle", "seconds_by_stage"
    return {name: near[name] for name in kept}


def _check_links(per_process: int, delay: float, mbit: float) -> None:
    if per_process != 1:
        raise BadInput(
            f"--per-process: found {per_process}, expected 1 with --wan: every site has a link of its own"
        )
    for flag, value, least in (("--delay", delay, 1.0), ("--mbit", mbit, 0.1)):
        if not least <= value <= MOST_OF_A_LINK:
            raise BadInput(
                f"{flag}: found {value:g}, expected {least:g} to {MOST_OF_A_LINK:g}",
                remedy="--delay is in milliseconds there and back, --mbit in 10^6 bits a second",
            )


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


@dataclass(frozen=True)
class _Cycle:
    """From one certificate to the next; None of fewer than two rounds. seconds, cpu: means, of each side; median and
    least are of seconds; carried: mean bytes of the busiest link, both directions."""

    seconds: float | None = None
    median: float | None = None
    least: float | None = None
    cpu: dict[str, float] | None = None
    carried: int | None = None


@dataclass(frozen=True)
class _End:
    """What was used and carried when a round was seen to end. rounds: of updates that had ended by then."""

    rounds: int
    at: float
    cpu: dict[str, float]
    carried: dict[SiteId, int]


def _watch(parties: Running, job: str, rounds: int, far: Links | None) -> tuple[list[Json], _Cycle]:
    """Wait for the last round; returns its rows, and the means from one certificate to the next.

    Reads the coordinator's own file, so that no `watch` process uses the machine. A row is written with its
    certificate, so the time of the file is that of its last row, to the millisecond.
    """
    path = parties.deployment.state(COORDINATOR) / "jobs" / job / "rounds.jsonl"
    rows: list[Json] = []
    ends: list[_End] = []
    heard, read = time.monotonic(), 0
    while not rows or trains(rows[-1]["purpose"]):
        parties.check()
        time.sleep(0.01)
        text, written = _rest(path, read)
        found = [json.loads(line) for line in text.splitlines()]
        if not found:
            if time.monotonic() - heard > STALLED_SECONDS:
                raise Abandoned(f"bench: found no round for {STALLED_SECONDS:.0f} s")
            continue
        heard, read = time.monotonic(), read + len(text)
        for row in found:
            if trains(row["purpose"]) and row["round"] % max(1, rounds // 5) == 0:
                progress(f"round {row['round']}/{rounds}  {row['seconds']:.3f} s")
        rows += found
        if any(trains(row["purpose"]) for row in found):  # rows that are read at once are one end
            done = sum(trains(row["purpose"]) for row in rows)
            bytes_so_far = {} if far is None else far.carried()
            ends.append(_End(done, written, _cpu(parties), bytes_so_far))
    if len(ends) < 2:
        return rows, _Cycle()
    first, last, steps = ends[0], ends[-1], ends[-1].rounds - ends[0].rounds
    cpu = {who: round((last.cpu[who] - first.cpu[who]) / steps, 4) for who in first.cpu}
    carried = [round((last.carried[site] - first.carried[site]) / steps) for site in first.carried]
    taken = [(b.at - a.at) / (b.rounds - a.rounds) for a, b in pairwise(ends)]
    return rows, _Cycle(
        round((last.at - first.at) / steps, 4), round(median(taken), 4), round(min(taken), 4), cpu,
        max(carried, default=None),
    )  # fmt: skip


def _rest(path: Path, read: int) -> tuple[bytes, float]:
    """The whole lines behind the first so many bytes of a file, and when it was last written, in seconds; nothing of a
    file that is not there yet."""
    if not path.is_file():
        return b"", 0.0
    with path.open("rb") as file:
        written = os.fstat(file.fileno()).st_mtime_ns / 1e9
        file.seek(read)
        text = file.read()
    return text[: text.rfind(b"\n") + 1], written


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
        "sites", "parameters", "median, s", "p95, s", "cycle, s", "coordinator, MB", "site, MB", "commit, ms",
    )  # fmt: skip
    seconds, memory = found["seconds_per_round"], found["rss_mb"]
    cycle = found["seconds_of_cycle"]["median"]
    row = (
        found["sites"], f"{found['parameters']:,}", f"{seconds['median']:.3f}", f"{seconds['p95']:.3f}",
        "-" if cycle is None else f"{cycle:.3f}", memory["coordinator"], memory["site"], f"{found['commit_ms']:.2f}",
    )  # fmt: skip
    stages = ", ".join(f"{name} {value:.3f}" for name, value in found["seconds_by_stage"].items())
    note = (
        f"{found['timed_rounds']} rounds under {protection_of(found)} at {found['bits']} bits, separate "
        "processes, mutual TLS, training excluded; a round is from its announcement to its certificate, a cycle from "
        f"one certificate to the next, at the median; seconds by stage: {stages}"
    )
    cpu = found["cpu_seconds_per_round"]
    if cpu is not None:
        one = 1000 * cpu["sites"] / found["sites"]
        note += (
            f"; CPU a cycle, ms: coordinator {1000 * cpu['coordinator']:.1f}, its fold workers "
            f"{1000 * cpu['fold_workers']:.1f}, one site {one:.1f}"
        )
    shown = table_page(head, [row], note)
    return shown if "wan" not in found else Group(_page_of_links(found), Text(), shown)


def _page_of_links(found: Json) -> RenderableType:
    """The rounds over links: from one certificate to the next, compared with the transfer and with loopback."""
    wan = found["wan"]
    transfer = wan["bytes_per_round"] * 8 / (wan["mbit"] * 1e6)
    rows = []
    for which in ("median", "least"):
        cycle, near = found["seconds_of_cycle"][which], found["loopback"]["seconds_of_cycle"][which]
        trips = (cycle - near - transfer) / (wan["delay_ms"] / 1000)
        rows.append((
            which, f"{cycle:.3f}", f"{near:.3f}", f"{transfer:.3f}", f"{cycle / transfer:.2f}", f"{trips:.1f}",
            f"{wan['bytes_per_round'] / 1000:,.0f}",
        ))  # fmt: skip
    head = (
        "", "s a round", "on loopback, s", "transfer, s", "ratio", "round trips", "KB a site",
    )  # fmt: skip
    note = (
        f"each site has a link of {wan['delay_ms']:g} ms there and back and {wan['mbit']:g} Mbit/s each way, made by "
        f"{wan['emulator']}, TCP with {wan['congestion_control']}; a round is from one certificate to the next; "
        "transfer: what the busiest link carried, one direction after the other at its rate; round trips: what is "
        "left of a round without transfer and without its time on loopback, over the delay"
    )
    return table_page(head, rows, note)
