"""The site's process: its journal and spool, its jobs, its training process and its session.

Invariant: the training process is started before grpc; a job begins only if the policy of this site allows it
(`policy.py`); on SIGTERM the coordinator is told, and the process ends within ten seconds.
"""

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import signal
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from fedcore_clients.config import JOURNAL_FILE, SiteConfig
from fedcore_clients.context import Contributor, SiteContext
from fedcore_clients.control import CONTROL_FILE, LOCK_FILE, ControlFile
from fedcore_clients.health import ADDRESS, health
from fedcore_clients.hours import when
from fedcore_clients.job_gate import JobGate
from fedcore_clients.job_policy import ROSTER
from fedcore_clients.job_runner import JobRunner
from fedcore_clients.ledger import LEDGER_FILE, Ledger
from fedcore_clients.next_key import finish as finish_new_key
from fedcore_clients.offers import APPROVALS, offer_digest
from fedcore_clients.policy import SITE_FILE, SitePolicy
from fedcore_clients.policy_file import PolicyFile
from fedcore_clients.rate import Pace
from fedcore_clients.receipts import Receipts
from fedcore_clients.renewal import Renewal
from fedcore_clients.rosters import (
    APPROVED,
    APPROVED_FILE,
    NEWEST_FILE,
    ROSTERS_FOLDER,
    WAITING,
    SiteRosters,
    approved_roster,
)  # fmt: skip
from fedcore_clients.sandbox import choose, logged
from fedcore_clients.second_process import SecondProcesses
from fedcore_clients.session import ForJobs, Session
from fedcore_clients.state_files import require_sealed
from fedcore_clients.trainer import Loaded, Training

from fedcore.audit import noted
from fedcore.audit.keys import SiteSigner
from fedcore.audit.lines import Fact
from fedcore.audit.trail import OWN_FILES as AUDIT_FILES
from fedcore.audit.trail import AuditTrail
from fedcore.cli.console import ago
from fedcore.errors import BadInput, MalformedMessage, Refused, StoreProblem, UnknownName
from fedcore.files import write_atomic, write_json
from fedcore.files.disk import close_to_others
from fedcore.identity.kit import Kit
from fedcore.identity.peer import check_name, require_role
from fedcore.identity.roster import ROSTER_KEY, PinnedRoster, RosterFile
from fedcore.results import JobWait
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.plan import canonical
from fedcore.secagg.protocol import job_messages as job
from fedcore.secagg.protocol import messages, schedule
from fedcore.secagg.protocol.job.site.rounds import header_of
from fedcore.secagg.protocol.wire_form import encode, type_name
from fedcore.store.journal import Journal
from fedcore.store.spool import Spool
from fedcore.types import Json, SiteId
from fedcore.wire.frames import (
    SOFTWARE,
    Held,
    Hello,
    JobRoster,
    Record,
    Roster,
    RosterSeen,
    SecondProcess,
    SmallDownload,
    Task,
    TrailReceipt,
    Waiting,
)  # fmt: skip
from fedcore.wire.records import TO_SITE, unpack_record

LOG = logging.getLogger("fedcore.site")

STATUS_FILE, RECIPE_FILE = "status.json", "job.json"

OWN_FILES = (
    "journal.sqlite*", "spool", "states", "jobs", APPROVALS, LEDGER_FILE, STATUS_FILE, AUDIT_FILES,
    CONTROL_FILE, LOCK_FILE, noted.COMMANDS_FILE, NEWEST_FILE, APPROVED_FILE, ROSTERS_FOLDER,
)  # fmt: skip
"""What this process keeps in its folder, for its user alone."""

ERASE_SECONDS = 60.0
"""How often keys of ended jobs are erased, once they were kept for long enough."""

OPERATOR_SECONDS = 0.25
"""How often the files that an operator changes are looked at: one stat each."""

CLOCKS_APART = 60.0
"""Seconds of difference between two clocks above which a warning is logged."""


class InstalledTasks(Training):
    """The training process, asked by the names of the operator's list of tasks."""

    def __init__(
        self,
        config: SiteConfig,
        identity: IdentityKey,
        policy: SitePolicy,
        command: Sequence[str] | None = None,
    ) -> None:
        super().__init__(command)
        self._policy = policy
        self._config = config
        self._split = config.split.of(identity)

    def limits(self) -> Json:
        """Those of the policy, as it is now."""
        rules = self._policy.rules
        found = {"threads": rules.cpu_threads, "memory_mb": rules.memory_mb}
        return found if any(value is not None for value in found.values()) else {}

    async def load(self, job: str, settings: Json, task: str, digest: str) -> Loaded:
        """Load a job's task, which the policy has allowed by name and hash. Raises TrainingFailed."""
        allowed = self._config.tasks[task]
        return await self.load_task(
            job, task=allowed.task, base=str(self._config.base), digest=digest, settings=settings,
            site=self._config.site, source=allowed.source, split=self._split,
        )  # fmt: skip


def waiting_json(found: Waiting | None) -> Json | None:
    """For `fedcore.cli.console.waiting_text`; None where the job waits for no site."""
    if found is None or not found.sites:
        return None
    return JobWait(
        sites=dict.fromkeys(each.site for each in found.sites), of=found.of,
        until=found.until_ms / 1000 if found.until_ms else None, then=found.then, least=found.least,
        in_round=found.in_round,
    ).to_json()  # fmt: skip


class Site:
    """All jobs of one site process."""

    def __init__(
        self, config: SiteConfig, kit: Kit, context: SiteContext, contributor: Contributor
    ) -> None:
        self.config, self.context, self.contributor = config, context, contributor
        self.jobs: dict[str, JobRunner] = {}
        self.waits: dict[str, Waiting] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self.policy_file = PolicyFile(context.policy, config.policy_file)
        self.rosters = SiteRosters(config, kit, context.rosters, context.policy, context.audit)
        self.control = ControlFile(context.folder)
        self.second = SecondProcesses(self._note)
        self.away_text = ""
        """Why this site takes part in nothing now, for its operator."""
        self.pace = Pace(lambda: context.policy.rules)
        self.session = Session(
            kit,
            config,
            self._hello,
            self._on_frame,
            self._on_connected,
            JobGate(self.jobs),
            self._refused,
            self.pace,
        )
        self.receipts = Receipts(
            context.audit, context.folder, kit, self.session.ask_receipt, context.clock
        )

    def restore(self) -> None:
        """The jobs of the journal."""
        kept = self.context.journal.get("site", "jobs")
        for name in json.loads(kept) if kept else []:
            self._begin(JobRunner.stored(self.context, self.session, self.contributor, name))

    def _begin(self, found: JobRunner) -> None:
        self.jobs[found.id] = found
        write_recipe(self.context.folder, found.offer, tuple(found.roster.sites))
        if found.job.ended is None or found.job.holds_keys:
            self._running[found.id] = asyncio.get_running_loop().create_task(found.run())

    def _hello(self) -> Hello:
        held = []
        for found in self.jobs.values():
            standing = found.job.stage.standing
            held.append(Held(found.id, standing.certificate, standing.epoch, standing.round))
        return hello_of(self.config, self.context.rosters.current, held)

    def _on_connected(self) -> None:
        welcome = self.session.welcome
        if welcome is not None:
            apart = welcome.time_ms / 1000 - time.time()
            if abs(apart) > CLOCKS_APART:
                LOG.warning(
                    "the coordinator's clock and this one differ by %s: certificates and times "
                    "in logs go by clocks", ago(abs(apart)),
                )  # fmt: skip
            where, software = self.session.coordinator, welcome.software
            self._note("connect", to=where, software=software)
        self.receipts.ask()
        for found in self.jobs.values():
            found.connected()

    def _on_frame(self, frame: ForJobs) -> None:
        match frame:
            case Roster(document):
                self.session.roster_seen(self.rosters.take(document))
            case JobRoster():
                self.rosters.name(frame)
            case TrailReceipt():
                self.receipts.take(frame)
            case SecondProcess():
                self.second.take(frame)
            case Record():
                message = unpack_record(frame, TO_SITE, sender="coordinator")
                if isinstance(message, job.JobOffer):
                    self._offered(message)
                found = self.jobs.get(frame.job)
                if isinstance(message, messages.Announce) and self._declines(found):
                    return
                if found is None and frame.job in self.rosters.held:
                    if isinstance(
                        message, job.JobEnded
                    ):  # anything else is sent again after the survey
                        del self.rosters.held[frame.job]
                elif found is None:
                    LOG.warning("dropped a message of the unknown job %s", frame.job)
                else:
                    found.tell(message)
            case Waiting():
                self.waits[frame.job] = frame
            case SmallDownload(start, data):
                if start.job in self.jobs:
                    self.jobs[start.job].inline(start.digest, data)

    def _declines(self, found: JobRunner | None) -> bool:
        """Whether no new round is joined, outside the hours: the session ends at once, which says so."""
        closed = self.context.policy.closed_until(datetime.now(UTC)) is not None
        return closed and not (found is not None and found.job.in_round)

    def _offered(self, offer: job.JobOffer) -> None:
        """Keep the offer of a new job, also of one that is refused."""
        known = self.jobs.get(offer.job)
        if known is not None:
            if known.offer != offer:
                raise MalformedMessage(
                    "job", found="another offer under a known id", expected="the same",
                    fault="coordinator",
                )  # fmt: skip
            return
        try:
            check_name("job", offer.job)  # it names folders
        except BadInput as error:
            raise MalformedMessage(
                "job", found="an id that is no plain name", expected="one", fault="coordinator"
            ) from error
        word = self.rosters.word_on(offer)
        if word == APPROVED:
            self._accept(offer)
        else:
            self.session.roster_seen(RosterSeen(self.context.rosters.current.number, word))
            if word != WAITING:
                away = job.SiteUnavailable(offer.job, self.context.id, ROSTER)
                self.session.say(offer.job, away)

    def _accept(self, offer: job.JobOffer) -> None:
        """Keep a new job with the roster in force, and begin it."""
        journal = self.context.journal
        roster = self.context.rosters.current
        journal.put(offer.job, ROSTER_KEY, roster.to_bytes())
        journal.put(offer.job, "offer", encode(offer))
        journal.put("site", "jobs", json.dumps([*self.jobs, offer.job]).encode())
        self.context.audit.record(
            "decision", job=offer.job, on="offer", word="kept", task=offer.task,
            task_sha256=offer.task_digest, offer=offer_digest(offer),
        )  # fmt: skip
        LOG.info("job %s: task %s", offer.job, offer.task)
        self._begin(JobRunner(self.context, self.session, self.contributor, offer, roster))

    def status(self, *, running: bool = True) -> Json:
        """What `fed-site status` shows."""
        link = self.session
        rows = []
        for found in self.jobs.values():
            job, part, about = found.job, found.job.part, found.work.about
            header, state = header_of(job.stage), job.state
            done = state.done if state is not None else None
            word = job.parts.public if job.parts else None
            rows.append(
                {
                    "job": found.id, "task": found.offer.task, "offer": offer_digest(found.offer),
                    "protection": about.protection, "label": about.label,
                    "leaves": about.leaves, "approval": part.approval,
                    "rounds": json.loads(found.offer.settings)["round"]["rounds"],
                    "stage": "over" if job.ended else type_name(type(job.stage)).lower(),
                    "round": header.training_round if header is not None else None,
                    "waiting": waiting_json(self.waits.get(found.id)) if link.since else None,
                    "tracked": word.tracked.to_json() if word and word.tracked else None,
                    "last_error": part.last_error,
                    "refused": str(part.refused) if part.refused is not None else None,
                    "left": part.left or None,
                    "outcome": job.ended.outcome if job.ended else None,
                    "model_sha256": state.model_sha256 if state is not None and done else None,
                    "model_round": schedule.released_round(done) if done else None,
                }
            )  # fmt: skip
        return {
            "site": self.context.id, "coordinator": link.coordinator, "connected_since": link.since,
            "last_error": link.last_error, "jobs": rows, "written": time.time(),
            "roster": self.rosters.to_json(),
            "running": running, "process": os.getpid(), "policy_problem": self.policy_file.problem,
            "rate": self.pace.text,
            "away": self.away_text, "second": self.second.text, "control_problem": self.control.problem,
        }  # fmt: skip

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set. Raises Refused where the coordinator does not admit this site."""
        await self._obey()
        self.restore()
        loop = asyncio.get_running_loop()
        session = loop.create_task(self.session.run())
        status = loop.create_task(self._keep_status())
        keys = loop.create_task(self._erase_old_keys())
        operator = loop.create_task(self._follow_operator())
        renewal = loop.create_task(
            Renewal(self.session.kit, self.session, self._in_round, self._note).run()
        )
        waiting = loop.create_task(stop.wait())
        try:
            await asyncio.wait({session, waiting}, return_when=asyncio.FIRST_COMPLETED)
            if session.done():
                session.result()
                refused = self.session.refused
                assert refused is not None
                self._refused(refused.code, refused.text)
                raise Refused(
                    f"coordinator: found this site refused ({refused.code}: {refused.text}), "
                    "expected it welcome",
                    remedy=_REMEDIES.get(refused.code, ""),
                )
            self.receipts.ask()
            await self.session.goodbye("the site stops")
        finally:
            tasks = [session, status, keys, operator, renewal, waiting, *self._running.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for found in self.jobs.values():
                await found.close()
            self._write_status(running=False)

    async def _erase_old_keys(self) -> None:
        """Erase the key epochs' secrets of jobs that ended long enough ago, now and from time to time."""
        while True:
            for found in list(self.jobs.values()):
                try:
                    found.erase_keys()
                except StoreProblem as error:  # tried again
                    LOG.warning("%s", error)
            await asyncio.sleep(ERASE_SECONDS)

    async def _follow_operator(self) -> None:
        """Read what the operator changes on the disk, and act on it."""
        while True:
            await self._obey()
            self._follow_rosters()
            await asyncio.sleep(OPERATOR_SECONDS)

    def _follow_rosters(self) -> None:
        """Act on a roster that the operator approved or placed; retried where the disk refuses."""
        try:
            if self.rosters.refresh():
                self.session.roster_seen(self.rosters.answer())
                for offer in self.rosters.released():
                    self._accept(offer)
        except (StoreProblem, OSError) as error:
            LOG.warning("roster: %s", error)

    def _take_commands(self) -> None:
        """Record what the operator commanded; where the disk refuses it, at a later look."""
        try:
            noted.take_notes(self.context.folder, self.context.audit.record)
        except (StoreProblem, BadInput, OSError) as error:
            LOG.warning("commands of the operator: not recorded: %s", error)

    async def _obey(self) -> None:
        self._take_commands()
        policy, changed = self.context.policy, self.policy_file.refresh()
        if changed:
            self._note("policy", word="read again", **policy_facts(self.config))
        if self.control.refresh():
            policy.vetoed, changed = self.control.now.vetoed, True
            said = self.control.now
            self._note("policy", word=said.away or "takes part", vetoed=tuple(sorted(said.vetoed)))
            if self.control.problem:
                LOG.error("%s; this site pauses", self.control.problem)
        if changed:
            for found in self.jobs.values():
                found.policy_changed()
        word, text = self._away()
        if text != self.away_text:
            self.away_text = text
            LOG.warning("%s", text or "this site takes part again")
        if word:
            await self.session.go_away(word)
        else:
            self.session.come_back()

    def _away(self) -> tuple[str, str]:
        """Why there is to be no session, for the coordinator and in words; ("", "") where there is to be one."""
        said = self.control.now
        if said.away:
            return said.away, said.text
        until = self.context.policy.closed_until(datetime.now(UTC))
        if until is None:
            return "", ""
        text = f"outside the hours of this site's policy: no new round before {when(until)}"
        return "" if self._in_round() else "hours", text  # a round is finished first

    def _in_round(self) -> bool:
        return any(found.job.in_round for found in self.jobs.values())

    def _refused(self, word: str, text: str) -> None:
        """Record that there is no session because one end does not accept the other, and why."""
        self._note("refused", what="this site's session", word=word, text=text)

    def _note(self, event: str, **facts: Fact) -> None:
        """Record what no message relies on; where the disk refuses it, the log has it."""
        try:
            self.context.audit.record(event, **facts)
        except StoreProblem as error:
            LOG.warning("%s: not recorded: %s", event, error)

    async def _keep_status(self) -> None:
        while True:
            self._write_status()
            self.receipts.tick()
            await asyncio.sleep(1.0)

    def _write_status(self, *, running: bool = True) -> None:
        with contextlib.suppress(OSError):
            # The next start writes it again: a flush every second would wait in the middle of rounds.
            where = self.context.folder / STATUS_FILE
            write_atomic(where, canonical(self.status(running=running)) + b"\n", flush=False)


_REMEDIES = {
    "cloned": "stop one; if the other is not yours, have the operator revoke this site, and join again with new keys",
    "replaced": "another process runs as this site, and this one did not answer in time: stop one of them",
    "version": "install the Fedcore of the coordinator here, or have it brought up to this one",
    "roster": "this site was removed from it, or both need the same roster.toml: compare it with the coordinator's",
    "revoked": "ask the operator why; a new certificate has a new serial number",
    "expired": "take a new one (fed-coordinator renew SITE --answer FILE) with fed-site join --answer FILE",
    "evicted": "ask the operator why; `fed-coordinator evict SITE --undo` lets it in again",
}


@dataclass(frozen=True)
class Papers:
    """A site's identity, from its files."""

    kit: Kit
    roster: PinnedRoster
    identity: IdentityKey


def read_papers(config: SiteConfig) -> Papers:
    """Certificate, roster and identity key, each checked against the others. Raises FedcoreError."""
    kit = config.read_kit()
    require_role(kit.peer, ["site"])
    if kit.peer.name != config.site:
        raise BadInput(
            f"kit: found a certificate of site {kit.peer.name!r}, expected one of {config.site!r}",
            remedy="name this site in `site`, or its own kit in `kit`, of site.toml",
        )
    kit.check("site", datetime.now(UTC))
    roster = approved_roster(config, kit)
    pins = roster.sites
    if SiteId(config.site) not in pins:
        raise BadInput(
            f"roster: found {', '.join(pins)}, expected this site {config.site!r} among them",
            remedy=f"ask the operator for a roster.toml with {config.site!r} in it",
        )
    identity = config.read_identity()
    if pins[SiteId(config.site)] != identity.public:
        raise BadInput(
            f"identity: found another key than roster.toml pins for {config.site!r}",
            remedy="the roster must hold the public half of this site's identity key",
        )
    return Papers(kit, roster, identity)


def hello_of(config: SiteConfig, roster: PinnedRoster, held: Sequence[Held] = ()) -> Hello:
    """The first message of a session."""
    tasks = tuple(Task(name, task.sha256) for name, task in config.tasks.items())
    return Hello(roster.digest, tasks, tuple(held[-64:]))


def job_folder(folder: Path, name: str) -> Path:
    """Where a site keeps the state of a job."""
    return folder / "states" / name


def require_job(name: str, known: Collection[str], remedy: str) -> None:
    """Raise BadInput where this site has no jobs at all, UnknownName where it does not have this one."""
    if not known:
        raise BadInput(f"job: found {name!r}, and no job at this site yet", remedy=remedy)
    if name not in known:
        raise UnknownName("job", name, known)


def write_recipe(folder: Path, offer: job.JobOffer, sites: Sequence[SiteId]) -> None:
    """Write what `fed-site model` and `explain` need: they cannot open the running process's journal."""
    path = job_folder(folder, offer.job) / RECIPE_FILE
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(
            path,
            {
                "job": offer.job, "task": offer.task, "task_sha256": offer.task_digest,
                "settings": json.loads(offer.settings), "sites": sites,
            },
        )  # fmt: skip


def policy_of(config: SiteConfig, papers: Papers) -> SitePolicy:
    """The policy as the files have it. Raises BadInput."""
    name = config.policy_file.name if config.policy_file else SITE_FILE
    return SitePolicy(config.policy, len(papers.roster.sites), config.hashes, name)


def audit_facts(config: SiteConfig, papers: Papers) -> dict[str, Fact]:
    """What the first line of every start states: who, under which certificate, with which files."""
    return {
        "party": config.party, "federation": papers.kit.peer.federation,
        "certificate": papers.kit.peer.fingerprint, "software": SOFTWARE,
        "roster": papers.roster.digest, "sites": tuple(papers.roster.sites),
        **policy_facts(config),
    }  # fmt: skip


def policy_facts(config: SiteConfig) -> dict[str, Fact]:
    """SHA-256 of the files that the policy is in."""
    files = {"config": config.file, "policy": config.policy_file}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in files.items() if path is not None
    }  # fmt: skip


@contextlib.contextmanager
def opened(config: SiteConfig, papers: Papers) -> Iterator[SiteContext]:
    """The site with its journal and ledger, open while inside. Raises StoreProblem."""
    kit = papers.kit
    rosters = RosterFile(papers.roster, config.roster, kit.authority_pem, kit.peer.federation)
    rosters.known()
    sealer = config.file_sealer()
    require_sealed(config.folder, sealer)
    with (
        Journal.open(
            config.folder / JOURNAL_FILE, party=config.party, sealer=config.row_sealer()
        ) as journal,
        Ledger.open(config.folder, papers.identity, config.ledger_sealer()) as ledger,
        AuditTrail.open(
            config.folder, SiteSigner(papers.identity), audit_facts(config, papers)
        ) as audit,
    ):
        yield SiteContext(
            papers.kit.peer.federation, SiteId(config.site), papers.identity, rosters, journal,
            Spool(config.folder / "spool", config.spool_bytes), config.folder,
            policy_of(config, papers), ledger, audit,
            config.patience_seconds, config.keep_secrets_days * 86_400.0, sealer=sealer,
        )  # fmt: skip


def run(config: SiteConfig, show: Callable[[str], None], health_port: int | None = None) -> None:
    """Run until SIGTERM or SIGINT. show: prints a line; health_port: of /healthz and /readyz. Raises FedcoreError."""
    finish_new_key(config.kit)
    papers = read_papers(config)
    close_to_others(config.folder, OWN_FILES)
    with opened(config, papers) as context:
        asyncio.run(_run(config, papers.kit, context, show, health_port))


async def _run(
    config: SiteConfig,
    kit: Kit,
    context: SiteContext,
    show: Callable[[str], None],
    health_port: int | None,
) -> None:
    stop = asyncio.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(each, stop.set)
    training = InstalledTasks(
        config, context.identity, context.policy, logged(choose(config)).command
    )
    await training.start()
    try:
        site = Site(config, kit, context, training)
        async with contextlib.AsyncExitStack() as stack:
            if health_port is not None:
                port = await stack.enter_async_context(
                    health(health_port, lambda: site.session.since is not None)
                )
                LOG.info("health on http://%s:%d/healthz and /readyz", ADDRESS, port)
            show(f"site {config.site}: coordinator {config.coordinator}")
            await site.run(stop)
    finally:
        await training.close()
