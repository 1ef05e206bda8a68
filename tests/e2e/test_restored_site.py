"""A site that comes back without its folder: it takes part again as itself, and gets the model it missed."""

from __future__ import annotations

import shutil
import signal

import pytest
from deployment import deployment, small_task


@pytest.mark.slow
def test_a_site_that_lost_its_folder_is_taken_in_again(tmp_path):
    """docs/operations.md, Backup: identity and certificate are enough; no secret of a round is."""
    limits = {"gather_seconds": 3, "grace_seconds": 2, "stage_seconds": 20}
    with deployment(tmp_path, small_task(tmp_path), limits=limits) as fed:
        fed.connected()
        job = fed.submit(rounds=8)
        fed.wait(job, lambda event: event["rounds_done"] >= 2, seconds=80)
        fed.kill("b", signal.SIGKILL)
        fed.processes["b"].wait(10)
        shutil.rmtree(fed.state("b"))
        fed.start("b")
        events = fed.wait(job, seconds=120)
        assert events[-1]["state"] == "finished", events[-1]
        assert fed.released(job, seconds=40)
