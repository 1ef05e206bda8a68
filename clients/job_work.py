"""A site's background work for one job: what takes long to compute, send or download.

Each method runs as a task and returns the next event of the job, or None. Transfers for a round are retried while
the round still needs them.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

from fedcore_clients.audited import file_event, message_facts
from fedcore_clients.channel import Offline
from fedcore_clients.chunk_stream import EachChunk, read_on_the_way
from fedcore_clients.context import Contributor, SiteContext
from fedcore_clients.offers import About, is_approved, job_of
from fedcore_clients.policy import PolicySection
from fedcore_clients.privacy_limits import Spend
from fedcore_clients.round_work import RoundWork
from fedcore_clients.session import Session
from fedcore_clients.state_files import StateFiles, state_folder
from fedcore_clients.trainer import TrainingFailed

from fedcore.config import Job, read_settings
from fedcore.errors import BadInput, DataLost, FedcoreError, GuardTripped, PeerRefused, StoreProblem
from fedcore.files import append_row
from fedcore.learning.guard import GuardRecord, GuardRules
from fedcore.learning.state import JobState
from fedcore.secagg.algorithms import is_personal
from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.crypto.sumtag import GROUP_SECRET_BYTES, GroupSecret, state_mac
from fedcore.secagg.plan import RoundHeader, canonical
from fedcore.secagg.protocol import job_messages, messages, schedule
from fedcore.secagg.protocol.job import effects
from fedcore.secagg.protocol.job.site import events
from fedcore.secagg.protocol.job.site import states as site_states
from fedcore.secagg.protocol.job.site.machine import Parts, SiteJob
from fedcore.secagg.protocol.job.site.participation import problem_of, require
from fedcore.secagg.protocol.round import site
from fedcore.secagg.purposes import trains
from fedcore.secagg.scheme import EpochSecrets
from fedcore.store import container
from fedcore.store.spool import Stored
from fedcore.types import Contribution, SiteId
from fedcore.wire import frames
from fedcore.wire.limits import INLINE

LOG = logging.getLogger("fedcore.site.job")
T = TypeVar("T")

CLIPPED_WORTH_SAYING = 0.01
"""Share of clipped coordinates of a round above which a site's log has a line."""

FEW = 5_000
"""Parameters up to which protecting or opening a vector takes a few milliseconds, little more than a thread for it."""

APPROVAL_SECONDS = 1.0
"""How often the file of an approval is polled."""


def guard_rules(rules: PolicySection) -> GuardRules:
    """When this site leaves a job over its model."""
    return GuardRules(rules.guard_loss_factor, rules.guard_rounds)


class JobWork:
    """The background work of one job. It reads the job's machine, and changes it by events only."""

    def __init__(
        self,
        context: SiteContext,
        link: Session,
        contributor: Contributor,
        offer: job_messages.JobOffer,
        sites: Sequence[SiteId],
    ) -> None:
        self.context, self.link, self.contributor, self.offer = context, link, contributor, offer
        self.id = offer.job
        self.job: SiteJob
        self._sites = tuple(sites)
        self.guard = GuardRecord(guard_rules(context.policy.rules))
        self.files = StateFiles(state_folder(context.folder, self.id), context.sealer)
        self.online = asyncio.Event()
        self.inline: dict[bytes, list[bytes]] = {}
        """{digest: chunks} of a small sum or checkpoint that came inside the session."""
        self._stored: Stored | None = None
        """The file of the last vector that was made in this process."""
        self._exported: tuple[str, Stored] | None = None
        """The certificate of the last model whose file was made, and the file."""
        self._exporting = asyncio.Lock()

    @cached_property
    def about(self) -> About:
        """What the operator should know of the job. For some settings it takes seconds, so it is made only when it is
        shown, once the policy has accepted the offer."""
        return About.of(self.offer, self._sites)

    @property
    def _parts(self) -> Parts:
        assert self.job.parts is not None
        return self.job.parts

    def round_work(self) -> RoundWork:
        """The computations of a round, from the present state and key epoch."""
        secrets = self._parts.keys.secrets
        state = self.job.states.current
        assert isinstance(secrets, EpochSecrets)
        assert isinstance(state, JobState)
        return RoundWork(self.context.id, self._parts.agreed, secrets, state, self._few_sites)

    async def await_approval(self) -> events.SiteEvent | None:
        """Wait for the operator's approval of the offer, or until the job has ended."""
        folder = self.context.folder
        try:
            if not is_approved(folder, self.offer):
                LOG.warning("job %s: waits for approval: fed-site approve %s", self.id, self.id)
                self.link.doing(self.id, "idle")
            while not is_approved(folder, self.offer):
                if self.job.ended is not None:
                    return None
                await self.context.pause(APPROVAL_SECONDS)
        except FedcoreError as error:
            return events.LoadFailed(error, job_messages.UNABLE)
        return events.Approved()

    async def load(self, asked: effects.LoadRows) -> events.SiteEvent:
        """Load task and rows, and make the plan again where this site agreed to one.

        Where the job gives a budget of seconds, no answer comes before it is over; only for a success under a
        plan it is not waited for, since the coordinator is told nothing of it.
        """
        began, offer = self.context.clock(), self.offer
        event: events.SiteEvent
        try:
            found = await self.contributor.load(
                self.id, read_settings(offer.settings), offer.task, offer.task_digest
            )
            if asked.plan and self.job.me.planner.plan(offer, found).digest != asked.plan.digest:
                raise TrainingFailed(job_messages.UNABLE)
            event = events.RowsLoaded(found)
        except TrainingFailed as failed:
            event = events.LoadFailed(failed, failed.reason)
        except Exception as error:  # the others would wait for this site's survey
            if not isinstance(error, FedcoreError):
                LOG.exception("job %s: a fault of this side while loading", self.id)
            event = events.LoadFailed(error, job_messages.UNABLE)
        if asked.plan is None or isinstance(event, events.LoadFailed):
            await self._not_before(began, "loading")
        return event

    @cached_property
    def _asked(self) -> Job:
        """The job's settings, read once: they are the same in every round."""
        return job_of(self.offer)

    @property
    def _budget(self) -> float | None:
        """`round.submit_seconds` of the job."""
        return self._asked.round.submit_seconds

    @cached_property
    def _few_sites(self) -> bool:
        """`protect.single_site_features` of the job."""
        protect = read_settings(self.offer.settings).get("protect", {})
        return bool(protect.get("single_site_features"))

    async def _not_before(self, began: float, what: str) -> None:
        """Wait for the end of the job's budget from `began` on, if it has one: the time of what this site sends then
        is independent of its rows (PROTOCOL U). An overrun is logged here."""
        if self._budget is None:
            return
        until = began + self._budget
        if self.context.clock() > until:
            LOG.warning(
                "job %s: %s took longer than round.submit_seconds = %g: the coordinator can tell",
                self.id, what, self._budget,
            )  # fmt: skip
        while (left := until - self.context.clock()) > 0:
            await self.context.pause(left)

    async def make_vector(self, asked: effects.MakeVector) -> events.SiteEvent:
        """Train or evaluate, protect, and store the vector where the journal does not have it."""
        header, began = asked.header, self._parts.rounds.announced
        failed = partial(events.WorkFailed, header.digest)
        event: events.SiteEvent
        try:
            work = self.round_work()
            step = schedule.PlannedRound(header.purpose, header.training_round)
            self.link.doing(self.id, "training" if trains(step.purpose) else "evaluating")
            self.guard.kept = await self._beside(partial(self._before, work, header))
            found = await self.contributor.contribute(
                self.id, work.agreed.plan, step, work.state, self.guard
            )
            found = work.without_isolating_metrics(found, header)
            if self._budget is None:
                self.link.doing(self.id, "protecting")
            event = await self._beside(partial(self._protected, work, asked, found))
        except GuardTripped as tripped:
            line = f"job {self.id}: {tripped}; hint: {tripped.remedy}"
            LOG.error("%s", line)  # noqa: TRY400 - a traceback would not help an operator
            cause = f"guard: it leaves the job after round {tripped.round}: {tripped.cause}"
            event = failed(tripped, cause, job_messages.UNABLE)
        except TrainingFailed as error:
            event = failed(error, events.WITHHELD, error.reason)
        except FedcoreError as error:
            event = failed(error, events.WITHHELD, job_messages.UNABLE, problem_of(error))
        except Exception as error:
            LOG.exception("job %s: a fault of this side", self.id)
            event = failed(error, events.WITHHELD, job_messages.UNABLE)
        await self._not_before(began, "making a vector")
        return event

    async def _beside(self, compute: Callable[[], T]) -> T:
        """Compute it, for a model of more than FEW parameters in a thread."""
        if self._parts.agreed.plan.parameters > FEW:
            return await asyncio.to_thread(compute)
        return compute()

    def _before(self, work: RoundWork, header: RoundHeader) -> bytes:
        """Enter what a vector costs in the ledger; returns what is kept here. Raises as `_spend`."""
        self._spend(work, header)
        return self._kept()

    def _spend(self, work: RoundWork, header: RoundHeader) -> None:
        """Record what this round's vector costs of its rows' privacy, on disk, before it is made. Raises PolicyRefused
        where it is more than the policy allows, and StoreProblem."""
        privacy, ledger, rows = work.agreed.plan.privacy, self.context.ledger, self.job.part.rows
        step = trains(header.purpose)
        if privacy is None or not (step or privacy.measures(trains=False)):
            return
        spend = Spend.of(header, rows, privacy, trains=step)
        before = ledger.spends(rows)
        if all(each.header != spend.header for each in before):
            rounds, measured = privacy.of_vector(trains=step)
            require(self.context.policy.on_spend(privacy, rounds, before, measured))
        ledger.spend(spend)

    def _protected(
        self, work: RoundWork, asked: effects.MakeVector, found: Contribution
    ) -> events.VectorReady:
        """Protect a vector. A small one becomes a container for the journal; a large one is flushed to disk."""
        header, (chunks, salt, marks) = asked.header.digest, work.protect(asked, found)
        size = sum(map(len, chunks))
        judged = canonical(self.guard.memory.to_json())
        app = self.files.keep(self.guard.kept)
        if size + container.overhead(len(chunks)) <= INLINE:
            small = container.to_bytes(chunks)
            vector = site.VectorMade(container.vector_digest(chunks), size, salt)
        else:
            small, stored = b"", self.context.spool.put(self.id, "vector", chunks, header=header)
            vector, self._stored = site.VectorMade(stored.digest, stored.size, salt), stored
        return events.VectorReady(header, vector, small, marks, judged, app)

    def _kept(self) -> bytes:
        """What an algorithm or an app keeps here, as of the last vector that was journalled: a round that was given
        up before that has left nothing, and one that is trained again finds the state from before it."""
        return self.files.kept(self.context.journal.get(self.id, "app") or b"")

    def tidy_kept(self) -> None:
        """Between rounds, remove files of kept states that the journal does not name: nothing writes one then but
        work that was cancelled. What the site's own model has is copied for `fed-site model`."""
        self._show_personal()
        self.files.forget(but=self.context.journal.get(self.id, "app") or b"")

    def _show_personal(self) -> None:
        if not is_personal(self._asked.train):
            return
        if kept := self._kept():
            self.files.write(self.files.personal, kept)

    def forget_kept(self) -> None:
        """Erase what was kept here from round to round, once the job is over; what the site's own model has stays."""
        self._show_personal()
        if self.context.journal.get(self.id, "app") is not None:
            self.context.journal.forget(self.id, "app")
        self.files.forget()

    async def upload(self, submit: messages.Submit) -> None:
        """Upload this round's vector, until it is complete or the round does not need it any more."""
        source = await self.finished_vector(submit)
        if source is None:
            raise DataLost(
                "spool: found this round's vector gone, expected it until the round is over",
                remedy="check the disk; nothing but this site may remove files from its spool",
            )
        self.link.doing(self.id, "uploading")
        while self._parts.rounds.awaits_upload(submit.header):
            with contextlib.suppress(Offline):
                await self.link.upload(self.id, submit.header, submit.digest, source)
                if 2 * submit.size > INLINE:  # the sum of small vectors comes unasked
                    self.link.expect_sum(self.id, submit.header)
                self.link.doing(self.id, "waiting")
                return
            await self._session_or_pause()

    async def finished_vector(self, submit: messages.Submit) -> Path | bytes | None:
        """The file of this submission's vector, or the bytes of a small one."""
        kept = self.context.journal.get(self.id, "vector")
        if kept:  # empty beside a vector on the disk
            return kept
        if (
            (made := self._stored) is not None
            and made.digest == submit.digest
            and made.path.exists()
        ):
            return made.path  # the coordinator checks its digest
        find = self.context.spool.find
        found = await asyncio.to_thread(find, self.id, "vector", header=submit.header)
        return None if found is None else found.path

    async def _session_or_pause(self) -> None:
        """Wait for a new session, or a little: the present one may work again."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.context.retry_seconds):
                await self.online.wait()
        await asyncio.sleep(0.05)

    async def fetch(
        self, what: str, digest: bytes, wanted: Callable[[], bool], each: EachChunk, of: bytes = b""
    ) -> None:
        """Pass the chunks of a sum or checkpoint to `each` as they come, with their places; what comes again after a
        break is passed again. of: h of the round of a sum. Raises Offline when it is not wanted any more."""
        while wanted():
            chunks = self.inline.pop(digest, None)
            if chunks is not None:
                for place, chunk in enumerate(chunks):
                    each(place, chunk)
                return
            with contextlib.suppress(Offline):
                await self.link.download(self.id, what, digest, each, of)
                return
            await self._session_or_pause()
        raise Offline

    async def _opened(self, asked: effects.OpenSum, opened: Callable[[Iterable[bytes]], T]) -> T:
        """A sum that came inside the session is opened at once, another one chunk by chunk while it comes."""
        header, here = asked.header.digest, asked.digest in self.inline
        wanted = partial(self._parts.rounds.awaits_sum, header)

        async def download(each: EachChunk) -> None:
            await self.fetch(frames.SUM, asked.digest, wanted, each, header)
            self.link.doing(self.id, "opening")

        if here:
            parts: dict[int, bytes] = {}
            await download(parts.__setitem__)
            return await self._beside(lambda: opened(parts.values()))
        self.link.doing(self.id, "downloading")
        return await read_on_the_way(download, opened)

    async def open_sum(self, asked: effects.OpenSum) -> events.SiteEvent:
        """Download, open and check a sum, and write a large state that it leads to: unused until certified."""
        header = asked.header.digest
        try:
            work, marks = self.round_work(), self._parts.rounds.own_marks(asked.header)

            def opened(chunks: Iterable[bytes]) -> events.CheckedSum:
                found = work.open(asked, chunks, marks)
                return replace(found, data=self._kept_candidate(found.certificate, found.state))

            return await self._opened(asked, opened)
        except Offline:  # the others certified it, and it was removed: catch up
            return events.SumGone(header)
        except (StoreProblem, OSError):
            raise  # this site's disk, not the sum
        except Exception as error:  # noqa: BLE001 - a malicious site may choose the integers of a sum
            return events.WorkFailed(header, error, str(error), problem=problem_of(error))

    def _kept_candidate(self, name: str, state: JobState) -> bytes:
        """The bytes of a small state, for the journal; a large one is flushed to disk, and b"" returned."""
        data = state.to_bytes()
        if len(data) <= INLINE:
            return data
        self.files.write(self.files.candidate(name), data)
        return b""

    async def prepare_next(self, header: RoundHeader) -> None:
        """While the sum comes, do what the next vector needs, whatever it holds: of a large one the encryptions are
        most of the work."""
        if self._parts.agreed.plan.parameters > FEW:
            await asyncio.to_thread(self.round_work().prepare, header)

    async def track(self, asked: effects.Track) -> events.SiteEvent | None:
        """Evaluate a release, and write the row."""
        try:
            kept = await self._beside(self._kept)
            row = await self.contributor.track(self.id, self._parts.agreed.plan, asked, kept)
        except TrainingFailed as failed:
            LOG.warning("job %s: accuracy not tracked: %s", self.id, failed.reason)
            return None
        if row is None:
            return None
        folder = self.context.folder / "jobs" / self.id
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True, mode=0o700)
        append_row(folder, row)
        if (row.clipped_fraction or 0.0) > CLIPPED_WORTH_SAYING:
            LOG.warning(
                "job %s: round %d: %.3g %% of the coordinates of all sites' updates were beyond the range and "
                "clipped; it is %g in the next round",
                self.id, row.round, 100 * (row.clipped_fraction or 0.0), row.next_range,
            )  # fmt: skip
        return events.Tracked(asked.certificate, row)

    async def seal(self, asked: effects.SealCheckpoint) -> None:
        """Seal this site's state for those that missed its release."""
        certificate, secrets = asked.certificate, self._parts.keys.secrets
        if not isinstance(secrets, EpochSecrets):
            return  # no key epoch under which the others could open it
        data = asked.group.to_bytes() + asked.state.to_bytes()
        sealed = secrets.seal_state(data, certificate, OsEntropy())
        name = f"checkpoint-{certificate.header.round}"
        spool = self.context.spool
        stored = await asyncio.to_thread(spool.put, self.id, name, _pieces(sealed))
        with contextlib.suppress(Offline, FileNotFoundError):  # the job may end meanwhile
            digest = certificate.header.digest
            self._leaves("sealed checkpoint", stored)
            await self.link.upload(self.id, digest, stored.digest, stored.path)
            about = self.id, self.context.id, certificate.hash, stored.digest, stored.size
            self._say(job_messages.CheckpointSealed(*about))
        spool.remove(self.id, name)

    async def catch_up(self, asked: effects.TakeCheckpoint) -> events.SiteEvent:
        """Download the state of a release that this site missed, and check it against the certificate."""
        certificate, wanted = asked.certificate, self._parts.catch_up.wants
        try:
            parts: dict[int, bytes] = {}
            still = partial(wanted, certificate)
            await self.fetch(frames.CHECKPOINT, asked.digest, still, parts.__setitem__)
            secrets = self._parts.keys.secrets
            assert isinstance(secrets, EpochSecrets)
            data = secrets.open_state(b"".join(parts.values()), certificate)
            # The certificate may be of an earlier key epoch: its G comes with the state. Another G and state with
            # the certified HMAC cannot be found.
            group = GroupSecret.from_bytes(data[:GROUP_SECRET_BYTES], sender="checkpoint")
            state = JobState.from_bytes(data[GROUP_SECRET_BYTES:])
            mac = state_mac(group, certificate.header.digest, state.canonical())
            site_states.require_certified(mac, certificate)
            kept = self._kept_candidate(site_states.name_of(certificate), state)
            return events.CheckpointReady(certificate, group, mac, state, kept)
        except Offline:
            return events.CheckpointLost(certificate)
        except (PeerRefused, BadInput) as error:
            return events.CheckpointLost(certificate, problem_of(error))

    async def give_model(self, asked: effects.GiveModel) -> None:
        """Send the digest of the model's file, or upload the file."""
        try:
            stored = await self._model_file(asked)
        except TrainingFailed as failed:
            LOG.warning("job %s: the model could not be given: %s", self.id, failed.reason)
            return
        if asked.digest != stored.digest:
            made = job_messages.ModelMade(
                self.id, self.context.id, asked.certificate, stored.digest
            )
            self._say(made)
            return
        with contextlib.suppress(Offline, FileNotFoundError):  # the job may end meanwhile
            header = job_messages.model_upload(asked.certificate)
            self._leaves("model", stored)
            await self.link.upload(self.id, header, stored.digest, stored.path)

    def _leaves(self, what: str, stored: Stored) -> None:
        """Record that a file is about to be uploaded. Raises StoreProblem."""
        event, facts = file_event(self.id, what, stored.size, stored.digest)
        self.context.audit.record(event, **facts)

    def _say(self, message: job_messages.ToCoordinator) -> None:
        """Record and send a message. Raises StoreProblem."""
        self.context.audit.record("sent", job=self.id, **message_facts(message))
        self.link.say(self.id, message)

    async def _model_file(self, asked: effects.GiveModel) -> Stored:
        """The file of the model here, made once. Raises TrainingFailed."""
        async with self._exporting:
            if self._exported is None or self._exported[0] != asked.certificate:
                data = await self.contributor.export(self.id, asked.state)
                put = self.context.spool.put
                stored = await asyncio.to_thread(put, self.id, "model", _pieces(data))
                self._exported = asked.certificate, stored
            return self._exported[1]


def _pieces(data: bytes, size: int = 1 << 20) -> Sequence[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)] or [b""]
