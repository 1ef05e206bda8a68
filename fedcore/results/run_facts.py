"""What there is to say of a run beside its scores: rows, model, cost, absences, what each party held, its origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedcore.results.arm_scores import ByMetric, Matrix
from fedcore.results.json_record import JsonRecord


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

    bound: on their error. clipped: {metric: rows whose error was clipped}. sites: those in the sums. confusion: where
    the task asks for it.
    """

    metrics: ByMetric | None = field(default=None, metadata={"key": "protected_metrics"})
    bound: ByMetric | None = field(default=None, metadata={"key": "protected_metrics_bound"})
    clipped: Mapping[str, int] | None = field(default=None, metadata={"key": "protected_clipped"})
    sites: tuple[str, ...] | None = field(default=None, metadata={"key": "protected_metrics_sites"})
    abandoned: AbandonedRound | None = field(
        default=None, metadata={"key": "protected_metrics_abandoned"}
    )
    confusion: Matrix | None = field(default=None, metadata={"key": "protected_confusion"})
    _left_out = ("confusion",)


@dataclass(frozen=True)
class Origin(JsonRecord):
    """Where and when it was made, its folder, and what to type to make it again."""

    environment: Mapping[str, Any] = field(default_factory=dict)
    started: str = ""
    run: str = ""
    reproduce: str = ""
