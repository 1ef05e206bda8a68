"""Whether two calls of a task's `model()` make the same module, attributes beside parameters and buffers included."""

from __future__ import annotations

import itertools
import math
import random
import threading
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import nn

import fedcore
from fedcore.cli.main import main
from fedcore.config import build_job
from fedcore.errors import BadInput
from fedcore.experiment.prepare import prepare
from fedcore.learning.model import build_model
from fedcore.learning.module_state import attribute_that_differs

pytestmark = pytest.mark.usefixtures("no_drawings")


@dataclass
class Options:
    rate: float
    names: list[str] = field(default_factory=list)


def with_attribute(value):
    """A function that makes a module with the attribute `kept` of the inner layer: what `value(module)` returns."""

    def make():
        module = nn.Sequential(nn.Linear(3, 2), nn.Identity())
        module[1].kept = value(module)
        return module

    return make


def differs(make):
    one, other = (build_model(make, 0, lambda module: None) for _ in range(2))
    return attribute_that_differs(one, other)


COUNT = itertools.count()


@pytest.mark.parametrize(
    "value",
    [
        lambda module: next(COUNT),
        lambda module: random.Random().sample(range(1000), 9),
        lambda module: {"order": {"deep": random.Random().random()}},
        lambda module: np.random.default_rng().normal(size=4),
        lambda module: torch.rand(4, generator=fresh_torch()),
        lambda module: (1, Options(random.Random().random())),
        lambda module: np.random.default_rng(),
        lambda module: np.random.default_rng().normal,
        lambda module: {str(random.Random().random()) for _ in range(3)},
        lambda module: closure(random.Random().random()),
        lambda module: frozenset({next(COUNT)}),
        lambda module: math.nan if next(COUNT) % 2 else 0.0,
    ],
    ids=["int", "list", "dict", "array", "tensor", "object", "generator", "method", "set", "closure", "frozenset",
         "nan"],
)  # fmt: skip
def test_an_attribute_that_differs_is_named(value):
    assert differs(with_attribute(value)) == "1.kept"


def fresh_torch():
    generator = torch.Generator()
    generator.seed()
    return generator


def closure(factor):
    def scaled(x):
        return factor * x

    return scaled


def made_here(value):
    class Local:
        def __init__(self):
            self.value = value

    return Local()


def in_a_circle(value):
    found = [value]
    found.append(found)
    return found


@pytest.mark.parametrize(
    "value",
    [
        lambda module: [random.random(), np.random.rand(), float(torch.rand(1))],  # the run seeds these
        lambda module: np.random.default_rng(3),
        lambda module: [module[0], module[0].weight],
        lambda module: lambda x: x + 1,
        lambda module: closure(2.0),
        lambda module: module.forward,
        lambda module: threading.Lock(),
        lambda module: [math.nan, torch.full((2,), math.nan), np.full(2, math.nan), -0.0],
        lambda module: made_here([1, {2}]),
        lambda module: type(made_here(0)),
        lambda module: in_a_circle("text"),
        lambda module: {object()},  # nothing tells them apart
        lambda module: Options(0.1, ["a"]),
        lambda module: nn.functional.relu,
    ],
    ids=[
        "global generators", "seeded", "own layers", "lambda", "closure", "bound method", "lock", "nan", "local class",
        "class", "circle", "set of objects", "dataclass", "function",
    ],
)  # fmt: skip
def test_attributes_of_equal_meaning_are_equal(value):
    assert differs(with_attribute(value)) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.LSTM(3, 2, num_layers=2),
        lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)),
        lambda: nn.MultiheadAttention(4, 2),
        lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5)),
    ],
    ids=["lstm", "transformer", "weight norm", "attention", "convolution"],
)
def test_torchs_own_layers_are_equal(make):
    assert differs(make) is None


def test_layers_and_their_options_that_differ_are_named():
    dropout = lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout(random.Random().random()))  # noqa: E731
    assert differs(dropout) == "1.p"
    turns = itertools.count()
    kinds = lambda: nn.Sequential(nn.Linear(3, 2), (nn.ReLU, nn.Tanh)[next(turns) % 2]())  # noqa: E731
    assert differs(kinds) == "1"
    longer = lambda: nn.Sequential(*[nn.Identity() for _ in range(next(turns))])  # noqa: E731
    assert differs(longer) is not None


def task_of(make):
    def data(source):
        r = np.random.default_rng(source)
        y = r.integers(0, 2, 30)
        return (r.normal(size=(30, 3)) + y[:, None]).astype("f4"), y

    return fedcore.Task(
        "calls", data, make, nn.functional.cross_entropy, sites={"a": 1, "b": 2, "c": 3},
        defaults={"rounds": 1, "protection": "plain"},
    )  # fmt: skip


def test_a_run_warns_of_it_once_with_its_name_and_a_remedy():
    task = task_of(with_attribute(lambda module: next(COUNT)))
    (found,) = prepare(task, build_job(task.defaults)).findings
    assert found[0] == (
        "task.model: found another value of 1.kept in a second call: random or unset state between two model() calls"
    )
    assert "which the run seeds" in found[1]
    same = task_of(with_attribute(lambda module: [1, 2]))
    assert prepare(same, build_job(same.defaults)).findings == []


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("size", [lambda: 3, lambda: next(COUNT)], ids=["values", "shape"])
def test_a_buffer_that_differs_is_refused_whether_or_not_it_is_saved(persistent, size):
    def make():
        module = nn.Linear(3, 2)
        values = torch.randint(0, 1000, (5 + size(),), generator=fresh_torch())
        module.register_buffer("order", values, persistent=persistent)
        return module

    task = task_of(make)
    with pytest.raises(BadInput, match="found other initial values of order in a second call"):
        prepare(task, build_job(task.defaults))


TASK = """
import itertools
import numpy as np
import torch
import fedcore

calls = itertools.count()

def data(source):
    r = np.random.default_rng(source)
    y = r.integers(0, 2, 30)
    return (r.normal(size=(30, 3)) + y[:, None]).astype("f4"), y

def model():
    module = torch.nn.Linear(3, 2)
    module.call = next(calls)
    return module

task = fedcore.Task("calls", data, model, torch.nn.functional.cross_entropy, sites={"a": 1, "b": 2, "c": 3})
"""


def test_check_says_so_on_its_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.py").write_text(TASK)
    with pytest.raises(SystemExit) as ended:
        main(["check", "task.py", "--protection", "plain"])
    assert not ended.value.code
    said = " ".join("".join(capsys.readouterr()).split())
    assert "found another value of call in a second call" in said
