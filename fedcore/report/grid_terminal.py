"""What a grid ends with on the terminal: its sentences, the table of losses, and where the report is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from fedcore.report import grid_tables, phrases
from fedcore.report.tables import Cell, Grid
from fedcore.report.terminal import fitted, grid
from fedcore.results import GridResult


def summary(result: GridResult, page: Path) -> RenderableType:
    """The end of a grid on the screen."""
    return Group(*_parts(result, page))


def _parts(result: GridResult, page: Path) -> Iterator[RenderableType]:
    for name, why in grid_tables.failures(result):
        yield Text.assemble(("no result: ", "yellow"), f"{name}: {why}")
    for sentence in filter(
        None, [*grid_tables.sentences(result), grid_tables.protection_sentence(result)]
    ):
        yield Text(sentence)
    yield Text()
    for table in grid_tables.lost_tables(result):
        yield from _table(table)
    for table in (*grid_tables.sites_tables(result), *grid_tables.cost_tables(result)):
        yield from _table(table)
    yield Text(f"wall time {phrases.duration(result.seconds_total)}")
    yield Text(f"report    {page}")


def _table(table: Grid) -> Iterator[RenderableType]:
    found = grid(*table.head)
    for row in table.rows:
        found.add_row(*(Text(_one_line(cell)) for cell in row))
    yield Text(table.title, style="bold")
    yield fitted(found)
    yield Text()


def _one_line(cell: Cell) -> str:
    """Under a number what belongs to it: an interval in brackets, as in the table of a comparison."""
    if not cell.sub:
        return cell.text
    sub = (
        cell.sub
        if cell.sub == "exact" or not cell.number
        else f"[{cell.sub.replace(' to ', ', ')}]"
    )
    return f"{cell.text}\n{sub}" if cell.sub != "exact" else f"{cell.text} exact"
