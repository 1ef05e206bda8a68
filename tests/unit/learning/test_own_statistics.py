"""`buffers = "local"`: statistics of normalisation layers are each site's own, of each released model."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import fedcore
from fedcore.config import build_job
from fedcore.errors import BadInput
from fedcore.experiment.loop import run_experiment
from fedcore.experiment.prepare import job_for, prepare
from fedcore.learning.data.rows import ArrayRows
from fedcore.learning.model import FlatModel
from fedcore.learning.own_statistics import use_own_statistics
from fedcore.learning.saved import load_model
from fedcore.learning.task import Task

PLAIN = {"protection": "plain", "resamples": 0, "lr": 0.1}
SHIFTS = {"a": 0.0, "b": 8.0, "c": -6.0}


def shifted(source):
    """The same two classes at every site, and other units of measurement."""
    shift = SHIFTS[source]
    random = np.random.default_rng(int(abs(shift)))
    y = np.arange(100) % 2
    x = random.normal(size=(100, 4)) + 3.0 * y[:, None] * [1, 1, 0, 0]
    return (x * (1 + abs(shift) / 10) + shift).astype("f4"), y


def alike(source):
    random = np.random.default_rng(ord(source))
    y = np.arange(100) % 2
    return (random.normal(size=(100, 4)) + 3.0 * y[:, None] * [1, 1, 0, 0]).astype("f4"), y


class Recurrent(nn.Module):
    """Channels over time, normalised along each row; a buffer of its own beside the statistics."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.out = norm, nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        if self.training:
            self.seen += 1
        return self.out(self.norm(x))


MODELS = {
    "first layer": lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)),
    "two layers": lambda: nn.Sequential(
        nn.BatchNorm1d(4), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)
    ),
    "cumulative": lambda: nn.Sequential(nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 2)),
    "without weights": lambda: Recurrent(nn.BatchNorm1d(4, affine=False)),
    "lazy": lambda: nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(4, 2)),
}


def task(model="two layers", data=shifted, **changes):
    given = {
        "name": "units", "data": data, "model": MODELS.get(model, model),
        "loss": nn.CrossEntropyLoss(), "sites": {name: name for name in SHIFTS},
    }  # fmt: skip
    return Task(**given | changes)


def result(made, **settings):
    return run_experiment(prepare(*job_for(made, PLAIN | settings)), None)[1]


@pytest.mark.parametrize("model", MODELS)
def test_under_a_shift_local_statistics_restore_what_averaged_ones_lose(model):
    """And a run with averaged ones warns of the cause."""
    arms = ("federated_float", "federated")
    averaged, local = (
        result(task(model), buffers=buffers, rounds=8, arms=arms)
        for buffers in ("average", "local")
    )
    for arm in arms:
        reached = [site.arms[arm]["accuracy"] for site in local.per_site.values()]
        assert min(reached) >= 0.9, reached
        assert local.arms[arm]["accuracy"] > averaged.arms[arm]["accuracy"] + 0.1
    assert any("BatchNorm) do not fit" in line for line in averaged.warnings)
    assert not any("BatchNorm) do not fit" in line for line in local.warnings)


@pytest.mark.parametrize("data", [alike, shifted])
@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.Identity(), nn.BatchNorm1d(4)])
def test_the_warning_needs_a_shift_and_statistics(data, norm):
    made = task(lambda: nn.Sequential(copy.deepcopy(norm), nn.Linear(4, 2)), data)
    warnings = result(made, rounds=12, arms=("federated",)).warnings
    warned = any("BatchNorm) do not fit" in line for line in warnings)
    assert warned is (data is shifted and isinstance(norm, nn.BatchNorm1d))


def test_a_task_that_evaluates_itself_is_not_asked_for_the_warning():
    """Its batches may fit its own loops only."""

    def train(model, data, fit):
        for x, _ in data.batches(fit.batch_size, None):
            model.train()(x[:, :4])

    def evaluate(model, data):
        return {"right": (1.0, 2.0)}

    def wide(source):
        x, y = shifted(source)
        return np.concatenate([x, x], axis=1), y

    made = task("first layer", wide, train=train, evaluate=evaluate, metrics=("right",))
    found = result(made, rounds=1, arms=("federated",))
    assert not any("BatchNorm) do not fit" in line for line in found.warnings)


def rows(count, seed=0):
    random = np.random.default_rng(seed)
    x = torch.from_numpy(random.normal(2.0, 3.0, size=(count, 4)).astype("f4"))
    return ArrayRows(x, torch.from_numpy(random.integers(0, 2, count)))


def estimated(module, some):
    use_own_statistics(task(), module, some, seed=0, site="a")
    return module


@pytest.mark.parametrize("count", [2, 50, 1024])
def test_statistics_of_one_batch_are_those_of_the_rows(count):
    some = rows(count)
    norm = estimated(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)), some)[0]
    torch.testing.assert_close(norm.running_mean, some.x.mean(0))
    torch.testing.assert_close(norm.running_var, some.x.var(0))
    assert norm.momentum == 0.1 and not norm.training and int(norm.num_batches_tracked) == 0


def test_more_rows_than_one_batch_are_averaged_and_a_lone_last_row_sits_out():
    for count in (1025, 3000, 9000):
        some = rows(count)
        norm = estimated(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 2)), some)[0]
        torch.testing.assert_close(norm.running_mean, some.x.mean(0), atol=0.2, rtol=0)
        torch.testing.assert_close(norm.running_var, some.x.var(0), atol=0.5, rtol=0)


def test_layers_that_stay_in_evaluation_mode_and_other_buffers_are_left_alone():
    class Frozen(nn.BatchNorm1d):
        def train(self, mode=True):
            return super().train(False)

    module = nn.Sequential(Frozen(4), Recurrent(nn.BatchNorm1d(4)))
    estimated(module, rows(40))
    assert (module[0].running_mean == 0).all() and (module[0].running_var == 1).all()
    assert (module[1].norm.running_mean != 0).all() and float(module[1].seen) == 0


def test_dropout_is_off_while_statistics_are_made():
    with_dropout = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(4), nn.Linear(4, 2))
    some = rows(60)
    torch.testing.assert_close(estimated(with_dropout, some)[1].running_mean, some.x.mean(0))


def test_only_statistics_stay_and_other_floating_buffers_travel():
    flat = FlatModel(Recurrent(nn.BatchNorm1d(4)), "local")
    assert (flat.parameters, flat.buffer_coordinates) == (8 + 10, 1)
    assert flat.policy == (
        "2 statistics of normalisation layers are each site's own; "
        "1 floating buffers averaged with the parameters; 1 integer buffers keep their initial values"
    )
    assert FlatModel(nn.Linear(4, 2), "local").policy == "no buffers"
    instance = FlatModel(
        nn.Sequential(nn.InstanceNorm1d(4, track_running_stats=True), nn.Linear(4, 2)), "local"
    )
    assert instance.buffer_coordinates == 0


@pytest.mark.usefixtures("no_drawings")
def test_each_model_of_a_run_has_the_statistics_of_its_site_and_the_shared_one_their_mean(tmp_path):
    made = task("first layer")
    run = fedcore.simulate(
        made, out=tmp_path / "run", buffers="local", rounds=2, arms=("federated",), **PLAIN
    )
    prepared = prepare(*job_for(made, PLAIN | {"buffers": "local", "rounds": 2}))
    own = {}
    for site in prepared.sites:
        saved = load_model(tmp_path / "run" / f"model-{site.id}.safetensors", made)
        own[site.id] = saved.module[0].running_mean
        torch.testing.assert_close(own[site.id], site.train.x.mean(0))
        accuracy = (saved.predict(site.test.x).argmax(1) == site.test.y.numpy()).mean()
        assert accuracy == run.result.per_site[site.id].arms["federated"]["accuracy"]
    mean = torch.stack(list(own.values())).mean(0)
    torch.testing.assert_close(load_model(tmp_path / "run", made).module[0].running_mean, mean)
    assert any("model-SITE.safetensors" in line for line in run.result.warnings)
    assert not list(tmp_path.glob("*.safetensors"))


def test_what_leaves_a_site_has_no_statistics_of_its_rows():
    prepared = prepare(*job_for(task("first layer"), PLAIN | {"buffers": "local"}))
    plan, state = prepared.plan, prepared.federation.state
    assert (plan.buffer_coordinates, plan.server.buffers) == (0, "local")
    files = {site.exported(state, public=True) for site in prepared.federation.sites}
    assert len(files) == 1
    assert len({site.exported(state) for site in prepared.federation.sites}) == 3


def test_a_model_for_the_coordinator_is_refused():
    asked = {"buffers": "local", "release": "coordinator", "protection": "layered"}
    with pytest.raises(
        BadInput, match=r"^round\.buffers: found 'local' with protect\.release"
    ) as no:
        build_job(asked)
    assert "fed-site model" in no.value.remedy


def test_a_train_of_the_tasks_own_finds_the_sites_statistics():
    seen = {}

    def own(model, data, fit):
        seen.setdefault(fit.site, model[0].running_mean.clone())

    made = task("first layer", train=own)
    prepared = prepare(*job_for(made, PLAIN | {"buffers": "local"}))
    state = prepared.federation.state
    for site in prepared.federation.sites:
        site.train(prepared.plan, state, 1)
    for site in prepared.sites:
        torch.testing.assert_close(seen[site.id], site.train.x.mean(0))
