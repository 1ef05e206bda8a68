"""The effects of a job's machine, those of its rounds among them (`protocol/effects.py`).

The machine answers each event with a list of effects; the runner carries them out in order, each to its end before
the next, and feeds their results back as events. Invariant (PROTOCOL D): what a `Send` or `Upload` relies on is in
an effect before it in the list that writes the journal, and is flushed to disk.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from fedcore.learning.state import JobState
from fedcore.results import MetricsRow
from fedcore.secagg.crypto.sumtag import GroupSecret
from fedcore.secagg.plan import ModelShape, RoundHeader, RoundPlan
from fedcore.secagg.protocol.effects import *
from fedcore.secagg.protocol.epoch import MakeSecrets
from fedcore.secagg.protocol.job_messages import JobEnded, ToCoordinator, ToSite
from fedcore.secagg.protocol.messages import Certificate
from fedcore.secagg.protocol.round.coordinator import CoordinatorEntry
from fedcore.secagg.protocol.round.site import SiteEntry
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.types import SiteId

# ------------------------------------------------------------------------------- at both roles


@dataclass(frozen=True)
class PutValues:
    """Write these values of the job into its journal: one commit. {key: bytes}."""

    values: Mapping[str, bytes]


@dataclass(frozen=True)
class Info:
    """A line for the log; `Warn` is one that an operator should read."""

    text: str


@dataclass(frozen=True)
class EndJob:
    """Write the end of the job, in one commit with the removal of its round; no record follows it.

    at: when a site was told of the end, in whole seconds since 1970; the coordinator keeps no time.
    """

    ended: JobEnded
    at: int = 0


# ---------------------------------------------------------------------------- at the coordinator


@dataclass(frozen=True)
class AppendRecords:
    """Append the records to the round's journal, and in the same commit small files they rely on.

    vectors: digests of uploads that were taken; with_sum: the sum was made.
    """

    records: tuple[CoordinatorEntry, ...]
    vectors: tuple[bytes, ...] = ()
    with_sum: bool = False


@dataclass(frozen=True)
class CloseRound:
    """The round ended: in one commit write these values and remove its records and small files."""

    values: Mapping[str, bytes]


@dataclass(frozen=True)
class Push:
    """Send a site the round's `sum` or the job's `checkpoint` beside the message that announces it."""

    to: SiteId
    what: str


@dataclass(frozen=True)
class OpenFold:
    """Prepare an empty running sum for the vectors of this round."""

    header: RoundHeader


@dataclass(frozen=True)
class StartFold:
    """Add the complete upload of this site to the running sum; then tell `Folded`.

    digest: of its chunks.
    """

    site: SiteId
    digest: bytes


@dataclass(frozen=True)
class FailSum:
    """No sum of this round was made in time: stop its workers and read everything from disk again."""

    header: RoundHeader
    seconds: float


@dataclass(frozen=True)
class DiscardUploads:
    """Remove the spooled files of one round, or of all rounds where none is named.

    header: the 32 bytes its uploads go under.
    """

    header: bytes | None = None


@dataclass(frozen=True)
class MakePlan:
    """Make the plan that follows from the job's settings and this shape; then tell `PlanMade`."""

    shape: ModelShape


@dataclass(frozen=True)
class KeepCheckpoint:
    """Keep a site's upload under this name as the job's checkpoint; then tell `CheckpointKept`.

    header: the 32 bytes it was uploaded under; digest: of its chunks.
    """

    site: SiteId
    header: bytes
    digest: bytes
    name: str


@dataclass(frozen=True)
class DropCheckpoint:
    """Remove the checkpoint with this name: it is of an earlier release or key epoch."""

    name: str


@dataclass(frozen=True)
class KeepModel:
    """Write the uploaded model among the job's files, whole or not at all; then tell `ModelKept`."""

    header: bytes
    digest: bytes


@dataclass(frozen=True)
class KeepMetrics:
    """Write the public metrics of one release: a row of the journal and of the job's files."""

    row: MetricsRow = field(hash=False)


@dataclass(frozen=True)
class ShowRound:
    """Write the row of the round that ended into the job's files: the journal has it already."""


CoordinatorJobEffect = (
    Send[ToSite] | Warn | RemoveMasks | PutValues | Info | EndJob | AppendRecords | CloseRound |
    Push | OpenFold | StartFold | FailSum | DiscardUploads | MakePlan | KeepCheckpoint |
    DropCheckpoint | KeepModel | KeepMetrics | ShowRound
)  # fmt: skip
"""Everything that the coordinator's side of a job may ask for."""

JobEffects = list[CoordinatorJobEffect]

# ------------------------------------------------------------------------------------ at a site


@dataclass(frozen=True)
class AppendEntries:
    """Append records of the round to the journal, and in the same commit write the values they rely on."""

    records: tuple[SiteEntry, ...]
    values: Mapping[str, bytes]


@dataclass(frozen=True)
class Expose:
    """Enter into the ledger that a sum of these sites may be opened from now on, and flush it."""

    header: RoundHeader
    survivors: tuple[SiteId, ...]


@dataclass(frozen=True)
class EnterRelease:
    """Enter into the ledger under which certificate a sum was released."""

    certificate: Certificate


@dataclass(frozen=True)
class AdoptState:
    """Make a candidate the current state's file, and remove the other candidates. data: its bytes, where the
    journal has them; b"" where it has a file of its own under the certificate's name."""

    certificate: str
    data: bytes


@dataclass(frozen=True)
class WriteState:
    """Write the current state's file and flush it."""

    state: JobState


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
    state: JobState
    certificate: Certificate


@dataclass(frozen=True)
class SealCheckpoint:
    """Seal the state for sites that missed its release, upload it, and announce it. group: G of its key epoch."""

    certificate: Certificate
    group: GroupSecret
    state: JobState


@dataclass(frozen=True)
class TakeCheckpoint:
    """Download and open the state of a missed release; then `CheckpointReady` or `CheckpointLost`."""

    certificate: Certificate
    digest: bytes


@dataclass(frozen=True)
class GiveModel:
    """Make the model's file of this release. digest: b"" to send the file's digest, or else to upload the file."""

    certificate: str
    state: JobState
    digest: bytes


@dataclass(frozen=True)
class Finish:
    """The job is over: wait for running evaluations, free the spool and the training process."""


@dataclass(frozen=True)
class EraseKeys:
    """Remove the secrets of the job's key epochs from the journal, so that no file has them."""


SiteEffect = (
    AppendEntries | CloseRound | Expose | EnterRelease | AdoptState | WriteState | Info | PutValues |
    EndJob | Report | AwaitApproval | LoadRows | TidySpool | StopMaking | Track | SealCheckpoint |
    TakeCheckpoint | GiveModel | Finish | EraseKeys | MakeSecrets | Send[ToCoordinator] | Warn |
    MakeVector | Upload | OpenSum | Erase
)  # fmt: skip
"""Everything that a site's side of a job may ask for."""

SiteEffects = Iterator[SiteEffect]
