"""The end of one job: when it may end, what the sites are sent then, and what late sites still receive."""

from dataclasses import replace

from fedcore.secagg.protocol import epoch, job_messages, messages
from fedcore.secagg.protocol.effects import Send
from fedcore.secagg.protocol.job.coordinator.catch_up import CatchUp
from fedcore.secagg.protocol.job.coordinator.epochs import EpochDriver
from fedcore.secagg.protocol.job.coordinator.events import Event, MessageReceived, SiteConnected
from fedcore.secagg.protocol.job.coordinator.facts import JobFacts, Moment
from fedcore.secagg.protocol.job.coordinator.handover import ModelHandover
from fedcore.secagg.protocol.job.coordinator.public_metrics import Metrics
from fedcore.secagg.protocol.job.effects import DiscardUploads, EndJob, JobEffects
from fedcore.secagg.purposes import trains
from fedcore.types import SiteId

RETRY_SECONDS = 2.0
"""Seconds before a message without an answer is resent."""

_OF_A_ROUND = (
    messages.Keys, messages.Shares, messages.Submit, messages.Confirm, messages.Unmask,
    messages.Statement, job_messages.InRound,
)  # fmt: skip
"""Messages that only a site in a round sends."""


class JobEnd:
    """How one job ends."""

    def __init__(
        self,
        facts: JobFacts,
        epochs: EpochDriver,
        catch_up: CatchUp,
        metrics: Metrics,
        model: ModelHandover,
    ) -> None:
        self._facts, self._epochs, self._catch_up = facts, epochs, catch_up
        self._metrics, self._model = metrics, model
        self._since: float | None = None
        """Clock seconds at which the last step was over."""

    def end(self, outcome: str, text: str, at: Moment) -> JobEffects:
        """Write the end, then tell the connected sites. Of the rounds only their rows are kept."""
        ended = job_messages.JobEnded(self._facts.id, outcome, text, self._facts.released)
        return [EndJob(ended), *(Send(name, ended) for name in at.here), DiscardUploads()]

    def finish(self, at: Moment) -> JobEffects:
        """End, once a sealed checkpoint is here for sites that are not at the last release, and what the plan
        tells the coordinator of it: sites that are still connected may be gone after the end."""
        facts, gather = self._facts, self._facts.limits.gather
        if self._since is None:
            self._since = at.now
        spent = at.now - self._since
        if spent < gather and self._metrics.may_come(at):
            return []
        if self._catch_up.checkpoint is None and spent < max(gather, RETRY_SECONDS):
            if spent < RETRY_SECONDS and any(facts.sites[name].rest is None for name in at.here):
                return []  # they will report their status soon
            if self._catch_up.behind():
                can_seal = isinstance(facts.epoch, epoch.Spreading)
                return self._catch_up.want(at) if can_seal else []
        trained = [row for row in facts.rounds.known if trains(row.purpose)]
        if trained and all(row.abandoned is not None for row in trained):
            return self.end("abandoned", "every round was abandoned for want of sites", at)
        awaited, asked = self._model.awaited(spent, at)
        if awaited:
            return asked
        text = "the sites ended training before its last round" if facts.over else ""
        if self._model.given and not self._model.here:
            why = self._model.lacking(facts.able(at))
            text = f"without the model: {why or 'no site gave it in time'}"
        return [*asked, *self.end("finished", text, at)]

    def afterwards(self, event: Event, at: Moment) -> JobEffects:
        """The job is over: tell a site that was not connected, and send it the last state if it missed it."""
        facts, over = self._facts, self._facts.outcome
        assert over is not None
        stays = replace(over, certificate="")
        match event:
            case SiteConnected(name):
                return [Send(name, over)]
            case MessageReceived(name, job_messages.SiteStatus() as rest):
                return self._at_rest(name, rest, over, at)
            case MessageReceived(name, job_messages.KeysErased(wanted=wanted)):
                return self._epochs.pass_by(name, wanted, at)
            case MessageReceived(name, job_messages.PublicMetrics() as message):
                return self._metrics.take(name, message)  # sent after the end
            case MessageReceived(name, message) if isinstance(message, _OF_A_ROUND):
                return [Send(name, over)]  # the message that ended its round was lost
            case MessageReceived(name, job_messages.SiteSurvey()) if facts.plan is not None:
                return [Send(name, facts.plan_offer())]  # it was still loading
            case MessageReceived(name, job_messages.SiteSurvey() | job_messages.SiteUnavailable()):
                return [Send(name, stays)]
            case MessageReceived(name, job_messages.PlanAgreed()) if facts.plan is not None:
                return self._epochs.back(name, at)
            case MessageReceived(
                name, (epoch.EpochKey() | epoch.Grant() | epoch.KeyHeld()) as message
            ):
                return self._epochs.take(epoch.FromSite(name, message), at)
        return []

    def _at_rest(
        self, name: SiteId, rest: job_messages.SiteStatus, over: job_messages.JobEnded, at: Moment
    ) -> JobEffects:
        facts = self._facts
        facts.sites[name].rest = rest
        if rest.certificate == over.certificate:
            return [Send(name, over)]
        if facts.plan is not None and rest.epoch != facts.epoch.epoch:
            return self._epochs.back(name, at)
        if rest.epoch == facts.epoch.epoch and self._catch_up.checkpoint is not None:
            return self._catch_up.offer(name)
        return [Send(name, replace(over, certificate=""))]  # no checkpoint: it stays where it is
