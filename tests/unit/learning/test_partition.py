from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from fedcore.errors import BadInput, UnknownName
from fedcore.learning.data.loading import load_rows
from fedcore.learning.data.partition import group, site_id, split
from fedcore.learning.task import Task


def numbered(labels):
    return np.arange(len(labels))[:, None].astype(float), np.asarray(labels)


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=80),
    st.integers(1, 12),
    st.sampled_from(["iid", "dirichlet", "label", "quantity", "features"]),
    st.floats(1e-3, 100),
    st.integers(0, 1000),
)
def test_parts_are_disjoint_cover_and_hold_something(labels, n, by, alpha, seed):
    assume(len(labels) >= (2 * n if by == "label" else n))
    drawn = alpha if by in {"dirichlet", "quantity"} else None
    parts = split(numbered(labels), n, by=by, alpha=drawn, seed=seed)
    assert list(parts) == [f"site-{i + 1:02d}" for i in range(n)]
    assert all(len(x) for x, _ in parts.values())
    assert sorted(int(i) for x, _ in parts.values() for i in x[:, 0]) == list(range(len(labels)))
    assert all((np.asarray(labels)[x[:, 0].astype(int)] == y).all() for x, y in parts.values())


def test_the_seed_decides():
    data = numbered([0, 1] * 20)
    assert all(
        np.array_equal(a[0], b[0])
        for a, b in zip(split(data, 3).values(), split(data, 3, seed=0).values(), strict=True)
    )
    assert not np.array_equal(split(data, 3)["site-01"][0], split(data, 3, seed=1)["site-01"][0])


def test_small_alpha_is_one_sided_and_large_alpha_even():
    data = numbered([0] * 500 + [1] * 500)

    def spread(alpha):
        parts = split(data, 4, by="dirichlet", alpha=alpha, seed=1)
        return np.std([np.mean(y) for _, y in parts.values()])

    assert spread(0.1) > 0.2
    assert spread(1000) < 0.05


def test_quantity_gives_sizes_that_differ_and_classes_that_do_not():
    parts = split(numbered([0, 1] * 500), 4, by="quantity", alpha=0.5, seed=1)
    sizes = sorted(len(y) for _, y in parts.values())
    assert sizes[-1] > 5 * sizes[0]
    assert all(abs(np.mean(y) - 0.5) < 0.1 for _, y in parts.values() if len(y) > 200)


def test_features_gives_each_site_a_range_of_inputs_of_its_own():
    random = np.random.default_rng(0)
    x = random.normal(size=(120, 3)) * [0.1, 0.1, 5.0]
    parts = split((x, random.integers(0, 2, 120)), 3, by="features")
    ranges = sorted((part[:, 2].min(), part[:, 2].max()) for part, _ in parts.values())
    assert all(high < low + 0.2 for (_, high), (low, _) in pairwise(ranges))
    with pytest.raises(BadInput, match="expected arrays") as refused:
        split(TensorDataset(torch.zeros(6, 2)), 3, by="features")
    assert "fedcore.group" in refused.value.remedy


def test_label_shards_show_few_classes():
    parts = split(numbered(np.repeat(np.arange(10), 20)), 10, by="label")
    assert max(len(set(y.tolist())) for _, y in parts.values()) <= 3


def test_kinds_come_back_as_they_came():
    pd = pytest.importorskip("pandas")
    x, y = numbered([0, 1, 0, 1, 1, 0])
    tensors = split((torch.tensor(x), torch.tensor(y)), 2, by="label")
    assert all(isinstance(part[0], torch.Tensor) for part in tensors.values())
    dataset = TensorDataset(torch.tensor(x), torch.tensor(y))
    assert sum(len(p) for p in split(dataset, 2, by="dirichlet", alpha=1).values()) == 6
    frame = pd.DataFrame({"x": x[:, 0], "kind": ["a", "b"] * 3})
    parts = split(frame, 2, by="label", label="kind")
    assert all(list(part.columns) == ["x", "kind"] for part in parts.values())
    assert sum(map(len, split(frame, 3).values())) == 6


def test_hugging_face_parts():
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_dict({"i": list(range(8)), "label": [0, 1] * 4})
    parts = split(whole, 3, by="dirichlet", alpha=0.5)
    assert sorted(i for part in parts.values() for i in part["i"]) == list(range(8))


def test_parts_are_sources_of_a_task():
    task = Task(name="t", data=lambda part: part, model=lambda: None, loss=lambda o, t: o)
    for by in ("iid", "label"):
        for name, part in split(numbered([0, 1] * 6), 3, by=by).items():
            assert len(load_rows(task, part, name)[0]) == 4


X, Y = numbered([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: split((X, Y), 2, by="skew"), UnknownName),
        (lambda: split((X, Y), 2, by="dirichlet"), BadInput),
        (lambda: split((X, Y), 2, by="dirichlet", alpha=0), BadInput),
        (lambda: split((X, Y), 2, by="iid", alpha=1), BadInput),
        (lambda: split((X, Y), 5), BadInput),
        (lambda: split((X, Y), 3, by="label"), BadInput),
        (lambda: split((X, Y), 0), BadInput),
        (lambda: split((X, Y[:3]), 2), BadInput),
        (lambda: split((X, Y + 0.5), 2, by="label"), BadInput),
        (lambda: split((X.tolist(), Y), 2), BadInput),
        (lambda: split("heart", 2), BadInput),
        (lambda: split(DataLoader(TensorDataset(torch.tensor(X))), 2), BadInput),
        (lambda: split(TensorDataset(torch.tensor(X)), 2, by="label"), BadInput),
        (lambda: group({"hospital": ["a"]}, by="hospital"), BadInput),
    ],
)
def test_refusals(call, kind):
    with pytest.raises(kind) as caught:
        call()
    assert "found" in str(caught.value)


def test_group_cuts_at_a_column():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"hospital": ["VA Long Beach", "Ägypt!", "VA Long Beach"], "x": [1, 2, 3]})
    parts = group(frame, by="hospital")
    assert list(parts) == ["gypt", "va-long-beach"]
    assert parts["va-long-beach"]["x"].tolist() == [1, 3]


def test_group_refusals():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"hospital": ["a b", "A-B", None], "x": [1, 2, 3]})
    with pytest.raises(UnknownName, match="hospitl"):
        group(frame, by="hospitl")
    with pytest.raises(BadInput, match="1 rows without a value"):
        group(frame, by="hospital")
    with pytest.raises(BadInput, match="both make the site id 'a-b'"):
        group(frame.dropna(), by="hospital")
    with pytest.raises(BadInput, match="0 rows"):
        group(frame.iloc[:0], by="hospital")


@given(st.one_of(st.text(), st.integers(), st.floats(allow_nan=False)))
def test_site_ids_are_safe(value):
    assert set(site_id(value)) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert site_id(value)


@pytest.mark.parametrize(
    ("value", "safe"), [("VA Long Beach", "va-long-beach"), (3.0, "3"), ("//", "site")]
)
def test_site_id_examples(value, safe):
    assert site_id(value) == safe
