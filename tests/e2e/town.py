"""Jobs of a coordinator and its sites as they are deployed, but in one process, for tests of their course.

    async def play(found):
        found.start_hub()
        for name in SITES:
            found.start(name)
        await found.run()
        await found.check()

    scene(tmp_path, pool, play)

Journals, spools, fold workers and protections are real; only the sessions are replaced by calls, and
training by drawn numbers. A party "dies" by an exception out of its journal, just before or just after a
commit, and all that it had in memory is dropped; then it is read from disk again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import shutil

import numpy as np
from fedcore_clients.bench_sites import Drawn
from fedcore_clients.channel import Offline
from fedcore_clients.context import SiteContext
from fedcore_clients.job_runner import JobRunner as SiteRunner
from fedcore_clients.ledger import Ledger, read_ledger
from fedcore_server.context import CoordinatorContext
from fedcore_server.job_runner import JobRunner as CoordinatorRunner
from support.policies import policy_of

from fedcore.audit.keys import SiteSigner
from fedcore.audit.trail import AuditTrail
from fedcore.config import build_job, plan_of
from fedcore.errors import StoreFull
from fedcore.identity.roster import PinnedRoster, RosterFile
from fedcore.learning.state import JobState, without_metrics
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.encode.pack import Opened
from fedcore.secagg.label import Terms, collusion
from fedcore.secagg.plan import canonical
from fedcore.secagg.protections import PROTECTIONS
from fedcore.secagg.protocol import job_messages
from fedcore.secagg.protocol.job.coordinator.events import MessageReceived, SiteConnected
from fedcore.secagg.protocol.job.coordinator.facts import Limits
from fedcore.secagg.protocol.messages import Unmask
from fedcore.secagg.protocol.round import site as site_machine
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.secagg.protocol.wire_form import decode, encode
from fedcore.store import container
from fedcore.store.journal import Journal
from fedcore.store.spool import Spool
from fedcore.wire.limits import INLINE

SITES = ("a", "b", "c", "d")
HUB = "hub"
PARAMETERS = 20

PATIENT = Limits(stage=120.0, gather=60.0, minimum=3, grace=60.0, enough=120.0)
"""Whoever goes comes back at once: a run that needs one of these deadlines hangs, and the test fails."""

AWAY = Limits(stage=120.0, gather=0.5, minimum=3, grace=0.5, enough=120.0)
"""One site stays away. The other three are the fewest that a round needs: being slow leaves none out."""

UNHURRIED = Limits(stage=600.0, gather=600.0, minimum=3, grace=600.0, enough=120.0)
"""Each deadline that would let a round go on without a site is later than the end of the test."""


ROUND_OF = {
    site_machine.VectorSpooled: lambda record: record.submit.header,
    site_machine.ListSigned: lambda record: record.confirm.header,
    site_machine.UnmaskAnswered: lambda record: decode(record.exchange.answer, Unmask).header,
    site_machine.SumStated: lambda record: record.statement.header,
}
"""Records of what leaves a site once in a round -> the digest of the round's header."""


class Killed(BaseException):
    """The process is gone."""


class Watched(Journal):
    """A journal that ends its process at the n-th commit, before or after it is on disk."""

    countdown = None
    late = False
    writes = 0
    full = 0
    full_in = 0
    """Commits that find no room, and those before them that do."""
    dead = False
    signed = None
    """Called with the records of every commit that is on disk."""

    def append(self, job, stream, records, *, put=None):
        before = self.writes
        try:
            self._commit(lambda: Journal.append(self, job, stream, records, put=put))
        except Killed:
            if not self.late or self.writes == before:
                raise
            self._trace(records)
            raise
        self._trace(records)

    def _trace(self, records):
        if self.signed is not None:
            self.signed(records)

    def compact(self, *args, **kwargs):
        self._commit(lambda: Journal.compact(self, *args, **kwargs))

    def trim(self, *args, **kwargs):
        self._commit(lambda: Journal.trim(self, *args, **kwargs))

    def _commit(self, work):
        if self.dead:
            raise Killed
        self.writes += 1
        if self.full_in:
            self.full_in -= 1
        elif self.full:
            self.full -= 1
            raise StoreFull("journal: found no room")
        if self.countdown is None:
            work()
            return
        self.countdown -= 1
        if self.countdown == 0:
            if self.late:
                work()
            self.countdown, self.dead = None, True
            raise Killed
        work()


class Slow(Drawn):
    """Numbers of its own, a little later; counts what it is asked for."""

    def __init__(self, site, town):
        super().__init__(site, PARAMETERS)
        self.town, self.loaded = town, False

    async def load(self, *args):
        found = await super().load(*args)
        await asyncio.sleep(0.02)
        self.loaded = True
        return found

    async def contribute(self, *args):
        assert self.loaded, "a new process contributes only after it has loaded"
        if self.town.trouble.get(self._site):
            raise self.town.trouble[self._site].pop()
        step = args[2]
        if error := self.town.trouble_at.pop((self._site, step.purpose, step.training_round), None):
            raise error
        await asyncio.sleep(0.002)
        return await super().contribute(*args)

    async def export(self, *args):
        assert self.loaded, "a new process exports only after it has loaded"
        return await super().export(*args)


class Town:
    """A coordinator and four sites; `None` stands for a party that is down."""

    def __init__(self, folder, pool, protection="masked", rounds=2, limits=PATIENT, start=0.5):
        self.folder, self.pool, self.limits = folder, pool, limits
        self.keys = {name: IdentityKey() for name in SITES}
        self.pins = {name: key.public for name, key in self.keys.items()}
        tables = build_job(
            {
                "protection": protection, "rounds": rounds, "bits": 16, "range": start,
                "adaptive_range": False, "max_examples": 64, "resamples": 0,
            }
        ).to_json()  # fmt: skip
        self.settings = {
            key: {k: v for k, v in part.items() if v is not None}
            if isinstance(part, dict) else part
            for key, part in tables.items() if key not in {"task", "base"}
        }  # fmt: skip
        self.offer = job_messages.JobOffer("job", "bench", "0" * 64, canonical(self.settings))
        self.hub_key = IdentityKey()
        self.hub, self.sites, self.journals, self.trails = None, {}, {}, {}
        self.tasks, self.births, self.deaths = {}, {}, []
        self.signed, self.broken, self.pushing = {}, {}, True
        self.mute, self.trouble, self.trouble_at = set(), {}, {}
        self.again, self.died_in = {}, []
        """party -> how its next life ends; the rounds in which somebody died."""
        self.left = {}
        """party -> the folder that its next life finds, if not the one it left."""
        self.replaced = set()
        """Parties that found another folder than the one they left."""
        self.cuts, self.rules = 0, {}
        """rules: of the policy of every site that starts from now on."""
        self.passing = lambda sender, receiver, message: message
        """What becomes of every record between a site and the coordinator."""

    # ------------------------------------------------------------------- starting and dying

    def open(self, name):
        journal = Watched.open(self.folder / name / "journal.sqlite", party=name)
        self.journals[name] = journal
        key = self.keys.get(name) or self.hub_key
        self.trails[name] = AuditTrail.open(self.folder / name, SiteSigner(key), {"party": name})
        return journal

    def start_hub(self, **kill):
        journal = self.open(HUB)
        spool = Spool(self.folder / HUB / "spool")
        context = CoordinatorContext(
            "town",
            RosterFile(PinnedRoster(self.pins)),
            journal,
            spool,
            self.pool,
            self.folder / HUB,
            self.limits,
            audit=self.trails[HUB],
            retry_seconds=0.05,
        )
        if journal.get("job", "offer") is None:
            journal.put("job", "offer", encode(self.offer))
        self._arm(journal, kill)
        self.births[HUB] = self.births.get(HUB, 0) + 1
        links = HubLinks(self, self.births[HUB])
        try:
            self.hub = CoordinatorRunner.stored(context, links, "job")
        except Killed:
            self._dead(HUB)
            self.start(HUB)
            return
        if self.hub.facts.outcome is None:
            self.tasks[HUB] = asyncio.get_running_loop().create_task(self.hub.run())
        for name, found in self.sites.items():
            found.connected()
            self.hub.put(SiteConnected(name))

    def start_site(self, name, **kill):
        journal = self.open(name)
        folder = self.folder / name
        context = SiteContext(
            "town",
            name,
            self.keys[name],
            RosterFile(PinnedRoster(self.pins)),
            journal,
            Spool(folder / "spool"),
            folder,
            policy_of(len(SITES), **self.rules),
            Ledger.open(folder, self.keys[name]),
            self.trails[name],
            retry_seconds=0.05,
        )
        self.births[name] = self.births.get(name, 0) + 1
        link = SiteLink(self, name, self.births[name])
        self._arm(journal, kill)
        contributor = self.contributor(name)
        try:
            if journal.get("job", "offer") is None:
                journal.put("job", "offer", encode(self.offer))
                found = SiteRunner(context, link, contributor, self.offer)
            else:
                found = SiteRunner.stored(context, link, contributor, "job")
        except Killed:
            self._dead(name)
            self.start(name)
            return
        self.sites[name] = found
        journal.signed = functools.partial(self._signed, name)
        if found.job.ended is None:
            self.tasks[name] = asyncio.get_running_loop().create_task(found.run())
        if self.hub is not None:
            found.connected()
            self.hub.put(SiteConnected(name))

    def contributor(self, name):
        """What trains in a new life of a site."""
        return Slow(name, self)

    @staticmethod
    def _arm(journal, kill):
        journal.countdown, journal.late = kill.get("at"), kill.get("late", False)

    def _signed(self, name, records):
        """What may leave a site once in a round is in its journal."""
        for record in records:
            if type(record) in ROUND_OF:
                place = name, ROUND_OF[type(record)](record), type(record).__name__
                self.signed.setdefault(place, set()).add(encode(record))

    def _dead(self, name):
        self.deaths.append(name)
        found = self.hub if name == HUB else self.sites.get(name)
        if isinstance(found, SiteRunner):
            self.died_in.append(found.job.stage.standing.round)
        else:
            header = None if found is None else getattr(found.facts.stage, "header", None)
            self.died_in.append(0 if header is None else header.round)
        self.births[name] += 1
        self._cut_power(name)
        self.journals.pop(name).close()
        self.trails.pop(name).close()
        if name in self.left:
            self.replaced.add(name)
            shutil.rmtree(self.folder / name)
            shutil.copytree(self.left.pop(name), self.folder / name)
        self.tasks.pop(name, None)
        if name == HUB:
            self.hub = None
        else:
            self.sites.pop(name, None)

    def _cut_power(self, name):
        """What nobody synced is there, or gone, or empty, one after the other."""
        files, folder = [], self.folder / name
        if name == HUB:
            found = [*folder.rglob("small-*"), *folder.rglob("sum.chunks")]
            files = [each for each in found if each.stat().st_size <= INLINE]
        elif self.journals[name].get("job", "state"):
            files = [folder / "states" / "job" / "current.safetensors"]
        for each in files:
            self.cuts += 1
            if self.cuts % 3 == 1:
                each.unlink(missing_ok=True)
            elif self.cuts % 3 == 2:
                each.write_bytes(b"")

    async def kill(self, name):
        """At once: nothing more of it runs."""
        task = self.tasks.get(name)
        found = self.hub if name == HUB else self.sites.get(name)
        self._dead(name)
        await self._bury(found, task)

    @staticmethod
    async def _bury(found, task):
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        if isinstance(found, SiteRunner):
            await found.close()

    async def look(self):
        """Bury whoever died, in its task or in work beside it, and start it again."""
        for name, task in list(self.tasks.items()):
            if self.journals[name].dead:
                await self.kill(name)
                self.start(name, **self.again.pop(name, {}))
            elif task.done():
                self.tasks.pop(name)
                if not task.cancelled() and task.exception() is not None:
                    raise task.exception()

    def start(self, name, **kill):
        if name == HUB:
            self.start_hub(**kill)
        else:
            self.start_site(name, **kill)

    # ------------------------------------------------------------------------------- a whole job

    async def first_round(self):
        """Everybody is started, and the first round is over."""
        for name in SITES:
            self.start(name)
        self.start_hub()
        await self.run(until=lambda: self.hub is not None and len(self.hub.facts.rounds.known) >= 1)

    def hold(self, name, when=lambda: True):
        """A contribution that this site begins while `when` says so waits for `go`; (go, waits)."""
        go, waits = asyncio.Event(), asyncio.Event()
        contributor = self.sites[name].contributor
        contribute = contributor.contribute

        async def held(*about):
            if when() and not go.is_set():
                waits.set()
                await go.wait()
            return await contribute(*about)

        contributor.contribute = held
        return go, waits

    async def run(self, seconds=100.0, until=None):
        """Until the coordinator's job is over and every site that runs has heard of it."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while loop.time() < end:
            await self.look()
            if self.hub is None:
                self.start_hub()
            if until is not None and until():
                return
            over = self.hub is not None and self.hub.facts.outcome is not None
            if until is None and over and all(s.job.ended is not None for s in self.sites.values()):
                return
            await asyncio.sleep(0.005)
        jobs = {name: site.job for name, site in self.sites.items()}
        stages = {n: (type(j.stage).__name__, j.ended) for n, j in jobs.items()}
        raise AssertionError(
            f"no end: {self.hub and (self.hub.facts.progress, type(self.hub.facts.stage).__name__)} {stages}"
        )

    async def close(self):
        for name in [HUB, *SITES]:
            if name in self.journals:
                await self.kill(name)

    # ------------------------------------------------------------------------------ the checks

    def rounds(self):
        text = (self.folder / HUB / "jobs" / "job" / "rounds.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        numbers = [row["number"] for row in rows]
        assert numbers == sorted(set(numbers)), numbers
        released = [(r["purpose"], r["round"]) for r in rows if r["survivors"]]
        assert len(released) == len(set(released)), released
        assert rows == [row.to_json() for row in self.hub.facts.rounds.known]
        return rows

    async def expected(self):
        """The state that the plain sums of exactly the listed survivors lead to."""
        drawn = {name: Drawn(name, PARAMETERS) for name in SITES}
        loaded = await drawn["a"].load("job", {}, "bench", "0" * 64)
        plan = plan_of(build_job(self.settings), loaded.shape, SITES, 64)
        state = JobState.initial(plan, loaded.initial)
        for row in self.rounds():
            if not row["survivors"]:
                continue
            step = PlannedRound(row["purpose"], row["round"])
            found = [await drawn[n].contribute("job", plan, step, state) for n in row["survivors"]]
            fields = sum(each.astype(np.uint64) for each, _ in found)
            wides = {
                name: [sum(v) for v in zip(*(w[name] for _, w in found), strict=True)]
                for name in found[0][1]
            }
            if state.isolates(row["roster"], 2 + collusion(Terms.of_plan(plan)).active):
                wides = without_metrics(plan, wides)
            state = state.after(plan, step, Opened(fields, wides), row["survivors"])
        return state

    def _check_ledgers(self):
        """Whatever was answered (or sent, without masks) was in the site's ledger before (PROTOCOL D)."""
        masks = PROTECTIONS[self.settings["protect"]["protection"]].masks
        spends = "UnmaskAnswered" if masks else "VectorSpooled"
        spent = 0
        for name in set(SITES) - self.replaced:
            kept = {each.header for each in read_ledger(self.folder / name)}
            gave = {h.hex() for who, h, kind in self.signed if who == name and kind == spends}
            assert gave <= kept, name
            spent += len(gave)
        assert spent >= 3, "the check looked at something"

    async def check(self, sites=SITES, rolled_back=()):
        """rolled_back: sites that were given an old copy of their folder, and may sign once more."""
        expected = await self.expected()
        for name in sites:
            assert self.sites[name].job.state.canonical() == expected.canonical(), name
        assert all(len(v) == 1 for k, v in self.signed.items() if k[0] not in rolled_back)
        self._check_ledgers()
        for name, journal in self.journals.items():
            journal.verify()
            if name != HUB:
                assert list(journal.read("job", "round")) == []
        assert list(self.journals[HUB].read("job", "round")) == []
        kept = {name: set(journal.keys("job")) for name, journal in self.journals.items()}
        assert not [key for key in kept[HUB] if key.startswith(("vector-", "sum-"))]
        assert not any({"vector", "candidate"} & keys for n, keys in kept.items() if n != HUB)


class HubLinks:
    """The coordinator's sessions, as long as this life of it lasts."""

    def __init__(self, town, life):
        self.town, self.life = town, life

    @property
    def alive(self):
        return self.town.births.get(HUB) == self.life

    def connected(self):
        return [n for n in SITES if n in self.town.sites and n not in self.town.mute]

    def say(self, site, job, message):
        message = self.town.passing(HUB, site, message)
        found = self.town.sites.get(site)
        if self.alive and found is not None and site not in self.town.mute:
            found.tell(decode(encode(message), type(message)))

    def push(self, site, job, what, stored):
        found = self.town.sites.get(site)
        here = self.alive and found is not None and site not in self.town.mute
        if here and self.town.pushing:
            found.inline(stored.digest, stored.path.read_bytes())


class SiteLink:
    """A site's session."""

    def __init__(self, town, name, life):
        self.town, self.name, self.life = town, name, life

    @property
    def hub(self):
        """The coordinator, if both ends live."""
        here = self.town.births.get(self.name) == self.life and self.name not in self.town.mute
        return self.town.hub if here else None

    def say(self, job, message):
        message = self.town.passing(self.name, HUB, message)
        if self.hub is not None:
            self.hub.put(MessageReceived(self.name, decode(encode(message), type(message))))

    def doing(self, job, what):
        pass

    def _broken(self, what):
        """A transfer that breaks off while the session stays."""
        if self.town.broken.get((self.name, what), 0):
            self.town.broken[self.name, what] -= 1
            raise Offline

    async def upload(self, job, header, digest, source):
        await asyncio.sleep(0)
        self._broken("upload")
        hub, data = self.hub, source if isinstance(source, bytes) else source.read_bytes()
        if hub is None or not hub.expects(self.name, header, len(data)):
            raise Offline
        incoming = hub.context.spool.upload(job, header, self.name, digest, len(data))
        if not incoming.complete:
            incoming.write(incoming.offset, data[incoming.offset :])
        hub.arrived(self.name, header, incoming.finish(unsynced=INLINE))

    def expect_sum(self, job, header):
        pass

    async def download(self, job, what, digest, each, of=b""):
        await asyncio.sleep(0)
        self._broken(what)
        hub = self.hub
        stored = hub.download(self.name, what, digest) if hub is not None else None
        if stored is None:
            raise Offline
        for place, chunk in enumerate(container.from_bytes(stored.path.read_bytes())):
            each(place, chunk)


@contextlib.asynccontextmanager
async def town(folder, pool, **settings):
    found = Town(folder, pool, **settings)
    try:
        yield found
    finally:
        await found.close()


def scene(folder, pool, play, **settings):
    async def begin():
        async with town(folder, pool, **settings) as found:
            await play(found)

    asyncio.run(begin())
