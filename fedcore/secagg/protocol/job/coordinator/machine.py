"""A job at the coordinator as a machine: `step(event, at)` returns the effects to carry out, in order.

It connects the parts: each event goes to the part that handles it, and what follows from it for another part is
here. No input, no output, no clock: the runner has these.
"""

from collections.abc import Collection, Iterable, Mapping

from fedcore.errors import OutOfOrder, PeerRefused
from fedcore.secagg.plan import ModelShape, RoundPlan, canonical
from fedcore.secagg.protocol import epoch, job_messages, messages, schedule
from fedcore.secagg.protocol.job import effects
from fedcore.secagg.protocol.job.coordinator import events
from fedcore.secagg.protocol.job.coordinator.catch_up import CatchUp
from fedcore.secagg.protocol.job.coordinator.early_end import EarlyEnd
from fedcore.secagg.protocol.job.coordinator.ending import RETRY_SECONDS, JobEnd
from fedcore.secagg.protocol.job.coordinator.epochs import EpochDriver
from fedcore.secagg.protocol.job.coordinator.facts import JobFacts, KeptFile, Moment
from fedcore.secagg.protocol.job.coordinator.gathering import Gathering
from fedcore.secagg.protocol.job.coordinator.handover import ModelHandover
from fedcore.secagg.protocol.job.coordinator.public_metrics import Metrics
from fedcore.secagg.protocol.job.coordinator.rounds import NO_OTHER_SUM, RoundDriver
from fedcore.secagg.protocol.job.effects import CoordinatorJobEffect, JobEffects
from fedcore.secagg.protocol.moves import Restarted, Tick
from fedcore.secagg.protocol.round import coordinator
from fedcore.secagg.protocol.wire_form import encode
from fedcore.types import SiteId

TICK_SECONDS = 1.0
"""Period of the timer."""

MOST_AHEAD = 1 << 20
"""Rounds by which a site may be ahead of this journal: it was restored from a backup."""

SHAPE_DIFFERS = "another model or other columns than most sites"
"""Why a site whose survey differs takes no part: found here, not reported by the site."""

INITIAL_DIFFERS = "sites differ over the initial model ({}): {}"
"""Which parts, and the sites that have the same together."""

MATERIAL = "site {} left a round over another site's material: the sites' logs say whose"


class JobMachine:
    """One job at the coordinator."""

    def __init__(self, facts: JobFacts) -> None:
        self.facts = facts
        self.gathering = Gathering(self.facts)
        self.epochs = EpochDriver(self.facts)
        self.rounds = RoundDriver(self.facts)
        self.catch_up = CatchUp(self.facts)
        self.metrics = Metrics(self.facts)
        self.model = ModelHandover(self.facts)
        self.early_end = EarlyEnd(self.facts)
        self.ending = JobEnd(self.facts, self.epochs, self.catch_up, self.metrics, self.model)
        self.tick_at = 0.0
        """Clock seconds at which `TimePassed` is due."""
        self._nudged_at = 0.0
        self._lost: tuple[SiteId, ...] = ()
        self._at = Moment(0.0, 0.0, ())
        self._out: JobEffects = []
        """The moment of the present step, and its effects so far."""

    def restored(
        self,
        checkpoint: KeptFile | None,
        announced: KeptFile | None,
        at: Moment,
        *,
        model: bool,
        restarted: bool,
        lost: Collection[SiteId] = (),
    ) -> None:
        """The facts were read from disk, at first or again: each site is offered the plan, and reports its status.

        announced: the sum of the round under way; model: it is there; restarted: the round began before this.
        lost: sites on the round's list whose vectors are gone, as on a machine that takes over from another.
        """
        facts = self.facts
        facts.progress.text = ""
        for view in facts.sites.values():
            view.rest, view.agreed = None, False
        if facts.outcome is not None:
            self.ended(facts.outcome)
        self.metrics.released()
        self.catch_up.restore(checkpoint)
        self.rounds.restore(announced, at, restarted=restarted)
        self._lost = tuple(lost)
        self.model.here = model

    def ended(self, outcome: job_messages.JobEnded) -> None:
        """What `EndJob` asked for is on disk."""
        progress, self.facts.outcome = self.facts.progress, outcome
        progress.state, progress.text = outcome.outcome, outcome.text
        progress.waiting_for, progress.waiting_until = (), None

    @property
    def due(self) -> float:
        """Clock seconds at which `TimePassed` is due: once a second, and at the deadline of a stage."""
        stage = self.facts.stage
        if isinstance(stage, coordinator.Waiting) and stage.until > self.tick_at - TICK_SECONDS:
            return min(self.tick_at, stage.until)
        return self.tick_at

    # ------------------------------------------------------------------------------ one event

    def step(self, event: events.Event, at: Moment) -> JobEffects:
        """The effects of one event, in order. A message that a site must not send becomes a line of the log."""
        self._at, self._out = at, []
        try:
            self._take(event)
        except (
            OutOfOrder
        ) as error:  # resent after a reconnect, or overtaken by the round: nobody's fault
            text = (
                f"a message that came again or late: found {error.found}, expected {error.expected}"
            )
            self._out.append(effects.Info(f"site {error.fault}: dropped {text}"))
        except PeerRefused as error:
            if isinstance(event, events.Advance | events.Resumed):
                raise  # not caused by a site
            self._out.append(effects.Warn(str(error)))
        return self._out

    def _take(self, event: events.Event) -> None:
        facts, at = self.facts, self._at
        if facts.outcome is not None:
            self.do(self.ending.afterwards(event, at))
            return
        match event:
            case events.MessageReceived(name, message):
                facts.sites[name].last_seen = at.wall
                self.on_message(name, message)
            case events.UploadArrived(name, header, file):
                model = self.model.upload(header, file.digest)
                if model is not None:
                    self.do(model)
                elif self.rounds.arrived(name, header, file):
                    self.take_upload(name)
            case events.SiteConnected(name):
                self._greet(name)
            case events.SiteLeft(name, chosen):
                facts.sites[name].missed |= chosen
                self._gone(name)
            case events.StopRequested(text, outcome):
                self.end(outcome, text)
            case events.TimePassed():
                self._tick()
            case events.Advance():
                self._advance()
            case events.Resumed():
                self._resume()
            case events.PlanMade(plan, features, sizes):
                self._planned(plan, features, sizes)
            case events.Folded(name, refused) if refused:
                self.round_step(coordinator.Gone(name))
                self.do([effects.Warn(refused)])
            case events.Folded(name):
                uploaded = self.rounds.uploaded(name)
                assert uploaded is not None
                self.round_step(uploaded)
                facts.sites[name].unable, facts.sites[name].failures = "", 0
            case events.SumMade(header, file):
                if facts.round is not None and facts.round.header.digest == header:
                    self.round_step(coordinator.SumReady(file.digest, file.size))
            case events.CheckpointKept(file):
                self.do(self.catch_up.kept(file, at))
            case events.ModelKept():
                self.model.here = True
                self.do([effects.Info("the sites gave the model")])

    def do(self, found: Iterable[CoordinatorJobEffect]) -> None:
        self._out += found

    def end(self, outcome: str, text: str) -> None:
        self.rounds.forget()
        self.do(self.ending.end(outcome, text, self._at))

    # ----------------------------------------------------------------------- time and sessions

    def _resume(self) -> None:
        facts, at = self.facts, self._at
        self.tick_at = at.now + TICK_SECONDS
        self.epochs.resume(at)
        if facts.plan is not None and facts.round is not None:
            self.do([effects.OpenFold(facts.round.header)])
            if self._lost:
                self._give_up_round(self._lost)
            else:
                self.round_step(Restarted())
        for name in at.here:
            self._greet(name)

    def _give_up_round(self, lost: Collection[SiteId]) -> None:
        """Vectors of the round's list are gone: abandon it, and the job where its sum may be known (PROTOCOL H)."""
        stage, why = self.facts.round, self.rounds.without_vectors(lost)
        assert stage is not None
        self.do([effects.Warn(why)])
        for name in stage.header.roster:
            if isinstance(self.facts.stage, coordinator.Confirming):
                self.round_step(coordinator.Gone(name, for_good=True))
        if self.facts.round is not None:
            self.end("abandoned", f"{why}{NO_OTHER_SUM}")

    def _tick(self) -> None:
        at = self._at
        self.tick_at = at.now + TICK_SECONDS
        self.do(self.rounds.overdue_sum(at))
        if text := self.rounds.unreleasable(at):
            self.end("abandoned", text)
            return
        self.round_step(Tick())
        self.do(self.rounds.flush())
        self.epoch_step(Tick())
        for name in self.gathering.lost(at):
            self._gone(name)
        if at.now - self._nudged_at >= RETRY_SECONDS:
            self._nudged_at = at.now
            self._resend()

    def _resend(self) -> None:
        if self.facts.plan is None:
            return
        for name in self.epochs.lacking(self._at):
            self.epoch_step(coordinator.SiteReconnected(name))
        for name in self._at.here:
            self.do(self.catch_up.check(name, self._at))

    def _greet(self, name: SiteId) -> None:
        """Send a site that just connected what it needs; it answers with its status."""
        self.gathering.connected(name)
        self.catch_up.connected(name)
        self.model.connected(name)
        self.do([effects.Send(name, self.facts.offer)])
        if self.facts.plan is not None and not self.facts.sites[name].agreed:
            self.do([effects.Send(name, self.facts.plan_offer())])

    def _gone(self, name: SiteId) -> None:
        stage = self.facts.stage
        if not isinstance(stage, coordinator.Waiting) or name in stage.gone:
            return
        if name in coordinator.waiting_for(stage):
            self.do([effects.Info(f"the round goes on without site {name}, if it can")])
            self.round_step(coordinator.Gone(name))

    def _out_of_round(self, name: SiteId) -> None:
        """This site has left the round for good: it reported so, or lost its journal."""
        if self.facts.round is not None:
            self.round_step(coordinator.Gone(name, for_good=True))

    # --------------------------------------------------------------------- messages, uploads

    def on_message(self, name: SiteId, message: job_messages.ToCoordinator) -> None:
        """A record of a site. Raises PeerRefused for one that it must not send."""
        facts = self.facts
        view = facts.sites[name]
        if getattr(message, "site", name) != name:
            raise PeerRefused(f"record: found one of another site from {name}")
        match message:
            case job_messages.SiteSurvey(shape=shape):
                self._surveyed(name, shape)
            case job_messages.SiteUnavailable(reason=reason):
                view.unable = reason if reason in job_messages.REASONS else job_messages.UNABLE
                self.do([effects.Warn(f"site {name}: {job_messages.REASONS[view.unable]}")])
                if facts.plan is not None and view.unable == job_messages.UNABLE:
                    view.failed(facts.number)
                if not isinstance(facts.stage, coordinator.EXPOSED):
                    self._out_of_round(name)  # an exposed site can send again what it sent
            case job_messages.InRound(header=header):
                self._tell_if_over(name, header)
            case job_messages.PlanAgreed(plan_digest=digest):
                if facts.plan is not None and digest == facts.plan.digest:
                    if view.unable in job_messages.CHOSEN:  # its operator thought better of it
                        view.unable = ""
                    self._agreed(name)
            case job_messages.SiteStatus():
                self._at_rest(name, message)
            case job_messages.CheckpointSealed():
                self.do(self.catch_up.sealed(name, message))
            case job_messages.PublicMetrics():
                self.do(self.metrics.take(name, message))
            case job_messages.ModelMade():
                self.do(self.model.take(name, message))
            case job_messages.TrainingOver():
                self.do(self.early_end.take(name, message))
            case epoch.EpochKey() | epoch.Grants() | epoch.Grant() | epoch.KeyHeld():
                self.epoch_step(epoch.FromSite(name, message))
            case messages.Submit():
                self.rounds.submitted(name, message)
                self.take_upload(name)
            case messages.NextKeys():
                self.do(self.rounds.keep_next(name, message))
            case messages.Shares() if self.rounds.keep_ahead(name, message):
                pass
            case messages.Keys() if self.rounds.keep_ahead(name, message):
                self._known_at_rest(
                    [name]
                )  # a release before a restart: its status was known in memory only
            case job_messages.KeysErased():
                raise OutOfOrder("keys", "them erased", "them held until the job ends", name)
            case messages.Leave(code=messages.RELEASE_REFUSED, header=header) if (
                facts.round is None or facts.round.header.digest != header
            ):
                self.epochs.refused(name)
                self._gone(name)
            case messages.Leave(code=messages.MATERIAL):
                facts.progress.text = MATERIAL.format(name)
                self.round_step(coordinator.MessageFromSite(name, message))
            case _:
                self.round_step(coordinator.MessageFromSite(name, message))

    def _surveyed(self, name: SiteId, shape: ModelShape) -> None:
        """A site sends a survey before it has a plan, or when it lost its journal."""
        view = self.facts.sites[name]
        view.shape, view.unable, view.failures = shape, "", 0
        view.anew, view.agreed = view.agreed, False
        self._out_of_round(name)
        if self.facts.plan is not None:
            self.do([effects.Send(name, self.facts.plan_offer())])

    def _agreed(self, name: SiteId) -> None:
        """Resend a site that has the plan the messages of the epoch and the round.

        It sends this in every new session, and after its disk refused to record a message.
        """
        self.catch_up.connected(name)  # what was offered may be lost, too
        self.do(self.epochs.agreed(name))
        # The round first: a site takes no new epoch inside one.
        self.round_step(coordinator.SiteReconnected(name))
        self.epoch_step(coordinator.SiteReconnected(name))

    def _known_at_rest(self, names: Collection[SiteId]) -> None:
        """Of these sites, those whose status follows from the release and from keys that they sent ahead."""
        for status in self.rounds.at_rest():
            if status.site in names:
                self._at_rest(status.site, status)

    def _at_rest(self, name: SiteId, rest: job_messages.SiteStatus) -> None:
        facts, stage = self.facts, self.facts.stage
        if not 0 <= rest.round <= facts.number + MOST_AHEAD:
            raise PeerRefused(f"round: found a number of {name} that is far from ours")
        view = facts.sites[name]
        # It may be catching up: fast rounds that do not wait would stay one release ahead of it.
        view.rest, view.missed = rest, False
        first = coordinator.is_first(stage) and name in coordinator.waiting_for(stage)
        if first and rest.round < facts.number:
            # It could not persist the announcement, or sent this before it arrived.
            self.round_step(coordinator.SiteReconnected(name))
        else:
            self._out_of_round(name)
        self.do(self.catch_up.at_rest(name, self._at))
        if rest.certificate == facts.released and facts.round is None:
            # The first one after a release can seal it for those that missed it, before the next round begins.
            for other in self._at.here:
                self.do(self.catch_up.check(other, self._at))

    def _tell_if_over(self, name: SiteId, header: bytes) -> None:
        """Resend a site in an earlier round how that round ended: the message was lost."""
        facts = self.facts
        if facts.round is not None and facts.round.header.digest == header:
            return
        certificate = facts.certificate
        if certificate is not None and certificate.header.digest == header:
            self.do([effects.Send(name, certificate)])
        else:
            self.do([effects.Send(name, messages.Abandon(header, "release"))])

    def take_upload(self, name: SiteId) -> None:
        """Fold the upload of this site, once its signed submission is here, too."""
        self.do(self.rounds.to_fold(name, self._at))

    def expects(self, name: SiteId, header: bytes, size: int, overhead: int) -> bool:
        """Whether an upload of this site may come in: nothing else is spooled.

        size: bytes of its file, of which the container is `overhead`.
        """
        if self.facts.outcome is not None or self.facts.plan is None:
            return False  # nothing is needed any more
        if self.rounds.expects(name, header, size - overhead):
            return True
        model = self.model.expects(name, header) and size <= self.catch_up.most_bytes
        return model or self.catch_up.expects(name, header, size)

    # ---------------------------------------------------------------- plan, epochs and rounds

    def _advance(self) -> None:
        facts = self.facts
        self.gathering.show(self.rounds.short_since, self._at)
        if facts.plan is None:
            self.make_plan()
        elif isinstance(facts.epoch, epoch.NoEpoch):
            agreed = [name for name in self._at.here if facts.sites[name].agreed]
            present = [name for name in facts.pins if name in agreed]
            if self.gathered(present):
                self.do(self.epochs.call(tuple(present), self._at))
        elif facts.round is None:
            self.next_round()

    def gathered(self, present: list[SiteId]) -> bool:
        """Whether to go on with these sites; ends the job where too few connected in time."""
        found = self.gathering.check(present, self._at)
        if isinstance(found, str):
            self.end("abandoned" if self.facts.rounds.known else "failed", found)
            return False
        return found

    def make_plan(self) -> None:
        """One plan from the sites' surveys; a site with another shape takes no part."""
        sites = self.facts.sites
        unable = [name for name, view in sites.items() if view.unable]
        if len(sites) - len(unable) < self.facts.threshold:
            reasons = ", ".join(f"{n}: {sites[n].unable}" for n in unable)
            self.end("failed", f"too few sites can take part ({reasons})")
            return
        surveyed = {name: view.shape for name, view in sites.items() if view.shape is not None}
        if not self.gathered(list(surveyed)):
            return
        shapes = list(surveyed.values())
        common = max(shapes, key=shapes.count)
        others = [name for name, shape in surveyed.items() if shape != common]
        differs = _initial_differs(surveyed, common)
        for name in others:
            sites[name].unable = SHAPE_DIFFERS
        if differs and len(shapes) - len(others) < self.facts.threshold:
            self.end("failed", differs)
            return
        if differs:
            self.do([effects.Warn(differs)])
        self.do([effects.MakePlan(common)])

    def _planned(self, plan: RoundPlan, features: int, sizes: Mapping[str, int]) -> None:
        self.facts.adopt(plan, features, sizes)
        self.metrics.released()
        self.facts.step = schedule.first_step(plan, features)
        about = canonical({"plan": plan.to_json(), "features": features})
        self.do([effects.PutValues({"plan": about, "step": encode(self.facts.step)})])
        self.do(effects.Send(name, self.facts.plan_offer()) for name in self._at.here)

    def _new_epoch(self) -> bool:
        """Begin the next key epoch with the connected sites; False while there are too few."""
        facts, here = self.facts, self._at.here
        present = [n for n in facts.pins if n in here and n not in facts.evicted]
        if facts.step is not None and not self.gathered(present):
            return False
        self.do(self.catch_up.drop())
        self.do(self.epochs.call_anew(tuple(present), self._at))
        return True

    def epoch_step(self, event: epoch.CoordinatorEpochEvent) -> None:
        self.do(self.epochs.take(event, self._at))

    def next_round(self) -> None:
        """Announce the next step to the sites with the job's epoch and release, or end the job."""
        facts, at = self.facts, self._at
        if facts.step is not None and (text := self.rounds.sum_is_known()):
            self.end("abandoned", text)
            return
        if self.epochs.spent() and not self._new_epoch():
            return
        if facts.step is None:
            self.do(self.ending.finish(at))
            return
        if not isinstance(facts.epoch, epoch.Spreading):
            until = None if isinstance(facts.epoch, epoch.NoEpoch) else facts.epoch.until
            facts.progress.wait(epoch.awaited_in(facts.epoch), until, at)
            return
        roster = facts.cohort(at)
        if self.gathered(roster):
            facts.progress.text = ""
            self.begin_round(facts.step, tuple(roster))

    def begin_round(self, step: schedule.PlannedRound, roster: tuple[SiteId, ...]) -> None:
        header, (start, *ahead) = self.rounds.begin(step, roster, self._at)
        self.do([effects.OpenFold(header)])
        self.round_step(start)
        for event in ahead:
            try:
                self.round_step(event)
            except PeerRefused as error:
                self.do([effects.Warn(str(error))])

    def round_step(self, event: coordinator.CoordinatorEvent) -> None:
        """One event of the round; its end is on disk before a message about it is sent."""
        before = self.facts.stage
        found = self.rounds.take(event, self._at)
        if isinstance(self.facts.stage, coordinator.Ended) and not isinstance(
            before, coordinator.Ended
        ):
            self.close_round(found)
        else:
            self.do(found)

    def close_round(self, found: Iterable[CoordinatorJobEffect]) -> None:
        """Write the end of the round, then carry out its effects, then remove its files."""
        facts, stage = self.facts, self.facts.stage
        assert isinstance(stage, coordinator.Ended)
        self.do([self.rounds.close(self._at)])
        if isinstance(stage, coordinator.Released):
            self.do(self.catch_up.drop())
            facts.certificate = stage.certificate
            self.metrics.released()
        self.do(found)
        self.do([effects.ShowRound(), effects.DiscardUploads(stage.header.digest)])
        self._known_at_rest(facts.sites)
        if text := self.rounds.tried_enough():
            self.end("abandoned", text)


def _initial_differs(surveyed: Mapping[SiteId, ModelShape], common: ModelShape) -> str:
    """The line that names the sites whose models begin with other values than the most; empty without any."""
    parts = dict.fromkeys(
        part
        for shape in surveyed.values()
        for part in shape.initial_differs(common).split(" and ")
        if part
    )
    groups: dict[tuple[str, ...], list[SiteId]] = {}
    for name, shape in surveyed.items():
        groups.setdefault(shape.initial, []).append(name)
    named = " against ".join(", ".join(names) for names in groups.values())
    return INITIAL_DIFFERS.format(" and ".join(parts), named) if parts else ""
