"""A job of real processes whose sites have their keys and journals encrypted at rest, and are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from deployment import HUB, PATIENCE, SMALL, deployment, small_task

from fedcore.identity.kit import read_key

CONNECTED = "connected to "
"""Of a site's log, once it has a session."""

PASSPHRASE = "correct horse battery staple"
SEES = SMALL.replace(
    "    random =",
    "    import os, sys\n    print('variable', 'SITE_PASSPHRASE' in os.environ, file=sys.stderr)\n    random =",
)


@pytest.mark.slow
def test_a_job_with_encrypted_sites_survives_a_kill_and_leaves_no_secret(tmp_path):
    with deployment(
        tmp_path, small_task(tmp_path, SEES), start=(), env={"SITE_PASSPHRASE": PASSPHRASE}
    ) as fed:
        (tmp_path / "mounted").mkdir()
        mounted = tmp_path / "mounted" / "passphrase"
        mounted.touch(0o600)
        mounted.write_text(PASSPHRASE)
        ways = {"a": "env:SITE_PASSPHRASE", "b": f"file:{mounted}", "c": f"command:cat {mounted}"}
        bodies = []
        for name, unlock in ways.items():
            home = fed.home(name)
            bodies += [
                path.read_bytes().splitlines()[1]
                for path in (home / "identity.pem", home / "kit" / "key.pem")
            ]
            with fed.config(name).open("a") as config:
                config.write(f'[keystore]\nunlock = "{unlock}"\n')
            done = subprocess.run(
                [sys.executable, "-P", "-m", "fedcore_clients.cli", "keystore", "encrypt",
                 "--config", str(fed.config(name))],
                env={**os.environ, **fed.env}, check=True, capture_output=True,
            )  # fmt: skip
            bodies.append(PASSPHRASE.encode())
            assert PASSPHRASE.encode() not in done.stdout + done.stderr
        for name in fed.sites:
            fed.start(name)
        fed.connected()
        job = fed.submit(rounds=20)
        fed.wait(job, lambda event: event["rounds_done"] >= 1)
        for name in ("a", "b"):
            before = fed.log(name).count(CONNECTED)
            fed.kill(name, signal.SIGKILL)
            fed.processes[name].wait(PATIENCE)
            fed.start(name)
            fed.until(name, CONNECTED, before)
            # A site that restarts leaves its round, and two that leave one are more than four sites survive. The
            # round that begins after the next release waits for this site; once it is released, the other is killed.
            done = fed.wait(job, bool)[-1]["rounds_done"]
            fed.wait(job, lambda event, done=done: event["rounds_done"] >= done + 2)
        assert fed.wait(job)[-1]["state"] == "finished"
        fed.released(job)
        assert "variable False" in fed.log("a") and "variable True" not in fed.log("a")
        for name in (*fed.sites, HUB):
            fed.stop(name)
        assert read_key(fed.home("d") / "identity.pem")  # control: a site without a keystore
        for path in sorted(tmp_path.rglob("*")):
            if path.is_file() and path != mounted:
                data = path.read_bytes()
                assert not [each for each in bodies if each in data], path
