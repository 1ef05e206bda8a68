"""The events of a site's job, and its effects, in the order in which the runner must carry them out.

Of the effects of a round (`protocol/effects.py`), `MakeVector`, `Upload`, `OpenSum`, `Erase`, `Send` and `Warn` pass
through unchanged. Effects of jobs at both roles are in `job/effects.py`.

Invariant (PROTOCOL D): an `AppendEntries`, `PutValues` or `CloseRound` comes before every `Send` or `Upload`
that relies on it, and the runner flushes it to disk before the next effect.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedcore.results import SiteRow
from fedcore.secagg.crypto.sumtag import GroupSecret
from fedcore.secagg.plan import ModelShape, RoundHeader, RoundPlan
from fedcore.secagg.protocol import effects, epoch, job_messages, messages
from fedcore.secagg.protocol.job import effects as job_effects
from fedcore.secagg.protocol.moves import Tick
from fedcore.secagg.protocol.round import site
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.types import FloatVector, SiteId


class State(Protocol):
    """The part of a job's state that the machine uses."""

    @property
    def done(self) -> PlannedRound | None:
        """The last released step."""
        ...

    def canonical(self) -> bytes:
        """The bytes that state tag and certificate cover."""
        ...

    def to_bytes(self) -> bytes:
        """Its file."""
        ...


class HeldSecrets(Protocol):
    """What a site holds of one key epoch."""

    @property
    def group(self) -> GroupSecret:
        """G."""
        ...


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

# ------------------------------------------------------------------------------------------ events


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
    its integers at this site's own coordinates. guard: the guard's memory, as JSON."""

    header: bytes
    made: site.VectorMade
    small: bytes
    marks: Mapping[str, int]
    guard: bytes


@dataclass(frozen=True)
class CheckedSum:
    """A sum is opened and checked. certificate: hash of the one certificate that can release it. data: the bytes
    of the state it leads to, for the journal, or b"" where they are in a file, flushed. wides: {name: sums of its
    wide fields}; sites: how many are in the sum."""

    header: bytes
    opened: site.SumOpened
    certificate: str
    state: State
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
    state: State
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
    Started | Connected | MessageReceived | Tick | epoch.SecretsMade | Approved | RowsLoaded |
    LoadFailed | RoundResult | CheckpointReady | CheckpointLost | Tracked
)  # fmt: skip

# ----------------------------------------------------------------------------------------- effects


@dataclass(frozen=True)
class AppendEntries:
    """Append records of the round to the journal, and in the same commit write the values they rely on."""

    records: tuple[site.SiteEntry, ...]
    values: Mapping[str, bytes]


@dataclass(frozen=True)
class Expose:
    """Enter into the ledger that a sum of these sites may be opened from now on, and flush it."""

    header: RoundHeader
    survivors: tuple[SiteId, ...]


@dataclass(frozen=True)
class EnterRelease:
    """Enter into the ledger under which certificate a sum was released."""

    certificate: messages.Certificate


@dataclass(frozen=True)
class AdoptState:
    """Make a candidate the current state's file, and remove the other candidates. data: its bytes, where the
    journal has them; b"" where it has a file of its own under the certificate's name."""

    certificate: str
    data: bytes


@dataclass(frozen=True)
class WriteState:
    """Write the current state's file and flush it."""

    state: State


@dataclass(frozen=True)
class Report:
    """Show operators what this site is doing."""

    doing: str


@dataclass(frozen=True)
class AwaitApproval:
    """Wait until the operator approves the job; then `Approved`, or `LoadFailed`."""


@dataclass(frozen=True)
class LoadRows:
    """Load the task and the rows; then `RowsLoaded`, or `LoadFailed`. plan: what this site agreed to, if it did:
    the same plan must follow from what is loaded."""

    plan: RoundPlan | None


@dataclass(frozen=True)
class TidySpool:
    """Remove the spooled files of all rounds but this one, by its header's digest."""

    keep: bytes


@dataclass(frozen=True)
class StopMaking:
    """Cancel the vector in the making: training for a round that is over would delay the next round."""


@dataclass(frozen=True)
class Track:
    """Evaluate a release on the rows here and write its row; then `Tracked`. No round waits for it."""

    step: PlannedRound
    wides: Mapping[str, Sequence[int]]
    sites: int
    state: State
    certificate: messages.Certificate


@dataclass(frozen=True)
class SealCheckpoint:
    """Seal the state for sites that missed its release, upload it, and announce it. group: G of its key epoch."""

    certificate: messages.Certificate
    group: GroupSecret
    state: State


@dataclass(frozen=True)
class TakeCheckpoint:
    """Download and open the state of a missed release; then `CheckpointReady` or `CheckpointLost`."""

    certificate: messages.Certificate
    digest: bytes


@dataclass(frozen=True)
class GiveModel:
    """Make the model's file of this release. digest: b"" to send the file's digest, or else to upload the file."""

    certificate: str
    state: State
    digest: bytes


@dataclass(frozen=True)
class Finish:
    """The job is over: wait for running evaluations, free the spool and the training process."""


@dataclass(frozen=True)
class EraseKeys:
    """Remove the secrets of the job's key epochs from the journal, so that no file has them."""


SiteEffect = (
    AppendEntries | job_effects.CloseRound | Expose | EnterRelease | AdoptState | WriteState |
    job_effects.Info | job_effects.PutValues | job_effects.EndJob | Report | AwaitApproval |
    LoadRows | TidySpool | StopMaking | Track | SealCheckpoint | TakeCheckpoint | GiveModel |
    Finish | EraseKeys | epoch.MakeSecrets | effects.Send[job_messages.ToCoordinator] |
    effects.Warn | effects.MakeVector | effects.Upload | effects.OpenSum | effects.Erase
)  # fmt: skip
