"""Every write to a journal is an instant at which a process may end: each is tried, at every party."""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from dataclasses import replace

import pytest
from fedcore_clients.round_work import RoundWork
from fedcore_clients.trainer import TrainingFailed
from town import AWAY, HUB, PATIENT, SITES, UNHURRIED, scene, town

from fedcore.errors import TagRefused
from fedcore.secagg.protocol import job_messages
from fedcore.secagg.protocol.job.coordinator.events import SiteLeft
from fedcore.secagg.protocol.job.coordinator.facts import Limits
from fedcore.secagg.protocol.round import site as site_machine


async def whole(folder, pool, party="", kill=None, **settings):
    """One job, in which one party dies once. The journal's commits of every party."""
    async with town(folder, pool, **settings) as found:
        for name in SITES:
            found.start(name, **(kill or {} if name == party else {}))
        found.start_hub(**(kill or {} if party == HUB else {}))
        await found.run()
        await found.check()
        assert found.hub.facts.outcome.outcome == "finished"
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
    """Before every second commit and after the others; tests/unit/protocol/test_whole_jobs.py has every effect."""
    every(tmp_path, pool, party, late, step=2, first=1 + late)


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("party", [HUB, "a"])
def test_a_party_may_die_twice_in_one_round(tmp_path, pool, party, late):
    """And a third life goes on from what two left behind."""
    rounds = []

    async def play(found):
        found.again = {party: {"at": 2, "late": late}}
        for name in SITES:
            found.start(name)
        go, waits = found.hold("a", lambda: len(found.hub.facts.rounds.known) >= 1)
        found.start_hub()
        # Of the second round all vectors but one are there: the commits are counted from here.
        await found.run(
            until=lambda: (
                waits.is_set() and len(getattr(found.hub.facts.stage, "submissions", ())) == 3
            )
        )
        found.journals[party].countdown, found.journals[party].late = commits, late
        go.set()
        await found.run()
        assert found.deaths == [party, party]
        assert found.hub.facts.outcome.outcome == "finished"
        await found.check()
        rounds.append(tuple(found.died_in))

    # Under masks a new process of a site leaves the round it finds.
    protection = "masked" if party == HUB else "encrypted"
    for commits in (1, 2, 4):
        scene(tmp_path / str(commits), pool, play, rounds=3, protection=protection)
    assert any(first == second > 1 for first, second in rounds), rounds


# ------------------------------------------------------------------------------- who is missing


@pytest.mark.parametrize("protection", ["masked", "encrypted"])
@pytest.mark.parametrize("kept", ["nothing", "an old copy"])
def test_a_site_that_forgot_the_round_is_not_waited_for(tmp_path, pool, kept, protection):
    """It is back before anybody missed it, and the round goes on without it at once."""

    def play(at):
        async def played(found):
            await found.first_round()
            copy = tmp_path / f"copy-{at}"
            if kept == "nothing":
                copy.mkdir()
            else:
                shutil.copytree(found.folder / "b", copy)
            found.left = {"b": copy}
            found.journals["b"].countdown, found.journals["b"].late = at // 2 + 1, at % 2
            await found.run()
            assert found.deaths == ["b"]
            assert found.hub.facts.outcome.outcome == "finished"
            await found.check(rolled_back=() if kept == "nothing" else ("b",))

        return played

    for at in range(0, 16, 3) if protection == "masked" else (1, 6):
        scene(tmp_path / str(at), pool, play(at), rounds=3, limits=UNHURRIED, protection=protection)


def test_a_site_that_was_away_at_the_end_still_gets_the_model(tmp_path, pool):
    async def play(found):
        found.start_hub()
        for name in SITES:
            found.start(name)
        await found.run(until=lambda: len(found.hub.facts.rounds.known) >= 1)
        await found.kill("b")
        await found.run()
        assert "b" not in found.rounds()[-1]["survivors"]
        await found.check(("a", "c", "d"))
        for name in (HUB, "a", "c", "d"):
            await found.kill(name)
        found.start_hub()  # another process of the coordinator, and nobody else there
        found.start("b")
        await found.run()
        assert found.sites["b"].job.ended.outcome == "finished"
        await found.check(("b",))

    scene(tmp_path, pool, play, protection="layered", limits=AWAY)


def test_a_site_that_comes_late_catches_up_and_takes_part(tmp_path, pool):
    async def play(found):
        found.pushing = False
        found.broken = {("d", "checkpoint"): 1}
        found.start_hub()
        for name in ("a", "b", "c"):
            found.start(name)
        await found.run(
            until=lambda: found.hub is not None and len(found.hub.facts.rounds.known) >= 2
        )
        found.hub.facts.limits = PATIENT  # from now on it is waited for
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
        await found.run(until=lambda: found.hub.facts.progress.waiting_for == ("d",))
        assert found.hub.facts.progress.waiting_until is not None
        await found.run()
        assert all(row["survivors"] == ["a", "b", "c"] for row in found.rounds())
        assert found.hub.facts.outcome.outcome == "finished"

    scene(tmp_path, pool, play, rounds=10, limits=AWAY)


def test_too_few_sites_end_the_job_with_a_reason(tmp_path, pool):
    async def play(found):
        found.start_hub()
        for name in ("a", "b"):
            found.start(name)
        await found.run()
        assert found.hub.facts.outcome.outcome == "failed"
        assert "too few" in found.hub.facts.outcome.text

    few = Limits(stage=120.0, gather=0.2, minimum=3, grace=0.3, enough=1.0)
    scene(tmp_path, pool, play, limits=few)


def test_a_round_waits_for_a_dead_site_no_longer_than_the_grace(tmp_path, pool):
    async def play(found):
        found.start_hub()
        for name in SITES:
            found.start(name)
        await found.run(until=lambda: len(found.hub.facts.rounds.known) >= 1)
        await found.run(until=lambda: type(found.hub.facts.stage).__name__ == "Collecting")
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
        await found.run(until=lambda: type(found.hub.facts.stage).__name__ == "Collecting")
        await found.kill("c")
        found.hub.put(SiteLeft("c"))
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
        await found.run(until=lambda: type(found.hub.facts.stage).__name__ == "Releasing")
        await found.kill(HUB)
        await found.run()
        assert found.rounds()[0]["survivors"] == list(SITES)
        await found.check()

    scene(tmp_path, pool, play)


@pytest.mark.parametrize("party", [HUB, "b"])
def test_a_full_disk_is_waited_out(tmp_path, pool, party):
    """At any commit, and nobody waits for a deadline: what the disk kept from being heard is said again."""

    def play(at):
        async def played(found):
            await found.first_round()
            found.journals[party].full_in, found.journals[party].full = at, 2
            await found.run()
            assert found.hub.facts.outcome.outcome == "finished"
            assert found.journals[party].full == 0
            assert found.deaths == []
            await found.check()

        return played

    for at in range(10):
        scene(tmp_path / str(at), pool, play(at), rounds=2, limits=UNHURRIED)


def test_rows_for_people_that_found_no_room_are_written_later(tmp_path, pool):
    async def play(found):
        for name in SITES:
            found.start(name)
        found.start_hub()
        path = found.folder / HUB / "jobs" / "job" / "rounds.jsonl"
        await found.run(until=lambda: len(found.hub.facts.rounds.known) >= 1)
        path.unlink()
        path.mkdir()
        await found.run(until=lambda: len(found.hub.facts.rounds.known) >= 3)
        path.rmdir()
        await found.run()
        assert found.hub.facts.outcome.outcome == "finished"
        await found.check()

    scene(tmp_path, pool, play, rounds=6)


# ------------------------------------------------------------------------------- what goes wrong


def test_nothing_is_spooled_for_a_job_that_is_over(tmp_path, pool):
    """A checkpoint that was asked for may be on its way when nobody needs it any more."""

    async def play(found):
        for name in SITES:
            found.start(name)
        found.start_hub()
        await found.run(until=lambda: found.hub.facts.certificate is not None)
        hub, header = found.hub, found.hub.facts.certificate.header.digest
        hub.machine.catch_up.asked = "a"
        assert hub.expects("a", header, 100)
        await found.run()
        header, hub.machine.catch_up.asked = hub.facts.certificate.header.digest, "a"
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
        await found.run(
            until=lambda: found.hub is not None and len(found.hub.facts.rounds.known) >= 2
        )
        found.hub.facts.limits = PATIENT
        asked, another = [], asyncio.Event()

        def slowly(name, upload):
            async def uploaded(*about):
                sealed = about[1] == found.hub.facts.certificate.header.digest
                if sealed and asked:
                    asked.append(name)
                    another.set()
                    await asyncio.sleep(600)
                await upload(*about)
                if sealed:  # it is there; now the coordinator turns to another one
                    asked.append(name)
                    found.hub.machine.catch_up.asked_at = -1e9
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
        found.trouble = {"b": [TrainingFailed("unable")], "c": [RuntimeError("PATIENT-7419")]}
        for name in SITES:
            found.start(name)
        found.start_hub()
        await found.run()
        rows = found.rounds()
        assert any("b" not in row["survivors"] for row in rows)
        assert rows[-1]["survivors"] == list(SITES)
        assert "PATIENT" not in json.dumps(rows) + found.hub.facts.progress.text
        await found.check()

    scene(tmp_path, pool, play, rounds=5)


@pytest.mark.parametrize("place", ["invited", "upload"])
def test_nobody_waits_for_a_site_that_its_own_program_failed(tmp_path, pool, place):
    async def play(found):
        await found.first_round()

        def fails(*args):
            raise KeyError("PATIENT-7419")

        site = found.sites["b"]
        setattr(site.job.parts.rounds if place == "invited" else site.work, place, fails)
        await found.run(until=lambda: found.hub.facts.outcome is not None)
        assert found.hub.facts.outcome.outcome == "finished"
        rows = found.rounds()
        assert rows[-1]["survivors"] == ["a", "c", "d"]
        assert found.hub.facts.sites["b"].unable == "unable"
        assert found.sites["b"].job.part.last_error == job_messages.REASONS["unable"]
        assert "PATIENT" not in json.dumps(rows) + found.hub.facts.progress.text
        await found.kill("b")
        await found.check(("a", "c", "d"))

    scene(tmp_path, pool, play, rounds=4, limits=UNHURRIED)


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
        await found.run(
            until=lambda: found.hub is not None and len(found.hub.facts.rounds.known) >= 1
        )
        found.sites["b"].context = replace(found.sites["b"].context, stage_seconds=0.5)
        await found.run()
        assert found.sites["b"].job.ended.outcome == "finished"
        await asyncio.sleep(0.7)
        assert asked and len(ended) == len(asked)
        await found.check()

    scene(tmp_path, pool, play)


def test_a_step_that_nothing_can_follow_without_is_not_tried_for_ever(tmp_path, pool):
    async def play(found):
        found.trouble = {n: [TrainingFailed("unable") for _ in range(99)] for n in SITES}
        for name in SITES:
            found.start(name)
        found.start_hub()
        await found.run()
        assert found.hub.facts.outcome.outcome == "abandoned"
        assert "in a row" in found.hub.facts.outcome.text

    scene(tmp_path, pool, play, start=None)


def test_a_site_too_slow_for_one_release_applies_it_when_it_gets_there(tmp_path, pool):
    """The certificate of a round came while it opened the sum; no timeout ends that round for it."""

    async def play(found):
        found.start_hub()
        for name in SITES:
            found.start(name)
        slow, caught, spent = found.sites["a"], [], [0.0]
        slow.context = replace(slow.context, clock=lambda: time.monotonic() + spent[0])
        fetch = slow.work.fetch

        async def late(what, *rest):
            chunks = await fetch(what, *rest)
            if what == "sum" and not caught:
                while slow.job.parts.rounds.early is None:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                caught.append(slow.job.stage.header.round)
                spent[0] = 10_000.0
                slow.connected()  # any event: the clock is looked at
                for _ in range(10):
                    await asyncio.sleep(0.01)
                assert isinstance(slow.job.stage, site_machine.Opening)
                caught.append("opened")
            return chunks

        async def catching(offered):
            caught.append("caught up")

        slow.work.fetch, slow.work.catch_up = late, catching
        await found.run(until=lambda: "opened" in caught)
        await found.run(until=lambda: slow.job.stage.standing.released == caught[0])
        assert "caught up" not in caught
        del slow.work.catch_up
        await found.run()
        await found.check()

    scene(tmp_path, pool, play, rounds=4, limits=replace(AWAY, stage=5.0))


@pytest.mark.parametrize("heard", [True, False], ids=["heard", "word lost"])
def test_after_a_refused_release_the_job_goes_on_under_a_new_key(tmp_path, pool, heard):
    async def play(found):
        await found.first_round()
        victim, first = found.sites["b"], found.hub.facts.epoch.epoch

        class Refusing(RoundWork):
            def open(self, *_):
                if not heard:
                    found.mute.add("b")
                raise TagRefused("sum tag: found another sum")

        real = victim.work.round_work
        victim.work.round_work = lambda: Refusing(**vars(real()))
        await found.run(until=lambda: type(victim.job.stage).__name__ == "Halted")
        victim.work.round_work = real
        if not heard:
            await found.kill("b")
            found.mute.clear()
            found.start("b")
        await found.run()
        assert found.hub.facts.epoch.epoch > first
        assert found.rounds()[-1]["survivors"] == list(SITES)
        await found.check()

    scene(tmp_path, pool, play, rounds=6, protection="layered")
