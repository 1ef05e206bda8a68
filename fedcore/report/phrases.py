"""Numbers and names as text, the same in every form of the report.

Fractions come in, points (fraction x 100) go out; an error such as MSE, of which less is better, is no
fraction and keeps its own unit. A number that does not exist is `DASH`. Everything returned is plain text,
free of control characters; escaping for HTML, Markdown, LaTeX or a terminal belongs to the module that draws it.
"""

import math
import unicodedata
from collections.abc import Iterable
from typing import Protocol

from fedcore.files.units import in_bytes
from fedcore.results import Interval, Result


class Measured(Protocol):
    """What has metrics of which it knows whether less is better: a result, a cell of a grid."""

    def is_error(self, metric: str) -> bool:
        """Whether less of the metric is better."""
        ...


# The names are those of types.ARMS and experiment.gap.PARTS (a test compares them): importing those
# would load numpy before the first line of a run is on the screen.
ARM_NAMES = {
    "centralised": "centralised",
    "local_only": "local only",
    "federated_float": "federated, float",
    "federated": "federated",
}
PARTS = ("federation", "quantisation", "privacy", "protection")
PART_NAMES = {part: part for part in (*PARTS, "total")}
GAP_OF_ARM = {"local_only": "local_only", "federated_float": "federation", "federated": "total"}
"""Which entry of the gap is `centralised - arm`; a result may hold none for local_only."""

PROTECTION_STAGES = ("encode", "protect", "fold", "unprotect")

_ACRONYMS = frozenset({"auc", "auprc", "f1", "r2", "mse", "rmse", "mae"})

DASH = "–"
"""In place of a number that does not exist."""


def plain(value: object) -> str:
    """`str(value)` on one line: control and formatting characters become a visible replacement.

    Task names and site ids come from users; an escape sequence in one must not reach a terminal.
    """
    text = " ".join(str(value).split())
    if text.isprintable():  # nearly all
        return text
    return "".join("�" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in text)


def points(fraction: float | None, *, signed: bool = False) -> str:
    """A difference of metrics in points, two decimals; never `-0.00`."""
    if fraction is None:
        return DASH
    text = f"{fraction * 100:+.2f}" if signed else f"{fraction * 100:.2f}"
    return "0.00" if float(text) == 0 else text


def score(value: float | None) -> str:
    """A metric, three decimals (two digits below 0.01, none from 10,000), or an en dash."""
    if value is None:
        return DASH
    if 0 < abs(value) < 0.01:
        return f"{value:.2g}"
    return f"{value:.3f}" if abs(value) < 10_000 else f"{value:,.0f}"


def count(value: float | None) -> str:
    """A whole number with thousands separated, or an en dash."""
    return DASH if value is None else f"{value:,.0f}"


def amount(result: Measured, metric: str, value: float | None, *, signed: bool = False) -> str:
    """A difference of the metric: points, or of an error three digits in its own unit."""
    if value is None or not result.is_error(metric):
        return points(value, signed=signed)
    if value == 0 or not math.isfinite(value):
        return "0.00" if value == 0 else str(value)
    sign = "+" if signed else ""
    magnitude = math.floor(math.log10(abs(value)))
    if -5 <= magnitude < 6:
        return f"{value:{sign},.{max(0, 2 - magnitude)}f}"
    return f"{value:{sign}.2e}"


def unit(result: Measured, metric: str) -> str:
    """What `amount` counts: `points`, or nothing for an error, whose unit is the task's."""
    return "" if result.is_error(metric) else "points"


def measure(result: Measured, metric: str, value: float | None) -> str:
    """`1.38 points`, of an error `1.22`."""
    return " ".join((amount(result, metric, value), unit(result, metric))).rstrip()


def quantity(result: Measured, metric: str, value: float | None) -> str:
    """`1.38 points of AUC`, `1.22 of MSE`."""
    return " of ".join((measure(result, metric, value), metric_name(metric)))


def in_units(results: Iterable[Measured], metrics: Iterable[str]) -> str:
    """The end of a note on differences: `in points`, `in points (MSE in its own unit)`."""
    metrics, found = list(metrics), list(results)
    own = [metric_name(m) for m in metrics if any(result.is_error(m) for result in found)]
    its = "its own unit" if len(own) == 1 else "their own units"
    if len(own) == len(metrics) > 0:
        return f"in {its}"
    return f"in points ({listed(own)} in {its})" if own else "in points"


def interval(result: Measured, metric: str, gap: Interval | None) -> str:
    """`-0.90 to 0.60`; empty where there is no interval, `exact` where it is all 0."""
    if gap is None or gap.ends is None:
        return ""
    if gap.ends == (0, 0):
        return "exact"
    return " to ".join(amount(result, metric, end) for end in gap.ends)


def gap_amount(result: Measured, metric: str, gap: Interval | None) -> str:
    """The gap's mean; a bare `0` only where it and its interval are exactly 0."""
    exact = interval(result, metric, gap) == "exact"
    return "0" if exact else amount(result, metric, gap.mean if gap is not None else None)


def arm_name(arm: str, result: Result | None = None) -> str:
    """The arm's name in a table; the federated arm with its protection."""
    name = ARM_NAMES.get(arm, plain(arm))
    if arm != "federated" or result is None:
        return name
    return f"{name}, {plain(result.protection)}"


def constant_name(result: Result) -> str:
    """The row of the constant prediction, empty where the result has none."""
    if result.constant is None:
        return ""
    return {"mean": "training mean"}.get(result.constant.predicts, "majority / chance")


def size(count: float | None) -> str:
    """Bytes in decimal units; `DASH` for none."""
    return DASH if count is None else in_bytes(count)


def duration(seconds: float | None) -> str:
    """Seconds for a person: `3 ms`, `0.31 s`, `12.4 s`, `3 min 20 s`, `1 h 4 min`."""
    if seconds is None:
        return DASH
    if seconds == 0:
        return "0 s"
    if seconds < 0.1:
        return f"{max(seconds * 1000, 0.1):.{0 if seconds > 0.001 else 1}f} ms"
    if seconds < 60:
        return f"{seconds:.{2 if seconds < 10 else 1}f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def metric_name(metric: str) -> str:
    """The metric's name in a sentence or table head."""
    return metric.upper() if metric in _ACRONYMS else plain(metric).replace("_", " ")


def capitalised(sentence: str) -> str:
    """The first letter upper case, the rest untouched."""
    return sentence[:1].upper() + sentence[1:]


def listed(items: Iterable[str]) -> str:
    """`a, b and c`."""
    *parts, last = list(items) or [""]
    return f"{', '.join(parts)} and {last}" if parts else last


def plural(n: int, word: str) -> str:
    """`1 site`, `4 sites`."""
    return f"{n:,} {word}" + ("" if n == 1 else "s")
