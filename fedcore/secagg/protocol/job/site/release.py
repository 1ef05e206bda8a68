"""What a site gives of a release: its state to sites that missed it, the metrics over all sites and the last
model to the coordinator, where plan and policy say so (PROTOCOL R, V)."""

from __future__ import annotations

from collections.abc import Iterator

from fedcore.errors import HeaderRefused
from fedcore.results import SiteRow
from fedcore.secagg.protocol import effects, job_messages, public_metrics, schedule
from fedcore.secagg.protocol.job.site import states as site_states
from fedcore.secagg.protocol.job.site.effects import (
    CheckpointReady,
    GiveModel,
    SealCheckpoint,
    SiteEffect,
    TakeCheckpoint,
    Tracked,
)
from fedcore.secagg.protocol.job.site.participation import Agreed, JobParams, require
from fedcore.secagg.protocol.job.site.rounds import RoundDriver
from fedcore.secagg.protocol.job.site.states import StateKeeper
from fedcore.secagg.protocol.messages import COORDINATOR, Certificate
from fedcore.secagg.protocol.round import site


class CatchUp:
    """Passing the state of a release on to those that missed it, and taking one that this site missed."""

    def __init__(self, rounds: RoundDriver, states: StateKeeper) -> None:
        self.rounds, self._states = rounds, states
        self._taking = ""
        """Hash of the certificate whose state is being downloaded."""

    def seal(self, wanted: job_messages.CheckpointWanted) -> Iterator[SiteEffect]:
        """Seal this site's state for those that missed its release, if it stands at that release."""
        certificate, state = self._states.certificate, self._states.current
        if certificate is None or state is None:
            return
        here = {certificate.hash, self.rounds.standing.certificate}
        group = self._states.group_of(certificate)
        if here == {wanted.certificate} and group is not None:
            yield SealCheckpoint(certificate, group, state)

    def offered(self, offer: job_messages.CheckpointOffer) -> Iterator[SiteEffect]:
        """Take the state of a release this site missed; nothing is fetched for a certificate that proves none.

        Raises a ProtocolRefused.
        """
        certificate = offer.certificate
        if self._taking == certificate.hash:
            return
        site.check_missed(self.rounds.member, self.rounds.standing, certificate)
        self._taking = certificate.hash
        yield TakeCheckpoint(certificate, offer.digest)

    def wants(self, certificate: Certificate) -> bool:
        """Whether the state of this release is still to be fetched."""
        return self._taking == certificate.hash and self.rounds.missed(certificate)

    def lost(self, certificate: Certificate) -> None:
        """Its download is over: another offer of it is taken again."""
        if self._taking == certificate.hash:
            self._taking = ""

    def taken(self, event: CheckpointReady, now: float) -> Iterator[SiteEffect]:
        """Catch up, unless a round began meanwhile: then it is offered again."""
        certificate = event.certificate
        self.lost(certificate)
        self._states.hold(site_states.name_of(certificate), event.state, event.data)
        yield from self._states.learn_group(certificate.header.epoch, event.group, installed=False)
        if self.rounds.missed(certificate):
            yield from self.rounds.step(site.CaughtUp(certificate, event.mac), now)


class PublicWord:
    """What the coordinator is told and given of a release."""

    def __init__(
        self, me: JobParams, agreed: Agreed, rounds: RoundDriver, states: StateKeeper
    ) -> None:
        self._me, self._agreed, self._rounds, self._states = me, agreed, rounds, states
        self.tracked: SiteRow | None = None
        """The last row of what a release is worth here."""
        self.said: job_messages.PublicMetrics | None = None
        """The last public metrics, to be said again after a new connection."""

    def measured(self, event: Tracked) -> Iterator[SiteEffect]:
        """Under a plan that makes them public, say the metrics over all sites of a certified release.

        Raises PolicyRefused where the operator allows it no more.
        """
        self.tracked = event.row
        if self._agreed.plan.public_metrics:
            require(self._me.policy.on_release("metrics"))
            self.said = public_metrics.told(
                self._agreed.plan, event.certificate, self._me.id, event.row.everywhere_before
            )
            yield from self.say_again()

    def say_again(self) -> Iterator[SiteEffect]:
        """Whatever was said last may not have arrived."""
        if self.said is not None:
            yield effects.Send(COORDINATOR, self.said)

    def may_give(self, *, over: bool) -> bool:
        """Whether plan and policy give the coordinator the model that this site has now.

        Raises HeaderRefused (fault: coordinator) where the plan gives it none, or not this one, and
        PolicyRefused where the operator does not.
        """
        require(self._me.policy.on_release("model"))
        if self._agreed.plan.release != "coordinator":
            raise HeaderRefused(
                "model", found="it asked for", expected="nothing: it stays at the sites",
                fault=COORDINATOR,
            )  # fmt: skip
        done = self._states.current.done if self._states.current is not None else None
        if done is None or over or not isinstance(self._rounds.stage, site.Idle):
            return False
        if not schedule.is_last_model(self._agreed.plan, done):
            raise HeaderRefused(
                "model", found="it asked for before the last round", expected="it after that",
                fault=COORDINATOR,
            )  # fmt: skip
        return True

    def give(self, wanted: job_messages.ModelWanted, *, over: bool) -> Iterator[SiteEffect]:
        """Say which file the last release leads to, or upload it (PROTOCOL R).

        The state here is that of a release with its certificate: nothing else becomes the state. Where the
        coordinator stands at another release it asks again.
        """
        if self.may_give(over=over) and self._rounds.standing.certificate == wanted.certificate:
            assert self._states.current is not None
            yield GiveModel(wanted.certificate, self._states.current, wanted.digest)
