"""The calls of operators: submit, jobs, watch, stop, evict, result."""

import asyncio
import contextlib
import hashlib
import json
import logging
import secrets
from collections.abc import AsyncIterator, Iterable

from fedcore_server.config import LimitsSection
from fedcore_server.coordinator import Coordinator
from fedcore_server.job_runner import JobRunner
from fedcore_server.sessions import EVICTED

from fedcore.audit.lines import Fact
from fedcore.config import build_job
from fedcore.config.unsupported import refuse_unsupported
from fedcore.errors import BadInput, PlanRefused, UnknownName
from fedcore.files import RESULT_FILE, write_json
from fedcore.identity.peer import Peer, check_name
from fedcore.identity.roster import ROSTER_KEY
from fedcore.results.json_record import JsonRecord
from fedcore.secagg.label import Terms
from fedcore.secagg.plan import canonical
from fedcore.secagg.protections import refuse_plain
from fedcore.secagg.protocol import job_messages
from fedcore.secagg.protocol.wire_form import encode
from fedcore.types import Json, SiteId
from fedcore.wire import calls, chunks, frames
from fedcore.wire.limits import KIB, MAX_JSON

LOG = logging.getLogger("fedcore.coordinator")

ROWS_AT_ONCE, ROWS_BYTES = 20, 256 * KIB
"""Rounds in one event of `watch`, and their bytes: a row has the names of all sites, and a frame has a limit."""

REST_BYTES = KIB
"""Of an answer to `jobs`, what is neither a job nor a site."""


class OperatorsApi:
    """The operators' calls to one coordinator."""

    def __init__(self, hub: Coordinator) -> None:
        self._hub = hub

    async def submit(self, peer: Peer, asked: frames.SubmitRequest) -> frames.SubmitReply:
        """Queue a job. Raises BadInput, and PlanRefused beyond the quota."""
        hub, context = self._hub, self._hub.context
        hub.refresh_roster()
        about = frames.json_value(asked.about, sender=peer.name)
        settings = about.get("settings")
        if not isinstance(settings, dict):
            raise BadInput("submit: found no settings, expected those of the job file, complete")
        check_name("task", asked.task)  # it names folders, here and at the sites
        check_settings(settings, len(context.rosters), context.quota)
        self._check_room(peer.name)
        name = f"{asked.task[:48].strip()}-{secrets.token_hex(4)}"
        offer = job_messages.JobOffer(name, asked.task, asked.task_sha256, canonical(settings))
        found = JobRunner(context, hub.sessions, offer, peer.name)
        self._record(
            "submit", peer, job=name, task=asked.task, task_sha256=asked.task_sha256,
            settings=hashlib.sha256(offer.settings).hexdigest(), roster=found.roster.digest,
        )  # fmt: skip
        found.disk.keep_job_file(asked.toml)
        context.journal.put(name, "submitter", peer.name.encode())
        context.journal.put(name, ROSTER_KEY, found.roster.to_bytes())
        context.journal.put(name, "offer", encode(offer))
        hub.adopt(found)
        context.journal.put("coordinator", "jobs", json.dumps([*hub.jobs]).encode())
        LOG.info("job %s: submitted by %s", name, peer.name)
        hub.changed()
        return frames.SubmitReply(name)

    def _record(self, call: str, peer: Peer, **facts: Fact) -> None:
        """Record a call before what it does. Raises StoreProblem."""
        who: dict[str, Fact] = {"operator": peer.name, "certificate": peer.fingerprint}
        self._hub.context.audit.record("operator", call=call, **who, **facts)

    def _check_room(self, operator: str) -> None:
        """Raise PlanRefused where the quota of queued jobs, or of this operator's jobs, is used up."""
        quota, jobs = self._hub.context.quota, self._hub.jobs.values()
        queued = sum(found.facts.outcome is None for found in jobs)
        kept = sum(found.submitter == operator for found in jobs)
        if queued >= quota.most_queued:
            raise PlanRefused(
                f"submit: found {queued} jobs that are not over, expected fewer than {quota.most_queued}",
                remedy="stop one, or wait until one has ended (limits.most_queued of federation.toml)",
            )
        if kept >= quota.most_kept:
            raise PlanRefused(
                f"submit: found {kept} jobs of operator {operator!r} kept here, expected fewer than "
                f"{quota.most_kept}",
                remedy="the coordinator's operator raises limits.most_kept of federation.toml, or gives it "
                "a new folder",
            )

    async def jobs(self, _: Peer, __: frames.JobsRequest) -> frames.JobsReply:
        """The jobs, oldest first, and the sites; where not all have room, how many came earlier."""
        hub = self._hub
        sites = hub.sites(None)
        room = MAX_JSON - REST_BYTES - len(frames.json_bytes(sites))
        rows = _fitting(map(hub.about, reversed(hub.jobs.values())), room)
        answer = {
            "federation": hub.context.federation, "earlier": len(hub.jobs) - len(rows),
            "jobs": rows[::-1], "sites": sites,
        }  # fmt: skip
        return frames.JobsReply(frames.json_bytes(answer))

    async def watch(self, peer: Peer, asked: frames.WatchRequest) -> AsyncIterator[bytes]:
        """Serialised events of a job until its end; without a name, of the one that runs, else the newest."""
        hub = self._hub
        found = self._named(asked.job) if asked.job else hub.running()
        if found is None:
            found = next(reversed(hub.jobs.values()), None)
        if found is None:
            raise BadInput(
                "watch: found no job here", remedy="`fed-coordinator submit job.toml` begins one"
            )
        last, sent, shown = None, 0, 0
        while True:
            hub.sessions.gate.still(peer)
            change, over = hub.change, found.facts.outcome is not None
            event = hub.about(found).to_json() | {"sites": hub.sites(found)}
            rounds, metrics = found.facts.rounds.known, found.facts.metrics.known
            event["new_rounds"] = fresh = _fitting(rounds[sent : sent + ROWS_AT_ONCE])
            event["new_metrics"] = known = _fitting(metrics[shown : shown + ROWS_AT_ONCE])
            if event != last:
                yield calls.WATCH.gives.pack(frames.WatchEvent(frames.json_bytes(event)))
                last, sent = event | {"new_rounds": [], "new_metrics": []}, sent + len(fresh)
                shown += len(known)
            all_sent = sent == len(rounds) and shown == len(metrics)
            if over and all_sent:
                return  # read before the event: the job may end while that is sent
            if not all_sent:
                continue
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(change.wait(), 1.0)
            await asyncio.sleep(0.05)

    def _named(self, name: str) -> JobRunner:
        if name not in self._hub.jobs:
            raise UnknownName("job", name, list(self._hub.jobs))
        return self._hub.jobs[name]

    async def stop(self, peer: Peer, asked: frames.JobRequest) -> frames.Reply:
        """End a job."""
        found = self._named(asked.job)
        if found.facts.outcome is not None:
            raise BadInput(f"stop: job {found.id} is over already ({found.facts.outcome.outcome})")
        self._record("stop", peer, job=found.id)
        if found is self._hub.running():
            found.stop(f"stopped by {peer.name}")
        else:
            found.end("stopped", f"stopped by {peer.name}")
        return frames.Reply(f"job {found.id} is being stopped")

    async def evict(self, peer: Peer, asked: frames.SiteRequest) -> frames.Reply:
        """Evict a site until it is admitted again; kept across restarts."""
        hub, sessions = self._hub, self._hub.sessions
        known = dict.fromkeys([*hub.context.rosters, *sessions.evicted])
        for found in hub.jobs.values():
            known |= dict.fromkeys(found.facts.sites)
        if asked.site not in known:
            raise UnknownName("site", asked.site, list(known))
        if (asked.site in sessions.evicted) is not asked.undo:
            how = "is not evicted" if asked.undo else "is evicted already"
            raise BadInput(f"evict: site {asked.site} {how}")
        name = SiteId(asked.site)
        self._record("evict", peer, site=name, word="undo" if asked.undo else "out")
        sessions.evict(name, undo=asked.undo)
        for found in hub.jobs.values():
            view = found.facts.sites.get(name)
            if view is None:
                continue
            if asked.undo and view.unable == EVICTED:
                view.unable = ""
            elif not asked.undo and found.facts.outcome is None:
                view.unable = EVICTED
        LOG.info("site %s: %s by %s", name, "let in again" if asked.undo else "evicted", peer.name)
        hub.changed()
        text = f"site {name} may connect again" if asked.undo else f"site {name} is evicted"
        return frames.Reply(text)

    async def result(self, peer: Peer, asked: frames.JobRequest) -> AsyncIterator[bytes]:
        """The serialised parts of the files of a job."""
        hub, found = self._hub, self._named(asked.job)
        self._record("result", peer, job=found.id)
        plan = found.facts.plan
        result = hub.about(found).to_json() | {
            "sites": hub.sites(found), "task_sha256": found.offer.task_digest,
            "settings": json.loads(found.offer.settings),
            "plan": plan.to_json() if plan is not None else None,
            "plan_sha256": plan.digest if plan is not None else None,
            "roster_sha256": found.roster.digest,
        }  # fmt: skip
        await asyncio.to_thread(write_json, found.directory / RESULT_FILE, result)
        for path in await asyncio.to_thread(lambda: sorted(found.directory.iterdir())):
            if path.name.startswith("."):
                continue
            with found.disk.open_file(path) as file:
                for part in chunks.file_parts(path.name, file):
                    yield calls.RESULT.gives.pack(part)


def _fitting(rows: Iterable[JsonRecord], most: int = ROWS_BYTES) -> list[Json]:
    """The first rows, as many as have room in so many bytes of JSON: one at least."""
    found: list[Json] = []
    for row in (each.to_json() for each in rows):
        most -= len(frames.json_bytes(row)) + 1
        if found and most < 0:
            break
        found.append(row)
    return found


def check_settings(settings: Json, sites: int, limits: LimitsSection) -> None:
    """Raise BadInput or PlanRefused for settings that no deployed job with so many sites may have."""
    for section, key in (("round", "rounds"), ("protect", "protection")):
        table = settings.get(section)
        if not isinstance(table, dict) or key not in table:
            raise BadInput(f"{section}.{key}: found none, expected the settings of a job, complete")
    refuse_unsupported(settings, "deployment")
    found = build_job(settings)
    if found.protect.max_examples is None:
        raise BadInput(
            "protect.max_examples: found none, expected the public cap on any site's rows",
            remedy="--set protect.max_examples=1024: no site tells how many rows it has",
        )
    for what, value, key, most in (
        ("round.rounds", found.round.rounds, "most_rounds", limits.most_rounds),
        ("train.epochs", found.train.epochs, "most_epochs", limits.most_epochs),
        ("train.batch_size", found.train.batch_size, "most_batch", limits.most_batch),
    ):
        if value > most:
            raise PlanRefused(
                f"{what}: found {value}, expected at most {most}",
                remedy=f"limits.{key} of the coordinator's federation.toml is the limit",
            )
    refuse_plain(found.protect.protection)
    Terms.of_job(
        found, sites, calibrated=False
    )  # refuses a roster and a threshold that no plan can have
    budget, stage_seconds = found.round.submit_seconds, limits.stage_seconds
    if budget is not None and budget >= stage_seconds:  # it would end after all sites were given up
        raise BadInput(
            f"round.submit_seconds: found {budget:g}, expected less than stage_seconds = {stage_seconds:g} "
            "of this coordinator",
            remedy="a smaller budget, or a larger stage_seconds in [limits] of federation.toml",
        )
