"""The model that a plan gives to the coordinator, once the job's last round is over.

Sites are asked which file their last release leads to; the file is taken from one of them and stands
beside the job's other files, for `fed-coordinator result`. Invariant (PROTOCOL R): it is there only if as
many sites as the last release needed name the same one, so it is what honest sites have while fewer than
that lie. Before the last round nobody is asked, and no honest site would answer.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from fedcore.errors import Conflicting, HeaderRefused, OutOfOrder
from fedcore.files import write_atomic
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol import job_messages, messages, schedule
from fedcore.secagg.protocol.public_metrics import differing
from fedcore.store.disk import refusals, sync_folder
from fedcore.types import SiteId

MODEL_FILE = "model.safetensors"

ASKED_AGAIN = 5.0
"""Seconds after which a site that was asked for its word, and is silent, is asked again."""


class HandOver:
    """Who said what of one job's model, since this process began. folder: where the file goes.

    patience: seconds a site has for its file before another one is asked.
    """

    def __init__(self, plan: RoundPlan, job_id: str, folder: Path, patience: float) -> None:
        self._plan, self._job, self._patience = plan, job_id, patience
        self.path = folder / MODEL_FILE
        self._said: dict[SiteId, bytes] = {}
        self._asked: dict[SiteId, float] = {}
        self._tried: dict[SiteId, float] = {}
        """When each site was asked for its word, and for its file."""
        self._giver: SiteId | None = None

    @property
    def here(self) -> bool:
        """Whether the file is."""
        return self.path.exists()

    def lacking(self, certificate: messages.Certificate | None, sites: Collection[SiteId]) -> str:
        """Why the file cannot come from these sites, or "" while it may. certificate: the last one."""
        header = certificate.header if certificate is not None else None
        if header is None or not schedule.is_last_model(
            self._plan, schedule.PlannedRound(header.purpose, header.training_round)
        ):
            return "the last round was abandoned"
        said = Counter(self._said.values())
        silent = sum(name not in self._said for name in sites)
        most = max(said.values(), default=0)
        if most + silent < header.threshold:
            return f"too few sites say the same of it ({most}, and {header.threshold} are needed)"
        return ""

    def came(self, site: SiteId) -> None:
        """A new session: what it was asked in the one before may be lost."""
        if site in self._asked:
            self._asked[site] = -math.inf
        if site == self._giver:
            self._giver = None

    def may_come_from(self, site: SiteId) -> bool:
        """Whether this site was asked for its file, if not as the last one."""
        return site in self._tried and not self.here

    def lost(self) -> None:
        """The file that came could not be kept: it is asked for again."""
        self._giver = None

    def asking(
        self, certificate: messages.Certificate, sites: Iterable[SiteId], now: float
    ) -> Iterator[tuple[SiteId, job_messages.ModelWanted]]:
        """What to ask of connected sites now."""
        digest = self._agreed(certificate)
        if not digest:
            for name in sites:
                before = self._asked.get(name, -math.inf)
                if name not in self._said and now - before >= ASKED_AGAIN:
                    self._asked[name] = now
                    yield name, job_messages.ModelWanted(self._job, certificate.hash, b"")
            return
        able = [name for name in sites if self._said.get(name) == digest]
        if not able or (self._giver in able and now - self._tried[self._giver] < self._patience):
            return
        self._giver = min(able, key=lambda name: self._tried.get(name, -math.inf))
        self._tried[self._giver] = now
        yield self._giver, job_messages.ModelWanted(self._job, certificate.hash, digest)

    def take(
        self, site: SiteId, made: job_messages.ModelMade, certificate: messages.Certificate | None
    ) -> str:
        """A site's word; a warning where sites differ.

        Raises HeaderRefused (fault: site) for what nobody asked, Conflicting for another word than before,
        and OutOfOrder for an earlier release's.
        """
        if site not in self._asked:
            raise HeaderRefused(
                "model", found="one that nobody asked for", expected="none", fault=site
            )
        if certificate is None or made.certificate != certificate.hash:
            raise OutOfOrder(
                "model", found="that of another release", expected="that of the last", fault=site
            )
        before = self._said.setdefault(site, made.digest)
        if before != made.digest:
            raise Conflicting(
                "model", found="another one than before", expected="the same", fault=site
            )
        groups = differing(self._said)
        if not groups:
            return ""
        needed = certificate.header.threshold
        return f"sites differ over the model ({groups}); it is taken once {needed} say the same"

    def _agreed(self, certificate: messages.Certificate) -> bytes:
        for digest, count in Counter(self._said.values()).items():
            if count >= certificate.header.threshold:
                return digest
        return b""

    def keep(
        self, digest: bytes, pieces: Iterable[bytes], certificate: messages.Certificate
    ) -> bool:
        """Write the file if it is the one that enough sites name; whole or not at all. Raises StoreFull."""
        if self.here or digest != self._agreed(certificate):
            return False
        with refusals("model", self.path):
            write_atomic(self.path, pieces)
            sync_folder(self.path.parent)
        return True
