"""The schema of results: `result.json`, `rounds.jsonl`, the rows of deployed jobs and the events of `watch`.

Code that writes them builds the records below; code that reads them reads attributes. A record is a mapping as
well, with the keys of its JSON form: `result.rounds` is `result["rounds"]`. Invariant: `from_json(to_json())`
is the same record. Values are fractions (0.01 is one point), bytes and seconds; None stands for a number that
does not exist. Nothing here opens a file: `fedcore/files.py` does.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fedcore.json_record import JsonRecord

SCHEMA = 1
"""Version of result.json and rounds.jsonl. A result of another version is refused."""

ERRORS = frozenset({"mse", "rmse", "mae", "log_loss", "calibration_error"})
"""Built-in metrics of which less is better (a test compares them with fedcore.learning.metrics)."""

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
    """What one arm reached over the union of the sites' test rows, and what it was trained with. confusion: rows of
    each true class, by the class predicted; None for a regression."""

    metrics: ByMetric
    loss: float | None = None
    gradient_steps: int | None = None
    examples_seen: int | None = None
    confusion: tuple[tuple[int, ...], ...] | None = None
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


@dataclass(frozen=True, kw_only=True)
class AbandonedRound(JsonRecord):
    """A round that ended at `stage` with `left` sites, fewer than it needed. seed, fold: of a comparison.

    round: None of the round of metrics only, which follows the last. Of a deployed job, needed: sites; exposed:
    the sites whose sum may be known already, so that no other sum is taken from the same state.
    """

    seed: int | None = None
    fold: int | None = None
    round: int | None = None
    stage: str
    left: int
    needed: int | None = None
    exposed: tuple[str, ...] | None = None
    _left_out = ("seed", "fold", "round", "needed", "exposed")


@dataclass(frozen=True)
class Reading(JsonRecord):
    """One attempt to read a site's update: how the values correlate with it, which share is exact.

    strip: the first coordinates, in per cent of the largest; only of the reading that is drawn.
    """

    correlation: float | None
    exact: float
    strip: tuple[int, ...] | None = None
    _left_out = ("strip",)


@dataclass(frozen=True)
class PartyView(JsonRecord):
    """What one party held: a reading of the upload, one of the sum, and that of the two which tells more.

    None where the party has nothing to read.
    """

    message: Reading | None = None
    sum: Reading | None = None
    best: Reading | None = None


@dataclass(frozen=True)
class UpdateExposure(JsonRecord):
    """What each party held of the update of `site` in a round of `contributors` sites.

    other: the site that looks. coordinates: length of the update. chance: what |correlation| of unrelated
    values stays below, but for one reading in 1000. strip: the update's own, as in `Reading`. own: how the
    other site's update alone correlates. parties, plain: {party: view}, of the run and as under `plain`.
    """

    site: str
    other: str
    round: int
    protection: str
    coordinates: int
    contributors: int
    chance: float
    strip: tuple[int, ...]
    own: float | None
    parties: Mapping[str, PartyView]
    plain: Mapping[str, PartyView]


@dataclass(frozen=True)
class RowCounts(JsonRecord):
    """Rows of all sites together. groups: how many groups they are of, None where every row stands for itself."""

    train: int
    test: int
    validation: int | None = None
    groups: int | None = None
    _left_out = ("validation", "groups")


@dataclass(frozen=True)
class ModelFacts(JsonRecord):
    """The model in words, its length as one vector, and what becomes of its buffers."""

    summary: str = ""
    coordinates: int | None = None
    buffers: str = ""


@dataclass(frozen=True)
class DeployedRun(JsonRecord):
    """The same job as processes of their own (`fedcore up`), beside the run in one process.

    model_sha256: None where the sites hold different models; sites: {site: hash of its model}.
    round_seconds, survivors: of each round of training. equal: it is the model of the simulation.
    """

    job: str
    model_sha256: str | None
    sites: Mapping[str, str]
    seconds: float
    round_seconds: tuple[float, ...]
    survivors: tuple[tuple[str, ...], ...]
    processes: tuple[Mapping[str, str], ...]
    folder: str
    equal: bool = False
    simulated_sha256: str = ""


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


@dataclass(frozen=True)
class Cost(JsonRecord):
    """Bytes, seconds and memory.

    bytes_up, bytes_down: of one site in a round. ciphertexts: sent by a site in a round; ciphertext_used:
    the share of them that is filled. Of a run only: bytes_per_parameter sent, seconds {stage: spent in the
    federated arm}, peak_memory_mb.
    """

    bytes_up: int | None = field(default=None, metadata={"key": "bytes_up_per_site_round"})
    bytes_down: int | None = field(default=None, metadata={"key": "bytes_down_per_site_round"})
    ciphertexts: int | None = field(default=None, metadata={"key": "ciphertexts_up"})
    ciphertext_used: float | None = None
    seconds_total: float | None = None
    bytes_per_parameter: float | None = field(
        default=None, metadata={"key": "bytes_per_parameter_up"}
    )
    seconds: Mapping[str, float] | None = None
    peak_memory_mb: float | None = None
    _left_out = ("bytes_per_parameter", "seconds", "peak_memory_mb")


@dataclass(frozen=True)
class SumFacts(JsonRecord):
    """How the sums came out. clipped_fraction: of the coordinates sent, those beyond the range.

    unequal_rounds: whose opened sum was not the plain integer sum, which must never be.
    """

    clipped_fraction: float | None = None
    unequal_rounds: int = 0


@dataclass(frozen=True)
class Absences(JsonRecord):
    """Simulated absences: what was asked for, how often a site left a round, the rounds that ended of it."""

    drop: tuple[str, ...] = ()
    dropout: float = 0.0
    count: int = field(default=0, metadata={"key": "absences"})
    abandoned: tuple[AbandonedRound, ...] = field(default=(), metadata={"key": "abandoned_rounds"})


@dataclass(frozen=True)
class ProtectedMetrics(JsonRecord):
    """The final model's metrics as the sites know them, from protected sums; None if that round was abandoned.

    bound: on their error. clipped: {metric: rows whose error was clipped}. sites: those in the sums.
    """

    metrics: ByMetric | None = field(default=None, metadata={"key": "protected_metrics"})
    bound: ByMetric | None = field(default=None, metadata={"key": "protected_metrics_bound"})
    clipped: Mapping[str, int] | None = field(default=None, metadata={"key": "protected_clipped"})
    sites: tuple[str, ...] | None = field(default=None, metadata={"key": "protected_metrics_sites"})
    abandoned: AbandonedRound | None = field(
        default=None, metadata={"key": "protected_metrics_abandoned"}
    )


@dataclass(frozen=True)
class Origin(JsonRecord):
    """Where and when it was made, its folder, and what to type to make it again."""

    environment: Mapping[str, Any] = field(default_factory=dict)
    started: str = ""
    run: str = ""
    reproduce: str = ""


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
    model: ModelFacts = ModelFacts()
    cost: Cost = Cost()
    sums: SumFacts = SumFacts()
    absences: Absences = Absences()
    label: str = ""
    plan: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    origin: Origin = Origin()
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
    of the warnings that the plan and the sites' rows give reason for. deployment: of `fedcore up`.
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
    protected: ProtectedMetrics = ProtectedMetrics()
    seen: UpdateExposure | None = None
    statistics: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    deployment: DeployedRun | None = None
    _beside = ("cost", "sums", "absences", "origin", "judged", "protected")
    _left_out = ("convergence", "deployment")

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


Column = str | int | float | Sequence[str] | Mapping[str, ByMetric] | None
Columns = dict[str, Column]


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
    both of an update only.
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
    _left_out = ("reference", "clipped_fraction", "next_range")


@dataclass(frozen=True, kw_only=True)
class AwaitedSite(JsonRecord):
    """A site that a job waits for: what it is doing, or when it was last seen (seconds since 1970)."""

    doing: str = ""
    last_seen: float | None = None


@dataclass(frozen=True, kw_only=True)
class JobWait(JsonRecord):
    """What a job waits for. sites: {site: what is known of it, or None}, out of `of`.

    until: seconds since 1970, None without a deadline; then: sites that it continues with, 0 where it cannot;
    least: sites that it needs; in_round: a round is under way, so at `until` only the round is given up.
    """

    sites: Mapping[str, AwaitedSite | None] = field(metadata={"key": "for"})
    of: int
    until: float | None = None
    then: int
    least: int
    in_round: bool


@dataclass(frozen=True, kw_only=True)
class JobSite(JsonRecord):
    """One site in the lists of `jobs` and `watch`. since, last_seen: seconds since 1970; unable: why it takes no
    part in the job, empty where it does."""

    connected: bool = False
    evicted: bool = False
    since: float | None = None
    last_seen: float | None = None
    doing: str = ""
    unable: str = ""


@dataclass(frozen=True, kw_only=True)
class JobSummary(JsonRecord):
    """One job in the list of `jobs`.

    state: `waiting` in the queue, `running`, or how it ended; text: the reason. stage: of the round under way;
    step: (purpose, round of training), None before the first and after the last. waiting_until: seconds since
    1970. public_metrics: None before there is a plan. model: the coordinator has the model. metrics: the newest.
    """

    job: str
    task: str
    state: str
    text: str = ""
    stage: str = ""
    step: tuple[str | int, ...] | None = None
    rounds: int
    rounds_done: int = 0
    protection: str
    waiting_for: tuple[str, ...] = ()
    waiting_until: float | None = None
    waiting: JobWait | None = None
    public_metrics: bool | None = None
    model: bool = False
    metrics: MetricsRow | None = None


@dataclass(frozen=True, kw_only=True)
class JobEvent(JobSummary):
    """One event of `watch`: the job now, and the rows that came since the event before."""

    sites: Mapping[str, JobSite] = field(default_factory=dict)
    new_rounds: tuple[JobRow, ...] = ()
    new_metrics: tuple[MetricsRow, ...] = ()


@dataclass(frozen=True)
class ListedRun:
    """A run's folder in a list. result: None while it is unfinished; abandoned: it cannot be finished.

    changed: when it was begun, in seconds since the epoch.
    """

    folder: str
    result: RunResult | ComparisonResult | None = None
    abandoned: bool = False
    changed: float = 0.0
