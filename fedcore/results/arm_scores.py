"""What the arms of a run reached: scores with their intervals, and what they are held against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedcore.results.json_record import JsonRecord

ERRORS = frozenset({"mse", "rmse", "mae", "log_loss", "calibration_error"})
"""Built-in metrics of which less is better (a test compares them with fedcore.learning.metrics)."""

Matrix = tuple[tuple[int, ...], ...]
"""A confusion matrix: rows of each true class, by the class predicted."""

ByMetric = Mapping[str, float | None]
"""{metric: value}, None where the metric is undefined: no test rows, or an AUC of one class."""


@dataclass(frozen=True)
class Interval(JsonRecord):
    """An estimate with its 95 % interval.

    mean: the point estimate, None where the metric is undefined in one of the arms.
    low, high: None where there is nothing to compute an interval from.
    method: a phrase for a reader. n: test rows or splits behind it.
    """

    mean: float | None
    low: float | None = None
    high: float | None = None
    method: str = ""
    n: int = 0

    @property
    def ends(self) -> tuple[float, float] | None:
        """(low, high), None where one of them is missing."""
        return None if self.low is None or self.high is None else (self.low, self.high)


@dataclass(frozen=True)
class Spread(Interval):
    """A metric over the splits of a comparison. sd: its standard deviation, None of one split."""

    sd: float | None = None


@dataclass(frozen=True)
class ArmResult(JsonRecord):
    """What one arm reached over the union of the sites' test rows, and what it was trained with. confusion: None for a
    regression."""

    metrics: ByMetric
    loss: float | None = None
    gradient_steps: int | None = None
    examples_seen: int | None = None
    confusion: Matrix | None = None
    _beside = ("metrics",)


@dataclass(frozen=True)
class BestRound(JsonRecord):
    """The round in which an arm was best on the validation rows (`experiment/selection.py`), of a comparison the
    means over its splits.

    validation: what it reached on the validation rows there; metrics: on the test rows, which chose nothing.
    """

    round: float
    validation: ByMetric
    metrics: ByMetric


@dataclass(frozen=True, kw_only=True)
class Trend(JsonRecord):
    """How an arm's scores went on, as far as it is more than their noise (`experiment/convergence.py`).

    last: the score after the last round. gained: by how much it got better over the last `window` rounds, None
    where it did not. best_round, best: of an arm that got worse since then.
    """

    last: float
    window: int | None = None
    gained: float | None = None
    best_round: int | None = None
    best: float | None = None
    _left_out = ("window", "gained", "best_round", "best")


@dataclass(frozen=True)
class Convergence(JsonRecord):
    """What there is to say of the arms' scores round by round. validated: they are of the validation rows, not of
    the test rows; arms: {arm: its trend}, without the arms that there is nothing to say of."""

    metric: str
    validated: bool
    arms: Mapping[str, Trend]


@dataclass(frozen=True)
class ConstantResult(JsonRecord):
    """What the constant prediction reaches on the arms' test rows (`learning/constant.py`).

    predicts: `class`, the most frequent one of the training rows, or `mean`, of their targets.
    """

    predicts: str
    metrics: ByMetric
    _beside = ("metrics",)


@dataclass(frozen=True)
class SiteResult(JsonRecord):
    """One site. arms: {arm: what it reached on this site's test rows}; of a comparison that is all.

    validation_rows: kept apart from training to judge rounds by, None where the job keeps none.
    class_counts: {class: rows}, empty where targets are no classes.
    rounds_in_sum: how many rounds' sums the site was in.
    """

    rows: int | None = None
    train_rows: int | None = None
    test_rows: int | None = None
    validation_rows: int | None = None
    class_counts: Mapping[str, int] | None = None
    rounds_in_sum: int | None = None
    arms: Mapping[str, ByMetric] = field(default_factory=dict)
    _beside = ("arms",)
    _left_out = ("rows", "train_rows", "test_rows", "validation_rows", "class_counts", "rounds_in_sum")  # fmt: skip


@dataclass(frozen=True)
class SplitResult(JsonRecord):
    """One seed and fold of a comparison. gap: {part: {metric: difference}}; the others as in a run."""

    seed: int
    fold: int
    model_sha256: str
    arms: Mapping[str, ByMetric]
    gap: Mapping[str, ByMetric]
    per_site: Mapping[str, Mapping[str, ByMetric]] = field(default_factory=dict)
    constant: ConstantResult | None = None
    best: Mapping[str, BestRound] | None = None
    convergence: Convergence | None = None
    _left_out = ("constant", "best", "convergence")
