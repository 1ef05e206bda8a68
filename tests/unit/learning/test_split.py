"""The site's own split and choice of rows: by content under a key, the same whatever a job asks for."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from fedcore_clients.config import SplitSection
from pydantic import ValidationError
from support.small_tasks import Items
from torch.utils.data import TensorDataset

from fedcore.errors import BadInput
from fedcore.learning.data.heart import data
from fedcore.learning.data.rows import ArrayRows, DatasetRows
from fedcore.learning.data.split import FoldSplit, HashSplit, split_from_json, subsample
from fedcore.secagg.crypto.identity_key import IdentityKey

KEY = bytes(range(32))
SPLIT = HashSplit(KEY, 0.2)


def numbered(n, start=0):
    """Rows of which each holds its own number."""
    x = torch.arange(start, start + n, dtype=torch.float32).reshape(n, 1)
    return ArrayRows(x, torch.zeros(n, dtype=torch.int64))


def numbers(rows):
    return rows.x[:, 0].int().tolist()


def test_a_row_keeps_its_side_when_rows_are_added_removed_or_moved():
    train, test = map(set, map(numbers, SPLIT.divide(numbered(400), "va")))
    assert not train & test and train | test == set(range(400))
    assert 50 < len(test) < 110
    more_train, more_test = map(set, map(numbers, SPLIT.divide(numbered(700), "va")))
    assert train <= more_train and test <= more_test
    backwards = numbered(400).take(np.arange(399, -1, -1))
    assert set(numbers(SPLIT.divide(backwards, "elsewhere")[0])) == train
    other = HashSplit(KEY[::-1], 0.2)
    assert set(numbers(other.divide(numbered(400), "va")[1])) != test


def test_identical_rows_are_on_one_side():
    rows = numbered(50).take(np.repeat(np.arange(50), 3))
    train, test = SPLIT.divide(rows, "va")
    assert not set(numbers(train)) & set(numbers(test)) and len(train) + len(test) == 150


def test_there_is_always_a_training_row():
    for n in (1, 2, 3, 5):
        for share in (0.5, 0.999999):
            train, test = HashSplit(KEY, share).divide(numbered(n), "va")
            assert len(train) >= 1 and len(train) + len(test) == n
    same = numbered(1).take(np.zeros(4, dtype=np.int64))
    assert len(HashSplit(KEY, 0.999999).divide(same, "va")[0]) == 4


def test_tables_split_by_features_and_target():
    rows = data("va")
    train, test = SPLIT.divide(rows, "va")
    assert len(train) + len(test) == 200 and 15 < len(test) < 70
    changed = dataclasses.replace(rows, y=1 - rows.y)
    assert not set(rows.digests()) & set(changed.digests())
    zero = np.where(rows.features == 0, -0.0, rows.features)
    assert dataclasses.replace(rows, features=zero).digests() == rows.digests(), "one zero"


class Drawing(Items):
    def __getitem__(self, index):
        return torch.rand(3), 0


def test_items_of_a_dataset_are_hashed_by_what_they_are():
    kinds = [
        (torch.ones(2), 1), (torch.ones(2), 2), (torch.ones(2, dtype=torch.float64), 1), (torch.ones(2, 1), 1),
        {"x": np.ones(2), "label": 1}, {"y": np.ones(2), "label": 1}, ("text", 1), (b"text", 1), (None, True),
        ((1, 2), 3), (1, (2, 3)), (1.0, 2), (1, 2.0), [["a", "b"]], [["ab"]],
    ]  # fmt: skip
    digests = DatasetRows(Items(kinds)).digests()
    assert len(set(digests)) == len(kinds)
    assert DatasetRows(Items(kinds)).take(np.array([4, 1])).digests() == [digests[4], digests[1]]
    assert DatasetRows(Items([[1, 2]])).digests() == DatasetRows(Items([(1, 2)])).digests()
    tensors = TensorDataset(torch.arange(6.0).reshape(3, 2), torch.arange(3))
    assert len(SPLIT.divide(DatasetRows(tensors), "va")[0]) >= 1


@pytest.mark.parametrize(
    ("dataset", "says"),
    [
        (Items([(object(), 1)]), "found object in an item"),
        (Items([(np.array([object()]), 1)]), "found values of dtype object"),
        (Items([{1: 2}]), "found dict"),
        (Drawing([0, 1]), "found another item of Drawing"),
    ],
)
def test_what_has_no_content_to_go_by_is_refused_with_a_way_out(dataset, says):
    with pytest.raises(BadInput, match=f"site va: rows: {says}") as refused:
        SPLIT.divide(DatasetRows(dataset), "va")
    assert "(train, test) pair" in refused.value.remedy and "folds" in refused.value.remedy
    FoldSplit().divide(DatasetRows(dataset), "va")  # the way out: by position


@pytest.mark.parametrize("split", [SPLIT, FoldSplit(3)])
def test_too_many_rows_are_a_fixed_choice_of_as_many_as_the_cap(split):
    rows = numbered(300)
    kept, _ = subsample(split, rows, None, "va", 100)
    assert len(kept) == 100 and numbers(kept) == sorted(numbers(kept))
    assert numbers(subsample(split, rows, None, "va", 100)[0]) == numbers(kept)
    assert subsample(split, rows, None, "va", 300)[0] is rows


def test_a_choice_takes_test_rows_of_a_task_too_and_keeps_a_training_row():
    for cap in (1, 2, 60):
        train, test = subsample(SPLIT, numbered(2), numbered(200, start=1000), "va", cap)
        assert len(train) + len(test) == cap and len(train) >= 1


def test_identical_rows_count_each():
    same = numbered(1).take(np.zeros(9, dtype=np.int64))
    assert len(subsample(SPLIT, same, None, "va", 4)[0]) == 4


# ------------------------------------------------------------------------------------ site.toml


def test_site_toml_says_how_and_the_key_follows_from_the_identity():
    one, other = IdentityKey(KEY), IdentityKey(KEY[::-1])
    default = SplitSection()
    assert default.of(one) == {
        "method": "hash",
        "key": one.derive(b"split of rows").hex(),
        "test": 0.2,
    }
    assert default.of(one) != default.of(other)
    assert default.of(one) == default.of(IdentityKey(KEY)), "for as long as it has this identity"
    assert SplitSection(key="ab" * 32).of(one)["key"] == "ab" * 32
    folds = SplitSection(method="folds", seed=4, fold=1).of(one)
    assert split_from_json(folds) == FoldSplit(4, 1, 5)
    assert split_from_json(default.of(one)) == HashSplit(one.derive(b"split of rows"), 0.2)
    for wrong in ({"method": "rows"}, {"key": "short"}, {"test": 0}, {"test": 1}, {"folds": 1}):
        with pytest.raises(ValidationError):
            SplitSection.model_validate(wrong)


def test_the_key_is_not_printed():
    assert KEY.hex() not in repr(HashSplit(KEY, 0.2)) and str(KEY) not in repr(HashSplit(KEY, 0.2))
    assert "ab" * 32 not in repr(SplitSection(key="ab" * 32))
    for wrong in (
        {},
        {"method": "hash"},
        {"method": "hash", "key": "zz", "test": 0.2},
        {"method": "x"},
    ):
        with pytest.raises(BadInput, match="split: found"):
            split_from_json(wrong)
