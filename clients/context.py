"""What a job at a site uses of its process, beside its session: the site's identity, its disk and its training."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fedcore_clients.ledger import Ledger
from fedcore_clients.policy import SitePolicy
from fedcore_clients.trainer import Loaded

from fedcore.audit.trail import NoTrail, Recorder
from fedcore.identity.roster import RosterFile
from fedcore.learning.guard import GuardRecord
from fedcore.learning.state import JobState
from fedcore.results import SiteRow
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol.job.effects import Track
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.store.journal import Journal
from fedcore.store.sealed_files import FileSealer
from fedcore.store.spool import Spool
from fedcore.types import Contribution, Json, SiteId


@dataclass(frozen=True)
class SiteContext:
    """This site, for every job.

    rosters: the newest roster; a job has its own. audit: `audit.record(event, **facts)` appends a line to the site's
    audit trail. stage_seconds: timeout of a stage of a round. keep_keys: seconds for which the secrets of a job's key
    epochs outlive the job. retry_seconds: before a retry of what found no session, or no room on the disk. now: seconds
    since 1970. clock: monotonic seconds; pause: sleeps for some. sealer: what states are encrypted with, if they are.
    """

    federation: str
    id: SiteId
    identity: IdentityKey
    rosters: RosterFile
    journal: Journal
    spool: Spool
    folder: Path
    policy: SitePolicy
    ledger: Ledger
    audit: Recorder = field(default_factory=NoTrail)
    stage_seconds: float = 1800.0
    keep_keys: float = 7 * 86_400.0
    retry_seconds: float = 2.0
    now: Callable[[], float] = time.time
    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep
    sealer: FileSealer | None = None


class Contributor(Protocol):
    """What computes the content of vectors: the training process, or a stand-in of the benchmark."""

    async def load(self, job: str, settings: Json, task: str, digest: str, /) -> Loaded:
        """Find the task, load the rows, build the model. Raises TrainingFailed."""
        ...

    async def contribute(
        self, job: str, plan: RoundPlan, step: PlannedRound, state: JobState, record: GuardRecord, /
    ) -> Contribution:
        """The content of one vector; the guard of `record` judges the state first, and its memory is
        replaced. Raises TrainingFailed and GuardTripped."""
        ...

    async def track(
        self, job: str, plan: RoundPlan, asked: Track, kept: bytes, /
    ) -> SiteRow | None:
        """The accuracy after a release, with what the site keeps; None where there is nothing to
        measure. Raises TrainingFailed."""
        ...

    async def export(self, job: str, state: JobState, /) -> bytes:
        """The file of a model that is given away: the same bytes at every site. Raises TrainingFailed."""
        ...

    async def forget(self, job: str, /) -> None:
        """Free what is held of a job that is over."""
