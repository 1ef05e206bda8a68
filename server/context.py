"""What all jobs of one coordinator share."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fedcore_server.config import LimitsSection
from fedcore_server.folding import FoldPool
from fedcore_server.receipts import Receipts

from fedcore.audit.trail import NoTrail, Recorder
from fedcore.identity.roster import RosterFile
from fedcore.secagg.protocol.job.coordinator.facts import Limits
from fedcore.store.journal import Journal
from fedcore.store.sealed_files import FileSealer
from fedcore.store.spool import Spool


@dataclass(frozen=True)
class CoordinatorContext:
    """What every job of a coordinator shares. clock: monotonic seconds; now: seconds since 1970.

    rosters: the newest roster; a job has its own, that of its submission. quota: what operators may submit. audit:
    `audit.record(event, **facts)` appends a line to the coordinator's audit trail. receipts: for those of the sites.
    certify: a certificate (PEM) for a site and its CSR (DER), None where none are made; blocking. retry_seconds: before
    a retry of what the disk refused. sealer: what models are encrypted with on disk; None: they are in clear.
    """

    federation: str
    rosters: RosterFile
    journal: Journal
    spool: Spool
    pool: FoldPool
    folder: Path
    limits: Limits
    quota: LimitsSection = field(default_factory=LimitsSection)
    audit: Recorder = field(default_factory=NoTrail)
    receipts: Receipts | None = None
    certify: Callable[[str, bytes], bytes] | None = None
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    retry_seconds: float = 2.0
    sealer: FileSealer | None = None
