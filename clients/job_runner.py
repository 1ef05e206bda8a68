"""One job at a site: feeds events to the job's machine, and carries out its effects.

Events go through one queue, each to its end before the next; training, encryption and transfers run in the
background and come back as events. Invariant (PROTOCOL D): effects are carried out in order, and a commit is flushed
to disk before the next one. A process that is killed continues from there, or leaves the round.

Small vectors and states are in the journal, in the commit of the record that relies on them, without a flush of their
own; large ones are files, flushed before that record.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from functools import partial

from fedcore_clients.audited import events_of, vector_event
from fedcore_clients.context import Contributor, SiteContext
from fedcore_clients.job_policy import JobPolicy
from fedcore_clients.job_work import JobWork, guard_rules
from fedcore_clients.leaving import OutgoingList
from fedcore_clients.ledger import Exposure, JobLedger
from fedcore_clients.offers import PlanMaker
from fedcore_clients.session import Session
from fedcore_clients.trainer import TrainingFailed

from fedcore.audit.round_facts import place
from fedcore.errors import FedcoreError, PolicyRefused, StoreProblem
from fedcore.files.disk import flushed_beside
from fedcore.identity.roster import ROSTER_KEY, PinnedRoster
from fedcore.learning.guard import GuardMemory
from fedcore.learning.state import JobState
from fedcore.runtime.mailbox import Mailbox, keep_serving
from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol import epoch, job_messages, messages
from fedcore.secagg.protocol.job import effects
from fedcore.secagg.protocol.job.site import events, participation
from fedcore.secagg.protocol.job.site.machine import JobEnd, Kept, SiteJob
from fedcore.secagg.protocol.job.site.rounds import NOWHERE, header_of
from fedcore.secagg.protocol.job.site.states import led_to
from fedcore.secagg.protocol.messages import survivors_of
from fedcore.secagg.protocol.moves import Tick
from fedcore.secagg.protocol.round import site
from fedcore.secagg.protocol.wire_form import decode, encode
from fedcore.store import container

LOG = logging.getLogger("fedcore.site.job")
ROUND, OF_A_ROUND = "round", ("vector", "candidate", "marks")
"""The journal's stream of a round's records, and the values that go with them when it ends."""

MANY = 50_000
"""Parameters above which hashing a state takes longer than starting a thread for it."""


@dataclass(frozen=True)
class DiskRefused:
    """The disk failed in background work."""

    error: Exception


Event = events.SiteEvent | DiskRefused


class JobRunner:
    """One job here, from its offer to its end."""

    def __init__(
        self,
        context: SiteContext,
        link: Session,
        contributor: Contributor,
        offer: job_messages.JobOffer,
        roster: PinnedRoster | None = None,
    ) -> None:
        self.roster = roster or context.rosters.current
        """Fixed with the job."""
        self.context, self.link, self.contributor, self.offer = context, link, contributor, offer
        self.id = offer.job
        self.mailbox: Mailbox[Event] = Mailbox(Tick())
        self.work = JobWork(context, link, contributor, offer, tuple(self.roster.sites))
        self._making: asyncio.Task[Event | None] | None = None
        self._uploading: tuple[bytes, asyncio.Task[Event | None]] | None = None
        self._leaving: OutgoingList | None = None
        self._tracking: list[asyncio.Task[Event | None]] = []
        public = context.identity.public
        policy = JobPolicy(context.policy, context.ledger, self.roster.sites, context.id, public)
        params = participation.JobParams(
            context.federation, context.id, context.identity, self.roster.sites, policy,
            JobLedger(context.ledger, self.roster.sites),
            PlanMaker(tuple(self.roster.sites)), OsEntropy(), context.policy.rules.minimum_sites, context.stage_seconds,
            context.keep_keys,
        )  # fmt: skip
        asks = context.policy.rules.jobs == "ask"
        part = participation.Participation(
            params, self.id, asks=asks, about=lambda: self.work.about.lines
        )
        self.job = self.work.job = SiteJob(offer, part)

    @classmethod
    def stored(
        cls, context: SiteContext, link: Session, contributor: Contributor, name: str
    ) -> JobRunner:
        """A job of an earlier process, from the journal."""
        kept, roster = context.journal.get(name, "offer"), context.journal.get(name, ROSTER_KEY)
        assert kept is not None
        pinned = None if roster is None else PinnedRoster.from_bytes(roster)
        offer = decode(kept, job_messages.JobOffer)
        found = cls(context, link, contributor, offer, pinned)
        found.restore()
        return found

    def restore(self) -> None:
        """Read everything from disk, as a restart does; the rows stay loaded."""
        get = partial(self.context.journal.get, self.id)
        self.job = self.work.job = SiteJob(self.offer, self.job.part)
        ended, agreed = get("ended"), get("plan")
        if ended is not None:
            at = float(get("ended_at") or 0)
            self.job.end = JobEnd(decode(ended, job_messages.JobEnded), at)
            self.work.forget_kept()
        if agreed is None:
            return
        about, marks = json.loads(agreed), json.loads(get("marks") or b"{}")
        columns = tuple((str(n), float(low), float(high)) for n, low, high in about["columns"])
        standing, certificate, held = get("stage"), get("certificate"), get("epoch")
        first = NOWHERE if standing is None else decode(standing, object)
        keys = decode(held, object) if held else epoch.NoKey()
        assert isinstance(first, site.SiteStage)
        assert isinstance(keys, epoch.SiteEpochStage)
        stage = site.replay(first, self.context.journal.read(self.id, ROUND))
        if (judged := get("guard")) is not None:
            self.work.guard.memory = GuardMemory.from_json(json.loads(judged))
        kept = Kept(
            participation.Agreed(RoundPlan.from_json(about["plan"]), about["features"], columns),
            about["rows"], stage, self._restored_state(stage),
            decode(certificate, messages.Certificate) if certificate else None, keys,
            json.loads(get("groups") or b"{}"),
            (bytes.fromhex(marks.get("header", "")), marks.get("marks", {})),
            (get("left") or b"").decode(),
        )  # fmt: skip
        self.job.restored(kept)
        if isinstance(stage, site.Stated):
            self._restore_candidate(stage)

    def _restored_state(self, stage: site.SiteStage) -> JobState:
        """The current state's file, first written or renamed where the process ended before that."""
        files, kept = self.work.files, self.context.journal.get(self.id, "state")
        if kept:
            if not files.shows(kept):
                files.show(kept)
            return JobState.from_bytes(kept)
        name = stage.standing.certificate
        if stage.standing.released and files.candidate(name).exists():
            files.promote(name)
        return JobState.from_bytes(files.read(files.current))

    def _restore_candidate(self, stage: site.Stated) -> None:
        """The state that this site stated before its process ended."""
        said, survivors = stage.statement, survivors_of(stage.submissions)
        name = led_to(stage.header, survivors, said.sum_mac, said.state_mac)
        kept = self.context.journal.get(self.id, "candidate")
        of, data = ("", b"") if kept is None else decode(kept, tuple)
        whole = data if of == name and data else self.work.files.read_candidate(name)
        self.job.states.hold(name, JobState.from_bytes(whole), data)

    def tell(self, message: job_messages.ToSite) -> None:
        """A record of the coordinator for this job."""
        over = self.job.ended is not None and not self.job.holds_keys
        event = events.MessageReceived(message, self.context.now())
        if over and isinstance(message, epoch.GrantRequest):
            self._at_once(event)  # nothing takes events from the queue any more
        else:
            self.mailbox.put(event)

    def inline(self, digest: bytes, data: bytes) -> None:
        """A small sum or checkpoint that came inside the session."""
        self.work.inline = {digest: container.from_bytes(data)}

    def kept_here(self, message: object, refused: PolicyRefused) -> None:
        """A message was not on the list of what may leave: this site leaves the round, and says one word."""
        header = header_of(self.job.stage)
        event = self._failed(b"" if header is None else header.digest, refused)
        if not isinstance(message, job_messages.SiteUnavailable):  # which says that word
            self.mailbox.put(event)

    def policy_changed(self) -> None:
        """Other rules are in force, or the operator said no to this job."""
        rules = self.context.policy.rules
        self.work.guard.rules = guard_rules(rules)
        self.mailbox.put(events.PolicyChanged(rules.minimum_sites))

    @property
    def leaving(self) -> OutgoingList:
        """What may leave this site for the job now."""
        plan, may, kept = self.job.plan, self.context.policy.rules.fields, self._leaving
        if kept is None or kept.plan is not plan or kept.may is not may:
            features = self.job.parts.agreed.features if self.job.parts is not None else 0
            kept = self._leaving = OutgoingList(plan, features, len(self.roster.sites), may)
        return kept

    def connected(self) -> None:
        """There is a new session."""
        self.work.online.set()
        self.mailbox.put(events.Connected())

    async def run(self) -> None:
        """Handle events until cancelled.

        After a disk error everything is read from disk again, as after a restart. A fault of this program ends the job
        here until the process is restarted.
        """
        fault = await keep_serving(
            self._serve, tolerates=self._tolerates, restore=self._reload_from_disk,
            retry_seconds=self.context.retry_seconds,
        )  # fmt: skip
        LOG.error("job %s: stopped here by a fault of this side", self.id, exc_info=fault)
        if fault is not None:  # so that the other sites do not wait for this one
            self._at_once(events.WorkFailed(b"", fault, word=job_messages.UNABLE))

    async def _serve(self) -> None:
        try:
            await self.handle(events.Started())
            while True:
                await self.mailbox.turn(
                    self.handle, lambda: self.job.deadline(self.context.clock())
                )
        finally:
            await self.close()

    def _tolerates(self, fault: Exception) -> bool:
        """Whether everything is read from disk again, after a pause: for errors of the disk."""
        if not isinstance(fault, StoreProblem | OSError):
            return False
        self._at_once(events.WorkFailed(b"", fault, problem=participation.problem_of(fault)))
        return True

    def _reload_from_disk(self) -> None:
        self.restore()
        self.mailbox.put(events.Connected())

    async def close(self) -> None:
        """Cancel background work."""
        await self.mailbox.close()

    async def handle(self, event: Event) -> None:
        """Step the job, and carry out the effects."""
        if isinstance(event, DiskRefused):
            raise event.error
        if isinstance(event, events.Approved):
            self.context.audit.record("decision", job=self.id, on="offer", word="approved")
        if isinstance(event, events.Connected):
            self.work.online.clear()
        step, now, plan = self.job.step, self.context.clock(), self.job.plan
        large = plan is not None and plan.parameters > MANY and _hashes(event)
        for effect in await asyncio.to_thread(step, event, now) if large else step(event, now):
            match effect:
                case epoch.MakeSecrets():
                    assert self.job.parts is not None
                    made = await asyncio.to_thread(self.job.parts.keys.scheme.make_payload)
                    await self.handle(epoch.SecretsMade(SecretBytes(made)))
                case effects.Finish():
                    await self._finish()
                case _:
                    self._do(effect)

    def _background(
        self, work: Coroutine[object, object, Event | None], header: bytes = b""
    ) -> asyncio.Task[Event | None]:
        """Run work in the background. header: of the round that waits for this work, b"" for none; what the work
        raises makes this site leave that round at once."""
        return self.mailbox.background(work, partial(self._failed, header))

    def _failed(self, header: bytes, error: Exception) -> Event:
        if isinstance(error, StoreProblem | OSError):
            return DiskRefused(error)
        word = ""
        if isinstance(error, PolicyRefused):
            word = error.word
            try:
                self.context.audit.record(
                    "refused", what="to send", job=self.id, word=word, text=str(error)
                )
            except StoreProblem as full:
                return DiskRefused(full)
        problem = participation.problem_of(error)
        if not isinstance(error, FedcoreError | TrainingFailed):
            LOG.error("job %s: a fault of this side", self.id, exc_info=error)
            problem = f"job {self.id}: {type(error).__name__}"
        return events.WorkFailed(header, error, word=word, problem=problem)

    def _at_once(self, event: events.SiteEvent) -> None:
        """Step the job past the queue, with an event that leads to effects without waiting only."""
        self.perform(self.job.step(event, self.context.clock()))

    def perform(self, found: Iterable[effects.SiteEffect]) -> None:
        """Carry out effects that do not wait, in order."""
        for effect in found:
            self._do(effect)

    def _do(self, effect: effects.SiteEffect) -> None:
        context, work = self.context, self.work
        for event, facts in events_of(effect, self.job):
            context.audit.record(event, **facts)
        match effect:
            case effects.Send(message=message):
                self.link.say(self.id, message)
            case effects.Report(doing):
                self.link.doing(self.id, doing)
            case effects.Info(text):
                LOG.info("%s", text)
            case effects.Warn(text):
                LOG.warning("%s", text)
            case effects.AppendEntries(records, values):
                context.journal.append(self.id, ROUND, records, put=values)
            case effects.PutValues(values):
                context.journal.append(self.id, ROUND, (), put=values)
            case effects.EndJob(ended, at):
                values = {"ended": encode(ended), "ended_at": str(at).encode()}
                context.journal.append(self.id, ROUND, (), put=values)
            case effects.CloseRound(values):
                context.journal.compact(self.id, ROUND, put=values, forget=OF_A_ROUND)
                work.tidy_kept()
            case effects.EraseKeys():
                context.journal.forget(self.id, "epoch", "groups")
            case effects.Expose(header, survivors):
                assert self.job.parts is not None
                rows, names = self.job.part.rows, self.job.parts.agreed.names
                pins = self.roster.sites
                entry = Exposure.of(header, survivors, rows=rows, columns=names, pins=pins)
                if context.ledger.has(entry.header):
                    context.ledger.exposed(entry)
                else:
                    about = place(header) | {"survivors": survivors}
                    context.audit.record("exposed", job=self.id, **about)
                    with flushed_beside(context.audit.sync):
                        context.ledger.exposed(entry)
            case effects.EnterRelease(certificate):
                context.ledger.certified(certificate.header.digest.hex(), certificate.hash)
            case effects.AdoptState(name, data):
                work.files.adopt(name, data)
            case effects.WriteState(state):
                work.files.write(work.files.current, state.to_bytes())
            case effects.Erase(header):
                context.spool.discard(self.id, header.digest)
            case effects.TidySpool(keep):
                for found in set(context.spool.rounds(self.id)) - {keep}:
                    context.spool.discard(self.id, found)
            case effects.AwaitApproval():
                self._background(work.await_approval())
            case effects.LoadRows():
                self._background(work.load(effect))
            case effects.MakeVector(header):
                self._making = self._background(work.make_vector(effect), header.digest)
            case effects.StopMaking():
                if self._making is not None:
                    self._making.cancel()
                self._making = None
            case effects.Upload(submit):
                # Two uploads of one vector would end each other at the coordinator.
                of, task = self._uploading or (b"", None)
                if task is None or task.done() or of != submit.header:
                    event, facts = vector_event(submit, self.job)
                    context.audit.record(event, **facts)
                    task = self._background(work.upload(submit), submit.header)
                    self._uploading = submit.header, task
            case effects.OpenSum(header):
                self._background(work.open_sum(effect), header.digest)
                self._background(work.prepare_next(header))
            case effects.Track():
                self._tracking = [task for task in self._tracking if not task.done()]
                self._tracking.append(self._background(work.track(effect)))
            case effects.SealCheckpoint():
                self._background(work.seal(effect))
            case effects.TakeCheckpoint():
                self._background(work.catch_up(effect))
            case effects.GiveModel():
                self._background(work.give_model(effect))

    async def _finish(self) -> None:
        """Free what the job holds; running evaluations get the seconds of a stage to end."""
        self.context.spool.drop(self.id)
        if self._tracking:
            _, late = await asyncio.wait(self._tracking, timeout=self.context.stage_seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self.contributor.forget(self.id)
        self.work.forget_kept()

    def erase_keys(self) -> None:
        """Erase the key epochs' secrets, if the job ended longer ago than the site keeps them."""
        self.perform(self.job.erase_keys(self.context.now()))


def _hashes(event: Event) -> bool:
    """Whether the machine hashes a whole state at this event."""
    if isinstance(event, events.MessageReceived):
        return isinstance(event.message, messages.Announce | messages.Certificate)
    return isinstance(event, events.CheckpointReady | events.CheckedSum)
