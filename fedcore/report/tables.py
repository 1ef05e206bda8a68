"""The tables of a report as plain records: each drawing module (HTML, Markdown, LaTeX) lays them out.

Invariant: a cell's text is unescaped plain text; its `sub` is the smaller second line (an interval or
the reason of a dash). One run gives metrics as columns; several runs stand side by side as columns,
in one table per metric.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import ROUND_UP, Context
from typing import Any

from fedcore.report import phrases
from fedcore.report import sentences as say
from fedcore.report.methods import scaled_by_ranges
from fedcore.report.phrases import DASH
from fedcore.results import ComparisonResult, Interval, Result, RunResult, SiteResult

_CONSTANTS = {
    "class": "always the most frequent class of the training rows",
    "mean": "always the mean of the training targets",
}


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


def _table(
    title: str, head: Iterable[str], rows: Sequence[tuple[Cell, ...]], note: str = ""
) -> list[Grid]:
    return [Grid(title, tuple(head), tuple(rows), note)] if rows else []


def _columns(results: Sequence[Result], *of_one: str) -> list[str]:
    """Heads of the columns after the first: those of a single run, else one for each run."""
    return list(of_one) if len(results) == 1 else say.run_tags(results)


def arms(results: Sequence[Result]) -> list[Grid]:
    """Each arm's metrics over the union of test rows, and what it lost against pooling; without a
    centralised arm only the metrics."""
    metrics = _all(results, say.ordered_metrics)
    known = any(compared(result, result.metrics) for result in results)
    note = "Over the union of the sites' test rows."
    if known:
        note += f" Lost: {_centralised_minus(results, metrics, 'the arm')}."
    if what := {r.constant.predicts for r in results if r.constant is not None}:
        note += f" Last row: {phrases.listed(map(_CONSTANTS.__getitem__, sorted(what)))}, which an arm must beat."
    if len(results) == 1:
        result, head, rows = results[0], ["arm"], []
        for metric in metrics:
            head += [phrases.metric_name(metric), *(["lost"] if known else [])]
        for arm in say.arms_of(result):
            row = [_name(phrases.arm_name(arm, result))]
            for metric in metrics:
                row.append(score_cell(result, arm, metric))
                row += [lost_cell(result, arm, metric)] if known else []
            rows.append(tuple(row))
        if name := phrases.constant_name(result):
            row = [_name(name)]
            for metric in metrics:
                row += [constant_cell(result, metric), *([Cell("")] if known else [])]
            rows.append(tuple(row))
        return _table("Arms", head, rows, note)
    found: list[Grid] = []
    for metric in metrics:
        rows = [
            (_name(phrases.arm_name(arm)), *(_score_and_lost(r, arm, metric) for r in results))
            for arm in _all(results, say.arms_of)
        ]
        names = [*filter(None, dict.fromkeys(map(phrases.constant_name, results)))]
        rows += [
            (_name(name), *(_constant_named(result, name, metric) for result in results))
            for name in names
        ]
        title = f"Arms: {phrases.metric_name(metric)}"
        found += _table(title, ["arm", *say.run_tags(results)], rows, "" if found else note)
    return found


def _score_and_lost(result: Result, arm: str, metric: str) -> Cell:
    score, lost = score_cell(result, arm, metric), lost_cell(result, arm, metric)
    if score.text == DASH or lost.text in (DASH, ""):
        return Cell(score.text, score.sub if score.text == DASH else "")
    return Cell(score.text, f"lost {lost.text}" + (f" ({lost.sub})" if lost.sub else ""))


def compared(result: Result, metrics: Iterable[str]) -> bool:
    """Whether any of these metrics is known to be lost or kept by any arm: else a column for it is empty."""
    return any(
        lost_cell(result, arm, metric).text not in (DASH, "")
        for metric in metrics
        for arm in say.arms_of(result)
    )


def _centralised_minus(results: Sequence[Result], metrics: Sequence[str], other: str) -> str:
    """The direction of a difference in words: an error's is turned round."""
    errors = {m: any(result.is_error(m) for result in results) for m in metrics}
    units = phrases.in_units(results, metrics)
    if all(errors.values()) and errors:
        return f"{other} minus centralised, {units}"
    turned = f", of errors {other} minus centralised" if any(errors.values()) else ""
    return f"centralised minus {other}{turned}, {units}"


def score_cell(result: Result, arm: str, metric: str) -> Cell:
    """An arm's metric; with its interval under it where there are several splits."""
    if arm not in result.arm_names:
        return Cell(DASH, "not run")
    value = result.score(arm, metric)
    if value is None:
        return Cell(DASH, say.why_missing(metric, say.rows_tested(result)))
    ends = result.arms[arm][metric].ends if isinstance(result, ComparisonResult) else None
    span = " to ".join(map(phrases.score, ends)) if ends is not None else ""
    return Cell(phrases.score(value), span)


def constant_cell(result: Result, metric: str) -> Cell:
    """What the constant prediction reaches: an arm below it learnt nothing."""
    found = result.constant.metrics if result.constant is not None else {}
    return Cell(phrases.score(found.get(metric)))


def _constant_named(result: Result, name: str, metric: str) -> Cell:
    return constant_cell(result, metric) if phrases.constant_name(result) == name else Cell(DASH)


def lost_cell(result: Result, arm: str, metric: str) -> Cell:
    """What was lost against the centralised arm, with its interval if the result has one."""
    if arm == "centralised":
        return Cell("")
    part = phrases.GAP_OF_ARM.get(arm)
    gap = result.gap_of(part, metric) if part else None
    if gap is not None and gap.mean is not None:
        return _gap_cell(result, metric, gap)
    pooled, reached = result.score("centralised", metric), result.score(arm, metric)
    return Cell(phrases.amount(result, metric, result.better_by(metric, pooled, reached)))


def _gap_cell(result: Result, metric: str, gap: Interval | None) -> Cell:
    return Cell(phrases.gap_amount(result, metric, gap), phrases.interval(result, metric, gap))


def best_rounds(results: Sequence[Result]) -> list[Grid]:
    """The round in which each arm was best on the validation rows, and what it reached there; empty where no rows
    were kept apart to judge by."""
    judged = [result for result in results if result.best]
    metrics = _all(judged, say.ordered_metrics)
    rows: list[tuple[Cell, ...]] = []
    for arm in _all(judged, lambda r: [a for a in say.arms_of(r) if a in (r.best or {})]):
        cells = [_name(phrases.arm_name(arm))]
        for result in judged:
            found, first = (result.best or {}).get(arm), say.ordered_metrics(result)[0]
            if found is None:
                cells.append(Cell(DASH))
                continue
            at, apart = (
                f"{found.round:.1f}".removesuffix(".0"),
                phrases.score(found.validation.get(first)),
            )
            scores = [phrases.score(found.metrics.get(metric)) for metric in metrics]
            single = [Cell(at), Cell(apart), *map(Cell, scores)]
            cells += single if len(judged) == 1 else [Cell(f"round {at}", scores[0])]
        rows.append(tuple(cells))
    note = (
        "The round was chosen by the validation rows, which no arm trains on; the scores after it are over the test "
        "rows, which chose nothing."
    )
    if any(result.kept for result in judged):
        note += " All other tables, and the released model, are of these rounds."
    names = list(map(phrases.metric_name, metrics))
    head = ["round", *(f"validation {name}" for name in names[:1]), *names]
    columns = head if len(judged) == 1 else say.run_tags(judged)
    return _table("Best round by the validation rows", ["arm", *columns], rows, note)


def per_site(results: Sequence[Result]) -> list[Grid]:
    """Per metric: every site alone and together, and their unweighted mean; together only, where no
    site was trained alone."""
    single = len(results) == 1
    cells_of = site_cells if single else lambda *site: [_gained(*site)]
    alone = any("local_only" in result.arm_names for result in results)
    found: list[Grid] = []
    for metric in _all(results, say.ordered_metrics):
        rows = []
        for site in _all(results, lambda r: r.per_site):
            cells = [_name(phrases.plain(site))]
            for result in results:
                values = result.per_site.get(site, SiteResult())
                reason = say.why_missing(metric, values.test_rows)
                cells += cells_of(result, values, metric, reason)
            rows.append(tuple(cells))
        if not rows:
            continue
        mean = [_name("site mean")]
        for result in results:
            reason = "not known at every site" if result.per_site else ""
            mean += cells_of(result, _site_mean(result), metric, reason)
        if any(cell.text not in (DASH, "") for cell in mean[1:]):
            rows.append(tuple(mean))
        head = ["site", *_columns(results, "test rows", "alone", "together", "gained")]
        if single:
            # A comparison has another number of test rows in every fold.
            tested = any(row[1].text for row in rows)
            kept = [0, *([1] if tested else []), *([2, 3, 4] if alone else [3])]
            rows = [tuple(row[i] for i in kept) for row in rows]
            head = [head[i] for i in kept]
        found += _table(phrases.capitalised(phrases.metric_name(metric)), head, rows)
    return found


def per_site_note(results: Sequence[Result]) -> str:
    """What the tables of `per_site` hold."""
    where = "On each site's own test rows."
    if not any("local_only" in result.arm_names for result in results):
        return f"{where} No site was trained alone. The mean is unweighted."
    metrics = _all(results, say.ordered_metrics)
    errors = any(result.is_error(metric) for result in results for metric in metrics)
    units = phrases.in_units(results, metrics)
    how = "how much better together than alone" if errors else "together minus alone"
    if len(results) > 1:
        return f"{where} Gained ({how}), {units}, and the metric alone -> together. The mean is unweighted."
    return f"{where} Gained: {how}, {units}. The mean is unweighted."


def site_cells(result: Result, values: SiteResult, metric: str, reason: str) -> list[Cell]:
    """Test rows, alone, together and gained of a site. reason: why a metric that was measured there is unknown."""
    alone = values.arms.get("local_only", {}).get(metric)
    together = values.arms.get("federated", {}).get(metric)
    gain = result.better_by(metric, together, alone)
    if gain is not None or not values.arms.get("federated"):
        reason = ""
    rows = phrases.count(values.test_rows) if values.test_rows is not None else ""
    why = "" if together is not None or "local_only" in result.arm_names else reason
    gained = Cell(phrases.amount(result, metric, gain, signed=True), reason)
    return [Cell(rows), Cell(phrases.score(alone)), Cell(phrases.score(together), why), gained]


def _gained(result: Result, values: SiteResult, metric: str, reason: str) -> Cell:
    """What a site gained and, under it, from which score to which."""
    _, alone, together, gained = site_cells(result, values, metric, reason)
    if DASH not in (alone.text, together.text):
        return Cell(gained.text, f"{alone.text} -> {together.text}")
    if together.text != DASH and "local_only" not in result.arm_names:
        return Cell(DASH, f"{together.text}, alone not run")
    return gained


def _site_mean(result: Result) -> SiteResult:
    """The unweighted mean over sites, by arm; computed here only where the result leaves it out."""
    arms = ("local_only", "federated")
    if isinstance(result, RunResult) and result.site_mean:
        return SiteResult(arms={arm: result.site_mean.get(arm, {}) for arm in arms})

    def mean(arm: str, metric: str) -> float | None:
        found = [result.site_score(site, arm, metric) for site in result.per_site]
        known = [value for value in found if value is not None]
        # A mean over some of the sites would not compare with one over all of them.
        return sum(known) / len(known) if known and len(known) == len(found) else None

    return SiteResult(arms={arm: {m: mean(arm, m) for m in result.metrics} for arm in arms})


def sources(results: Sequence[Result]) -> list[Grid]:
    """Where the loss comes from: total = federation + quantisation + privacy + protection."""
    metrics = _all(results, say.ordered_metrics)
    private = any(
        result.mean_gap("privacy", metric) is not None for result in results for metric in metrics
    )
    noise = "Privacy: clipped and rounded against the same with noise. " if private else ""
    note = (
        f"{phrases.capitalised(phrases.in_units(results, metrics))}, positive = lost. Federation: centralised against "
        f"float averaging. Quantisation: float against integers. {noise}"
        "Protection: integers against protected integers, which must be exactly 0."
    )
    title = "Where the loss comes from"
    if len(results) == 1:
        head = ["part", *map(phrases.metric_name, metrics)]
        return _table(title, head, _parts([(results[0], metric) for metric in metrics]), note)
    found: list[Grid] = []
    for metric in metrics:
        rows, name = _parts([(result, metric) for result in results]), phrases.metric_name(metric)
        head = ["part", *say.run_tags(results)]
        found += _table(f"{title}: {name}", head, rows, "" if found else note)
    return found


def _parts(columns: Sequence[tuple[Result, str]]) -> list[tuple[Cell, ...]]:
    return [
        (_name(name), *(_gap_cell(r, metric, r.gap_of(part, metric)) for r, metric in columns))
        for part, name in phrases.PART_NAMES.items()
        if any(result.mean_gap(part, metric) is not None for result, metric in columns)
    ]


def protected(results: Sequence[Result]) -> list[Grid]:
    """The final metrics from protected sums, as the sites have them, beside the exact ones.

    They differ where a sum keeps less than the rows do: AUC comes from a histogram of scores. Where
    the result states a bound on that difference, or how many values were clipped, both are shown.
    """
    runs = [result for result in results if isinstance(result, RunResult)]
    metrics = [
        metric
        for metric in _all(runs, say.ordered_metrics)
        if any((run.protected.metrics or {}).get(metric) is not None for run in runs)
    ]
    rows = []
    for metric in metrics:
        cells = [_name(phrases.metric_name(metric))]
        for result in runs:
            exact = phrases.score(result.score("federated", metric))
            summed = phrases.score((result.protected.metrics or {}).get(metric))
            clipped = (result.protected.clipped or {}).get(metric)
            why = "" if clipped is None else f"{phrases.count(clipped)} clipped"
            known = [*filter(None, (_bound(result, metric), why))]
            if len(runs) == 1:
                cells += [Cell(exact), Cell(summed, ", ".join(known))]
            else:
                cells.append(Cell(summed, ", ".join([f"exact {exact}", *known])))
        rows.append(tuple(cells))
    note = "Of the federated model. Outside a simulation only the protected sum is known."
    if any(map(_some_left, runs)):
        note += " The sum is of the sites that stayed, the exact value of all."
    head = ["metric", *_columns(runs, "exact", "from the sum")]
    return _table("Metrics through the protected sum", head, rows, note)


def _some_left(result: RunResult) -> bool:
    """Whether the metrics-only round is of fewer sites than the run."""
    return len(result.protected.sites or result.sites) < len(result.sites)


def _bound(result: RunResult, metric: str) -> str:
    """`± 0.0039`: two digits, rounded up, since a bound rounded down bounds nothing. Where sites left
    it is no bound on the difference to all sites' value."""
    found = (result.protected.bound or {}).get(metric)
    if found is None or _some_left(result):
        return ""
    two_digits = Context(prec=2, rounding=ROUND_UP).create_decimal(repr(found))
    return f"± {float(two_digits):.2g}"


def confusion(results: Sequence[Result]) -> list[Grid]:
    """Of each run whose task has classes: rows of each true class, by the class that the federated model predicts."""
    found: list[Grid] = []
    tags = [f": {tag}" for tag in say.run_tags(results)] if len(results) > 1 else [""]
    for tag, result in zip(tags, results, strict=True):
        if not isinstance(result, RunResult) or "federated" not in result.arms:
            continue
        if (matrix := result.arms["federated"].confusion) is None:
            continue
        note = "Test rows of all sites of each true class, by the class that the federated model predicts."
        if (summed := result.protected.confusion) is not None and not _some_left(result):
            same = "gives the same counts" if summed == matrix else "gives other counts"
            note += f" The protected sum {same}."
        elif summed is not None:
            note += f" The protected sum, of the sites that stayed, counts {sum(map(sum, summed)):,} rows."
        rows = [
            (
                _name(str(true)),
                *(Cell(phrases.count(n)) for n in row),
                Cell(_share_right(row, true)),
            )
            for true, row in enumerate(matrix)
        ]
        head = ("true class", *(f"as {k}" for k in range(len(matrix))), "recall")
        found += _table(f"Confusion matrix{tag}", head, rows, note)
    return found


def _share_right(row: Sequence[int], true: int) -> str:
    """The class's recall, a dash without a row of it."""
    return phrases.score(row[true] / sum(row) if sum(row) else None)


def cost(results: Sequence[Result]) -> list[Grid]:
    """Seconds by stage over the whole run, bytes per site and round, and peak memory."""
    spent = [result.cost.seconds or {} for result in results]
    cells = {
        f"{stage}, sum over sites": [
            Cell(phrases.duration(seconds.get(stage))) for seconds in spent
        ]
        for stage in _all(results, lambda r: r.cost.seconds or {})
    }
    lines: dict[str, Callable[[Result], str]] = {
        "whole run, all arms, wall time": lambda r: phrases.duration(r.cost.seconds_total),
        "sent per site and round": lambda r: phrases.size(r.cost.bytes_up),
        "received per site and round": lambda r: phrases.size(r.cost.bytes_down),
        "ciphertexts sent per site and round": lambda r: phrases.count(r.cost.ciphertexts),
        "peak memory": lambda r: (
            f"{phrases.count(peak)} MB" if (peak := r.cost.peak_memory_mb) is not None else DASH
        ),
        "coordinates clipped": lambda r: _share(r.sums.clipped_fraction),
    }
    cells |= {name: [Cell(text(result)) for result in results] for name, text in lines.items()}
    rows = [(_name(n), *row) for n, row in cells.items() if any(c.text != DASH for c in row)]
    staged = any(spent)
    note = "Sums are of the federated arm, over all rounds." if staged else ""
    return _table("Cost by stage" if staged else "Cost", ["", *_columns(results, "")], rows, note)


def _share(fraction: float | None) -> str:
    return DASH if fraction is None else "none" if fraction == 0 else f"{fraction * 100:.2g} %"


def budgets(results: Sequence[Result]) -> list[Grid]:
    """Gradient steps and examples seen per arm: equal budgets are what makes the arms comparable."""
    runs = [result for result in results if isinstance(result, RunResult)]
    if not any(arm.gradient_steps is not None for run in runs for arm in run.arms.values()):
        return []
    rows = []
    for arm in _all(runs, say.arms_of):
        row = [_name(phrases.arm_name(arm))]
        for found in (run.arms.get(arm) for run in runs):
            if found is None:
                row.append(Cell(DASH, "not run"))
                continue
            steps, seen = phrases.count(found.gradient_steps), phrases.count(found.examples_seen)
            if len(runs) == 1:
                row += [Cell(steps), Cell(seen)]
            else:
                row.append(Cell(f"{steps} steps", f"{seen} examples"))
        rows.append(tuple(row))
    return _table("Budgets", ["arm", *_columns(runs, "gradient steps", "examples seen")], rows)


def sites(results: Sequence[Result]) -> list[Grid]:
    """Rows and classes of every site, from the first result: all runs have the same rows.

    Of a single run in which sites were absent also the number of rounds in whose sums each of them was.
    """
    first, found = results[0], []
    absent = len(results) == 1 and bool(first.absences.count)
    apart = any(values.validation_rows is not None for values in first.per_site.values())
    for site, values in first.per_site.items():
        if values.rows is None:
            continue
        classes = (values.class_counts or {}).items()
        counts = ", ".join(f"{phrases.plain(name)}: {phrases.count(n)}" for name, n in classes)
        counts_of = [values.rows, values.train_rows, values.test_rows]
        numbers = [*map(phrases.count, [*counts_of, *([values.validation_rows] if apart else [])])]
        if absent:
            in_sum, rounds = phrases.count(values.rounds_in_sum), phrases.count(first.rounds)
            numbers.append(f"{in_sum} of {rounds}")
        found.append((_name(phrases.plain(site)), *map(Cell, numbers), _name(counts or DASH)))
    head = ["site", "rows", "train", "test", *(["validation"] if apart else [])]
    head += ["rounds in the sum"] if absent else []
    return _table("Sites", (*head, "rows per class"), found)


def settings(results: Sequence[Result]) -> list[Grid]:
    """Key by key: what the sites and the coordinator agreed on, the training, versions and machine."""
    known_elsewhere = ("label", "sites", "train", "packing")
    plans = [{k: v for k, v in r.plan.items() if k not in known_elsewhere} for r in results]
    return [
        *_keys("Plan", results, plans),
        *_keys("Training", results, [result.train for result in results]),
        *_keys("Environment", results, [result.origin.environment for result in results]),
    ]


def statistics(results: Sequence[Result]) -> list[Grid]:
    """What the first result's columns were scaled by: one row per column, or key by key."""
    first = results[0]
    found = first.statistics if isinstance(first, RunResult) else None
    if not found:
        return []
    columns = found.get("names")
    if not isinstance(columns, list):
        return _keys("Federated statistics", results[:1], [found])
    if not columns:  # a table of categories only standardises nothing
        return []
    title, wanted = "Federated statistics", ["mean", "std", "count", "sites", "clipped"]
    note = "Over the sites' training rows, through the protected sum."
    if scaled_by_ranges(found):
        title, wanted = "Scale of the columns", wanted[:2]
        note = "From the public ranges that the task declares: nothing of any row was sent for it."
    keys = [key for key in wanted if len(found.get(key) or []) == len(columns)]
    rows = [
        (_name(phrases.plain(column)), *(Cell(_short(found[key][i])) for key in keys))
        for i, column in enumerate(columns)
    ]
    return _table(title, ("column", *keys), rows, note)


def _short(value: Any) -> str:
    """Four digits, so that a row of statistics fits a phone; result.json has all of them."""
    return f"{value:.4g}" if isinstance(value, float) else phrases.count(value)


def _keys(
    title: str, results: Sequence[Result], documents: Sequence[Mapping[str, Any]]
) -> list[Grid]:
    """One row per key of a document that each result holds."""
    flat = [dict(_flatten(found)) for found in documents]
    names = list(dict.fromkeys(name for found in flat for name in found))
    rows = [
        (_name(name), *(Cell(found.get(name, DASH), number=False) for found in flat))
        for name in names
    ]
    return _table(title, ["key", *_columns(results, "value")], rows)


def _flatten(value: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, item in value.items():
        name = prefix + phrases.plain(key)
        if isinstance(item, dict):
            yield from _flatten(item, name + ".")
        else:
            yield name, _value(item)


def _value(item: Any) -> str:
    if isinstance(item, dict):
        return " ".join(f"{phrases.plain(key)} {_value(part)}" for key, part in item.items())
    if isinstance(item, list):
        return ", ".join(_value(i) for i in item) or DASH
    if item is None or item == "":
        return DASH
    if isinstance(item, bool):
        return "yes" if item else "no"
    return f"{item:.6g}" if isinstance(item, float) else phrases.plain(item)


def _all(results: Sequence[Result], of: Callable[[Result], Iterable[str]]) -> list[str]:
    """The union over results, in order of first appearance."""
    return list(dict.fromkeys(item for result in results for item in of(result)))
