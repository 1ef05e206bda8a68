"""`fedcore bench simulate`: rounds of simulated federations here and with pfl-research, side by side.

Every engine is a process of its own (`scripts/bench/simulate_engines/`) with its own environment
(`scripts/bench/simulate-peers DIR`), and does nothing until it is asked for a round. A round is one of each engine in
turn, so that all see the same load of the machine; the order turns from round to round.

Invariant: all engines have the same clients, initial model, cohorts and order of rows, and no time is reported unless
the model of each is that of a plain loop of torch (`plain_rounds.py`) after the first rounds, which are not timed.
"""

import json
import math
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
from rich.console import RenderableType

from fedcore.bench import document, progress, require_at_least, table_page
from fedcore.bench.engine import children_of
from fedcore.errors import Abandoned, BadInput, UnknownName
from fedcore.local_deployment import stop, terminable
from fedcore.types import Json

ENGINES = Path(__file__).resolve().parents[2] / "scripts/bench/simulate_engines"

CHECKED = 2
"""DrivenEngine before the models are compared; they also warm the engines up and are not timed."""

RELATIVE, ABSOLUTE = 1e-4, 5e-6
"""Of the comparison of models. Fedcore rounds an update to 24 bits, and convolutions round in another order where
clients are stacked; a client or a row too many changes some 1e-3 of a parameter."""

SILENT_SECONDS = 300.0
"""The longest an engine takes for its start or for a round; then the benchmark is given up."""

CLIENTS, COHORT = 1000, 100

WORKLOADS = ("logreg", "mlp", "cnn")

_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Compared:
    """How one engine is started. script: of `ENGINES`; peer: its environment, None for this interpreter; processes:
    that train."""

    name: str
    script: str
    peer: str | None = None
    processes: int = 1
    options: Mapping[str, Any] = field(default_factory=dict)


def _fedcore(executor: str, processes: int) -> Compared:
    name = f"{executor}" + (f"-{processes}" if processes > 1 else "")
    return Compared(name, "fedcore_rounds.py", None, processes, {"executor": executor})


COMPARED = (
    _fedcore("batched", 1),
    _fedcore("batched", 2),
    _fedcore("sequential", 1),
    _fedcore("sequential", 2),
    Compared("pfl", "pfl_rounds.py", "pfl"),
)

_REFERENCE = Compared("plain", "plain_rounds.py")


def run(
    workloads: str, peers: Path | None = None, rounds: int = 9, seed: int = 0, engines: str = ""
) -> Json:
    """The JSON of kind bench-simulate. peers: the folder of `simulate-peers`; engines: names, comma-separated; "" for
    all. Raises BadInput, Abandoned where an engine fails or has another model, and UnknownName."""
    require_at_least("--rounds", rounds, 1)
    if not ENGINES.is_dir():
        raise BadInput(
            f"bench simulate: found no {ENGINES}, expected a checkout of the repository",
            remedy="git clone it, and scripts/setup",
        )
    chosen, left_out = _chosen(engines, peers)
    rows: list[Json] = []
    for workload in _listed("--workloads", workloads, WORKLOADS):
        rows += _measured(workload, chosen, rounds, seed)
    versions = {name: value for row in rows for name, value in row.pop("versions").items()}
    return document(
        "simulate", clients=CLIENTS, cohort=COHORT, rounds=rounds, seed=seed, checked_rounds=CHECKED,
        tolerance={"relative": RELATIVE, "absolute": ABSOLUTE}, versions=versions, left_out=left_out, rows=rows,
    )  # fmt: skip


def _listed(flag: str, text: str, known: Sequence[str]) -> list[str]:
    found = [part.strip() for part in text.split(",")]
    for each in found:
        if each not in known:
            raise UnknownName(flag, each, known)
    return found


def _chosen(engines: str, peers: Path | None) -> tuple[list[Compared], dict[str, str]]:
    """The engines that can be measured, and {engine: why it is left out}."""
    known = {each.name: each for each in COMPARED}
    names = _listed("--engines", engines, list(known)) if engines else list(known)
    chosen, left_out = [], {}
    for engine in (known[name] for name in names):
        if why := _missing(engine, peers):
            left_out[engine.name] = why
            progress(f"{engine.name} is left out: {why}")
        else:
            chosen.append(_placed(engine, peers))
    if not chosen:
        raise BadInput("--engines: found none that can be measured, expected at least one")
    return chosen, left_out


def _missing(engine: Compared, peers: Path | None) -> str:
    if engine.peer is None:
        return ""
    if peers is None:
        return "no --peers DIR (scripts/bench/simulate-peers DIR makes it)"
    if not (peers / engine.peer / "installed").is_file():
        return f"no environment {peers / engine.peer} (scripts/bench/simulate-peers {peers})"
    return ""


def _placed(engine: Compared, peers: Path | None) -> Compared:
    """With the interpreter of its environment."""
    interpreter = sys.executable
    if engine.peer is not None:
        assert peers is not None
        interpreter = str(peers.resolve() / engine.peer / "bin/python")
    return Compared(
        engine.name, engine.script, engine.peer, engine.processes,
        {**engine.options, "processes": engine.processes, "interpreter": interpreter, "clients": CLIENTS},
    )  # fmt: skip


class DrivenEngine(Protocol):
    """What is measured of an engine."""

    name: str
    facts: Json

    def round(self) -> tuple[float, float]: ...
    def model(self) -> np.ndarray[Any, Any]: ...


def _measured(workload: str, engines: Sequence[Compared], rounds: int, seed: int) -> list[Json]:
    with ExitStack() as opened, tempfile.TemporaryDirectory(prefix="fedcore-bench-") as place:
        folder, total = Path(place), CHECKED + rounds + 1

        def start(engine: Compared, *, writes: bool = False) -> EngineProcess:
            given = {"workload": workload, "seed": seed, "rounds": total, "folder": str(folder)}
            options = {**engine.options, "writes_schedule": writes}
            return opened.enter_context(_running(engine, given | {"options": options}, folder))

        # Cohorts and orders follow from the seed of a run of Fedcore's, which writes them for the others.
        ours = engines[0].peer is None
        writer = start(
            engines[0] if ours else _placed(_fedcore("sequential", 1), None), writes=True
        )
        progress(f"{workload}: the reference")
        reference = start(_placed(_REFERENCE, None))
        for _ in range(CHECKED):
            reference.round()
        expected = reference.model()
        reference.end()
        if not ours:
            writer.end()
        running = [writer] * ours
        for engine in engines[ours:]:
            progress(f"{workload}: starting {engine.name}")
            running.append(start(engine))
        differences = checked(running, expected, workload)
        seconds, cpu = timed(running, rounds)
        return [
            {
                "workload": workload, "engine": each.name, "processes": engine.processes,
                "parameters": each.facts["parameters"], "ms": round(1000 * median(seconds[each.name]), 2),
                "cpu_ms": round(1000 * median(cpu[each.name]), 2),
                "all_ms": [round(1000 * found, 2) for found in seconds[each.name]],
                "difference": float(f"{differences[each.name]:.2g}"), "about": each.facts["about"],
                "versions": each.facts["versions"],
            }
            for engine, each in zip(engines, running, strict=True)
        ]  # fmt: skip


def checked(
    running: Sequence[DrivenEngine], expected: np.ndarray[Any, Any], workload: str
) -> dict[str, float]:
    """{engine: the largest difference of a parameter} after CHECKED rounds. Raises Abandoned for another model."""
    found = {}
    for each in running:
        for _ in range(CHECKED):
            each.round()
        model = each.model()
        apart = float(np.abs(model - expected).max()) if model.shape == expected.shape else math.inf
        found[each.name] = apart
        close = math.isfinite(apart) and np.allclose(model, expected, rtol=RELATIVE, atol=ABSOLUTE)
        if not close:
            raise Abandoned(
                f"{workload}, {each.name}: found a model that differs by {apart:.2g} from that of a plain loop after "
                f"{CHECKED} rounds, expected at most {ABSOLUTE:g} and {RELATIVE:g} of each parameter"
            )
        progress(f"{workload}, {each.name}: the same model up to {apart:.1g}")
    return found


def timed(
    running: Sequence[DrivenEngine], rounds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Wall and CPU seconds of so many rounds of each, one of each in turn."""
    seconds: dict[str, list[float]] = {each.name: [] for each in running}
    cpu: dict[str, list[float]] = {each.name: [] for each in running}
    for number in range(rounds):
        first = number % len(running)
        for each in (*running[first:], *running[:first]):
            took, used = each.round()
            seconds[each.name].append(took)
            cpu[each.name].append(used)
    return seconds, cpu


class EngineProcess:
    """An engine's process. facts: what it says of itself when it is ready."""

    def __init__(self, engine: Compared, process: subprocess.Popen[str], log: Path) -> None:
        self.name, self._process, self._log, self._folder = engine.name, process, log, log.parent
        self.facts: Json = {}

    def ready(self) -> None:
        self.facts = self._answer()

    def round(self) -> tuple[float, float]:
        """Seconds by its own clock, and CPU seconds of it and all its processes."""
        before = _cpu_of(self._process.pid)
        found = self._ask("round")
        return found["seconds"], _cpu_of(self._process.pid) - before

    def model(self) -> np.ndarray[Any, Any]:
        path = self._folder / f"model-{self._process.pid}.npy"
        self._ask(f"model {path}")
        found: np.ndarray[Any, Any] = np.load(path)
        return found

    def end(self) -> None:
        """Its input ends; the process is stopped by `_running`."""
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def _ask(self, command: str) -> Json:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the answer tells why
            self._process.stdin.write(command + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Json:
        assert self._process.stdout is not None
        readable, _, _ = select.select([self._process.stdout], [], [], SILENT_SECONDS)
        if not readable:
            raise Abandoned(
                f"{self.name}: found no answer after {SILENT_SECONDS:.0f} s, expected a round"
            )
        line = self._process.stdout.readline()
        if not line:
            said = self._log.read_text(errors="replace").strip().splitlines()
            raise Abandoned(
                f"{self.name}: found the end of its process, expected a round; it said: "
                f"{said[-1] if said else 'nothing'}"
            )
        found: Json = json.loads(line)
        return found


@contextmanager
def _running(engine: Compared, given: Json, folder: Path) -> Iterator["EngineProcess"]:
    """The engine, ready for its first round; afterwards none of its processes is alive."""
    options = dict(given["options"])
    interpreter = options.pop("interpreter")
    log = folder / f"{engine.script}-{engine.name.replace(' ', '-')}.log"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ENGINES)}
    line = [interpreter, str(ENGINES / engine.script), json.dumps(given | {"options": options})]
    with terminable(), log.open("ab") as file:
        process = subprocess.Popen(  # noqa: S603
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True,
            start_new_session=True, cwd=folder, env=environment,
        )  # fmt: skip
        found = EngineProcess(engine, process, log)
        try:
            found.ready()
            yield found
        finally:
            below = _below(process.pid)
            found.end()
            stop([process])  # type: ignore[list-item]
            for pid in below:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, 9)


def _below(pid: int) -> list[int]:
    return [each for child in children_of(pid) for each in (child, *_below(child))]


def _cpu_of(pid: int) -> float:
    """CPU seconds of a process and of those below it, as far as the system reports them."""
    ticks = 0
    for each in (pid, *_below(pid)):
        with suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS


def page(found: Json) -> RenderableType:
    """The output of `fedcore bench simulate` for a terminal."""
    times = {(row["workload"], row["engine"]): row["ms"] for row in found["rows"]}

    def ratio(row: Json, engine: str) -> str:
        other = times.get((row["workload"], engine))
        return "-" if other is None else f"{other / row['ms']:.1f}"

    rows = [
        (
            row["workload"], row["engine"], row["processes"], f"{row['ms']:.1f}", f"{row['cpu_ms']:.0f}",
            ratio(row, "pfl"), f"{row['difference']:.1g}",
        )
        for row in found["rows"]
    ]  # fmt: skip
    head = "work", "engine", "processes", "ms a round", "CPU ms", "x pfl", "difference"
    return table_page(head, rows, *_notes(found))


def _notes(found: Json) -> list[str]:
    about = found["environment"]
    versions = ", ".join(f"{name} {value}" for name, value in sorted(found["versions"].items()))
    notes = [
        f"{versions}; Python {about['python']}, {about['cores']} cores of {about['cpu']}",
        f"{found['clients']:,} clients of 30 to 70 rows, {found['cohort']} a round, one epoch in batches of 10, SGD, "
        f"weighted mean; medians of {found['rounds']} rounds, one of each engine in turn",
        f"difference: the largest of a parameter from a plain loop of torch after {found['checked_rounds']} rounds",
    ]
    return notes + [f"{name} is left out: {why}" for name, why in found["left_out"].items()]
