"""Every write to a journal is an instant at which a process may end: each is tried, at every party.

The coordinator's and the sites' jobs run here as they are deployed, with real journals, spools, fold
workers and protections; only the sessions are replaced by calls, and training by drawn numbers. A party
"dies" by an exception out of its journal, just before or just after a commit, and all that it had in
memory is dropped; then it is read from disk again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from dataclasses import replace

import numpy as np
import pytest
from fedcore_clients.bench import Drawn
from fedcore_clients.jobs import Offline, Party, SiteJob
from fedcore_clients.training import TrainingFailed
from fedcore_server.folding import FoldPool
from fedcore_server.jobs import CoordinatedJob, House, Limits

from fedcore.aggregate.jobstate import JobState
from fedcore.config import build_job, plan_of
from fedcore.encode.pack import Opened
from fedcore.errors import StoreFull, TagRefused
from fedcore.plan import canonical
from fedcore.protect.identity import IdentityKey
from fedcore.protocol import job as job_messages
from fedcore.protocol import site as site_machine
from fedcore.protocol.course import Step
from fedcore.protocol.encoding import decode, encode
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


class Killed(BaseException):
    """The process is gone."""


class Watched(Journal):
    """A journal that ends its process at the n-th commit, before or after it is on disk."""

    countdown = None
    late = False
    writes = 0
    full = 0

    def write(self, entries):
        self._commit(lambda: Journal.write(self, entries))

    def compact(self, *args, **kwargs):
        self._commit(lambda: Journal.compact(self, *args, **kwargs))

    def trim(self, *args, **kwargs):
        self._commit(lambda: Journal.trim(self, *args, **kwargs))

    def _commit(self, work):
        self.writes += 1
        if self.full:
            self.full -= 1
            raise StoreFull("journal: found no room")
        if self.countdown is None:
            work()
            return
        self.countdown -= 1
        if self.countdown == 0:
            if self.late:
                work()
            self.countdown = None
            raise Killed
        work()


class Slow(Drawn):
    """Numbers of its own, a little later; counts what it is asked for."""

    def __init__(self, site, town):
        super().__init__(site, PARAMETERS)
        self.town, self.loaded = town, False

    async def load(self, *args):
        self.loaded = True
        return await super().load(*args)

    async def contribute(self, *args):
        assert self.loaded, "a new process contributes only after it has loaded"
        if self.town.trouble.get(self._site):
            raise self.town.trouble[self._site].pop()
        await asyncio.sleep(0.002)
        return await super().contribute(*args)


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
        self.hub, self.sites, self.journals = None, {}, {}
        self.tasks, self.births, self.deaths = {}, {}, []
        self.signed, self.broken, self.pushing = {}, {}, True
        self.mute, self.trouble = set(), {}
        self.again, self.died_in = {}, []
        """party -> how its next life ends; the rounds in which somebody died."""
        self.cuts = 0

    # ------------------------------------------------------------------- starting and dying

    def open(self, name):
        journal = Watched.open(self.folder / name / "journal.sqlite", party=name)
        self.journals[name] = journal
        return journal

    def start_hub(self, **kill):
        journal = self.open(HUB)
        spool = Spool(self.folder / HUB / "spool")
        house = House("town", self.pins, journal, spool, self.pool, self.folder / HUB, self.limits)
        if journal.get("job", "offer") is None:
            journal.put("job", "offer", encode(self.offer))
        self._arm(journal, kill)
        self.births[HUB] = self.births.get(HUB, 0) + 1
        links = HubLinks(self, self.births[HUB])
        try:
            self.hub = CoordinatedJob.stored(house, links, "job")
        except Killed:
            self._dead(HUB)
            self.start(HUB)
            return
        if self.hub.outcome is None:
            self.tasks[HUB] = asyncio.get_running_loop().create_task(self.hub.run())
        for name, found in self.sites.items():
            found.connected()
            self.hub.came(name)

    def start_site(self, name, **kill):
        journal = self.open(name)
        folder = self.folder / name
        party = Party(
            "town", name, self.keys[name], self.pins, journal, Spool(folder / "spool"), folder
        )
        self.births[name] = self.births.get(name, 0) + 1
        link = SiteLink(self, name, self.births[name])
        self._arm(journal, kill)
        contributor = Slow(name, self)
        try:
            if journal.get("job", "offer") is None:
                journal.put("job", "offer", encode(self.offer))
                found = SiteJob(party, link, contributor, self.offer)
            else:
                found = SiteJob.stored(party, link, contributor, "job")
        except Killed:
            self._dead(name)
            self.start(name)
            return
        self.sites[name] = found
        self._trace(name, found)
        if found.ended is None:
            self.tasks[name] = asyncio.get_running_loop().create_task(found.run())
        if self.hub is not None:
            found.connected()
            self.hub.came(name)

    @staticmethod
    def _arm(journal, kill):
        journal.countdown, journal.late = kill.get("at"), kill.get("late", False)

    def _trace(self, name, found):
        once = (
            site_machine.VectorSpooled, site_machine.ListSigned, site_machine.UnmaskAnswered,
            site_machine.SumStated,
        )  # fmt: skip
        written = found._journal

        def journal(effects):
            for effect in effects:
                record = getattr(effect, "record", None)
                if isinstance(record, once):
                    place = name, found.stage.header.digest, type(record).__name__
                    self.signed.setdefault(place, set()).add(encode(record))
            written(effects)

        found._journal = journal

    def _dead(self, name):
        self.deaths.append(name)
        found = self.hub if name == HUB else self.sites.get(name)
        header = getattr(getattr(found, "stage", None), "header", None)
        self.died_in.append(0 if header is None else header.round)
        self.births[name] += 1
        self._cut_power(name)
        self.journals.pop(name).close()
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
        beside = list(getattr(found, "_beside", ()))
        for each in [task, *beside]:
            if each is not None:
                each.cancel()
        await asyncio.gather(*[t for t in [task, *beside] if t is not None], return_exceptions=True)

    async def look(self):
        """Bury whoever died, and start it again."""
        for name, task in list(self.tasks.items()):
            if not task.done():
                continue
            found = self.hub if name == HUB else self.sites.get(name)
            if task.cancelled() or not isinstance(task.exception(), Killed):
                if task.cancelled() or task.exception() is None:
                    self.tasks.pop(name)
                    continue
                raise task.exception()
            self._dead(name)
            await self._bury(found, None)
            self.start(name, **self.again.pop(name, {}))

    def start(self, name, **kill):
        if name == HUB:
            self.start_hub(**kill)
        else:
            self.start_site(name, **kill)

    # ------------------------------------------------------------------------------- a whole job

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
            over = self.hub is not None and self.hub.outcome is not None
            if until is None and over and all(s.ended is not None for s in self.sites.values()):
                return
            await asyncio.sleep(0.005)
        stages = {n: (s.stage, s.epoch.epoch, s.ended) for n, s in self.sites.items()}
        stages = {n: (type(s).__name__, e, x) for n, (s, e, x) in stages.items()}
        raise AssertionError(
            f"no end: {self.hub and (self.hub.progress, type(self.hub.stage).__name__)} {stages}"
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
        assert rows == self.hub.progress.rounds
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
            step = Step(row["purpose"], row["round"])
            found = [await drawn[n].contribute("job", plan, step, state) for n in row["survivors"]]
            fields = sum(each.astype(np.uint64) for each, _ in found)
            wides = {
                name: [sum(v) for v in zip(*(w[name] for _, w in found), strict=True)]
                for name in found[0][1]
            }
            state = state.after(plan, step, Opened(fields, wides), len(found))
        return state

    async def check(self, sites=SITES):
        expected = await self.expected()
        for name in sites:
            assert self.sites[name].state.canonical() == expected.canonical(), name
        assert all(len(each) == 1 for each in self.signed.values())
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
        if self.hub is not None:
            self.hub.tell(self.name, decode(encode(message), type(message)))

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
        incoming = hub.house.spool.upload(job, header, self.name, digest, len(data))
        if not incoming.complete:
            incoming.write(incoming.offset, data[incoming.offset :])
        hub.arrived(self.name, header, incoming.finish(unsynced=INLINE))

    async def download(self, job, what, digest):
        await asyncio.sleep(0)
        self._broken(what)
        stored = self.hub.download(what, digest) if self.hub is not None else None
        if stored is None:
            raise Offline
        return container.from_bytes(stored.path.read_bytes())


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    with FoldPool(1, tmp_path_factory.mktemp("fold")) as found:
        yield found


@contextlib.asynccontextmanager
async def town(folder, pool, **settings):
    found = Town(folder, pool, **settings)
    try:
        yield found
    finally:
        await found.close()


async def whole(folder, pool, party="", kill=None, **settings):
    """One job, in which one party dies once. The journal's commits of every party."""
    async with town(folder, pool, **settings) as found:
        for name in SITES:
            found.start(name, **(kill or {} if name == party else {}))
        found.start_hub(**(kill or {} if party == HUB else {}))
        await found.run()
        await found.check()
        assert found.hub.outcome.outcome == "finished"
        assert found.deaths.count(party) <= 1
        return {name: journal.writes for name, journal in found.journals.items()}


def test_without_a_crash(tmp_path, pool):
    for protection in ("masked", "layered", "encrypted"):
        asyncio.run(whole(tmp_path / protection, pool, protection=protection))


# ------------------------------------------------------------------------- every single commit


def every(folder, pool, party, late, step, first):
    # One round of training and that of the metrics: each kind of commit, and a round after a round.
    writes = asyncio.run(whole(folder / "all", pool, rounds=1))[party]
    assert writes > 10
    for at in range(first, writes + 1, step):
        asyncio.run(whole(folder / str(at), pool, party, {"at": at, "late": late}, rounds=1))


@pytest.mark.brief
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("party", [HUB, "a", "c"])
def test_a_party_may_die_at_some_commits(tmp_path, pool, party, late):
    every(tmp_path, pool, party, late, step=45 if party == HUB else 20, first=7 + 2 * late)


@pytest.mark.slow
@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("party", [HUB, "a", "c"])
def test_a_party_may_die_at_any_commit(tmp_path, pool, party, late):
    every(tmp_path, pool, party, late, step=1, first=1)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("party", [HUB, "a"])
def test_a_party_may_die_twice_in_one_round(tmp_path, pool, party, late):
    """And a third life goes on from what two left behind."""
    rounds = []

    async def play(found):
        found.again = {party: {"at": 2, "late": late}}
        for name in SITES:
            found.start(name)
        found.start_hub()
        await found.run(until=lambda: len(found.hub.progress.rounds) >= 1)
        found.journals[party].countdown, found.journals[party].late = commits, late
        await found.run()
        assert found.deaths == [party, party]
        assert found.hub.outcome.outcome == "finished"
        await found.check()
        rounds.append(tuple(found.died_in))

    for commits in (2, 4, 6):
        scene(tmp_path / str(commits), pool, play, rounds=3)
    assert any(first == second > 1 for first, second in rounds), rounds


# ------------------------------------------------------------------------------- who is missing


def scene(folder, pool, play, **settings):
    async def begin():
        async with town(folder, pool, **settings) as found:
            await play(found)

    asyncio.run(begin())


def test_a_site_that_was_away_at_the_end_still_gets_the_model(tmp_path, pool):
    async def play(found):
        found.start_hub()
        for name in SITES:
            found.start(name)
        await found.run(until=lambda: len(found.hub.progress.rounds) >= 1)
        await found.kill("b")
        await found.run()
        assert "b" not in found.rounds()[-1]["survivors"]
        await found.check(("a", "c", "d"))
        for name in (HUB, "a", "c", "d"):
            await found.kill(name)
        found.start_hub()  # another process of the coordinator, and nobody else there
        found.start("b")
        await found.run()
        assert found.sites["b"].ended.outcome == "finished"
        await found.check(("b",))

    scene(tmp_path, pool, play, protection="layered", limits=AWAY)


def test_a_site_that_comes_late_catches_up_and_takes_part(tmp_path, pool):
    async def play(found):
        found.pushing = False
        found.broken = {("d", "checkpoint"): 1}
        found.start_hub()
        for name in ("a", "b", "c"):
            found.start(name)
        await found.run(until=lambda: found.hub is not None and len(found.hub.progress.rounds) >= 2)
        found.hub.house = replace(found.hub.house, limits=PATIENT)  # from now on it is waited for
        found.start("d")
        await found.run()
        rows = found.rounds()
        assert rows[0]["survivors"] == ["a", "b", "c"]
        assert rows[-1]["survivors"] == list(SITES)
        await found.check()

    scene(tmp_path, pool, play, rounds=10, limits=AWAY)


def test_waiting_is_seen_and_bounded(tmp_path, pool):
    async def play(found):
        found.start_hub()
        for name in ("a", "b", "c"):
            found.start(name)
        await found.run(until=lambda: found.hub.progress.waiting_for == ("d",))
        assert found.hub.progress.waiting_until is not None
        await found.run()
        assert all(row["survivors"] == ["a", "b", "c"] for row in found.rounds())
        assert found.hub.outcome.outcome == "finished"

    scene(tmp_path, pool, play, rounds=10, limits=AWAY)


def test_too_few_sites_end_the_job_with_a_reason(tmp_path, pool):
    async def play(found):
        found.start_hub()
        for name in ("a", "b"):
            found.start(name)
        await found.run()
        assert found.hub.outcome.outcome == "failed"
        assert "too few" in found.hub.outcome.text

    few = Limits(stage=120.0, gather=0.2, minimum=3, grace=0.3, enough=1.0)
    scene(tmp_path, pool, play, limits=few)


def test_a_round_waits_for_a_dead_site_no_longer_than_the_grace(tmp_path, pool):
    async def play(found):
        found.start_hub()
        for name in SITES:
            found.start(name)
        await found.run(until=lambda: len(found.hub.progress.rounds) >= 1)
        await found.run(until=lambda: type(found.hub.stage).__name__ == "Collecting")
        await found.kill("c")
        await found.run()
        await found.check(("a", "b", "d"))

    # Not the stage's deadline: that is later than the end of the test.
    scene(tmp_path, pool, play, limits=replace(AWAY, stage=600.0))


def test_a_site_that_says_it_stops_is_not_waited_for(tmp_path, pool):
    async def play(found):
        found.start_hub()
        for name in SITES:
            found.start(name)
        await found.run(until=lambda: type(found.hub.stage).__name__ == "Collecting")
        await found.kill("c")
        found.hub.left("c")
        await found.run()
        await found.check(("a", "b", "d"))

    # Neither of the deadlines that would let a round go on without it ends before the test does.
    scene(tmp_path, pool, play, limits=replace(AWAY, stage=600.0, grace=600.0))


# ---------------------------------------------------------------------------- what breaks off


def test_transfers_that_break_off_are_done_again_while_the_session_stays(tmp_path, pool):
    async def play(found):
        found.pushing = False  # sums are downloaded
        found.broken = {("a", "upload"): 1, ("b", "sum"): 1}
        for name in SITES:
            found.start(name)
        found.start_hub()
        await found.run()
        assert all(row["survivors"] == list(SITES) for row in found.rounds())
        assert not any(found.broken.values())
        await found.check()

    scene(tmp_path, pool, play)


def test_a_coordinator_that_restarts_while_sums_are_opened_still_has_the_sum(tmp_path, pool):
    async def play(found):
        found.pushing = False
        found.broken = {(name, "sum"): 1 for name in SITES}
        for name in SITES:
            found.start(name)
        found.start_hub()
        await found.run(until=lambda: type(found.hub.stage).__name__ == "Releasing")
        await found.kill(HUB)
        await found.run()
        assert found.rounds()[0]["survivors"] == list(SITES)
        await found.check()

    scene(tmp_path, pool, play)


@pytest.mark.slow
@pytest.mark.parametrize("party", [HUB, "b"])
def test_a_full_disk_is_waited_out(tmp_path, pool, party):
    async def play(found):
        for name in SITES:
            found.start(name)
        found.start_hub()
        await found.run(until=lambda: len(found.hub.progress.rounds) >= 1)
        found.journals[party].full = 3
        await found.run()
        assert found.hub.outcome.outcome == "finished"
        assert found.journals[party].full == 0
        await found.check()

    scene(tmp_path, pool, play, rounds=4)


def test_rows_for_people_that_found_no_room_are_written_later(tmp_path, pool):
    async def play(found):
        for name in SITES:
            found.start(name)
        found.start_hub()
        path = found.folder / HUB / "jobs" / "job" / "rounds.jsonl"
        await found.run(until=lambda: len(found.hub.progress.rounds) >= 1)
        path.unlink()
        path.mkdir()
        await found.run(until=lambda: len(found.hub.progress.rounds) >= 3)
        path.rmdir()
        await found.run()
        assert found.hub.outcome.outcome == "finished"
        await found.check()

    scene(tmp_path, pool, play, rounds=6)


# ------------------------------------------------------------------------------- what goes wrong


def test_nothing_is_spooled_for_a_job_that_is_over(tmp_path, pool):
    """A checkpoint that was asked for may be on its way when nobody needs it any more."""

    async def play(found):
        for name in SITES:
            found.start(name)
        found.start_hub()
        await found.run(until=lambda: found.hub.certificate is not None)
        hub, header = found.hub, found.hub.certificate.header.digest
        hub._asked_checkpoint = "a"
        assert hub.expects("a", header, 100)
        await found.run()
        header, hub._asked_checkpoint = hub.certificate.header.digest, "a"
        assert not hub.expects("a", header, 100)

    scene(tmp_path, pool, play)


def test_a_checkpoint_of_the_site_that_was_asked_first_is_taken_though_another_was_asked(
    tmp_path, pool
):
    """Whoever takes longer than the time to ask another one has it all the same."""

    async def play(found):
        for name in ("a", "b", "c"):
            found.start(name)
        found.start_hub()
        await found.run(until=lambda: found.hub is not None and len(found.hub.progress.rounds) >= 2)
        found.hub.house = replace(found.hub.house, limits=PATIENT)
        asked, another = [], asyncio.Event()

        def slowly(name, upload):
            async def uploaded(*about):
                sealed = about[1] == found.hub.certificate.header.digest
                if sealed and asked:
                    asked.append(name)
                    another.set()
                    await asyncio.sleep(600)
                await upload(*about)
                if sealed:  # it is there; now the coordinator turns to another one
                    asked.append(name)
                    found.hub._asked_at = -1e9
                    await another.wait()

            return uploaded

        for name in ("a", "b", "c"):
            link = found.sites[name].link
            link.upload = slowly(name, link.upload)
        found.start("d")
        await found.run()
        assert len(set(asked)) == 2
        assert found.rounds()[-1]["survivors"] == list(SITES)
        await found.check()

    scene(tmp_path, pool, play, rounds=10, limits=AWAY)


def test_training_that_fails_costs_this_site_this_round_only(tmp_path, pool):
    async def play(found):
        found.trouble = {"b": [TrainingFailed("task failed")], "c": [RuntimeError("PATIENT-7419")]}
        for name in SITES:
            found.start(name)
        found.start_hub()
        await found.run()
        rows = found.rounds()
        assert any("b" not in row["survivors"] for row in rows)
        assert rows[-1]["survivors"] == list(SITES)
        assert "PATIENT" not in json.dumps(rows) + found.hub.progress.text
        await found.check()

    scene(tmp_path, pool, play, rounds=5)


def test_an_evaluation_that_hangs_does_not_keep_a_job_from_its_end(tmp_path, pool):
    async def play(found):
        for name in SITES:
            found.start(name)
        asked, ended = [], []

        async def hangs(*args):
            asked.append(args)
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(args)

        found.sites["b"].contributor.track = hangs
        found.start_hub()
        await found.run(until=lambda: found.hub is not None and len(found.hub.progress.rounds) >= 1)
        found.sites["b"].party = replace(found.sites["b"].party, patience=0.5)
        await found.run()
        assert found.sites["b"].ended.outcome == "finished"
        await asyncio.sleep(0.7)
        assert asked and len(ended) == len(asked)
        await found.check()

    scene(tmp_path, pool, play)


def test_a_step_that_nothing_can_follow_without_is_not_tried_for_ever(tmp_path, pool):
    async def play(found):
        found.trouble = {n: [TrainingFailed("task failed") for _ in range(99)] for n in SITES}
        for name in SITES:
            found.start(name)
        found.start_hub()
        await found.run()
        assert found.hub.outcome.outcome == "abandoned"
        assert "in a row" in found.hub.outcome.text

    scene(tmp_path, pool, play, start=None)


def test_a_site_too_slow_for_one_release_is_there_for_the_next(tmp_path, pool):
    """The certificate of a round came while it opened the sum, and its patience ended there."""

    async def play(found):
        found.start_hub()
        for name in SITES:
            found.start(name)
        slow, caught, spent = found.sites["a"], [], [0.0]
        slow.party = replace(slow.party, clock=lambda: time.monotonic() + spent[0])
        fetch, catch_up = slow._fetch, slow._catch_up

        async def late(what, *rest):
            chunks = await fetch(what, *rest)
            if what == "sum" and not caught:
                while slow._early is None:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                spent[0] = 10_000.0
                slow.connected()  # any event: the clock is looked at
                while isinstance(slow.stage, site_machine.Opening):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                caught.append("late")
            return chunks

        async def catching(offered):
            caught.append(offered.certificate.header.round)
            await catch_up(offered)

        slow._fetch, slow._catch_up = late, catching
        await found.run()
        await found.check()
        assert caught[0] == "late" and len(set(caught)) == 2, caught  # of one release only

    scene(tmp_path, pool, play, rounds=4, limits=replace(AWAY, stage=5.0))


@pytest.mark.parametrize("heard", [True, False], ids=["heard", "word lost"])
def test_after_a_refused_release_the_job_goes_on_under_a_new_key(tmp_path, pool, heard):
    async def play(found):
        for name in SITES:
            found.start(name)
        found.start_hub()
        await found.run(until=lambda: len(found.hub.progress.rounds) >= 1)
        victim, first = found.sites["b"], found.hub.epoch.epoch

        def opened(asked, chunks):
            if not heard:
                found.mute.add("b")
            raise TagRefused("sum tag: found another sum")

        victim._opened = opened
        await found.run(until=lambda: type(victim.stage).__name__ == "Halted")
        del victim._opened
        if not heard:
            await found.kill("b")
            found.mute.clear()
            found.start("b")
        await found.run()
        assert found.hub.epoch.epoch > first
        assert found.rounds()[-1]["survivors"] == list(SITES)
        await found.check()

    scene(tmp_path, pool, play, rounds=6, protection="layered")
