"""The metrics that a task can name, by their names, and scores of pooled rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedcore.errors import BadInput, UnknownName
from fedcore.learning.metrics import counting, probability, ranking, values
from fedcore.learning.metrics.definition import Floats, Integers, Metric, Values

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (*counting.METRICS, *ranking.METRICS, *probability.METRICS, *values.METRICS)
}
"""Every metric a task can name that is one number; `confusion_matrix` is none. A task with an `evaluate` function
brings its own."""


def get(names: Iterable[str]) -> tuple[Metric, ...]:
    """The metrics of these names, in their order. Raises UnknownName."""
    found = tuple(names)
    for name in found:
        if name not in METRICS:
            raise UnknownName("metric", name, (*METRICS, counting.CONFUSION))
    return tuple(METRICS[name] for name in found)


@dataclass(frozen=True)
class Scores:
    """One arm's outputs on the union of test rows, pooled: exists in simulation only.

    outputs: `(n,)` or `(n, C)` float64; targets: `(n,)` class indices or values; sites: `(n,)`
    int64, the index of the site each row belongs to. Raises BadInput when lengths differ.
    """

    outputs: Floats = field(repr=False)
    targets: Values = field(repr=False)
    sites: Integers = field(repr=False)

    def __post_init__(self) -> None:
        lengths = (len(self.outputs), len(self.targets), len(self.sites))
        if len(set(lengths)) != 1:
            raise BadInput(
                f"scores: found {lengths[0]} outputs, {lengths[1]} targets and {lengths[2]} sites, "
                "expected one of each per row"
            )

    def __len__(self) -> int:
        return len(self.targets)


def site_mean(sites: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Unweighted mean over sites of each metric, over the sites where it is defined; else None."""
    means: dict[str, float | None] = {}
    for name in sites[0] if sites else ():
        defined = [value for site in sites if (value := site[name]) is not None]
        means[name] = sum(defined) / len(defined) if defined else None
    return means
