"""Sums of clipped gradients: two ways to take them, their sensitivity, and tasks that have none."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import fedcore
from fedcore.errors import BadInput
from fedcore.learning.data.groups import group_digests
from fedcore.learning.data.rows import ArrayRows
from fedcore.learning.model import FlatModel
from fedcore.learning.private_gradients import clipped, clipped_rows, clipped_sum


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3))


def task_of(**parts):
    return fedcore.Task(
        **{"name": "t", "data": lambda source: source, "model": net, "loss": nn.CrossEntropyLoss(), **parts}
    )  # fmt: skip


def rows_of(count=23, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return ArrayRows(
        torch.randn(count, 5, generator=draw) * 3, torch.randint(0, 3, (count,), generator=draw)
    )


def total_of(rows, clip=1.0, task=None, module=None, unit="record", **more):
    return clipped_sum(
        task or task_of(), module or net(), rows, clip=clip, unit=unit, seed=0, round_=1, site="a", **more
    )  # fmt: skip


def own_predict(model, batch):
    x, y = batch
    return model(x), y


def test_vectorised_gradients_are_those_of_rows_one_by_one():
    many, report = total_of(rows_of())
    single, other = total_of(rows_of(), task=task_of(predict=own_predict))
    assert np.allclose(many, single, rtol=1e-5, atol=1e-6)
    assert report.loss == pytest.approx(other.loss, rel=1e-6)


def test_without_clipping_the_sum_is_the_gradient_of_the_summed_loss():
    module, rows = net(), rows_of()
    nn.CrossEntropyLoss(reduction="sum")(module(rows.x), rows.y).backward()
    expected = torch.cat([p.grad.reshape(-1) for p in module.parameters()]).numpy()
    assert np.allclose(total_of(rows, clip=1e6)[0], expected, rtol=1e-4, atol=1e-5)


def test_rows_one_by_one_add_up_to_the_sum_and_are_each_clipped():
    rows = rows_of()
    each = clipped_rows(task_of(), net(), rows, clip=0.5, seed=0, round_=1, site="a")
    assert each.shape == (23, len(total_of(rows)[0]))
    assert np.linalg.norm(each, axis=1).max() <= 0.5
    assert np.allclose(each.sum(axis=0), total_of(rows, 0.5)[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clip", [0.01, 0.5, 2.0])
@pytest.mark.parametrize("gone", [0, 7, 22])
def test_one_row_changes_the_sum_by_at_most_the_clip_norm(clip, gone):
    rows = rows_of()
    left = rows.take(np.delete(np.arange(len(rows)), gone))
    change = np.linalg.norm(total_of(rows, clip)[0] - total_of(left, clip)[0])
    assert change <= clip
    if clip == 0.01:  # of every row the gradient is longer, so the bound is reached
        assert change == pytest.approx(clip, rel=1e-5)


def test_rows_of_one_group_together_change_the_sum_by_at_most_the_clip_norm():
    rows = rows_of(60)
    ids = [str(k % 7) for k in range(60)]
    rows = rows.with_groups(group_digests(ids, 60, "a"))
    whole = total_of(rows, 0.1, unit="column")[0]
    for group in ("0", "3", "6"):
        left = rows.take(np.flatnonzero([i != group for i in ids]))
        change = np.linalg.norm(whole - total_of(left, 0.1, unit="column")[0])
        assert change == pytest.approx(0.1, rel=1e-5)
    assert np.linalg.norm(whole - total_of(rows, 0.1)[0]) > 0.1  # the control: units are other ones


def test_groups_that_span_batches_are_clipped_as_one():
    import fedcore.learning.private_gradients as module

    rows = rows_of(60).with_groups(group_digests([str(k % 4) for k in range(60)], 60, "a"))
    once, before = total_of(rows, 0.1, unit="column")[0], module._ELEMENTS
    try:
        module._ELEMENTS = 7 * len(once)
        assert np.allclose(total_of(rows, 0.1, unit="column")[0], once, rtol=1e-12, atol=1e-14)
    finally:
        module._ELEMENTS = before


def test_sample_takes_whole_units_and_no_row_of_another():
    rows = rows_of(60)
    of_rows = rows.take(np.arange(0, 60, 3))
    third = total_of(rows, sample=lambda units: np.arange(units) % 3 == 0)
    assert np.allclose(third[0], total_of(of_rows)[0], atol=1e-9)
    assert third[1].examples == 20
    ids = np.array([k % 7 for k in range(60)])
    grouped = rows.with_groups(group_digests([str(i) for i in ids], 60, "a"))
    seen = []

    def first_two(units):
        seen.append(units)
        return np.arange(units) < 2

    _, report = total_of(grouped, unit="column", sample=first_two)
    assert seen == [7]
    assert report.examples in {a + b for a in (8, 9) for b in (8, 9)}
    nobody = total_of(rows, sample=lambda units: np.zeros(units, dtype=bool))
    assert not nobody[0].any() and nobody[1].loss is None


def test_update_of_a_site_is_clipped_to_the_norm_and_is_zeros_where_it_is_not_finite():
    update = np.array([3.0, 4.0], dtype=np.float32)
    assert np.allclose(clipped(update, 10.0), update, rtol=1e-5)
    assert np.linalg.norm(clipped(update, 1.0)) == pytest.approx(1.0, rel=1e-5)
    assert np.linalg.norm(clipped(update, 1.0)) <= 1.0
    assert not clipped(update * np.float32("inf"), 1.0).any()


def test_row_with_infinite_gradient_counts_as_zero():
    rows = rows_of()
    broken = replace(rows, x=rows.x.clone())
    broken.x[4, 0] = float("inf")
    left = rows.take(np.delete(np.arange(len(rows)), 4))
    assert np.allclose(total_of(broken)[0], total_of(left)[0], atol=1e-9)


def test_code_that_cannot_be_vectorised_is_taken_row_by_row():
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1.0 if x.sum().item() > 0 else 0.5)

    torch.manual_seed(0)
    module = Odd(5, 3)
    found = total_of(rows_of(), module=module)[0]
    assert np.allclose(
        found, total_of(rows_of(), task=task_of(predict=own_predict), module=module)[0]
    )
    assert np.abs(found).max() > 0


def test_order_is_that_of_the_flat_model():
    module, rows = net(), rows_of()
    before = FlatModel(module).read()
    step = -1e-3 * total_of(rows, 1e6, module=module)[0]
    flat = FlatModel(module)
    loss = nn.CrossEntropyLoss()
    start = loss(module(rows.x), rows.y).item()
    flat.write((before + step).astype(np.float32))
    assert loss(module(rows.x), rows.y).item() < start


def test_batch_norm_is_named_with_what_to_use_instead():
    module = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    with pytest.raises(BadInput, match="found BatchNorm1d") as refused:
        total_of(rows_of(), module=module)
    assert "GroupNorm" in refused.value.remedy


def test_task_with_its_own_training_loop_is_refused():
    with pytest.raises(BadInput, match="has a `train` of its own"):
        total_of(rows_of(), task=task_of(train=lambda model, rows, fit: None))


def test_unit_column_without_groups_is_refused():
    with pytest.raises(BadInput, match="rows of site a have no group column"):
        total_of(rows_of(), unit="column")
