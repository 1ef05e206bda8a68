"""What a run says on the terminal: the header before it, the summary after it, the list of runs.

Everything is built from `rich.text.Text`, never from markup strings, so that a site called `[red]`
prints as it is called. Invariant: nothing is cut short, and no word of a table is broken: on a narrow
screen a table is laid out in another way (`Fitting`). Print with `show`, which also keeps a command or
a hash on one line of output when it is wider than the terminal or the pipe.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fedcore.report import sentences as say
from fedcore.report import tables
from fedcore.report.sentences import Json

SITES_SHOWN = 12
"""More sites than this stay in the report: the screen should show the arms and the sites at once."""

WARNINGS_SHOWN = 6
"""More warnings than this stay in the report: the numbers they are about should be on the screen."""

NAME_KEPT = 24
"""A name of up to this many characters stands on one line whatever the screen is; longer ones fold."""


@dataclass(frozen=True)
class Fitting:
    """The first of `layouts`, each a column of tables, that fits the screen without breaking a cell;
    if none does, the last one, with long names folded."""

    layouts: tuple[tuple[Table, ...], ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for layout in self.layouts:
            if all(_width(console, options, table) <= options.max_width for table in layout):
                return _apart(layout)
        for table in self.layouts[-1]:
            first = table.columns[0]
            name = max(cell_len(str(cell)) for cell in (first.header, *first.cells))
            rest = _width(console, options, table) - name
            table.width = min(rest + name, max(options.max_width, rest + min(name, NAME_KEPT)))
        return _apart(self.layouts[-1])


def _width(console: Console, options: ConsoleOptions, table: Table) -> int:
    """Columns that the table takes where no cell is broken."""
    table.width = None
    return Measurement.get(console, options.update(max_width=10_000), table).maximum


def _apart(layout: Sequence[Table]) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for table in layout:
        parts += [table, Text()]
    return parts[:-1]


def fitted(table: Table) -> Fitting:
    """A single table with nothing cut short, on whatever screen."""
    return Fitting(((table,),))


def show(console: Console, renderable: RenderableType) -> None:
    """Print without cropping: rich would cut commands and hashes at the width of the console.

    Into a pipe or a file without the spaces that fill up a line.
    """
    if console.is_terminal:
        console.print(renderable, crop=False)
        return
    with console.capture() as capture:
        console.print(renderable, crop=False)
    console.file.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def as_text(renderable: RenderableType, width: int = 80) -> str:
    """The same as plain text: no colours, no cropping; tables are laid out for `width` columns."""
    # Neither a terminal nor a notebook, wherever this is called from.
    file = io.StringIO()
    console = Console(
        width=width, file=file, force_terminal=False, force_jupyter=False, color_system=None
    )
    show(console, renderable)
    return file.getvalue().removesuffix("\n")


def header(info: Mapping[str, Any]) -> RenderableType:
    """One line on what runs, two on what it protects against and what not.

    info: `task`, `sites` (ids or a count), `rows` (a count, or {"train", "test"}), `model` (its
    summary), `protection`, `run` (directory), `label`; what is missing is left out.
    """
    sites, rows = info.get("sites"), info.get("rows")
    n_sites = sites if isinstance(sites, int) else len(sites or [])
    n_rows = sum(rows.values()) if isinstance(rows, Mapping) else rows
    facts = [
        f"{n_sites} sites" if n_sites else "",
        f"{n_rows:,} rows" if n_rows else "",
        say.plain(info.get("model") or ""),
        say.plain(info.get("protection") or ""),
        say.plain(info.get("run") or ""),
    ]
    line = Text.assemble((say.plain(info.get("task") or ""), "bold"), ": ")
    line.append(", ".join(fact for fact in facts if fact))
    lines = say.label_lines(dict(info))[:2]
    return Group(line, *(Text(text, style="dim") for text in lines))


def progress(row: Mapping[str, Any], sites: int) -> str:
    """A federated row in a few words: `accuracy 0.811`, `accuracy 0.811, 3 of 4 sites`, without a metric
    `4 of 4 sites, 0.09 s`, or `abandoned at submit: 2 of 4 sites stayed, 3 needed`."""
    if row.get("abandoned"):
        return f"abandoned {say.plain(row['abandoned'])}"
    shown = [f"{k} {v:.3f}" for k, v in row.items() if k in ("auc", "accuracy") and v is not None]
    words, survivors = shown[:1], len(row["survivors"])
    if survivors < sites or not words:
        words.append(f"{survivors} of {sites} sites")
    if not shown and "seconds" in row:
        words.append(say.duration(row["seconds"]))
    return ", ".join(words)


def summary(result: Json, report: Path | str | None = None) -> RenderableType:
    """The end of a run: warnings, the headline, arms, sites, where the loss comes from, cost, and how
    to reproduce it. `report` is the path of the page, if one was written."""
    return Group(
        *_warnings(result),
        Text(say.lost(result)[0], style="bold"),
        Text(),
        *_arms(result),
        *_sources(result),
        *_per_site(result),
        *_facts(result, report),
    )


def compare_summary(result: Json, report: Path | str | None = None) -> RenderableType:
    """The end of a comparison: as `summary`, with means and intervals over seeds x folds."""
    return summary(result, report)


def runs_table(rows: Sequence[Mapping[str, Any]]) -> RenderableType:
    """One line per row of `fedcore.run.list_runs`: `run` (directory), `result` (None: unfinished) and
    `abandoned` (there is nothing to go on with)."""
    if not rows:
        return Text("no runs yet: `fedcore simulate` makes the first", style="dim")
    finished = [row["result"] for row in rows if row["result"] is not None]
    in_points = all(say.unit(r, say.primary_metric(r) or "") for r in finished)
    table = grid("run", "started", "seed", "federated", "points lost" if in_points else "lost")
    for row in rows:
        name, result = row["run"], row["result"]
        if result is None:
            state = "abandoned" if row.get("abandoned") else "not finished"
            table.add_row(Text(say.plain(name)), Text(state, style="dim"))
            continue
        metric = say.primary_metric(result)
        value = (result.get("arms") or {}).get("federated", {}).get(metric)
        seed = (
            f"{result.get('seeds')} x {result.get('folds')}"
            if say.is_comparison(result)
            else result.get("seed")
        )
        table.add_row(
            Text(say.plain(name)),
            Text(say.plain(result.get("started") or say.DASH)[:10]),
            Text(say.plain(seed)),
            Text(f"{say.metric_name(metric)} {say.score(value)}" if metric else say.DASH),
            Text(_lost_in_list(result, metric, in_points)),
        )
    return fitted(table)


def _lost_in_list(result: Json, metric: str | None, in_points: bool) -> str:
    """As `_lost`; with the unit, where not every row of the list has the same."""
    gap = say.gap_of(result, "total", metric) if metric else None
    if metric is None or say.number(gap) is None:
        return say.DASH
    unit = "" if in_points else say.unit(result, metric)
    return f"{_lost(result, metric, gap)} {unit}".rstrip()


def grid(*head: str) -> Table:
    """An empty table: the first column names its rows and may fold, the others are numbers."""
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
        header_style="dim",
    )
    for i, name in enumerate(head):
        table.add_column(
            Text(name),
            justify="left" if i == 0 else "right",
            overflow="fold",
            no_wrap=i > 0,
            vertical="bottom",
        )
    return table


def _warnings(result: Json) -> list[RenderableType]:
    found = Table.grid(padding=(0, 1, 0, 0))
    warnings = say.warnings(result)
    for warning in warnings[:WARNINGS_SHOWN]:
        found.add_row(Text("warning:", style="yellow"), Text(warning, overflow="fold"))
    if more := len(warnings[WARNINGS_SHOWN:]):
        found.add_row("", Text(f"... and {more} more in the report", style="dim"))
    return [found, Text()] if found.rows else []


def _lost(
    result: Json, metric: str, gap: Mapping[str, Any] | None, *, stacked: bool = False
) -> str:
    """`0.12 [-0.90, 1.14]`: brackets, because two of these and two scores share 80 columns.

    stacked: the interval on a line of its own.
    """
    value, (low, high) = say.gap_amount(result, metric, gap), say.bounds(gap)
    if low is None or high is None:
        return value
    if low == high == 0:
        return f"{value} exact"
    ends = (say.amount(result, metric, end) for end in (low, high))
    return f"{value}{chr(10) if stacked else ' '}[{', '.join(ends)}]"


def _in_groups(metrics: Sequence[str], size: int) -> list[Sequence[str]]:
    return [metrics[i : i + size] for i in range(0, len(metrics), size)]


_LAYOUTS = ((2, False), (1, False), (1, True))
"""(metrics to a table, interval on its own line), widest first: two metrics take 80 columns."""


def _arms(result: Json) -> list[RenderableType]:
    metrics, arms = say.ordered_metrics(result), say.arms_of(result)
    if not metrics or not arms:
        return []
    layouts = tuple(
        tuple(_arms_table(result, group, stacked) for group in _in_groups(metrics, size))
        for size, stacked in _LAYOUTS
    )
    return [Fitting(layouts), Text()]


def _arms_table(result: Json, metrics: Sequence[str], stacked: bool) -> Table:
    # An arm without a centralised one to compare with has lost nothing that anybody knows of.
    compared = any(
        tables.lost_cell(result, arm, metric).text not in (say.DASH, "")
        for arm in say.arms_of(result)
        for metric in metrics
    )
    head = []
    for metric in metrics:
        head.append(say.metric_name(metric))
        head += [f"{say.unit(result, metric)} lost".strip()] if compared else []
    table = grid("arm", *head)
    for arm in say.arms_of(result):
        style = "bold" if arm == "federated" else ""
        cells = [say.arm_name(arm)]
        part = say.GAP_OF_ARM.get(arm)
        for metric in metrics:
            score = tables.score_cell(result, arm, metric)
            cells.append(score.sub if score.text == say.DASH and score.sub else score.text)
            if not compared:
                continue
            gap = say.gap_of(result, part, metric) if part else None
            cells.append(
                _lost(result, metric, gap, stacked=stacked)
                if gap
                else tables.lost_cell(result, arm, metric).text
            )
        table.add_row(*(Text(cell, style=style) for cell in cells))
    return table


def _sources(result: Json) -> list[RenderableType]:
    """The parts of the gap for every metric; the total already stands with the arms."""
    metrics = say.ordered_metrics(result)
    parts = [
        part
        for part in ("federation", "quantisation", "protection")
        if any(say.number(say.gap_of(result, part, metric)) is not None for metric in metrics)
    ]
    if not parts:
        return []
    layouts = tuple(
        tuple(_sources_table(result, parts, group, stacked) for group in _in_groups(metrics, size))
        for size, stacked in ((3, False), *_LAYOUTS)
    )
    return [Fitting(layouts), Text()]


def _sources_table(
    result: Json, parts: Sequence[str], metrics: Sequence[str], stacked: bool
) -> Table:
    units = say.in_units([result], metrics)
    table = grid(
        "where it is lost, in points" if units == "in points" else "where it is lost",
        *(
            ", ".join(filter(None, (say.metric_name(m), say.unit(result, m))))
            if units != "in points"
            else say.metric_name(m)
            for m in metrics
        ),
    )
    for part in parts:
        gaps = [_lost(result, m, say.gap_of(result, part, m), stacked=stacked) for m in metrics]
        table.add_row(Text(say.PART_NAMES[part]), *map(Text, gaps))
    return table


def _per_site(result: Json) -> list[RenderableType]:
    metrics = say.ordered_metrics(result)[:2]
    sites = list((result.get("per_site") or {}).items())
    if not sites or not metrics:
        return []
    layouts = tuple(
        tuple(_sites_table(result, group) for group in _in_groups(metrics, size)) for size in (2, 1)
    )
    more = len(sites) - SITES_SHOWN
    note = Text(f"and {say.plural(more, 'more site')} in the report", style="dim")
    return [Fitting(layouts), *([note] if more > 0 else []), Text()]


def _sites_table(result: Json, metrics: Sequence[str]) -> Table:
    sites = list((result.get("per_site") or {}).items())
    alone = say.ran(result, "local_only")
    columns = ("alone", "together", "gained") if alone else ("",)
    head = [
        f"{say.metric_name(metric)}\n{column}".rstrip() if i == 0 else column
        for metric in metrics
        for i, column in enumerate(columns)
    ]
    has_rows = any(values.get("rows") is not None for _, values in sites)
    table = grid("site", *(["rows"] if has_rows else []), *head)
    for site, values in sites[:SITES_SHOWN]:
        cells = [say.plain(site), *([say.count(values.get("rows"))] if has_rows else [])]
        for metric in metrics:
            together = (values.get("federated") or {}).get(metric)
            reason = say.why_missing(metric, values.get("test_rows"))
            if not alone:
                cells.append(say.score(together) if together is not None else reason or say.DASH)
                continue
            gain = say.site_gains(result, metric)[site]
            cells += [say.score((values.get("local_only") or {}).get(metric)), say.score(together)]
            cells.append(
                reason or say.DASH
                if gain is None
                else say.amount(result, metric, gain, signed=True)
            )
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _facts(result: Json, report: Path | str | None) -> list[RenderableType]:
    """Cost and method, then the report, the model's hash and the command that makes it again."""
    found = Table.grid(padding=(0, 1, 0, 0))
    found.add_column(width=9, style="dim")
    found.add_column(overflow="fold")
    if result.get("bytes_up_per_site_round") is not None:
        found.add_row("cost", Text(say.per_site_and_round(result)))
    seconds = result.get("seconds") or {}
    whole = result.get("seconds_total")
    spent = {stage: say.duration(say.number(seconds.get(stage))) for stage in say.STAGES}
    if whole is not None:
        spent["whole run"] = say.duration(say.number(whole))
    # One line for learning and one for protecting, so that neither breaks inside a number.
    for word, shown in (("time", ("train", "evaluate", "whole run")), ("", say.PROTECTION_STAGES)):
        known = [
            f"{stage} {spent[stage]}" for stage in shown if spent.get(stage, say.DASH) != say.DASH
        ]
        if known:
            found.add_row(word, Text(", ".join(known)))
    if method := say.how_measured(result):
        found.add_row("interval", Text(method))
    lines = {
        "report": report,
        "model": result.get("model_sha256"),
        "reproduce": result.get("reproduce"),
    }
    # Outside the table, and never folded: these are copied.
    unbroken = [
        Text.assemble((f"{word:<10}", "dim"), say.plain(text), no_wrap=True, overflow="ignore")
        for word, text in lines.items()
        if text
    ]
    return [*([found] if found.rows else []), *unbroken]
