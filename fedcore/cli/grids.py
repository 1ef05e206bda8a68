"""`fedcore compare` of a grid: a file with [[grid]] blocks, a preset, or an interrupted grid."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from fedcore.cli.console import emit_or_show, say
from fedcore.cli.progress import GridProgress
from fedcore.errors import BadInput, FedcoreError, UnknownName

if TYPE_CHECKING:
    from fedcore.config.grid_file import GridFile
    from fedcore.experiment.grid import GridListener, GridRun

PRESETS = ("quick", "paper", "privacy")


def is_grid(job: Path | None, preset: str | None, resume: Path | None) -> bool:
    """Whether `compare` was asked for a grid: a preset, a file with [[grid]], or the folder of one."""
    from fedcore.files import is_grid as of_folder
    from fedcore.files.toml import read_tables

    if preset is not None or (resume is not None and of_folder(resume)):
        return True
    is_file = job is not None and job.suffix == ".toml" and job.is_file()
    return job is not None and is_file and "grid" in read_tables(job)


def preset_file(name: str) -> Path:
    """The file of a preset. Raises UnknownName."""
    if name not in PRESETS:
        raise UnknownName("--preset", name, PRESETS)
    return Path(str(resources.files("fedcore.config").joinpath(f"presets/{name}.toml")))


def compare_grid(
    *,
    file: Path | None,
    preset: str | None,
    resume: Path | None,
    seeds: int | None,
    prices: Mapping[str, float],
    workers: int | None,
    out: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Run a grid and print its result; ends with the exit code of the first cell that failed. Raises FedcoreError."""
    grid, base = _asked(file, preset, resume)
    if seeds is not None:
        blocks = tuple(block.model_copy(update={"seeds": None}) for block in grid.grid)
        grid = grid.model_copy(update={"seeds": seeds, "grid": blocks})
    if prices:
        grid = grid.model_copy(update={"prices": grid.prices.model_copy(update=dict(prices))})
    say("loading torch")
    from fedcore.experiment.grid import first_failure, run_grid
    from fedcore.report.grid_terminal import summary

    begun: list[tuple[GridRun, Path]] = []
    bars: list[GridProgress] = []

    def listener(run: GridRun, directory: Path) -> GridListener:
        from fedcore.experiment.grid import GridListener

        begun.append((run, directory))
        bar = GridProgress(run.seconds_left)
        bars.append(bar)
        say(f"{len(run.cells)} cells in {directory}")
        return GridListener(bar.checked, bar.begin, bar.step, bar.split, bar.cell, bar.tick)

    try:
        result, directory = run_grid(
            grid, base, out=resume or out, force=force, workers=workers, listener=listener
        )
    except (KeyboardInterrupt, FedcoreError, OSError):
        if begun and begun[0][1].is_dir():
            say(f"what is finished is kept: fedcore compare --resume {begun[0][1]}")
        raise
    finally:
        for bar in bars:
            with closing(bar):
                pass
    emit_or_show(result.to_json(), lambda _: summary(result, directory / "report.html"), as_json)
    if (failed := first_failure(begun[0][0].runs)) is not None:
        raise typer.Exit(failed.code)


def _asked(file: Path | None, preset: str | None, resume: Path | None) -> tuple[GridFile, Path]:
    from fedcore.config.grid_file import read_grid

    if resume is not None:
        from fedcore.experiment.grid import asked_of

        return asked_of(resume)
    if file is not None:
        return read_grid(file), file.resolve().parent
    return read_grid(preset_file(preset or "")), Path.cwd()


def refuse_beside_grid(
    settings: Mapping[str, object], job: Path | None, preset: str | None, resume: Path | None
) -> None:
    """Raise BadInput where settings are given beside a grid, whose file has them, or several grids."""
    if settings:
        raise BadInput(
            f"compare: found {', '.join(sorted(settings))} beside a grid, expected none",
            remedy="write them under `settings` of the grid's file",
        )
    if sum(each is not None for each in (job, preset, resume)) > 1:
        raise BadInput("compare: found several of a file, --preset and --resume, expected one")
