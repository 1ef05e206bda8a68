"""The lines of `rounds.jsonl` and `metrics.jsonl`: of a run, of the coordinator and of a site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from fedcore.results.arm_scores import ArmResult, ByMetric, ConstantResult, Matrix
from fedcore.results.json_record import JsonRecord
from fedcore.results.run_facts import AbandonedRound

Column = str | int | float | Sequence[str] | Mapping[str, ByMetric] | None
Columns = dict[str, Column]

ROW_COLUMNS = frozenset({
    "abandoned", "arm", "bytes_down", "bytes_up", "clipped_fraction", "examples_seen", "fold", "gradient_steps", "loss",
    "peak_memory_mb", "per_site", "range", "round", "seed", "survivors", "train_loss",
})  # fmt: skip
"""Of a `RoundRow` beside its metrics, what is derived from these, and `seconds_{stage}`."""


def is_column(name: str) -> bool:
    """Whether rows and results have something else under a name beside their metrics: no metric can have it."""
    beside = {each.name for record in (ArmResult, ConstantResult) for each in fields(record)}
    return name in ROW_COLUMNS | beside - {"metrics"} or name.startswith("seconds_")


class RoundRow(Columns):
    """One line of `rounds.jsonl`: an arm after a round, one column for every number.

    Beside the properties: `{metric}`, `loss`, `train_loss`, `gradient_steps`, `examples_seen`, and of the
    federated arm `range`, `bytes_up`, `seconds_{stage}`, `protected_{metric}_before` and others. A list of
    rows is a table as it is: `pandas.DataFrame(run.rounds)`; its column `per_site` holds {site: {metric: value}}.
    """

    @property
    def arm(self) -> str:
        return str(self["arm"])

    @property
    def round(self) -> int:
        """1 for the first."""
        return int(self.number("round") or 0)

    @property
    def split(self) -> tuple[Column, Column]:
        """(seed, fold) of a row of a comparison, (None, None) in a run."""
        return self.get("seed"), self.get("fold")

    @property
    def survivors(self) -> Sequence[str]:
        """The sites in the sum; empty where the round was abandoned, and in every arm but the federated."""
        found = self.get("survivors")
        return found if isinstance(found, list) else ()

    @property
    def abandoned(self) -> str:
        """At which stage and why the round was abandoned; empty where it was not."""
        return str(self.get("abandoned") or "")

    @property
    def per_site(self) -> Mapping[str, ByMetric]:
        """{site: {metric: value on its own test rows}}, of a run of few sites and of the arms that a site compares:
        training alone and together. Empty elsewhere."""
        found = self.get("per_site")
        return found if isinstance(found, dict) else {}

    def number(self, column: str) -> float | None:
        """The number in a column; None where there is none."""
        found = self.get(column)
        return found if isinstance(found, int | float) else None


@dataclass(frozen=True, kw_only=True)
class JobRow(JsonRecord):
    """One line of the coordinator's `rounds.jsonl` of a job: a round that ended.

    round: of training; purpose: of the round's vectors; number: of the round in its job, from 1. survivors: the
    sites in the sum, empty where the round was abandoned; roster: the sites that were invited. bytes_up,
    bytes_down: of one site, None where nothing was sent. restarted: the coordinator's process was restarted
    during the round, and the times are those since then.
    """

    round: int
    purpose: str
    number: int = 0
    seconds: float
    survivors: tuple[str, ...]
    roster: tuple[str, ...]
    seconds_by_stage: Mapping[str, float] = field(default_factory=dict)
    restarted: bool | None = None
    bytes_up: int | None = None
    bytes_down: int | None = None
    abandoned: AbandonedRound | None = None
    _left_out = ("restarted", "bytes_up", "bytes_down", "abandoned")

    def as_round(self) -> RoundRow:
        """The row of a simulation that means the same, of the federated arm."""
        row = RoundRow(round=self.round, survivors=list(self.survivors), seconds=self.seconds)
        if (why := self.abandoned) is not None:
            row["abandoned"] = f"at {why.stage}: {why.left} sites stayed, {why.needed} needed"
        return RoundRow(row, arm="federated")


@dataclass(frozen=True, kw_only=True)
class ReferenceGap(JsonRecord):
    """The registered value of a metric, and how far below it the model is (negative: above it).

    gap: None where the metric is undefined.
    """

    metric: str
    value: float
    source: str
    gap: float | None


@dataclass(frozen=True, kw_only=True)
class MetricsRow(JsonRecord):
    """One line of the coordinator's `metrics.jsonl`: the metrics of one release over the test rows of all sites.

    round: of training that led to the model, 0 of the first model; number: of the round that summed the metrics;
    sites: how many are in the sums.
    """

    round: int
    number: int
    sites: int
    metrics: ByMetric
    reference: ReferenceGap | None = None
    _left_out = ("reference",)


@dataclass(frozen=True, kw_only=True)
class SiteRow(JsonRecord):
    """One line of a site's own `rounds.jsonl` of a job: the accuracy after a release.

    here: of the released model on this site's test rows; alone: of a model trained on this site's rows only;
    gained: their difference. everywhere_before: over the test rows of all `sites`, of the model that the round
    started from. reference: the gap of `everywhere_before` to a registered value. clipped_fraction: share of all
    coordinates of the round's updates that were beyond the range, and clipped; next_range: R of the next round;
    both of an update only. confusion: {`here`, `everywhere_before`: matrix}, where the task asks for it.
    """

    round: int
    purpose: str
    sites: int
    here: ByMetric = field(default_factory=dict)
    alone: ByMetric = field(default_factory=dict)
    gained: ByMetric = field(default_factory=dict)
    everywhere_before: ByMetric
    reference: ReferenceGap | None = None
    clipped_fraction: float | None = None
    next_range: float | None = None
    confusion: Mapping[str, Matrix | None] | None = None
    _left_out = ("reference", "clipped_fraction", "next_range", "confusion")
