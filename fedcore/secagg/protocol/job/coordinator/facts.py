"""The state of a coordinator's job that its parts share: settings, what the journal has, and the sites.

Each part reads all of it; each field is changed by one part only.
"""

from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fedcore.results import JobRow, MetricsRow
from fedcore.secagg.plan import ModelShape, RoundPlan, canonical
from fedcore.secagg.protocol import job_messages, schedule
from fedcore.secagg.protocol.epoch import CoordinatorEpochStage, NoEpoch
from fedcore.secagg.protocol.messages import Certificate
from fedcore.secagg.protocol.round import coordinator
from fedcore.types import SiteId

WAITING, RUNNING = "waiting", "running"
"""States of a job besides `job_messages.OUTCOMES`: in the queue, and running."""


@dataclass(frozen=True)
class Limits:
    """How long a job waits, and for how many. Seconds; sites.

    stage: for the sites at one stage of a round. gather: for absent sites before a round begins without
    them. grace: for a site that lost its connection during a round; shorter than that it goes on where
    it stood. enough: while fewer sites are there than a round needs; then the job ends. vectors:
    over-selection: so many of a round (and at least its threshold) end the wait for more; 0 for all.
    """

    stage: float = 600.0
    gather: float = 60.0
    minimum: int = 3
    grace: float = 60.0
    enough: float = 86_400.0
    vectors: int = 0


@dataclass(frozen=True)
class Moment:
    """When an event is handled. now: seconds of a clock that never goes back; wall: seconds since 1970;
    here: the sites with a session, in roster order."""

    now: float
    wall: float
    here: Collection[SiteId]


LONGEST_BACKOFF = 6
"""Doublings of the rounds that a site which fails again and again is not waited for."""


@dataclass
class SiteView:
    """The state of a site in this job, for scheduling and for operators."""

    shape: ModelShape | None = None
    unable: str = ""
    failures: int = 0
    """Rounds in a row in which it could not make a vector."""
    retry_round: int = 0
    """The round from which it is waited for again after such a failure."""
    agreed: bool = False
    anew: bool = False
    """It agreed before and sends a survey again: it lost its journal, and the epoch's secret with it."""
    rest: job_messages.SiteStatus | None = None
    doing: str = ""
    last_seen: float = 0.0
    missed: bool = False
    """A round began without it; no round waits for it again before it connects."""
    away_since: float | None = None
    """Clock seconds at which its connection was found lost."""

    def failed(self, round_: int) -> None:
        """It could not make its vector in a round: it is waited for in the next one, and after each further
        failure in a row twice as many rounds later."""
        self.failures += 1
        self.retry_round = round_ + (1 << min(self.failures - 1, LONGEST_BACKOFF))

    def backs_off(self, round_: int) -> bool:
        return bool(self.failures) and round_ < self.retry_round

    def retries(self, round_: int) -> bool:
        """Whether a site that failed is waited for in this round: it reported its status since it failed."""
        return bool(self.failures) and self.rest is not None and not self.backs_off(round_)


@dataclass
class Progress:
    """The state of the job for `watch`. waiting_until: seconds since 1970."""

    state: str = WAITING
    text: str = ""
    waiting_for: tuple[SiteId, ...] = ()
    waiting_until: float | None = None

    def wait(self, sites: tuple[SiteId, ...], until: float | None, at: Moment) -> None:
        """Show a wait for these sites. until: seconds of the job's clock."""
        self.waiting_for = sites
        self.waiting_until = None if until is None else at.wall + until - at.now


Row = TypeVar("Row", JobRow, MetricsRow)


@dataclass
class JobLog(Generic[Row]):
    """Rows of a job for people, oldest first. prefix: of their keys in the journal."""

    kind: type[Row]
    prefix: str
    known: list[Row] = field(default_factory=list)

    def entry(self, row: Row) -> dict[str, bytes]:
        """The next row as a value of the journal, for the commit that it belongs to."""
        return {f"{self.prefix}{len(self.known):06}": canonical(row.to_json())}


@dataclass(frozen=True)
class KeptFile:
    """A file that the runner keeps: digest and bytes of its chunks."""

    digest: bytes
    size: int


@dataclass
class JobFacts:
    """One job at the coordinator.

    sizes: bytes of one protected vector by purpose; threshold: t, 0 until the settings were read;
    withdrawn: sites whose certificate was revoked under the present key epoch; evicted: sites that an
    operator sent away, as the coordinator has it; rounds, metrics: rows for people, one a round and one a
    release whose metrics are public; over: training ended before its last round, by the word of the sites; outcome:
    once it is on disk.
    """

    federation: str
    offer: job_messages.JobOffer
    pins: Mapping[SiteId, bytes]
    limits: Limits
    plan: RoundPlan | None = None
    features: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)
    threshold: int = 0
    epoch: CoordinatorEpochStage = field(default_factory=NoEpoch)
    stage: coordinator.CoordinatorStage = field(default_factory=coordinator.Ready)
    step: schedule.PlannedRound | None = None
    certificate: Certificate | None = None
    withdrawn: frozenset[SiteId] = frozenset()
    evicted: AbstractSet[str] = frozenset()
    over: bool = False
    outcome: job_messages.JobEnded | None = None
    sites: dict[SiteId, SiteView] = field(init=False)
    progress: Progress = field(default_factory=Progress)
    rounds: JobLog[JobRow] = field(default_factory=lambda: JobLog(JobRow, "row-"))
    metrics: JobLog[MetricsRow] = field(default_factory=lambda: JobLog(MetricsRow, "metrics-"))

    def __post_init__(self) -> None:
        self.sites = {name: SiteView() for name in self.pins}

    @property
    def id(self) -> str:
        return self.offer.job

    @property
    def released(self) -> str:
        """Hash of the last certificate; empty before the first release."""
        return self.certificate.hash if self.certificate is not None else ""

    @property
    def round(self) -> coordinator.InRound | None:
        """The stage of the round under way; None between rounds."""
        return self.stage if isinstance(self.stage, coordinator.InRound) else None

    @property
    def number(self) -> int:
        stage = self.stage
        return stage.round if isinstance(stage, coordinator.Ready) else stage.header.round

    @property
    def checkpoint_name(self) -> str:
        """Of the file of the last release's state: it is sealed under the secret of a key epoch."""
        return f"checkpoint-{self.epoch.epoch}-{self.released[:32]}"

    def adopt(self, plan: RoundPlan, features: int, sizes: Mapping[str, int]) -> None:
        self.plan, self.features, self.sizes = plan, features, sizes
        self.threshold = plan.threshold

    def plan_offer(self) -> job_messages.PlanOffer:
        """The plan, for a site that has not agreed to it."""
        assert self.plan is not None
        return job_messages.PlanOffer(self.id, canonical(self.plan.to_json()))

    def current(self, at: Moment) -> list[SiteId]:
        """Connected sites whose last status has the job's key epoch and release, in roster order."""
        place, sites = (self.epoch.epoch, self.released), self.sites
        return [
            name for name in self.pins
            if name in at.here and (rest := sites[name].rest)
            and (rest.epoch, rest.certificate) == place
        ]  # fmt: skip

    def cohort(self, at: Moment) -> list[SiteId]:
        """The sites to invite to the next round: the current ones without those that back off, where enough stay."""
        current, needed = self.current(at), max(self.limits.minimum, self.threshold)
        fresh = [name for name in current if not self.sites[name].backs_off(self.number + 1)]
        return fresh if len(fresh) >= needed else current

    def able(self, at: Moment) -> list[SiteId]:
        return [name for name in at.here if not self.sites[name].unable]
