"""Key epochs end: with a site that was sent away, and some time after their job (PROTOCOL V)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from town import AWAY, HUB, SITES, scene

from fedcore.secagg.protocol.job.coordinator.epochs import EpochDriver
from fedcore.secagg.protocol.job.coordinator.events import SiteConnected
from fedcore.store.journal import Journal


async def begin(found):
    for name in SITES:
        found.start(name)
    found.start_hub()
    await found.run(until=lambda: len(found.hub.facts.rounds.known) >= 1)


def group_of(site):
    return site.job.parts.keys.secrets.group.to_bytes()


def without_grace(site):
    site.job.me = replace(site.job.me, keep_keys=0.0)


def send_away(found, how):
    """What the coordinator's service does: no session for d from now on, and the job is told."""
    found.mute.add("d")
    if how == "evicted":
        found.hub.facts.evicted = {"d"}
        found.hub.facts.sites["d"].unable = "evicted"
    else:
        found.hub.withdrawn("d")


@pytest.mark.parametrize("how", ["evicted", "revoked"])
@pytest.mark.parametrize("rule", ["on", "off"])
def test_a_site_that_was_sent_away_does_not_have_the_next_keys(tmp_path, pool, without, how, rule):
    if rule == "off":
        without(EpochDriver, spent=lambda _: False)

    async def play(found):
        await begin(found)
        send_away(found, how)
        old = group_of(found.sites["d"])
        rounds = len(found.hub.facts.rounds.known)
        await found.run(until=lambda: len(found.hub.facts.rounds.known) >= rounds + 3)
        same = group_of(found.sites["a"]) == old
        assert same == (rule == "off"), "control: d would go on reading what passes"
        if rule == "on":
            assert found.hub.facts.epoch.epoch == 2 and "d" not in found.hub.facts.epoch.holders
            assert found.sites["d"].job.parts.epochs.stage.epoch == 1
            await found.kill("d")
            await found.run()
            await found.check(("a", "b", "c"))

    scene(tmp_path, pool, play, rounds=12, limits=AWAY)


def test_a_revocation_that_was_noticed_is_not_forgotten_by_a_restart(tmp_path, pool):
    async def play(found):
        await begin(found)
        send_away(found, "revoked")
        await found.kill(HUB)
        found.start_hub()
        await found.run(until=lambda: found.hub.facts.epoch.epoch == 2)
        found.mute.clear()  # with a new certificate it is let in again, and gets the new keys
        found.hub.put(SiteConnected("d"))
        found.sites["d"].connected()
        await found.run()
        assert found.rounds()[-1]["survivors"] == list(SITES)
        await found.check()

    scene(tmp_path, pool, play, rounds=12, limits=replace(AWAY, gather=2.0))


def files_with(folder, secret):
    return [path for path in folder.rglob("*") if path.is_file() and secret in path.read_bytes()]


def test_the_keys_of_an_ended_job_are_erased_after_the_grace(tmp_path, pool):
    async def play(found):
        await begin(found)
        site, now = found.sites["a"], [1_000.0]
        site.context = replace(site.context, now=lambda: now[0])
        site.job.me = replace(site.job.me, keep_keys=100.0)
        group = group_of(site)
        await found.run()
        assert site.job.ended.outcome == "finished"
        now[0] += 99.0
        site.erase_keys()
        assert site.job.holds_keys and {"epoch", "groups"} <= set(found.journals["a"].keys("job"))
        now[0] += 2.0
        site.erase_keys()
        assert not site.job.holds_keys and site.job.parts.keys.secrets is None
        await found.kill("a")
        folder = found.folder / "a"
        assert files_with(found.folder / "b", group.hex().encode()), "control: b keeps them"
        assert not files_with(folder, group) and not files_with(folder, group.hex().encode())
        with Journal.open(folder / "journal.sqlite", party="a") as journal:
            assert not {"epoch", "groups"} & set(journal.keys("job"))
            assert journal.get("job", "state") and journal.get("job", "ended")

    scene(tmp_path, pool, play, protection="masked")


def test_a_site_without_a_grace_erases_them_with_the_end_of_the_job(tmp_path, pool):
    async def play(found):
        await begin(found)
        site = found.sites["a"]
        without_grace(site)
        await found.run()
        await found.run(until=lambda: not site.job.holds_keys)

    scene(tmp_path, pool, play)


async def without_d(found, erased):
    """d is away while the others change their keys and end the job; some erase them; then d is back."""
    await begin(found)
    await found.kill("d")
    found.hub.withdrawn("a")
    await found.run()
    assert found.hub.facts.epoch.epoch == 2 and "d" not in found.hub.facts.epoch.holders
    for name in erased:
        site = found.sites[name]
        without_grace(site)
        site.erase_keys()
    found.start("d")
    await found.run(until=lambda: found.sites["d"].job.ended is not None)


def test_a_site_that_comes_after_all_erased_them_hears_that_it_stays_behind(tmp_path, pool):
    async def play(found):
        await without_d(found, ("a", "b", "c"))
        assert "erased the keys" in found.sites["d"].job.ended.text
        assert found.sites["d"].job.state.canonical() != found.sites["c"].job.state.canonical()

    scene(tmp_path, pool, play, limits=replace(AWAY, gather=0.2), rounds=4)


def test_as_long_as_one_site_keeps_them_a_late_one_gets_the_model(tmp_path, pool):
    async def play(found):
        await without_d(found, ("a", "b"))
        assert found.sites["d"].job.state.canonical() == found.sites["c"].job.state.canonical()

    scene(tmp_path, pool, play, limits=replace(AWAY, gather=0.2), rounds=4)


def test_the_word_of_an_end_that_was_lost_is_asked_for(tmp_path, pool):
    """A site is in a round that the others have released long ago: at its next session it hears so."""

    async def play(found):
        await begin(found)
        victim = found.sites["b"]
        found.mute.add("b")
        number = found.hub.facts.stage.round if hasattr(found.hub.facts.stage, "round") else 0
        await found.run(until=lambda: found.hub.facts.rounds.known[-1]["number"] >= number + 3)
        found.mute.clear()
        victim.connected()
        found.hub.put(SiteConnected("b"))
        await found.run()
        await found.check()

    scene(tmp_path, pool, play, rounds=12, limits=replace(AWAY, gather=0.2))
