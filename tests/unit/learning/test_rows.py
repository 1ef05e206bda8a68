from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from fedcore.errors import BadInput, TaskFailed
from fedcore.learning.data.loading import load_rows
from fedcore.learning.data.rows import ArrayRows, DatasetRows, TableRows, copied, pool
from fedcore.learning.data.split import FoldSplit
from fedcore.learning.data.tabular import number
from fedcore.learning.task import Task


def task_of(found, **extra):
    def data(source):
        return found

    return Task(name="t", data=data, model=lambda: None, loss=lambda o, t: o, **extra)


def load(found, site="va", **extra):
    return load_rows(task_of(found, **extra), None, site)


def refused(found, **extra):
    with pytest.raises(BadInput) as caught:
        load(found, **extra)
    return caught.value


X = np.arange(12.0).reshape(6, 2)
Y = np.array([0, 1, 0, 1, 0, 1])


class Squares(Dataset):
    """Map-style, with labels nowhere but in its items."""

    def __init__(self, rows=6):
        self.rows, self.read = rows, []

    def __len__(self):
        return self.rows

    def __getitem__(self, index):
        self.read.append(index)
        return torch.tensor([index, index**2]), index % 3


class Endless(IterableDataset):
    def __iter__(self):
        yield from ()


# ------------------------------------------------------------------------------------ arrays


@pytest.mark.parametrize(
    ("raw", "dtype"),
    [
        (X, torch.float32),
        (X.astype(np.float16), torch.float32),
        (X.astype(np.int64), torch.float32),
        (X > 3, torch.float32),
        (torch.tensor(X), torch.float32),
        (torch.tensor(X).long(), torch.int64),
        (torch.tensor(X).to(torch.uint8), torch.uint8),
        (torch.tensor(X) > 3, torch.float32),
    ],
)
def test_inputs_are_float32_but_integer_tensors_stay(raw, dtype):
    rows, test = load((raw, Y))
    assert isinstance(rows, ArrayRows) and test is None
    assert rows.x.dtype == dtype and rows.x.shape == (6, 2)


@pytest.mark.parametrize(
    ("raw", "dtype", "labels"),
    [
        (Y.astype(np.int8), torch.int64, Y),
        (Y == 1, torch.int64, Y),
        (Y.astype(np.float64), torch.float32, Y),
        (Y + 0.5, torch.float32, None),
        (Y - 1, torch.int64, None),
        (Y[:, None], torch.int64, Y),
        (np.stack([Y, Y], axis=1), torch.int64, None),
        (torch.tensor(Y).bool(), torch.int64, Y),
        (torch.tensor(Y).double(), torch.float32, Y),
    ],
)
def test_targets_and_labels(raw, dtype, labels):
    rows, _ = load((X, raw))
    assert rows.y.dtype == dtype
    found = rows.labels()
    assert found is None if labels is None else np.array_equal(found, labels)


def test_rows_do_not_share_memory_with_the_users_array():
    x = X.astype(np.float32)
    rows, _ = load((x, Y))
    x[:] = -1
    assert rows.x.min() >= 0


def test_batches_in_both_orders():
    rows, _ = load((X, Y))
    assert [len(y) for _, y in rows.batches(4, None)] == [4, 2]
    order = np.array([5, 0, 3])
    x, y = next(iter(rows.batches(8, order)))
    assert y.tolist() == Y[order].tolist() and x[:, 0].tolist() == X[order, 0].tolist()


def test_no_rows():
    assert str(refused((X[:0], Y[:0]))) == "site va: found 0 rows, expected at least 1"
    assert "test part" in str(refused(((X, Y), (X[:0], Y[:0]))))


def test_lengths_differ():
    assert "6 rows in X and 5 in y" in str(refused((X, Y[:5])))


def test_not_finite_names_site_column_and_count():
    x = X.copy()
    x[1, 1], x[3, 1], x[2, 0] = np.nan, np.inf, -np.inf
    error = refused((x, Y))
    assert str(error).startswith("site va: found 3 NaN or infinite values in X columns 0, 1")
    assert "statistics" in error.remedy
    assert "in y" in str(refused((X, np.where(Y == 1, np.nan, 0.0))))


@pytest.mark.parametrize(
    ("found", "says", "hint"),
    [
        ((X.astype(str), Y), "X of dtype <U", "fedcore.table"),
        ((X, Y.astype(str)), "y of dtype <U", "0, 1, 2"),
        ((X.astype(complex), Y), "complex128", ""),
        ((torch.zeros(6, 1, dtype=torch.complex64), Y), "complex64", ""),
        ((X.tolist(), Y), "list of 6 for X", "np.asarray"),
        ((X, 3), "int for y", ""),
        ((np.float64(3.0), Y), "float64 for X", ""),
        ((np.array(3.0), Y), "single number", ""),
        ({"train": 1}, "dict with keys 'train'", "docs/tasks.md"),
        (None, "NoneType", "docs/tasks.md"),
        (X, "ndarray", "docs/tasks.md"),
        ("file.csv", "str", "docs/tasks.md"),
        ((X, Y, Y), "tuple of 3", "docs/tasks.md"),
        (Endless(), "iterable dataset Endless", "__len__"),
        (DataLoader(Endless()), "iterable dataset Endless", "__len__"),
    ],
)
def test_refusals_say_what_and_hint(found, says, hint):
    error = refused(found)
    assert str(error).startswith("site va: ") and says in str(error)
    assert hint in error.remedy


def test_frames_are_refused_with_the_way_out():
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame({"a": [1.0, 2.0]})
    for found in (frame, (frame, frame["a"]), (frame, frame), (X, pd.Series(Y))):
        assert "fedcore.table(target=..., columns={...})" in refused(found).remedy


def test_sparse_matrices_are_refused_with_the_way_out():
    sparse = pytest.importorskip("scipy.sparse")
    assert "toarray" in refused((sparse.csr_matrix(X), Y)).remedy
    refused(sparse.csr_matrix(X))


# ------------------------------------------------------------------- arrays that want statistics


def test_array_with_declared_ranges_keeps_its_gaps():
    x = X.copy()
    x[0, 0] = np.nan
    rows, _ = load((x, Y), statistics=((0, 10), number(0, 11, may_be_missing=True)))
    assert isinstance(rows, TableRows)
    assert rows.layout.names == ("x0", "x1") and rows.layout.ranges == ((0.0, 10.0), (0.0, 11.0))
    assert rows.layout.columns == ("x0", "x1", "x1_missing")
    assert np.isnan(rows.features[0, 0])
    scale = SimpleNamespace(mean=np.array([6.0, 6.0]), std=np.array([2.0, 4.0]))
    done = rows.standardise(scale)
    assert done.x.dtype == torch.float32
    assert done.x[0].tolist() == [0.0, -1.25, 0.0]  # imputed by the mean; no indicator was declared


@pytest.mark.parametrize(
    "ranges", [((0, 1),), ((0, 1), (1, 1)), ((0, 1), (0, np.inf)), ((0, 1), 3)]
)
def test_bad_ranges(ranges):
    assert "task.statistics" in str(refused((X, Y), statistics=ranges)) or "(rows, 1)" in str(
        refused((X, Y), statistics=ranges)
    )


def test_infinite_values_are_refused_even_with_statistics():
    x = X.copy()
    x[1, 1] = np.inf
    x[2, 0] = np.nan
    assert "found 1 NaN or infinite value in X column 1" in str(
        refused((x, Y), statistics=((0, 1), (0, 1)))
    )


def test_statistics_of_another_task_are_refused():
    rows, _ = load((X, Y), statistics=((0, 1), (0, 1)))
    with pytest.raises(BadInput, match="found 3 features, expected 2"):
        rows.standardise(SimpleNamespace(mean=np.zeros(3), std=np.ones(3)))


def test_raw_rows_make_no_batches():
    rows, _ = load((X, Y), statistics=((0, 1), (0, 1)))
    with pytest.raises(BadInput, match="statistics"):
        rows.batches(2, None)


# ---------------------------------------------------------------------------------- datasets


def test_dataset_rows_take_and_batch():
    rows, _ = load(Squares())
    part = rows.take(np.array([4, 1])).take(np.array([1]))
    x, y = next(iter(part.batches(8, None)))
    assert x.tolist() == [[1, 1]] and y.tolist() == [1]
    assert rows.labels().tolist() == [0, 1, 2, 0, 1, 2]
    assert part.labels().tolist() == [1]


def test_labels_are_read_once():
    data = Squares()
    rows, _ = load(data)
    rows.labels()
    rows.take(np.array([1, 2])).labels()
    assert sorted(data.read) == list(range(6))


def test_labels_of_a_subset_read_only_the_subset():
    data = Squares(100)
    rows, _ = load(Subset(data, [7, 9]))
    assert rows.labels().tolist() == [1, 0]
    assert data.read == [7, 9]


@pytest.mark.parametrize(
    ("dataset", "labels"),
    [
        (TensorDataset(torch.zeros(3, 2), torch.tensor([2, 0, 1])), [2, 0, 1]),
        (TensorDataset(torch.zeros(3, 2)), None),
        (Subset(TensorDataset(torch.zeros(3, 2), torch.tensor([2, 0, 1])), [2, 0]), [1, 2]),
        (TensorDataset(torch.zeros(2, 2), torch.tensor([0.5, 1.0])), None),
        (torch.utils.data.ConcatDataset([Squares(2), Squares(1)]), [0, 1, 0]),
    ],
)
def test_where_labels_are_found(dataset, labels):
    rows, _ = load(dataset)
    found = rows.labels()
    assert found is None if labels is None else found.tolist() == labels


def test_rows_that_are_dicts():
    class Named(Squares):
        def __getitem__(self, index):
            return {"x": torch.tensor([1.0]), "label": index % 2}

    rows, _ = load(Named(4))
    assert rows.labels().tolist() == [0, 1, 0, 1]
    batch = next(iter(rows.batches(3, None)))
    assert batch["x"].shape == (3, 1) and batch["label"].tolist() == [0, 1, 0]


def test_any_object_with_length_and_items_is_a_dataset():
    class Plain:
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return np.float32([index]), index

    rows, _ = load(Plain())
    assert isinstance(rows, DatasetRows) and rows.labels().tolist() == [0, 1]


def test_loader_brings_its_batch_size_and_collate():
    loader = DataLoader(Squares(), batch_size=4, collate_fn=list, shuffle=True)
    rows, _ = load(loader)
    batches = list(rows.batches(2, None))
    assert [len(batch) for batch in batches] == [4, 2]
    assert isinstance(batches[0], list) and batches[0][1][1] == 1  # row order, not the loader's


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(Squares(), sampler=torch.utils.data.WeightedRandomSampler([1.0] * 6, 6)),
        DataLoader(Squares(), batch_size=None),
        DataLoader(Squares(), batch_sampler=[[0, 1], [2]]),
    ],
)
def test_loaders_that_choose_rows_themselves_are_refused(loader):
    error = refused(loader)
    assert "DataLoader with its own" in str(error) and "train=" in error.remedy


def test_hugging_face_rows():
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict(
        {"ids": [[1, 2], [3, 4], [5, 6]], "label": [1, 0, 1], "text": ["a", "b", "c"]}
    )
    rows, _ = load(made)
    assert rows.labels().tolist() == [1, 0, 1]
    batch = next(iter(rows.take(np.array([2, 0])).batches(8, None)))
    assert batch["ids"].tolist() == [[5, 6], [1, 2]]
    assert batch["label"].tolist() == [1, 1] and batch["text"] == ["c", "a"]
    assert load(made.rename_column("label", "kind"))[0].labels() is None
    assert load(made.remove_columns("label").rename_column("ids", "label"))[0].labels() is None
    both = load((made, made.select([0])))
    assert [len(part) for part in both] == [3, 1]
    assert "iterable" in str(refused(made.to_iterable_dataset()))
    assert "keys 'train'" in str(refused(datasets.DatasetDict({"train": made})))


# -------------------------------------------------------------------------------- pairs, errors


@pytest.mark.parametrize(
    "half", [(X, Y), Squares(), DataLoader(Squares()), ArrayRows(torch.zeros(6, 1), torch.zeros(6))]
)
def test_train_and_test_pairs(half):
    train, test = load((half, half))
    assert len(train) == len(test) == 6


def test_users_exception_shows_the_users_frame_first():
    def data(source):
        return {}["age"]

    task = Task(name="t", data=data, model=lambda: None, loss=lambda o, t: o)
    with pytest.raises(TaskFailed) as caught:
        load_rows(task, None, "va")
    assert str(caught.value) == "site va: task.data raised KeyError: 'age'"
    first = caught.value.user_traceback.splitlines()[1]
    assert "test_rows.py" in first and "in data" in first
    assert caught.value.exit_code == 1


def test_our_own_refusal_inside_data_gains_the_site():
    def data(source):
        raise BadInput("va.csv: found nothing", remedy="look")

    task = Task(name="t", data=data, model=lambda: None, loss=lambda o, t: o)
    with pytest.raises(BadInput) as caught:
        load_rows(task, None, "va")
    assert str(caught.value) == "site va: va.csv: found nothing" and caught.value.remedy == "look"


def test_broken_dataset_is_the_users_fault():
    class Broken(Squares):
        def __getitem__(self, index):
            raise OSError("disk")

    rows, _ = load(Broken())
    with pytest.raises(TaskFailed, match="site va: reading its rows raised OSError: disk"):
        rows.labels()


# ------------------------------------------------------------------------------------- folds


def rows_of(labels):
    labels = np.asarray(labels)
    x = torch.arange(len(labels), dtype=torch.float32)[:, None]
    return ArrayRows(x, torch.from_numpy(labels.astype(np.int64)))


def ids(rows):
    return rows.x[:, 0].long().tolist()


@given(
    st.lists(st.integers(0, 3), min_size=2, max_size=60),
    st.integers(2, 7),
    st.integers(0, 2**40),
)
def test_folds_are_disjoint_cover_and_are_stratified(labels, folds, seed):
    rows = rows_of(labels)
    parts = [FoldSplit(seed, f, folds).divide(rows, "va") for f in range(folds)]
    tests = [ids(test) for _, test in parts]
    assert sorted(i for test in tests for i in test) == list(range(len(labels)))
    sizes = [len(test) for test in tests]
    assert max(sizes) - min(sizes) <= 1
    for train, test in parts:
        assert sorted(ids(train) + ids(test)) == list(range(len(labels)))
        assert len(train) >= 1
    for label in set(labels):
        counts = [sum(labels[i] == label for i in test) for test in tests]
        assert max(counts) - min(counts) <= 1


def test_one_row_is_for_training():
    for fold in range(3):
        train, test = FoldSplit(0, fold, 3).divide(rows_of([1]), "va")
        assert (len(train), len(test)) == (1, 0)


def test_folds_depend_on_seed_and_site_only():
    rows = rows_of([0, 1] * 20)

    def fold(seed=0, site="va"):
        return ids(FoldSplit(seed).divide(rows, site)[1])

    assert fold() == fold()
    assert fold() != fold(seed=1)
    assert fold() != fold(site="cleveland")


def test_regression_rows_are_dealt_too():
    rows = ArrayRows(torch.zeros(10, 1), torch.linspace(0, 1, 10))
    train, test = FoldSplit(fold=4).divide(rows, "va")
    assert (len(train), len(test)) == (8, 2)


@pytest.mark.parametrize(("fold", "folds"), [(5, 5), (-1, 5), (0, 1)])
def test_bad_folds(fold, folds):
    with pytest.raises(BadInput, match="fold"):
        FoldSplit(0, fold, folds).divide(rows_of([0, 1]), "va")


# -------------------------------------------------------------------------------------- pool


def test_pool_of_arrays_keeps_order():
    pooled = pool([rows_of([0, 1]), rows_of([1])])
    assert ids(pooled) == [0, 1, 0] and pooled.labels().tolist() == [0, 1, 1]


def test_pool_of_datasets_keeps_labels_and_collate():
    first, _ = load(DataLoader(Squares(4), batch_size=3))
    second, _ = load(DataLoader(Squares(2), batch_size=3))
    pooled = pool([first.take(np.array([3, 2])), second])
    assert pooled.labels().tolist() == [0, 2, 0, 1]
    (x, y), _ = list(pooled.batches(100, None))
    assert x[:, 0].tolist() == [3, 2, 0] and y.tolist() == [0, 2, 0]


def test_pool_of_tables_keeps_features():
    rows, _ = load((X, Y), statistics=((0, 1), (0, 1)))
    pooled = pool([rows, rows.take(np.array([0]))])
    assert pooled.features.shape == (7, 2) and len(pooled.y) == 7


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (ArrayRows(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)), "different shapes"),
        (ArrayRows(torch.zeros(2, 1), torch.zeros(2)), "different shapes"),
        (DatasetRows(Squares()), "different kinds"),
    ],
)
def test_pool_refuses_what_does_not_fit(other, says):
    with pytest.raises(BadInput, match=says):
        pool([rows_of([0, 1]), other])


def test_batches_keep_the_order_of_the_columns_in_memory():
    """The last bits of a product depend on it: a copy in another order gives another loss than the rows."""
    by_column = torch.from_numpy(np.asfortranarray(np.arange(20, dtype="f4").reshape(5, 4)))
    rows = ArrayRows(by_column, torch.arange(5))
    assert by_column.stride() == (1, 5)
    ((x, _),) = rows.batches(5, None)
    assert x.stride() == (1, 5) and x.data_ptr() != by_column.data_ptr()
    assert copied(rows).x.stride() == (1, 5)
    for x, _ in rows.batches(2, None):
        assert x.stride()[0] == 1 or len(x) == 1
