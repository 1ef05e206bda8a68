"""The rounds of a job at a site: the events of its round machine, and the effects that follow here.

Invariant (PROTOCOL D): of each step, what it exposes is in the ledger and what it records in the journal before its
other effects. Records that nothing sent relies on wait for the next commit: they are of messages that the
coordinator resends to a process that ended before it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fedcore.errors import PeerRefused, PolicyRefused, ReleaseRefused
from fedcore.learning.state import JobState
from fedcore.secagg.plan import RoundHeader, canonical
from fedcore.secagg.protocol import messages, schedule
from fedcore.secagg.protocol.job import effects
from fedcore.secagg.protocol.job.effects import SiteEffects
from fedcore.secagg.protocol.job.site import events
from fedcore.secagg.protocol.job.site import states as site_states
from fedcore.secagg.protocol.job.site.participation import Agreed, HeldKeys, Participation
from fedcore.secagg.protocol.job.site.states import StateKeeper, led_to
from fedcore.secagg.protocol.job_messages import SiteStatus, TrainingOver
from fedcore.secagg.protocol.messages import COORDINATOR, THIS_SITE, survivors_of
from fedcore.secagg.protocol.round import site
from fedcore.secagg.protocol.round.site.stages import SiteProgress
from fedcore.secagg.protocol.wire_form import encode
from fedcore.secagg.purposes import measures
from fedcore.types import SiteId

NOWHERE = site.Idle(SiteProgress(0, b""))
"""The stage before the first round."""


def gives_way(stage: site.SiteStage) -> bool:
    """Whether the announcement of a later round ends this one: not once its sum may be known."""
    return isinstance(stage, site.Waiting)


def header_of(stage: site.SiteStage) -> RoundHeader | None:
    """The round that a stage is in."""
    return None if isinstance(stage, site.Idle | site.Halted) else stage.header


class RoundDriver:
    """One job's rounds at one site, and its stage in them."""

    def __init__(
        self, agreed: Agreed, part: Participation, keys: HeldKeys, states: StateKeeper
    ) -> None:
        self.agreed, self.part, self._keys, self._states = agreed, part, keys, states
        self._me = me = part.me
        self.base_member = site.SiteParams(
            me.id, me.identity, {each: me.pins[each] for each in agreed.plan.sites}, agreed.plan,
            me.federation, part.job, me.entropy, me.minimum, me.timeout, ahead=True,
        )  # fmt: skip
        self.stage: site.SiteStage = NOWHERE
        self.announced = 0.0
        """When the round under way was announced, by the clock of `now`."""
        self.marks: tuple[bytes, Mapping[str, int]] = b"", {}
        """The header of the last vector made here, and its integers at this site's own coordinates."""
        self.early: messages.Certificate | None = None
        """The certificate of this round, if it came while the sum is still being opened."""
        self.ended = False
        """A round ended since this was last set to False."""
        self._unwritten: list[site.SiteEntry] = []
        """Records of the round that nothing sent relies on yet."""
        self._vector: events.VectorReady | None = None
        self._sum: events.CheckedSum | None = None

    @property
    def member(self) -> site.SiteParams:
        """The parameters of the round machine, with the ledger as it is now: another job may have had a sum of the
        same rows meanwhile."""
        names = self.agreed.names
        if not names:
            return self.base_member
        header = header_of(self.stage)
        sites = self._me.ledger.statistics_only_with(
            self.part.rows, names, "" if header is None else header.digest.hex()
        )
        only_with = {} if sites is None else {"statistics": sites}
        return replace(self.base_member, only_with=only_with)

    @property
    def standing(self) -> SiteProgress:
        return self.stage.standing

    @property
    def in_round(self) -> bool:
        return isinstance(self.stage, site.IN_ROUND)

    def is_round(self, header: bytes) -> bool:
        found = header_of(self.stage)
        return found is not None and found.digest == header

    def in_another(self, header: bytes) -> bool:
        """Whether this site is in a round, and not in that of this digest."""
        return self.in_round and not self.is_round(header)

    def missed(self, certificate: messages.Certificate) -> bool:
        """Whether a certificate is of a release that this site has not applied, and can catch up with now."""
        number = certificate.header.round
        return isinstance(self.stage, site.Idle) and number > self.standing.released

    def awaits_sum(self, header: bytes) -> bool:
        return isinstance(self.stage, site.Opening) and self.is_round(header) and self.early is None

    def awaits_upload(self, header: bytes) -> bool:
        return isinstance(self.stage, site.Submitted) and self.is_round(header)

    def own_marks(self, header: RoundHeader) -> Mapping[str, int]:
        """The integers of this site's vector at its own coordinates, also after a restart."""
        of, marks = self.marks
        if of != header.digest:
            raise ReleaseRefused(
                "sum", "no record of this site's own marks", "those it was sent with", THIS_SITE
            )
        return marks

    def invited(self, announce: messages.Announce, now: float) -> SiteEffects:
        """Join a round, and leave an earlier one. Where the earlier one's sum may be known, no other round is joined
        before its release (PROTOCOL H)."""
        header, stage = announce.header, self.stage
        under_way = header_of(stage)
        if gives_way(stage) and under_way is not None and header.round > under_way.round:
            yield from self.step(site.Superseded(), now)
        try:
            if isinstance(self.stage, site.Idle):
                assert self._states.current is not None
                plan, features, state = self.agreed.plan, self.agreed.features, self._states.current
                schedule.check_step(plan, features, state.done, header, over=bool(state.over))
                self.announced = now
            invited = site.Invited(announce, self._tag_for(header))
            yield from self.step(invited, now, refusing=False)
            yield self.tidy()
        except PeerRefused as error:
            yield from self.part.note(error)
            if isinstance(self.stage, site.EXPOSED):
                left = messages.Leave(header.digest, self._me.id, messages.LEFT)
                yield effects.Send(COORDINATOR, left)
            elif not self.in_round:
                yield from self.step(site.Declined(header), now)
                yield from self.send_status()

    def certified(self, certificate: messages.Certificate, now: float) -> SiteEffects:
        """Apply a release, or leave the round and catch up where this site has not opened the sum.

        A sum that is being opened is finished first: its checks may still refuse the release. That of the last release
        may come again while the next round is under way: keys that were sent ahead let it begin at once.
        """
        if self.in_round and certificate.hash == self.standing.certificate:
            return
        same = self.is_round(certificate.header.digest)
        if same and isinstance(self.stage, site.Opening):
            self.early = certificate
        elif same and not isinstance(self.stage, site.Stated):
            yield from self.step(site.Superseded(), now)
        else:
            yield from self.step(site.MessageFromCoordinator(certificate), now)

    def check_own_signature(self, certificate: messages.Certificate, now: float) -> SiteEffects:
        """Look for a signature of this site under a round that its journal does not have: the folder was put back to
        an older state."""
        if self.in_round:
            return
        for name, signature in certificate.signatures:
            if name == self._me.id:
                said = certificate.statement(name, signature)
                yield from self.step(site.OwnSignature(said, certificate.header), now)

    def _check_own_keys(
        self, before: site.SiteStage, event: site.SiteEvent, now: float
    ) -> SiteEffects:
        """Look for keys of this site that it did not send: another process with its identity is in this round."""
        bundle = event.message if isinstance(event, site.MessageFromCoordinator) else None
        if not isinstance(before, site.Advertised) or not isinstance(bundle, messages.KeyBundle):
            return
        for keys in bundle.keys:
            if keys.site == self._me.id and keys != before.keys:
                yield from self.step(site.OwnSignature(keys, before.header, other=True), now)

    def work_done(self, done: events.RoundResult, now: float) -> SiteEffects:
        match done:
            case events.VectorReady(header, made, marks=marks):
                self.marks, self._vector = (header, marks), done
                yield from self.step(made, now)
                self._vector = None
            case events.CheckedSum(_, opened, certificate, state, data):
                self._states.hold(certificate, state, data)
                self._sum = done
                following = self._following(certificate, state)
                yield from self.step(replace(opened, following=following), now)
            case events.SumGone():
                if self.early is not None:
                    self.early = None
                    yield from self.step(site.Superseded(), now)
            case events.WorkFailed(_, error, told):
                sealed = b"" if told is None else self.sealed(told)
                yield from self.step(site.CheckFailed(error, sealed), now)

    def _following(self, certificate: str, state: JobState) -> site.Following | None:
        """The round after the release of the sum that is being opened, as its coordinator announces it where all
        survivors go on. None where no round follows, or it has no keys."""
        stage, secrets = self.stage, self._keys.secrets
        if not isinstance(stage, site.Opening) or not stage.header.layers.masks:
            return None
        if secrets is None or state.done is None or state.over or self.part.out:
            return None
        plan, features = self.agreed.plan, self.agreed.features
        step = schedule.step_after(plan, features, state.done, released=True)
        if step is None:
            return None
        header = replace(
            stage.header, round=stage.header.round + 1, training_round=step.training_round,
            purpose=step.purpose, roster=survivors_of(stage.submissions), certificate=certificate,
        )  # fmt: skip
        return site.Following(header, secrets.tag(header, state.canonical()))

    def _tag_for(self, header: RoundHeader) -> bytes:
        """HMAC under G of this site's own state in a round."""
        ahead = self.stage.ahead if isinstance(self.stage, site.Idle) else None
        if ahead is not None and ahead.header == header:
            return ahead.state_tag  # made of this very state
        secrets, state = self._keys.secrets, self._states.current
        return secrets.tag(header, state.canonical()) if secrets and state else b""

    def sealed(self, cause: str) -> bytes:
        """A sealed notice to the other sites. All notices have one length, so that the coordinator cannot tell the
        causes apart. b"": there is no key epoch."""
        header = header_of(self.stage)
        if self._keys.secrets is None or header is None:
            return b""
        return self._keys.secrets.seal_cause(cause, header, self._me.id, self._me.entropy)

    def step(self, event: site.SiteEvent, now: float, *, refusing: bool = True) -> SiteEffects:
        """Step the round machine, and carry out its effects in order. A refusal makes the site leave the round."""
        before = self.stage
        try:
            after, found = site.step(self.member, before, event, now)
            for effect in found:
                if isinstance(effect, effects.Apply):
                    self._states.check(effect.certificate)
            entries = list(self._entries(found))
        except (PeerRefused, PolicyRefused) as error:
            if not refusing or not self.in_round:
                raise
            yield from self.part.note(error)
            yield from self.step(site.CheckFailed(error, self.sealed(str(error))), now)
            yield from self._check_own_keys(before, event, now)
            return
        left = self.in_round and not isinstance(after, site.IN_ROUND)
        ended = left or (isinstance(event, site.CaughtUp | site.OwnSignature) and bool(found))
        yield from entries
        yield from self._committed(found, after if ended else None)
        self.stage = after
        for effect in found:
            yield from self._effect(effect)
        if ended:
            self.early = None  # or it would end the next round
            self.ended = True
            yield effects.StopMaking()
            if self._is_known_at_rest(after):
                yield effects.Report("waiting")
            else:
                yield from self.send_status()
        elif isinstance(after, site.Stated) and self.early is not None:
            certificate, self.early = self.early, None
            if self.is_round(certificate.header.digest):
                yield from self.step(site.MessageFromCoordinator(certificate), now)

    def _is_known_at_rest(self, after: site.SiteStage) -> bool:
        """Whether the coordinator knows the status of this site: its statement is in the certificate, and the keys that
        it sent before that are for the round to come."""
        certificate = self._states.certificate
        sent_keys = isinstance(after, site.Idle) and after.ahead is not None
        return (
            sent_keys
            and certificate is not None
            and self._me.id in (name for name, _ in certificate.signatures)
        )

    def _entries(self, found: Sequence[site.SiteEffect]) -> SiteEffects:
        """The ledger's entries of a step, before the journal's and before anything leaves.

        Raises PolicyRefused where these rows are in enough jobs already.
        """
        header = header_of(self.stage)
        for effect in found:
            match effect:
                case effects.Persist(record=site.UnmaskAnswered()):
                    assert isinstance(self.stage, site.Confirmed)
                    yield self.exposed(self.stage.header, survivors_of(self.stage.submissions))
                case effects.Persist(record=site.SumAnnounced(aggregate=aggregate)):
                    assert header is not None
                    yield self.exposed(header, survivors_of(aggregate.submissions))
                case effects.Persist(record=site.VectorSpooled()):
                    assert header is not None
                    if not header.layers.masks:  # the holders of the key can open it now
                        yield self.exposed(header, ())
                case effects.Apply(certificate=certificate):
                    if self._me.id in certificate.survivors:
                        yield self.exposed(certificate.header, certificate.survivors)
                    yield effects.EnterRelease(certificate)

    def exposed(self, header: RoundHeader, survivors: tuple[SiteId, ...]) -> effects.Expose:
        """A sum with this site's vector may be opened from now on. Raises PolicyRefused."""
        if not self._me.ledger.has(header.digest.hex()):
            self.part.check_rows()
        return effects.Expose(header, survivors)

    def _committed(
        self, found: Sequence[site.SiteEffect], ended: site.SiteStage | None
    ) -> SiteEffects:
        """The journal's commit of a step. ended: the stage between rounds, if the step ended the round."""
        put: dict[str, bytes] = {}
        for effect in found:
            match effect:
                case effects.Persist(record=record):
                    self._unwritten.append(record)
                    put |= self._beside(record)
                case effects.Apply(certificate=certificate):
                    put |= self._states.beside_release(certificate)
        if ended is not None:
            yield from self.keep_stage(ended, put)
        elif put or (self._unwritten and any(isinstance(e, effects.Send) for e in found)):
            records, self._unwritten = tuple(self._unwritten), []
            yield effects.AppendEntries(records, put)

    def _beside(self, record: site.SiteEntry) -> dict[str, bytes]:
        """The small vector or state that a record relies on; with a vector its marks, the guard's memory
        and what is kept for the next round."""
        made = self._vector
        if isinstance(record, site.VectorSpooled) and made is not None:
            own = {"header": made.header.hex(), "marks": dict(made.marks)}
            kept = {"app": made.app} if made.app else {}
            return {"vector": made.small, "marks": canonical(own), "guard": made.guard, **kept}
        if isinstance(record, site.SumStated):
            assert isinstance(self.stage, site.Opening)
            said, survivors = record.statement, survivors_of(self.stage.submissions)
            name = led_to(self.stage.header, survivors, said.sum_mac, said.state_mac)
            return self._states.beside_statement(name)
        return {}

    def keep_stage(
        self, stage: site.SiteStage, put: Mapping[str, bytes] | None = None
    ) -> SiteEffects:
        """Replace the records of a round, and its secrets, by the stage between rounds."""
        self._unwritten.clear()
        yield effects.CloseRound({**(put or {}), "stage": encode(stage)})

    def _effect(self, effect: site.SiteEffect) -> SiteEffects:
        match effect:
            case effects.ShowNotice(notice=notice):
                if self._keys.secrets is not None:
                    who = notice.site if notice.site in self._me.pins else "not in the roster"
                    cause = self._keys.secrets.read_notice(notice)
                    yield effects.Warn(f"site {who} refused: {cause}")
            case effects.Apply(certificate=certificate):
                yield from self._states.adopt(certificate)
                yield from self._tracking(certificate)
            case (
                effects.Send()
                | effects.Warn()
                | effects.MakeVector()
                | effects.Upload()
                | effects.OpenSum()
                | effects.Erase()
            ):
                yield effect

    def _tracking(self, certificate: messages.Certificate) -> SiteEffects:
        """Evaluate a release whose sum this site opened itself."""
        found, self._sum = self._sum, None
        if found is None or found.certificate != site_states.name_of(certificate):
            return
        header = certificate.header
        if measures(header.purpose):
            step = schedule.PlannedRound(header.purpose, header.training_round)
            yield effects.Track(step, found.wides, found.sites, found.state, certificate)

    def tidy(self) -> effects.TidySpool:
        """Remove spooled rounds that a crash left behind."""
        header = header_of(self.stage)
        return effects.TidySpool(b"" if header is None else header.digest)

    def send_status(self) -> SiteEffects:
        if self.part.out:
            yield effects.Report("idle")
            return
        if isinstance(self.stage, site.Idle) and self._keys.secrets is not None:
            at, ahead = self.standing, self.stage.ahead
            number = (
                at.round if ahead is None else ahead.header.round - 1
            )  # it can still join that round
            state, job, me = self._states.current, self.part.job, self._me.id
            if (
                state is not None and state.over
            ):  # first: a site at rest is invited to the next round
                yield effects.Send(COORDINATOR, TrainingOver(job, me, at.certificate))
            where = SiteStatus(job, me, at.epoch, at.certificate, number)
            yield effects.Send(COORDINATOR, where)
        yield effects.Report("waiting")

    def resend_status(self) -> SiteEffects:
        """Send this site's status between rounds, or that it refused a release.

        The refusal may have been lost, and without it no new key epoch would come.
        """
        if isinstance(self.stage, site.Halted):
            refusal = messages.Leave(bytes(32), self._me.id, messages.RELEASE_REFUSED)
            yield effects.Send(COORDINATOR, refusal)
        else:
            yield from self.send_status()
