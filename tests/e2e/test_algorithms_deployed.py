"""Algorithms under which sites keep something: deployed sites reach the model of the simulation, also when one dies.

And a frozen backbone, of which nothing travels."""

from __future__ import annotations

import asyncio

import pytest
from town import SITES
from trained_town import TrainedTown

import fedcore
from fedcore.files import read_json
from fedcore.learning.model import single_thread

LINES = """
import numpy as np
from torch import nn
from fedcore import Task

def data(name):
    random = np.random.default_rng(ord(name))
    x = random.normal(size=(20, 3)).astype("f4")
    return x, (x @ (np.array([1, -2, 0.5]) + 0.3 * (ord(name) - 98))).astype("f4").reshape(-1, 1)

task = Task(name="lines", data=data, model=lambda: nn.Linear(3, 1), loss=nn.MSELoss(), metrics=("rmse",))
"""
SETTINGS = {
    "protection": "encrypted", "threshold": 4, "rounds": 4, "max_examples": 32, "lr": 0.05, "epochs": 2,
    "batch_size": 8, "resamples": 0, "arms": ("federated",),
}  # fmt: skip
SOURCES = {name: name for name in SITES}
KEEPING = {
    "scaffold": {"algorithm": "scaffold"},
    "ditto": {"algorithm": "ditto"},
    "layers that stay": {"local_parameters": ["bias"]},
    "feddyn": {"algorithm": "feddyn", "feddyn_alpha": 1.0},
}


@pytest.mark.parametrize("case", KEEPING)
def test_a_deployed_site_keeps_what_a_simulated_one_does_and_finds_it_after_its_death(
    tmp_path, pool, case
):
    """Site b dies at a commit of its journal in the midst of the job."""
    settings, task = SETTINGS | KEEPING[case], tmp_path / "lines.py"
    task.write_text(LINES)

    def look(found):
        assert found.kept("b")[0]

    def play(folder, **kill):
        town = TrainedTown(folder, pool, str(task), settings, SOURCES)
        return asyncio.run(town.play(**kill))

    with single_thread():
        run = fedcore.simulate(str(task), sites=SOURCES, out=tmp_path / "run", **settings)
        models, commits = play(tmp_path / "whole", look=look)
        assert models == {run.result.model_sha256}
        models, _ = play(tmp_path / "killed", at=commits // 2, late=True)
        assert models == {run.result.model_sha256}


def test_deployed_sites_with_a_frozen_backbone_reach_the_model_of_the_simulation(tmp_path, pool):
    """The vector has the head's 5 parameters; each site makes the backbone from the seed."""
    settings = SETTINGS | {"frozen_parameters": ["0.*"]}
    path = tmp_path / "lines.py"
    path.write_text(
        LINES.replace("nn.Linear(3, 1)", "nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))")
    )
    with single_thread():
        run = fedcore.simulate(str(path), sites=SOURCES, out=tmp_path / "run", **settings)
        assert read_json(tmp_path / "run" / "plan.json")["coordinates"] == 5
        town = TrainedTown(tmp_path / "town", pool, str(path), settings, SOURCES)
        models, _ = asyncio.run(town.play())
    assert models == {run.result.model_sha256}
