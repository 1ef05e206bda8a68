"""A site that is evicted while it works at a round: the round goes on without it, and so do the others."""

from __future__ import annotations

import pytest
from deployment import HUB, PATIENCE, deployment, small_task

from fedcore.wire import calls, frames

AT_WORK = """
import asyncio
from fedcore_clients.job_work import JobWork
async def make_vector(self, asked):
    print("at work", flush=True)
    await asyncio.sleep(1e6)
JobWork.make_vector = make_vector
"""
"""A vector that is never done."""


@pytest.mark.slow
def test_a_connected_site_is_evicted_in_the_middle_of_a_round(tmp_path):
    patches, limits = {"c": AT_WORK}, {"grace_seconds": 1}
    with deployment(tmp_path, small_task(tmp_path), patches=patches, limits=limits) as fed:
        fed.connected()
        job = fed.submit(rounds=2)

        def waits_for_c(event):
            waiting = event["waiting"]
            return event["stage"] == "collecting" and waiting and set(waiting["for"]) == {"c"}

        before = fed.wait(job, waits_for_c)
        assert before[-1]["sites"]["c"]["connected"] and "at work" in fed.log("c")
        assert "c is evicted" in fed.ask(calls.EVICT, frames.SiteRequest("c", undo=False)).text
        assert fed.processes["c"].wait(PATIENCE) == 3
        events = fed.wait(job)
        assert events[-1]["state"] == "finished", (events[-1], fed.log(HUB)[-2000:])
        rounds = [row for event in events for row in event["new_rounds"]]
        assert [row["survivors"] for row in rounds] == [["a", "b", "d"]] * len(rounds)
        assert rounds[0]["roster"] == list("abcd"), "it was of the round that it was evicted from"
        assert all(row["roster"] == list("abd") for row in rounds[1:]), "nobody waits for it again"
        assert fed.released(job, sites=["a", "b", "d"])
