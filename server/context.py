"""What all jobs of one coordinator share, and how a job reaches the sites."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fedcore_server.folding import FoldPool

from fedcore.secagg.protocol.job.coordinator.facts import Limits
from fedcore.secagg.protocol.job_messages import ToSite
from fedcore.store.journal import Journal
from fedcore.store.spool import Spool, Stored
from fedcore.types import SiteId


class Links(Protocol):
    """The sessions as a job sees them."""

    def connected(self) -> Collection[SiteId]:
        """Sites with a session now, in roster order."""
        ...

    def say(self, site: SiteId, job: str, message: ToSite) -> None:
        """Send a record if the site has a session."""
        ...

    def push(self, site: SiteId, job: str, what: str, stored: Stored) -> None:
        """Send a small file beside the record that announces it."""
        ...


@dataclass(frozen=True)
class Quota:
    """What operators may ask of a coordinator. rounds, epochs: of one job. batch: rows of one step.

    queued: jobs that are not over; kept: jobs of one operator's certificates, over or not.
    """

    rounds: int = 10_000
    epochs: int = 1_000
    batch: int = 1 << 20
    queued: int = 100
    kept: int = 1_000


@dataclass(frozen=True)
class CoordinatorContext:
    """What every job of a coordinator shares. clock: monotonic seconds; now: seconds since 1970.

    retry_seconds: before what the disk refused, or has no room for, is tried again.
    """

    federation: str
    pins: Mapping[SiteId, bytes]
    journal: Journal
    spool: Spool
    pool: FoldPool
    folder: Path
    limits: Limits
    quota: Quota = Quota()
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], float] = time.time
    retry_seconds: float = 2.0
