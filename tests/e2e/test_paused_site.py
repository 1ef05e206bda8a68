"""A site that its operator pauses, and one that vetoes a job, while rounds run: the others' rounds go on."""

from __future__ import annotations

import time

from deployment import PATIENCE, deployment, small_task
from fedcore_clients import control
from fedcore_clients.status import veto_job

ROUNDS = 1000
"""More than the test waits for: it stops the job."""


def sites_of(rows):
    return [tuple(row["survivors"]) for row in rows if row["purpose"] == "update"]


def test_a_paused_site_is_away_by_that_word_and_a_vetoed_job_is_left(tmp_path):
    with deployment(tmp_path, small_task(tmp_path)) as fed:
        fed.connected()
        job = fed.submit(rounds=ROUNDS)
        events = fed.watch(job)

        def until(says):
            """The survivors of the rounds up to the first event that says so."""
            rounds = []
            for event in events:
                rounds += sites_of(event["new_rounds"])
                if says(event, rounds):
                    return rounds
            raise AssertionError(fed.log("hub")[-2000:])

        until(lambda event, rounds: rounds)
        control.pause(fed.state("b"))
        rounds = until(
            lambda event, rounds: (
                event["sites"]["b"]["unable"] == "paused" and rounds[-3:] == [("a", "c", "d")] * 3
            )
        )
        assert rounds
        jobs = fed.jobs()
        assert jobs["sites"]["b"]["unable"] == "paused" and not jobs["sites"]["b"]["connected"]
        end = time.monotonic() + PATIENCE
        while "paused by its operator" not in fed.status("b")["away"]:
            assert time.monotonic() < end
            time.sleep(0.05)

        control.resume(fed.state("b"))
        until(lambda event, rounds: ("a", "b", "c", "d") in rounds)
        assert fed.jobs()["sites"]["b"]["unable"] == ""

        veto_job(fed.state("c"), job)
        until(
            lambda event, rounds: (
                event["sites"]["c"]["unable"] == "vetoed" and rounds[-3:] == [("a", "b", "d")] * 3
            )
        )
        assert fed.jobs()["sites"]["c"]["connected"], "it leaves one job, not the federation"
        fed.stop_job(job)
