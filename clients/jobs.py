"""One job at a site: runs the site's machines over what the session brings, and obeys their effects.

Every event goes through one queue and is handled to its end before the next; training, encryption and
transfers run beside it and come back as events. Invariant (PROTOCOL D): what a step records is in the
journal before anything else of that step is done, and the state a certificate proves is on disk not later
than the certificate is. A process killed at any instant goes on from there, or leaves the round.

A vector and a state that are small travel in the journal, in the commit of the record that relies on them,
and cost no sync of their own; the file that shows people such a state is then only a copy, written again
from the journal at the next start. Large ones are files, synced before that record.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from fedcore_clients.approvals import is_approved
from fedcore_clients.ledger import Exposure, Ledger
from fedcore_clients.policy import POLICY, SitePolicy
from fedcore_clients.training import Loaded, TrainingFailed

from fedcore.config import Job, build_job, plan_of
from fedcore.errors import (
    BadInput,
    DataLost,
    FedcoreError,
    GuardTripped,
    HeaderRefused,
    OtherSites,
    PeerRefused,
    PolicyRefused,
    Refused,
    ReleaseRefused,
    StoreProblem,
)
from fedcore.files import append_row, write_atomic
from fedcore.learning.guard import GuardMemory, GuardRecord
from fedcore.learning.state import Column, JobState, without_metrics
from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.crypto.sumtag import GROUP_SECRET_BYTES, GroupSecret
from fedcore.secagg.encode.pack import Layout
from fedcore.secagg.label import Terms, collusion, label_of
from fedcore.secagg.leaving import leaving_of
from fedcore.secagg.plan import MASKS, RoundHeader, RoundPlan, canonical
from fedcore.secagg.protocol import effects, epoch, messages, public_metrics, schedule
from fedcore.secagg.protocol import job_messages as job
from fedcore.secagg.protocol.round import site
from fedcore.secagg.protocol.shared import THIS_SITE, SiteProgress, survivors_of
from fedcore.secagg.protocol.wire_form import decode, encode
from fedcore.secagg.scheme import EpochSecrets, Scheme, check_announced, vector_of
from fedcore.store import container
from fedcore.store.disk import sync_folder
from fedcore.store.journal import Journal
from fedcore.store.spool import Spool, Stored
from fedcore.types import Contribution, Json, SiteId
from fedcore.wire.limits import INLINE

LOG = logging.getLogger("fedcore.site.job")
ROUND = "round"

_AGAIN = 2.0
"""Seconds before what found no session, or no room on the disk, is tried again at the latest."""

_UNABLE = "it cannot take part"
"""What other sites hear of a failure whose text stays here: it may name rows."""

_MANY = 50_000
"""Parameters from which on hashing a state takes longer than handing it to a thread."""

APPROVAL_SECONDS = 1.0
"""How often the approval of a job that waits for it is looked for."""

_ENDING_SECONDS = 5.0
"""How often a site that missed the last release of a job that is over asks for it."""


class Contributor(Protocol):
    """Who computes the content of vectors: the training process, or a stand-in of the benchmark."""

    async def load(self, job: str, settings: Json, task: str, digest: str) -> Loaded:
        """Find the task, load the rows, build the model. Raises TrainingFailed."""
        ...

    async def contribute(
        self,
        job: str,
        plan: RoundPlan,
        step: schedule.PlannedRound,
        state: JobState,
        record: GuardRecord,
    ) -> Contribution:
        """The content of one vector; the guard of `record` judges the state first, and its memory is
        replaced. Raises TrainingFailed and GuardTripped."""
        ...

    async def track(
        self,
        job: str,
        plan: RoundPlan,
        step: schedule.PlannedRound,
        state: JobState,
        wides: Mapping[str, Sequence[int]],
        sites: int,
    ) -> Json | None:
        """What the site can say of accuracy after a released step. Raises TrainingFailed."""
        ...

    async def export(self, job: str, state: JobState) -> bytes:
        """The file of a model that is given away: the same bytes at every site. Raises TrainingFailed."""
        ...

    async def forget(self, job: str) -> None:
        """The job is over."""
        ...


@dataclass(frozen=True)
class Party:
    """Who this site is, for every job. patience: seconds its machine waits at a stage. keep_keys: seconds
    for which the secrets of a job's key epochs outlive the job. now: seconds since 1970. clock, pause:
    seconds that never go back, and a way to wait for some."""

    federation: str
    id: SiteId
    identity: IdentityKey
    pins: Mapping[SiteId, bytes]
    journal: Journal
    spool: Spool
    folder: Path
    policy: SitePolicy
    ledger: Ledger
    patience: float = 1800.0
    keep_keys: float = 7 * 86_400.0
    now: Callable[[], float] = time.time
    clock: Callable[[], float] = time.monotonic
    pause: Callable[[float], Awaitable[None]] = asyncio.sleep


class Link(Protocol):
    """The session as a job sees it."""

    def say(self, job: str, message: Any) -> None:
        """Send a record if there is a session; a lost one is asked for again."""
        ...

    def doing(self, job: str, what: str) -> None:
        """Tell people who wait what this site is at."""
        ...

    async def upload(self, job: str, header: bytes, digest: bytes, source: Path | bytes) -> None:
        """Send a container whole, going on where it broke off. Raises Offline without a session."""
        ...

    async def download(self, job: str, what: str, digest: bytes) -> list[bytes]:
        """The chunks of a sum or checkpoint. Raises Offline without a session."""
        ...


class Offline(Exception):
    """There is no session now: the step is done again at the next one."""


@dataclass(frozen=True)
class _Candidate:
    """The state that a round leads to. data: its bytes where they are few, else they are in a file."""

    state: JobState
    data: bytes


# ------------------------------------------------------------------------------------ events


@dataclass(frozen=True)
class _Told:
    """A record of the coordinator."""

    message: Any


@dataclass(frozen=True)
class _Done:
    """Work beside the queue ended. header: of the round it was for. word: of REASONS, where this site
    cannot take part any more: said after it left the round, or its notice would come too late."""

    event: Any
    header: bytes = b""
    word: str = ""


@dataclass(frozen=True)
class _Connected:
    """A new session."""


@dataclass(frozen=True)
class _Trouble:
    """The disk refused work beside the queue."""

    error: Exception


def wire_settings(settings: bytes) -> Json:
    """The job's tables of an offer. Raises BadInput."""
    try:
        found = json.loads(settings)
        same = canonical(found) == settings
    except (ValueError, RecursionError) as error:
        raise BadInput("job: found settings that are no JSON") from error
    if not isinstance(found, dict) or not same:
        raise BadInput("job: found settings in another form, expected canonical JSON")
    return found


@dataclass(frozen=True)
class _About:
    """What an operator should know of a job before a row is read for it; empty where no plan can follow."""

    protection: str = ""
    label: Sequence[str] = ()
    leaves: Sequence[str] = ()

    @classmethod
    def of(cls, offer: job.JobOffer, sites: Sequence[SiteId]) -> _About:
        """Label and list of what leaves, from the settings and the roster alone."""
        try:
            asked = build_job(wire_settings(offer.settings))
            terms = Terms.of_job(asked, tuple(sites))
        except FedcoreError:  # it is refused, and the refusal says why
            return cls()
        return cls(terms.protection, label_of(terms).splitlines(), leaving_of(asked, terms))


class SiteJob:
    """One job here, from its offer to its end."""

    def __init__(
        self, party: Party, link: Link, contributor: Contributor, offer: job.JobOffer
    ) -> None:
        self.party, self.link, self.contributor, self.offer = party, link, contributor, offer
        self.id = offer.job
        self.plan: RoundPlan | None = None
        self.features = 0
        self.columns: tuple[Column, ...] = ()
        self.rows = ""
        """What the ledger calls this site's rows; empty before they were loaded."""
        self.state: JobState | None = None
        self.epoch: Any = epoch.NoKey()
        self.stage: Any = site.Idle(SiteProgress(0, b""))
        self.secrets: EpochSecrets | None = None
        self.survey: Loaded | None = None
        self.ended: job.JobEnded | None = None
        self.last_error = ""
        self.about = _About.of(offer, tuple(party.pins))
        self.approval = "waiting" if party.policy.asks else "not needed"
        """Whether its operator must approve it, and has: "not needed", "waiting" or "approved"."""
        self.refused: PolicyRefused | None = None
        """Why this site's policy does not allow the job, if it does not."""
        self.guard = GuardRecord(party.policy.guard)
        self.left = ""
        """Why this site left the job for good, if it did: its guard tripped."""
        self.tracked: Json | None = None
        self._sums: tuple[str, schedule.PlannedRound, Mapping[str, Sequence[int]], int] | None = (
            None
        )
        self._tracking: list[asyncio.Task[None]] = []
        self._told: job.PublicMetrics | None = None
        self._scheme: Scheme | None = None
        self._member: site.SiteParams | None = None
        self._queue: asyncio.Queue[Any] = asyncio.Queue()
        self._beside: set[asyncio.Task[None]] = set()
        self._inline: dict[bytes, list[bytes]] = {}
        self._vector: tuple[bytes, bytes] = b"", b""
        """Digest and container of the last small vector made here."""
        self._marks: tuple[bytes, dict[str, int]] = b"", {}
        """What the last vector made here has in this site's own places, by the header it is for."""
        self._candidates: dict[str, _Candidate] = {}
        """By the hash of the one certificate that can make it the state; a release drops all of them."""
        self._unwritten: list[Any] = []
        """Records of the round that nothing sent relies on yet."""
        self._announced = 0.0
        """When the round under way was announced, by the party's clock."""
        self._making: asyncio.Task[None] | None = None
        self._uploading: tuple[bytes, asyncio.Task[None]] | None = None
        self._early: messages.Certificate | None = None
        self._catching = ""
        self._exporting = asyncio.Lock()
        self._exported: tuple[str, Stored] | None = None
        """The file of the last model, and the certificate it was made after."""
        self._ending: job.JobEnded | None = None
        self._groups: dict[str, str] = {}
        """G of every key epoch here, in hex: a certificate is checked under the G of its own epoch."""
        self._asked = False
        self._ended_at = 0.0
        """Seconds since 1970 at which this job ended here."""
        self._online = asyncio.Event()
        self._loading = asyncio.Lock()

    # --------------------------------------------------------------------------- coming back

    @classmethod
    def stored(cls, party: Party, link: Link, contributor: Contributor, name: str) -> SiteJob:
        """A job that this site took part in before its process ended."""
        kept = party.journal.get(name, "offer")
        assert kept is not None
        found = cls(party, link, contributor, decode(kept, job.JobOffer))
        found._restore()
        return found

    def _restore(self) -> None:
        journal, name = self.party.journal, self.id
        ended = journal.get(name, "ended")
        if ended is not None:
            self.ended = decode(ended, job.JobEnded)
            self._ended_at = float(journal.get(name, "ended_at") or 0)
        about = journal.get(name, "plan")
        if about is None:
            return
        kept = json.loads(about)
        self.rows = kept["rows"]
        self._adopt(
            RoundPlan.from_json(kept["plan"]), kept["features"],
            tuple((str(n), float(low), float(high)) for n, low, high in kept["columns"]),
        )  # fmt: skip
        standing = journal.get(name, "stage")
        if standing is not None:
            self.stage = decode(standing, object)
        self.stage = site.replay(self.stage, journal.read(name, ROUND))
        self._recover_state()
        self._groups = json.loads(journal.get(name, "groups") or b"{}")
        judged = journal.get(name, "guard")
        if judged is not None:
            self.guard.memory = GuardMemory.from_json(json.loads(judged))
        self.left = (journal.get(name, "left") or b"").decode()
        held = journal.get(name, "epoch")
        if held is not None:
            self.epoch = decode(held, object)
            if isinstance(self.epoch, epoch.Holding):
                self._use(self.epoch.payload, self.epoch.header.maker)

    def _recover_state(self) -> None:
        """The state on disk, and the one that a certificate of the journal has just proved."""
        released, current = self.stage.standing.released, self._state_path("current")
        kept = self.party.journal.get(self.id, "state")
        if kept:
            if not current.exists() or current.read_bytes() != kept:
                self._show_state(kept)
            self.state = JobState.from_bytes(kept)
            return
        candidate = self._candidate_path(self.stage.standing.certificate)
        if released and candidate.exists():
            candidate.replace(current)
            sync_folder(candidate.parent)
        self.state = JobState.from_bytes(current.read_bytes())

    def _candidate_path(self, certificate: str) -> Path:
        return self._state_path(f"candidate-{certificate[:32]}")

    def _state_path(self, name: str) -> Path:
        return self.party.folder / "states" / self.id / f"{name}.safetensors"

    # ----------------------------------------------------------------------------- the queue

    def tell(self, message: Any) -> None:
        """A record of the coordinator for this job."""
        wanted = isinstance(message, epoch.GrantRequest) and self.ended is not None
        if wanted and not self.holds_keys:
            erased = job.KeysErased(self.id, self.party.id, message.key.site)
            self.link.say(self.id, erased)
            return
        self._queue.put_nowait(_Told(message))

    def inline(self, digest: bytes, data: bytes) -> None:
        """A small sum or checkpoint that came inside the session."""
        self._inline = {digest: container.from_bytes(data)}

    def connected(self) -> None:
        """There is a new session."""
        self._online.set()
        self._queue.put_nowait(_Connected())

    async def run(self) -> None:
        """Handle events until cancelled. A stage's deadline is an event too.

        Where the disk refuses, everything is read from it again, as a new process would, and goes on.
        A fault of this program ends the job here, until this process is started again.
        """
        fault: Exception | None = None
        while True:
            try:
                if fault is not None:
                    await self._recover(fault)
                fault = None
                await self._serve()
            except (StoreProblem, OSError) as error:
                fault = error
            except Exception:
                LOG.exception("job %s: stopped here by a fault of this side", self.id)
                self._unable(job.UNABLE)  # so that no site waits for this one
                await self.close()
                return

    async def _serve(self) -> None:
        if self.plan is not None and self.ended is None:
            self._tidy()
            await self._machine(site.Restarted())
            await self._install_held()
            if self.left:
                self._unable(job.UNABLE)
            else:
                await self._epoch_machine(epoch.Again())
                self._aside(self._load_again())
        elif self.ended is None and self.survey is None:
            self._aside(self._load())
        while True:
            try:
                # Not wait_for: before Python 3.12 it may lose a cancellation.
                async with asyncio.timeout(self._wait()):
                    event = await self._queue.get()
            except TimeoutError:
                event = _Done(site.Tick())
                if self._ending is not None:  # the way to the last state was lost somewhere
                    self._rest()
            for each in (event, _Done(site.Tick())) if self._wait() == 0 else (event,):
                try:
                    await self._handle(each)
                except (PeerRefused, Refused, BadInput) as error:
                    self._note(error)

    async def _recover(self, fault: Exception) -> None:
        """After a pause, what a new process would know. Raises what the disk refused this time."""
        self._note(fault)
        await self.close()
        await asyncio.sleep(_AGAIN)
        fresh = SiteJob.stored(self.party, self.link, self.contributor, self.id)
        for name in ("plan", "features", "columns", "rows", "state", "epoch", "stage", "secrets", "ended",
                     "guard", "left", "_scheme", "_member", "_groups", "_candidates", "_ended_at"):  # fmt: skip
            setattr(self, name, getattr(fresh, name))
        self._catching, self._early, self._making, self._ending = "", None, None, None
        self._unwritten.clear()
        self._queue.put_nowait(_Connected())

    def _tidy(self) -> None:
        """Remove the spool's rounds that a crash kept from being removed."""
        keep = self.stage.header.digest if isinstance(self.stage, site.IN_ROUND) else b""
        for found in self.party.spool.rounds(self.id):
            if found != keep:
                self.party.spool.discard(self.id, found)

    async def _install_held(self) -> None:
        """A process that ended between taking a key epoch and starting it begins it now."""
        held = self.epoch
        if isinstance(held, epoch.Holding) and held.epoch > self.stage.standing.epoch:
            await self._install(epoch.Install(held.epoch, held.held.key_id, held.payload))

    def _wait(self) -> float | None:
        until = getattr(self.stage, "until", None)
        if until is None or not isinstance(self.stage, site.IN_ROUND):
            return None if self._ending is None else _ENDING_SECONDS
        left = float(until) - self.party.clock()
        return left + 0.001 if left > 0 else 0.0

    def _note(self, error: Exception) -> None:
        self.last_error = str(error)
        LOG.warning("%s", "; ".join([str(error), *getattr(error, "__notes__", ())]))

    async def close(self) -> None:
        """Stop what runs beside the queue."""
        for task in list(self._beside):
            task.cancel()
        await asyncio.gather(*self._beside, return_exceptions=True)

    def _aside(self, work: Coroutine[Any, Any, None], header: bytes = b"") -> asyncio.Task[None]:
        """Run work in the background. header: of the round whose other sites wait for this work; what
        the work raises makes this site leave that round, so that nobody waits until a deadline."""

        async def guarded() -> None:
            try:
                await work
            except asyncio.CancelledError:
                pass
            except (StoreProblem, OSError) as error:
                self._queue.put_nowait(_Trouble(error))
            except (FedcoreError, TrainingFailed) as error:
                self._note(error)
                leave(error)
            except Exception as error:
                LOG.exception("job %s: a fault of this side", self.id)
                self.last_error = type(error).__name__
                leave(error)

        def leave(error: Exception) -> None:
            if header:
                self._queue.put_nowait(_Done(site.CheckFailed(error), header))

        task = asyncio.get_running_loop().create_task(guarded())
        self._beside.add(task)
        task.add_done_callback(self._beside.discard)
        task.add_done_callback(lambda _: work.close())  # cancelled before its first step
        return task

    # ------------------------------------------------------------------------------- events

    async def _handle(self, event: Any) -> None:
        match event:
            case _Trouble(error):
                raise error
            case _Connected():
                await self._reconnected()
            case _Done(site.CaughtUp(certificate)) if not self._missed(certificate):
                pass  # it came twice, or a round began meanwhile: it is offered again
            case _Done(inner, header, word) if not header or self._is_round(header):
                await self._machine(inner)
                self._say_word(word)
            case _Done(word=word):
                self._say_word(word)
            case _Told(message):
                await self._on_message(message)

    def _say_word(self, word: str) -> None:
        if word:
            self._unable(word)

    def _is_round(self, header: bytes) -> bool:
        found: RoundHeader | None = getattr(self.stage, "header", None)
        return found is not None and found.digest == header

    def _missed(self, certificate: messages.Certificate) -> bool:
        number = certificate.header.round
        return isinstance(self.stage, site.Idle) and number > self.stage.standing.released

    async def _reconnected(self) -> None:
        self._online.clear()
        if self.ended is not None:
            return
        if self.refused is not None:
            self._unable(self.refused.word)
            self.last_error = str(self.refused)
            return
        if self.left:
            self._unable(job.UNABLE)
            return
        if self.survey is not None and self.plan is None:
            self.link.say(self.id, job.SiteSurvey(self.id, self.party.id, self.survey.shape))
        if self.plan is not None:
            await self._say_again()

    async def _say_again(self) -> None:
        """All that the coordinator may not have, or may have lost."""
        self._agree()
        await self._epoch_machine(epoch.Again())
        if isinstance(self.stage, site.IN_ROUND):
            self.link.say(self.id, job.InRound(self.id, self.party.id, self.stage.header.digest))
            await self._machine(site.SessionRestored())
        else:
            self._stand()
        if self._told is not None:
            self.link.say(self.id, self._told)

    def _stand(self) -> None:
        """Between rounds, say where."""
        if isinstance(self.stage, site.Halted):
            # The word of the refusal may have been lost: without it no new key epoch would come.
            refusal = messages.Leave(bytes(32), self.party.id, messages.RELEASE_REFUSED)
            self.link.say(self.id, refusal)
        else:
            self._rest()

    async def _on_message(self, message: Any) -> None:
        if self.left and not isinstance(self.stage, site.IN_ROUND):
            match message:
                case messages.Announce():
                    await self._machine(site.Declined(message.header))
                case job.JobEnded():
                    await self._end(message)
            return
        match message:
            case job.PlanOffer() if self.plan is not None:
                await self._say_again()  # the coordinator's disk refused something that it was told
            case job.PlanOffer():
                self._take_plan(message)
            case job.CheckpointWanted():
                self._aside(self._seal(message))
            case job.CheckpointOffer() if self.plan is not None:
                await self._look_for_own(message.certificate)
                self._aside(self._catch_up(message))
            case job.ModelWanted():
                self._aside(self._give_model(message))
            case job.JobEnded():
                await self._end(message)
            case job.JobOffer():
                pass  # said again after a new session
            case _ if self.plan is None:
                pass  # still loading: what is meant for this site is said again when it agreed
            case messages.Certificate():
                await self._look_for_own(message)
                await self._certified(message)
            case epoch.EpochCall() | epoch.EpochKeys() | epoch.Granted() | epoch.GrantRequest():
                await self._epoch_machine(epoch.FromCoordinator(message))
            case messages.Announce():
                await self._invited(message)
            case _:
                await self._machine(site.MessageFromCoordinator(message))

    # ----------------------------------------------------------------- offer, survey and plan

    async def _load(self) -> None:
        """Survey the task and the rows here; what fails is told by a word of the list."""
        self.link.doing(self.id, "loading")
        try:
            settings = wire_settings(self.offer.settings)
            self._ask_policy(settings)  # before a row is read
            if not await self._approved():
                return
            found = await self._loaded(settings)
            self._take_rows(found)
        except TrainingFailed as failed:
            self._unable(failed.reason)
        except PolicyRefused as refused:
            self._refuse_job(refused)
        except FedcoreError as error:
            self._note(error)
            self._unable(job.UNABLE)
        except Exception:  # the others would wait for this site's survey
            LOG.exception("job %s: a fault of this side while loading", self.id)
            self._unable(job.UNABLE)
        else:
            self.link.say(self.id, job.SiteSurvey(self.id, self.party.id, found.shape))
            self.link.doing(self.id, "idle")

    async def _loaded(self, settings: Json) -> Loaded:
        """Load task and rows; where the job gives a budget of seconds, no answer comes before it is over."""
        began = self.party.clock()
        found: Loaded | Exception
        try:
            found = await self.contributor.load(
                self.id, settings, self.offer.task, self.offer.task_digest
            )
        except Exception as error:  # noqa: BLE001 - raised below, at the same time as an answer
            found = error
        await self._not_before(began, "loading")
        if isinstance(found, Exception):
            raise found
        return found

    @property
    def _budget(self) -> float | None:
        """`round.submit_seconds` of the job."""
        return build_job(wire_settings(self.offer.settings)).round.submit_seconds

    async def _not_before(self, began: float, what: str) -> None:
        """Wait until the job's budget from `began` on is over, if it gives one: what this site sends then
        comes at one time, whatever its rows needed (PROTOCOL U). Overrun is a line in its own log."""
        if self._budget is None:
            return
        until = began + self._budget
        if self.party.clock() > until:
            LOG.warning(
                "job %s: %s took longer than round.submit_seconds = %g: the coordinator can tell",
                self.id, what, self._budget,
            )  # fmt: skip
        while (left := until - self.party.clock()) > 0:
            await self.party.pause(left)

    def _ask_policy(self, settings: Json) -> Job:
        """The job of an offer. Raises PolicyRefused for one that this site's operator does not allow."""
        try:
            asked = build_job(settings)
        except Refused as refused:  # what no site runs, such as public metrics under `encrypted`
            raise PolicyRefused(str(refused), word=POLICY, remedy=refused.remedy) from refused
        self._raise(self.party.policy.on_offer(self.offer.task, self.offer.task_digest, asked))
        return asked

    @staticmethod
    def _raise(refusal: PolicyRefused | None) -> None:
        if refusal is not None:
            raise refusal

    async def _approved(self) -> bool:
        """Say what the job takes and, where the operator must approve it, wait. False: it ended first."""
        for line in self.about.label:
            LOG.info("job %s: label: %s", self.id, line)
        for line in self.about.leaves:
            LOG.info("job %s: leaves: %s", self.id, line)
        while self.approval == "waiting":
            if self.ended is not None:
                return False
            if is_approved(self.party.folder, self.offer):
                self.approval = "approved"
                LOG.info("job %s: approved", self.id)
            elif not self._asked:
                self._asked = True
                LOG.warning("job %s: waits for approval: fed-site approve %s", self.id, self.id)
                self.link.doing(self.id, "idle")
            else:
                await asyncio.sleep(APPROVAL_SECONDS)
        return True

    def _refuse_job(self, refused: PolicyRefused) -> None:
        """One line here, one word to the coordinator, again at every new session."""
        if self.refused is None or str(self.refused) != str(refused):
            LOG.warning("job %s: refused: %s; hint: %s", self.id, refused, refused.remedy)
        self.refused = refused
        self._unable(refused.word)
        self.last_error = str(refused)
        self.link.doing(self.id, "idle")

    def _unable(self, reason: str) -> None:
        self.last_error = self.left or job.REASONS[reason]
        self.link.say(self.id, job.SiteUnavailable(self.id, self.party.id, reason))

    async def _load_again(self) -> None:
        """A new process has to load the rows anew, and must find the plan it agreed to."""
        async with self._loading:
            if self.survey is not None:
                return
            assert self.plan is not None
            settings = wire_settings(self.offer.settings)
            try:  # the operator may have changed the policy since the job began
                complete = self._ask_policy(settings)
                self._raise(self.party.policy.on_plan(self.plan))
            except PolicyRefused as refused:
                self._refuse_job(refused)
                raise
            if not await self._approved():
                raise TrainingFailed("stopped")
            found = await self.contributor.load(
                self.id, settings, self.offer.task, self.offer.task_digest
            )
            mine = plan_of(complete, found.shape, tuple(self.party.pins), self.plan.max_examples)
            if mine.digest != self.plan.digest:
                raise TrainingFailed(job.UNABLE)
            self._take_rows(found)

    def _take_rows(self, found: Loaded) -> None:
        """The rows are here; nothing of them has left. Raises PolicyRefused where they are in enough jobs."""
        self.rows = self.party.ledger.rows_key(found.rows)
        self._raise(self.party.policy.on_rows(self.id, self.party.ledger.jobs_over(self.rows)))
        self.survey = found

    def _take_plan(self, offered: job.PlanOffer) -> None:
        """Make the plan here, and go on only if the offered one is the same."""
        if self.survey is None:
            return  # still loading: the coordinator offers it again
        settings = wire_settings(self.offer.settings)
        complete = build_job(settings)
        cap = complete.protect.max_examples
        assert cap is not None
        mine = plan_of(complete, self.survey.shape, tuple(self.party.pins), cap)
        if canonical(mine.to_json()) != offered.plan:
            LOG.warning(
                "job %s: found another plan at the coordinator than this site makes of its offer and "
                "its task; it takes no part", self.id,
            )  # fmt: skip
            self._unable(job.UNABLE)
            return
        if (refusal := self.party.policy.on_plan(mine)) is not None:
            self._refuse_job(refusal)
            return
        self._adopt(mine, self.survey.shape.features, self.survey.columns)
        self.state = JobState.initial(mine, self.survey.initial)
        self._state_path("current").parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._write_state(self._state_path("current"), self.state.to_bytes())
        about = {
            "plan": mine.to_json(), "features": self.features, "rows": self.rows,
            "columns": [list(column) for column in self.columns],
        }  # fmt: skip
        self.party.journal.put(self.id, "plan", canonical(about))
        if mine.public_metrics:
            LOG.info(
                "job %s: the coordinator will learn the metrics of each release, over all its sites",
                self.id,
            )
        if mine.release == "coordinator":
            LOG.info("job %s: the coordinator will be given the model of the last round", self.id)
        self._agree()

    def _adopt(self, plan: RoundPlan, features: int, columns: Sequence[Column]) -> None:
        party = self.party
        self.plan, self.features, self.columns = plan, features, tuple(columns)
        self._scheme = Scheme(plan)
        self._member = site.SiteParams(
            party.id, party.identity, {name: party.pins[name] for name in plan.sites}, plan,
            party.federation, self.id, OsEntropy(), party.policy.rules.minimum_sites, party.patience,
        )  # fmt: skip

    def _agree(self) -> None:
        assert self.plan is not None
        self.link.say(self.id, job.PlanAgreed(self.id, self.party.id, self.plan.digest))

    def _rest(self) -> None:
        """Say where this site stands between rounds."""
        if self.left:
            self.link.doing(self.id, "idle")
            return
        standing: SiteProgress = self.stage.standing
        if isinstance(self.stage, site.Idle) and self.secrets is not None:
            self.link.say(
                self.id,
                job.SiteStatus(
                    self.id, self.party.id, standing.epoch, standing.certificate, standing.round
                ),
            )
        self.link.doing(self.id, "waiting")

    # ---------------------------------------------------------------------------- key epochs

    async def _epoch_machine(self, event: Any) -> None:
        assert self._member is not None
        assert self._scheme is not None
        after, found = epoch.step_site(self._member, self.epoch, event)
        for effect in found:
            if isinstance(effect, effects.Persist):
                self.party.journal.put(self.id, "epoch", encode(effect.record))
        self.epoch = after
        for effect in found:
            match effect:
                case effects.Send(message=message):
                    self.link.say(self.id, message)
                case epoch.MakeSecrets():
                    payload = await asyncio.to_thread(self._scheme.make_payload)
                    await self._epoch_machine(epoch.SecretsMade(SecretBytes(payload)))
                case epoch.Install():
                    await self._install(effect)

    async def _install(self, effect: epoch.Install) -> None:
        """Begin a key epoch; a round of the one before is over."""
        if effect.epoch > self.stage.standing.epoch:
            if isinstance(self.stage, site.IN_ROUND):
                await self._machine(site.Superseded())
            self._use(effect.payload, self.epoch.header.maker)
            assert self.secrets is not None
            self._groups[str(effect.epoch)] = self.secrets.group.to_bytes().hex()
            self.party.journal.put(self.id, "groups", canonical(self._groups))
            await self._machine(site.NewEpoch(effect.epoch, effect.key_id))
            self._keep_stage(self.stage)
        else:
            self._use(effect.payload, self.epoch.header.maker)
        self._rest()

    def _use(self, payload: SecretBytes, maker: SiteId) -> None:
        assert self._scheme is not None
        self.secrets = self._scheme.open_payload(payload.reveal(), maker)

    # -------------------------------------------------------------------------------- rounds

    async def _invited(self, announce: messages.Announce) -> None:
        """A round begins; whatever this site still does of an earlier one is over, unless that one's sum
        may be known: then no other one follows it here before its release (PROTOCOL H)."""
        began = self.party.clock()
        assert self.plan is not None
        header = announce.header
        stage = self.stage
        if _gives_way(stage) and header.round > stage.header.round:
            await self._machine(site.Superseded())
        try:
            if isinstance(self.stage, site.Idle):
                assert self.state is not None
                schedule.check_step(self.plan, self.features, self.state.done, header)
            tag = b""
            if self.secrets is not None:  # a large state is not hashed while the session waits
                many = self.plan.parameters > _MANY
                tag = await asyncio.to_thread(self._tag, header) if many else self._tag(header)
            if isinstance(self.stage, site.Idle):
                self._announced = began
            await self._machine(site.Invited(announce, tag), refusing=False)
            self._tidy()
        except PeerRefused as error:
            self._note_refusal(error)
            if isinstance(self.stage, site.EXPOSED):
                self.link.say(self.id, messages.Leave(header.digest, self.party.id, messages.LEFT))
            elif not isinstance(self.stage, site.IN_ROUND):
                await self._machine(site.Declined(header))
                self._rest()

    async def _certified(self, certificate: messages.Certificate) -> None:
        """Apply a release; where this site is not that far, it leaves the round and catches up.

        A sum that is being opened is opened to its end first: its checks may still refuse the release.
        """
        stage = self.stage
        if isinstance(stage, site.Opening) and certificate.header.digest == stage.header.digest:
            self._early = certificate
        elif (
            isinstance(stage, site.IN_ROUND)
            and not isinstance(stage, site.Stated)
            and certificate.header.digest == stage.header.digest
        ):
            await self._machine(site.Superseded())
        else:
            await self._machine(site.MessageFromCoordinator(certificate))

    async def _look_for_own(self, certificate: messages.Certificate) -> None:
        """A signature of this site under a round that its folder does not know: the folder is an old one."""
        if isinstance(self.stage, site.IN_ROUND):
            return
        for name, signature in certificate.signatures:
            if name == self.party.id:
                said = certificate.statement(name, signature)
                await self._machine(site.OwnSignature(said, certificate.header))

    async def _look_for_other_keys(self, before: Any, event: Any) -> None:
        """Keys of this site in a bundle that it did not send: another life of it was in this round."""
        bundle = getattr(event, "message", None)
        if not isinstance(before, site.Advertised) or not isinstance(bundle, messages.KeyBundle):
            return
        for keys in bundle.keys:
            if keys.site == self.party.id and keys != before.keys:
                await self._machine(site.OwnSignature(keys, before.header, other=True))

    def _tag(self, header: RoundHeader) -> bytes:
        assert self.secrets is not None
        assert self.state is not None
        return self.secrets.tag(header, self.state.canonical())

    async def _machine(self, event: Any, *, refusing: bool = True) -> None:
        """Step, and do what the machine asks for, in order. What it refuses makes the site leave."""
        assert self._member is not None
        before = self.stage
        try:
            member = self._held_to_ledger(self._member)
            after, found = site.step(member, before, event, self.party.clock())
            await self._prove(found)
            self._spend(found)
        except (PeerRefused, PolicyRefused) as error:
            if not refusing or not isinstance(before, site.IN_ROUND):
                raise
            self._note_refusal(error)
            await self._refuse(error)
            await self._look_for_other_keys(before, event)
            return
        ended = isinstance(before, site.IN_ROUND) and not isinstance(after, site.IN_ROUND)
        ended = ended or (isinstance(event, site.CaughtUp | site.OwnSignature) and bool(found))
        self._journal(found, after if ended else None)
        self.stage = after
        for effect in found:
            if not isinstance(effect, effects.Persist):
                await self._obey(effect)
        if ended:
            self._early = None  # of this round, and the next one is not to be left for it
            self._stop_making()
            self._rest()
            if self._ending is not None:
                await self._end(self._ending)
        elif isinstance(after, site.Stated) and self._early is not None:
            certificate, self._early = self._early, None
            if certificate.header.digest == after.header.digest:
                await self._machine(site.MessageFromCoordinator(certificate))

    def _held_to_ledger(self, member: site.SiteParams) -> site.SiteParams:
        """The machine's rules as the ledger has them now: another job may have had a sum meanwhile."""
        if not self.columns:
            return member
        ledger, header = self.party.ledger, getattr(self.stage, "header", None)
        sites = ledger.statistics_only_with(
            self.rows, self._column_names(), "" if header is None else header.digest.hex()
        )
        return member if sites is None else replace(member, only_with={"statistics": sites})

    def _column_names(self) -> list[str]:
        return [name for name, _, _ in self.columns]

    def _spend(self, found: Sequence[Any]) -> None:
        """Write into the ledger what a step exposes, before it is in the journal and before it leaves.

        Raises PolicyRefused where these rows are in enough jobs already, and StoreProblem.
        """
        ledger = self.party.ledger
        for effect in found:
            match effect:
                case effects.Persist(record=site.UnmaskAnswered()):
                    self._expose(self.stage.header, survivors_of(self.stage.submissions))
                case effects.Persist(record=site.SumAnnounced(aggregate=aggregate)):
                    self._expose(self.stage.header, survivors_of(aggregate.submissions))
                case effects.Persist(record=site.VectorSpooled()):
                    if (
                        self.stage.header.protection not in MASKS
                    ):  # whoever has the key can open it now
                        self._expose(self.stage.header, ())
                case effects.Apply(certificate=certificate):
                    if self.party.id in certificate.survivors:
                        self._expose(certificate.header, certificate.survivors)
                    ledger.certified(certificate.header.digest.hex(), certificate.hash)

    def _expose(self, header: RoundHeader, survivors: tuple[SiteId, ...]) -> None:
        ledger, names = self.party.ledger, self._column_names()
        if not ledger.has(header.digest.hex()):
            self._raise(self.party.policy.on_rows(self.id, ledger.jobs_over(self.rows)))
        ledger.exposed(Exposure.of(header, survivors, rows=self.rows, columns=names))

    def _note_refusal(self, error: Exception) -> None:
        """What this site's policy or ledger forbids ends the job here; other refusals end the round."""
        if isinstance(error, OtherSites):
            error = PolicyRefused(str(error), word=POLICY, remedy=error.remedy)
        if isinstance(error, PolicyRefused):
            self._refuse_job(error)
        else:
            self._note(error)

    def _stop_making(self) -> None:
        """Training for a round that is over would only keep the next one waiting."""
        if self._making is not None and not self._making.done():
            self._making.cancel()
        self._making = None

    async def _refuse(self, error: Exception) -> None:
        assert self._member is not None
        sealed = b""
        if self.secrets is not None:
            sealed = self.secrets.seal_cause(
                error, self.stage.header, self.party.id, self._member.entropy
            )
        await self._machine(site.CheckFailed(error, sealed))

    def _journal(self, found: Sequence[Any], ended: Any = None) -> None:
        """Write what a step records, before anything of it is sent.

        Records that only work here relies on wait for the next ones: a process that ends meanwhile has
        not heard what they say, and the coordinator says it again.
        ended: the stage between rounds that the step led to, if it did.
        """
        put: dict[str, bytes] = {}
        for effect in found:
            match effect:
                case effects.Persist(record=record):
                    self._unwritten.append(record)
                    put |= self._small_beside(record)
                case effects.Apply(certificate=certificate):
                    put["certificate"] = encode(certificate)
                    put["state"] = self._candidate(certificate).data
        if ended is not None:
            self._keep_stage(ended, put)
        elif put or (self._unwritten and any(isinstance(e, effects.Send) for e in found)):
            self.party.journal.append(self.id, ROUND, self._unwritten, put=put)
            self._unwritten.clear()

    def _small_beside(self, record: Any) -> dict[str, bytes]:
        """The vector or the state that a record relies on, where it is small; with the vector its marks,
        and what the guard remembers of the state it was made from."""
        if isinstance(record, site.VectorSpooled) and record.submit.digest == self._vector[0]:
            header, marks = self._marks
            own = {"header": header.hex(), "marks": marks}
            judged = canonical(self.guard.memory.to_json())
            return {"vector": self._vector[1], "marks": canonical(own), "guard": judged}
        if isinstance(record, site.SumStated):
            said, stage = record.statement, self.stage
            led_to = _certifying(
                stage.header, survivors_of(stage.submissions), said.sum_mac, said.state_mac
            )
            return {"candidate": encode((_key(led_to), self._candidate(led_to).data))}
        return {}

    def _keep_stage(self, stage: Any, put: Mapping[str, bytes] | None = None) -> None:
        """Between rounds one record says all; those of the round, and its secrets, go for good."""
        self._unwritten.clear()
        kept, over = {**(put or {}), "stage": encode(stage)}, ("vector", "candidate", "marks")
        self.party.journal.compact(self.id, ROUND, put=kept, forget=over)

    async def _obey(self, effect: Any) -> None:
        match effect:
            case effects.Send(message=message):
                self.link.say(self.id, message)
            case effects.Warn(text=text):
                LOG.warning("%s", text)
            case effects.MakeVector():
                self._making = self._aside(self._make_vector(effect), effect.header.digest)
            case effects.Upload(submit=submit):
                self._begin_upload(submit)
            case effects.OpenSum():
                self._aside(self._open_sum(effect), effect.header.digest)
            case effects.ShowNotice(notice=notice):
                if self.secrets is not None:
                    cause = self.secrets.read_notice(notice)
                    who = notice.site if notice.site in self.party.pins else "not in the roster"
                    LOG.warning("site %s refused: %s", who, cause)
            case effects.Apply(certificate=certificate):
                self._apply(certificate)
            case effects.Erase(header=header):
                self.party.spool.discard(self.id, header.digest)

    def _layout(self, header: RoundHeader) -> Layout:
        assert self.plan is not None
        spec = vector_of(self.plan, self.features, header.purpose)
        return Layout(spec, self.plan.packing, len(self.plan.sites))

    async def _make_vector(self, asked: effects.MakeVector) -> None:
        header, began, unable = asked.header, self._announced, ""
        try:
            assert self.plan is not None
            assert self.state is not None
            step = schedule.PlannedRound(header.purpose, header.training_round)
            await self._load_again()
            self.link.doing(self.id, "training" if step.purpose == "update" else "evaluating")
            found = await self.contributor.contribute(
                self.id, self.plan, step, self.state, self.guard
            )
            found = self._without_isolating_metrics(found, header)
            if self._budget is None:
                self.link.doing(self.id, "protecting")
            made, small, salt = await asyncio.to_thread(self._protect, asked, found)
            self._vector = made.digest, small
            event: Any = site.VectorMade(made.digest, made.size, salt)
        except GuardTripped as tripped:
            unable = job.UNABLE
            event = site.CheckFailed(tripped, self._leave_for_good(tripped, header))
        except TrainingFailed as failed:
            unable, event = failed.reason, site.CheckFailed(failed, self._sealed(_UNABLE, header))
        except PolicyRefused as refused:
            event = site.CheckFailed(refused, self._sealed(_UNABLE, header))
        except FedcoreError as error:
            self._note(error)
            unable = job.UNABLE
            event = site.CheckFailed(error, self._sealed(_UNABLE, header))
        except Exception as error:
            LOG.exception("job %s: a fault of this side", self.id)
            unable = job.UNABLE
            event = site.CheckFailed(error, self._sealed(_UNABLE, header))
        await self._not_before(began, "making a vector")
        self._queue.put_nowait(_Done(event, header.digest, unable))

    def _leave_for_good(self, tripped: GuardTripped, header: RoundHeader) -> bytes:
        """The guard tripped: no further round of this job, also after a restart. The coordinator gets the
        one word; returns the cause for the other sites, sealed (PROTOCOL G)."""
        LOG.error("job %s: %s; hint: %s", self.id, tripped, tripped.remedy)
        self.party.journal.put(self.id, "left", str(tripped).encode())
        self.left = str(tripped)
        return self._sealed(
            f"guard: it leaves the job after round {tripped.round}: {tripped.cause}", header
        )

    def _sealed(self, text: str, header: RoundHeader) -> bytes:
        """A notice to the other sites, of one length whatever it says, so that the coordinator cannot tell
        one cause from another."""
        if self.secrets is None:
            return b""
        return self.secrets.seal_cause(text, header, self.party.id, OsEntropy())

    def _without_isolating_metrics(self, found: Contribution, header: RoundHeader) -> Contribution:
        """Zeros for the metric sums where this cohort, beside an earlier release, would isolate fewer
        sites than two honest ones (PROTOCOL H). All sites decide alike: state and cohort are theirs."""
        assert self.plan is not None
        assert self.state is not None
        least = 2 + collusion(Terms.of_plan(self.plan)).active
        if not self.state.isolates(header.roster, least):
            return found
        LOG.info("job %s: no metrics in round %s: they would isolate a site", self.id, header.round)
        return found[0], without_metrics(self.plan, found[1])

    def _protect(
        self, asked: effects.MakeVector, found: Contribution
    ) -> tuple[container.Vector | Stored, bytes, bytes]:
        """The vector: on disk, synced, or where it is small as a container for the journal; its salt."""
        assert self.plan is not None
        assert self.secrets is not None
        layout, place = self._layout(asked.header), asked.header.place(self.party.id)
        slots = layout.pack(*found, place)
        self._marks = asked.header.digest, layout.own_marks(found[1])
        self.secrets.put_tag(slots, layout, asked, self.party.id)
        chunks, salt = self.secrets.protect(slots, layout, asked, self.party.id, OsEntropy())
        size = sum(map(len, chunks))
        if size + container.overhead(len(chunks)) <= INLINE:
            made = container.Vector(container.vector_digest(chunks), size, len(chunks))
            return made, container.to_bytes(chunks), salt
        stored = self.party.spool.put(self.id, "vector", chunks, header=asked.header.digest)
        return stored, b"", salt

    async def _finished_vector(self, submit: messages.Submit) -> Path | bytes | None:
        """Where the vector of this submission is, or the bytes of a small one."""
        digest, small = self._vector
        if small and digest == submit.digest:
            return small
        kept = self.party.journal.get(self.id, "vector")
        if kept:  # empty beside a vector on the disk
            return kept
        found = await asyncio.to_thread(
            self.party.spool.find, self.id, "vector", header=submit.header
        )
        return None if found is None else found.path

    def _begin_upload(self, submit: messages.Submit) -> None:
        """Asked for at every new session; two of one vector would end each other at the coordinator."""
        header, task = self._uploading or (b"", None)
        if task is None or task.done() or header != submit.header:
            self._uploading = submit.header, self._aside(self._upload(submit), submit.header)

    async def _upload(self, submit: messages.Submit) -> None:
        """Until it is there whole, or the round has gone on."""
        source = await self._finished_vector(submit)
        if source is None:
            raise DataLost(
                "spool: found this round's vector gone, expected it until the round is over",
                remedy="check the disk; nothing but this site may remove files from its spool",
            )
        self.link.doing(self.id, "uploading")
        while isinstance(self.stage, site.Submitted) and self._is_round(submit.header):
            with contextlib.suppress(Offline):
                await self.link.upload(self.id, submit.header, submit.digest, source)
                self.link.doing(self.id, "waiting")
                return
            await self._session_or_pause()

    async def _session_or_pause(self) -> None:
        """Wait for a new session; the present one may serve as well a little later."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_AGAIN):
                await self._online.wait()
        await asyncio.sleep(0.05)

    async def _fetch(self, what: str, digest: bytes, wanted: Callable[[], bool]) -> list[bytes]:
        """A sum or checkpoint, as long as it is wanted. Raises Offline when it is not any more."""
        while wanted():
            chunks = self._inline.pop(digest, None)
            if chunks is not None:
                return chunks
            with contextlib.suppress(Offline):
                return await self.link.download(self.id, what, digest)
            await self._session_or_pause()
        raise Offline

    async def _open_sum(self, asked: effects.OpenSum) -> None:
        """Download, open, check, and put the state it leads to on disk, unused until it is certified."""
        event: Any

        def wanted() -> bool:
            here = isinstance(self.stage, site.Opening) and self._is_round(asked.header.digest)
            return here and self._early is None

        try:
            if asked.digest not in self._inline:
                self.link.doing(self.id, "downloading")
            chunks = await self._fetch("sum", asked.digest, wanted)
            self.link.doing(self.id, "opening")
            event, led_to, candidate = await asyncio.to_thread(self._opened, asked, chunks)
            self._candidates[led_to] = candidate
        except Offline:  # others have certified a sum that is gone meanwhile: catch up with them
            event = site.Superseded() if self._early is not None else None
            self._early = None
        except (StoreProblem, OSError):
            raise  # this site's disk, and nothing that the sum did
        except Exception as error:  # noqa: BLE001 - a lying site chooses the integers of a sum
            self._note(error)
            assert self.secrets is not None
            sealed = self.secrets.seal_cause(error, asked.header, self.party.id, OsEntropy())
            event = site.CheckFailed(error, sealed)
        if event is not None:
            self._queue.put_nowait(_Done(event, asked.header.digest))

    def _opened(
        self, asked: effects.OpenSum, chunks: list[bytes]
    ) -> tuple[site.SumOpened, str, _Candidate]:
        """What this site found, and the state it leads to with the hash of the certificate it needs."""
        assert self.plan is not None
        assert self.secrets is not None
        assert self.state is not None
        check_announced(chunks, asked)
        header, layout = asked.header, self._layout(asked.header)
        total, opened = self.secrets.open(chunks, layout, asked)
        layout.check_own(opened, self._own_marks(header), header.place(self.party.id))
        step = schedule.PlannedRound(header.purpose, header.training_round)
        allow = bool(
            wire_settings(self.offer.settings).get("protect", {}).get("single_site_features")
        )
        led_to = self.state.after(
            self.plan, step, opened, asked.survivors, self.columns, allow_few_sites=allow
        )
        mac = self.secrets.state_mac(header, led_to.canonical())
        found = site.SumOpened(self.secrets.sum_mac(header, total), mac)
        needed = _key(_certifying(header, asked.survivors, found.sum_mac, found.state_mac))
        self._sums = needed, step, dict(opened.wides), len(asked.survivors)
        return found, needed, self._kept_candidate(needed, led_to)

    def _own_marks(self, header: RoundHeader) -> dict[str, int]:
        """What this site's vector of the round has in its own places, also after a restart."""
        of, marks = self._marks
        if of != header.digest:
            kept = json.loads(self.party.journal.get(self.id, "marks") or b"{}")
            of, marks = bytes.fromhex(kept.get("header", "")), kept.get("marks", {})
        if of != header.digest:
            raise ReleaseRefused(
                "sum", found="no record of this site's own marks", expected="those it was sent with",
                fault=THIS_SITE,
            )  # fmt: skip
        return marks

    # --------------------------------------------------------------------------------- states

    def _kept_candidate(self, certificate: str, state: JobState) -> _Candidate:
        """A large state goes to disk now; a small one into the journal, with what relies on it."""
        data = state.to_bytes()
        if len(data) <= INLINE:
            return _Candidate(state, data)
        self._write_state(self._candidate_path(certificate), data)
        return _Candidate(state, b"")

    def _candidate(self, certificate: messages.Certificate) -> _Candidate:
        """The state that this very certificate makes the state: held, or left by an earlier process."""
        name = _key(certificate)
        if name not in self._candidates:
            kept = self.party.journal.get(self.id, "candidate")
            of, data = ("", b"") if kept is None else decode(kept, tuple)
            if of != name or not data:
                data = self._candidate_path(name).read_bytes()
                self._candidates[name] = _Candidate(JobState.from_bytes(data), b"")
            else:
                self._candidates[name] = _Candidate(JobState.from_bytes(data), data)
        return self._candidates[name]

    async def _prove(self, found: Sequence[Any]) -> None:
        """Before a state is applied, its HMAC is computed anew (PROTOCOL V). Raises ReleaseRefused."""
        for effect in found:
            if isinstance(effect, effects.Apply):
                assert self.plan is not None
                state = self._candidate(effect.certificate).state
                if self.plan.parameters > _MANY:
                    await asyncio.to_thread(self._check_state, effect.certificate, state)
                else:
                    self._check_state(effect.certificate, state)

    def _check_state(self, certificate: messages.Certificate, state: JobState) -> None:
        """The state is the one that the certificate is of, under the G of its own key epoch."""
        group = self._groups.get(str(certificate.header.epoch))
        mac = b""
        if group is not None and self.secrets is not None:
            secrets = replace(self.secrets, group=_group_of(bytes.fromhex(group)))
            mac = secrets.state_mac(certificate.header, state.canonical())
        _require_certified(mac, certificate)

    def _write_state(self, path: Path, data: bytes) -> None:
        write_atomic(path, data)
        sync_folder(path.parent)

    def _show_state(self, data: bytes) -> None:
        """The file of a state that the journal has: for people, and without a sync."""
        path = self._state_path("current")
        beside = path.with_name(f".{path.name}.part")
        beside.write_bytes(data)
        beside.replace(path)

    def _apply(self, certificate: messages.Certificate) -> None:
        found = self._candidate(certificate)
        path = self._candidate_path(_key(certificate))
        if found.data:
            self._show_state(found.data)
        else:
            path.replace(self._state_path("current"))
            sync_folder(path.parent)
        for left in path.parent.glob("candidate-*"):
            left.unlink()
        self._candidates = {}
        self.state = found.state
        sums, self._sums = self._sums, None
        tracked = sums is not None and sums[1].purpose in {"update", "metrics"}
        if tracked and sums is not None and sums[0] == _key(certificate):
            self._tracking = [task for task in self._tracking if not task.done()]
            work = self._track(*sums[1:], self.state, certificate)
            self._tracking.append(self._aside(work))

    async def _track(
        self,
        step: schedule.PlannedRound,
        sums: Mapping[str, Sequence[int]],
        sites: int,
        state: JobState,
        certificate: messages.Certificate,
    ) -> None:
        """Write down what the release is worth here. No round waits for it, and nothing of it leaves but,
        under a plan that makes them public, the metrics over all sites of this certified release."""
        assert self.plan is not None
        try:
            row = await self.contributor.track(self.id, self.plan, step, state, sums, sites)
        except TrainingFailed as failed:
            LOG.warning("job %s: accuracy not tracked: %s", self.id, failed.reason)
            return
        if row is not None:
            self.tracked = row
            folder = self.party.folder / "jobs" / self.id
            await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True, mode=0o700)
            append_row(folder, row)
            if self.plan.public_metrics:
                self._raise(self.party.policy.on_release("metrics"))
                values = row["everywhere_before"]
                self._told = public_metrics.told(self.plan, certificate, self.party.id, values)
                self.link.say(self.id, self._told)

    # ----------------------------------------------------------------------------- catching up

    async def _seal(self, wanted: job.CheckpointWanted) -> None:
        """Seal this site's state for those that missed its release."""
        standing: SiteProgress = self.stage.standing
        kept = self.party.journal.get(self.id, "certificate")
        if kept is None or self.secrets is None or self.state is None:
            return
        certificate = decode(kept, messages.Certificate)
        if certificate.hash != wanted.certificate or standing.certificate != wanted.certificate:
            return
        group = self._groups.get(str(certificate.header.epoch))
        if group is None:
            return
        data = bytes.fromhex(group) + self.state.to_bytes()
        sealed = self.secrets.seal_state(data, certificate, OsEntropy())
        name = f"checkpoint-{certificate.header.round}"
        stored = await asyncio.to_thread(self.party.spool.put, self.id, name, _pieces(sealed))
        with contextlib.suppress(Offline, FileNotFoundError):  # the job may end meanwhile
            digest = certificate.header.digest
            await self.link.upload(self.id, digest, stored.digest, stored.path)
            self.link.say(
                self.id,
                job.CheckpointSealed(
                    self.id, self.party.id, certificate.hash, stored.digest, stored.size
                ),
            )
        self.party.spool.remove(self.id, name)

    async def _catch_up(self, offered: job.CheckpointOffer) -> None:
        """Take the state of a release this site missed, if its certificate bears it out."""
        certificate = offered.certificate
        if self._catching == certificate.hash:
            return
        self._catching = certificate.hash

        def wanted() -> bool:
            return self._catching == certificate.hash and self._missed(certificate)

        try:
            assert self._member is not None
            # Nothing is fetched, and nothing held, for a certificate that proves no release.
            site.check_missed(self._member, self.stage.standing, certificate)
            chunks = await self._fetch("checkpoint", offered.digest, wanted)
            assert self.secrets is not None
            data = self.secrets.open_state(b"".join(chunks), certificate)
            # The certificate may be of an earlier key epoch: its G comes with the state, and nobody can
            # find another G and another state that give the certified HMAC.
            group = _group_of(data[:GROUP_SECRET_BYTES])
            state = JobState.from_bytes(data[GROUP_SECRET_BYTES:])
            secrets = replace(self.secrets, group=group)
            mac = secrets.state_mac(certificate.header, state.canonical())
            _require_certified(mac, certificate)
            self._candidates[_key(certificate)] = self._kept_candidate(_key(certificate), state)
            self._groups.setdefault(str(certificate.header.epoch), group.to_bytes().hex())
            self.party.journal.put(self.id, "groups", canonical(self._groups))
        except Offline:
            return
        except (PeerRefused, BadInput) as error:
            self._note(error)
            return
        finally:
            if self._catching == certificate.hash:
                self._catching = ""
        self._queue.put_nowait(_Done(site.CaughtUp(certificate, mac)))

    # --------------------------------------------------------------------- a model that is given

    def _may_give(self) -> bool:
        """Whether plan and policy give the coordinator the model that this site has now.

        Raises HeaderRefused (fault: coordinator) where the plan gives it none, or not this one, and
        PolicyRefused where the operator does not.
        """
        assert self.plan is not None
        if (refusal := self.party.policy.on_release("model")) is not None:
            raise refusal
        if self.plan.release != "coordinator":
            raise HeaderRefused(
                "model", found="it asked for", expected="nothing: it stays at the sites",
                fault=messages.COORDINATOR,
            )  # fmt: skip
        done = self.state.done if self.state is not None else None
        if done is None or self.ended is not None or not isinstance(self.stage, site.Idle):
            return False
        if not schedule.is_last_model(self.plan, done):
            raise HeaderRefused(
                "model", found="it asked for before the last round", expected="it after that",
                fault=messages.COORDINATOR,
            )  # fmt: skip
        return True

    async def _give_model(self, wanted: job.ModelWanted) -> None:
        """Say which file the last release leads to, or upload it (PROTOCOL R).

        The state here is that of a release with its certificate: nothing else becomes the state.
        """
        if self.plan is None or not self._may_give():
            return
        standing: SiteProgress = self.stage.standing
        if standing.certificate != wanted.certificate:
            return  # it is asked again once both stand at the same release
        try:
            stored = await self._model_file(wanted.certificate)
        except TrainingFailed as failed:
            LOG.warning("job %s: the model could not be given: %s", self.id, failed.reason)
            return
        if wanted.digest != stored.digest:
            made = job.ModelMade(self.id, self.party.id, wanted.certificate, stored.digest)
            self.link.say(self.id, made)
            return
        with contextlib.suppress(Offline, FileNotFoundError):  # the job may end meanwhile
            header = job.model_upload(wanted.certificate)
            await self.link.upload(self.id, header, stored.digest, stored.path)

    async def _model_file(self, certificate: str) -> Stored:
        """The file of the model here, made once. Raises TrainingFailed."""
        async with self._exporting:
            if self._exported is None or self._exported[0] != certificate:
                assert self.state is not None
                await self._load_again()
                data = await self.contributor.export(self.id, self.state)
                stored = await asyncio.to_thread(
                    self.party.spool.put, self.id, "model", _pieces(data)
                )
                self._exported = certificate, stored
            return self._exported[1]

    async def _end(self, ended: job.JobEnded) -> None:
        """No further round: the state stays, everything of the rounds goes.

        A site that missed the last release says where it stands and catches up first.
        """
        self._ending = None
        if isinstance(self.stage, site.IN_ROUND):
            await self._machine(site.Superseded())
        behind = self.plan is not None and self.stage.standing.certificate != ended.certificate
        behind = behind and not self.left  # it takes no model that it left the job for
        if ended.certificate and behind:
            self._ending = ended
            self._rest()
            return
        self._stop_making()
        if self.state is not None:  # synced: no process may look after this job again
            self._write_state(self._state_path("current"), self.state.to_bytes())
        self._ended_at = self.party.now()
        kept = {"ended": encode(ended), "ended_at": str(int(self._ended_at)).encode()}
        self.party.journal.append(self.id, ROUND, (), put=kept)
        self.ended = ended
        self.party.spool.drop(self.id)
        if self._tracking:
            _, late = await asyncio.wait(self._tracking, timeout=self.party.patience)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self.contributor.forget(self.id)
        self.link.doing(self.id, "idle")
        LOG.info("job %s: %s %s", self.id, ended.outcome, ended.text)
        self.erase_keys()

    @property
    def holds_keys(self) -> bool:
        """Whether this site can still pass the key epoch's secret on."""
        return isinstance(self.epoch, epoch.Holding)

    def erase_keys(self) -> None:
        """Remove the secrets of the key epochs of a job that ended for longer than the site's grace.

        For good: no file has them afterwards (PROTOCOL V). Before that it does nothing.
        """
        if self.ended is None or self.party.now() < self._ended_at + self.party.keep_keys:
            return
        if not {"epoch", "groups"} & set(self.party.journal.keys(self.id)):
            return
        self.party.journal.forget(self.id, "epoch", "groups")
        self.epoch, self.secrets, self._groups = epoch.NoKey(self.epoch.epoch), None, {}
        LOG.info("job %s: its keys are erased here", self.id)


def _group_of(data: bytes) -> GroupSecret:
    return GroupSecret.from_bytes(data, sender="checkpoint")


def _gives_way(stage: Any) -> bool:
    """Whether a later announcement ends the round at this stage: not once its sum may be known."""
    return site.waits(stage)


def _key(certificate: messages.Certificate) -> str:
    """What a state is held under until it is certified: no other certificate can make it the state."""
    return certificate.hash


def _require_certified(mac: bytes, certificate: messages.Certificate) -> None:
    if mac != certificate.state_mac:
        raise ReleaseRefused(
            "state", found="one of another HMAC", expected="the certified one",
            fault=messages.COORDINATOR,
        )  # fmt: skip


def _certifying(
    header: RoundHeader, survivors: tuple[SiteId, ...], sum_mac: bytes, state_mac: bytes
) -> messages.Certificate:
    """The certificate that would prove this release, without its signatures: they are not in its hash."""
    return messages.Certificate(header, survivors, sum_mac, state_mac, ())


def _pieces(data: bytes, size: int = 1 << 20) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)] or [b""]
