"""What all jobs of one coordinator share, and the interface of the sessions for a job."""

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from fedcore_server.config import LimitsSection
from fedcore_server.folding import FoldPool

from fedcore.secagg.protocol.job.coordinator.facts import Limits
from fedcore.secagg.protocol.job_messages import ToSite
from fedcore.store.journal import Journal
from fedcore.store.spool import Spool, Stored
from fedcore.types import SiteId


class Links(Protocol):
    """What a job needs of the sessions."""

    def connected(self) -> Collection[SiteId]:
        """Sites with a session now, in roster order."""
        ...

    def say(self, site: SiteId, job: str, message: ToSite) -> None:
        """Send a record if the site has a session."""

    def push(self, site: SiteId, job: str, what: str, stored: Stored) -> None:
        """Send a small file beside the record that announces it."""


@dataclass(frozen=True)
class CoordinatorContext:
    """What every job of a coordinator shares. clock: monotonic seconds; now: seconds since 1970.

    quota: what operators may submit. retry_seconds: before a retry of what the disk refused.
    """

    federation: str
    pins: Mapping[SiteId, bytes]
    journal: Journal
    spool: Spool
    pool: FoldPool
    folder: Path
    limits: Limits
    quota: LimitsSection = field(default_factory=LimitsSection)
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    retry_seconds: float = 2.0
