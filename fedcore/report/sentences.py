"""Numbers into words: the sentences of the report, the terminal and the Methods paragraph.

Invariant: a loss is stated only when its whole interval lies above 0. Fractions come in, points
(fraction x 100) go out, and positive always means lost against centralised training.
Everything returned is plain text, free of control characters; escaping for HTML, Markdown, LaTeX or
a terminal belongs to the module that draws it.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Json = dict[str, Any]

# The names are those of fedcore.types.ARMS and GAP_PARTS (a test compares them): importing those
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
"""Metrics of which less is better; every gap and gain is turned so that positive means worse or
better as its name says (a test compares them with fedcore.comparison.metrics)."""

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


def better_by(metric: str, one: float | None, other: float | None) -> float | None:
    """How much better `one` is than `other`, as a fraction; None where either is unknown."""
    if one is None or other is None:
        return None
    return other - one if metric in ERRORS else one - other


def score(value: Any) -> str:
    """A metric, three decimals, or an en dash."""
    found = number(value)
    return DASH if found is None else f"{found:.3f}"


def points(fraction: float | None, *, signed: bool = False) -> str:
    """A difference of metrics in points, two decimals; never `-0.00`."""
    if fraction is None:
        return DASH
    text = f"{fraction * 100:+.2f}" if signed else f"{fraction * 100:.2f}"
    return "0.00" if float(text) == 0 else text


def interval(gap: Mapping[str, Any] | None) -> str:
    """`-0.90 to 0.60` in points; empty where there is no interval, `exact` where it is all 0."""
    low, high = bounds(gap)
    if low is None or high is None:
        return ""
    if low == high == 0:
        return "exact"
    return f"{points(low)} to {points(high)}"


def gap_points(gap: Mapping[str, Any] | None) -> str:
    """The gap in points; a bare `0` only where it and its interval are exactly 0."""
    return "0" if interval(gap) == "exact" else points(number(gap))


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
    return "AUC" if metric == "auc" else plain(metric).replace("_", " ")


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


def metrics_of(result: Mapping[str, Any]) -> list[str]:
    """The task's metrics, in its order."""
    return list(result.get("metrics") or [])


def gap_of(result: Mapping[str, Any], part: str, metric: str) -> Json | None:
    """One gap with its interval, or None."""
    found = ((result.get("gap") or {}).get(part) or {}).get(metric)
    return dict(found) if isinstance(found, Mapping) else None


def primary_metric(result: Mapping[str, Any]) -> str | None:
    """The metric of the headline and the plot: AUC where it exists, else the first one with a gap.

    AUC uses every score where accuracy uses one threshold, so its interval is the narrower one.
    """
    metrics = metrics_of(result)
    for metric in sorted(metrics, key=lambda m: m != "auc"):
        if number(gap_of(result, "total", metric)) is not None:
            return metric
    return metrics[0] if metrics else None


def ordered_metrics(result: Mapping[str, Any]) -> list[str]:
    """The headline's metric first, then the others in the task's order."""
    first = primary_metric(result)
    return sorted(metrics_of(result), key=lambda m: m != first)


def why_missing(metric: str, site: Mapping[str, Any] | None = None) -> str:
    """The known reason why a metric is null: an AUC needs both classes among the test rows."""
    if site and site.get("test_rows") == 0:
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

    A loss is stated only when its interval lies above 0.
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
        reason = why_missing(metric)
        return f"{capitalised(name)}: {DASH}" + (
            f" ({reason} among the test rows)." if reason else "."
        )
    value, span = points(mean), interval(gap)
    if low is None or high is None:
        return f"{capitalised(name)}: {value} points lost, with no interval to judge them by."
    if low == high == mean == 0:
        return f"{capitalised(name)} is exactly that of the centralised arm."
    if low <= 0 <= high:
        return f"No loss measurable{against}: {name} {value} points, interval {span}."
    if low > 0:
        return f"{value} points of {name} lost{against}, interval {span}."
    return f"No loss{against}: {name} {value} points, interval {span}; federated is higher."


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
        gains[site] = better_by(metric, together, alone)
    return gains


def gained(result: Mapping[str, Any]) -> list[str]:
    """What each site gained over staying alone: the count first, then the sites by name."""
    metric = primary_metric(result)
    gains = site_gains(result, metric) if metric else {}
    known = [g for g in gains.values() if g is not None]
    if metric is None or not known:
        return ["Not measured per site."]
    name = metric_name(metric)
    higher = sum(g > 0 for g in known)
    average = f", averaged over {_splits(result)}" if is_comparison(result) else ""
    sites_known = plural(len(known), "site")
    if len(known) < len(gains):
        sites_known = f"the {sites_known} with a known {name}"
    first = f"{higher} of {sites_known} score higher in {name} together than alone{average}"
    if len(gains) <= 8:
        sites_of = result["per_site"]
        sites = ", ".join(
            f"{plain(site)} {points(gain, signed=True)}"
            + (
                f" ({reason})"
                if gain is None and (reason := why_missing(metric, sites_of[site]))
                else ""
            )
            for site, gain in gains.items()
        )
        sentences = [f"{first}; gained in points: {sites}."]
    else:
        middle = sorted(known)[len(known) // 2]
        sentences = [
            f"{first}; from {points(min(known), signed=True)} to {points(max(known), signed=True)} "
            f"points, the middle site {points(middle, signed=True)}."
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
        f"Protection changed {metric_name(worst)} by {points(known[worst])} points; "
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
    """`A`, `B`, ... for several runs (numbers beyond `Z`): a table head has no room for a folder."""
    return [chr(ord("A") + i) if len(results) <= 26 else str(i + 1) for i in range(len(results))]


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
    if result.get("statistics"):
        text += (
            " Missing values were imputed and features standardised with means and standard deviations over the "
            "sites' training rows, which were computed through the same protected sum."
        )
    return text


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
        text += f", {plan['fields_per_slot']} to a {plan['slot_bits']}-bit slot"
    protection = result.get("protection")
    if protection == "plain":
        text += "; their sum was not protected (simulation only)"
    elif protection == "encrypted":
        text += ", and summed under BFV homomorphic encryption"
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
    clipped = number(result.get("clipped_fraction"))
    if clipped is not None:
        text += (
            f" Of all coordinates sent, {clipped * 100:.2g} % exceeded the range and were clipped."
            if clipped
            else " No coordinate exceeded the range."
        )
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


def _methods_evaluation(result: Mapping[str, Any]) -> str:
    names = listed(metric_name(m) for m in metrics_of(result))
    arms = listed(
        ARM_NAMES[a]
        for a in ("centralised", "local_only", "federated_float")
        if a in arms_of(result)
    )
    text = ""
    if arms:
        text = f"Reference arms ({arms}) used the same seeds and splits and saw as many training rows. "
    verb = "were" if len(metrics_of(result)) > 1 else "was"
    text += f"{capitalised(names)} {verb} measured over the union of the sites' test rows"
    if method := how_measured(result):
        text += f"; the gap is centralised minus federated, with an interval by {method}"
    text += "."
    version = (result.get("environment") or {}).get("fedcore")
    if version:
        text += f" Computed with Fedcore {plain(version)}."
    return text
