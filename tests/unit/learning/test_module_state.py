"""What a module keeps beside its parameters' and buffers' values is restored before each use."""

from __future__ import annotations

import random
import threading
from collections import deque

import numpy as np
import pytest
import torch
from torch import nn

from fedcore.errors import BadInput
from fedcore.learning.data.rows import ArrayRows
from fedcore.learning.model import FlatModel
from fedcore.learning.module_state import is_plain
from fedcore.learning.task import Task
from fedcore.learning.training import OwnModel, local_train
from fedcore.secagg.plan import TrainPlan

ROWS = ArrayRows(
    torch.randn(12, 4, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 2
)
PLAN = TrainPlan(lr=0.1, batch_size=4)


class Keeping(nn.Module):
    """A linear layer whose output depends on what `kind` leaves on the module in training."""

    def __init__(self, kind=""):
        super().__init__()
        self.lin, self.norm = nn.Linear(4, 2), nn.BatchNorm1d(2)
        self.register_buffer("mean", torch.zeros(2))
        self.kind, self.seen, self.cache = kind, 0, {"rows": []}
        self.recent, self.scale = deque(maxlen=3), torch.ones(2)
        self.hidden = [nn.BatchNorm1d(2)]  # not registered: torch does not see it
        self.own = random.Random(1), np.random.default_rng(1), torch.Generator().manual_seed(1)
        self.parts = [self.lin]
        self.lock = threading.Lock()  # nothing can copy it

    def forward(self, x):
        if self.training:
            KINDS[self.kind](self, x)
        hidden = self.hidden[0] if hasattr(self, "hidden") else nn.Identity()
        scale = (
            (1 + self.seen / 10)
            * self.scale
            * (1 + len(self.cache["rows"]))
            * (1 + len(self.recent))
        )
        return self.norm(hidden(self.lin(x)) * scale) + self.mean + getattr(self, "added", 0)


def count(module, _):
    module.seen += 1


def freeze_later(module, _):
    module.seen += 1
    module.lin.requires_grad_(module.seen < 2)


def draw(module, _):
    first, second, third = module.own
    module.seen += first.random() + second.random() + float(torch.rand(1, generator=third))


def put_hook(module, _):
    module.lin.register_forward_hook(lambda _m, _x, out: out * 1.5)


def double(parameter):
    parameter.grad.mul_(2)


def put_gradient_hooks(module, _):
    module.lin.weight.register_hook(lambda gradient: gradient * 1.5)
    module.lin.bias.register_post_accumulate_grad_hook(double)


def parametrize(module, _):
    if not nn.utils.parametrize.is_parametrized(module.norm):
        nn.utils.parametrize.register_parametrization(module.norm, "bias", nn.Tanh())


KINDS = {
    "counter": count,
    "cache": lambda module, x: module.cache["rows"].append(x),
    "deque": lambda module, x: module.recent.append(float(x.sum())),
    "tensor": lambda module, _: module.scale.mul_(1.5),
    "array": lambda module, _: setattr(module, "seen", np.float64(module.seen) + 1),
    "new attribute": lambda module, _: setattr(module, "added", getattr(module, "added", 0) + 1),
    "generators": draw,
    "unregistered layer": lambda module, _: setattr(
        module, "added", float(module.hidden[0].num_batches_tracked)
    ),
    "buffer assigned": lambda module, _: setattr(module, "mean", module.mean + 0.1),
    "forward hook": put_hook,
    "gradient hooks": put_gradient_hooks,
    "frozen": freeze_later,
    "layer replaced": lambda module, _: setattr(module, "extra", nn.Linear(1, 1)),
    "method replaced": lambda module, _: setattr(module.lin, "forward", lambda x: x[:, :2]),
}


def task(kind=""):
    return Task("kept", lambda source: source, lambda: Keeping(kind), nn.functional.cross_entropy)


def trained(kind, flat, start, site="a", **changes):
    flat.write(start)
    given = {"seed": 0, "round_": 1, "rounds": 4, "site": site} | changes
    local_train(task(kind), flat.module, ROWS, PLAN, **given)
    return flat.read()


@pytest.mark.parametrize("kind", KINDS)
def test_what_one_training_leaves_does_not_reach_the_next(kind):
    torch.manual_seed(2)
    flat = FlatModel(Keeping(kind))
    start = flat.read()
    first = trained(kind, flat, start)
    second = trained(kind, flat, start)
    np.testing.assert_array_equal(first, second)
    assert (first != start).any()


def test_without_restoring_it_does():
    """Each kind above would change the second training, but for those that change it from the first step on."""
    silent = set()
    for kind in KINDS:
        torch.manual_seed(2)
        flat = FlatModel(Keeping(kind))
        start = flat.read()
        first = trained(kind, flat, start)
        flat._state.restore = lambda: None
        try:
            second = trained(kind, flat, start)
        except (RuntimeError, BadInput):
            continue
        if (first == second).all():
            silent.add(kind)
    assert silent <= {"layer replaced", "method replaced"}


def test_shared_values_stay_shared_and_layers_stay_the_same():
    module = Keeping("cache")
    module.also = module.cache
    flat = FlatModel(module)
    trained("cache", flat, flat.read())
    flat.write(flat.read())
    assert module.also is module.cache and module.cache == {"rows": []}
    assert module.parts[0] is module.lin and isinstance(module.lock, type(threading.Lock()))


def test_precision_gradients_and_modes_go_back():
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    module[1].eval()
    flat = FlatModel(module)
    start = flat.read()
    module.double()
    module(torch.ones(2, 4, dtype=torch.double)).sum().backward()
    module.train()
    flat.write(start)
    assert {p.dtype for p in [*module.parameters()]} == {torch.float32}
    assert module[1].running_mean.dtype == torch.float32
    assert all(p.grad is None for p in module.parameters())
    assert [layer.training for layer in module] == [True, False, True]
    np.testing.assert_array_equal(flat.read(), start)


def test_a_parametrization_that_training_adds_is_refused_and_gone_afterwards():
    module = Keeping()
    flat = FlatModel(module)
    start, kind = flat.read(), type(module.norm)
    parametrize(module, None)
    with pytest.raises(
        BadInput, match=r"found norm\.bias gone after training, expected shape \(2,\)"
    ):
        flat.read()
    flat.write(start)
    assert type(module.norm) is kind
    np.testing.assert_array_equal(flat.read(), start)


def test_a_replaced_parameter_counts_and_another_shape_is_refused():
    module = nn.Linear(4, 2)
    flat = FlatModel(module)
    module.weight = nn.Parameter(torch.full((2, 4), 3.0))
    assert (flat.read()[:8] == 3).all()
    module.weight = nn.Parameter(torch.zeros(3, 4))
    with pytest.raises(BadInput, match=r"found weight of shape \(3, 4\) after training"):
        flat.read()


def alone(kind, *without):
    torch.manual_seed(2)
    module = Keeping(kind)
    for name in ("lock", *without):
        delattr(module, name)
    flat = FlatModel(module)
    return OwnModel(task(kind), flat, flat.read(), PLAN, 4)


def test_a_model_trained_alone_keeps_its_attributes_also_over_a_resume():
    whole, begun, resumed = (alone("counter", "hidden") for _ in range(3))
    for round_ in (1, 2):
        whole.train(ROWS, seed=0, round_=round_, site="a")
    begun.train(ROWS, seed=0, round_=1, site="a")
    resumed.restore(begun.save())
    resumed.train(ROWS, seed=0, round_=2, site="a")
    assert whole.module.seen == resumed.module.seen == 6
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name]), name


def test_attributes_that_no_checkpoint_can_have_are_named_at_the_resume():
    one = alone("deque")
    one.train(ROWS, seed=0, round_=1, site="a")
    with pytest.raises(BadInput, match="keeps hidden, recent from round to round") as refused:
        one.restore(one.save())
    assert "register_buffer" in refused.value.remedy


@pytest.mark.parametrize(
    ("value", "plain"),
    [(1, True), ([1.0, "a", (None,)], True), ({"a": torch.ones(1)}, True), ({1}, False), ([np.ones(1)], False)],
)  # fmt: skip
def test_plain_values(value, plain):
    assert is_plain(value) is plain
