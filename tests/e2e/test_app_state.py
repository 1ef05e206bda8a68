"""A Flower app's Context.state at deployed sites: kept through the death of a process, and erased with the job."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("flwr")

from support.flower_apps import MOMENTUM, flower_app
from town import SITES
from trained_town import TrainedTown

import fedcore
from fedcore.learning.model import single_thread

SETTINGS = {
    "protection": "encrypted", "rounds": 3, "bits": 16, "range": 4.0, "adaptive_range": False, "max_examples": 16,
    "resamples": 0,
}  # fmt: skip
SOURCES = {name: {"partition-id": k, "num-partitions": 4} for k, name in enumerate(SITES)}


@pytest.mark.parametrize("large", [False, True], ids=["in the journal", "in a file"])
def test_state_survives_the_death_of_a_site_and_gives_the_model_of_the_simulation(
    tmp_path, pool, large
):
    """Site b dies before and after commits of its journal: a round that it trains again starts from the state before
    that round, so that no momentum is added twice."""
    app = flower_app(
        tmp_path / "app",
        client=MOMENTUM.replace("LENGTH = 2", f"LENGTH = {20_000 if large else 2}"),
    )
    task = f"flower:{app}"

    def look(found):
        kept, files = found.kept("b")
        assert kept
        assert len(files) in ((1, 2) if large else (0,))

    def play(folder, **kill):
        return asyncio.run(TrainedTown(folder, pool, task, SETTINGS, SOURCES).play(**kill))

    with single_thread():
        run = fedcore.simulate(task, sites=SOURCES, out=tmp_path / "run", **SETTINGS)
        models, commits = play(tmp_path / "whole", look=look)
        assert models == {run.result.model_sha256}
        for at in (commits // 3, commits // 2 + large):
            models, _ = play(tmp_path / str(at), at=at, late=bool(at % 2))
            assert models == {run.result.model_sha256}, at
