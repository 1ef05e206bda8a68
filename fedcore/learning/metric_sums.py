"""A task's metrics as wide integers in a site's vector, and the values that their sums give.

Built-in metrics are non-negative integer sums already. A task's own `evaluate` returns
`(total, count)` pairs of floats: they are sent as fixed-point numbers with an offset and 16 fractional bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import BadInput
from fedcore.learning.data.targets import TargetScale
from fedcore.learning.metrics import counting, get
from fedcore.learning.metrics.definition import Floats, Metric, Values, clipped_rows
from fedcore.learning.scoring import Scored, pooled
from fedcore.learning.task import Task
from fedcore.secagg.judge_plan import OWN_BITS
from fedcore.secagg.plan import MATRIX, METRIC, Wide

OWN_FRACTION_BITS = 16
_OFFSET = 1 << (OWN_BITS - 1)
_CONFUSION = MATRIX + counting.CONFUSION


@dataclass(frozen=True)
class MetricTransport:
    """metrics: built-in ones (empty if the task has its own `evaluate`); own: the names that it returns.

    columns: outputs per row; max_rows: the largest number of test rows of a site, for the bits of sums.
    matrix: whether the sums of the confusion matrix travel too.
    """

    metrics: tuple[Metric, ...]
    own: tuple[str, ...]
    columns: int
    max_rows: int
    matrix: bool = False

    @classmethod
    def of(cls, task: Task, sample: Scored, max_rows: int) -> MetricTransport:
        """sample: any scored rows of the task; it fixes the number of outputs. Raises UnknownName, and BadInput for
        a confusion matrix of more than 32 classes."""
        if sample.own is not None:
            return cls((), tuple(task.metrics), 0, max_rows)
        columns = 1 if sample.outputs.ndim == 1 else sample.outputs.shape[1]
        if task.has_confusion and columns > counting.CONFUSION_CLASSES:
            raise BadInput(
                f"task.metrics: found {columns} classes, expected at most {counting.CONFUSION_CLASSES} for "
                f"{counting.CONFUSION}",
                remedy="its size is the square of their number; name balanced_accuracy or f1 instead",
            )
        return cls(get(task.scores), (), columns, max_rows, task.has_confusion)

    @property
    def wides(self) -> tuple[Wide, ...]:
        """The wide integers that the plan reserves in every vector."""
        sizes = [
            (m.name, m.size(self.columns), (self.max_rows * m.cap_per_row).bit_length())
            for m in self.metrics
        ]
        sizes += [(name, 2, OWN_BITS) for name in self.own]
        found = [Wide(METRIC + name, count, bits) for name, count, bits in sizes]
        if self.matrix:
            size = counting.confusion_size(self.columns)
            found.append(Wide(_CONFUSION, size, self.max_rows.bit_length()))
        return tuple(found)

    def sums(self, scored: Scored | None) -> dict[str, list[int]]:
        """One site's integers; zeros for a site without test rows (scored None)."""
        out: dict[str, list[int]] = {}
        for metric in self.metrics:
            found = None if scored is None else metric.sums(*_in_steps(metric, scored)).tolist()
            out[METRIC + metric.name] = found or [0] * metric.size(self.columns)
        for name in self.own:
            total, count = (0.0, 0.0) if scored is None or scored.own is None else scored.own[name]
            out[METRIC + name] = [_to_fixed(name, total), _to_fixed(name, count)]
        if self.matrix:
            none = np.zeros(counting.confusion_size(self.columns), dtype=np.int64)
            counts = none if scored is None else _confusion_sums(scored)
            out[_CONFUSION] = counts.tolist()
        return out

    def values(self, parts: Sequence[Scored | None]) -> dict[str, float | None]:
        """{metric: value} over the scored rows of several sites together; None where it is undefined."""
        scores = pooled(parts)
        found: dict[str, float | None] = dict.fromkeys(metric.name for metric in self.metrics)
        if scores is not None:
            found = {m.name: m.exact(scores.outputs, scores.targets) for m in self.metrics}
        sums = [part.own for part in parts if part is not None and part.own is not None]
        for name in self.own:
            count = sum(each[name][1] for each in sums)
            found[name] = sum(each[name][0] for each in sums) / count if count else None
        return found

    def confusion(self, parts: Sequence[Scored | None]) -> tuple[tuple[int, ...], ...] | None:
        """The confusion matrix over the scored rows of several sites; None without rows, for a regression, for a task's
        own `evaluate`, and of more than 32 classes."""
        known = [part for part in parts if part is not None and part.own is None]
        classes = any(not metric.of_values for metric in self.metrics)
        if not known or not classes or self.columns > counting.CONFUSION_CLASSES:
            return None
        return counting.confusion_finish(np.sum([*map(_confusion_sums, known)], axis=0))

    def summed_confusion(
        self, wides: Mapping[str, Sequence[int]]
    ) -> tuple[tuple[int, ...], ...] | None:
        """The confusion matrix that summed integers give. None where the task does not ask for it, and for sums that
        are all zero, as in `finish`."""
        counts = wides.get(_CONFUSION, ()) if self.matrix else ()
        return counting.confusion_finish(_as_array(counts)) if any(counts) else None

    def bounds(self, wides: Mapping[str, Sequence[int]]) -> dict[str, float | None]:
        """{metric: bound on the error of its value from sums}, for metrics with such a bound."""
        return {
            metric.name: metric.error_bound(_as_array(wides[METRIC + metric.name]))
            for metric in self.metrics
            if metric.error_bound is not None
        }

    def clipped(self, wides: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """{metric: rows whose error was beyond the fixed-point range}, for those that have one."""
        return {
            metric.name: clipped_rows(_as_array(wides[METRIC + metric.name]))
            for metric in self.metrics
            if metric.clips
        }

    def finish(
        self, wides: Mapping[str, Sequence[int]], sites: int, scale: TargetScale | None = None
    ) -> dict[str, float | None]:
        """Summed integers of `sites` sites to values: {metric: value or None}. Sums that are all zero were
        not contributed (PROTOCOL H), or no site has a test row: None. scale: of the rows that they are of."""
        values: dict[str, float | None] = {}
        step = 1.0 if scale is None else scale.step
        for metric in self.metrics:
            value = metric.finish(_as_array(wides[METRIC + metric.name]))
            values[metric.name] = None if value is None else value * step**metric.unit_power
        for name in self.own:
            total, count = (v - sites * _OFFSET for v in wides[METRIC + name])
            given = any(wides[METRIC + name])
            values[name] = total / count if given and count else None
        return values


def _in_steps(metric: Metric, scored: Scored) -> tuple[Floats, Values]:
    """Outputs and targets as the metric's sums take them: values near 1 fit their fixed point whatever their unit."""
    if scored.scale is None or not metric.of_values:
        return scored.outputs, scored.targets
    centre, step = scored.scale.centre, scored.scale.step
    return (scored.outputs - centre) / step, (scored.targets.astype(np.float64) - centre) / step


def _confusion_sums(scored: Scored) -> NDArray[np.int64]:
    return counting.confusion_sums(scored.outputs, scored.targets)


def _as_array(values: Sequence[int]) -> NDArray[np.int64]:
    return np.asarray(values, dtype=np.int64)


def _to_fixed(name: str, value: float) -> int:
    if not abs(value) < _OFFSET >> OWN_FRACTION_BITS:
        raise BadInput(
            f"task.evaluate: found {value} in {name!r}, expected a finite number below 2^47 in size"
        )
    return round(value * (1 << OWN_FRACTION_BITS)) + _OFFSET
