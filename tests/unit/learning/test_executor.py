"""Sites trained at once on stacked parameters: the updates of training one by one; what cannot be stacked is named."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import fedcore
from fedcore.errors import BadInput
from fedcore.experiment.prepare import job_for, prepare
from fedcore.learning.batched import chunk_size, train_many
from fedcore.learning.executor import TOLERANCE, Batched, Sequential

pytestmark = pytest.mark.usefixtures("no_drawings")

SITES = {"a": 4, "b": 14, "c": 31, "d": 40, "e": 13}
"""Rows of each: with batches of 10 a short one first, in the middle and none, and other numbers of steps."""


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def data(rows):
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, 6)).astype("f4")
    return x, (x[:, 0] + rng.normal(scale=0.3, size=rows) > 0).astype("i8")


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def make_task(**changes):
    given = {
        "name": "t", "data": data, "model": net, "loss": nn.CrossEntropyLoss(), "metrics": ("accuracy",),
    }  # fmt: skip
    return fedcore.Task(**given | changes)


def settings(**more):
    return {
        "sites": SITES, "rounds": 2, "batch_size": 10, "protection": "plain", "arms": ("federated",), "lr": 0.2,
        "folds": 4,
    } | more  # fmt: skip


def prepared(task=None, **more):
    return prepare(*job_for(task or make_task(), settings(**more)))


def both_ways(run, sites=None):
    """((k, d) updates and reports one by one, the same at once)."""
    sites, state = sites or run.federation.sites, run.federation.state
    alone = [(site.train(run.plan, state, 2), site.report) for site in sites]
    return tuple(zip(*alone, strict=True)), train_many(sites, run.plan, state, 2)


def _pairs(alone, together):
    return alone[0], together[0], alone[1], together[1]


def assert_same(alone, together):
    for one, other, a, b in zip(*_pairs(alone, together), strict=True):
        assert np.linalg.norm(one - other) <= 2e-5 * np.linalg.norm(one)
        assert (a.steps, a.examples) == (b.steps, b.examples)
        assert b.loss == pytest.approx(a.loss, rel=1e-4)


RULES = {
    "sgd": {},
    "two epochs": {"epochs": 2},
    "momentum and decay": {"momentum": 0.9, "weight_decay": 0.01},
    "adam": {"optimiser": "adam", "lr": 0.01},
    "adamw": {"optimiser": "adamw", "lr": 0.01, "weight_decay": 0.1, "epochs": 2},
    "fedprox": {"proximal_mu": 0.5, "epochs": 2},
    "clipped": {"max_grad_norm": 0.2},
    "schedule": {"lr_schedule": "cosine"},
    "batch larger than a site": {"batch_size": 64},
}


@pytest.mark.parametrize("rules", RULES)
def test_every_rule_gives_the_updates_of_training_one_by_one(rules):
    assert_same(*both_ways(prepared(**RULES[rules])))


def with_embedding():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2))


def numbers(rows):
    rng = np.random.default_rng(rows)
    x = rng.integers(0, 9, size=(rows, 3))
    return torch.from_numpy(x), torch.from_numpy((x[:, 0] > 4).astype("i8"))


class Frozen(nn.Module):
    def __init__(self):
        super().__init__()
        self.base, self.head = nn.Linear(6, 5), nn.Linear(5, 3)
        self.base.requires_grad_(False)
        self.register_buffer("shift", torch.ones(5))

    def forward(self, x):
        return self.head(torch.tanh(self.base(x) + self.shift))


def values(rows):
    x, _ = data(rows)
    return x, 50 + 30 * x[:, 0]


TASKS = {
    "embedding": {"data": numbers, "model": with_embedding},
    "frozen parameters and a buffer": {"model": Frozen},
    "group norm": {"model": lambda: nn.Sequential(nn.Linear(6, 8), nn.GroupNorm(2, 8), nn.Linear(8, 3))},
    "its own predict": {"predict": lambda model, batch: (model(batch[0] * 2), batch[1])},
    "a summed loss": {"loss": nn.CrossEntropyLoss(reduction="sum")},
    "a regression": {
        "data": values, "model": lambda: nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)),
        "loss": nn.MSELoss(), "metrics": ("mae",), "target_range": (0.0, 200.0),
    },
    "convolutions": {
        "data": lambda rows: (data(rows)[0].repeat(6, 1).reshape(rows, 1, 6, 6), data(rows)[1]),
        "model": lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)
        ),
    },
}  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_every_kind_of_model_and_loss_gives_the_updates_of_training_one_by_one(task):
    more = {"lr": 0.01} if task == "a summed loss" else {}
    assert_same(*both_ways(prepared(make_task(**TASKS[task]), **more)))


def test_the_sites_that_a_site_is_stacked_with_change_its_update_by_rounding_only():
    run = prepared()
    sites = run.federation.sites
    _, (whole, _) = both_ways(run)
    for some in ([0, 1], [4, 2, 3], [3]):
        _, (found, _) = both_ways(run, [sites[k] for k in some])
        np.testing.assert_allclose(found, whole[some], atol=1e-7)


def test_a_run_is_that_of_one_by_one_in_every_arm_and_states_how_it_trained():
    both = ("federated", "federated_float")
    alone, together = (
        fedcore.simulate(make_task(), **settings(executor=how, arms=both))
        for how in ("sequential", "batched")
    )
    for a, b in zip(alone.rounds, together.rounds, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=1e-3)
        assert b["gradient_steps"] == a["gradient_steps"]
    assert "executor" not in alone.result
    found = together.result["executor"]
    assert found["name"] == "batched" and found["difference"] < TOLERANCE
    assert found["chunk"] == chunk_size(83)


def test_auto_takes_one_of_the_two_and_an_interrupted_run_goes_on_with_it():
    found = fedcore.simulate(make_task(), **settings(executor="auto", protection="layered"))
    name = found.result["executor"]["name"]
    assert json.loads((found.directory / "job.json").read_text())["executor"] == name
    expected = {"batched": Batched, "sequential": Sequential}[name]
    again = prepared(executor=name).federation.executor
    assert type(again) is expected


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.gate = nn.Linear(6, 3), Gate()

    def forward(self, x):
        return self.gate(self.layer(x))


class Gate(nn.Module):
    def forward(self, x):
        return x if x.mean() > 0 else 2 * x


REFUSED = {
    "BatchNorm1d": {"model": lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))},
    "Dropout": {"model": lambda: nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, 2))},
    "the module gate (Gate)": {"model": Branches},
    "mean over its rows": {"loss": nn.CrossEntropyLoss(torch.tensor([0.1, 5.0, 1.0]))},
    "training loop of its own": {"train": lambda model, rows, fit: fit.lr},
    "read item by item": {
        "data": lambda rows: torch.utils.data.TensorDataset(*map(torch.as_tensor, data(rows)))
    },
}  # fmt: skip


@pytest.mark.parametrize("named", REFUSED)
def test_what_cannot_be_stacked_is_named_and_trained_one_by_one(named):
    task = make_task(**REFUSED[named])
    with pytest.raises(BadInput, match="executor: found 'batched', but") as refused:
        prepared(task, executor="batched")
    assert named in str(refused.value) and "auto" in refused.value.remedy
    run = prepared(task, executor="auto")
    assert type(run.federation.executor) is Sequential
    said = [text for text, _ in run.findings if "one after the other" in text]
    assert len(said) == 1 and named in said[0]


@pytest.mark.parametrize(
    ("more", "why"),
    [({"algorithm": "scaffold"}, "keeps values"), ({"local_parameters": "2.*"}, "keeps values")],
)
def test_algorithms_with_values_of_each_site_are_trained_one_by_one(more, why):
    with pytest.raises(BadInput, match=why):
        prepared(executor="batched", **more)
