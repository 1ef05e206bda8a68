"""Jobs, when a sum may be known: what a later announcement, or an older folder, does to a site (PROTOCOL H, V)."""

from __future__ import annotations

import asyncio
import logging
import shutil
from dataclasses import replace

import pytest
from town import SITES, UNHURRIED, scene

from fedcore.secagg.protocol import messages
from fedcore.secagg.protocol.job.site import rounds as site_rounds
from fedcore.secagg.protocol.round import site as site_machine


async def begin(found):
    for name in SITES:
        found.start(name)
    found.start_hub()
    await found.run(until=lambda: len(found.hub.facts.rounds.known) >= 1)


def held_at_the_sum(victim):
    """From now on this site waits for the next sum until `go` is set; (go, waits)."""
    go, waits, fetch = asyncio.Event(), asyncio.Event(), victim.work.fetch

    async def late(what, *rest):
        if what == "sum":
            waits.set()
            await go.wait()
        return await fetch(what, *rest)

    victim.work.fetch = late
    return go, waits


@pytest.mark.parametrize("rule", ["on", "off"])
def test_a_later_announcement_does_not_end_a_round_whose_sum_may_be_known(
    tmp_path, pool, without, rule
):
    """A coordinator that goes on without the release gets nothing from it, and the round is still on."""
    if rule == "off":
        in_round = site_machine.IN_ROUND
        without(site_rounds, gives_way=lambda stage: isinstance(stage, in_round))

    async def play(found):
        await begin(found)
        victim = found.sites["a"]
        go, waits = held_at_the_sum(victim)
        await found.run(until=waits.is_set)
        assert isinstance(victim.job.stage, site_machine.EXPOSED)
        header, said, say = victim.job.stage.header, [], victim.link.say
        victim.link.say = lambda job, message: (said.append(message), say(job, message))
        other = replace(
            header, round=header.round + 1, training_round=header.training_round + 1,
            roster=("a", "b", "c"),
        )  # fmt: skip
        victim.tell(messages.Announce(other))
        words = (messages.Leave, messages.Keys)
        await found.run(until=lambda: any(isinstance(each, words) for each in said))
        if rule == "off":
            assert isinstance(victim.job.stage, site_machine.Idle), (
                "control: it is out of its round"
            )
            return
        assert messages.Leave(other.digest, "a", messages.LEFT) in said
        assert victim.job.stage.header.digest == header.digest
        go.set()
        await found.run()
        await found.check()

    scene(tmp_path, pool, play, rounds=6)


@pytest.mark.parametrize("put_back", [True, False])
def test_a_site_that_was_put_back_to_an_older_folder_says_so_and_catches_up(
    tmp_path, pool, put_back, caplog
):
    """It learns so from the certificate of a round that it signed in, and that its folder knows nothing of."""

    async def play(found):
        for name in SITES:
            found.start(name)
        go_2, waits = found.hold("a", lambda: len(found.hub.facts.rounds.known) >= 1)
        found.start_hub()
        b = found.sites["b"]
        await found.run(until=lambda: waits.is_set() and b.job.stage.standing.released == 1)
        assert not isinstance(b.job.stage, site_machine.EXPOSED)
        copy = tmp_path / "copy"
        shutil.copytree(found.folder / "b", copy)
        # b dies when it has signed and before the release: no other one comes before b has seen this one.
        go_2.set()
        await found.run(until=lambda: len(found.hub.facts.rounds.known) >= 2)
        go_on, waits = held_at_the_sum(found.sites["a"])
        await found.run(
            until=lambda: (
                waits.is_set()
                and "b" in [each.site for each in getattr(found.hub.facts.stage, "statements", ())]
            )
        )
        if put_back:
            found.left = {"b": copy}
        await found.kill("b")
        found.start("b")
        go_on.set()
        await found.run()
        assert ("put back to an earlier time" in caplog.text) == put_back
        assert found.rounds()[-1]["survivors"] == list(SITES)
        await found.check()

    caplog.set_level(logging.WARNING)
    scene(tmp_path, pool, play, rounds=8, limits=UNHURRIED)
