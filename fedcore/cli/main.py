"""The `fedcore` command. Results go to stdout, progress and errors to stderr.

Invariant: one table of exit codes for all commands (`errors.py`): 0 done, 1 the user's task failed,
2 bad input, 3 refused by plan or policy, 4 abandoned, 130 interrupted. Torch, pydantic and SEAL are
imported inside commands, so that `--help` is fast and a run prints its first line before they load.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcore.cli import benchmarks, flags, grids, torchrun
from fedcore.cli.console import application, echo, emit_or_show, say, stderr
from fedcore.cli.console import run as run_command
from fedcore.cli.flags import AsJson, Force, JobFile, Out, Settings, job_command
from fedcore.cli.progress import RoundsProgress, SplitsProgress, reading_shown
from fedcore.errors import EXIT_REFUSED, Abandoned, AlreadyExists, BadInput, FedcoreError, Refused
from fedcore.files import RESULT_FILE, ROUNDS_FILE, is_grid, read_json, write_atomic
from fedcore.results import Result, RoundRow, SplitResult

if TYPE_CHECKING:
    from fedcore.experiment.prepare import Prepared

app = application(
    "fedcore", "Federated learning in which no party has to be trusted with another's update."
)
app.add_typer(benchmarks.app, name="bench")


def _layers(job: Path | None, settings: Settings) -> list[Settings]:
    """The settings of a job file or folder and of the flags. In place of a job file: a task's file, or a folder that
    has a task.py and no job.toml."""
    from fedcore.config import read_job_file

    if job is None:
        return [settings]
    file, colon, attribute = str(job).partition(":")
    if (
        not file.endswith(".py")
        and not (job / "job.toml").is_file()
        and (job / "task.py").is_file()
    ):
        file = str(job / "task.py")
    if not file.endswith(".py"):
        return [read_job_file(job), settings]
    if "task" in settings:
        raise BadInput(
            f"--task: found {settings['task']!r} beside the task {job}, expected one task",
            remedy="a job file beside --task, or the task alone",
        )
    return [{"task": file + colon + attribute}, settings]


def _prepared(layers: list[Settings]) -> Prepared:
    from fedcore.experiment.prepare import job_for, prepare

    with reading_shown():
        return prepare(*job_for(None, *layers), _quiet)


def _starting(command: str, job: Path | None, settings: Settings) -> None:
    what = str(job) if job else f"task {settings.get('task') or 'heart'}"
    say(f"fedcore {command}: {what}")


@job_command(
    app,
    "task protection cipher sum executor workers rounds cohort seed bits threshold drop dropout validate device "
    "initial",
)
def simulate(
    settings: Settings,
    job: JobFile = None,
    out: Out = None,
    force: Force = False,
    as_json: AsJson = False,
    resume: Annotated[Path | None, typer.Option(help="Resume an interrupted run.")] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            help="Processes that train the sites, with --sum exact; default: none.",
        ),
    ] = None,
    flower_app: flags.FlowerApp = None,
    run_config: flags.RunConfig = None,
) -> None:
    """Train one model over several sites on this machine. Also trains the arms that it is compared with."""
    settings = flags.of_flower_app(settings, flower_app, run_config)
    asked = torchrun.Asked(lambda: _layers(job, settings), out, force, workers, resume)
    if torchrun.follows():
        torchrun.follow(asked)
        return
    _starting("simulate", job or resume or flower_app, settings)
    if resume is not None and (settings or job or out):
        raise _settings_beside_resume("run")
    say("loading torch")
    from fedcore.experiment import api
    from fedcore.experiment.forked import ticking

    directory: list[Path] = []
    bar = RoundsProgress()

    def ready(prepared: Prepared, path: Path) -> None:
        directory.append(path)
        _show_header(prepared, path)
        bar.begin(prepared.plan.rounds, len(prepared.plan.sites), prepared.plan.protection)

    try:
        with closing(bar), ticking(bar.tick), reading_shown():
            if torchrun.started():
                run = torchrun.lead(asked, _quiet, bar.row, bar.step, ready)
            elif resume is not None:
                run = api.resume(
                    resume,
                    workers=workers,
                    on_round=bar.row,
                    on_step=bar.step,
                    on_ready=ready,
                    say=_quiet,
                )
            else:
                run = api.simulate(
                    job=_layers(job, settings), out=out, force=force, workers=workers, on_round=bar.row,
                    on_step=bar.step, on_ready=ready, say=_quiet,
                )  # fmt: skip
    except (KeyboardInterrupt, FedcoreError, OSError) as error:
        for line in _what_is_left(directory[0], error) if directory else []:
            say(line)
        raise
    _show_result(run.result, run.directory, as_json)


def _show_header(prepared: Prepared, path: Path) -> None:
    """Print what is about to run, before its first round."""
    from fedcore.learning.model import model_summary
    from fedcore.report import terminal

    plan, rows = prepared.plan, sum(map(len, prepared.sites))
    sites = f"{len(plan.sites):,} sites" + (
        f", {plan.server.cohort:,} a round" if plan.server.cohort else ""
    )
    facts = [sites, f"{rows:,} rows", model_summary(prepared.flat)]
    facts += [f"{name} = {value}" for name, value in prepared.task.given.items()]
    facts += [prepared.job.run.device] if prepared.job.run.device != "cpu" else []
    facts += [plan.protection, *prepared.about_engine, str(path)]
    terminal.show(stderr, terminal.header(prepared.task.name, facts, prepared.label))
    if plan.train.initial:
        say(f"initial: model {plan.train.initial[:12]} of {prepared.job.run.initial}")
    if any(True for _ in prepared.flat.module.buffers()):
        say(f"buffers: {prepared.flat.policy}")
    _show_findings(prepared)


def _show_findings(prepared: Prepared) -> None:
    """Print what is probably wrong with the task, above the numbers."""
    from fedcore.report.phrases import plain

    for text, remedy in prepared.findings:
        say(f"warning: {plain(text)}")
        say(f"hint: {plain(remedy)}")


def _show_result(result: Result, folder: Path, as_json: bool) -> None:
    """Print a finished run or comparison."""
    from fedcore.report.terminal import summary

    emit_or_show(result.to_json(), lambda _: summary(result, folder / "report.html"), as_json)


def _what_is_left(path: Path, error: BaseException, command: str = "simulate") -> list[str]:
    """Hints after an interrupt or a failure: how to continue, if something was kept in the directory."""
    quoted = shlex.quote(str(path))
    if isinstance(error, Abandoned | Refused):
        rows = path / ROUNDS_FILE
        return [f"what became of each round: {rows}"] if rows.is_file() else []
    if (path / RESULT_FILE).is_file():
        again = (
            f"fedcore simulate --resume {quoted}"
            if command == "simulate"
            else f"fedcore report {quoted}"
        )
        return [f"it is finished; its report: {again}"]
    if isinstance(error, KeyboardInterrupt) and (path / "job.json").is_file():
        return [f"resume: fedcore {command} --resume {quoted}"]
    if (path / "checkpoint.pt").is_file():
        return [f"the whole rounds are kept: fedcore simulate --resume {quoted}"]
    if finished := _finished_splits(path):
        return [f"the finished splits are kept ({finished}): fedcore compare --resume {quoted}"]
    return []


def _finished_splits(path: Path) -> int:
    return len(list(path.glob("splits/seed-*.json")))


def _quiet(text: str) -> None:
    """Print a set-up step, on a terminal only."""
    if stderr.is_terminal:
        say(text)


@job_command(app, "task protection cipher rounds seed threshold")
def up(
    settings: Settings,
    job: JobFile = None,
    out: Out = None,
    force: Force = False,
    as_json: AsJson = False,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="HOST[:PORT]",
            help="Also write the files for other machines, with a coordinator there; default port: 7443.",
        ),
    ] = None,
    flower_app: flags.FlowerApp = None,
    run_config: flags.RunConfig = None,
) -> None:
    """Run a deployment of a job on this machine, then `simulate`. A coordinator and one process a site, over TLS."""
    settings = flags.of_flower_app(settings, flower_app, run_config)
    _starting("up", job or flower_app, settings)
    from fedcore.local_deployment import address_from

    elsewhere = None if address is None else address_from(address)
    say("loading torch")
    from fedcore.cli import up as rehearsal
    from fedcore.experiment.forked import ticking

    bar = RoundsProgress()

    def ready(prepared: Prepared, path: Path) -> None:
        _show_header(prepared, path)
        say("started here; on other machines (--address) it is the deployment:")

    with closing(bar), ticking(bar.tick), reading_shown():
        listener = rehearsal.Listener(ready, bar.begin, bar.row, bar.step, say, _quiet)
        run = rehearsal.rehearse(
            _layers(job, settings), listener, out=out, force=force, address=elsewhere
        )
    _show_result(run.result, run.directory, as_json)
    if elsewhere is not None:
        for line in rehearsal.machine_lines(run, elsewhere):
            say(line)
    say(rehearsal.require_equal(run))


@job_command(
    app,
    "task protection cipher sum executor rounds cohort seeds workers threshold drop dropout validate device initial",
)
def compare(
    settings: Settings,
    job: JobFile = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Seeds 0 to SEEDS - 1; default: 5.")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", min=1, help="Splits at once, a process each; default: one per core."
        ),
    ] = None,
    out: Out = None,
    force: Force = False,
    as_json: AsJson = False,
    resume: Annotated[Path | None, typer.Option(help="Resume an interrupted comparison.")] = None,
    preset: Annotated[
        str | None, typer.Option("--preset", help="A grid of comparisons: quick, paper or privacy.")
    ] = None,
    per_gigabyte: Annotated[
        float | None, typer.Option("--per-gigabyte", min=0, help="Price of traffic, of a grid.")
    ] = None,
    per_hour: Annotated[
        float | None, typer.Option("--per-hour", min=0, help="Price of a core's hour, of a grid.")
    ] = None,
    flower_app: flags.FlowerApp = None,
    run_config: flags.RunConfig = None,
) -> None:
    """Run the arms over seeds and folds, for paired gaps. Their interval counts the overlap of the splits. JOB may be
    a grid of comparisons (docs/benchmarks.md)."""
    settings = flags.of_flower_app(settings, flower_app, run_config)
    given = {"per_gigabyte": per_gigabyte, "per_hour": per_hour}
    prices = {name: price for name, price in given.items() if price is not None}
    if grids.is_grid(job, preset, resume):
        _starting("compare", job or resume or Path(f"preset {preset}"), settings)
        grids.refuse_beside_grid(settings, job, preset, resume)
        grids.compare_grid(
            file=job, preset=preset, resume=resume, seeds=seeds, prices=prices, workers=workers,
            out=out, force=force, as_json=as_json,
        )  # fmt: skip
        return
    if prices:
        raise BadInput("--per-gigabyte, --per-hour: found prices without a grid, expected both")
    _starting("compare", job or resume or flower_app, settings)
    from fedcore.config.unsupported import refuse_split

    refuse_split(settings)
    if resume is not None:
        if settings or job or out or force or seeds:
            raise _settings_beside_resume("comparison")
        layers, chosen = _comparison_left(resume)
    else:
        layers, chosen = _layers(job, settings), list(range(seeds or 5))
    say("loading torch")
    from fedcore.experiment import api

    directory: list[Path] = []

    bar = SplitsProgress()

    def ready(prepared: Prepared, path: Path) -> None:
        directory.append(path)
        _show_findings(prepared)
        if finished := _finished_splits(path):
            say(f"{finished} finished splits are kept in {path}")
        folds = 1 if prepared.own_test_rows else prepared.job.run.folds
        bar.begin(
            len(chosen) * folds, folds, finished, prepared.plan.rounds, prepared.plan.protection
        )

    try:
        with closing(bar), reading_shown():
            found = api.compare(
                job=layers, seeds=chosen, workers=workers, out=resume or out, force=force,
                on_cell=bar.cell, on_step=bar.step, on_tick=bar.tick, on_ready=ready, say=_quiet,
            )  # fmt: skip
    except (KeyboardInterrupt, FedcoreError, OSError) as error:
        for line in _what_is_left(directory[0], error, "compare") if directory else []:
            say(line)
        raise
    _show_result(found.result, found.directory, as_json)


@job_command(app, "task protection attack preset fpr seed")
def attack(
    settings: Settings,
    job: JobFile = None,
    attack: Annotated[
        list[str] | None,
        typer.Option("--attack", help="One attack, repeatable; default: all (docs/attacks.md)."),
    ] = None,
    preset: Annotated[str, typer.Option("--preset", help="quick (default) or full.")] = "quick",
    fpr: Annotated[
        list[float] | None,
        typer.Option(
            "--fpr", help="False positive rate for membership, repeatable; takes test rows enough."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="A new folder for the page and its numbers.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Attack a job as each party sees it, in short recorded rounds. Under `plain`, too, as the control.

    Without a task or a job, each attack is carried out on the built-in task that shows it."""
    of_one_job = job is not None or "task" in settings
    if of_one_job:
        _starting("attack", job, settings)
    if out is not None and out.exists():
        raise AlreadyExists(f"--out: found {out}, expected a new folder", remedy="another --out")
    say("loading torch")
    from fedcore.experiment.attacks.registry import run_attacks
    from fedcore.experiment.attacks.suite import run_suite
    from fedcore.experiment.prepare import job_for
    from fedcore.report.attack_table import attack_summary

    layers, names, rates = _layers(job, settings), attack or (), fpr or ()
    with reading_shown():
        if of_one_job:
            found = run_attacks(*job_for(None, *layers), names, preset=preset, rates=rates, say=say)
        else:
            found = run_suite(names, *layers, preset=preset, rates=rates, say=say)
    if out is not None:
        from fedcore.report.attack_page import write_page

        say(f"page: {write_page(found, out)}")
    emit_or_show(found.to_json(), lambda _: attack_summary(found), as_json)


def _settings_beside_resume(what: str) -> BadInput:
    return BadInput(
        "--resume: found other settings beside it, expected none",
        remedy=f"an interrupted {what} goes on with the settings it was started with",
    )


def _comparison_left(path: Path) -> tuple[list[Settings], list[int]]:
    """(the job, the seeds) of an interrupted comparison. Raises BadInput for any other folder."""
    from fedcore.experiment.comparison import is_unfinished
    from fedcore.experiment.prepare import stored_job

    if not is_unfinished(path):
        found = read_json(path / "job.json").get("kind")
        ended = "a run" if found == "run" else "a finished comparison"
        raise BadInput(
            f"--resume: found {ended} in {path}, expected an interrupted comparison",
            remedy=f"`fedcore {'simulate --resume' if found == 'run' else 'report'} {path}`",
        )
    stored = stored_job(path, None)
    stored.pop("kind")
    return [stored], stored.pop("seeds")


@job_command(app, "task protection cipher rounds")
def plan(
    settings: Settings,
    where: Annotated[
        Path | None, typer.Argument(help="A job file or folder, or a run's directory.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show the solved plan of a job or a run. Packing, proof of headroom, bytes a round, steps of the price, label."""
    if where is not None and (where / "plan.json").is_file():
        if settings:
            raise BadInput(
                f"plan: found settings beside the run {where}, whose plan is fixed, expected none",
                remedy="the settings with a job file or --task show another plan",
            )
        found = read_json(where / "plan.json")
    else:
        _starting("plan", where, settings)
        found = _prepared(_layers(where, settings)).plan_json()
    from fedcore.cli.inspect import plan_page

    emit_or_show(found, plan_page, as_json)


@job_command(app, "task protection rounds threshold")
def privacy(
    settings: Settings,
    job: JobFile = None,
    as_json: AsJson = False,
) -> None:
    """Show what a job with privacy promises, before it runs. Unit, epsilon, noise, who sees what without noise."""
    _starting("privacy", job, settings)
    from fedcore.cli.inspect import privacy_of, privacy_page

    emit_or_show(privacy_of(_prepared(_layers(job, settings))), privacy_page, as_json)


@job_command(app)
def check(
    settings: Settings,
    what: Annotated[str, typer.Argument(help="A task, spelled as for --task, or a job file.")],
    as_json: AsJson = False,
) -> None:
    """Try a job: load every site and take one training step. Shows classes, the model and the plan."""
    path = Path(what)
    if what.endswith(".toml") or any((path / name).is_file() for name in ("job.toml", "task.py")):
        layers = _layers(path, settings)
    else:
        layers = _layers(None, {"task": what, **settings})
    say(f"fedcore check: {what}")
    from fedcore.cli.inspect import check_page, check_task

    emit_or_show(check_task(_prepared(layers)), check_page, as_json)


@app.command()
def predict(
    run: flags.Model,
    rows: Annotated[
        Path, typer.Argument(help="New rows: .csv or .parquet; .npy or .npz for arrays.")
    ],
    out: Annotated[Path | None, typer.Option("--out", help="Write a CSV file instead.")] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help="A column to copy to the output, repeatable: --keep id")
    ] = None,
    task: flags.ModelTask = "",
) -> None:
    """Predict new rows with a run's model. A CSV line for each, with the class and the probabilities, or the value."""
    from fedcore.cli.predict import predict as predicted

    found = predicted(run, rows, keep or (), task)
    for note in found.notes:
        say(f"warning: {note}")
    text = found.to_csv()
    if out is None:
        echo(text, nl=False)
        return
    write_atomic(out, text.encode())
    echo(f"wrote {out}: {text.count(chr(10)) - 1} rows")


@app.command()
def export(
    run: flags.Model,
    out: Annotated[
        Path | None, typer.Option("--out", help="The file to write; default: model.pt beside it.")
    ] = None,
    rows: Annotated[
        Path | None, typer.Option(help="Rows to check it on, as for predict; arrays may need them.")
    ] = None,
    task: flags.ModelTask = "",
) -> None:
    """Write the model as one TorchScript file for raw rows. It is read without Fedcore."""
    from fedcore.experiment.export import export as exported
    from fedcore.learning.saved import load_model
    from fedcore.learning.task import load_task

    model = load_model(run, load_task(task) if task else None)
    if model.warning:
        say(f"warning: {model.warning}")
    echo(f"wrote {exported(model, run, out, rows)}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; two or more overlay.")],
    format_: Annotated[str, typer.Option("--format", help="html, md or latex.")] = "html",
    out: Annotated[Path | None, typer.Option("--out", help="Write here instead.")] = None,
) -> None:
    """Write a run's report again, or overlay several runs. Also as a table for a paper (--format latex)."""
    from fedcore import report as reports

    if format_ not in ("html", "md", "latex"):
        raise BadInput(f"--format: found {format_!r}, expected html, md or latex")
    if len(runs) == 1 and format_ == "html" and out is None and is_grid(runs[0]):
        from fedcore.report import grid_page

        echo(grid_page.write(runs[0]))
        return
    text = reports.render([reports.read(path) for path in runs], format_)
    if out is None and format_ != "html":
        echo(text)
        return
    target = out or runs[0] / ("report.html" if len(runs) == 1 else "overlay.html")
    write_atomic(target, text.encode())
    echo(target)


@app.command()
def runs(
    folder: Annotated[Path, typer.Argument(help="The folder of runs.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List the runs of this folder, oldest first."""
    from fedcore.experiment.run import list_runs
    from fedcore.report import terminal

    rows = list_runs(folder)
    if rows or as_json:
        found = [{"run": r.folder, "result": r.result and r.result.to_json()} for r in rows]
        emit_or_show(found, lambda _: terminal.runs_table(rows), as_json)
    else:
        say(f"no runs in {folder} yet; `fedcore simulate` makes one")


@app.command()
def reproduce(run: Annotated[Path, typer.Argument(help="A finished run or comparison.")]) -> None:
    """Repeat a run and compare its bits. Names the first round that differs, and how the machines differ."""
    say(f"fedcore reproduce: {run}")
    from fedcore.cli.reproduce import reproduce as again

    bar = RoundsProgress()

    def on_row(row: RoundRow | SplitResult) -> None:
        if isinstance(row, SplitResult):
            say(f"seed {row.seed}, fold {row.fold}: run again")
        else:
            bar.row(row)

    with closing(bar):
        found = again(run, on_begin=bar.begin, on_row=on_row, on_step=bar.step, on_tick=bar.tick)
    if found.same:
        what = (
            f"model {found.model_sha256[0]}"
            if not found.except_for
            else f"but for {found.except_for}"
        )
        echo(f"same bits: {what}")
        return
    echo(f"different: {found.difference}")
    for line in found.environment or ("nothing in the environment differs that is recorded",):
        echo(f"  {line}")
    say(f"hint: {found.causes}")
    raise typer.Exit(EXIT_REFUSED)


@app.command()
def new(
    directory: Annotated[Path, typer.Argument(help="A folder to write task.py and job.toml into.")],
    force: Annotated[
        bool, typer.Option("--force", help="Write into a folder that holds files.")
    ] = False,
) -> None:
    """Write a task and a job to start from. They run unchanged."""
    from fedcore.cli.scaffold import create

    create(directory, force=force)
    echo(f"wrote {directory}/task.py and {directory}/job.toml")
    job = shlex.quote(f"{directory}/job.toml")
    echo(f"check it:  fedcore check {job}")
    echo(f"run it:    fedcore simulate {job}")


@app.command()
def doctor() -> None:
    """Show versions, CPU, the SEAL self-test, and name clashes."""
    from fedcore.cli.doctor import examine

    checks = examine()
    for name, well, found, remedy in checks:
        echo(f"{'ok  ' if well else 'FAIL'}  {name:<12} {found}")
        if not well and remedy:
            echo(f"      hint: {remedy}")
    if not all(well for _, well, *_ in checks):
        raise typer.Exit(EXIT_REFUSED)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `fedcore` command; always ends in SystemExit."""
    run_command(app, "fedcore", arguments)


if __name__ == "__main__":
    main()
