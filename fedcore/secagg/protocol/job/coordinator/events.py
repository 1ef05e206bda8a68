"""The events of a job at the coordinator, which its runner passes to the machine."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol.job.coordinator.facts import KeptFile
from fedcore.secagg.protocol.job_messages import ToCoordinator
from fedcore.types import SiteId


@dataclass(frozen=True)
class MessageReceived:
    """A record of a site, already checked by `fedcore.wire`."""

    site: SiteId
    message: ToCoordinator


@dataclass(frozen=True)
class UploadArrived:
    """An upload is complete. header: the 32 bytes it was sent under."""

    site: SiteId
    header: bytes
    file: KeptFile


@dataclass(frozen=True)
class SiteConnected:
    """A site has a new session."""

    site: SiteId


@dataclass(frozen=True)
class SiteLeft:
    """A site announced that it stops. chosen: its operator says so, and no round waits for it."""

    site: SiteId
    chosen: bool = False


@dataclass(frozen=True)
class StopRequested:
    """The job ends. outcome: one of `job_messages.OUTCOMES`."""

    text: str
    outcome: str = "stopped"


@dataclass(frozen=True)
class TimePassed:
    """The timer is due."""


@dataclass(frozen=True)
class Resumed:
    """The runner begins to serve the job: new, in a new process, or read again after an error of the disk."""


@dataclass(frozen=True)
class Advance:
    """The queued events are handled: begin whatever can begin now."""


@dataclass(frozen=True)
class PlanMade:
    """The plan that `MakePlan` asked for. sizes: bytes of one protected vector, by purpose."""

    plan: RoundPlan
    features: int
    sizes: Mapping[str, int]


@dataclass(frozen=True)
class Folded:
    """The upload that `StartFold` asked for is in the running sum. refused: why it cannot be, or ""."""

    site: SiteId
    refused: str = ""


@dataclass(frozen=True)
class SumMade:
    """The masks are off the sum of the round with this header, and it is spooled."""

    header: bytes
    file: KeptFile


@dataclass(frozen=True)
class CheckpointKept:
    """The sealed state that `KeepCheckpoint` asked for is kept."""

    file: KeptFile


@dataclass(frozen=True)
class ModelKept:
    """The model is among the job's files."""


SiteEvent = MessageReceived | UploadArrived | SiteConnected | SiteLeft
Event = (
    SiteEvent | StopRequested | TimePassed | Resumed | Advance | PlanMade | Folded | SumMade |
    CheckpointKept | ModelKept
)  # fmt: skip
