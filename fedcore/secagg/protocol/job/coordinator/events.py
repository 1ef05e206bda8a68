"""What happens to a job at the coordinator: the events that its runner feeds to the machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol.job_messages import ToCoordinator
from fedcore.types import SiteId

# ------------------------------------------------------------------------------ from outside


@dataclass(frozen=True)
class MessageReceived:
    """A record of a site, already judged by the wire."""

    site: SiteId
    message: ToCoordinator


@dataclass(frozen=True)
class UploadArrived:
    """An upload is whole. header: the 32 bytes it went under; digest, size: of its chunks, in bytes."""

    site: SiteId
    header: bytes
    digest: bytes
    size: int


@dataclass(frozen=True)
class SiteConnected:
    """A site has a new session."""

    site: SiteId


@dataclass(frozen=True)
class SiteLeft:
    """A site announced that it stops."""

    site: SiteId


@dataclass(frozen=True)
class StopRequested:
    """The job is to end. outcome: one of job.OUTCOMES."""

    text: str
    outcome: str = "stopped"


@dataclass(frozen=True)
class TimePassed:
    """It is time to look at the clock."""


# ------------------------------------------------------------------------------ from the runner


@dataclass(frozen=True)
class Resumed:
    """The runner begins to serve the job: at first, in a new process, or after a refusal of the disk."""


@dataclass(frozen=True)
class Advance:
    """The events that were there are handled: whatever can begin now, begins."""


@dataclass(frozen=True)
class PlanMade:
    """The plan that `MakePlan` asked for. sizes: bytes of one protected vector, by purpose."""

    plan: RoundPlan
    features: int
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class PlanImpossible:
    """No plan follows from the job's settings and this roster."""

    text: str


@dataclass(frozen=True)
class Folded:
    """The upload that `StartFold` asked for is in the running sum."""

    site: SiteId


@dataclass(frozen=True)
class FoldRefused:
    """The upload cannot be part of a sum."""

    site: SiteId
    text: str


@dataclass(frozen=True)
class SumMade:
    """The masks are off the sum of this round and it is spooled: its digest and bytes."""

    header: bytes
    digest: bytes
    size: int


@dataclass(frozen=True)
class CheckpointKept:
    """The sealed state that `KeepCheckpoint` asked for is kept: its digest and bytes."""

    digest: bytes
    size: int


@dataclass(frozen=True)
class ModelKept:
    """The model is among the job's files."""


SiteEvent = MessageReceived | UploadArrived | SiteConnected | SiteLeft
Event = (
    SiteEvent
    | StopRequested
    | TimePassed
    | Resumed
    | Advance
    | PlanMade
    | PlanImpossible
    | Folded
    | FoldRefused
    | SumMade
    | CheckpointKept
    | ModelKept
)
