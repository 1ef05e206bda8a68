"""A standby takes over from a coordinator that is killed, or paused, in the middle of a round, and a restart of the
database is waited for: real processes, and the journal on a PostgreSQL server."""

from __future__ import annotations

import json
import signal
import time

from deployment import HUB, LISTENS, PATIENCE, STANDBY, deployment, small_task
from support.postgres import PASSWORD

WAITS = "waiting to take over"
SETTINGS = {"protection": "masked", "rounds": 20}


def rounds(fed, job, name):
    path = fed.state(name) / "jobs" / job / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def trains(event):
    """Whether an event is in the middle of a round of training, after a release."""
    return event["rounds_done"] >= 1 and event["stage"] == "collecting"


def check(fed, job, expected, first, second):
    """Every round once, with every site, and the model of a run without any failure."""
    assert fed.wait(job)[-1]["state"] == "finished"
    assert set(fed.released(job).values()) == {expected}
    before, rows = rounds(fed, job, first), rounds(fed, job, second)
    assert [row["number"] for row in rows] == [*range(1, len(rows) + 1)]
    assert all(row["survivors"] == list(fed.sites) for row in rows)
    assert 1 <= len(before) < len(rows) and rows[: len(before)] == before


def taken_over(fed, name, how):
    """(a job, seconds from a signal to this coordinator in the middle of its round until the other one listens)."""
    other = STANDBY if name == HUB else HUB
    fed.until(other, WAITS)
    job = fed.submit(**SETTINGS)
    fed.wait(job, until=trains)
    before = fed.log(other).count(LISTENS)
    fed.kill(name, how)
    since = time.monotonic()
    fed.until(other, LISTENS, before)
    fed.port = fed.ports[other]
    return job, time.monotonic() - since


def test_a_standby_takes_over_within_ten_seconds_and_the_round_goes_on(tmp_path, postgres):
    url, sites = postgres.tcp(postgres.database()), {"a": 1, "b": 2, "c": 3}
    limits = {"grace_seconds": PATIENCE}
    with deployment(
        tmp_path, small_task(tmp_path), sites, start=(), limits=limits, database=url
    ) as fed:
        fed.add_standby()
        for name in (STANDBY, *sites):
            fed.start(name)

        job, seconds = taken_over(fed, HUB, signal.SIGSTOP)
        assert seconds < 10
        fed.kill(HUB, signal.SIGCONT)
        assert fed.processes[HUB].wait(PATIENCE) == 3
        assert "found that another process took it over" in fed.log(HUB)
        assert fed.log(HUB).splitlines()[-1].startswith("hint: ")
        expected = fed.simulated(**SETTINGS)
        check(fed, job, expected, HUB, STANDBY)

        fed.start(HUB)  # it is the standby now
        job, seconds = taken_over(fed, STANDBY, signal.SIGKILL)
        assert seconds < 10
        check(fed, job, expected, STANDBY, HUB)

        job = fed.submit(**SETTINGS)
        fed.wait(job, until=trains)
        postgres.stop()
        postgres.start()  # within the lease: the coordinator reads its journal again and goes on
        assert fed.wait(job)[-1]["state"] == "finished"
        assert set(fed.released(job).values()) == {expected}
        assert {row["state"] for row in fed.jobs()["jobs"]} == {"finished"}
        assert (fed.result(job, tmp_path / "result") / "job.toml").read_bytes()
    logs = "".join(path.read_text() for path in fed.folder.glob("*.log"))
    assert PASSWORD not in logs and "Traceback" not in logs
