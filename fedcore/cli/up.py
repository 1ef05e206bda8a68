"""`fedcore up`: deploy a job on one machine, then run it as `simulate` does and compare.

The coordinator and every site are separate processes, over TLS on loopback, with the files for separate
machines (`deployment/` in the run's directory). Afterwards the same job runs inside this process, as
`simulate` runs it, for the arms, the gaps and the report.

Invariant: the two models are compared by their hash, and the result states whether they are equal; the kept
model is that of the sites.
"""

import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedcore.config import Job, deployed_settings, is_json, narrowest_policy
from fedcore.config.unsupported import refuse_unsupported
from fedcore.errors import Abandoned, BadInput, FedcoreError, PlanRefused, TaskFailed
from fedcore.experiment.api import OnReady, Say
from fedcore.experiment.environment import random_causes
from fedcore.experiment.loop import OnRound, OnStep, RunWriter, run_experiment
from fedcore.experiment.outcome import in_folder
from fedcore.experiment.prepare import Prepared, job_for, prepare, resolve_sites
from fedcore.experiment.run import Run, new_directory
from fedcore.files import append_row, read_json
from fedcore.identity.addresses import authority_of
from fedcore.identity.peer import check_sites
from fedcore.learning.data.split import FoldSplit
from fedcore.learning.task import BUILT_IN, Task
from fedcore.local_deployment import Deployment, Running, ask, running, write
from fedcore.results import DeployedRun, JobEvent, JobRow
from fedcore.secagg.protections import MIN_SITES, refuse_plain
from fedcore.secagg.purposes import trains
from fedcore.seeds import hash_seed
from fedcore.types import Json

STATUS_SECONDS = 15.0
"""Timeout until every site's status shows the last model; a status is written every second."""


MACHINES = "machines"
"""Folder of a run with the files for other machines, beside `deployment/`, those of the run itself."""


@dataclass(frozen=True)
class Listener:
    """Callbacks for progress.

    on_ready: the prepared job and the run's directory. begin: numbers of rounds and sites, and the protection,
    before the rounds of the deployment and again before those of the run in this process. on_round: each row of
    both. on_step: what the run in this process does next.
    say: one line of progress. on_setup: one step of setting up.
    """

    on_ready: OnReady
    begin: Callable[[int, int, str], None]
    on_round: OnRound
    on_step: OnStep
    say: Say
    on_setup: Say


def rehearse(
    layers: Sequence[Mapping[str, Any]],
    listener: Listener,
    *,
    out: Path | None = None,
    force: bool = False,
    address: tuple[str, int] | None = None,
) -> Run:
    """Deploy the job here, run it, stop it, and run it again in this process; returns the finished run.

    address: host and port of a coordinator elsewhere; then the files for it and its sites are written too, with
    keys of their own, into MACHINES of the run's directory. `run.result.deployment.equal` is whether both gave the
    same model. Raises FedcoreError; no process is left running, and nothing is written for bad input. After Abandoned
    the logs are kept.
    """
    task, job = job_for(None, *layers)
    _refuse(task, job)
    prepared = prepare(task, job, listener.on_setup)
    name = f"{prepared.task.name}-{prepared.plan.protection}"
    with new_directory(name, out, force=force) as directory:
        writer = RunWriter(directory, prepared)
        writer.start()
        listener.on_ready(prepared, directory)
        deployed, model = _deployed(prepared, directory / "deployment", listener)
        listener.say(f"deployment: {len(deployed.round_seconds)} rounds, every process ended")
        listener.say("the same job in this process, for the comparison")
        listener.begin(*_size(prepared))
        run = _finish(prepared, writer, deployed, model, listener)
        if address is not None:
            _write(prepared, directory / MACHINES, address)
        return run


def _size(prepared: Prepared) -> tuple[int, int, str]:
    plan = prepared.plan
    return plan.rounds, len(plan.sites), plan.protection


def _refuse(task: Task, job: Job) -> None:
    """Refuse a job that runs in one process only: BadInput or PlanRefused, before any row is loaded."""
    refuse_unsupported(deployed_settings(job), "deployment")
    sites = resolve_sites(task, job)
    check_sites(sites, deployed=True)
    refuse_plain(job.protect.protection)
    if len(sites) < MIN_SITES:
        raise PlanRefused(f"sites: found {len(sites)}, expected at least {MIN_SITES}")
    for site, source in sites.items():
        if not is_json(source):
            found = "found a source made in memory, expected one that a file can name"
            remedy = "name the site's data by a path or another text"
            raise BadInput(f"sites.{site}: {found}", remedy=remedy)


def _deployed(
    prepared: Prepared, folder: Path, listener: Listener
) -> tuple[DeployedRun, Path | None]:
    """Run the job as processes; returns its record, and the file of the model if all sites have the same one."""
    deployment = _write(prepared, folder)
    commands = deployment.commands()
    try:
        with running(deployment, commands, lambda line: listener.say(f"  {line}")) as parties:
            began = time.monotonic()
            listener.begin(*_size(prepared))
            job = str(parties.ask("submit", str(deployment.job))["job"])
            rows = _follow(parties, job, listener)
            seconds = time.monotonic() - began
            hashes = _hashes(parties, job)
        found = sorted(set(hashes.values()))
        model = folder / "model.safetensors"
        if len(found) == 1:
            exported = ask(deployment.export(deployment.sites[0], job, model), "fed-site model")
            found = sorted({*found, exported["model_sha256"]})
    except BadInput as error:  # keeps the logs, which have the details
        raise Abandoned(str(error), remedy=error.remedy) from error
    for row in rows:
        append_row(folder, row)
    trained = [row for row in rows if trains(row.purpose)]
    about = DeployedRun(
        job=job,
        model_sha256=found[0] if len(found) == 1 else None,
        sites=hashes,
        seconds=round(seconds, 3),
        round_seconds=tuple(row.seconds for row in trained),
        survivors=tuple(row.survivors for row in trained),
        processes=tuple({"name": n, "command": shlex.join(line)} for n, line in commands.items()),
        folder=str(folder),
    )
    return about, model if len(found) == 1 else None


def _write(prepared: Prepared, folder: Path, address: tuple[str, int] | None = None) -> Deployment:
    task, plan = prepared.task, prepared.plan
    origin = _installed(task, prepared.job)
    sites = {
        name: {task.name: {"task": origin, "sha256": plan.task_digest, "source": source}}
        for name, source in resolve_sites(task, prepared.job).items()
    }
    tables: Json = {**deployed_settings(prepared.job), "task": origin}
    del tables["base"]
    # Every site must make the same plan, and no site reveals its number of rows.
    tables["protect"] = tables["protect"] | {"max_examples": plan.max_examples}
    policy = narrowest_policy(prepared.job, len(sites))
    run = prepared.job.run  # the folds of `simulate`, so that both give the same model
    split = FoldSplit(run.seed, run.fold, run.folds).to_json()
    name = "federation" if address else "rehearsal"
    return write(folder, name, sites, tables, policy=policy, split=split, address=address)


def _installed(task: Task, job: Job) -> str:
    """The task's origin, with an absolute path for a file."""
    place, colon, attribute = task.origin.partition(":")
    if task.origin in BUILT_IN or not place.endswith(".py"):
        return task.origin
    return str((job.base / Path(place).expanduser()).resolve()) + colon + attribute


def _follow(parties: Running, job: str, listener: Listener) -> list[JobRow]:
    """Wait until the job ends; returns the rows of its rounds. Raises Abandoned if it gave no model."""
    rows: list[JobRow] = []
    event: JobEvent | None = None
    shown: tuple[str, ...] = ()
    for found in parties.follow("watch", job):
        if found is None:  # no event for a second: show which sites the job waits for
            if event is not None and event.waiting_for not in ((), shown):
                shown = event.waiting_for
                listener.say(f"waiting for {', '.join(shown)}")
            continue
        event = JobEvent.from_json(found)
        rows += event.new_rounds
        for row in event.new_rounds:
            if trains(row.purpose):
                listener.on_round(row.as_round())
    if event is not None and event.state == "finished":
        return rows
    state, text = "unknown", ""
    if event is not None:
        unable = [f"{name}: {site.unable}" for name, site in event.sites.items() if site.unable]
        state, text = event.state, event.text or ", ".join(unable)
    raise Abandoned(
        f"deployment: the job ended as {state}: {text or 'it gave no reason'}",
        remedy=f"the logs: {parties.deployment.log('*')}",
    )


def _hashes(parties: Running, job: str) -> dict[str, str]:
    """{site: hash of its model}, from the status file of every site. Raises BadInput after STATUS_SECONDS."""
    found: dict[str, str] = {}
    until = time.monotonic() + STATUS_SECONDS
    while time.monotonic() < until:
        for site in parties.deployment.sites:
            with suppress(FedcoreError):
                status = read_json(parties.deployment.state(site) / "status.json")
                row = next(row for row in status["jobs"] if row["job"] == job)
                if row["outcome"] is not None and row["model_sha256"]:
                    found[site] = row["model_sha256"]
        if len(found) == len(parties.deployment.sites):
            return found
        parties.check()
        time.sleep(0.05)
    late = [site for site in parties.deployment.sites if site not in found]
    raise BadInput(
        f"deployment: found no model at {', '.join(late)} {STATUS_SECONDS:.0f} s after the job's end",
        remedy=f"the logs: {parties.deployment.log('*')}",
    )


def _finish(
    prepared: Prepared,
    writer: RunWriter,
    deployed: DeployedRun,
    model: Path | None,
    listener: Listener,
) -> Run:
    """Run the same job in this process, then write the files of a run with the deployment's model."""
    from fedcore.report import write as write_report

    directory = writer.directory
    experiment, result = run_experiment(
        prepared, writer, listener.on_round, on_step=listener.on_step
    )
    simulated = result.model_sha256
    equal = deployed.model_sha256 == simulated
    result = replace(
        in_folder(result, directory),
        deployment=replace(deployed, equal=equal, simulated_sha256=simulated),
        model_sha256=deployed.model_sha256 or simulated,
    )
    writer.finish(experiment, result)
    kept = directory / "model.safetensors"
    if model is not None and not equal:
        kept.rename(model.with_name("simulated-model.safetensors"))
    if model is not None and not (equal and prepared.of_sites):
        model.replace(kept)
    write_report(directory)
    return Run(directory, prepared.task)


def machine_lines(run: Run, address: tuple[str, int]) -> list[str]:
    """What to do with the files for other machines."""
    host, folder = address[0], run.directory / MACHINES
    return [
        f"files for other machines, with a coordinator at {authority_of(*address)}: {folder}",
        f"  coordinator/  to {host}: fed-coordinator serve --config federation.toml",
        "  sites/NAME/   to each site, where site.toml gets its own task and source: fed-site check; fed-site run",
        "  operator/     to whoever submits jobs: fed-coordinator submit job.toml",
        "  authority/    stays here: whoever reads its key can act as any of them",
    ]


def require_equal(run: Run) -> str:
    """What was found equal, in words. Raise TaskFailed if the deployment gave another model than the run in one
    process; in a job with privacy, if the sites have different ones."""
    found = run.result.deployment
    if found is None or found.equal:
        return f"the deployment's model is the simulation's, bit for bit: {run.result.model_sha256}"
    where = f"both are kept: {run.directory}/model.safetensors is the deployment's"
    if found.model_sha256 is None:
        hashes = ", ".join(f"{site} {digest[:12]}" for site, digest in found.sites.items())
        raise TaskFailed(f"deployment: found sites with different models ({hashes}), expected one")
    if run.result.plan["train"].get("privacy"):
        return (
            f"all sites of the deployment have one model, {found.model_sha256}; the simulation's is another one, since "
            "the noise of a job with privacy is new in every run"
        )
    sites = len(run.result.sites)
    missed = [n for n, left in enumerate(found.survivors, start=1) if len(left) < sites]
    why = f"sites were missing in round {missed[0]}" if missed else random_causes(hash_seed())
    raise TaskFailed(
        f"deployment: found model {found.model_sha256[:12]}, expected "
        f"{found.simulated_sha256[:12]} as in one process; {where}",
        remedy=why,
    )
