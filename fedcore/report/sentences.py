"""Numbers into words: the sentences of the report, the terminal and the Methods paragraph.

Invariant: a loss is stated only when its whole interval lies above 0, and its absence only when the
interval is narrow enough to show it (`NEGLIGIBLE`). Fractions come in, points (fraction x 100) go
out; an error such as MSE, of which less is better, is no fraction and keeps its own unit. Positive
always means lost against centralised training.
Everything returned is plain text, free of control characters; escaping for HTML, Markdown, LaTeX or
a terminal belongs to the module that draws it.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Json = dict[str, Any]

# The names are those of types.ARMS and comparison.gap.PARTS (a test compares them): importing those
# would load numpy before the first line of a run is on the screen.
ARM_NAMES = {
    "centralised": "centralised",
    "local_only": "local only",
    "federated_float": "federated, float",
    "federated": "federated",
}
PART_NAMES = {
    "federation": "federation",
    "quantisation": "quantisation",
    "protection": "protection",
    "total": "total",
}
GAP_OF_ARM = {"local_only": "local_only", "federated_float": "federation", "federated": "total"}
"""Which entry of the gap is `centralised - arm`; a result may hold none for local_only."""

ERRORS = frozenset({"mse", "mae"})
"""Built-in metrics of which less is better (a test compares them with fedcore.learning.metrics); a
task's own stand in the result (`is_error`)."""

NEGLIGIBLE = 0.01
"""Half the width of an interval that may be called no loss: one point, or of an error one hundredth
of the centralised arm's. What Fedcore promises are tenths of a point: an interval that reaches beyond
a whole one could hide ten times as much, and an absence that it could not have shown is not said."""

STAGES = ("train", "encode", "protect", "fold", "unprotect", "evaluate")
PROTECTION_STAGES = ("encode", "protect", "fold", "unprotect")

DASH = "–"
"""Stands for a number that does not exist."""

GLOSSARY = (
    ("arm", "one way of training on the same seeds, splits and budget"),
    ("centralised", "all rows pooled in one place: what the sites cannot do"),
    ("local only", "each site trains alone on its own rows"),
    ("federated, float", "federated averaging in floating point, without rounding or protection"),
    ("federated", "federated averaging as deployed: rounded to integers and protected"),
    ("point", "one hundredth of a metric: accuracy 0.80 to 0.79 is one point lost"),
    ("gap", "centralised minus federated; positive means lost"),
    ("no loss measurable", "the gap's interval contains 0 and stays within one point of it"),
    ("not resolved", "the interval contains 0 but is wider: these rows cannot tell"),
    ("AUC", "chance that a random positive row scores above a random negative one"),
)


def plain(value: object) -> str:
    """`str(value)` on one line: control and formatting characters become a visible replacement.

    Task names and site ids come from users; an escape sequence in one must not reach a terminal.
    """
    text = " ".join(str(value).split())
    return "".join("�" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in text)


def number(value: Any) -> float | None:
    """The float in a JSON value, of a mean with an interval the mean; null and NaN are None."""
    if isinstance(value, Mapping):
        value = value.get("mean")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return None if math.isnan(value) else float(value)


def is_error(result: Mapping[str, Any], metric: str) -> bool:
    """Whether less of the metric is better: as the result says, whose gaps have that direction; of a
    result that does not say, whether it is built in."""
    declared = result.get("lower_is_better")
    return metric in (declared if isinstance(declared, list) else ERRORS)


def better_by(
    result: Mapping[str, Any], metric: str, one: float | None, other: float | None
) -> float | None:
    """How much better `one` is than `other`, in the metric's unit; None where either is unknown."""
    if one is None or other is None:
        return None
    return other - one if is_error(result, metric) else one - other


def score(value: Any) -> str:
    """A metric, three decimals (two digits below 0.01, none from 10,000), or an en dash."""
    found = number(value)
    if found is None:
        return DASH
    if 0 < abs(found) < 0.01:
        return f"{found:.2g}"
    return f"{found:.3f}" if abs(found) < 10_000 else f"{found:,.0f}"


def points(fraction: float | None, *, signed: bool = False) -> str:
    """A difference of metrics in points, two decimals; never `-0.00`."""
    if fraction is None:
        return DASH
    text = f"{fraction * 100:+.2f}" if signed else f"{fraction * 100:.2f}"
    return "0.00" if float(text) == 0 else text


def amount(
    result: Mapping[str, Any], metric: str, value: float | None, *, signed: bool = False
) -> str:
    """A difference of the metric: points, or of an error three digits in its own unit."""
    if value is None or not is_error(result, metric):
        return points(value, signed=signed)
    if value == 0 or not math.isfinite(value):
        return "0.00" if value == 0 else str(value)
    sign = "+" if signed else ""
    magnitude = math.floor(math.log10(abs(value)))
    if -5 <= magnitude < 6:
        return f"{value:{sign},.{max(0, 2 - magnitude)}f}"
    return f"{value:{sign}.2e}"


def unit(result: Mapping[str, Any], metric: str) -> str:
    """What `amount` counts: `points`, or nothing for an error, whose unit is the task's."""
    return "" if is_error(result, metric) else "points"


def quantity(result: Mapping[str, Any], metric: str, value: float | None) -> str:
    """`1.38 points of AUC`, `1.22 of MSE`."""
    return " of ".join((_measure(result, metric, value), metric_name(metric)))


def _measure(result: Mapping[str, Any], metric: str, value: float | None) -> str:
    return " ".join((amount(result, metric, value), unit(result, metric))).rstrip()


def in_units(results: Iterable[Mapping[str, Any]], metrics: Iterable[str]) -> str:
    """The end of a note on differences: `in points`, `in points (MSE in its own unit)`."""
    metrics, found = list(metrics), list(results)
    own = [metric_name(m) for m in metrics if any(is_error(result, m) for result in found)]
    its = "its own unit" if len(own) == 1 else "their own units"
    if len(own) == len(metrics) > 0:
        return f"in {its}"
    return f"in points ({listed(own)} in {its})" if own else "in points"


def interval(result: Mapping[str, Any], metric: str, gap: Mapping[str, Any] | None) -> str:
    """`-0.90 to 0.60`; empty where there is no interval, `exact` where it is all 0."""
    low, high = bounds(gap)
    if low is None or high is None:
        return ""
    if low == high == 0:
        return "exact"
    return f"{amount(result, metric, low)} to {amount(result, metric, high)}"


def gap_amount(result: Mapping[str, Any], metric: str, gap: Mapping[str, Any] | None) -> str:
    """The gap's mean; a bare `0` only where it and its interval are exactly 0."""
    exact = interval(result, metric, gap) == "exact"
    return "0" if exact else amount(result, metric, number(gap))


def bounds(gap: Mapping[str, Any] | None) -> tuple[float | None, float | None]:
    """The interval's ends as fractions; (None, None) where one is missing."""
    low, high = (number((gap or {}).get(end)) for end in ("low", "high"))
    return (None, None) if low is None or high is None else (low, high)


def size(count: float | None) -> str:
    """Bytes in decimal units: `84 B`, `13.9 kB`, `3.53 MB`."""
    if count is None:
        return DASH
    if count < 1000:
        return f"{count:.0f} B"
    value = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.5 or unit == "TB":
            break
    digits = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:.{digits}f} {unit}"


def duration(seconds: float | None) -> str:
    """Seconds for a person: `3 ms`, `0.31 s`, `12.4 s`, `3 min 20 s`, `1 h 4 min`."""
    if seconds is None:
        return DASH
    if seconds < 0.1:
        return (
            "0 s"
            if seconds == 0
            else f"{max(seconds * 1000, 0.1):.{0 if seconds > 0.001 else 1}f} ms"
        )
    if seconds < 60:
        return f"{seconds:.{2 if seconds < 10 else 1}f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def count(value: Any) -> str:
    """A whole number with thousands separated, or an en dash."""
    found = number(value)
    return DASH if found is None else f"{found:,.0f}"


def metric_name(metric: str) -> str:
    """As it stands in a sentence or table head."""
    return metric.upper() if metric in {"auc", *ERRORS} else plain(metric).replace("_", " ")


def arm_name(arm: str, result: Mapping[str, Any] | None = None) -> str:
    """As it stands in a table; the federated arm carries its protection."""
    name = ARM_NAMES.get(arm, plain(arm))
    if arm == "federated" and result and result.get("protection"):
        return f"{name}, {plain(result['protection'])}"
    return name


def is_comparison(result: Mapping[str, Any]) -> bool:
    """Whether the result is of `compare` (seeds x folds) rather than of one run."""
    return result.get("kind") == "compare"


def arms_of(result: Mapping[str, Any]) -> list[str]:
    """The arms present, in the usual order, unknown ones last."""
    found = result.get("arms") or {}
    return [a for a in ARM_NAMES if a in found] + [a for a in found if a not in ARM_NAMES]


def ran(result: Mapping[str, Any], arm: str) -> bool:
    """Whether the run had this arm; a job may leave all but the federated one out."""
    return arm in (result.get("arms") or {})


def metrics_of(result: Mapping[str, Any]) -> list[str]:
    """The task's metrics, in its order."""
    return list(result.get("metrics") or [])


def gap_of(result: Mapping[str, Any], part: str, metric: str) -> Json | None:
    """One gap with its interval, or None."""
    found = ((result.get("gap") or {}).get(part) or {}).get(metric)
    return dict(found) if isinstance(found, Mapping) else None


def primary_metric(result: Mapping[str, Any]) -> str | None:
    """The metric of the headline and the plot: AUC where it exists, else the first one with a gap,
    or with a value where no gap was measured.

    AUC uses every score where accuracy uses one threshold, so its interval is the narrower one.
    """
    metrics = sorted(metrics_of(result), key=lambda m: m != "auc")
    reached = (result.get("arms") or {}).get("federated") or {}
    for metric in metrics:
        if number(gap_of(result, "total", metric)) is not None:
            return metric
    for metric in metrics:
        if number(reached.get(metric)) is not None:
            return metric
    return metrics[0] if metrics else None


def ordered_metrics(result: Mapping[str, Any]) -> list[str]:
    """The headline's metric first, then the others in the task's order."""
    first = primary_metric(result)
    return sorted(metrics_of(result), key=lambda m: m != first)


def why_missing(metric: str, test_rows: Any = None) -> str:
    """The known reason why a metric of an arm that ran is null: there were no test rows, or of one
    class only, of which an AUC needs both. test_rows: how many, None where that is unknown."""
    if test_rows == 0:
        return "no test rows"
    return "one class" if metric == "auc" else ""


def warnings(result: Mapping[str, Any]) -> list[str]:
    """The run's own warnings, which stand above every number."""
    return [plain(w) for w in result.get("warnings") or []]


def label_lines(result: Mapping[str, Any]) -> list[str]:
    """Who could have seen what, computed from the plan elsewhere; one sentence a line."""
    return [plain(line) for line in str(result.get("label") or "").splitlines() if line.strip()]


def capitalised(sentence: str) -> str:
    """The first letter upper case, the rest untouched."""
    return sentence[:1].upper() + sentence[1:]


def listed(items: Iterable[str]) -> str:
    """`a, b and c`."""
    parts = list(items)
    return (
        parts[0]
        if len(parts) == 1
        else ", ".join(parts[:-1]) + " and " + parts[-1]
        if parts
        else ""
    )


def plural(n: int, word: str) -> str:
    """`1 site`, `4 sites`."""
    return f"{n:,} {word}" + ("" if n == 1 else "s")


def lost(result: Mapping[str, Any]) -> list[str]:
    """What was lost against pooling, one sentence per metric, the headline first.

    A loss is stated only when its interval lies above 0; no loss only when the interval contains 0
    and stays within `NEGLIGIBLE` of it; anything between is said to be unresolved.
    """
    metrics = ordered_metrics(result)
    if not metrics:
        return ["No metric was measured."]
    return [
        _lost(result, metrics[0], " against pooling"),
        *(_lost(result, m, "") for m in metrics[1:]),
    ]


def _lost(result: Mapping[str, Any], metric: str, against: str) -> str:
    name = metric_name(metric)
    gap = gap_of(result, "total", metric)
    mean = number(gap)
    low, high = bounds(gap)
    if mean is None:
        return _without_gap(result, metric, against)
    value, span = _measure(result, metric, mean), interval(result, metric, gap)
    scores = _both_scores(result, metric)
    if low is None or high is None:
        word, value = ("gained", _measure(result, metric, -mean)) if mean < 0 else ("lost", value)
        return f"{capitalised(name)}: {value} {word}{scores}, with no interval to judge it by."
    if low == high == mean == 0:
        return f"{capitalised(name)} is exactly that of the centralised arm."
    if low > 0:
        return f"{quantity(result, metric, mean)} lost{against}{scores}, interval {span}."
    if high < 0:
        side = "lower" if is_error(result, metric) else "higher"
        return f"No loss{against}: {name} {value}{scores}, interval {span}; federated is {side}."
    if max(-low, high) <= _negligible(result, metric):
        return f"No loss measurable{against}: {name} {value}{scores}, interval {span}."
    where = f"over {_splits(result)}" if is_comparison(result) else "on these rows"
    if amount(result, metric, mean) == "0.00":
        return f"Not resolved: no {name} lost or gained {where}{scores}, interval {span}."
    if mean > 0:
        return (
            f"Not resolved: {quantity(result, metric, mean)} lost {where}{scores}, interval {span}."
        )
    return (
        f"Not resolved: {quantity(result, metric, -mean)} gained {where}{scores}, "
        f"interval of the loss {span}."
    )


def _without_gap(result: Mapping[str, Any], metric: str, against: str) -> str:
    """The sentence of a metric that has no gap: what the federated arm reached, and why no more."""
    name = metric_name(metric)
    reached = number(((result.get("arms") or {}).get("federated") or {}).get(metric))
    if reached is None:
        reason = why_missing(metric, (result.get("rows") or {}).get("test"))
        if reason == "one class":
            reason += " among the test rows"
        return f"{capitalised(name)}: {DASH}" + (f" ({reason})." if reason else ".")
    if ran(result, "centralised"):
        return f"Federated {name} {score(reached)}; of the centralised arm it is unknown."
    # Said once, with the headline.
    missing = "; no centralised arm was run to compare with" if against else ""
    return f"Federated {name} {score(reached)}{missing}."


def _both_scores(result: Mapping[str, Any], metric: str) -> str:
    """Of an error both scores: without them a difference in its unit has no size."""
    arms = result.get("arms") or {}
    pooled, together = (
        number((arms.get(arm) or {}).get(metric)) for arm in ("centralised", "federated")
    )
    if not is_error(result, metric) or pooled is None or together is None:
        return ""
    return f" ({score(pooled)} centralised, {score(together)} federated)"


def _negligible(result: Mapping[str, Any], metric: str) -> float:
    """The largest difference that is called none, in the metric's unit."""
    if not is_error(result, metric):
        return NEGLIGIBLE
    pooled = number(((result.get("arms") or {}).get("centralised") or {}).get(metric))
    return NEGLIGIBLE * abs(pooled or 0.0)


def how_measured(result: Mapping[str, Any]) -> str:
    """The method behind the headline's interval; empty if there is no interval."""
    metric = primary_metric(result)
    gap = gap_of(result, "total", metric) if metric else None
    return plain(gap.get("method") or "") if gap and None not in bounds(gap) else ""


def site_gains(result: Mapping[str, Any], metric: str) -> dict[str, float | None]:
    """Federated minus local-only per site, as fractions: positive means gained by joining."""
    gains: dict[str, float | None] = {}
    for site, values in (result.get("per_site") or {}).items():
        together = number((values.get("federated") or {}).get(metric))
        alone = number((values.get("local_only") or {}).get(metric))
        gains[site] = better_by(result, metric, together, alone)
    return gains


def gained(result: Mapping[str, Any]) -> list[str]:
    """What each site gained over staying alone: the count first, then the sites by name."""
    metric = primary_metric(result)
    gains = site_gains(result, metric) if metric else {}
    known = [g for g in gains.values() if g is not None]
    if gains and not known and not ran(result, "local_only"):
        return ["Not measured: no site was trained alone to compare with."]
    if metric is None or not known:
        return ["Not measured per site."]
    name = metric_name(metric)
    error = is_error(result, metric)
    counted = name if error else "points"
    better = sum(g > 0 for g in known)
    average = f", averaged over {_splits(result)}" if is_comparison(result) else ""
    sites_known = plural(len(known), "site")
    if len(known) < len(gains):
        sites_known = f"the {sites_known} with a known {name}"
    compared = f"have less {name}" if error else f"score higher in {name}"
    first = f"{better} of {sites_known} {compared} together than alone{average}"
    if len(gains) <= 8:
        sites_of = result["per_site"]
        sites = ", ".join(
            f"{plain(site)} {amount(result, metric, gain, signed=True)}"
            + (
                f" ({reason})"
                if gain is None and (reason := why_missing(metric, sites_of[site].get("test_rows")))
                else ""
            )
            for site, gain in gains.items()
        )
        sentences = [f"{first}; gained in {counted}: {sites}."]
    else:
        ordered = sorted(known)
        least, middle, most = (
            amount(result, metric, gain, signed=True)
            for gain in (ordered[0], ordered[len(ordered) // 2], ordered[-1])
        )
        sentences = [
            f"{first}; gained from {least} to {most} {counted}, the middle site {middle}."
            if not error
            else f"{first}; gained in {counted} from {least} to {most}, the middle site {middle}."
        ]
    tested = [v["test_rows"] for v in (result.get("per_site") or {}).values() if v.get("test_rows")]
    if tested and not is_comparison(result):
        span = f"{min(tested)}" if min(tested) == max(tested) else f"{min(tested)} to {max(tested)}"
        sentences.append(f"A site has {span} test rows: read these as directions, not as proof.")
    return sentences


def per_site_and_round(result: Mapping[str, Any], direction: str = "up") -> str:
    """`13.9 kB per site and round (one ciphertext, 1 % used)`; bytes per parameter only where a
    model fills its ciphertexts, since a ratio to a model smaller than one says nothing."""
    sent = number(result.get(f"bytes_{direction}_per_site_round"))
    text = f"{size(sent)} per site and round"
    used = number(result.get("ciphertext_used"))
    ciphertexts = number(result.get(f"ciphertexts_{direction}"))
    if direction != "up" or not ciphertexts:
        return text
    if ciphertexts == 1:
        share = "" if used is None else f", {max(used * 100, 1):.0f} % used"
        if used is not None and used < 0.005:
            share = ", under 1 % used"
        return f"{text} (one ciphertext{share})"
    each = number(result.get("bytes_per_parameter_up"))
    ratio = "" if each is None else f", {each:.2f} bytes per parameter"
    return f"{text} ({count(ciphertexts)} ciphertexts{ratio})"


def cost(result: Mapping[str, Any]) -> list[str]:
    """What protection cost: bytes, seconds, and accuracy (which must be exactly nothing)."""
    sentences = []
    protected = result.get("protection") != "plain"
    if not protected:
        sentences.append("Nothing was protected: `plain` is for simulation and tests.")
    if result.get("bytes_up_per_site_round") is not None:
        down = per_site_and_round(result, "down").removesuffix(" per site and round")
        sentences.append(f"Sent: {per_site_and_round(result)} up, {down} down.")
    seconds = result.get("seconds") or {}
    if seconds:
        spent = sum(number(seconds.get(stage)) or 0.0 for stage in PROTECTION_STAGES)
        sentences.append(
            f"Encode, protect, fold and unprotect took {duration(spent)} over "
            f"{plural(int(result.get('rounds') or 0), 'round')}; "
            f"local training took {duration(number(seconds.get('train')))}."
        )
    if protected and (exact := protection_changed(result)):
        sentences.append(exact)
    if is_comparison(result) and result.get("seconds_total") is not None:
        took = duration(number(result["seconds_total"]))
        sentences.append(
            f"All {_splits(result)} took {took}; the report of one run has the stages."
        )
    return sentences or ["Not measured."]


def protection_changed(result: Mapping[str, Any]) -> str:
    """Whether the protected sums equal the plain integer sums, as they must."""
    changes = {
        metric: number(gap_of(result, "protection", metric)) for metric in ordered_metrics(result)
    }
    known = {metric: change for metric, change in changes.items() if change is not None}
    unequal = number(result.get("unequal_rounds"))
    if unequal:
        return (
            f"In {count(unequal)} rounds the opened sum was not the plain integer sum, which must never "
            "happen: this result is not to be trusted."
        )
    if not known:
        return ""
    if all(change == 0 for change in known.values()):
        return "Protection changed no result: the protected sums equal the plain integer sums."
    worst = max(known, key=lambda metric: abs(known[metric]))
    return (
        f"Protection changed {metric_name(worst)} by {_measure(result, worst, known[worst])}; "
        "it must be exactly 0, so this result is not to be trusted."
    )


def title(result: Mapping[str, Any]) -> str:
    """`heart: 4 sites, encrypted`."""
    sites = plural(len(result.get("sites") or []), "site")
    return f"{plain(result.get('task', 'task'))}: {sites}, {plain(result.get('protection', DASH))}"


def setting(result: Mapping[str, Any]) -> list[str]:
    """Rounds, seed and rows: the short facts under the title."""
    facts = [plural(int(result.get("rounds") or 0), "round")]
    if is_comparison(result):
        facts.append(f"{result.get('seeds')} seeds x {result.get('folds')} folds")
    else:
        facts.append(f"seed {plain(result.get('seed'))}")
        if result.get("folds"):
            facts.append(f"fold {plain(result.get('fold'))} ({result['folds']} folds)")
    rows = result.get("rows") or {}
    if rows:
        facts.append(f"{count(rows.get('train'))} train and {count(rows.get('test'))} test rows")
    model = result.get("model") or {}
    if model.get("summary"):
        facts.append(plain(model["summary"]))
    if result.get("stopped"):
        facts.append(f"stopped: {plain(result['stopped'])}")
    if result.get("absences"):
        facts.append(plural(int(result["absences"]), "absence"))
    if abandoned := len(result.get("abandoned_rounds") or []):
        facts.append(f"{plural(abandoned, 'round')} abandoned")
    return facts


def run_names(results: Sequence[Json]) -> list[str]:
    """A short distinct name for each result: the run's folder, else task, protection and seed."""
    names = []
    for result in results:
        folder = plain(result.get("run") or "").replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
        names.append(folder or f"{plain(result.get('task'))} {plain(result.get('protection'))}")
    if len(set(names)) == len(names):
        return names
    return [f"{name} ({i})" for i, name in enumerate(names, start=1)]


def run_tags(results: Sequence[Json]) -> list[str]:
    """What a table head has room for: the names of a few runs if they are short, else `A`, `B`, ...
    (numbers beyond `Z`)."""
    names = run_names(results)
    if len(names) <= 3 and all(len(name) <= 24 for name in names):
        return names
    return [chr(ord("A") + i) if len(results) <= 26 else str(i + 1) for i in range(len(results))]


def run_labels(results: Sequence[Json]) -> list[str]:
    """The names of runs, each after its tag where that is another."""
    pairs = zip(run_tags(results), run_names(results), strict=True)
    return [name if tag == name else f"{tag}, {name}" for tag, name in pairs]


def choices(result: Mapping[str, Any], *, seeds: bool = True) -> dict[str, str]:
    """Everything that a person chose for a run, as short facts by key; with its seed and fold or
    without."""
    plan, train = result.get("plan") or {}, result.get("train") or {}
    server = plan.get("server") or {}
    rule = plan.get("range") or {}
    facts = {
        "task": f"task {plain(result.get('task'))}",
        "protection": plain(result.get("protection") or DASH),
        "rounds": plural(int(result.get("rounds") or 0), "round"),
        **({"threshold": f"threshold {plan['threshold']}"} if plan.get("threshold") else {}),
        **({"drop": f"drop {listed(map(plain, result['drop']))}"} if result.get("drop") else {}),
        **({"dropout": f"dropout {result['dropout']}"} if result.get("dropout") else {}),
        "bits": f"{plan.get('bits')} bits",
        "range": f"range {plain(rule.get('start') or 'estimated')}"
        + (", adaptive" if rule.get("adaptive") else ""),
        "server": f"server {plain(server.get('optimiser', DASH))}",
        **{f"server {key}": f"server {key} {server[key]}" for key in _RATES if key in server},
        "optimiser": f"local {plain(train.get('optimiser', DASH))}",
        **{key: f"{key} {train[key]}" for key in _RATES if key in train},
        "epochs": plural(int(train.get("epochs") or 0), "epoch"),
        "batch_size": f"batch size {plain(train.get('batch_size'))}",
        "weight_decay": f"weight decay {plain(train.get('weight_decay'))}",
        "arms": f"arms {listed(ARM_NAMES.get(a, plain(a)) for a in arms_of(result))}",
        "sites": plural(len(result.get("sites") or []), "site"),
    }
    if seeds and is_comparison(result):
        facts["splits"] = _splits(result)
    elif seeds:
        facts["seed"] = f"seed {plain(result.get('seed'))}"
        if result.get("folds"):
            facts["fold"] = f"fold {plain(result.get('fold'))} ({result['folds']} folds)"
    return facts


_RATES = ("lr", "momentum")


def settings_of(results: Sequence[Json]) -> tuple[list[str], list[list[str]]]:
    """What all runs share, and what is each one's own: what differs in the plan and the training
    comes first. A run without a fact that others have says nothing about it."""
    chosen = [choices(result) for result in results]
    differing = [
        key
        for key in dict.fromkeys(key for facts in chosen for key in facts)
        if len({facts.get(key) for facts in chosen}) > 1
    ]
    said = [setting(result) for result in results]
    shared = [fact for fact in said[0] if all(fact in other for other in said)]
    own = []
    for facts, settings in zip(chosen, said, strict=True):
        different = [facts[key] for key in differing if key in facts]
        rest = [fact for fact in settings if fact not in shared]
        own.append(list(dict.fromkeys([*different, *rest])))
    return shared, own if any(own) else [["the same plan, training and seed"] for _ in own]


def methods(result: Mapping[str, Any]) -> str:
    """A paragraph for a paper, from the plan and the result; a clause whose facts are missing is left
    out rather than guessed."""
    parts = [_methods_data(result), _methods_training(result), _methods_protection(result)]
    return " ".join(part for part in [*parts, _methods_evaluation(result)] if part)


def _splits(result: Mapping[str, Any]) -> str:
    return f"{result.get('seeds')} seeds x {result.get('folds')} folds"


def _methods_data(result: Mapping[str, Any]) -> str:
    sites = list(result.get("sites") or [])
    per_site = result.get("per_site") or {}
    sizes = [
        f"{plain(s)}, n = {count(per_site[s]['rows'])}"
        for s in sites
        if per_site.get(s, {}).get("rows")
    ]
    rows = result.get("rows") or {}
    total = sum(int(v.get("rows") or 0) for v in per_site.values())
    text = f"The task {plain(result.get('task'))} was learnt across {plural(len(sites), 'site')}"
    if total:
        text += f" holding {total:,} rows"
    if sizes and len(sizes) <= 8:
        text += f" ({'; '.join(sizes)})"
    text += "."
    if is_comparison(result):
        text += (
            " Within each site, rows were split at random into stratified folds; "
            f"all arms were repeated over {_splits(result)}."
        )
    elif rows and result.get("folds"):
        text += (
            f" Within each site, rows were split at random into {result['folds']} stratified folds, "
            f"one of which was held out ({count(rows.get('train'))} training and {count(rows.get('test'))} test rows; "
            f"seed {plain(result.get('seed'))}, fold {plain(result.get('fold'))})."
        )
    elif rows:
        text += f" There were {count(rows.get('train'))} training and {count(rows.get('test'))} test rows."
    if scaled_by_ranges(result):
        text += (
            " Numbers were scaled by the public ranges that the task declares, and a missing value became the "
            "middle of its range."
        )
    elif result.get("statistics"):
        text += (
            " Missing values were imputed and features standardised with means and standard deviations over the "
            "sites' training rows, which were computed through the same protected sum."
        )
    return text


def scaled_by_ranges(result: Mapping[str, Any]) -> bool:
    """Whether columns were scaled by their declared ranges alone: then no row is counted in the scale."""
    found = result.get("statistics")
    return isinstance(found, dict) and not any(found.get("sites") or [])


def _methods_training(result: Mapping[str, Any]) -> str:
    model, train = result.get("model") or {}, result.get("train") or {}
    facts = [plain(model["summary"])] if model.get("summary") else []
    if model.get("coordinates"):
        facts.append(plural(int(model["coordinates"]), "coordinate"))
    rounds = plural(int(result.get("rounds") or 0), "round")
    described = f" ({', '.join(facts)})" if facts else ""
    text = f"The model{described} was trained by federated averaging for {rounds}"
    if train.get("epochs"):
        optimiser = {"sgd": "SGD", "adam": "Adam"}.get(
            str(train.get("optimiser")), plain(train.get("optimiser"))
        )
        text += f", each of {plural(int(train['epochs']), 'local epoch')} with {optimiser}"
        details = [f"learning rate {train['lr']}"] if train.get("lr") is not None else []
        if train.get("batch_size"):
            details.append(f"batch size {train['batch_size']}")
        for key, word in (("momentum", "momentum"), ("weight_decay", "weight decay")):
            if train.get(key):
                details.append(f"{word} {train[key]}")
        if details:
            text += f" ({', '.join(details)})"
    server = (result.get("plan") or {}).get("server") or {}
    if server.get("optimiser") and server["optimiser"] != "fedavg":
        names = {"fedavgm": "server momentum, FedAvgM", "fedadam": "FedAdam", "fedyogi": "FedYogi"}
        name = names.get(server["optimiser"], plain(server["optimiser"]))
        words = {"lr": "learning rate", "momentum": "momentum"}
        details = [f"{word} {server[key]}" for key, word in words.items() if server.get(key)]
        text += f"; the released mean was applied by {name}"
        text += f" ({', '.join(details)})" if details else ""
    return text + "."


def _methods_protection(result: Mapping[str, Any]) -> str:
    plan = result.get("plan") or {}
    text = "Updates were weighted by their examples"
    if plan.get("bits"):
        text += f" and rounded stochastically to {plan['bits']}-bit integers"
    if plan.get("fields_per_slot") and plan.get("slot_bits"):
        fields = {1: "one", 2: "two", 3: "three"}.get(
            plan["fields_per_slot"], plan["fields_per_slot"]
        )
        text += f", {fields} to a slot of {plan['slot_bits']} bits"
    protection = result.get("protection")
    if protection == "plain":
        text += "; their sum was not protected (simulation only)"
    elif protection == "masked":
        text += f", and summed under {_MASKS}"
    elif protection in ("encrypted", "layered"):
        text += f", put under {_MASKS}" if protection == "layered" else ""
        text += f", and summed under {_CIPHERS.get(plan.get('cipher', 'bfv'), 'encryption')}"
        if plan.get("degree"):
            primes = _primes(plan.get("coeff_modulus"))
            text += f" (ring degree {plan['degree']}{', ' + primes if primes else ''}; Microsoft SEAL through TenSEAL)"
        text += " with a key shared by the sites and unknown to the coordinator"
    elif protection:
        text += f", and summed under the protection {plain(protection)}"
    text += "."
    headroom = plan.get("headroom") or {}
    if headroom.get("bound") is not None and headroom.get("limit") is not None:
        most = (
            f" of at most {plural(int(plan['max_sites']), 'site')}" if plan.get("max_sites") else ""
        )
        text += (
            f" That a sum{most} cannot overflow was proved from the plan before the first round."
        )
    text += _methods_absences(result)
    clipped = number(result.get("clipped_fraction"))
    if clipped is not None:
        text += (
            f" Of all coordinates sent, {clipped * 100:.2g} % exceeded the range and were clipped."
            if clipped
            else " No coordinate exceeded the range."
        )
    return text


_CIPHERS = {
    "bfv": "BFV homomorphic encryption",
    "keystream": "additively homomorphic AES-256 keystreams (after Castelluccia, Mykletun and Tsudik 2005)",
}
_MASKS = "pairwise and self masks agreed anew in every round (X25519 with ML-KEM-768; after Bonawitz et al. 2017)"


def _methods_absences(result: Mapping[str, Any]) -> str:
    """The threshold, and what was simulated of sites that leave; both only where they matter."""
    threshold, absences = (result.get("plan") or {}).get("threshold"), result.get("absences")
    text = ""
    if threshold and (absences or result.get("protection") != "plain"):
        sites = plural(len(result.get("sites") or []), "site")
        text += f" A round needed {threshold} of {sites} at every stage."
    if absences:
        abandoned = len(result.get("abandoned_rounds") or [])
        text += f" Absences were simulated: {plural(int(absences), 'time')} a site left a round"
        text += (
            f", and {plural(abandoned, 'round')} in which too few stayed changed nothing"
            if abandoned
            else ""
        )
        text += "."
    return text


def _primes(modulus: Any) -> str:
    primes = modulus if isinstance(modulus, list) else [modulus] if modulus else []
    bits = [int(prime).bit_length() for prime in primes]
    if not bits:
        return ""
    return (
        f"one {bits[0]}-bit prime"
        if len(bits) == 1
        else f"primes of {listed(str(b) for b in bits)} bits"
    )


def _methods_rows(result: Mapping[str, Any]) -> str:
    """How many rows the reference arms trained on: those of the survivors, or more."""
    if not result.get("absences"):
        return " and saw as many training rows"
    every = [ARM_NAMES[a] for a in ("centralised", "local_only") if ran(result, a)]
    facts = [f"{listed(every)} trained on all sites' rows in every round"] if every else []
    if ran(result, "federated_float"):
        facts.append("federated averaging in floating point on those of each round's survivors")
    return f"; {', and '.join(facts)}"


def _methods_evaluation(result: Mapping[str, Any]) -> str:
    names = listed(metric_name(m) for m in metrics_of(result))
    arms = listed(
        ARM_NAMES[a]
        for a in ("centralised", "local_only", "federated_float")
        if a in arms_of(result)
    )
    text = ""
    if arms:
        text = f"Reference arms ({arms}) used the same seeds and splits"
        text += _methods_rows(result) + ". "
    verb = "were" if len(metrics_of(result)) > 1 else "was"
    text += f"{capitalised(names)} {verb} measured over the union of the sites' test rows"
    if method := how_measured(result):
        errors = [is_error(result, metric) for metric in metrics_of(result)]
        gap, within = "centralised minus federated", "one point of it"
        if all(errors):
            gap, within = "federated minus centralised", "1 % of the centralised value"
        elif any(errors):
            gap += " (of errors federated minus centralised)"
            within += " (of errors 1 % of the centralised value)"
        text += f"; the gap is {gap}, with an interval by {method}"
        text += f", read as no measurable loss only where it contains 0 and stays within {within}"
    text += "."
    version = (result.get("environment") or {}).get("fedcore")
    if version:
        text += f" Computed with Fedcore {plain(version)}."
    return text
