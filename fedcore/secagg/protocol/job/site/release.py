"""What a site passes on of a release: its state to sites that missed it, and to the coordinator the metrics over all
sites and the last model, where plan and policy allow it (PROTOCOL R, V)."""

from fedcore.errors import HeaderRefused
from fedcore.results import SiteRow
from fedcore.secagg.protocol import job_messages, schedule
from fedcore.secagg.protocol.job import effects
from fedcore.secagg.protocol.job.effects import SiteEffects
from fedcore.secagg.protocol.job.site import events
from fedcore.secagg.protocol.job.site import states as site_states
from fedcore.secagg.protocol.job.site.participation import require
from fedcore.secagg.protocol.job.site.rounds import RoundDriver
from fedcore.secagg.protocol.job.site.states import StateKeeper
from fedcore.secagg.protocol.messages import COORDINATOR, Certificate
from fedcore.secagg.protocol.round import site


class CatchUp:
    """Passing on the state of a release to sites that missed it, and taking one that this site missed."""

    def __init__(self, rounds: RoundDriver, states: StateKeeper) -> None:
        self.rounds, self._states = rounds, states
        self._taking = ""
        """Hash of the certificate whose state is being downloaded."""

    def seal(self, wanted: job_messages.CheckpointWanted) -> SiteEffects:
        """Seal this site's state for sites that missed its release, if its last release is that one."""
        certificate, state = self._states.certificate, self._states.current
        if certificate is None or state is None:
            return
        here = {certificate.hash, self.rounds.standing.certificate}
        group = self._states.group_of(certificate)
        if here == {wanted.certificate} and group is not None:
            yield effects.SealCheckpoint(certificate, group, state)

    def offered(self, offer: job_messages.CheckpointOffer) -> SiteEffects:
        """Download the state of a release that this site missed, if the certificate proves that release.

        Raises a ProtocolRefused.
        """
        certificate = offer.certificate
        if self._taking == certificate.hash:
            return
        site.check_missed(self.rounds.member, self.rounds.standing, certificate)
        self._taking = certificate.hash
        yield effects.TakeCheckpoint(certificate, offer.digest)

    def wants(self, certificate: Certificate) -> bool:
        return self._taking == certificate.hash and self.rounds.missed(certificate)

    def lost(self, certificate: Certificate) -> None:
        """Its download ended: take the next offer of it."""
        if self._taking == certificate.hash:
            self._taking = ""

    def taken(self, event: events.CheckpointReady, now: float) -> SiteEffects:
        """Catch up, unless a round began meanwhile: then the coordinator offers it again."""
        certificate = event.certificate
        self.lost(certificate)
        self._states.hold(site_states.name_of(certificate), event.state, event.data)
        yield from self._states.learn_group(certificate.header.epoch, event.group, installed=False)
        if self.rounds.missed(certificate):
            yield from self.rounds.step(site.CaughtUp(certificate, event.mac), now)


class PublicRelease:
    """The metrics and the model of a release, for the coordinator."""

    def __init__(self, rounds: RoundDriver, states: StateKeeper) -> None:
        self._me, self._plan = rounds.part.me, rounds.agreed.plan
        self._rounds, self._states = rounds, states
        self.tracked: SiteRow | None = None
        """The row of the last release that was evaluated here."""
        self.said: job_messages.PublicMetrics | None = None
        """The last public metrics, resent after a new connection."""

    def measured(self, event: events.Tracked) -> SiteEffects:
        """Send the metrics over all sites of a certified release, under a plan that makes them public.

        Raises PolicyRefused where the policy does not allow it any more.
        """
        self.tracked = event.row
        if self._plan.public_metrics:
            require(self._me.policy.on_release("metrics"))
            self.said = job_messages.told(
                self._plan, event.certificate, self._me.id, event.row.everywhere_before
            )
            yield from self.resend()

    def resend(self) -> SiteEffects:
        """Resend the last public metrics: they may not have arrived."""
        if self.said is not None:
            yield effects.Send(COORDINATOR, self.said)

    def may_give(self, *, over: bool) -> bool:
        """Whether the coordinator gets the model that this site has now.

        Raises HeaderRefused (fault: coordinator) where the plan gives it no model, or not this one, and
        PolicyRefused where the policy does not allow it.
        """
        require(self._me.policy.on_release("model"))
        if self._plan.release != "coordinator":
            raise HeaderRefused(
                "model", "it asked for", "nothing: it stays at the sites", COORDINATOR
            )
        state = self._states.current
        done = state.done if state is not None else None
        if done is None or over or not isinstance(self._rounds.stage, site.Idle):
            return False
        assert state is not None
        if not schedule.is_last_model(self._plan, done, over=bool(state.over)):
            raise HeaderRefused(
                "model", "it asked for before the last round", "it after that", COORDINATOR
            )
        return True

    def give(self, wanted: job_messages.ModelWanted, *, over: bool) -> SiteEffects:
        """Send the digest of the model's file, or upload the file (PROTOCOL R).

        The state here is always of a certified release. A coordinator at another release asks again.
        """
        if self.may_give(over=over) and self._rounds.standing.certificate == wanted.certificate:
            assert self._states.current is not None
            yield effects.GiveModel(wanted.certificate, self._states.current, wanted.digest)
