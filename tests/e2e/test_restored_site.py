"""A site that comes back without its folder: it takes part again as itself, and gets the model it missed."""

from __future__ import annotations

import shutil
import signal

import pytest
from deployment import PATIENCE, deployment, small_task


@pytest.mark.slow
def test_a_site_that_lost_its_folder_is_taken_in_again(tmp_path):
    """docs/operations.md, Backup: identity and certificate are enough; no secret of a round is."""
    with deployment(tmp_path, small_task(tmp_path), limits={"grace_seconds": 2}) as fed:
        fed.connected()
        job = fed.submit(rounds=8)
        fed.wait(job, lambda event: event["rounds_done"] >= 2)
        fed.kill("b", signal.SIGKILL)
        fed.processes["b"].wait(PATIENCE)
        shutil.rmtree(fed.state("b"))
        fed.start("b")
        events = fed.wait(job)
        assert events[-1]["state"] == "finished", events[-1]
        assert fed.released(job)
