"""The plots of a grid's report: score against epsilon, and score against the bytes of a site."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fedcore.files.units import in_bytes
from fedcore.report import phrases
from fedcore.report.grid_tables import best, cell_name
from fedcore.report.plots import COLOURS, DASHES, WIDE, arrange, bare, style
from fedcore.results import GridCell

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = ("federated", "local_only", "centralised", "federated_float")
"""Colours of the lines of cells, in this order, each with every one of `DASHES` before the next."""

_POOLED = "centralised", 2

_REFERENCES = ("centralised", "local_only", "federated")


def line_of(place: int) -> tuple[str, int]:
    """(colour, dashes) of the cell at a place, so that no two of 16 are alike."""
    return LINES[place % len(LINES)], place // len(LINES) % len(DASHES)


def by_epsilon(cells: Sequence[GridCell]) -> list[GridCell]:
    """The cells with privacy, whose points make the curve; empty where there are fewer than two."""
    found = [c for c in cells if c.bound.epsilon is not None and c.score("federated") is not None]
    return sorted(found, key=lambda cell: cell.bound.epsilon or 0.0) if len(found) > 1 else []


def epsilon_figure(cells: Sequence[GridCell], size: tuple[float, float] = WIDE) -> Figure:
    """Score against epsilon, each with its interval, between lines for pooling, no privacy and training alone."""
    from matplotlib.figure import Figure

    private, base = by_epsilon(cells), best(cells)
    with style():
        figure = Figure(figsize=(size[0], 0.62 * size[1]))
        axes = figure.add_subplot()
        for arm in _REFERENCES if base is not None else ():
            value = base.score(arm) if base is not None else None
            if value is not None:
                axes.axhline(value, color=COLOURS[arm], linewidth=1.3, linestyle=DASHES[1])
        series: dict[tuple[str, str], list[GridCell]] = {}
        for cell in private:
            series.setdefault((cell.algorithm, cell.protection), []).append(cell)
        for i, own in enumerate(series.values()):
            _points(axes, own, COLOURS["federated"], "os^D"[i % 4])
        axes.set_xscale("log")
        ticks = sorted({cell.bound.epsilon for cell in private if cell.bound.epsilon is not None})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_xlabel("epsilon of one site's row, over all rounds")
        metric = phrases.metric_name(cells[0].metric)
        axes.set_title(f"{phrases.capitalised(metric)} by epsilon")
        bare(axes, "x")
        arrange(figure)
    return figure


def _points(axes: Axes, cells: Sequence[GridCell], colour: str, marker: str) -> None:
    x = [cell.bound.epsilon or 0.0 for cell in cells]
    y = [cell.score("federated") or 0.0 for cell in cells]
    axes.plot(x, y, color=colour, linewidth=2, marker=marker, markersize=5)
    for cell, place in zip(cells, x, strict=True):
        found = cell.arms["federated"][cell.metric]
        if found.ends is not None:
            axes.vlines(place, *found.ends, color=colour, linewidth=1.2)


def drawn_by_bytes(cells: Sequence[GridCell]) -> list[GridCell]:
    """The cells with a curve by bytes, 16 at most: more lines cannot be told apart."""
    return [cell for cell in cells if len(cell.by_bytes) > 1][: len(LINES) * len(DASHES)]


def bytes_figure(cells: Sequence[GridCell], size: tuple[float, float] = WIDE) -> Figure:
    """Score after each round against what a site had sent and received by then, a line for each cell, and one for what
    pooling reaches with the settings of the first."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    with style():
        figure = Figure(figsize=(size[0], 0.62 * size[1]))
        axes = figure.add_subplot()
        for place, cell in enumerate(drawn_by_bytes(cells)):
            colour, dashes = line_of(place)
            x, y = zip(*cell.by_bytes, strict=True)
            axes.plot(x, y, color=COLOURS[colour], linestyle=DASHES[dashes], linewidth=1.8)
        if (pooled := drawn_by_bytes(cells)[0].score("centralised")) is not None:
            colour, dashes = _POOLED
            axes.axhline(pooled, color=COLOURS[colour], linestyle=DASHES[dashes], linewidth=1.2)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 3), numticks=6 if size == WIDE else 4))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: in_bytes(value)))
        axes.minorticks_off()
        axes.set_xlabel("bytes that a site sent and received")
        metric = phrases.metric_name(cells[0].metric)
        axes.set_title(f"{phrases.capitalised(metric)} by bytes")
        bare(axes, "x")
        arrange(figure)
    return figure


def names_of(cells: Sequence[GridCell]) -> list[tuple[str, int, str]]:
    """(colour, dashes, name) of each line of `bytes_figure`."""
    drawn = drawn_by_bytes(cells)
    found = [(*line_of(place), cell_name(cell, cells)) for place, cell in enumerate(drawn)]
    if drawn[0].score("centralised") is not None:
        of_first = f", {cell_name(drawn[0], cells)}" if len(drawn) > 1 else ""
        found.append((*_POOLED, f"pooled{of_first}"))
    return found
