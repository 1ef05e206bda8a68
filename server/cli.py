"""fed-coordinator: run a coordinator, and operate one that runs.

Results go to stdout, progress to stderr; exit codes are those of every command (`fedcore/errors.py`). grpc, torch
and pydantic are imported inside commands, so `--help` is fast.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from fedcore_server.federation_cli import add_commands
from fedcore_server.keystore_cli import keystore_app
from rich.console import Console, RenderableType

from fedcore.cli.audit_commands import TrailPlace, audit_commands
from fedcore.cli.console import (
    JobCommand,
    application,
    echo,
    emit,
    page_console,
    run,
    say,
    start_logging,
)
from fedcore.errors import EXIT_ABANDONED, require_extra
from fedcore.types import Json

if TYPE_CHECKING:
    from fedcore_server.operators import Operator

    from fedcore.results import JobEvent, JobRow, MetricsRow

app = application(
    "fed-coordinator", "The coordinator of a federation, and an operator's commands to it."
)

Config = Annotated[Path, typer.Option("--config", help="The federation's file.")]
Where = Annotated[
    str | None,
    typer.Option("--coordinator", help="The coordinator's HOST:PORT; default: of operator.toml."),
]
KitFolder = Annotated[
    Path | None,
    typer.Option("--kit", help="Folder of the operator's certificate; default: of operator.toml."),
]
File = Annotated[
    Path | None,
    typer.Option(
        "--operator", help="A file with both; default: $FEDCORE_OPERATOR, or operator.toml here."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
JobId = Annotated[str, typer.Argument(help="The job's id, as `submit` and `jobs` print it.")]


def _operator(where: str | None, kit: Path | None, file: Path | None) -> Operator:
    from fedcore_server.config import find_place
    from fedcore_server.operators import Operator as Found

    return Found(find_place(where, kit, file))


@app.command()
def serve(config: Config = Path("federation.toml")) -> None:
    """Run the coordinator of a federation until it is stopped."""
    require_extra(
        "coordinator", "coordinator", "grpc_health", "grpc_reflection", "prometheus_client"
    )
    from fedcore_server.app import serve as run_server
    from fedcore_server.config import read_config

    start_logging()
    run_server(read_config(config), echo)


@app.command(
    cls=JobCommand,
    epilog="Every key of a job file is a flag too: --lr 0.1, --rounds 5 ... (docs/jobs.md lists them).",
)
def submit(
    job: Annotated[Path, typer.Argument(help="A job file, or a folder with job.toml in it.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="section.key=value, repeatable: --set train.lr=0.05"),
    ] = None,
    where: Where = None,
    kit: KitFolder = None,
    file: File = None,
    as_json: AsJson = False,
) -> None:
    """Queue a job: the file that `fedcore simulate` runs. Prints its id."""
    from fedcore_server.operators import prepare

    from fedcore.config import parse_set, read_job_file
    from fedcore.wire import calls

    operator = _operator(where, kit, file)
    tables = read_job_file(job)
    asked = prepare(job, tables, dict(parse_set(text) for text in set_ or []))
    name = operator.ask(calls.SUBMIT, asked).job
    if as_json:
        emit({"job": name, "task": asked.task, "task_sha256": asked.task_sha256})
        return
    echo(name)
    say(f"watch it: fed-coordinator watch {name}")


@app.command()
def jobs(
    where: Where = None, kit: KitFolder = None, file: File = None, as_json: AsJson = False
) -> None:
    """List the jobs, and the sites that are connected."""
    from fedcore_server.operators import jobs_table

    from fedcore.wire import calls, frames

    reply = _operator(where, kit, file).ask(calls.JOBS, frames.JobsRequest())
    found = frames.json_value(reply.json, sender="coordinator")
    emit(found) if as_json else page_console().print(jobs_table(found))


@app.command()
def watch(
    job: Annotated[str, typer.Argument(help="The job's id; default: the one that runs.")] = "",
    where: Where = None,
    kit: KitFolder = None,
    file: File = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each event as one JSON object a line.")
    ] = False,
) -> None:
    """Follow a job to its end. Round, stage, sites, whom it waits for, metrics if they are public, bytes."""
    from fedcore.results import JobEvent

    console = page_console()
    found = _operator(where, kit, file).watch(job, say)
    if as_json:
        last: Json | JobEvent | None = None
        for last in found:
            echo(json.dumps(last, ensure_ascii=False, allow_nan=False))
    else:
        events = map(JobEvent.from_json, found)
        last = _live(events, console) if console.is_terminal else _lines(events)
    if last is not None and last["state"] != "finished":
        raise typer.Exit(EXIT_ABANDONED)


def _lines(events: Iterable[JobEvent]) -> JobEvent | None:
    from fedcore_server.operators import event_lines

    before = None
    for event in events:
        for line in event_lines(event, before):
            echo(line)
        before = event
    return before


def _live(events: Iterable[JobEvent], console: Console) -> JobEvent | None:
    from fedcore_server.operators import event_table
    from rich.live import Live

    rows: list[JobRow] = []
    metrics: list[MetricsRow] = []
    event: JobEvent | None = None

    def picture() -> RenderableType:
        return "connecting" if event is None else event_table(event, rows, metrics)

    with Live(console=console, get_renderable=picture, refresh_per_second=2):  # times run on
        for event in events:
            rows += event.new_rounds
            metrics += event.new_metrics
    return event


@app.command()
def stop(
    job: JobId,
    where: Where = None,
    kit: KitFolder = None,
    file: File = None,
    as_json: AsJson = False,
) -> None:
    """End a job; its last released model stays at the sites."""
    from fedcore.wire import calls, frames

    reply = _operator(where, kit, file).ask(calls.STOP, frames.JobRequest(job))
    emit({"job": job, "text": reply.text}) if as_json else echo(reply.text)


@app.command()
def evict(
    site: Annotated[str, typer.Argument(help="The site's name on the roster.")],
    undo: Annotated[bool, typer.Option("--undo", help="Let it connect again.")] = False,
    where: Where = None,
    kit: KitFolder = None,
    file: File = None,
    as_json: AsJson = False,
) -> None:
    """Send a site away, or let it return. Its session ends, and it is refused until --undo."""
    from fedcore.wire import calls, frames

    reply = _operator(where, kit, file).ask(calls.EVICT, frames.SiteRequest(site, undo))
    emit({"site": site, "text": reply.text}) if as_json else echo(reply.text)


@app.command()
def result(
    job: JobId,
    out: Annotated[Path, typer.Option("--out", help="A new folder for the files.")],
    where: Where = None,
    kit: KitFolder = None,
    file: File = None,
    as_json: AsJson = False,
) -> None:
    """Fetch what the coordinator has of a job. Its file, its rounds, how it ended."""
    from fedcore_server.operators import CALL_SECONDS, save_result, write_report

    from fedcore.wire import calls, frames

    operator = _operator(where, kit, file)
    parts = operator.stream(calls.RESULT, frames.JobRequest(job), 10 * CALL_SECONDS)
    written = [*save_result(parts, out), write_report(out)]
    if as_json:
        emit({"job": job, "files": [str(path) for path in written]})
        return
    for path in written:
        echo(path)
    say(f"the model is at the sites: fed-site model {job} --out FILE")


def _trail(config: Path) -> TrailPlace:
    from fedcore_server.config import read_config
    from fedcore_server.federation import ENROLMENT_FOLDER, ROSTERS_FOLDER

    from fedcore.audit.coordinator_keys import coordinator_keys
    from fedcore.audit.evidence import COORDINATOR, TrustedParties
    from fedcore.identity.kit import AUTHORITY_FILE, read_limited
    from fedcore.identity.signed_roster import kept_pins, read_pins

    found = read_config(config)
    authority = read_limited(found.kit / AUTHORITY_FILE)
    pins, _ = read_pins(found.roster, authority, found.name)
    rosters = found.roster.parent / ENROLMENT_FOLDER / ROSTERS_FOLDER
    every = kept_pins(rosters, authority, found.name, pins)
    return TrailPlace(
        found.folder, f"coordinator of {found.name}",
        lambda data: coordinator_keys(data, authority, found.name),
        TrustedParties(found.name, authority, every, COORDINATOR),
        rosters.parent,
    )  # fmt: skip


app.add_typer(audit_commands(_trail, Path("federation.toml")), name="audit")
add_commands(app)

app.add_typer(keystore_app, name="keystore")


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `fed-coordinator` command; always ends in SystemExit."""
    run(app, "fed-coordinator", arguments)


if __name__ == "__main__":
    main()
