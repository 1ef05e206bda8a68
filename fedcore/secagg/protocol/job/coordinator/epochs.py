"""Key epochs of one job: when one begins, with which sites, which holder grants, and when the key is spent.

The rules of one epoch are in `protocol/epoch/`; this part decides between epochs, and which holder is asked.
"""

import json
from dataclasses import replace

from fedcore.errors import PeerRefused
from fedcore.secagg.crypto.identity_key import roster_digest
from fedcore.secagg.protocol import epoch
from fedcore.secagg.protocol.effects import Persist, Send
from fedcore.secagg.protocol.job.coordinator.facts import JobFacts, Moment
from fedcore.secagg.protocol.job.effects import JobEffects, PutValues
from fedcore.secagg.protocol.moves import Tick
from fedcore.secagg.protocol.round import coordinator
from fedcore.secagg.protocol.wire_form import encode
from fedcore.types import SiteId

KEYS_ERASED = (
    "the sites have erased the keys of this job, so its last model cannot be fetched any more"
)
"""For a site that reconnects after the others erased a job's keys: it stays at the state it has."""


class EpochDriver:
    """The key epochs of one job."""

    def __init__(self, facts: JobFacts) -> None:
        self._facts = facts
        self._hub = coordinator.CoordinatorParams(dict(facts.pins), facts.limits.gather)
        self._refused = False
        """A site refused the release of a round that is over, under the present key epoch."""
        self._erased: set[SiteId] = set()
        """Holders of the last key epoch that have erased it since the job ended."""

    def resume(self, at: Moment) -> None:
        """The journal keeps no times: a stage that has a deadline begins anew."""
        stage = self._facts.epoch
        if isinstance(stage, epoch.Calling | epoch.Granting):
            self._facts.epoch = replace(stage, until=at.now + self._hub.timeout)

    def take(self, event: epoch.CoordinatorEpochEvent, at: Moment) -> JobEffects:
        """One event of the present epoch. Raises PeerRefused for what is not legal there."""
        facts = self._facts
        try:
            facts.epoch, found = epoch.step_hub(self._hub, facts.epoch, event, at.now)
        except PeerRefused as error:
            if not isinstance(event, Tick):
                raise
            facts.progress.text = str(error)
            return []
        effects: JobEffects = []
        for effect in found:
            match effect:
                case Persist(record=record):
                    effects.append(PutValues({"epoch": encode(record)}))
                case Send(to=to, message=message):
                    effects.append(Send(self._holder(SiteId(to), message, at), message))
        return effects

    def _holder(self, to: SiteId, message: object, at: Moment) -> SiteId:
        """Any holder can grant: one that is connected is asked."""
        if not isinstance(message, epoch.GrantRequest):
            return to
        if to in at.here and to not in self._erased:
            return to
        holders = self._holders_beside(message.key.site, at)
        return holders[0] if holders else to

    def _holders_beside(self, name: SiteId, at: Moment) -> list[SiteId]:
        not_asked = {name, *self._erased}
        return [n for n in self.holders if n in at.here and n not in not_asked]

    @property
    def holders(self) -> tuple[SiteId, ...]:
        """Sites that have the present epoch's payload; none while it is being made."""
        stage = self._facts.epoch
        return stage.holders if isinstance(stage, epoch.Spreading) else ()

    def back(self, name: SiteId, at: Moment) -> JobEffects:
        return self.take(coordinator.SiteReconnected(name), at)

    def agreed(self, name: SiteId) -> JobEffects:
        """A site agreed to the plan; one that lost its journal signs a new key of the present epoch."""
        view, stage = self._facts.sites[name], self._facts.epoch
        view.agreed = True
        if not view.anew or not isinstance(stage, epoch.Spreading):
            return []
        view.anew = False
        return [Send(name, epoch.EpochCall(stage.header))]

    def lacking(self, at: Moment) -> list[SiteId]:
        """Connected sites that agreed to the plan and have not signed that they hold the key."""
        if not isinstance(self._facts.epoch, epoch.Spreading):
            return []
        sites, holders = self._facts.sites, self.holders
        return [name for name in at.here if sites[name].agreed and name not in holders]

    def call(self, present: tuple[SiteId, ...], at: Moment) -> JobEffects:
        """Begin the next epoch with these sites; others join later."""
        facts = self._facts
        assert facts.plan is not None
        roster = tuple(facts.pins)
        header = epoch.EpochHeader(
            facts.federation, facts.id, facts.epoch.epoch + 1, roster,
            roster_digest(facts.pins), facts.plan.threshold, facts.plan.digest,
            epoch.first_maker(roster, present),
        )  # fmt: skip
        return self.take(epoch.StartEpoch(header, present), at)

    def call_anew(self, present: tuple[SiteId, ...], at: Moment) -> JobEffects:
        """Begin the epoch after one whose key is spent; every site reports its status again."""
        facts, effects = self._facts, JobEffects()
        self._refused = False
        if facts.withdrawn:
            effects += self._withdraw(frozenset())
        for view in facts.sites.values():
            view.rest = None
        return effects + self.call(present or tuple(facts.pins), at)

    def spent(self) -> bool:
        """Whether no further round runs under the present key epoch.

        A site refused a release under it (PROTOCOL R), or a site that holds its secret was evicted or
        lost its certificate (V). An evicted site does not count where no round follows.
        """
        facts, stage = self._facts, self._facts.stage
        if isinstance(facts.epoch, epoch.NoEpoch):
            return False
        ended = stage if isinstance(stage, coordinator.Ended) else None
        refused = ended is not None and ended.refused and ended.header.epoch == facts.epoch.epoch
        if self._refused or refused:
            return True
        key_holders = {key.site for key in facts.epoch.keys}
        return facts.step is not None and bool(key_holders & (facts.evicted | facts.withdrawn))

    def refused(self, name: SiteId) -> None:
        """A site refused the release of a round that is over: this key epoch is, too (PROTOCOL R)."""
        if name in self.holders:
            self._refused = True

    def withdraw(self, site: SiteId) -> JobEffects:
        """The certificate of a site was revoked: its holder may have the site's keys, too."""
        if self._facts.outcome is not None or site in self._facts.withdrawn:
            return []
        return self._withdraw(self._facts.withdrawn | {site})

    def _withdraw(self, sites: frozenset[SiteId]) -> JobEffects:
        self._facts.withdrawn = sites
        return [PutValues({"withdrawn": json.dumps(sorted(sites)).encode()})]

    def pass_by(self, name: SiteId, wanted: SiteId, at: Moment) -> JobEffects:
        """A holder has erased the ended job's keys: ask another, or leave the late site at its state."""
        facts = self._facts
        assert facts.outcome is not None
        self._erased.add(name)
        if wanted not in facts.sites or not isinstance(facts.epoch, epoch.Spreading):
            return []
        if self._holders_beside(wanted, at):
            return self.back(wanted, at)
        return [Send(wanted, replace(facts.outcome, certificate="", text=KEYS_ERASED))]

    def asks_for_grants(self, site: SiteId) -> bool:
        """Whether this site was asked to make the epoch's payload: only then is its message long."""
        stage = self._facts.epoch
        return not isinstance(stage, epoch.NoEpoch) and stage.header.maker == site
