"""A run of several processes under torchrun: what they agree on before round 1, and the run itself, which rank 0 has.

Invariant: before a site is trained, every rank has found the same versions, settings, rows and state as rank 0. Only
rank 0 writes. The same command on the same folder goes on with the run that is there, so that a start of all ranks
after one was lost needs no other command.
"""

from __future__ import annotations

import hashlib
import json
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

from fedcore import report
from fedcore.errors import AlreadyExists, BadInput, FedcoreError, TaskFailed
from fedcore.experiment.api import OnReady, run_prepared
from fedcore.experiment.comparison import first_differing
from fedcore.experiment.environment import environment
from fedcore.experiment.leader import Leader
from fedcore.experiment.loop import OnRound, OnStep, RunWriter, inputs_of
from fedcore.experiment.prepare import Prepared, job_for, job_json, prepare
from fedcore.experiment.run import Run, held, new_directory
from fedcore.experiment.workers import pieces
from fedcore.files import RESULT_FILE, read_json
from fedcore.learning.ranks import Ranks, rows_digest

V = TypeVar("V")

_VERSIONS = ("fedcore", "commit", "python", "torch", "numpy")
"""Of `environment`, what the ranks must have alike; the CPU is only warned of."""

_SHOWN = 60
"""Characters of a value that are worth showing."""


@dataclass(frozen=True)
class _Found:
    """What one rank found. facts: as text; error, remedy: of what it refused, else empty; in_task: whether the task
    raised it."""

    host: str
    facts: Mapping[str, str]
    error: str = ""
    remedy: str = ""
    in_task: bool = False


def agreed(
    ranks: Ranks, layers: Callable[[], Sequence[Mapping[str, object]]], say: Callable[[str], None]
) -> Prepared:
    """The job, prepared by every rank. layers: its settings; what they raise, this raises.

    Raises BadInput, at all ranks, where one of them has other versions, settings or rows than rank 0, or cannot prepare
    it; where one process has to train the sites; and where there are more ranks than pieces of work.
    """
    machine = environment()
    _alike(ranks, lambda: (None, {name: str(machine[name]) for name in _VERSIONS}))

    def asked() -> tuple[Callable[[], Prepared], Mapping[str, str]]:
        task, job = job_for(None, *layers())
        if job.run.executor == "auto":
            raise BadInput(
                "executor: found 'auto' under torchrun, expected one for all ranks: each would take what it measured",
                remedy="--executor batched or sequential",
            )
        settings = {key: value for key, value in job_json(task, job).items() if key != "base"}
        return lambda: prepare(task, job, say), {"settings": json.dumps(settings, sort_keys=True)}

    make = _alike(ranks, asked)

    def ready() -> tuple[Prepared, Mapping[str, str]]:
        prepared = make()
        _refuse(prepared, ranks.count)
        federation = prepared.federation
        state = hashlib.sha256(federation.state.canonical()).hexdigest()
        facts = {name: str(value) for name, value in inputs_of(prepared).items()}
        rows = {"values of the rows": rows_digest(prepared.sites)}
        return prepared, {**facts, **rows, "model and statistics before round 1": state}

    prepared = _alike(ranks, ready)
    models = sorted(set(ranks.exchange(str(machine["cpu"]))))
    if len(models) > 1:
        text = f"the ranks have different CPUs ({', '.join(models)}), which may round differently: another division of "
        text += "the sites may give other last bits"
        prepared.findings = [*prepared.findings, (text, "machines of one kind")]
    return prepared


def _refuse(prepared: Prepared, ranks: int) -> None:
    plan, federation, found = prepared.plan, prepared.federation, f"torchrun: found {ranks} ranks"
    if prepared.job.run.device != "cpu":
        raise BadInput(
            f"{found} with device = {prepared.job.run.device!r}, expected cpu: ranks train on CPUs in this version",
            remedy="--device cpu, or one process without torchrun",
        )
    if why := federation.dealing_refusal:
        raise BadInput(f"{found}, but {why}")
    most = len(pieces(federation.sites[: plan.per_round]))
    if ranks > most:
        raise BadInput(
            f"{found}, expected at most {most}: a round of {plan.per_round} sites is divided into {most} pieces",
            remedy=f"--nproc-per-node {most} on one machine, or a larger --cohort",
        )


def _alike(ranks: Ranks, work: Callable[[], tuple[V, Mapping[str, str]]]) -> V:
    """What `work` gives beside facts that are the same at all ranks. Raises its error, and BadInput where another rank
    has one, or other facts."""
    error: FedcoreError | None = None
    value: V | None = None
    facts: Mapping[str, str] = {}
    try:
        value, facts = work()
    except FedcoreError as raised:
        error = raised
    mine = _Found(socket.gethostname(), facts)
    if error is not None:
        mine = _Found(mine.host, {}, str(error), error.remedy, isinstance(error, TaskFailed))
    every = ranks.exchange(mine)
    if error is not None:
        raise error
    for rank, found in enumerate(every):
        who = f"rank {rank} ({found.host})"
        if found.error:
            kind = TaskFailed if found.in_task else BadInput
            raise kind(f"{who}: {found.error}", remedy=found.remedy)
        for name, expected in every[0].facts.items():
            if found.facts[name] != expected:
                raise BadInput(
                    f"{who}: found {_difference(name, found.facts[name], expected)} as at rank 0",
                    remedy="every rank needs the same command, Fedcore, packages, task and rows",
                )
    return cast("V", value)


def _difference(name: str, found: str, expected: str) -> str:
    if name == "settings":
        differs = first_differing(json.loads(found), json.loads(expected))
        name, found, expected = differs or (name, found, expected)
    if len(found) + len(expected) > 2 * _SHOWN:
        return f"other {name}, expected the same"
    return f"{name} = {found}, expected {expected}"


def lead(
    ranks: Ranks,
    prepared: Prepared,
    out: Path,
    *,
    on_round: OnRound | None = None,
    on_step: OnStep | None = None,
    on_ready: OnReady | None = None,
) -> Run:
    """Rank 0's part: the run in `out`, new or from its last whole round. A finished one is returned as it is.

    Raises AlreadyExists where `out` holds something else, or a run with other settings, BadInput where another command
    writes into it, RankLost where another rank ends, and what a run raises.
    """
    federation = prepared.federation
    leader = Leader(federation.executor, federation.sites, prepared.plan, ranks)
    federation.deal(leader)

    def run(*, again: bool) -> Run:
        writer = RunWriter(out, prepared)
        if not (out / "checkpoint.pt").is_file():
            writer.start()
        if on_ready is not None:
            on_ready(prepared, out)
        return run_prepared(prepared, writer, on_round, on_step, resume=again)

    with closing(federation):
        if not (out / "job.json").is_file() or _is_other(out):
            with new_directory("", out, force=False):
                found = run(again=False)
        else:
            with held(out):
                _require_same(out, prepared)
                if (out / RESULT_FILE).is_file():
                    if not (out / report.PAGE).is_file():
                        report.write(out)
                    found = Run(out, prepared.task)
                else:
                    found = run(again=True)
        leader.dismiss()
    return found


def _is_other(out: Path) -> bool:
    """Whether a folder is of another command than `simulate`."""
    return bool(_stored(out)) and _stored(out)["kind"] != "run"


def _stored(out: Path) -> dict[str, object]:
    """A folder's job.json; empty where a run was lost before it wrote one."""
    path = out / "job.json"
    found: dict[str, object] = read_json(path) if path.stat().st_size else {}
    return found


def _require_same(out: Path, prepared: Prepared) -> None:
    then, now = _stored(out), job_json(prepared.task, prepared.job)
    remedy = "the same command, which goes on with it, or another --out"
    if then and (differs := first_differing(then, now)):
        key, found, expected = differs
        raise AlreadyExists(
            f"--out: found {out}, a run with {key} = {found}, expected {expected} as given",
            remedy=remedy,
        )
    plan = out / "plan.json"
    if plan.is_file() and read_json(plan)["digest"] != prepared.plan.digest:
        raise AlreadyExists(
            f"--out: found {out}, a run of another plan: its task or rows were others",
            remedy=remedy,
        )
