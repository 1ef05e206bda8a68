"""The report's plots: matplotlib figures, and the same figures as inline SVG that follows the page.

`rounds_figure` and `splits_figure` return ordinary figures for a notebook; `svg` turns one into
markup without fonts, dates, scripts or outside references, whose colours are CSS variables so that
a dark page or paper gets its own. Invariant: text from users is never parsed as mathematics.

matplotlib is imported inside the functions: it is slow to load and the terminal does not need it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from fedcore.report import phrases
from fedcore.report import sentences as say
from fedcore.report.methods import choices
from fedcore.results import ByMetric, ComparisonResult, Interval, Result, RoundRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.gridspec import SubplotSpec

# Each colour is used for one thing only: `svg` replaces it by the CSS variable of that name.
COLOURS = {
    "centralised": "#3d4249",
    "local_only": "#c2701c",
    "federated_float": "#5fb3d9",
    "federated": "#1558a8",
    "ink": "#22262b",
    "muted": "#6a717b",
    "rule": "#dcdfe4",
}
_ARM_ORDER = ("local_only", "centralised", "federated", "federated_float")
"""Drawn in this order: the thin float line stays visible on top of the federated one it follows."""
_WIDTHS = {"federated": 2.6, "federated_float": 1.1, "centralised": 1.5, "local_only": 1.5}
DASHES = ("solid", (0, (5, 2)), (0, (1, 1.6)), (0, (5, 1.5, 1, 1.5)))

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlecolor": COLOURS["ink"],
    "axes.titlelocation": "left",
    "axes.titley": 1.0,  # not searched for at every drawing
    "grid.linewidth": 0.6,
    **dict.fromkeys(("axes.grid", "axes.axisbelow", "axes.unicode_minus"), True),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right"), False),
    **dict.fromkeys(
        ("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), COLOURS["rule"]
    ),
    **dict.fromkeys(
        (f"{axis}.labelcolor" for axis in ("axes", "xtick", "ytick")), COLOURS["muted"]
    ),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none"),
}

Finished = tuple[Result, Sequence[RoundRow]]
"""The result and the rounds of a run or comparison, as `fedcore.report.read` returns them."""
WIDE, NARROW = (7.4, 4.7), (3.7, 4.5)
"""Inches; NARROW is what a phone shows, so that its text stays as large as the page's."""


@contextmanager
def style(salt: str = "fedcore") -> Iterator[None]:
    """Draw in the report's style. salt: of the ids in an SVG."""
    import matplotlib as mpl

    with mpl.rc_context({**_STYLE, "svg.hashsalt": salt}):
        yield


def groups(runs: Sequence[Finished]) -> list[list[int]]:
    """Indices of the runs that share a line and a band: of more than three, those that differ in
    seed or fold only; of a comparison, its splits. Two or three runs are read one by one.
    """
    found: dict[str, list[int]] = {}
    for i, (result, _) in enumerate(runs):
        if isinstance(result, ComparisonResult):
            key = str(id(result))  # `splits_of` gives every split the same result
        elif len(runs) <= 3:
            key = str(i)
        else:
            key = repr([choices(result, seeds=False), result.sites])
        found.setdefault(key, []).append(i)
    return list(found.values())


def splits_of(comparison: Finished) -> list[Finished]:
    """One run per seed and fold of a comparison's rows, so that they share a line and a band."""
    result, rows = comparison
    found: dict[object, list[RoundRow]] = {}
    for row in rows:
        found.setdefault(row.split, []).append(row)
    return [(result, rows_of_split) for rows_of_split in found.values()]


def plotted_metric(runs: Sequence[Finished]) -> str | None:
    """The first of the first run's metrics, the headline's before the others, that any round has."""
    if not runs:
        return None
    every = [row for _, rows in runs for row in rows]
    metrics = say.ordered_metrics(runs[0][0])
    return next((m for m in metrics if any(row.number(m) is not None for row in every)), None)


LOSSES = {"loss": "Loss on the test rows", "train_loss": "Loss on the training rows"}
"""The columns of losses, which every arm's rows may have, with their titles."""


def further_columns(runs: Sequence[Finished], metric: str) -> list[str]:
    """The columns with a curve of their own beside the plotted metric: the other metrics, then the losses."""
    every = [row for _, rows in runs for row in rows]
    wanted = [*(m for m in say.ordered_metrics(runs[0][0]) if m != metric), *LOSSES]
    return [column for column in wanted if any(row.number(column) is not None for row in every)]


def _curve(rows: Sequence[RoundRow], arm: str, metric: str) -> dict[int, float]:
    found = {row.round: row.number(metric) for row in rows if row.arm == arm}
    return {round_: value for round_, value in found.items() if value is not None}


def rounds_figure(
    runs: Sequence[Finished], metric: str, size: tuple[float, float] = WIDE
) -> Figure:
    """The metric by round and arm, and under it, on the same rounds, the gap, if it was measured.

    Two or three runs get their own dashes each; of more, those that differ only in seed or fold
    become one line (their mean) with a band from the least to the largest.
    """
    from matplotlib.figure import Figure

    with style():
        width, height = size
        compared = any(_gap_curve(run, metric) for run in runs)
        figure = Figure(figsize=(width, height if compared else 0.7 * height))
        upper = figure.add_subplot(3, 1, (1, 2)) if compared else figure.add_subplot()
        lower = figure.add_subplot(3, 1, 3, sharex=upper) if compared else None
        _draw_arms(upper, runs, metric)
        for group, members in enumerate(groups(runs) if lower is not None else []):
            assert lower is not None
            gaps = [gap for i in members if (gap := _gap_curve(runs[i], metric))]
            _draw(lower, gaps, COLOURS["federated"], DASHES[group % len(DASHES)], 1.8)
            if len(members) == 1:
                _final_interval(lower, runs[members[0]], metric, group)
        upper.set_title(f"{phrases.capitalised(phrases.metric_name(metric))} by round")
        if lower is not None:
            lower.set_title(f"Gap: {_lost_name(runs[0][0], metric)}")
            lower.axhline(0, color=COLOURS["muted"], linewidth=0.9, zorder=1.5)
            upper.tick_params(labelbottom=False)
        (lower or upper).set_xlabel("round")
        for axes in (upper, *([lower] if lower is not None else [])):
            _by_round(axes)
        arrange(figure)
    return figure


def further_figure(
    runs: Sequence[Finished], columns: Sequence[str], size: tuple[float, float] = WIDE
) -> Figure:
    """One small panel by round for each of `columns` (`further_columns`), two beside each other where there is
    room, with the lines of `rounds_figure`."""
    from matplotlib.figure import Figure

    with style():
        across = 2 if size == WIDE else 1
        down = -(-len(columns) // across)
        figure = Figure(figsize=(size[0], 1.9 * down + 0.3))
        for i, column in enumerate(columns):
            axes = figure.add_subplot(down, across, i + 1)
            _draw_arms(axes, runs, column)
            name = LOSSES.get(column) or phrases.capitalised(phrases.metric_name(column))
            axes.set_title(name)
            _by_round(axes)
            if i + across >= len(columns):
                axes.set_xlabel("round")
        arrange(figure)
    return figure


def _draw_arms(axes: Axes, runs: Sequence[Finished], column: str) -> None:
    """A line for each arm and group of runs; those of the first group carry the arms' names for a legend."""
    for group, members in enumerate(groups(runs)):
        for arm in _ARM_ORDER:
            curves = [c for i in members if (c := _curve(runs[i][1], arm, column))]
            name = "" if group else phrases.ARM_NAMES[arm]
            _draw(axes, curves, COLOURS[arm], DASHES[group % len(DASHES)], _WIDTHS[arm], name)


def _by_round(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10]))
    bare(axes, "x")


def _cell(axes: Axes) -> SubplotSpec:
    cell = axes.get_subplotspec()
    assert cell is not None
    return cell


def arrange(figure: Figure) -> None:
    """Room around and between the panels of a grid for titles and numbers.

    matplotlib's own layouts measure every text several times, which takes longer than the drawing.
    """
    from matplotlib.textpath import text_to_path

    measured = text_to_path.get_text_width_height_descent
    rows, columns = _cell(figure.axes[0]).get_gridspec().get_geometry()
    em = _STYLE["font.size"] / 72  # inches
    left, below, above, right = [0.0] * columns, [0.0] * rows, 2.1 * em, 0.6 * em
    for axes in (each for each in figure.axes if each.get_visible()):
        cell = _cell(axes)
        column, row = cell.colspan.start, cell.rowspan.stop - 1
        for label in axes.get_yticklabels():
            points, *_ = measured(label.get_text(), label.get_fontproperties(), ismath=False)
            left[column] = max(left[column], points / 72 + 0.9 * em)
        lines = bool(axes.get_xticklabels()) + bool(axes.get_xlabel())
        lines += bool(axes.xaxis.get_major_formatter().get_offset())
        below[row] = max(below[row], (1.6 * lines + 0.2) * em)
        if axes.yaxis.get_major_formatter().get_offset():  # "1e-6" stands where the title would
            axes.set_title(axes.get_title(loc="left"), pad=18)
            above = 3.5 * em
    width, height = figure.get_size_inches()
    across, down = max(left[1:], default=0.0), max(below[:-1], default=0.0) + above
    wide = (width - left[0] - right - (columns - 1) * across) / columns
    high = (height - above - below[-1] - (rows - 1) * down) / rows
    figure.subplots_adjust(
        left[0] / width, below[-1] / height, 1 - right / width, 1 - above / height, across / wide, down / high
    )  # fmt: skip


def bare(axes: Axes, without: Literal["x", "y"]) -> None:
    """Neither ticks nor a line at the left, and no grid along one axis."""
    axes.grid(axis=without, visible=False)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)


def _draw(
    axes: Axes,
    curves: Sequence[dict[int, float]],
    colour: str,
    dashes: Any,
    width: float,
    name: str = "",
) -> None:
    """The mean over the rounds that every curve has; of several with a band from the least to the largest.

    name: what a legend calls the line.
    """
    rounds = sorted(set.intersection(*map(set, curves))) if curves else []
    columns = [[curve[r] for curve in curves] for r in rounds]
    if not rounds:
        return
    means = [sum(column) / len(column) for column in columns]
    if len(curves) > 1:
        low, high = [*map(min, columns)], [*map(max, columns)]
        axes.fill_between(rounds, low, high, color=colour, alpha=0.16, linewidth=0)
    lone = "o" if len(rounds) == 1 else ""
    axes.plot(
        rounds, means, color=colour, linestyle=dashes, linewidth=width, marker=lone, markersize=4,
        solid_capstyle="round", label=name or None,
    )  # fmt: skip


def _lost_name(result: Result, metric: str) -> str:
    """The lower axis: `points of AUC lost`, `MSE lost`."""
    counted = "" if result.is_error(metric) else "points of "
    return f"{counted}{phrases.metric_name(metric)} lost"


def _scale(result: Result, metric: str) -> float:
    """From the files' unit to the lower axis': points of a fraction, an error as it is."""
    return 1.0 if result.is_error(metric) else 100.0


def _gap_curve(run: Finished, metric: str) -> dict[int, float]:
    result, rows = run
    scale = _scale(result, metric)
    pooled, together = (_curve(rows, arm, metric) for arm in ("centralised", "federated"))
    lost = {r: result.better_by(metric, pooled[r], together.get(r)) for r in pooled}
    return {r: value * scale for r, value in lost.items() if value is not None}


def _final_interval(axes: Axes, run: Finished, metric: str, group: int) -> None:
    """The result's interval as a bar at the last round, moved to the right for each further group."""
    gap, rounds = run[0].gap_of("total", metric), _gap_curve(run, metric)
    if gap is None or gap.ends is None or not rounds:
        return
    x, scale = max(rounds) + 0.012 * (group + 1) * max(rounds), _scale(run[0], metric)
    low, high = (end * scale for end in gap.ends)
    colour = COLOURS["federated"]
    axes.vlines(x, low, high, color=colour, linewidth=1.2, linestyle=DASHES[0])
    axes.plot([x, x], [low, high], color=colour, marker="_", markersize=6, linewidth=0)


def splits_figure(
    results: Sequence[ComparisonResult], metric: str, size: tuple[float, float] = WIDE
) -> Figure:
    """A comparison: every seed x fold as a dot, the mean and its interval as a bar; arms above,
    gap and its parts below."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with style():
        figure = Figure(figsize=size)
        upper, lower = figure.subplots(2, 1, height_ratios=(1, 1))
        arms = [a for a in phrases.ARM_NAMES if any(a in say.arms_of(r) for r in results)]
        rows = [(arm, phrases.ARM_NAMES[arm], COLOURS[arm]) for arm in arms]
        of_arms = [(r.arms, [split.arms for split in r.cells]) for r in results]
        _strips(upper, of_arms, rows, metric, 1.0)
        order = ("total", *(part for part in phrases.PART_NAMES if part != "total"))
        parts = [(part, phrases.PART_NAMES[part], COLOURS["federated"]) for part in order]
        of_gaps = [(r.gap, [split.gap for split in r.cells]) for r in results]
        _strips(lower, of_gaps, parts, metric, _scale(results[0], metric))
        name = phrases.capitalised(phrases.metric_name(metric))
        upper.set_title(f"{name} of each arm, one dot per seed and fold")
        lower.set_title(f"Gap: {_lost_name(results[0], metric)}, and where")
        lower.axvline(0, color=COLOURS["muted"], linewidth=0.9, zorder=1.5)
        bins = 5 if size == NARROW else 8
        for axes in (upper, lower):
            axes.xaxis.set_major_locator(MaxNLocator(nbins=bins, steps=[1, 2, 5, 10]))
            bare(axes, "y")
        arrange(figure)
    return figure


def site_values(result: Result, metric: str) -> dict[str, float]:
    """What `sites_figure` draws of each site where it is known: the gain over training alone, else the score."""
    if "local_only" in result.arm_names:
        found = {site: say.site_gain(result, site, metric) for site in result.per_site}
    else:
        found = {site: result.site_score(site, "federated", metric) for site in result.per_site}
    return {site: value for site, value in found.items() if value is not None}


SITE_ARMS = ("local_only", "federated")
"""The arms that a site compares: alone and together."""


def site_curves(run: Finished, metric: str) -> dict[str, dict[str, dict[int, float]]]:
    """{site: {arm: {round: value}}} where rounds.jsonl has them, in the order of the result."""
    result, rows = run
    found: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        for site, values in row.per_site.items():
            value = values.get(metric)
            if value is not None:
                found.setdefault(site, {}).setdefault(row.arm, {})[row.round] = value
    return {site: found[site] for site in result.sites if site in found}


def sites_by_round_figure(run: Finished, metric: str, size: tuple[float, float] = WIDE) -> Figure:
    """A small panel for each site: the metric on its test rows by round, alone and together, on one scale."""
    from matplotlib.figure import Figure

    curves = site_curves(run, metric)
    with style():
        across = 4 if size == WIDE else 2
        down = -(-len(curves) // across)
        figure = Figure(figsize=(size[0], 1.45 * down + 0.2))
        panels = [*figure.subplots(down, across, sharex=True, sharey=True, squeeze=False).flat]
        for i, (axes, (site, of_site)) in enumerate(zip(panels, curves.items(), strict=False)):
            for arm in SITE_ARMS:
                _draw(axes, [of_site.get(arm, {})], COLOURS[arm], DASHES[0], _WIDTHS[arm] * 0.8)
            axes.set_title(_short(site))
            _by_round(axes)
            axes.tick_params(labelbottom=i + across >= len(curves))
        for axes in panels[len(curves) :]:
            axes.set_visible(False)
        arrange(figure)
    return figure


NAMED_SITES = 60
"""More dots than this have no names: they would lie on each other."""


def sites_figure(result: Result, metric: str, size: tuple[float, float] = WIDE) -> Figure:
    """One dot for each site, the greatest value above: what it gains over training alone, or its score."""
    from matplotlib.figure import Figure

    gained = "local_only" in result.arm_names
    found = sorted(site_values(result, metric).items(), key=lambda pair: pair[1])
    scale = _scale(result, metric) if gained else 1.0
    values = [value * scale for _, value in found]
    colours = [COLOURS["local_only" if gained and v < 0 else "federated"] for v in values]
    named = len(found) <= NAMED_SITES
    with style():
        height = 0.15 * len(found) + 0.8 if named else size[1]
        figure = Figure(figsize=(size[0], height))
        axes = figure.add_subplot()
        places = range(len(found))
        axes.scatter(values, places, c=colours, s=14 if named else 6, linewidths=0)
        name = phrases.metric_name(metric)
        if gained:
            axes.axvline(0, color=COLOURS["muted"], linewidth=0.9, zorder=0.5)
            unit = f"less {name}" if result.is_error(metric) else f"points of {name}"
            axes.set_title(f"Gained by each site, together over alone: {unit}")
        else:
            axes.set_title(f"{phrases.capitalised(name)} at each site")
        axes.set_yticks(
            places if named else [], [_short(site) for site, _ in found] if named else []
        )
        axes.set_ylim(-1, len(found))
        bare(axes, "y")
        arrange(figure)
    return figure


def _short(site: str) -> str:
    """A name that leaves room for the dots."""
    name = phrases.plain(site)
    return name if len(name) <= 16 else f"{name[:15]}\N{HORIZONTAL ELLIPSIS}"


def _strips(
    axes: Axes,
    results: Sequence[
        tuple[Mapping[str, Mapping[str, Interval]], Sequence[Mapping[str, ByMetric]]]
    ],
    rows: Sequence[tuple[str, str, str]],
    metric: str,
    scale: float,
) -> None:
    """results: of each what is known over all its splits, and of each split. rows: (key, name, colour)."""
    axes.set_yticks(range(len(rows)), [name for _, name, _ in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    step = 0.8 / len(results)
    for r, (over_all, of_splits) in enumerate(results):
        for i, (entry, _, colour) in enumerate(rows):
            middle = i + (r - (len(results) - 1) / 2) * step
            found = [split.get(entry, {}).get(metric) for split in of_splits]
            values = [value * scale for value in found if value is not None]
            # Spread by position, not at random: the same result draws the same page.
            heights = [middle + ((j * 2) % 5 - 2) * step * 0.09 for j in range(len(values))]
            marker = "os^D"[r % 4]
            axes.plot(
                values, heights, marker, color=colour, markersize=3, alpha=0.4, markeredgewidth=0
            )
            whole = over_all.get(entry, {}).get(metric)
            if whole is None or whole.mean is None:
                continue
            if whole.ends is not None:
                ends = [end * scale for end in whole.ends]
                axes.plot(ends, [middle, middle], color=colour, linewidth=2.2)
            axes.plot([whole.mean * scale], [middle], marker, color=colour, markersize=6.5)


def with_legend(figure: Figure) -> Figure:
    """The same figure with the names of its arms beside the upper lines, in the order of the tables.

    The page has its legend as text beside the drawing.
    """
    axes = figure.axes[0]
    named = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = [name for name in phrases.ARM_NAMES.values() if name in named]
    with style():
        axes.legend(
            [named[name] for name in names], names, frameon=False, labelcolor=COLOURS["ink"]
        )
    return figure


def shown_in_notebooks(figure: Figure) -> Figure:
    """The same figure with a picture of its own: one made without pyplot has none in a notebook."""

    def picture() -> bytes:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
        return buffer.getvalue()

    figure._repr_png_ = picture  # type: ignore[attr-defined]  # the name IPython asks for
    return figure


def svg(figure: Figure, name: str) -> str:
    """The figure as an `<svg>` element for a page: `name` keeps ids of several apart.

    Sizes come from the view box, colours from CSS variables `--plot-<name>`, the font from the page.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    buffer = io.StringIO()
    with style(salt=name):
        # Not savefig, which draws everything twice.
        canvas = FigureCanvasSVG(figure)
        canvas.print_svg(buffer, metadata=nothing)  # type: ignore[no-untyped-call]  # theirs
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.DOTALL)
    for side in ("width", "height"):
        text = re.sub(rf'(<svg[^>]*?) {side}="[^"]*"', r"\1", text, count=1)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--plot-{variable.replace('_', '-')})")
    return re.sub(r"\n\s*", "\n", text)
