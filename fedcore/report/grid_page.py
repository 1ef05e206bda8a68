"""The report of a grid of comparisons: `report.html` and `report.md` from its result.json.

One section for each question: what was lost and why, how evenly the sites are served, what it cost, what privacy
buys at which epsilon. Each cell links to the report of its own comparison. Invariant: as of `page.py`, nothing
from a result reaches the page unescaped, and the page makes no requests.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from fedcore.files import read_grid_result, write_atomic
from fedcore.report import (
    PAGE,
    TEXT,
    grid_plots,
    grid_tables,
    markdown,
    page,
    phrases,
    require_drawing,
)
from fedcore.results import GridResult

FILES = {
    "result.json": "every number of this page",
    "table.json": "every score and loss of every split, one number a row: `pandas.read_json('table.json')`",
    "job.json": "the grid as it was asked for",
    TEXT: "this report as Markdown",
}


def write(directory: Path) -> Path:
    """Write `report.html` and `report.md` into a grid's folder; returns the path of the page. Raises BadInput."""
    require_drawing()
    result = read_grid_result(directory)
    beside = [name for name in FILES if name == TEXT or (directory / name).is_file()]
    html, text = render(result, beside), as_markdown(result)
    write_atomic(directory / TEXT, text.encode())
    write_atomic(directory / PAGE, html.encode())
    return directory / PAGE


def facts(result: GridResult) -> list[str]:
    """What ran where: cells, machine, versions."""
    done = sum(not cell.failed for cell in result.cells)
    found = [phrases.plural(done, "comparison"), phrases.duration(result.seconds_total)]
    found.append("1 process" if result.workers == 1 else f"{result.workers} processes")
    machine = result.environment.get("machine")
    found += [phrases.plain(machine)] if machine else []
    versions = ("fedcore", "python", "torch", "tenseal")
    known = [
        f"{name} {phrases.plain(result.environment[name])}"
        for name in versions
        if result.environment.get(name)
    ]
    return [*found, *known]


def render(result: GridResult, files: list[str]) -> str:
    """The page. files: those of `FILES` that lie beside it."""
    return page.template("grid.html.j2").render(
        title=f"{phrases.plain(result.name)}: accuracy, privacy and cost",
        started=phrases.plain(result.started)[:10],
        facts=facts(result),
        failures=grid_tables.failures(result),
        sentences=grid_tables.sentences(result),
        protection=grid_tables.protection_sentence(result),
        lost=grid_tables.lost_tables(result),
        sites=grid_tables.sites_tables(result),
        cost=grid_tables.cost_tables(result),
        plots=_plots(result),
        plotted="epsilon and by bytes"
        if any(map(grid_plots.by_epsilon, grid_tables.groups(result).values()))
        else "bytes",
        warnings=grid_tables.warnings(result),
        cells=[
            (f"{cell.folder}/{PAGE}", ", ".join(map(phrases.plain, cell.names)))
            for cell in result.cells
            if not cell.failed
        ],
        files=[(name, FILES[name]) for name in files],
    )


def _plots(result: GridResult) -> list[dict[str, Any]]:
    found = []
    for group, cells in grid_tables.groups(result).items():
        named, metric = grid_tables.title(group, cells), phrases.metric_name(cells[0].metric)
        salt = "-".join(str(cell.number) for cell in cells[:1])
        if grid_plots.by_epsilon(cells):
            legend = [
                ("federated", 0, "together, with privacy"), ("federated", 1, "together, without privacy"),
                ("centralised", 1, "pooled"), ("local_only", 1, "alone"),
            ]  # fmt: skip
            caption = "Points are means over the seeds and folds, bars their 95 % intervals."
            draw = partial(grid_plots.epsilon_figure, cells)
            label = f"{metric} by epsilon"
            drawn = page.drawn(
                f"{named} by epsilon", draw, caption, {"lines": legend}, label, f"e{salt}"
            )
            found.append(drawn)
        if grid_plots.drawn_by_bytes(cells):
            draw = partial(grid_plots.bytes_figure, cells)
            caption = "After each round, the mean over the seeds and folds; traffic of one site, up and down."
            legend = grid_plots.names_of(cells)
            label = f"{metric} by bytes of a site"
            drawn = page.drawn(
                f"{named} by bytes", draw, caption, {"lines": legend}, label, f"b{salt}"
            )
            found.append(drawn)
    return found


def as_markdown(result: GridResult) -> str:
    """The report's sentences and tables, ending in a newline."""
    said = [*grid_tables.sentences(result), grid_tables.protection_sentence(result)]
    blocks = [
        f"# {markdown.escape(phrases.plain(result.name))}",
        markdown.escape(", ".join([phrases.plain(result.started)[:10], *facts(result)])) + ".",
        *(
            f"> **Failed:** {markdown.escape(f'{name}: {why}')}"
            for name, why in grid_tables.failures(result)
        ),
        "\n".join(f"- {markdown.escape(sentence)}" for sentence in said if sentence),
    ]
    every = [
        *grid_tables.lost_tables(result),
        *grid_tables.sites_tables(result),
        *grid_tables.cost_tables(result),
    ]
    for table in every:
        blocks += [
            f"## {markdown.escape(table.title)}",
            markdown.grid(table),
            markdown.escape(table.note),
        ]
    if notes := grid_tables.warnings(result):
        blocks += ["## Warnings", "\n".join(f"- {markdown.escape(note)}" for note in notes)]
    return "\n\n".join(filter(None, blocks)) + "\n"
