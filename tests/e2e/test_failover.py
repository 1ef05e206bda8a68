"""A standby takes over from a coordinator that is killed, or paused, in the middle of a round, and a restart of the
database is waited for: real processes, and the journal on a PostgreSQL server.

On a busy machine a coordinator may be kept for six seconds from renewing its lease, and is then replaced before
anybody pauses it. So the leases last longer here, and the test ends one when the product's would end by itself.
"""

from __future__ import annotations

import json
import signal
import time
from functools import partial

from deployment import HUB, LISTENS, PATIENCE, STANDBY, deployment, small_task
from support.postgres import PASSWORD

WAITS = "waiting to take over"
LONG = f"""
from fedcore.store.postgresql import PostgresqlDatabase
PostgresqlDatabase.open.__func__.__kwdefaults__["lease_seconds"] = {PATIENCE}
"""
END_LEASE = "UPDATE fedcore.leases SET expires = clock_timestamp() WHERE fence = {}"
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


def taken_over(fed, name, how, sql):
    """A job, in a round of which this coordinator got a signal, and the other one listens once its lease ended."""
    other = STANDBY if name == HUB else HUB
    fed.until(other, WAITS)
    job = fed.submit(**SETTINGS)
    fed.wait(job, until=trains)
    before, [(fence,)] = fed.log(other).count(LISTENS), sql("SELECT fence FROM fedcore.leases")
    fed.kill(name, how)
    end = time.monotonic() + PATIENCE
    while fed.log(other).count(LISTENS) <= before:
        assert fed.processes[other].poll() is None and time.monotonic() < end, fed.log(other)
        sql(END_LEASE.format(fence))  # again: a renewal may have been under way
        time.sleep(0.1)
    fed.port = fed.ports[other]
    return job


def test_a_standby_takes_over_and_the_round_goes_on(tmp_path, postgres):
    database, sites = postgres.database(), {"a": 1, "b": 2, "c": 3}
    sql = partial(postgres.sql, database)
    with deployment(
        tmp_path, small_task(tmp_path), sites, start=(), limits={"grace_seconds": PATIENCE},
        patches={HUB: LONG, STANDBY: LONG}, database=postgres.tcp(database),
    ) as fed:  # fmt: skip
        fed.add_standby()
        for name in (STANDBY, *sites):
            fed.start(name)

        job = taken_over(fed, HUB, signal.SIGSTOP, sql)
        fed.kill(HUB, signal.SIGCONT)
        assert fed.processes[HUB].wait(PATIENCE) == 3
        assert "found that another process took it over" in fed.log(HUB)
        assert fed.log(HUB).splitlines()[-1].startswith("hint: ")
        expected = fed.simulated(**SETTINGS)
        check(fed, job, expected, HUB, STANDBY)

        fed.start(HUB)  # it is the standby now
        job = taken_over(fed, STANDBY, signal.SIGKILL, sql)
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
