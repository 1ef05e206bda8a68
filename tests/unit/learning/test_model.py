"""A module and its flat vector: every kind of module survives the round trip."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from fedcore.errors import BadInput, UnknownName
from fedcore.learning import model as flat
from fedcore.learning.model import FlatModel, build_model, model_summary, seeded, single_thread
from fedcore.seeds import derive_seed


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.out = nn.Linear(3, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        return self.out(self.embed(x))


def frozen():
    module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    module[0].requires_grad_(False)
    return module


KINDS = {
    "linear": lambda: nn.Linear(5, 2),
    "scalar parameter": nn.PReLU,
    "batch norm": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)),
    "lstm": lambda: nn.LSTM(3, 5),
    "tied": Tied,
    "frozen": frozen,
    "half": lambda: nn.Linear(5, 2).half(),
    "double": lambda: nn.Linear(5, 2).double(),
    "transformer": lambda: nn.TransformerEncoderLayer(8, 2, 16),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("policy", ["average", "initial"])
def test_write_is_the_inverse_of_read(kind, policy):
    module = KINDS[kind]()
    flat = FlatModel(module, policy)
    before = flat.read()
    assert before.dtype == np.float32 and before.shape == (flat.coordinates,)
    other = FlatModel(KINDS[kind](), policy)
    other.write(before)
    np.testing.assert_array_equal(other.read(), before)
    moved = before + np.float32(0.5)
    other.write(moved)
    again = other.read()
    other.write(again)
    np.testing.assert_array_equal(other.read(), again)


def test_read_is_a_copy():
    flat = FlatModel(nn.Linear(2, 1))
    vector = flat.read()
    vector[:] = 7
    assert not (flat.read() == 7).any()


def test_tied_parameters_count_once():
    assert FlatModel(Tied()).coordinates == 21


def test_frozen_parameters_stay_and_the_policy_says_so():
    flat = FlatModel(frozen())
    assert flat.coordinates == 3 * 2 + 2
    assert "15 frozen parameters" in flat.policy


def test_frozen_parameters_that_a_site_changed_go_back():
    module = nn.Sequential(frozen(), nn.BatchNorm1d(2))
    flat = FlatModel(module, "initial")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    start = flat.read()
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            tensor.add_(1)
    flat.write(start)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_buffer_policies_are_stated():
    average = FlatModel(KINDS["batch norm"](), "average")
    initial = FlatModel(KINDS["batch norm"](), "initial")
    assert average.coordinates - initial.coordinates == average.buffer_coordinates == 8
    assert "2 floating buffers averaged" in average.policy
    assert "1 integer buffers keep" in average.policy
    assert "keep their initial values" in initial.policy
    assert FlatModel(nn.Linear(1, 1)).policy == "no buffers"
    with pytest.raises(UnknownName, match=r"round\.buffers"):
        FlatModel(nn.Linear(1, 1), "averaged")


def test_a_vector_of_another_length_is_refused():
    with pytest.raises(BadInput, match="found 3 coordinates, expected 2"):
        FlatModel(nn.Linear(1, 1)).write(np.zeros(3, np.float32))


def test_a_model_without_parameters_is_refused():
    with pytest.raises(BadInput, match="no trainable parameter"):
        FlatModel(nn.ReLU())


def make(width, seed=0):
    def first_pass(module):
        module(torch.ones(2, width))

    return build_model(
        lambda: nn.Sequential(nn.LazyLinear(3), nn.Dropout(), nn.LazyLinear(1)), seed, first_pass
    )


def test_initial_values_come_from_the_seed_alone():
    torch.manual_seed(1)
    a = FlatModel(make(4)).read()
    torch.manual_seed(2)
    torch.rand(100)
    b = FlatModel(make(4)).read()
    np.testing.assert_array_equal(a, b)
    assert (FlatModel(make(4, seed=1)).read() != a).any()


def test_seeding_is_torch_s_own_and_keeps_nothing(monkeypatch):
    """On a machine without an accelerator torch.manual_seed would keep its call stack, each time."""
    state = torch.random.get_rng_state()
    torch.manual_seed(derive_seed(3, 1, "a", "train"))
    expected, kept = torch.randn(5), len(torch.cuda._queued_calls)
    torch.random.set_rng_state(state)
    with seeded(3, 1, "a", "train"):
        assert torch.equal(torch.randn(5), expected)
    assert torch.equal(torch.random.get_rng_state(), state)
    if not torch.accelerator.is_available():
        assert len(torch.cuda._queued_calls) == kept
    monkeypatch.setattr(flat, "_accelerated", lambda: True)
    with seeded(3, 1, "a", "train"):
        assert torch.equal(torch.randn(5), expected)


def test_building_leaves_the_caller_s_generators_alone():
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(3), np.random.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    make(4)
    with seeded(0, 1, "a", "train"):
        torch.rand(1), np.random.rand(1)
    assert torch.equal(torch.rand(3), expected[0])
    np.testing.assert_array_equal(np.random.rand(3), expected[1])


@pytest.mark.parametrize("drawn", [0, 1, 2, 311, 624, 1000])
@pytest.mark.parametrize("inside", [0, 1, 700])
def test_seeding_leaves_numpy_where_it_was_and_the_normal_value_it_keeps(drawn, inside):
    """Normal values are made in pairs; 624 words are made at once."""
    for extra in (0, 1):
        np.random.seed(7)
        np.random.rand(drawn), np.random.standard_normal(extra)
        before = np.random.get_state(legacy=False)
        assert before["has_gauss"] == extra
        with seeded(0, 1, "a", "train"):
            np.random.standard_normal(inside)
            inner = np.random.get_state(legacy=False)
            with seeded(0, 2, "a", "train"):
                np.random.standard_normal(3)
            after = np.random.get_state(legacy=False)
            assert str(after) == str(inner)
            np.testing.assert_array_equal(after["state"]["key"], inner["state"]["key"])
        after = np.random.get_state(legacy=False)
        assert str(after) == str(before)
        np.testing.assert_array_equal(after["state"]["key"], before["state"]["key"])


def test_seeding_refuses_another_generator_in_numpys_place():
    before = np.random.mtrand.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(1))
    try:
        with pytest.raises(TypeError, match="found PCG64"), seeded(0, 1, "a", "train"):
            pass
    finally:
        np.random.set_bit_generator(before)


@pytest.mark.parametrize("wrong", [3, None, "model"])
def test_a_model_function_must_return_a_module(wrong):
    with pytest.raises(BadInput, match="expected a torch"):
        build_model(lambda: wrong, 0, lambda _: None)


def test_an_estimator_is_refused_with_the_linear_hint():
    from sklearn.linear_model import LogisticRegression

    with pytest.raises(BadInput, match="LogisticRegression") as caught:
        build_model(LogisticRegression, 0, lambda _: None)
    assert "fedcore.linear" in caught.value.remedy


def test_one_thread_inside_and_the_caller_s_number_after():
    before = torch.get_num_threads()
    with single_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_summaries():
    assert model_summary(FlatModel(nn.Linear(20, 1))) == "Linear 20 -> 1"
    assert model_summary(FlatModel(frozen())) == "Sequential, 8 parameters"


def test_layers_that_were_handed_out_before_are_refused():
    net, part, activation = nn.Linear(3, 2), nn.Linear(3, 3), nn.ReLU()
    frozen = nn.Linear(3, 3).requires_grad_(False)
    kept = [build_model(lambda: net, 0, lambda _: None)]
    with pytest.raises(BadInput, match="layers of a Linear that it returned before"):
        build_model(lambda: net, 0, lambda _: None)
    kept.append(build_model(lambda: nn.Sequential(part, nn.Linear(3, 2)), 0, lambda _: None))
    with pytest.raises(BadInput, match="layers of a Sequential"):
        build_model(lambda: nn.Sequential(nn.Sequential(part), activation), 0, lambda _: None)
    shared = lambda: nn.Sequential(frozen, activation, nn.Linear(3, 2))  # noqa: E731
    kept += [build_model(shared, 0, lambda _: None) for _ in range(2)]  # it trains nothing of these
    assert len(kept) == 4
