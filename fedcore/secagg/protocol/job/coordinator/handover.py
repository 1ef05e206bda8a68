"""The model that a plan gives to the coordinator, once the job's last round is over.

Sites are asked for the digest of the file of their last release; one of them uploads the file, which is stored
beside the job's other files, for `fed-coordinator result`. Invariant (PROTOCOL R): it is stored only if as
many sites as the last release needed report the same digest, so it is the honest sites' file while fewer than
that lie. Before the last round no site is asked, and no honest site would answer.
"""

import math
from collections import Counter
from collections.abc import Collection

from fedcore.errors import Conflicting, HeaderRefused, OutOfOrder, PeerRefused
from fedcore.secagg.protocol import job_messages, schedule
from fedcore.secagg.protocol.effects import Send, Warn
from fedcore.secagg.protocol.job.coordinator.facts import JobFacts, Moment
from fedcore.secagg.protocol.job.coordinator.public_metrics import differing
from fedcore.secagg.protocol.job.effects import DiscardUploads, JobEffects, KeepModel
from fedcore.types import SiteId

ASKED_AGAIN = 5.0
"""Seconds after which a site that did not answer with its digest is asked again."""


class ModelHandover:
    """The digests that sites reported for one job's model since this process started."""

    def __init__(self, facts: JobFacts) -> None:
        self._facts = facts
        self.here = False
        """Whether the file is among the job's."""
        self.reported: dict[SiteId, bytes] = {}
        self._asked: dict[SiteId, float] = {}
        self._tried: dict[SiteId, float] = {}
        """Clock seconds at which each site was asked for its digest, and for its file."""
        self._giver: SiteId | None = None

    @property
    def given(self) -> bool:
        plan = self._facts.plan
        return plan is not None and plan.release == "coordinator"

    def lacking(self, sites: Collection[SiteId]) -> str:
        """Why the file cannot come from these sites, or "" while it may."""
        plan, certificate = self._facts.plan, self._facts.certificate
        if plan is None or certificate is None:
            return "the last round was abandoned"
        header = certificate.header
        done = schedule.PlannedRound(header.purpose, header.training_round)
        if not schedule.is_last_model(plan, done, over=self._facts.over):
            return "the last round was abandoned"
        reported = Counter(self.reported.values())
        silent = sum(name not in self.reported for name in sites)
        most = max(reported.values(), default=0)
        if most + silent < header.threshold:
            return f"too few sites report the same file ({most}, and {header.threshold} are needed)"
        return ""

    def connected(self, site: SiteId) -> None:
        """A new session: the request in the one before may be lost."""
        if site in self._asked:
            self._asked[site] = -math.inf
        if site == self._giver:
            self._giver = None

    def expects(self, site: SiteId, header: bytes) -> bool:
        """Whether an upload under this header may be the file that this site was asked for, now or before."""
        return self._is_model(header) and site in self._tried and not self.here

    def _is_model(self, header: bytes) -> bool:
        return self.given and header == job_messages.model_upload(self._facts.released)

    def awaited(self, spent: float, at: Moment) -> tuple[bool, JobEffects]:
        """Whether the file may still be uploaded, and the requests to connected sites now.

        spent: seconds for which the end of the job has waited.
        """
        facts = self._facts
        if not self.given or self.here or facts.certificate is None or self.lacking(facts.pins):
            return False, []
        able = facts.able(at)
        asked = self.ask(able, at.now)
        absent = self.lacking(able)
        return spent < (facts.limits.gather if absent else facts.limits.stage), asked

    def ask(self, sites: Collection[SiteId], now: float) -> JobEffects:
        """Requests to these sites: for the digest first; once enough agree, to one of them for the file."""
        digest, timeout = self._agreed, self._facts.limits.gather
        if not digest:
            silent = [
                name for name in sites
                if name not in self.reported and now - self._asked.get(name, -math.inf) >= ASKED_AGAIN
            ]  # fmt: skip
            self._asked.update(dict.fromkeys(silent, now))
            return [self._wanted(name, b"") for name in silent]
        able = [name for name in sites if self.reported.get(name) == digest]
        giver = self._giver
        if not able or (giver and giver in able and now - self._tried[giver] < timeout):
            return []
        self._giver = giver = min(able, key=lambda name: self._tried.get(name, -math.inf))
        self._tried[giver] = now
        return [self._wanted(giver, digest)]

    def _wanted(self, site: SiteId, digest: bytes) -> Send[job_messages.ModelWanted]:
        return Send(site, job_messages.ModelWanted(self._facts.id, self._facts.released, digest))

    def take(self, site: SiteId, made: job_messages.ModelMade) -> JobEffects:
        """A site's digest; a warning where sites differ.

        Raises PeerRefused under a plan that gives no model, HeaderRefused (fault: site) for what was not
        asked, Conflicting for another digest than before, and OutOfOrder for an earlier release's.
        """
        if not self.given:
            none = "expected none: the plan gives no model"
            raise PeerRefused(f"model: found a digest of {site}, {none}")
        if site not in self._asked:
            raise HeaderRefused("model", "one that was not asked for", "none", site)
        certificate = self._facts.certificate
        if certificate is None or made.certificate != certificate.hash:
            raise OutOfOrder("model", "that of another release", "that of the last", site)
        before = self.reported.setdefault(site, made.digest)
        if before != made.digest:
            raise Conflicting("model", "another one than before", "the same", site)
        groups = differing(self.reported)
        if not groups:
            return []
        needed = certificate.header.threshold
        differ = f"sites differ over the model ({groups})"
        return [Warn(f"{differ}; it is taken once {needed} report the same")]

    @property
    def _agreed(self) -> bytes:
        """The digest that enough sites report; empty while there is none."""
        certificate = self._facts.certificate
        for digest, count in Counter(self.reported.values()).items():
            if certificate is not None and count >= certificate.header.threshold:
                return digest
        return b""

    def upload(self, header: bytes, digest: bytes) -> JobEffects | None:
        """A complete upload: kept if it is the file that enough sites report. None if it is no model."""
        if not self._is_model(header):
            return None
        self._giver = None  # asked for again if the disk refuses it
        keep = not self.here and digest == self._agreed
        kept: JobEffects = [KeepModel(header, digest)] if keep else []
        return [*kept, DiscardUploads(header)]
