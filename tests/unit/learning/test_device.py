"""`device`: where a simulation trains. Without a GPU here, torch's device `meta` shows what is moved, and no value."""

from __future__ import annotations

from collections import UserDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import fedcore
from fedcore.config import build_job, read_settings, wire_settings
from fedcore.config.unsupported import refuse_unsupported
from fedcore.errors import BadInput
from fedcore.learning.data.rows import ArrayRows, DatasetRows
from fedcore.learning.device import moved, require_device, rows_beside
from fedcore.learning.task import Task
from fedcore.learning.training import Sgd, predict
from fedcore.secagg.plan import TrainPlan, canonical

META = torch.device("meta")


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


def task(**changes):
    given = {
        "name": "t", "data": lambda source: source, "model": lambda: nn.Linear(3, 2),
        "loss": nn.functional.cross_entropy,
    }  # fmt: skip
    return Task(**given | changes)


@pytest.mark.parametrize("name", ["cuda", "mps"])
@pytest.mark.parametrize("call", [fedcore.simulate, fedcore.compare])
def test_a_device_that_is_not_there_is_refused_by_its_name(name, call, tmp_path):
    if (torch.cuda if name == "cuda" else torch.backends.mps).is_available():
        pytest.skip(f"this machine has {name}")
    with pytest.raises(
        BadInput, match=rf"^device: found '{name}', which torch .* does not find"
    ) as no:
        call("heart", device=name, out=tmp_path / "run")
    assert 'device = "cpu"' in no.value.remedy
    assert not (tmp_path / "run").exists()


def test_the_names_of_devices_are_a_closed_list():
    with pytest.raises(BadInput, match="device: found 'gpu', expected 'cpu', 'cuda' or 'mps'"):
        build_job({"device": "gpu"})
    assert require_device("cpu") == torch.device("cpu")


def test_a_deployment_refuses_a_gpu_and_the_setting_stays_on_this_machine():
    settings = wire_settings(build_job({"device": "cuda"}))
    assert "device" not in settings
    for name in ("cuda", "mps"):
        with pytest.raises(
            BadInput, match=rf"^device: found '{name}', expected 'cpu' in a deployment"
        ):
            refuse_unsupported(build_job({"device": name}).to_json(), "deployment")
        with pytest.raises(BadInput, match="expected 'cpu' in a deployment"):
            read_settings(canonical(settings | {"device": name}))
    assert read_settings(canonical(settings)) == settings


class Encoding(UserDict):
    """As the batches of tokenisers are: a mapping that moves itself."""

    def to(self, device):
        return Encoding({key: value.to(device) for key, value in self.items()})


def tensors(batch):
    if isinstance(batch, torch.Tensor):
        return [batch]
    parts = batch.values() if hasattr(batch, "values") else batch
    return [tensor for part in parts if not isinstance(part, str) for tensor in tensors(part)]


X, Y = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y), [X, Y], Pair(X, Y), {"x": X, "label": Y}, ((X, {"mask": Y}), [Y]),
        Encoding(x=X, label=Y), {"x": X, "names": ["a", "b", "c", "d"]},
    ],
)  # fmt: skip
def test_every_form_of_a_batch_is_moved_and_keeps_its_form(batch):
    found = moved(batch, META)
    assert type(found) is type(batch)
    assert len(tensors(found)) == len(tensors(batch)) > 0
    assert {tensor.device.type for tensor in tensors(found)} == {"meta"}
    assert {tensor.device.type for tensor in tensors(batch)} == {"cpu"}


@pytest.mark.parametrize("own", [None, lambda model, batch: (model(batch[0]), batch[1])])
def test_predict_gets_batches_on_the_device_of_the_model(own):
    for device in ("cpu", "meta"):
        module = nn.Linear(3, 2).to(device)
        outputs, targets = predict(task(predict=own), module, (X, Y))
        assert outputs.device.type == targets.device.type == device
    batch = (X, Y)
    assert predict(task(predict=lambda _, same: (same, Y)), nn.Linear(3, 2), batch)[0] is batch


def test_the_arrays_of_a_tasks_own_loop_are_on_the_device_of_the_model():
    rows = ArrayRows(X, Y)
    there = rows_beside(nn.Linear(3, 2).to(META), rows)
    assert [part.device.type for part in next(iter(there.batches(2, None)))] == ["meta", "meta"]
    assert [part.device.type for part in next(iter(there.batches(2, np.array([1, 0]))))] == [
        "meta"
    ] * 2
    assert rows_beside(nn.Linear(3, 2), rows) is rows
    dataset = DatasetRows(TensorDataset(X, Y), "a")
    assert rows_beside(nn.Linear(3, 2).to(META), dataset) is dataset


def test_the_state_of_an_optimiser_is_loaded_to_where_the_parameters_are():
    module = nn.Linear(3, 2)
    before = Sgd(list(module.parameters()), TrainPlan(momentum=0.9))
    module(X).sum().backward()
    before.step()
    there = Sgd(list(nn.Linear(3, 2).to(META).parameters()), TrainPlan(momentum=0.9))
    there.load_state_dict(before.state_dict())
    assert [found["momentum_buffer"].device.type for found in there.state_dict()["state"].values()] == [
        "meta", "meta",
    ]  # fmt: skip
