"""`jobs = "ask"` with real processes: a job waits at a site until its operator's word, and goes on with it.

The word given while no process runs is in tests/unit/clients/test_approvals.py.
"""

from __future__ import annotations

import json
import subprocess
import time

from deployment import PATIENCE, deployment, small_task
from support.preloaded import preloaded


def fed_site(fed, name, *words):
    """(exit status, stdout, stderr) of a command at a site."""
    done = subprocess.run(
        [preloaded().python, "-P", "-m", "fedcore_clients.cli", *words, "--config", fed.config(name)],
        capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def waits(fed, name, job):
    end = time.monotonic() + PATIENCE
    while True:
        rows = {row["job"]: row for row in fed.status(name)["jobs"]}
        if job in rows and rows[job]["approval"] == "waiting":
            return rows[job]
        assert time.monotonic() < end, (rows, fed.log(name)[-2000:])
        time.sleep(0.1)


def test_a_job_waits_at_a_site_until_its_operator_approves_it(tmp_path):
    with deployment(tmp_path, small_task(tmp_path), start=[]) as fed:
        path = fed.config("a")
        path.write_text(path.read_text().replace("[policy]", '[policy]\njobs = "ask"'))
        for name in fed.sites:
            fed.start(name)
        fed.connected()
        job = fed.submit(rounds=2)
        row = waits(fed, "a", job)
        assert row["label"][0].startswith("Protects against: ") and row["leaves"]
        assert f"job {job}: label: {row['label'][0]}" in fed.log("a")

        code, text, _ = fed_site(fed, "a", "jobs")
        assert code == 0 and f"job {job}: waiting for approval" in text
        code, _, error = fed_site(fed, "a", "approve", f"{job}x")
        assert code == 2 and "hint: did you mean" in error

        code, text, _ = fed_site(fed, "a", "approve", job)
        assert code == 0 and row["leaves"][0] in text
        fed.wait(job)
        fed.released(job)
        assert f"job {job}: approved" in fed.log("a")
        code, text, _ = fed_site(fed, "a", "jobs", "--json")
        assert json.loads(text)["jobs"][0]["approval"] == "approved"
