"""The sentences of a report: lost, gained, cost; for the page, the terminal and the Methods.

Invariant: a loss is stated only when its whole interval lies above 0, and its absence only when the
interval is narrow enough to show it (`NEGLIGIBLE`). Positive always means lost against centralised training.
Everything returned is plain text (`phrases.plain`).
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from fedcore.report import phrases
from fedcore.results import ComparisonResult, Result, RowCounts, RunResult, Trend
from fedcore.secagg.protections import unprotected

NEGLIGIBLE = 0.01
"""Half the width of an interval that may be called no loss: one point, or of an error one hundredth of the
centralised arm's. Fedcore's aim is tenths of a point, and a wider interval could hide ten times as much."""


def arms_of(result: Result) -> list[str]:
    """The arms present, in the usual order, unknown ones last."""
    found, usual = result.arm_names, phrases.ARM_NAMES
    return [a for a in usual if a in found] + [a for a in found if a not in usual]


def primary_metric(result: Result) -> str | None:
    """The metric of the headline and the plot: AUC where it exists, else the first one with a gap,
    or with a value where no gap was measured.

    AUC uses every score where accuracy uses one threshold, so its interval is the narrower one.
    """
    metrics = sorted(result.metrics, key=lambda m: m != "auc")
    with_gap = (m for m in metrics if result.mean_gap("total", m) is not None)
    with_value = (m for m in metrics if result.score("federated", m) is not None)
    return next(iter((*with_gap, *with_value, *metrics)), None)


def ordered_metrics(result: Result) -> list[str]:
    """The headline's metric first, then the others in the task's order."""
    first = primary_metric(result)
    return sorted(result.metrics, key=lambda m: m != first)


def why_missing(metric: str, test_rows: int | None = None) -> str:
    """The known reason why a metric of an arm that ran is null: no test rows, or for an AUC test rows of one
    class only. test_rows: how many, None where that is unknown."""
    if test_rows == 0:
        return "no test rows"
    return "one class" if metric == "auc" else ""


def rows_tested(result: Result) -> int | None:
    """All sites' test rows, None where that is unknown: a comparison has others in every fold."""
    return result.rows.test if isinstance(result, RunResult) and result.rows is not None else None


def model_hash(result: Result) -> str:
    """SHA-256 of a run's model, empty for a comparison, which has none."""
    return phrases.plain(result.model_sha256) if isinstance(result, RunResult) else ""


def label_lines(label: str) -> list[str]:
    """The label of the plan (who could have seen what), one sentence a line."""
    return [phrases.plain(line) for line in label.splitlines() if line.strip()]


def splits(result: ComparisonResult) -> str:
    """`5 seeds x 5 folds`, or `5 seeds` where every site brings its own test rows."""
    return f"{result.seeds} seeds" + (f" x {result.folds} folds" if result.folds > 1 else "")


def lost(result: Result) -> list[str]:
    """What was lost against pooling, one sentence per metric, the headline first.

    A loss is stated only when its interval lies above 0; no loss only when the interval contains 0
    and stays within `NEGLIGIBLE` of it; anything between is called unresolved. A metric with a stated loss
    comes before any other, the greatest loss first: who reads the headline only is told of it.
    """
    metrics = sorted(ordered_metrics(result), key=lambda m: -_stated_loss(result, m))
    if not metrics:
        return ["No metric was measured."]
    return [
        _lost(result, metrics[0], " against pooling"),
        *(_lost(result, m, "") for m in metrics[1:]),
    ]


def _stated_loss(result: Result, metric: str) -> float:
    """A fraction of the whole, 0 where no loss is stated."""
    gap = result.gap_of("total", metric)
    if gap is None or gap.mean is None or gap.ends is None or gap.ends[0] <= 0:
        return 0.0
    whole = _whole(result, metric)
    return gap.mean / whole if whole else float("inf")


def _whole(result: Result, metric: str) -> float:
    """What a loss is a part of: 1 for a fraction, the centralised arm's value for an error in its own unit."""
    if not result.is_error(metric):
        return 1.0
    return abs(result.score("centralised", metric) or 0.0)


def _lost(result: Result, metric: str, against: str) -> str:
    name = phrases.metric_name(metric)
    gap = result.gap_of("total", metric)
    if gap is None or gap.mean is None:
        return _without_gap(result, metric, against)
    mean, span = gap.mean, phrases.interval(result, metric, gap)
    size = phrases.measure(result, metric, abs(mean))
    # Of an error both scores: without them a difference in its unit has no size.
    both = [result.score(arm, metric) for arm in ("centralised", "federated")]
    pooled, together = map(phrases.score, both)
    stated = result.is_error(metric) and None not in both
    scores = f" ({pooled} centralised, {together} federated)" if stated else ""
    if gap.ends is None:
        what = f"{size} {'gained' if mean < 0 else 'lost'}{scores}"
        return f"{phrases.capitalised(name)}: {what}, with no interval to judge it by."
    low, high = gap.ends
    if low == high == mean == 0:
        return f"{phrases.capitalised(name)} is exactly that of the centralised arm."
    if low > 0:
        return f"{phrases.quantity(result, metric, mean)} lost{against}{scores}, interval {span}."
    side = "lower" if (mean < 0) == result.is_error(metric) else "higher"
    if high < 0:
        span = phrases.interval(result, metric, replace(gap, low=-high, high=-low))
        return f"No loss: {name} is {size} {side} than pooling{scores}, interval {span}."
    if max(-low, high) <= NEGLIGIBLE * _whole(result, metric):
        apart = f"{size} {side}" if phrases.amount(result, metric, abs(mean)) != "0.00" else size
        return f"No loss measurable{against}: {name} {apart}{scores}, interval of the loss {span}."
    where = f"over {splits(result)}" if isinstance(result, ComparisonResult) else "on these rows"
    if phrases.amount(result, metric, mean) == "0.00":
        change, of = f"no {name} lost or gained", ""
    elif mean > 0:
        change, of = f"{phrases.quantity(result, metric, mean)} lost", ""
    else:
        change, of = f"{phrases.quantity(result, metric, -mean)} gained", " of the loss"
    return f"Not resolved: {change} {where}{scores}, interval{of} {span}."


def _without_gap(result: Result, metric: str, against: str) -> str:
    """The sentence of a metric without a gap: the federated arm's score, and why there is no gap."""
    name = phrases.metric_name(metric)
    reached = result.score("federated", metric)
    if reached is None:
        reason = why_missing(metric, rows_tested(result))
        reason += " among the test rows" if reason == "one class" else ""
        return f"{phrases.capitalised(name)}: {phrases.DASH}" + (f" ({reason})." if reason else ".")
    if "centralised" in result.arm_names:
        return f"Federated {name} {phrases.score(reached)}; of the centralised arm it is unknown."
    # Said once, with the headline.
    missing = "; no centralised arm was run to compare with" if against else ""
    return f"Federated {name} {phrases.score(reached)}{missing}."


def converged(result: Result) -> str:
    """Which arms were still improving when they ended, and which had been better before; empty where neither is
    more than noise. Of a comparison what at least half of its splits show."""
    found = [result] if isinstance(result, RunResult) else getattr(result, "cells", ())
    known = [each.convergence for each in found if each.convergence is not None]
    if not known:
        return ""
    several, said = isinstance(result, ComparisonResult), []
    metric, validated = known[0].metric, known[0].validated
    for arm in ("federated", "centralised"):
        trends = [each.arms[arm] for each in known if arm in each.arms]
        rising = [trend for trend in trends if trend.gained is not None]
        past = [trend for trend in trends if trend.best_round is not None]
        if 2 * len(rising) >= len(known) > 0:
            said.append(_rising(result, metric, arm, rising, len(known) if several else 0))
        if 2 * len(past) >= len(known) > 0:
            said.append(_past(arm, past, len(known) if several else 0))
    if not said:
        return ""
    name = phrases.metric_name(metric)
    rows = f"validation {name}" if validated else f"{name} on the test rows"
    hint = (
        ""
        if validated
        else (" To choose the number of rounds by rows that are not tested on: `--validate 0.2`.")
    )
    return f"{phrases.capitalised(rows)}, round by round: {'; '.join(said)}.{hint}"


def _rising(result: Result, metric: str, arm: str, trends: Sequence[Trend], of: int) -> str:
    """`federated still rising, +0.70 points in the last 5 rounds`. of: splits, 0 of a run."""
    change = sum(trend.gained or 0.0 for trend in trends) / len(trends)
    error = result.is_error(metric)
    size = phrases.amount(result, metric, -change if error else change, signed=True)
    unit = phrases.unit(result, metric)
    where = f" in {len(trends)} of {of} splits" if of else ""
    mean = " on average" if of > 1 else ""
    return (
        f"{arm} still {'falling' if error else 'rising'}{where}, {f'{size} {unit}'.rstrip()} in the last "
        f"{phrases.plural(trends[0].window or 0, 'round')}{mean}"
    )


def _past(arm: str, trends: Sequence[Trend], of: int) -> str:
    """`centralised was best at round 6 (0.924, at the end 0.901)`."""
    rounds = sum(trend.best_round or 0 for trend in trends) / len(trends)
    best, last = (
        phrases.score(sum(values) / len(trends))
        for values in ([t.best or 0.0 for t in trends], [t.last for t in trends])
    )
    where = f" in {len(trends)} of {of} splits" if of else ""
    about = "about round" if of > 1 else "round"
    return f"{arm} was best at {about} {rounds:.0f}{where} ({best}, at the end {last})"


def how_measured(result: Result) -> str:
    """The method behind the headline's interval; empty if there is no interval."""
    metric = primary_metric(result)
    gap = result.gap_of("total", metric) if metric else None
    return phrases.plain(gap.method) if gap is not None and gap.ends is not None else ""


def site_gain(result: Result, site: str, metric: str) -> float | None:
    """Federated minus local-only at a site, as a fraction: positive means gained by joining."""
    together, alone = (result.site_score(site, arm, metric) for arm in ("federated", "local_only"))
    return result.better_by(metric, together, alone)


def gained(result: Result) -> list[str]:
    """What each site gained over staying alone: the count first, then the sites by name."""
    metric = primary_metric(result)
    gains = {site: site_gain(result, site, metric) for site in result.per_site} if metric else {}
    known = [g for g in gains.values() if g is not None]
    if gains and not known and "local_only" not in result.arm_names:
        return ["Not measured: no site was trained alone to compare with."]
    if metric is None or not known:
        return ["Not measured per site."]
    name, error = phrases.metric_name(metric), result.is_error(metric)
    counted, better = name if error else "points", sum(g > 0 for g in known)
    average = f", averaged over {splits(result)}" if isinstance(result, ComparisonResult) else ""
    sites_known = phrases.plural(len(known), "site")
    if len(known) < len(gains):
        sites_known = f"the {sites_known} with a known {name}"
    compared = f"have less {name}" if error else f"score higher in {name}"
    first = f"{better} of {sites_known} {compared} together than alone{average}"
    tested = {site: found.test_rows for site, found in result.per_site.items()}
    signed = partial(phrases.amount, result, metric, signed=True)
    if len(gains) <= 8:
        each = []
        for site, gain in gains.items():
            reason = why_missing(metric, tested[site]) if gain is None else ""
            why = f" ({reason})" if reason else ""
            each.append(f"{phrases.plain(site)} {signed(gain)}{why}")
        sentences = [f"{first}; gained in {counted}: {', '.join(each)}."]
    else:
        ordered = sorted(known)
        least, middle, most = map(signed, (ordered[0], ordered[len(ordered) // 2], ordered[-1]))
        span = (
            f"in {counted} from {least} to {most}" if error else f"from {least} to {most} {counted}"
        )
        sentences = [f"{first}; gained {span}, the middle site {middle}."]
    if (rows := [n for n in tested.values() if n]) and not average:
        span = f"{min(rows)}" if min(rows) == max(rows) else f"{min(rows)} to {max(rows)}"
        sentences.append(f"A site has {span} test rows: read these as directions, not as proof.")
    return sentences


def per_site_and_round(result: Result) -> str:
    """`1.22 kB per site and round (one ciphertext, 1 % used)`; bytes per parameter only where a
    model fills its ciphertexts, since a ratio to a smaller model means nothing."""
    text = f"{phrases.size(result.cost.bytes_up)} per site and round"
    used, ciphertexts = result.cost.ciphertext_used, result.cost.ciphertexts
    if not ciphertexts:
        return text
    if ciphertexts == 1:
        share = "" if used is None else f", {max(used * 100, 1):.0f} % used"
        if used is not None and used < 0.005:
            share = ", under 1 % used"
        return f"{text} (one ciphertext{share})"
    each = result.cost.bytes_per_parameter
    ratio = "" if each is None else f", {each:.2f} bytes per parameter"
    return f"{text} ({phrases.count(ciphertexts)} ciphertexts{ratio})"


def cost(result: Result) -> list[str]:
    """What protection cost: bytes, seconds, and accuracy (which must be exactly nothing)."""
    protected = not unprotected(result.protection)
    sentences = [] if protected else ["Nothing was protected: `plain` is for simulation and tests."]
    if result.cost.bytes_up is not None:
        down = phrases.size(result.cost.bytes_down)
        sentences.append(f"Sent: {per_site_and_round(result)} up, {down} down.")
    if result.cost.seconds:
        spent = sum(result.cost.seconds.get(stage, 0.0) for stage in phrases.PROTECTION_STAGES)
        train = phrases.duration(result.cost.seconds.get("train"))
        sentences.append(
            f"Encode, protect, fold and unprotect took {phrases.duration(spent)}, summed over the sites and "
            f"{phrases.plural(result.rounds, 'round')}; local training took {train} in the same sum."
        )
    if protected and (exact := protection_changed(result)):
        sentences.append(exact)
    if isinstance(result, ComparisonResult) and result.cost.seconds_total is not None:
        took = phrases.duration(result.cost.seconds_total)
        sentences.append(
            f"All {splits(result)} took {took} of wall time; the report of one run has the stages."
        )
    return sentences or ["Not measured."]


def protection_changed(result: Result) -> str:
    """Whether the protected sums equal the plain integer sums, as they must."""
    changes = {metric: result.mean_gap("protection", metric) for metric in ordered_metrics(result)}
    known = {metric: change for metric, change in changes.items() if change is not None}
    if result.sums.unequal_rounds:
        return (
            f"In {phrases.count(result.sums.unequal_rounds)} rounds the opened sum was not the plain integer "
            "sum, which must never happen: this result is not to be trusted."
        )
    if not known:
        return ""
    if all(change == 0 for change in known.values()):
        return "Protection changed no result: the protected sums equal the plain integer sums."
    worst = max(known, key=lambda metric: abs(known[metric]))
    return (
        f"Protection changed {phrases.metric_name(worst)} by {phrases.measure(result, worst, known[worst])}; "
        "it must be exactly 0, so this result is not to be trusted."
    )


def title(result: Result) -> str:
    """`heart: 4 sites, encrypted`."""
    sites = phrases.plural(len(result.sites), "site")
    return f"{phrases.plain(result.task)}: {sites}, {phrases.plain(result.protection)}"


def setting(result: Result) -> list[str]:
    """Rounds, seed and rows: the short facts under the title."""
    facts = [phrases.plural(result.rounds, "round"), *which_split(result).values()]
    if isinstance(result, RunResult) and (rows := result.rows) is not None:
        apart = f", {phrases.count(rows.validation)} validation" if rows.validation else ""
        facts.append(
            f"{phrases.count(rows.train)} train{apart} and {phrases.count(rows.test)} test rows{of_groups(rows)}"
        )
    if result.model.summary:
        facts.append(phrases.plain(result.model.summary))
    if isinstance(result, RunResult) and result.stopped:
        facts.append(f"stopped: {phrases.plain(result.stopped)}")
    if result.absences.count:
        facts.append(phrases.plural(result.absences.count, "absence"))
    if abandoned := len(result.absences.abandoned):
        facts.append(f"{phrases.plural(abandoned, 'round')} abandoned")
    return facts


def of_groups(rows: RowCounts) -> str:
    """` of 120 groups`; empty where every row stands for itself."""
    return f" of {phrases.plural(rows.groups, 'group')}" if rows.groups else ""


def which_split(result: Result) -> dict[str, str]:
    """The seed and the fold of a run, as short facts by key; of a comparison how many of each."""
    if isinstance(result, ComparisonResult):
        return {"splits": splits(result)}
    assert isinstance(result, RunResult)
    fold = {"fold": f"fold {result.fold} ({result.folds} folds)"} if result.folds else {}
    return {"seed": f"seed {result.seed}"} | fold


def run_names(results: Sequence[Result]) -> list[str]:
    """A short distinct name for each result: the run's folder, else task, protection and seed."""
    names = []
    for result in results:
        folder = phrases.plain(result.origin.run).replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
        names.append(folder or f"{phrases.plain(result.task)} {phrases.plain(result.protection)}")
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({i})" for i, name in enumerate(names, start=1)]


def run_tags(results: Sequence[Result]) -> list[str]:
    """What a table head has room for: the names of a few runs if they are short, else `A`, `B`, ...
    (numbers beyond `Z`)."""
    names = run_names(results)
    if len(names) <= 3 and all(len(name) <= 24 for name in names):
        return names
    return [chr(ord("A") + i) if len(results) <= 26 else str(i + 1) for i in range(len(results))]


def run_labels(results: Sequence[Result]) -> list[str]:
    """The names of runs, each after its tag where that is another."""
    pairs = zip(run_tags(results), run_names(results), strict=True)
    return [name if tag == name else f"{tag}, {name}" for tag, name in pairs]
