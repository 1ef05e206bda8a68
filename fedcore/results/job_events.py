"""What the coordinator tells of its jobs: the list of `jobs` and the events of `watch`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedcore.results.json_record import JsonRecord
from fedcore.results.round_rows import JobRow, MetricsRow


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
    part in the job, empty where it does; roster: what the site made of the newest one, empty where it took it; second:
    where and when another process came as this site, and was refused."""

    connected: bool = False
    evicted: bool = False
    since: float | None = None
    last_seen: float | None = None
    doing: str = ""
    unable: str = ""
    roster: str = ""
    second: str = ""


@dataclass(frozen=True, kw_only=True)
class JobSummary(JsonRecord):
    """One job in the list of `jobs`.

    state: `waiting` in the queue, `running`, or how it ended; text: the reason. stage: of the round under way;
    step: (purpose, round of training), None before the first and after the last. waiting_until: seconds since
    1970. public_metrics: None before there is a plan. model: the coordinator has the model. metrics: the newest.
    roster: its number, 0 for one without a signature.
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
    roster: int = 0


@dataclass(frozen=True, kw_only=True)
class JobEvent(JobSummary):
    """One event of `watch`: the job now, and the rows that came since the event before."""

    sites: Mapping[str, JobSite] = field(default_factory=dict)
    new_rounds: tuple[JobRow, ...] = ()
    new_metrics: tuple[MetricsRow, ...] = ()
