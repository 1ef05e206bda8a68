"""What real processes write under umask 022, in folders that were 0755 before: for their user alone."""

from __future__ import annotations

import os
import stat

import pytest
from deployment import HUB, deployment, small_task


def open_below(folder):
    return {
        str(path.relative_to(folder))
        for path in [folder, *folder.rglob("*")]
        if not path.is_symlink() and path.stat().st_mode & 0o077
    }


@pytest.mark.slow
def test_every_file_of_a_site_and_a_coordinator_is_its_users_alone(tmp_path):
    """Real processes and a whole job, in which every kind of file is written."""
    before = os.umask(0o022)
    try:
        with deployment(tmp_path, small_task(tmp_path), start=()) as fed:
            fed.stop(HUB)
            for name in (HUB, *fed.sites):
                old = fed.state(name) / "jobs" / "old"
                old.mkdir(parents=True, exist_ok=True)
                (old / "rounds.jsonl").write_text("{}\n")
                for path in (fed.state(name), old.parent, old):
                    path.chmod(0o755)
            assert open_below(fed.state("a"))  # control: they were open
            fed.start_hub()
            for name in fed.sites:
                fed.start(name)
            fed.connected()
            job = fed.submit(rounds=2)
            assert fed.wait(job)[-1]["state"] == "finished"
            fed.released(job)
            for name in (HUB, *fed.sites):
                assert open_below(fed.state(name)) == set(), name
                assert "closed to all but this user" in fed.log(name)
                files = {path.name for path in fed.state(name).rglob("*")}
                assert "journal.sqlite" in files
                assert "rounds.jsonl" in files
            assert stat.S_IMODE((fed.state("a") / "status.json").stat().st_mode) == 0o600
    finally:
        os.umask(before)
