"""The terminal output of a run: the header before it, the summary after it, the list of runs.

Everything is built from `rich.text.Text`, never from markup strings, so that a site called `[red]`
prints as it is called. Invariant: nothing is cut short, and no word of a table is broken: on a narrow
screen a table is laid out in another way (`Fitting`). Print with `show`, which also keeps a command or
a hash on one line of output when it is wider than the terminal or the pipe.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from fedcore.report import phrases, tables
from fedcore.report import sentences as say
from fedcore.report.phrases import DASH
from fedcore.results import (
    ERRORS,
    ComparisonResult,
    Interval,
    ListedRun,
    Result,
    RoundRow,
    RunResult,
)

SITES_SHOWN = 12
"""More sites than this stay in the report: the screen should show the arms and the sites at once."""

WARNINGS_SHOWN = 6
"""More warnings than this stay in the report: the numbers they are about should be on the screen."""

CLASSES_SHOWN = 6
"""A confusion matrix of more classes than this stays in the report."""

NAME_KEPT = 24
"""A name of up to this many characters is never folded, whatever the width of the screen."""


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
    console.file.flush()


def as_text(renderable: RenderableType, width: int = 80) -> str:
    """The same as plain text: no colours, no cropping; tables are laid out for `width` columns."""
    file = io.StringIO()  # neither a terminal nor a notebook, wherever this is called from
    none: dict[str, Any] = {"force_terminal": False, "force_jupyter": False, "color_system": None}
    show(Console(width=width, file=file, **none), renderable)
    return file.getvalue().removesuffix("\n")


def header(task: str, facts: Iterable[str], label: str) -> RenderableType:
    """One line on what runs, two on what it protects against and what not."""
    line = Text.assemble((phrases.plain(task), "bold"), ": ", ", ".join(map(phrases.plain, facts)))
    return Group(line, *(Text(text, style="dim") for text in say.label_lines(label)[:2]))


def progress(row: RoundRow, sites: int) -> str:
    """A federated row in a few words: its first metric `accuracy 0.811`, `mae 15,540, 3 of 4 sites`, without a
    metric `4 of 4 sites, 0.09 s`, or `abandoned at submit: 2 of 4 sites stayed, 3 needed`."""
    if row.abandoned:
        return f"abandoned {phrases.plain(row.abandoned)}"
    # A simulation's row has the metrics of its task, in their order, in front of the loss.
    names = [*takewhile(lambda name: name != "loss", row)] if "loss" in row else [*row]
    own = set(names) - {"arm", "round"} if "loss" in row else {"auc", "accuracy", *ERRORS}
    shown = [
        f"{phrases.plain(name)} {phrases.score(row.number(name))}"
        for name in names
        if name in own and row.number(name) is not None
    ]
    said, survivors = shown[:1], len(row.survivors)
    if survivors < sites or not said:
        said.append(f"{survivors} of {sites} sites")
    if not shown and "seconds" in row:
        said.append(phrases.duration(row.number("seconds")))
    return ", ".join(said)


def summary(result: Result, report: Path | str | None = None) -> RenderableType:
    """The end of a run or comparison: warnings, the headline, arms, sites, where the loss comes from, cost,
    and how to reproduce it. report: the path of the page, if one was written."""
    return Group(
        *_warnings(result),
        Text(say.lost(result)[0], style="bold"),
        *([Text(said)] if (said := say.converged(result)) else []),
        Text(),
        *_arms(result),
        *_best_rounds(result),
        *_sources(result),
        *_per_site(result),
        *_confusion(result),
        *_facts(result, report),
    )


def runs_table(runs: Sequence[ListedRun]) -> RenderableType:
    """One line per run of `fedcore.experiment.run.list_runs`."""
    finished = [run.result for run in runs if run.result is not None]
    in_points = all(phrases.unit(r, say.primary_metric(r) or "") for r in finished)
    table = grid("run", "started", "seed", "federated", "points lost" if in_points else "lost")
    for run in runs:
        name, result = Text(phrases.plain(run.folder)), run.result
        if result is None:
            state = "abandoned" if run.abandoned else "not finished"
            table.add_row(name, Text(state, style="dim"))
            continue
        seed, score, lost = DASH, DASH, DASH
        if isinstance(result, ComparisonResult):
            seed = f"{result.seeds} x {result.folds}"
        elif isinstance(result, RunResult):
            seed = str(result.seed)
        if metric := say.primary_metric(result):
            score = (
                f"{phrases.metric_name(metric)} {phrases.score(result.score('federated', metric))}"
            )
            gap = result.gap_of("total", metric)
            if gap is not None and gap.mean is not None:
                # With the unit where not every row of the list has the same.
                unit = "" if in_points else phrases.unit(result, metric)
                lost = f"{_lost(result, metric, gap)} {unit}".rstrip()
        started = phrases.plain(result.origin.started or DASH)[:10]
        table.add_row(name, *map(Text, (started, seed, score, lost)))
    return fitted(table)


def grid(*head: str) -> Table:
    """An empty table: the first column names its rows and may fold, the others are numbers."""
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, 1, 0, 0), header_style="dim"
    )  # fmt: skip
    for i, name in enumerate(head):
        side: JustifyMethod = "left" if i == 0 else "right"
        table.add_column(Text(name), justify=side, overflow="fold", no_wrap=i > 0, vertical="bottom")  # fmt: skip
    return table


def _warnings(result: Result) -> list[RenderableType]:
    found = Table.grid(padding=(0, 1, 0, 0))
    for warning in result.warnings[:WARNINGS_SHOWN]:
        found.add_row(
            Text("warning:", style="yellow"), Text(phrases.plain(warning), overflow="fold")
        )
    if more := len(result.warnings[WARNINGS_SHOWN:]):
        found.add_row("", Text(f"... and {more} more in the report", style="dim"))
    return [found, Text()] if found.rows else []


def _lost(result: Result, metric: str, gap: Interval | None, *, stacked: bool = False) -> str:
    """`0.12 [-0.90, 1.14]`: brackets, because two of these and two scores share 80 columns.

    stacked: the interval on a line of its own.
    """
    value = phrases.gap_amount(result, metric, gap)
    if gap is None or gap.ends is None:
        return value
    if gap.ends == (0, 0):
        return f"{value} exact"
    ends = (phrases.amount(result, metric, end) for end in gap.ends)
    return f"{value}{chr(10) if stacked else ' '}[{', '.join(ends)}]"


_LAYOUTS = ((2, False), (1, False), (1, True))
"""(metrics to a table, interval on its own line), widest first: two metrics take 80 columns."""


def _layouts(
    metrics: Sequence[str],
    table: Callable[[Sequence[str], bool], Table],
    layouts: Sequence[tuple[int, bool]] = _LAYOUTS,
) -> Fitting:
    """table: of some of the metrics, with intervals on their own lines or not."""
    return Fitting(
        tuple(
            tuple(table(metrics[i : i + n], stacked) for i in range(0, len(metrics), n))
            for n, stacked in layouts
        )
    )


def _arms(result: Result) -> list[RenderableType]:
    metrics = say.ordered_metrics(result)
    if not metrics or not say.arms_of(result):
        return []
    return [_layouts(metrics, partial(_arms_table, result)), Text()]


def _arms_table(result: Result, metrics: Sequence[str], stacked: bool) -> Table:
    compared = tables.compared(result, metrics)
    head = []
    for metric in metrics:
        head.append(phrases.metric_name(metric))
        head += [f"{phrases.unit(result, metric)} lost".strip()] if compared else []
    table = grid("arm", *head)
    for arm in say.arms_of(result):
        cells, part = [phrases.arm_name(arm)], phrases.GAP_OF_ARM.get(arm, "")
        for metric in metrics:
            cells.append(_text(tables.score_cell(result, arm, metric)))
            if compared and (gap := result.gap_of(part, metric)) is not None:
                cells.append(_lost(result, metric, gap, stacked=stacked))
            elif compared:
                cells.append(tables.lost_cell(result, arm, metric).text)
        style = "bold" if arm == "federated" else ""
        table.add_row(*(Text(cell, style=style) for cell in cells))
    if name := phrases.constant_name(result):
        cells = [name]
        for metric in metrics:
            cells += [tables.constant_cell(result, metric).text, *([""] if compared else [])]
        table.add_row(*(Text(cell, style="dim") for cell in cells))
    return table


def _best_rounds(result: Result) -> list[RenderableType]:
    found: list[RenderableType] = []
    for best in tables.best_rounds([result]):
        table = grid("best by validation", *best.head[1:])
        for row in best.rows:
            style = "bold" if row[0].text == phrases.arm_name("federated") else ""
            table.add_row(*(Text(cell.text, style=style) for cell in row))
        found += [fitted(table), Text()]
    return found


def _text(cell: tables.Cell) -> str:
    """A cell on one line: in place of a dash its reason, of a number nothing beside it."""
    return cell.sub if cell.text == DASH and cell.sub else cell.text


def _sources(result: Result) -> list[RenderableType]:
    """The parts of the gap for every metric; the total is in the table of arms."""
    metrics = say.ordered_metrics(result)
    parts = [
        part
        for part in phrases.PARTS
        if any(result.mean_gap(part, metric) is not None for metric in metrics)
    ]
    if not parts:
        return []
    table = partial(_sources_table, result, parts)
    return [_layouts(metrics, table, ((3, False), *_LAYOUTS)), Text()]


def _sources_table(
    result: Result, parts: Sequence[str], metrics: Sequence[str], stacked: bool
) -> Table:
    names, title = [phrases.metric_name(metric) for metric in metrics], "where it is lost"
    if phrases.in_units([result], metrics) == "in points":
        title += ", in points"
    else:
        units = (phrases.unit(result, metric) for metric in metrics)
        names = [", ".join(filter(None, pair)) for pair in zip(names, units, strict=True)]
    table = grid(title, *names)
    for part in parts:
        gaps = [_lost(result, m, result.gap_of(part, m), stacked=stacked) for m in metrics]
        table.add_row(Text(phrases.PART_NAMES[part]), *map(Text, gaps))
    return table


def _per_site(result: Result) -> list[RenderableType]:
    metrics = say.ordered_metrics(result)[:2]
    if not result.per_site or not metrics:
        return []
    layouts = _layouts(metrics, partial(_sites_table, result), _LAYOUTS[:2])
    more = len(result.per_site) - SITES_SHOWN
    note = Text(f"and {phrases.plural(more, 'more site')} in the report", style="dim")
    return [layouts, *([note] if more > 0 else []), Text()]


def _sites_table(result: Result, metrics: Sequence[str], _stacked: bool) -> Table:
    sites = list(result.per_site.items())
    alone = "local_only" in result.arm_names
    columns = ("alone", "together", "gained") if alone else ("",)
    head = [
        f"{phrases.metric_name(metric)}\n{column}".rstrip() if i == 0 else column
        for metric in metrics
        for i, column in enumerate(columns)
    ]
    has_rows = any(found.rows is not None for _, found in sites)
    table = grid("site", *(["rows"] if has_rows else []), *head)
    for site, found in sites[:SITES_SHOWN]:
        cells = [phrases.plain(site), *([phrases.count(found.rows)] if has_rows else [])]
        for metric in metrics:
            reason = say.why_missing(metric, found.test_rows)
            _, *scores = tables.site_cells(result, found, metric, reason)
            cells += map(_text, scores if alone else scores[1:2])
        table.add_row(*map(Text, cells))
    return table


def _confusion(result: Result) -> list[RenderableType]:
    """The federated model's confusion matrix, where the task asks for it and its classes are few."""
    asked = isinstance(result, RunResult) and result.protected.confusion is not None
    grids = tables.confusion([result]) if asked else []
    if not grids:
        return []
    if len(grids[0].rows) > CLASSES_SHOWN:
        note = f"confusion matrix of {len(grids[0].rows)} classes in the report"
        return [Text(note, style="dim"), Text()]
    table = grid(*grids[0].head)
    for row in grids[0].rows:
        table.add_row(*(Text(cell.text) for cell in row))
    return [fitted(table), Text()]


def _facts(result: Result, report: Path | str | None) -> list[RenderableType]:
    """Cost and method, then the report, the model's hash and the command that makes it again."""
    found = Table.grid(padding=(0, 1, 0, 0))
    found.add_column(width=9, style="dim")
    found.add_column(overflow="fold")
    if result.cost.bytes_up is not None:
        found.add_row("cost", Text(say.per_site_and_round(result)))
    spent = {stage: phrases.duration(spent) for stage, spent in (result.cost.seconds or {}).items()}
    if result.cost.seconds_total is not None:
        found.add_row("wall time", Text(phrases.duration(result.cost.seconds_total)))
    # One line for learning and one for protecting, so that neither breaks inside a number.
    for word, shown in (("site sums", ("train", "evaluate")), ("", phrases.PROTECTION_STAGES)):
        known = [f"{stage} {spent[stage]}" for stage in shown if stage in spent]
        if known:
            found.add_row(word, Text(", ".join(known)))
    if method := say.how_measured(result):
        found.add_row("interval", Text(method))
    hash_, again = say.model_hash(result), result.origin.reproduce
    lines = {"report": report, "model": hash_, "reproduce": again}
    # Outside the table, and never folded: these are copied.
    unbroken = [
        Text.assemble((f"{word:<10}", "dim"), phrases.plain(text), no_wrap=True, overflow="ignore")
        for word, text in lines.items()
        if text
    ]
    return [*([found] if found.rows else []), *unbroken]
