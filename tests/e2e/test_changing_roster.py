"""A federation whose roster changes while it runs: one site joins, another is removed in the middle of a round."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest
from deployment import FEDERATION, HUB, deployment, small_task

from fedcore.identity.signed_roster import SignedRoster

AT_WORK = """
import asyncio
from fedcore_clients.job_work import JobWork
async def make_vector(self, asked):
    print("at work", flush=True)
    await asyncio.sleep(1e6)
JobWork.make_vector = make_vector
"""
"""A vector that is never done."""


def sign(fed, number, names, path):
    sites = {name: fed.pins[name] for name in names}
    SignedRoster(FEDERATION, number, datetime.now(UTC), sites).sign(fed.authority).save(path)


def own_roster(fed, name, number, names):
    """A site's own copy of a roster, as its operator got it."""
    sign(fed, number, names, fed.home(name) / "roster.toml")
    text = fed.config(name).read_text()
    fed.config(name).write_text(text.replace("../../roster.toml", "roster.toml"))


@pytest.mark.slow
def test_a_site_joins_and_another_is_removed_in_the_middle_of_a_round(tmp_path):
    """No process is started again, and the job that runs keeps its roster."""
    limits, policy = {"grace_seconds": 60}, {"roster": "any"}
    sites = {name: number for number, name in enumerate("abcde", 1)}
    with deployment(
        tmp_path, small_task(tmp_path), sites, start=(), patches={"c": AT_WORK}, limits=limits,
        policy=policy,
    ) as fed:  # fmt: skip
        path = fed.folder / "roster.toml"
        sign(fed, 1, "abcd", path)
        for name in "abcd":
            own_roster(fed, name, 1, "abcd")
            fed.start(name)
        own_roster(fed, "e", 2, "abde")
        fed.connected("abcd")
        first = fed.submit(rounds=2)
        fed.wait(first, lambda e: (e["waiting"] or {}).get("for", {}).keys() == {"c"})

        sign(fed, 2, "abde", path)
        removed = time.monotonic()
        fed.start("e")
        assert fed.processes["c"].wait(5.0) == 3, "cut off within five seconds"
        events = fed.wait(first)
        assert events[-1]["state"] == "finished", (events[-1], fed.log(HUB)[-2000:])
        assert time.monotonic() - removed < 50.0, "the round does not wait for the grace"
        assert list(events[-1]["sites"]) == list("abcd"), "the roster of its submission"
        assert "removed from the roster" in events[-1]["sites"]["c"]["unable"]

        fed.connected("abde")
        second = fed.submit(rounds=2)
        events = fed.wait(second)
        assert events[-1]["state"] == "finished", (events[-1], fed.log(HUB)[-2000:])
        rows = [row for event in events for row in event["new_rounds"]]
        assert all(row["survivors"] == list("abde") for row in rows), rows
        fed.released(second, sites=list("abde"))
        for line in ("1 site added: e", "1 site removed: c", "roster 2 is in force"):
            assert line in fed.log("a")
