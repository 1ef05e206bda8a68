"""What a run says on the terminal: the header before it, the summary after it, the list of runs.

Everything is built from `rich.text.Text`, never from markup strings, so that a site called `[red]`
prints as it is called. Invariant: nothing is cut short. Print with `show`, which also keeps a command
or a hash on one line of output when it is wider than the terminal or the pipe.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedcore.report import sentences as say
from fedcore.report import tables
from fedcore.report.sentences import Json

SITES_SHOWN = 12
"""More sites than this stay in the report: the screen should show the arms and the sites at once."""


def show(console: Console, renderable: RenderableType) -> None:
    """Print without cropping: rich would cut commands and hashes at the width of the console."""
    console.print(renderable, crop=False)


def as_text(renderable: RenderableType, width: int = 80) -> str:
    """The same as plain text: no colours, no cropping; tables are laid out for `width` columns."""
    # Neither a terminal nor a notebook, wherever this is called from.
    file = io.StringIO()
    console = Console(
        width=width, file=file, force_terminal=False, force_jupyter=False, color_system=None
    )
    show(console, renderable)
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


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
    """One line per row of `fedcore.run.list_runs`: `run` (directory) and `result` (None: unfinished)."""
    if not rows:
        return Text("no runs yet: `fedcore simulate` makes the first", style="dim")
    table = _grid("run", "started", "seed", "federated", "points lost")
    for row in rows:
        name, result = row["run"], row["result"]
        if result is None:
            table.add_row(Text(say.plain(name)), Text("not finished", style="dim"))
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
            Text(_lost(say.gap_of(result, "total", metric) if metric else None)),
        )
    return table


def _grid(*head: str) -> Table:
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=(0, 1, 0, 0),
        header_style="dim",
    )
    for i, name in enumerate(head):
        table.add_column(
            Text(name), justify="left" if i == 0 else "right", overflow="fold", vertical="bottom"
        )
    return table


def _warnings(result: Json) -> list[RenderableType]:
    found = Table.grid(padding=(0, 1, 0, 0))
    for warning in say.warnings(result):
        found.add_row(Text("warning:", style="yellow"), Text(warning, overflow="fold"))
    return [found, Text()] if found.rows else []


def _lost(gap: Mapping[str, Any] | None) -> str:
    """`0.12 [-0.90, 1.14]`: brackets, because two of these and two scores share 80 columns."""
    value, (low, high) = say.gap_points(gap), say.bounds(gap)
    if low is None or high is None:
        return value
    return (
        f"{value} exact" if low == high == 0 else f"{value} [{say.points(low)}, {say.points(high)}]"
    )


def _arms(result: Json) -> list[RenderableType]:
    """Two metrics to a table, which is what 80 columns hold."""
    metrics = say.ordered_metrics(result)
    found: list[RenderableType] = []
    for pair in (metrics[i : i + 2] for i in range(0, len(metrics), 2)):
        head = [part for metric in pair for part in (say.metric_name(metric), "points lost")]
        table = _grid("arm", *head)
        for arm in say.arms_of(result):
            style = "bold" if arm == "federated" else ""
            cells = [say.arm_name(arm)]
            part = say.GAP_OF_ARM.get(arm)
            for metric in pair:
                score = tables.score_cell(result, arm, metric)
                cells.append(score.sub if score.text == say.DASH and score.sub else score.text)
                gap = say.gap_of(result, part, metric) if part else None
                cells.append(_lost(gap) if gap else tables.lost_cell(result, arm, metric).text)
            table.add_row(*(Text(cell, style=style) for cell in cells))
        found += [table, Text()]
    return found


def _sources(result: Json) -> list[RenderableType]:
    """The parts of the gap for every metric; the total already stands with the arms."""
    metrics = say.ordered_metrics(result)
    found: list[RenderableType] = []
    for pair in (metrics[i : i + 3] for i in range(0, len(metrics), 3)):
        table = _grid("where it is lost, in points", *(say.metric_name(metric) for metric in pair))
        for part in ("federation", "quantisation", "protection"):
            gaps = [say.gap_of(result, part, metric) for metric in pair]
            if any(say.number(gap) is not None for gap in gaps):
                table.add_row(Text(say.PART_NAMES[part]), *(Text(_lost(gap)) for gap in gaps))
        if table.rows:
            found += [table, Text()]
    return found


def _per_site(result: Json) -> list[RenderableType]:
    metrics = say.ordered_metrics(result)[:2]
    sites = list((result.get("per_site") or {}).items())
    if not sites or not metrics:
        return []
    head = [
        part for m in metrics for part in (f"{say.metric_name(m)}\nalone", "together", "gained")
    ]
    has_rows = any(values.get("rows") is not None for _, values in sites)
    table = _grid("site", *(["rows"] if has_rows else []), *head)
    for site, values in sites[:SITES_SHOWN]:
        cells = [say.plain(site), *([say.count(values.get("rows"))] if has_rows else [])]
        for metric in metrics:
            gain = say.site_gains(result, metric)[site]
            reason = say.why_missing(metric, values) if gain is None else ""
            cells += [
                say.score((values.get(arm) or {}).get(metric))
                for arm in ("local_only", "federated")
            ]
            cells.append(reason or say.points(gain, signed=True))
        table.add_row(*(Text(cell) for cell in cells))
    more = len(sites) - SITES_SHOWN
    note = (
        [Text(f"and {say.plural(more, 'more site')} in the report", style="dim")]
        if more > 0
        else []
    )
    return [table, *note, Text()]


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
