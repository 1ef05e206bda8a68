"""The effects of a job's machine, beside those of its rounds (`protocol/effects.py`).

The machine answers each event with a list of effects; the runner carries them out in order, each to its end before
the next, and feeds their results back as events. Invariant (PROTOCOL D): what a `Send` relies on is in a
`PutValues`, an `AppendRecords`, a `CloseRound` or an `EndJob` before it in the list.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedcore.results import MetricsRow
from fedcore.secagg.plan import ModelShape, RoundHeader
from fedcore.secagg.protocol.effects import RemoveMasks, Send, Warn
from fedcore.secagg.protocol.job_messages import JobEnded, ToSite
from fedcore.secagg.protocol.round.coordinator import CoordinatorEntry
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
