"""`result.json` of a run and of a comparison, and a run's folder in a list."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fedcore.results.arm_scores import (
    ERRORS,
    ArmResult,
    BestRound,
    ByMetric,
    ConstantResult,
    Convergence,
    Interval,
    SiteResult,
    SplitResult,
    Spread,
)
from fedcore.results.json_record import JsonRecord
from fedcore.results.run_facts import (
    Absences,
    Cost,
    DeployedRun,
    ModelFacts,
    Origin,
    ProtectedMetrics,
    RowCounts,
    SumFacts,
    UpdateExposure,
)

SCHEMA = 1
"""Version of result.json and rounds.jsonl. A result of another version is refused."""


@dataclass(frozen=True)
class Judged(JsonRecord):
    """What the arms' scores are held against; `Result` describes the entries."""

    constant: ConstantResult | None = None
    best: Mapping[str, BestRound] | None = None
    kept: str | None = None
    _left_out = ("constant", "best", "kept")


@dataclass(frozen=True, kw_only=True)
class Result(JsonRecord):
    """What a run and a comparison share.

    lower_is_better: the metrics that are errors; None in files of before it was stated. gap: {part: {metric:
    what was lost}}, positive means lost.
    plan, train: as `plan.json` has them. warnings: sentences.
    """

    schema: int = SCHEMA
    kind: str = ""
    task: str
    protection: str
    rounds: int
    sites: tuple[str, ...]
    metrics: tuple[str, ...]
    lower_is_better: tuple[str, ...] | None = None
    gap: Mapping[str, Mapping[str, Interval]]
    per_site: Mapping[str, SiteResult]
    model: ModelFacts = field(default_factory=ModelFacts)
    cost: Cost = field(default_factory=Cost)
    sums: SumFacts = field(default_factory=SumFacts)
    absences: Absences = field(default_factory=Absences)
    label: str = ""
    plan: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    origin: Origin = field(default_factory=Origin)
    _beside: ClassVar[tuple[str, ...]] = ("cost", "sums", "absences", "origin")

    def is_error(self, metric: str) -> bool:
        """Whether less of the metric is better: as stated, else whether it is one of the built-in errors."""
        return metric in (ERRORS if self.lower_is_better is None else self.lower_is_better)

    def better_by(self, metric: str, one: float | None, other: float | None) -> float | None:
        """How much better `one` is than `other`, in the metric's unit; None where either is unknown."""
        if one is None or other is None:
            return None
        return other - one if self.is_error(metric) else one - other

    @property
    @abstractmethod
    def judged(self) -> Judged:
        """What the arms' scores are held against."""

    @property
    def constant(self) -> ConstantResult | None:
        """None where the task evaluates itself; of a comparison the mean."""
        return self.judged.constant

    @property
    def best(self) -> Mapping[str, BestRound] | None:
        """{arm: its best round}, None where no rows were kept apart to judge by."""
        return self.judged.best

    @property
    def kept(self) -> str | None:
        """`best` where the scores and the released model are of these rounds, None where they are of the last one."""
        return self.judged.kept

    @property
    @abstractmethod
    def arm_names(self) -> Sequence[str]:
        """The arms that were run."""

    @abstractmethod
    def score(self, arm: str, metric: str) -> float | None:
        """What an arm reached: the value over all test rows, of a comparison the mean over its splits."""

    def gap_of(self, part: str, metric: str) -> Interval | None:
        """One part of what was lost, None where it was not measured."""
        return self.gap.get(part, {}).get(metric)

    def mean_gap(self, part: str, metric: str) -> float | None:
        """The estimate of `gap_of`, None where there is none."""
        gap = self.gap_of(part, metric)
        return gap.mean if gap is not None else None

    def site_score(self, site: str, arm: str, metric: str) -> float | None:
        """What an arm reached on the test rows of a site."""
        found = self.per_site.get(site, SiteResult())
        return found.arms.get(arm, {}).get(metric)


@dataclass(frozen=True, kw_only=True)
class RunResult(Result):
    """`result.json` of one run.

    stopped: why it ended before its last round. convergence: None of too few rounds. site_mean: {arm: unweighted mean
    over the sites}. seen: None where no round could show it. statistics: what the columns were scaled by. notes: those
    of the warnings that the plan and the sites' rows give reason for. deployment: of `fedcore up`. sum: "exact"
    where sums were added without the protection's cryptography. executor: how sites were trained, where it was chosen.
    """

    kind: str = "run"
    seed: int
    fold: int = 0
    folds: int | None = None
    stopped: str | None = None
    convergence: Convergence | None = None
    rows: RowCounts | None = None
    model_sha256: str = ""
    arms: Mapping[str, ArmResult]
    site_mean: Mapping[str, ByMetric] = field(default_factory=dict)
    judged: Judged = Judged()
    protected: ProtectedMetrics = field(default_factory=ProtectedMetrics)
    seen: UpdateExposure | None = None
    statistics: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    deployment: DeployedRun | None = None
    sum: str | None = None
    executor: Mapping[str, Any] | None = None
    _beside = ("cost", "sums", "absences", "origin", "judged", "protected")
    _left_out = ("convergence", "deployment", "sum", "executor")

    @property
    def arm_names(self) -> Sequence[str]:
        return list(self.arms)

    def score(self, arm: str, metric: str) -> float | None:
        return self.arms[arm].metrics.get(metric) if arm in self.arms else None


@dataclass(frozen=True, kw_only=True)
class ComparisonResult(Result):
    """`result.json` of a comparison. arms: {arm: {metric: over all splits}}; cells: its splits.

    folds: 1 where every site brings its own test rows, whatever the job says.
    """

    kind: str = "compare"
    seeds: int
    folds: int
    arms: Mapping[str, Mapping[str, Spread]]
    cells: tuple[SplitResult, ...]
    judged: Judged = Judged()
    _beside = ("cost", "sums", "absences", "origin", "judged")

    @property
    def arm_names(self) -> Sequence[str]:
        return list(self.arms)

    def score(self, arm: str, metric: str) -> float | None:
        found = self.arms.get(arm, {}).get(metric)
        return found.mean if found is not None else None


@dataclass(frozen=True)
class ListedRun:
    """A run's folder in a list. result: None while it is unfinished; abandoned: it cannot be finished.

    changed: when it was begun, in seconds since the epoch.
    """

    folder: str
    result: RunResult | ComparisonResult | None = None
    abandoned: bool = False
    changed: float = 0.0
