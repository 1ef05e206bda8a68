"""Catching up: a site that missed a release downloads the state that another one sealed (decision 0011)."""

from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol import job_messages
from fedcore.secagg.protocol.job import effects
from fedcore.secagg.protocol.job.coordinator.facts import JobFacts, KeptFile, Moment
from fedcore.secagg.protocol.job.effects import JobEffects
from fedcore.types import SiteId

_BYTES_A_PARAMETER, _MOST_REST = 64, 1 << 24
"""Bytes of a sealed state: for each parameter, and for all the rest."""


def most_state_bytes(plan: RoundPlan | None) -> int:
    """Bytes of the file of a job's state, sealed or not, at most."""
    return _BYTES_A_PARAMETER * (plan.parameters if plan is not None else 0) + _MOST_REST


class CatchUp:
    """The checkpoint of one job: asked for, kept, offered."""

    def __init__(self, facts: JobFacts) -> None:
        self._facts = facts
        self.checkpoint: KeptFile | None = None
        """The sealed state of the last release under the present key epoch."""
        self.asked: SiteId | None = None
        self.asked_at = 0.0
        self._offered: dict[SiteId, job_messages.SiteStatus] = {}

    def restore(self, checkpoint: KeptFile | None) -> None:
        """Reset to what the disk has: a site that was asked before is asked again."""
        self.checkpoint, self.asked = checkpoint, None

    def connected(self, name: SiteId) -> None:
        """A new session: what was offered in the one before may be lost."""
        self._offered.pop(name, None)

    def at_rest(self, name: SiteId, at: Moment) -> JobEffects:
        if self.asked == name:
            self.asked = None  # it may not have received the request
        return self.check(name, at)

    def check(self, name: SiteId, at: Moment) -> JobEffects:
        """Offer this site the state that it missed, or ask another site for it."""
        facts, rest = self._facts, self._facts.sites[name].rest
        if rest is None or facts.certificate is None or rest.certificate == facts.released:
            return []
        if rest.epoch != facts.epoch.epoch:
            return []  # it could not decrypt the checkpoint: the key epoch first
        if self.checkpoint is None:
            return self.want(at)
        if self._offered.get(name) == rest:
            return []
        self._offered[name] = rest
        return self.offer(name)

    def want(self, at: Moment) -> JobEffects:
        """Ask a site that has the state; another one after a timeout."""
        facts, asked = self._facts, self.asked
        if asked in at.here and at.now - self.asked_at < facts.limits.gather:
            return []
        able = facts.current(at)
        if not able:
            return []
        others = [name for name in able if name != asked] or able
        self.asked, self.asked_at = others[0], at.now
        return [effects.Send(others[0], job_messages.CheckpointWanted(facts.id, facts.released))]

    def sealed(self, name: SiteId, message: job_messages.CheckpointSealed) -> JobEffects:
        """A site that was asked, now or before, uploaded the state."""
        certificate = self._facts.certificate
        if certificate is None or message.certificate != certificate.hash:
            return []
        header, file = certificate.header.digest, self._facts.checkpoint_name
        return [effects.KeepCheckpoint(name, header, message.digest, file)]

    def kept(self, checkpoint: KeptFile, at: Moment) -> JobEffects:
        """It is on disk: offer it to every site that missed the release."""
        self.checkpoint, self.asked = checkpoint, None
        return [effect for name in self._facts.sites for effect in self.check(name, at)]

    def offer(self, name: SiteId) -> JobEffects:
        """The certificate of the last release, and its state to download."""
        facts, found = self._facts, self.checkpoint
        assert found is not None
        assert facts.certificate is not None
        offer = job_messages.CheckpointOffer(facts.id, facts.certificate, found.digest, found.size)
        return [effects.Push(name, "checkpoint"), effects.Send(name, offer)]

    def drop(self) -> JobEffects:
        """The checkpoint is of an earlier release or key epoch from now on; called before that begins."""
        self.checkpoint, self.asked = None, None
        self._offered.clear()
        if self._facts.certificate is None:
            return []
        return [effects.DropCheckpoint(self._facts.checkpoint_name)]

    def expects(self, name: SiteId, header: bytes, size: int) -> bool:
        """Whether an upload under this header may be the state that this site was asked for."""
        certificate = self._facts.certificate
        asked = certificate is not None and header == certificate.header.digest
        return asked and self.asked == name and size <= self.most_bytes

    @property
    def most_bytes(self) -> int:
        return most_state_bytes(self._facts.plan)

    def behind(self) -> bool:
        here = self._facts.released
        rests = [view.rest for view in self._facts.sites.values()]
        return bool(here) and any(rest is None or rest.certificate != here for rest in rests)
