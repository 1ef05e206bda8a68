"""Algorithms under which sites keep something: deployed sites reach the model of the simulation, also when one dies.

And a frozen backbone, of which nothing travels."""

from __future__ import annotations

import asyncio
import json

import pytest
from town import HUB, SITES
from trained_town import TrainedTown

import fedcore
from fedcore.files import read_json
from fedcore.learning.model import single_thread
from fedcore.secagg.protocol.job_messages import InRound, TrainingOver

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


# ------------------------------------------------------------------ training that the sites end early

WORSE = LINES.replace(
    "task = Task(",
    '''
def train(module, rows, fit):
    """One step on all rows; site a's push the bias up from the third round on."""
    x, y = next(iter(rows.batches(len(rows), np.arange(len(rows)))))
    loss = ((module(x) - y) ** 2).mean()
    module.zero_grad()
    loss.backward()
    for parameter in module.parameters():
        parameter.data -= fit.lr * parameter.grad
    if fit.round >= 3 and fit.site == "a":
        module.bias.data += 2.5

task = Task(train=train, ''',
)
ENDING = SETTINGS | {
    "protection": "masked", "threshold": 3, "rounds": 8, "lr": 0.2, "range": 4.0,
    "adaptive_range": False, "bits": 20, "judge": "released", "keep": "best",
    "patience": 1,
}  # fmt: skip


@pytest.fixture
def ending(tmp_path):
    """(the path of a task, the result of its simulation), which ends early."""
    path = tmp_path / "lines.py"
    path.write_text(WORSE)
    with single_thread():
        run = fedcore.simulate(str(path), sites=SOURCES, out=tmp_path / "run", **ENDING).result
    assert run.rounds == 5 < ENDING["rounds"]
    return str(path), run


def played(folder, pool, path, **kill):
    """(the models of the sites, the rows of the coordinator, commits of site b) of a deployed job."""
    town = TrainedTown(folder, pool, path, ENDING, SOURCES)
    if kill.pop("deaf", False):  # the coordinator does not get the first word of any site
        lost = set()

        def passing(sender, receiver, message):
            if isinstance(message, TrainingOver) and sender not in lost:
                lost.add(sender)
                return InRound(message.job, message.site, b"-" * 32)
            return message

        town.passing = passing

    with single_thread():
        models, commits = asyncio.run(town.play(**kill))
    file = folder / HUB / "jobs" / "job" / "rounds.jsonl"
    return models, [json.loads(line) for line in file.read_text().splitlines()], commits


@pytest.mark.parametrize("deaf", [False, True])
def test_deployed_sites_end_training_where_the_simulation_does(tmp_path, pool, ending, deaf):
    """deaf: a round is announced that no site joins, and the job ends after it all the same."""
    path, run = ending
    models, rows, _ = played(tmp_path / "town", pool, path, deaf=deaf)
    assert models == {run.model_sha256}
    released = [(row["purpose"], row["round"]) for row in rows if row["survivors"]]
    assert released == [("update", k) for k in range(1, 6)]
    assert any(not row["survivors"] for row in rows) is deaf


def test_a_site_that_dies_ends_training_with_the_others(tmp_path, pool, ending):
    path, run = ending
    _, _, commits = played(tmp_path / "whole", pool, path)
    models, rows, _ = played(tmp_path / "killed", pool, path, at=commits - 2, late=True)
    assert models == {run.model_sha256}
    assert rows[-1]["round"] == 5
