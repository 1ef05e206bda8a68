"""A frozen backbone: neither trained nor sent, in any arm, and in the released model."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

import fedcore
from fedcore.config import build_job
from fedcore.errors import BadInput, UnknownName
from fedcore.experiment.loop import Experiment
from fedcore.experiment.prepare import job_for, prepare
from fedcore.files import read_json
from fedcore.learning.model import FlatModel
from fedcore.learning.saved import load_model
from fedcore.learning.task import Task
from fedcore.secagg.label import Terms
from fedcore.secagg.purposes import leaving

ROWS = {"a": 40, "b": 24, "c": 16}
BODY = ("body.*",)
USUAL = {"rounds": 3, "max_examples": 64, "resamples": 0, "lr": 0.1, "batch_size": 8}


class Network(nn.Module):
    """A backbone with BatchNorm, and a head of 2 * 6 + 2 = 14 parameters."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
        self.head = nn.Linear(6, 2)
        self.body[1].running_mean += 0.5

    def forward(self, x):
        return self.head(self.body(x))


def data(name):
    random = np.random.default_rng(ord(name))
    x = random.normal(size=(ROWS[name], 4)).astype("f4")
    return x, (x[:, 0] > 0).astype("i8")


def task(**changes):
    given = {
        "name": "frozen", "data": data, "model": Network, "loss": nn.CrossEntropyLoss(),
        "metrics": ("accuracy",), "sites": {name: name for name in ROWS},
    }  # fmt: skip
    return Task(**given | changes)


def body_of(module):
    return {n: v for n, v in module.state_dict().items() if n.startswith("body")}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def test_only_the_head_is_in_the_vector_and_the_backbone_goes_back():
    module = Network()
    before = copy.deepcopy(body_of(module))
    flat = FlatModel(module, frozen_parameters=BODY)
    assert (flat.coordinates, flat.buffer_coordinates) == (14, 0)
    assert (
        "42 frozen parameters stay" in flat.policy and "2 buffers of frozen layers" in flat.policy
    )
    assert "1 integer buffers" in flat.policy
    with torch.no_grad():
        for tensor in body_of(module).values():
            tensor.add_(1)
    flat.write(flat.read())
    assert same(body_of(module), before)


def test_frozen_statistics_are_used_in_training_also_by_a_copy_and_after_a_write():
    flat = FlatModel(Network(), frozen_parameters=BODY)
    flat.write(flat.read())
    for module in (flat.module, copy.deepcopy(flat.module)):
        module.train()
        assert module.head.training and not module.body[1].training
        x = torch.randn(5, 4)
        together, alone = module(x), torch.cat([module(row[None]) for row in x])
        torch.testing.assert_close(together, alone)  # no row depends on its batch
    assert FlatModel(Network()).module.body[1].training


def test_each_site_may_keep_the_statistics_that_are_not_frozen():
    module = nn.Sequential(Network(), nn.BatchNorm1d(2))
    flat = FlatModel(module, "local", frozen_parameters=("0.body.*",))
    assert "2 statistics of normalisation layers are each site's own" in flat.policy
    assert flat.coordinates == 14 + 4


@pytest.mark.parametrize(
    ("patterns", "error", "words"),
    [
        (("tail.*",), UnknownName, "train.frozen_parameters: found 'tail.*'"),
        (("*",), BadInput, "train.frozen_parameters: found all parameters of the model in *"),
    ],
)
def test_patterns_that_leave_nothing_or_name_nothing_are_refused(patterns, error, words):
    with pytest.raises(error, match=re.escape(words)):
        FlatModel(Network(), frozen_parameters=patterns)


def test_what_is_frozen_can_not_stay_at_a_site_as_well():
    with pytest.raises(UnknownName, match="local_parameters"):
        FlatModel(Network(), local_parameters=("body.0.*",), frozen_parameters=BODY)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """{protection: a run's folder, its result} of the four arms with a frozen backbone."""
    made, folder = task(), tmp_path_factory.mktemp("runs")
    return {
        protection: (
            folder / protection,
            fedcore.simulate(
                made, out=folder / protection, protection=protection, frozen_parameters="body.*",
                **USUAL,
            ).result,
        )
        for protection in ("plain", "masked")
    }  # fmt: skip


def test_protected_and_plain_give_the_same_model_which_has_the_seeds_backbone_and_a_trained_head(
    runs,
):
    assert len({result.model_sha256 for _, result in runs.values()}) == 1
    start = Experiment(prepare(*job_for(task(), USUAL | {"protection": "plain"})))
    start.prepared.flat.write(start.federation.sites[0].initial)
    for folder, _ in runs.values():
        released = load_model(folder, task()).module
        assert same(body_of(released), body_of(start.prepared.flat.module))
        assert not torch.equal(released.head.weight, start.prepared.flat.module.head.weight)


def test_the_plan_and_the_label_count_the_head_only(runs):
    plan = read_json(runs["masked"][0] / "plan.json")
    assert (plan["parameters"], plan["buffer_coordinates"]) == (14, 0)
    assert plan["train"]["frozen_parameters"] == ["body.*"]
    job = build_job({"frozen_parameters": "body.*"})
    (update,) = [s for s in leaving(job, Terms.of_job(job, 3)) if s.startswith("update")]
    assert "the parameters of the model but for body.*, " in update


def test_no_arm_trains_the_backbone_whatever_a_tasks_own_train_does():
    def own(module, rows, fit):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.25)

    settings = USUAL | {"protection": "plain", "frozen_parameters": BODY, "rounds": 2}
    for made in (task(), task(train=own)):
        found = Experiment(prepare(*job_for(made, settings)))
        found.prepared.flat.write(found.federation.sites[0].initial)
        before = copy.deepcopy(body_of(found.prepared.flat.module))
        for _ in found.rounds():
            pass
        found.prepared.flat.write(found.federated.state.server.model)
        assert same(body_of(found.prepared.flat.module), before)
        if made.train is None:
            for arm in ("centralised", "local_only"):
                for model in found.arms[arm]._own:
                    assert same(body_of(model.module), before)
