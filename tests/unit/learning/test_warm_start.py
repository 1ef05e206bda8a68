"""Warm start: `initial` names a released model, with which every arm of a simulation begins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fedcore_server.operators import prepare as submitted
from torch import nn

import fedcore
from fedcore.config import build_job, read_job_file, read_settings, wire_settings
from fedcore.errors import BadInput
from fedcore.experiment.arms import Alone
from fedcore.experiment.loop import Experiment
from fedcore.experiment.prepare import job_for, prepare
from fedcore.learning.guard import GuardRules
from fedcore.learning.saved import FILE, model_bytes
from fedcore.learning.state import model_digest
from fedcore.learning.task import Task
from fedcore.secagg.plan import canonical

PLAIN = {"protection": "plain", "rounds": 2, "resamples": 0, "lr": 0.1}


def data(source):
    random = np.random.default_rng(source)
    x = random.normal(size=(40, 3)).astype("f4")
    return x, (x.sum(axis=1) > 0).astype(int)


class Net(nn.Module):
    """Trained, frozen and integer tensors."""

    def __init__(self, hidden=4):
        super().__init__()
        self.body, self.norm = nn.Linear(3, hidden), nn.BatchNorm1d(hidden)
        self.frozen, self.head = nn.Linear(hidden, hidden), nn.Linear(hidden, 2)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        return self.head(self.frozen(self.norm(self.body(x))))


def task(model=Net, **changes):
    given = {
        "name": "warm", "data": data, "model": model, "loss": nn.CrossEntropyLoss(),
        "sites": {"a": 1, "b": 2, "c": 3},
    }  # fmt: skip
    return Task(**given | changes)


def written(folder, module, **changes):
    """A released model of this module, its file."""
    tensors = module.state_dict() | changes
    stand_in = nn.Module()
    stand_in.state_dict = lambda *_args, **_kwargs: {
        k: v for k, v in tensors.items() if v is not None
    }
    (folder / FILE).write_bytes(model_bytes(stand_in, task(), None, None))
    return folder / FILE


def start(path, made=None, **settings):
    return prepare(*job_for(made or task(), PLAIN | settings, {"initial": str(path)}))


@pytest.mark.usefixtures("no_drawings")
def test_every_arm_begins_with_the_model_of_a_run(tmp_path):
    run = fedcore.simulate(task(), out=tmp_path / "run", **PLAIN)
    for path in (tmp_path / "run", tmp_path / "run" / FILE):
        prepared = start(path, seed=7)
        assert prepared.plan.train.initial == run.result.model_sha256
        state = prepared.federation.state.server
        assert model_digest(state.model) == run.result.model_sha256
        expected = run.model.state_dict()
        for pooled in (prepared.pooled(), None):
            for own in Alone(prepared, prepared.sites, pooled)._own:
                found = own.module.state_dict()
                assert all(torch.equal(found[name], expected[name]) for name in expected)
    again = fedcore.simulate(task(), out=tmp_path / "again", initial=tmp_path / "run", **PLAIN)
    assert again.result.train["initial"] == run.result.model_sha256
    assert any("begin with a trained model" in line for line in again.result.warnings)
    assert "initial" not in run.result.train
    assert "begun with the released model " + run.result.model_sha256[:12] in (
        (tmp_path / "again" / "report.md").read_text()
    )


def test_frozen_parameters_and_buffers_come_from_the_file_too(tmp_path):
    module = Net()
    with torch.no_grad():
        module.frozen.weight.fill_(0.25)
        module.norm.running_mean.fill_(3.0)
        module.norm.num_batches_tracked.fill_(17)
    for buffers in ("average", "initial"):
        flat = start(written(tmp_path, module), buffers=buffers).flat
        flat.write(flat.read())
        assert all(
            torch.equal(value, module.state_dict()[name])
            for name, value in flat.module.state_dict().items()
        )


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"head.bias": None}, "no tensor head.bias, expected one"),
        ({"head.bias": None, "head.weight": None}, "no tensor head.weight, expected one (and 1 more)"),
        ({"tail.bias": torch.zeros(2)}, "a tensor tail.bias, expected none"),
        ({"head.weight": torch.zeros(3, 4)}, "(3, 4) in head.weight, expected (2, 4)"),
        ({"body.bias": torch.full((4,), float("nan"))}, "NaN or infinity in body.bias, expected finite numbers"),
        ({"norm.running_var": torch.full((4,), float("inf"))},
         "NaN or infinity in norm.running_var, expected finite numbers"),
    ],
)  # fmt: skip
def test_a_model_of_another_form_is_refused_by_the_name_of_the_tensor(tmp_path, changes, found):
    path = written(tmp_path, Net(), **changes)
    with pytest.raises(BadInput) as refused:
        start(path)
    assert str(refused.value) == f"initial: {path}: found {found}"
    assert refused.value.remedy


def test_a_file_that_holds_no_model_is_refused_by_its_name(tmp_path):
    with pytest.raises(BadInput, match=r"^initial: found no none\.safetensors in "):
        start(tmp_path / "none.safetensors")
    with pytest.raises(BadInput, match=rf"^initial: found no {FILE} in "):
        start(tmp_path)
    (tmp_path / "notes.txt").write_text("no tensors")
    with pytest.raises(BadInput, match=r"^initial: .*notes\.txt: found no model of Fedcore in it"):
        start(tmp_path / "notes.txt")


def columns(*names):
    pandas = pytest.importorskip("pandas")
    read = fedcore.table(target="ill", columns={name: fedcore.number(0, 10) for name in names})

    def rows(source):
        random = np.random.default_rng(source)
        frame = pandas.DataFrame({name: random.uniform(0, 10, 30) for name in names})
        return read(frame.assign(ill=np.arange(30) % 2))

    return task(data=rows, model=lambda: nn.Linear(len(names), 2))


@pytest.mark.usefixtures("no_drawings")
def test_a_model_of_other_columns_is_refused_with_the_first_that_differs(tmp_path):
    fedcore.simulate(columns("age", "bmi"), out=tmp_path / "run", **PLAIN)
    with pytest.raises(BadInput) as refused:
        start(tmp_path / "run", columns("age", "weight"))
    expected = "was trained on 2 columns with 'bmi', expected 2 columns with 'weight'"
    assert str(refused.value) == f"initial: {tmp_path / 'run'} {expected}"
    with pytest.raises(BadInput, match="2 columns in another order, expected 2 columns in another"):
        start(tmp_path / "run", columns("bmi", "age"))
    with pytest.raises(BadInput, match="2 columns with 'age', expected rows without columns"):
        start(tmp_path / "run", task(model=lambda: nn.Linear(3, 2)))


@pytest.mark.usefixtures("no_drawings")
def test_another_scale_than_the_models_is_a_warning(tmp_path):
    fedcore.simulate(columns("age", "bmi"), out=tmp_path / "run", **PLAIN)
    same = start(tmp_path / "run", columns("age", "bmi")).notes_on_start
    other = start(tmp_path / "run", columns("age", "bmi"), standardise="federated").notes_on_start
    assert len(same) == 1 and other[0] == same[0]
    assert other[1].startswith("The initial model was trained on numbers in another scale")


@pytest.mark.usefixtures("no_drawings")
def test_another_scale_of_the_targets_is_a_warning_too(tmp_path):
    def stays(**changes):
        def rows(source):
            x, y = data(source)
            return x, (y * 10.0).astype("f4")

        return task(
            data=rows, model=lambda: nn.Linear(3, 1), metrics=("mae",),
            loss=lambda outputs, targets: (outputs.squeeze(1) - targets).square().mean(), **changes,
        )  # fmt: skip

    fedcore.simulate(stays(target_range=(0, 20)), out=tmp_path / "run", **PLAIN)
    assert len(start(tmp_path / "run", stays(target_range=(0, 20))).notes_on_start) == 1
    for changes in ({"target_range": (0, 40)}, {}):
        _, scale = start(tmp_path / "run", stays(**changes)).notes_on_start
        assert scale.startswith("The initial model was trained on targets in another scale")


def test_the_path_counts_from_the_folder_of_the_job_file(tmp_path):
    (tmp_path / "job.toml").write_text('task = "heart"\ninitial = "runs/one"\n')
    job = build_job(read_job_file(tmp_path / "job.toml"))
    assert job.run.initial == str(tmp_path / "runs/one")


def test_a_deployment_refuses_it_and_no_path_leaves_the_machine(tmp_path):
    (tmp_path / "job.toml").write_text(f'task = "heart"\ninitial = "{tmp_path}"\n')
    job = read_job_file(tmp_path / "job.toml")
    refusal = rf"^initial: found '{tmp_path}', expected none in a deployment"
    with pytest.raises(BadInput, match=refusal):
        submitted(tmp_path, job, {})
    settings = wire_settings(build_job(job))
    assert "initial" not in settings
    assert read_settings(canonical(settings)) == settings
    with pytest.raises(BadInput, match=refusal):
        read_settings(canonical(settings | {"initial": str(tmp_path)}))


@pytest.mark.usefixtures("no_drawings")
def test_the_guard_holds_a_trained_start_against_an_untrained_model(tmp_path):
    """A good start asks no more of the rounds after it than the same model did in the run that made it."""
    fedcore.simulate(task(), out=tmp_path / "run", **PLAIN | {"rounds": 12})
    cold = Experiment(prepare(*job_for(task(), PLAIN))).federation
    warm = Experiment(start(tmp_path / "run")).federation
    for federation in (cold, warm):
        federation.judge()
    rules = GuardRules()
    for before, after in zip(cold.guards, warm.guards, strict=True):
        assert after.memory.first == before.memory.first
        assert after.memory.best < before.memory.best
        assert after.memory.most(rules) >= rules.loss_factor * 0.5 * before.memory.first
