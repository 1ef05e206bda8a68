"""fed-site: the process of one institution, and the commands of its operator.

Results go to stdout, progress and hints to stderr; exit codes are those of every command
(`fedcore/errors.py`). grpc, torch and pydantic are imported inside commands, so `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcore.cli.audit import TrailPlace, audit_commands
from fedcore.cli.console import application, echo, emit, run, say, start_logging
from fedcore.errors import EXIT_REFUSED, BadInput

if TYPE_CHECKING:  # they import numpy, which `--help` does without
    from fedcore_clients.control import Control

    from fedcore.types import Json

app = application("fed-site", "A site of a federation: its process, and what it is at.")

Config = Annotated[Path, typer.Option("--config", help="The site's file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
_HERE = Path("site.toml")


def _print(as_json: bool, found: Json, lines: Iterable[str]) -> None:
    """Print a result on stdout, as one JSON object or in words."""
    if as_json:
        emit(found)
    else:
        for line in lines:
            echo(line)


@app.command("run")
def run_site(
    config: Config = _HERE,
    health: Annotated[
        int | None,
        typer.Option(
            "--health", min=0, max=65535, help="Answer /healthz and /readyz on this loopback port."
        ),
    ] = None,
) -> None:
    """Take part in the federation until told to stop."""
    from fedcore_clients.app import run as begin
    from fedcore_clients.config import read_config

    start_logging()
    begin(read_config(config), echo, health)


@app.command()
def check(config: Config = _HERE, as_json: AsJson = False) -> None:
    """Try everything this site needs. Config, keys, tasks and their hashes, data, network, clock."""
    from fedcore_clients.check import examine

    found = []
    for each in examine(config):
        found.append(each)
        if as_json:
            continue
        echo(f"{'OK  ' if each.ok else 'FAIL'}  {each.name:<12}  {each.found}")
        if each.traceback:
            say(each.traceback.rstrip())
        if each.remedy:
            echo(f"      hint: {each.remedy}")
    failed = [each for each in found if not each.ok]
    if as_json:
        emit({"ok": not failed, "checks": [each.to_json() for each in found]})
    if failed:
        raise typer.Exit(failed[0].exit_code)


@app.command()
def status(config: Config = _HERE, as_json: AsJson = False) -> None:
    """Show what this site's process does. Connection, jobs, rounds, errors, last model."""
    from fedcore_clients.config import read_config
    from fedcore_clients.status import read_status, status_lines

    found = read_status(read_config(config).folder)
    _print(as_json, found, status_lines(found))
    if not found["running"]:
        raise typer.Exit(EXIT_REFUSED)


@app.command("jobs")
def list_jobs(config: Config = _HERE, as_json: AsJson = False) -> None:
    """List the jobs this site was offered. State, task, protection, what it waits for, why it was refused."""
    from fedcore_clients.config import read_config
    from fedcore_clients.status import jobs_lines, read_status

    found = read_status(read_config(config).folder)
    _print(as_json, {"jobs": found["jobs"]}, jobs_lines(found))


@app.command()
def approve(
    job: Annotated[str, typer.Argument(help="The job's id, as `fed-site jobs` prints it.")],
    config: Config = _HERE,
    as_json: AsJson = False,
) -> None:
    """Let a job begin that waits for approval. That is with `jobs = "ask"` under [policy]; prints what it takes."""
    from fedcore_clients.config import read_config
    from fedcore_clients.status import about_lines
    from fedcore_clients.status import approve as approve_job

    row = approve_job(read_config(config).folder, job)
    shown = {key: row[key] for key in ("job", "task", "offer", "label", "leaves")}
    about = f"task {row['task']}, {row['protection']}, {row['rounds']} rounds"
    _print(as_json, shown, [f"job {job} approved: {about}", *about_lines(row)])


def _told(config: Path, as_json: bool, control: Control, done: str) -> None:
    """Print what the operator decided, and when it takes effect."""
    from fedcore_clients.config import read_config
    from fedcore_clients.status import runs

    acts = runs(read_config(config).folder)
    when = "the running process acts on it now" if acts else "it holds when the process starts"
    found = {"away": control.away, "vetoed": list(control.vetoed), "running": acts}
    _print(as_json, found, [f"{done}: {when}"])


@app.command()
def pause(config: Config = _HERE, as_json: AsJson = False) -> None:
    """Take part in nothing until `fed-site resume`. Acts at once, and holds across restarts."""
    from fedcore_clients.config import read_config
    from fedcore_clients.control import pause as pause_site

    _told(config, as_json, pause_site(read_config(config).folder), "paused")


@app.command()
def resume(config: Config = _HERE, as_json: AsJson = False) -> None:
    """Take part again, after `pause` or `leave`."""
    from fedcore_clients.config import read_config
    from fedcore_clients.control import resume as resume_site

    _told(config, as_json, resume_site(read_config(config).folder), "resumed")


@app.command()
def leave(config: Config = _HERE, as_json: AsJson = False) -> None:
    """Leave the federation. No further part in any job under way; `fed-site resume` comes back for later ones."""
    from fedcore_clients.config import read_config
    from fedcore_clients.control import leave as leave_all
    from fedcore_clients.status import under_way

    folder = read_config(config).folder
    _told(config, as_json, leave_all(folder, under_way(folder)), "left")


@app.command()
def veto(
    job: Annotated[str, typer.Argument(help="The job's id, as `fed-site jobs` prints it.")],
    config: Config = _HERE,
    as_json: AsJson = False,
) -> None:
    """Take no further part in one job, for good. The others continue without this site."""
    from fedcore_clients.config import read_config
    from fedcore_clients.control import read_control
    from fedcore_clients.status import veto_job

    folder = read_config(config).folder
    veto_job(folder, job)
    _told(config, as_json, read_control(folder), f"job {job} vetoed")


@app.command()
def ledger(config: Config = _HERE, as_json: AsJson = False) -> None:
    """List what was released of this site's rows. Each sum, when, for which job, with which sites."""
    from fedcore_clients.config import read_config
    from fedcore_clients.ledger import ledger_lines, read_ledger

    found = read_ledger(read_config(config).folder)
    _print(as_json, {"exposures": [each.to_json() for each in found]}, ledger_lines(found))


@app.command()
def model(
    job: Annotated[str, typer.Argument(help="The job's id, as `fed-site status` prints it.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write, *.safetensors.")],
    config: Config = _HERE,
    as_json: AsJson = False,
) -> None:
    """Write the model that this site was released. With its statistics, as `fedcore simulate` does."""
    from fedcore_clients.config import read_config
    from fedcore_clients.status import export_model

    found = export_model(read_config(config), job, out)
    line = f"wrote {out}: after round {found['round']}, sha256 {found['model_sha256']}"
    _print(as_json, found, [line])


def _trail(config: Path) -> TrailPlace:
    from fedcore_clients.config import read_config

    from fedcore.audit.keys import site_key
    from fedcore.identity.identities import read_roster
    from fedcore.types import SiteId

    found = read_config(config)
    pinned = read_roster(found.roster).get(SiteId(found.site))
    if pinned is None:
        raise BadInput(f"roster: found no site {found.site!r} on it, expected its identity key")
    return TrailPlace(found.folder, f"site {found.site}", lambda _: {site_key(pinned)})


app.add_typer(audit_commands(_trail, _HERE), name="audit")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `fed-site` command; always ends in SystemExit."""
    run(app, "fed-site", arguments)


if __name__ == "__main__":
    main()
