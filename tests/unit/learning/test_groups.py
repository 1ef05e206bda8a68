"""Rows that belong together: on one side of every split, drawn together by the bootstrap; and a warning."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

import fedcore
from fedcore.config import build_job
from fedcore.errors import BadInput, TaskFailed
from fedcore.experiment.gap import bootstrap_gap
from fedcore.experiment.prepare import job_for, prepare
from fedcore.learning.data.groups import codes_of, group_digests
from fedcore.learning.data.loading import load_rows
from fedcore.learning.data.rows import ArrayRows
from fedcore.learning.data.split import FoldSplit, HashSplit, ValidationPart, subsample
from fedcore.learning.data.statistics import Statistics
from fedcore.learning.data.tabular import Table
from fedcore.learning.metrics import Scores, get
from fedcore.learning.site import SiteTrainer

pytestmark = pytest.mark.usefixtures("no_drawings")

GROUPED = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), min_size=1, max_size=60)
"""(group, class) of each row."""


def rows_of(pairs):
    x = torch.arange(len(pairs), dtype=torch.float32)[:, None]
    rows = ArrayRows(x, torch.tensor([label for _, label in pairs]))
    return rows.with_groups(group_digests([group for group, _ in pairs], len(pairs), "site a"))


def ids(rows):
    return set(rows.groups.tolist())


def whole(*parts, of):
    """Whether the parts are all rows, and no two of them share a group."""
    places = sorted(int(i) for part in parts for i in part.x[:, 0])
    shared = sum(len(ids(part)) for part in parts) - len(set().union(*map(ids, parts)))
    return places == list(range(len(of))) and not shared


# --------------------------------------------------------------------------------------------------- splits


@given(GROUPED, st.integers(2, 5), st.integers(0, 3))
def test_folds_keep_groups_together(pairs, folds, seed):
    rows = rows_of(pairs)
    parts = [FoldSplit(seed, fold, folds).divide(rows, "a") for fold in range(folds)]
    assert all(whole(train, test, of=pairs) and len(train) for train, test in parts)
    if len(ids(rows)) > 1:
        assert sorted(int(i) for _, test in parts for i in test.x[:, 0]) == list(range(len(pairs)))
    sizes = [len(test) for _, test in parts]
    largest, classes = int(np.bincount(codes_of(rows.groups)).max()), 3
    assert max(sizes) - min(sizes) <= max(
        classes * largest, len(pairs) if len(ids(rows)) == 1 else 0
    )


def test_folds_of_groups_are_stratified_by_the_groups_class():
    rows = rows_of([(group, group % 2) for group in range(20) for _ in range(4)])
    for fold in range(5):
        _, test = FoldSplit(0, fold, 5).divide(rows, "a")
        assert len(test) == 16 and test.y.float().mean() == 0.5


@given(GROUPED, st.floats(0.05, 0.9), st.integers(0, 3))
def test_the_validation_part_is_of_whole_groups(pairs, share, seed):
    rows = rows_of(pairs)
    train, apart = ValidationPart(share, seed, 0).divide(rows, "a")
    assert whole(train, apart, of=pairs) and len(train)
    largest = int(np.bincount(codes_of(rows.groups)).max())
    assert len(apart) <= share * len(pairs) + largest / 2


@given(GROUPED, st.floats(0.1, 0.9))
def test_the_split_of_a_deployed_site_keeps_groups_together_whatever_rows_are_added(pairs, share):
    split, rows = HashSplit(b"k" * 32, share), rows_of(pairs)
    train, test = split.divide(rows, "a")
    assert whole(train, test, of=pairs) and len(train)
    more = [*pairs, *((group, 0) for group in (100, 101, 102)), *pairs]
    later, tested = split.divide(rows_of(more), "a")
    assert whole(later, tested, of=more)
    assert ids(test) <= ids(tested)


def test_too_many_rows_of_groups_are_cut_and_still_split_whole():
    rows = rows_of([(group, 0) for group in range(10) for _ in range(6)])
    split = HashSplit(b"k" * 32, 0.3)
    kept, _ = subsample(split, rows, None, "a", 25)
    assert len(kept) == 25 == len(kept.groups)
    train, test = split.divide(kept, "a")
    assert not ids(train) & ids(test) and len(train) + len(test) == 25


# ------------------------------------------------------------------------------------------------ declaring


def test_an_id_is_the_same_in_every_spelling():
    spelled = [1, 1.0, "1", " 1 ", np.int64(1), np.float32(1), "1.0", b"1"]
    assert len(set(group_digests(spelled, len(spelled), "a").tolist())) == 1
    assert len(set(group_digests([1, 2, 1.5, "a", "A"], 5, "a").tolist())) == 5


@pytest.mark.parametrize("gone", [None, float("nan"), "", "  ", np.nan, pd.NaT, "nan"])
def test_a_row_without_an_id_is_refused(gone):
    with pytest.raises(BadInput, match=r"site a: found no group id in 1 of 3 rows \(row 2 first\)"):
        group_digests([7, gone, 8], 3, "site a")


def test_another_number_of_ids_is_refused():
    with pytest.raises(BadInput, match="found 2 group ids for 3 rows"):
        group_digests([1, 2], 3, "site a")


X = np.arange(24, dtype="f4").reshape(12, 2)
Y = np.arange(12) % 2
PEOPLE = np.repeat([1, 2, 3], 4)


def dataset():
    return TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))


def frame(**more):
    return pd.DataFrame({"a": X[:, 0], "y": Y, "patient": PEOPLE, **more})


def read(**more):
    return fedcore.table(target="y", columns={"a": fedcore.number(0, 24)}, **more)


def task(found, **more):
    return fedcore.Task("t", lambda _: found, torch.nn.Identity, torch.nn.Identity, **more)


@pytest.mark.parametrize(
    "found",
    [
        fedcore.grouped((X, Y), PEOPLE),
        fedcore.grouped((torch.from_numpy(X), torch.from_numpy(Y)), PEOPLE.tolist()),
        fedcore.grouped(dataset(), pd.Series(PEOPLE)),
        fedcore.grouped(dataset(), lambda item: int(item[0][0]) // 8 + 1),
        fedcore.grouped(DataLoader(dataset(), batch_size=4), PEOPLE),
        read(group="patient")(frame()),
        fedcore.grouped(read()(frame()), PEOPLE),
    ],
    ids=["arrays", "tensors", "dataset", "of an item", "loader", "table", "table and ids"],
)  # fmt: skip
def test_every_kind_of_rows_has_groups(found):
    rows, test = load_rows(task(found), None, "a")
    assert test is None
    assert codes_of(rows.groups).tolist() == codes_of(group_digests(PEOPLE, 12, "a")).tolist()
    some = rows.take(np.array([0, 5, 11]))
    assert len(set(some.groups.tolist())) == 3
    train, tested = FoldSplit(0, 0, 3).divide(rows, "a")
    assert len(tested) == 4 and not ids(train) & ids(tested)


def test_array_columns_with_ranges_have_groups_after_scaling():
    declared = task(fedcore.grouped((X, Y), PEOPLE), statistics=((0, 24), (0, 24)))
    rows, _ = load_rows(declared, None, "a")
    scale = Statistics.of_ranges(rows.layout.names, rows.layout.ranges)
    assert rows.standardise(scale).groups.tolist() == rows.groups.tolist()


def test_an_own_test_part_shares_no_group_with_the_training_part():
    def pair(first, second):
        return load_rows(task((first, second)), None, "a")

    halves = (X[:6], Y[:6]), (X[6:], Y[6:])
    with pytest.raises(BadInput, match="found 1 groups with rows in both the train and the test"):
        pair(fedcore.grouped(halves[0], PEOPLE[:6]), fedcore.grouped(halves[1], PEOPLE[6:]))
    with pytest.raises(BadInput, match="no group ids in the test part"):
        pair(fedcore.grouped(halves[0], PEOPLE[:6]), halves[1])
    train, test = pair(fedcore.grouped(halves[0], [1] * 6), fedcore.grouped(halves[1], range(2, 8)))
    assert len(ids(train)) == 1 and len(ids(test)) == 6


def test_ids_that_cannot_be_had_are_refused():
    with pytest.raises(BadInput, match="a function for the ids of rows in memory"):
        load_rows(task(fedcore.grouped((X, Y), lambda item: 1)), None, "a")
    with pytest.raises(TaskFailed, match=r"the ids of fedcore.grouped raised ZeroDivisionError"):
        load_rows(task(fedcore.grouped(dataset(), lambda item: 1 // 0)), None, "a")
    with pytest.raises(BadInput, match="found no column 'person'"):
        read(group="person")(frame())
    with pytest.raises(BadInput, match="column 'patient': found no group id in 1 of 12 rows"):
        read(group="patient")(frame().assign(patient=["NA", *PEOPLE[1:]]))
    with pytest.raises(BadInput, match="found the target"):
        read(group="y")


def test_a_table_without_a_group_has_the_description_it_always_had():
    assert "group" not in read().to_json() and "group" not in read().layout.description
    assert Table.from_json(read().to_json()) == read()
    assert Table.from_json(read(group="patient").to_json()) == read(group="patient")
    assert read(group="patient").columns == read().columns


# ------------------------------------------------------------------------------------------------------ runs


def persons(together):
    """Rows of one person resemble each other, and their label is drawn at random: there is nothing to learn."""

    def data(source):
        random = np.random.default_rng(source)
        label, person = random.integers(0, 2, 24), random.normal(size=(24, 40)) * 3
        x = np.repeat(person, 6, axis=0) + random.normal(size=(144, 40)) * 0.2
        rows = x.astype("f4"), np.repeat(label, 6)
        return fedcore.grouped(rows, np.repeat(np.arange(24), 6)) if together else rows

    return fedcore.Task(
        "persons", data, lambda: torch.nn.Sequential(torch.nn.Linear(40, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2)),
        torch.nn.functional.cross_entropy, sites={"a": 1, "b": 2, "c": 3},
        defaults={"rounds": 12, "lr": 0.1, "protection": "plain", "resamples": 50, "arms": "centralised,federated"},
    )  # fmt: skip


def test_noise_by_person_is_learnt_by_no_arm_once_persons_stay_together(tmp_path):
    apart, together = (
        fedcore.simulate(persons(kept), out=tmp_path / str(kept)).result for kept in (False, True)
    )
    for arm in ("centralised", "federated"):
        assert apart.score(arm, "accuracy") > 0.95
        assert together.score(arm, "accuracy") < 0.75
    assert together.rows.groups == 72 and apart.rows.groups is None
    assert " groups of " in together.gap_of("total", "accuracy").method
    report = (tmp_path / "True" / "report.md").read_text()
    assert "of 72 groups" in report and "Rows of one group were kept on one side" in report


def test_validation_rows_share_no_person_with_the_others():
    for site in prepare(*job_for(persons(True), {"validate": 0.25})).sites:
        parts = site.train, site.validation, site.test
        assert all(map(len, parts)) and sum(map(len, parts)) == 144
        assert sum(len(ids(part)) for part in parts) == 24


def test_a_deployed_site_splits_its_rows_by_group():
    job = build_job({"protection": "layered"})
    trainer = SiteTrainer.load(persons(True), job, "a", 1, 1024, HashSplit(b"k" * 32, 0.3))
    train, test = trainer.site.train, trainer.site.test
    assert len(test) and not ids(train) & ids(test)
    assert len(train) % 6 == 0 == len(test) % 6


# -------------------------------------------------------------------------------------------------- bootstrap


def test_rows_of_one_group_are_drawn_together():
    """A row that is there eight times tells as much as it does once."""
    random = np.random.default_rng(0)
    targets = random.integers(0, 2, 40)
    outputs = {
        arm: random.normal(size=40) + by * targets
        for arm, by in (("centralised", 2.0), ("federated", 1.0))
    }

    def interval(times, groups):
        arms = {
            arm: Scores(
                np.repeat(each, times),
                np.repeat(targets, times),
                np.zeros(40 * times, dtype=np.int64),
            )
            for arm, each in outputs.items()
        }
        return bootstrap_gap(arms, get(("auc", "accuracy")), 300, 0, groups=groups)["total"]

    once, together = interval(1, None), interval(8, np.repeat(np.arange(40), 8))
    alone = interval(8, None)
    for metric in ("auc", "accuracy"):
        assert together[metric].ends == pytest.approx(once[metric].ends)
        assert together[metric].mean == pytest.approx(alone[metric].mean)
        width = [np.subtract(*each[metric].ends[::-1]) for each in (together, alone)]
        assert width[0] > 2 * width[1]
    assert (
        together["auc"].method
        == "95 % paired bootstrap over 40 groups of 320 test rows, 300 resamples"
    )


# --------------------------------------------------------------------------------------------------- warning


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("patient", PEOPLE, 3),
        ("Subject_ID", [f"s{i}" for i in PEOPLE], 3),
        ("personId", PEOPLE, 3),
        ("id", [1, 1, *range(2, 12)], 11),
        ("patient", range(12), 0),
        ("patient", [1] * 12, 0),
        ("site_id", [1] * 12, 0),
        ("humidity", PEOPLE, 0),
        ("inpatients_percent", PEOPLE, 0),
    ],
)
def test_a_column_of_repeated_ids_is_found_by_name_and_values(tmp_path, name, values, said):
    found = (
        frame(**{name: list(values)})
        if name == "patient"
        else frame(**{name: list(values)}).drop(columns="patient")
    )
    expected = {name: said} if said else {}
    assert dict(read()(found).ids) == expected
    assert dict(read()({column: list(found[column]) for column in found}).ids) == expected
    found.to_csv(tmp_path / "rows.csv", index=False)
    found.to_parquet(tmp_path / "rows.parquet", index=False)
    found.to_parquet(tmp_path / "rows.PQ")
    for file in ("rows.csv", "rows.parquet", "rows.PQ"):
        assert dict(read()(tmp_path / file).ids) == expected, file


def test_ids_in_the_index_of_a_parquet_file_are_no_column_of_it(tmp_path):
    frame().set_index("patient").to_parquet(tmp_path / "rows.parquet")
    rows = read()(tmp_path / "rows.parquet")
    assert len(rows) == 12 and dict(rows.ids) == {}


def test_few_ids_in_many_rows_are_not_those_of_persons():
    def of(name):
        found = pd.DataFrame(
            {"a": np.zeros(200), "y": np.arange(200) % 2, name: np.arange(200) % 4}
        )
        return dict(read()(found).ids)

    assert of("hospital_id") == {} and of("patient_id") == {"patient_id": 4}


def test_a_run_warns_of_repeated_ids_until_they_are_a_group(tmp_path):
    def warned(**more):
        table = read(**more)
        whole = fedcore.Task(
            "frames", lambda _: table(frame()), lambda: torch.nn.Linear(1, 2), torch.nn.functional.cross_entropy,
            sites={"a": 1, "b": 2, "c": 3}, defaults={"rounds": 1, "protection": "plain", "arms": "federated"},
        )  # fmt: skip
        run = fedcore.simulate(whole, out=tmp_path / f"run{len(more)}", resamples=0)
        return " ".join(run.result.warnings)

    text = warned()
    assert "found 3 different values of 'patient' in 12 rows" in text
    assert 'fedcore.table(..., group="patient") keeps rows with one value together' in text
    assert "different values of 'patient'" not in warned(group="patient")


def test_a_hugging_face_dataset_is_asked_for_its_ids_too():
    datasets = pytest.importorskip("datasets")
    found = datasets.Dataset.from_dict(
        {"x": X.tolist(), "label": Y.tolist(), "patient": PEOPLE.tolist()}
    )
    rows, _ = load_rows(task(found), None, "a")
    assert dict(rows.ids) == {"patient": 3}
    rows, _ = load_rows(task(fedcore.grouped(found, found["patient"])), None, "a")
    assert dict(rows.ids) == {} and len(ids(rows)) == 3
    rows, _ = load_rows(task(found.remove_columns("patient")), None, "a")
    assert dict(rows.ids) == {}
    some = Subset(Subset(found, range(2, 12)), range(4))
    for form in (some, DataLoader(some, batch_size=2)):
        assert dict(load_rows(task(form), None, "a")[0].ids) == {"patient": 2}


class Records(Dataset):
    """Items are dicts, as those of a DataLoader that gives a batch of columns."""

    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(Y)

    def __getitem__(self, index):
        row = {name: values[index] for name, values in self.columns.items()}
        return {"x": torch.from_numpy(X[index]), "label": int(Y[index]), **row}


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (PEOPLE, 3),
        ([f"p{i}" for i in PEOPLE], 3),
        (torch.from_numpy(PEOPLE), 3),
        (PEOPLE[:, None], 3),
        (range(12), 0),
    ],
    ids=["numpy", "text", "tensors", "arrays of one", "all different"],
)
def test_ids_in_items_that_are_read_for_their_labels_are_found(column, said):
    found = Records(patient_id=column, humidity=PEOPLE)
    rows, _ = load_rows(task(found), None, "a")
    rows.take([0, 1]).labels()  # read once, for all parts
    assert dict(rows.ids) == ({"patient_id": said} if said else {})
    whole, _ = load_rows(task(fedcore.grouped(found, lambda item: int(item["label"]))), None, "a")
    whole.labels()
    assert dict(whole.ids) == {}, "there is a group"
    some, _ = load_rows(task(Subset(found, range(4, 12))), None, "a")
    some.labels()
    assert dict(some.ids) == ({"patient_id": 2} if said else {})


def test_a_run_of_such_items_warns_and_says_how_to_group_them(tmp_path):
    whole = fedcore.Task(
        "records", lambda _: Records(patient=PEOPLE), lambda: torch.nn.Linear(2, 2), torch.nn.functional.cross_entropy,
        predict=lambda model, batch: (model(batch["x"]), batch["label"]), sites={"a": 1, "b": 2, "c": 3},
        defaults={"rounds": 1, "protection": "plain", "arms": "federated"},
    )  # fmt: skip
    run = fedcore.simulate(whole, out=tmp_path / "run", resamples=0)
    text = " ".join(run.result.warnings)
    assert "found 3 different values of 'patient' in 12 rows" in text
    assert 'fedcore.grouped(dataset, lambda item: item["patient"]) keeps rows' in text


def scans(noise, *, people=40, each=8, columns=60, seed=0):
    """Arrays of several scans a person, in random order, with the person of each."""
    random = np.random.default_rng(seed)
    person = random.permutation(np.repeat(np.arange(people), each))
    x = (
        random.normal(size=(people, columns))[person]
        + random.normal(size=(len(person), columns)) * noise
    )
    return x.astype("f4"), (person % 2).astype("i8"), person


def codes():
    random = np.random.default_rng(0)
    return np.eye(16, dtype="f4")[random.integers(0, 16, 320)], random.integers(0, 2, 320)


def plain_rows(columns=16):
    x = np.random.default_rng(1).normal(size=(320, columns)).astype("f4")
    return x, (x[:, 0] > 0).astype("i8")


@pytest.mark.parametrize(
    ("rows", "copies"),
    [
        (lambda: scans(0.1)[:2], 7),
        (lambda: scans(0.3, each=4)[:2], 3),
        (lambda: scans(0.1, people=300, each=2)[:2], 1),
        (
            lambda: fedcore.grouped(scans(0.1)[:2], scans(0.1)[2]),
            None,
        ),  # as the warning's hint says
        (lambda: scans(1.0, each=1, people=320)[:2], None),
        (plain_rows, None),
        (lambda: plain_rows(2), None),
        (codes, None),
        (lambda: (np.ones((100, 16), dtype="f4"), np.arange(100) % 2), None),
        (lambda: (load_digits().data.astype("f4"), load_digits().target), None),
    ],
)
def test_arrays_whose_rows_come_in_sets_of_near_copies_are_warned_of(rows, copies):
    found = rows()
    columns = (found if isinstance(found, tuple) else found.rows)[0].shape[1]
    task = fedcore.Task(
        "scans", lambda _: rows(), lambda: torch.nn.Linear(columns, 10), torch.nn.functional.cross_entropy,
        sites={"a": 1, "b": 2, "c": 3}, defaults={"rounds": 1, "protection": "plain"},
    )  # fmt: skip
    found = prepare(task, build_job(task.defaults, {})).findings
    said = [(text, hint) for text, hint in found if "near copies" in text]
    if copies is None:
        assert said == []
    else:
        ((text, hint),) = said
        assert f"site a and 2 more: found rows that have about {copies} near copies each" in text
        assert "fedcore.grouped((X, y), ids)" in hint
