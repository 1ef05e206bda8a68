"""The tables of a report as plain records: each drawing module (HTML, Markdown, LaTeX) lays them out.

Invariant: a cell's text is unescaped plain text; its `sub` is the smaller second line (an interval or
the reason of a dash). One run gives metrics as columns; several runs stand side by side as columns,
in one table per metric.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from decimal import ROUND_UP, Context
from typing import Any

from fedcore.report import sentences as say
from fedcore.report.sentences import Json


@dataclass(frozen=True)
class Cell:
    """One cell: `text` and, under it, `sub`. `number` cells are right-aligned."""

    text: str
    sub: str = ""
    number: bool = True


@dataclass(frozen=True)
class Grid:
    """A titled grid; every row is as long as `head`, and its first cell names it."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def _name(text: str) -> Cell:
    return Cell(text, number=False)


def arms(results: Sequence[Json]) -> list[Grid]:
    """Each arm's metrics over the union of test rows, and what it lost against pooling; without a
    centralised arm only the metrics."""
    metrics = _all(results, say.ordered_metrics)
    note = "Over the union of the sites' test rows."
    if any(_compared(result) for result in results):
        note += f" Lost: {_centralised_minus(results, metrics, 'the arm')}."
    if len(results) == 1:
        result = results[0]
        compared = _compared(result)
        head = ["arm"]
        for metric in metrics:
            head += [say.metric_name(metric), *(["lost"] if compared else [])]
        rows = []
        for arm in say.arms_of(result):
            row = [_name(say.arm_name(arm, result))]
            for metric in metrics:
                row.append(score_cell(result, arm, metric))
                row += [lost_cell(result, arm, metric)] if compared else []
            rows.append(tuple(row))
        return [Grid("Arms", tuple(head), tuple(rows), note)] if rows else []
    found = []
    for metric in metrics:
        rows = []
        for arm in _all(results, say.arms_of):
            cells = [_name(say.arm_name(arm))]
            for result in results:
                score, lost = score_cell(result, arm, metric), lost_cell(result, arm, metric)
                span = f" ({lost.sub})" if lost.sub else ""
                sub = f"lost {lost.text}{span}" if lost.text not in (say.DASH, "") else ""
                cells.append(Cell(score.text, score.sub if score.text == say.DASH else sub))
            rows.append(tuple(cells))
        head = ["arm", *say.run_tags(results)]
        found.append(Grid(f"Arms: {say.metric_name(metric)}", tuple(head), tuple(rows), note))
        note = ""
    return found


def _compared(result: Json) -> bool:
    """Whether anything is known to be lost or kept, so that a column for it says something."""
    return any(
        lost_cell(result, arm, metric).text not in (say.DASH, "")
        for arm in say.arms_of(result)
        for metric in say.metrics_of(result)
    )


def _centralised_minus(results: Sequence[Json], metrics: Sequence[str], other: str) -> str:
    """The direction of a difference in words: an error's is turned round."""
    errors = {m: any(say.is_error(result, m) for result in results) for m in metrics}
    units = say.in_units(results, metrics)
    if all(errors.values()) and errors:
        return f"{other} minus centralised, {units}"
    turned = f", of errors {other} minus centralised" if any(errors.values()) else ""
    return f"centralised minus {other}{turned}, {units}"


def score_cell(result: Json, arm: str, metric: str) -> Cell:
    """An arm's metric; with its interval under it where there are several splits."""
    if not say.ran(result, arm):
        return Cell(say.DASH, "not run")
    value = (result.get("arms") or {}).get(arm, {}).get(metric)
    if say.number(value) is None:
        return Cell(say.DASH, say.why_missing(metric, (result.get("rows") or {}).get("test")))
    span = ""
    if isinstance(value, dict) and value.get("low") is not None and value.get("high") is not None:
        span = f"{say.score(value['low'])} to {say.score(value['high'])}"
    return Cell(say.score(value), span)


def lost_cell(result: Json, arm: str, metric: str) -> Cell:
    """What was lost against the centralised arm, with the interval the result holds for that arm."""
    if arm == "centralised":
        return Cell("")
    part = say.GAP_OF_ARM.get(arm)
    gap = say.gap_of(result, part, metric) if part else None
    if say.number(gap) is not None:
        return Cell(say.gap_amount(result, metric, gap), say.interval(result, metric, gap))
    values = result.get("arms") or {}
    pooled = say.number(values.get("centralised", {}).get(metric))
    reached = say.number(values.get(arm, {}).get(metric))
    return Cell(say.amount(result, metric, say.better_by(result, metric, pooled, reached)))


def per_site(results: Sequence[Json]) -> list[Grid]:
    """Per metric: every site alone and together, and their unweighted mean; together only, where no
    site was trained alone."""
    single = len(results) == 1
    alone = any(say.ran(result, "local_only") for result in results)
    found = []
    for metric in _all(results, say.ordered_metrics):
        rows = []
        for site in _all(results, lambda r: r.get("per_site") or {}):
            cells = [_name(say.plain(site))]
            for result in results:
                values = (result.get("per_site") or {}).get(site, {})
                reason = say.why_missing(metric, values.get("test_rows")) if values else ""
                cells += _site_cells(result, values, metric, reason, single)
            rows.append(tuple(cells))
        if not rows:
            continue
        mean = [_name("site mean")]
        for result in results:
            reason = "not known at every site" if result.get("per_site") else ""
            mean += _site_cells(result, _site_mean(result), metric, reason, single)
        if any(cell.text not in (say.DASH, "") for cell in mean[1:]):
            rows.append(tuple(mean))
        columns = ["test rows", "alone", "together", "gained"] if single else say.run_tags(results)
        if single:
            # A comparison has another number of test rows in every fold.
            tested = any(row[1].text for row in rows)
            kept = [0, *([1] if tested else []), *([2, 3, 4] if alone else [3])]
            rows = [tuple(row[i] for i in kept) for row in rows]
            columns = [columns[i - 1] for i in kept[1:]]
        found.append(
            Grid(say.capitalised(say.metric_name(metric)), ("site", *columns), tuple(rows))
        )
    return found


def per_site_note(results: Sequence[Json]) -> str:
    """What the tables of `per_site` hold."""
    where = "On each site's own test rows."
    if not any(say.ran(result, "local_only") for result in results):
        return f"{where} No site was trained alone. The mean is unweighted."
    metrics = _all(results, say.ordered_metrics)
    errors = any(say.is_error(result, metric) for result in results for metric in metrics)
    units = say.in_units(results, metrics)
    how = "how much better together than alone" if errors else "together minus alone"
    if len(results) > 1:
        return f"{where} Gained ({how}), {units}, and the metric alone -> together. The mean is unweighted."
    return f"{where} Gained: {how}, {units}. The mean is unweighted."


def _site_cells(result: Json, values: Json, metric: str, reason: str, single: bool) -> list[Cell]:
    """reason: why a metric that was measured at this site is unknown."""
    alone = say.number((values.get("local_only") or {}).get(metric))
    together = say.number((values.get("federated") or {}).get(metric))
    gain = say.better_by(result, metric, together, alone)
    if gain is None and not values.get("federated"):
        reason = ""
    gained = Cell(say.amount(result, metric, gain, signed=True), reason if gain is None else "")
    if single:
        tested = values.get("test_rows")
        rows = say.count(tested) if tested is not None else ""
        why = "" if together is not None or say.ran(result, "local_only") else gained.sub
        return [Cell(rows), Cell(say.score(alone)), Cell(say.score(together), why), gained]
    if gain is not None:
        return [Cell(gained.text, f"{say.score(alone)} -> {say.score(together)}")]
    if together is not None and not say.ran(result, "local_only"):
        return [Cell(say.DASH, f"{say.score(together)}, alone not run")]
    return [gained]


def _site_mean(result: Json) -> Json:
    """The unweighted mean over sites, by arm; computed here only where the result leaves it out."""
    if result.get("site_mean"):
        return {arm: result["site_mean"].get(arm) or {} for arm in ("local_only", "federated")}
    sites = list((result.get("per_site") or {}).values())
    mean: Json = {}
    for arm in ("local_only", "federated"):
        mean[arm] = {}
        for metric in say.metrics_of(result):
            found = [say.number((site.get(arm) or {}).get(metric)) for site in sites]
            known = [value for value in found if value is not None]
            # A mean over some of the sites would not compare with one over all of them.
            mean[arm][metric] = (
                sum(known) / len(known) if known and len(known) == len(found) else None
            )
    return mean


def sources(results: Sequence[Json]) -> list[Grid]:
    """Where the loss comes from: total = federation + quantisation + protection."""
    metrics = _all(results, say.ordered_metrics)
    note = (
        f"{say.capitalised(say.in_units(results, metrics))}, positive = lost. Federation: centralised against "
        "float averaging. Quantisation: float against integers. "
        "Protection: integers against protected integers, which must be exactly 0."
    )
    if len(results) == 1:
        head = ("part", *(say.metric_name(metric) for metric in metrics))
        rows = _parts([(results[0], metric) for metric in metrics])
        return [Grid("Where the loss comes from", head, rows, note)] if rows else []
    found = []
    for metric in metrics:
        rows = _parts([(result, metric) for result in results])
        title = f"Where the loss comes from: {say.metric_name(metric)}"
        if rows:
            found.append(Grid(title, ("part", *say.run_tags(results)), rows, note))
            note = ""
    return found


def _parts(columns: Sequence[tuple[Json, str]]) -> tuple[tuple[Cell, ...], ...]:
    rows = []
    for part, name in say.PART_NAMES.items():
        gaps = [say.gap_of(result, part, metric) for result, metric in columns]
        if any(say.number(gap) is not None for gap in gaps):
            cells = [
                Cell(say.gap_amount(result, metric, gap), say.interval(result, metric, gap))
                for (result, metric), gap in zip(columns, gaps, strict=True)
            ]
            rows.append((_name(name), *cells))
    return tuple(rows)


def protected(results: Sequence[Json]) -> list[Grid]:
    """The final metrics as sites know them, from protected sums, beside the exact ones.

    They differ where a sum keeps less than the rows do: AUC comes from a histogram of scores. Where
    the result states a bound on that difference, or how many values were clipped, both are shown.
    """
    metrics = [
        metric
        for metric in _all(results, say.ordered_metrics)
        if any(
            say.number((r.get("protected_metrics") or {}).get(metric)) is not None for r in results
        )
    ]
    rows = []
    for metric in metrics:
        cells = []
        for result in results:
            exact = say.score(((result.get("arms") or {}).get("federated") or {}).get(metric))
            summed = say.score((result.get("protected_metrics") or {}).get(metric))
            known = [_bound(result, metric), _clipped(result, metric)]
            cells += (
                [Cell(exact), Cell(summed, ", ".join(filter(None, known)))]
                if len(results) == 1
                else [Cell(summed, ", ".join(filter(None, [f"exact {exact}", *known])))]
            )
        rows.append((_name(say.metric_name(metric)), *cells))
    head = ("metric", *(["exact", "from the sum"] if len(results) == 1 else say.run_tags(results)))
    note = "Of the federated model. Outside a simulation only the protected sum is known."
    if any(_some_left(result) for result in results):
        note += " The sum is of the sites that stayed, the exact value of all."
    return [Grid("Metrics through the protected sum", head, tuple(rows), note)] if rows else []


def _some_left(result: Json) -> bool:
    """Whether the metrics-only round is of fewer sites than the run."""
    everyone = result.get("sites") or []
    return len(result.get("protected_metrics_sites") or everyone) < len(everyone)


def _bound(result: Json, metric: str) -> str:
    """`± 0.0039`: two digits, rounded up, since a bound rounded down bounds nothing. Where sites left
    it is no bound on the difference to all sites' value."""
    found = say.number((result.get("protected_metrics_bound") or {}).get(metric))
    if found is None or _some_left(result):
        return ""
    two_digits = Context(prec=2, rounding=ROUND_UP).create_decimal(repr(found))
    return f"± {float(two_digits):.2g}"


def _clipped(result: Json, metric: str) -> str:
    found = say.number((result.get("protected_clipped") or {}).get(metric))
    return "" if found is None else f"{say.count(found)} clipped"


def cost(results: Sequence[Json]) -> list[Grid]:
    """Seconds by stage over the whole run, bytes per site and round, and peak memory."""
    lines: list[tuple[str, Callable[[Json], str]]] = [
        (stage, lambda r, s=stage: say.duration(say.number((r.get("seconds") or {}).get(s))))  # type: ignore[misc]
        for stage in say.STAGES
    ]
    lines += [
        ("whole run, all arms", lambda r: say.duration(say.number(r.get("seconds_total")))),
        (
            "sent per site and round",
            lambda r: say.size(say.number(r.get("bytes_up_per_site_round"))),
        ),
        (
            "received per site and round",
            lambda r: say.size(say.number(r.get("bytes_down_per_site_round"))),
        ),
        ("ciphertexts sent per site and round", lambda r: say.count(r.get("ciphertexts_up"))),
        ("peak memory", lambda r: _memory(r.get("peak_memory_mb"))),
        ("coordinates clipped", lambda r: _share(r.get("clipped_fraction"))),
    ]
    staged = any(result.get("seconds") for result in results)
    note = "Stages: the federated arm, summed over rounds and sites." if staged else ""
    return _side_by_side("Cost by stage" if staged else "Cost", results, lines, note)


def _memory(megabytes: Any) -> str:
    found = say.number(megabytes)
    return say.DASH if found is None else f"{found:,.0f} MB"


def _share(fraction: Any) -> str:
    found = say.number(fraction)
    return say.DASH if found is None else "none" if found == 0 else f"{found * 100:.2g} %"


def budgets(results: Sequence[Json]) -> list[Grid]:
    """Gradient steps and examples seen per arm: equal budgets are what makes the arms comparable."""
    single = len(results) == 1
    head = ("arm", *(["gradient steps", "examples seen"] if single else say.run_tags(results)))
    rows = []
    for arm in _all(results, say.arms_of):
        row = [_name(say.arm_name(arm))]
        for result in results:
            if not say.ran(result, arm):
                row.append(Cell(say.DASH, "not run"))
                continue
            values = result["arms"][arm]
            steps, seen = (
                say.count(values.get(key)) for key in ("gradient_steps", "examples_seen")
            )
            row += (
                [Cell(steps), Cell(seen)]
                if single
                else [Cell(f"{steps} steps", f"{seen} examples")]
            )
        rows.append(tuple(row))
    known = any(
        (a.get("gradient_steps") is not None)
        for r in results
        for a in (r.get("arms") or {}).values()
    )
    return [Grid("Budgets", head, tuple(rows))] if known else []


def sites(results: Sequence[Json]) -> list[Grid]:
    """Rows and classes of every site; the rows are of the data, so the first result speaks for all.

    Of a single run in which sites were absent also how many rounds' sums each of them was in.
    """
    first, found = results[0], []
    absent = len(results) == 1 and bool(first.get("absences"))
    for site, values in (first.get("per_site") or {}).items():
        if values.get("rows") is None:
            continue
        classes = values.get("class_counts") or {}
        counts = ", ".join(f"{say.plain(name)}: {say.count(n)}" for name, n in classes.items())
        numbers = [Cell(say.count(values.get(k))) for k in ("rows", "train_rows", "test_rows")]
        if absent:
            of = f"{say.count(values.get('rounds_in_sum'))} of {say.count(first.get('rounds'))}"
            numbers.append(Cell(of))
        found.append((_name(say.plain(site)), *numbers, _name(counts or say.DASH)))
    head = ("site", "rows", "train", "test", *(["rounds in the sum"] if absent else []))
    return [Grid("Sites", (*head, "rows per class"), tuple(found))] if found else []


def plan(results: Sequence[Json]) -> list[Grid]:
    """Everything the sites and the coordinator agreed on, key by key."""
    return _keys("Plan", "plan", results, leave_out=("label", "sites", "train", "packing"))


def training(results: Sequence[Json]) -> list[Grid]:
    """The job's training settings."""
    return _keys("Training", "train", results)


def environment(results: Sequence[Json]) -> list[Grid]:
    """Versions and machine."""
    return _keys("Environment", "environment", results)


def statistics(results: Sequence[Json]) -> list[Grid]:
    """What the first result's columns were scaled by: one row per column, or key by key."""
    found = results[0].get("statistics")
    if not isinstance(found, dict) or not found:
        return []
    columns = found.get("names")
    if not isinstance(columns, list):
        return _keys("Federated statistics", "statistics", results[:1])
    if not columns:  # a table of categories only standardises nothing
        return []
    title, note = (
        "Federated statistics",
        "Over the sites' training rows, through the protected sum.",
    )
    wanted: tuple[str, ...] = ("mean", "std", "count", "sites", "clipped")
    if say.scaled_by_ranges(results[0]):
        title, wanted = "Scale of the columns", ("mean", "std")
        note = "From the public ranges that the task declares: nothing of any row was sent for it."
    keys = [key for key in wanted if len(found.get(key) or []) == len(columns)]
    rows = [
        (_name(say.plain(column)), *(Cell(_short(found[key][i])) for key in keys))
        for i, column in enumerate(columns)
    ]
    return [Grid(title, ("column", *keys), tuple(rows), note)]


def _short(value: Any) -> str:
    """Four digits, so that a row of statistics fits a phone; result.json has all of them."""
    return f"{value:.4g}" if isinstance(value, float) else say.count(value)


def _keys(
    title: str, key: str, results: Sequence[Json], leave_out: Sequence[str] = ()
) -> list[Grid]:
    """One row per key. `leave_out`: keys that stand elsewhere on the page."""
    kept = [{k: v for k, v in (r.get(key) or {}).items() if k not in leave_out} for r in results]
    flat = [dict(_flatten(found)) for found in kept]
    names = _all(flat, lambda d: d)
    rows = [
        (_name(name), *(Cell(found.get(name, say.DASH), number=False) for found in flat))
        for name in names
    ]
    head = ["key", *(["value"] if len(results) == 1 else say.run_tags(results))]
    return [Grid(title, tuple(head), tuple(rows))] if rows else []


def _flatten(value: Json, prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, item in value.items():
        name = prefix + say.plain(key)
        if isinstance(item, dict):
            yield from _flatten(item, name + ".")
        else:
            yield name, _value(item)


def _value(item: Any) -> str:
    if isinstance(item, dict):
        return " ".join(f"{say.plain(key)} {_value(part)}" for key, part in item.items())
    if isinstance(item, list):
        return ", ".join(_value(i) for i in item) or say.DASH
    if item is None or item == "":
        return say.DASH
    if isinstance(item, bool):
        return "yes" if item else "no"
    return f"{item:.6g}" if isinstance(item, float) else say.plain(item)


def _side_by_side(
    title: str,
    results: Sequence[Json],
    lines: Iterable[tuple[str, Callable[[Json], str]]],
    note: str,
) -> list[Grid]:
    rows = []
    for name, text in lines:
        cells = [text(result) for result in results]
        if any(cell != say.DASH for cell in cells):
            rows.append((_name(name), *(Cell(cell) for cell in cells)))
    head = ["", *([""] if len(results) == 1 else say.run_tags(results))]
    return [Grid(title, tuple(head), tuple(rows), note)] if rows else []


def _all(results: Sequence[Json], of: Callable[[Json], Iterable[str]]) -> list[str]:
    """The union over results, in order of first appearance."""
    return list(dict.fromkeys(item for result in results for item in of(result)))
