"""The events of a site's job, which its runner passes to the machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedcore.learning.state import JobState
from fedcore.results import SiteRow
from fedcore.secagg.crypto.sumtag import GroupSecret
from fedcore.secagg.plan import ModelShape
from fedcore.secagg.protocol import epoch, job_messages, messages
from fedcore.secagg.protocol.moves import Tick
from fedcore.secagg.protocol.round import site
from fedcore.types import FloatVector


class Surveyed(Protocol):
    """What loading a job's task and rows found. columns: (name, low, high) of each standardised column;
    initial: (d,) float32, the model that the job begins with; rows: SHA-256 of the rows, hex."""

    @property
    def shape(self) -> ModelShape: ...
    @property
    def columns(self) -> tuple[tuple[str, float, float], ...]: ...
    @property
    def initial(self) -> FloatVector: ...
    @property
    def rows(self) -> str: ...


WITHHELD = "it cannot take part"
"""What other sites read of a failure whose text stays here: it may name rows."""


@dataclass(frozen=True)
class Started:
    """The process was started, or everything was read from disk again."""


@dataclass(frozen=True)
class Connected:
    """There is a new session."""


@dataclass(frozen=True)
class MessageReceived:
    """A record of the coordinator. at: seconds since 1970."""

    message: job_messages.ToSite
    at: float = 0.0


@dataclass(frozen=True)
class Approved:
    """The operator approved the job."""


@dataclass(frozen=True)
class PolicyChanged:
    """The operator's rules are other ones now, or the operator said no to this job. minimum: of a cohort, in sites."""

    minimum: int


@dataclass(frozen=True)
class RowsLoaded:
    """Task and rows are loaded."""

    found: Surveyed


@dataclass(frozen=True)
class LoadFailed:
    """Task and rows could not be loaded. word: of REASONS, for the coordinator."""

    error: Exception
    word: str


@dataclass(frozen=True)
class VectorReady:
    """A vector is made. small: its container, for the journal, or b"" where it is in the spool, flushed. marks:
    its integers at this site's own coordinates. guard: the guard's memory, as JSON. app: what the journal is to
    have of what an algorithm or an app keeps, b"" for nothing."""

    header: bytes
    made: site.VectorMade
    small: bytes
    marks: Mapping[str, int]
    guard: bytes
    app: bytes = b""


@dataclass(frozen=True)
class CheckedSum:
    """A sum is opened and checked. certificate: hash of the one certificate that can release it. data: the bytes
    of the state it leads to, for the journal, or b"" where they are in a file, flushed. wides: {name: sums of its
    wide fields}; sites: how many are in the sum."""

    header: bytes
    opened: site.SumOpened
    certificate: str
    state: JobState
    data: bytes
    wides: Mapping[str, Sequence[int]]
    sites: int


@dataclass(frozen=True)
class SumGone:
    """A sum cannot be downloaded any more: the other sites have certified it."""

    header: bytes


@dataclass(frozen=True)
class WorkFailed:
    """Background work failed; where it was for the round under way, this site leaves the round. After a
    GuardTripped it takes part in no further round of this job, also after a restart (PROTOCOL G).

    header: the digest of the round's header, b"" for other work. told: what the other sites read of it, sealed;
    None: nothing. word: of REASONS, where this site cannot take part any more: it is sent after the notice,
    which would come too late otherwise. problem: for this site's log and status.
    """

    header: bytes
    error: Exception
    told: str | None = None
    word: str = ""
    problem: str = ""


@dataclass(frozen=True)
class CheckpointReady:
    """The state of a missed release is here and has the certified HMAC under its own G."""

    certificate: messages.Certificate
    group: GroupSecret
    mac: bytes
    state: JobState
    data: bytes


@dataclass(frozen=True)
class CheckpointLost:
    """A checkpoint could not be downloaded, or proved nothing: the coordinator offers it again.

    problem: for this site's log and status.
    """

    certificate: messages.Certificate
    problem: str = ""


@dataclass(frozen=True)
class Tracked:
    """The row of what a release is worth is written. certificate: of the release."""

    certificate: messages.Certificate
    row: SiteRow


RoundResult = VectorReady | CheckedSum | SumGone | WorkFailed

SiteEvent = (
    Started | Connected | MessageReceived | Tick | epoch.SecretsMade | Approved | PolicyChanged | RowsLoaded |
    LoadFailed | RoundResult | CheckpointReady | CheckpointLost | Tracked
)  # fmt: skip
