"""`fedcore predict`: rows of a file to classes with probabilities, or to values."""

from __future__ import annotations

import csv
import io
import re

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import fedcore
from fedcore.cli.main import main
from fedcore.learning.saved import FILE, load_model, model_bytes
from fedcore.learning.task import load_task

TABLE_TASK = """
import torch, fedcore
read = fedcore.table(
    target="grade", {target}
    columns={{
        "age": fedcore.number(0, 120),
        "dose": fedcore.number(0, 8, may_be_missing=True),
        "smoker": fedcore.category("never", "former"),
    }},
)
task = fedcore.Task(name="own", data=read, model=lambda: torch.nn.Linear(len(read.columns), {outputs}),
    loss=torch.nn.functional.mse_loss, metrics=({metric!r},))
"""
ARRAY_TASK = """
import torch, fedcore
task = fedcore.Task(name="own", data=None.__class__, model=lambda: {model},
    loss=torch.nn.functional.mse_loss, metrics=({metric!r},), statistics={ranges})
"""
ROWS = "smoker,age,dose\nnever,40,2\nformer,61,\n"


def model_file(folder, text, **about):
    """A model with random parameters, as a run leaves it, and its task beside it."""
    (folder / "task.py").write_text(text.format(**about))
    task = load_task("task.py", folder)
    torch.manual_seed(3)
    statistics = layout = None
    if "ranges" not in about:
        from fedcore.learning.data.statistics import Statistics

        layout = task.data.layout
        statistics = Statistics.of_ranges(layout.names, layout.ranges)
    (folder / FILE).write_bytes(model_bytes(task.model(), task, statistics, layout))
    return folder


@pytest.fixture
def classifier(tmp_path):
    return model_file(tmp_path, TABLE_TASK, target="", outputs=1, metric="auc")


def predict(capsys, *arguments):
    """Exit code, the lines of the CSV, and stderr."""
    with pytest.raises(SystemExit) as ended:
        main(["predict", *map(str, arguments)])
    said = capsys.readouterr()
    return ended.value.code, list(csv.reader(io.StringIO(said.out))), said.err


def written(path, text=ROWS):
    path.write_text(text)
    return path


def test_a_csv_becomes_a_class_and_its_probabilities_a_line(classifier, tmp_path, capsys):
    rows = written(tmp_path / "rows.csv")
    code, (titles, *lines), err = predict(capsys, classifier, rows)
    assert (code, err) == (0, "")
    assert titles == ["class", "probability_0", "probability_1"]
    found = np.array([[float(value) for value in line[1:]] for line in lines])
    direct = load_model(classifier, None).predict(pd.read_csv(rows))
    np.testing.assert_array_equal(found[:, 1], direct)
    assert [line[0] for line in lines] == [str(int(p > 0.5)) for p in direct]


def test_classes_have_the_names_that_the_table_declares(tmp_path, capsys):
    about = {"target": 'classes=("benign", "malignant", "unclear"),', "outputs": 3}
    run = model_file(tmp_path, TABLE_TASK, metric="accuracy", **about)
    code, (titles, *lines), _ = predict(capsys, run, written(tmp_path / "rows.csv"))
    assert code == 0
    assert titles[1:] == ["probability_benign", "probability_malignant", "probability_unclear"]
    for line in lines:
        shares = [float(value) for value in line[1:]]
        assert sum(shares) == pytest.approx(1)
        assert line[0] == ("benign", "malignant", "unclear")[int(np.argmax(shares))]


def test_a_regression_gives_its_value(tmp_path, capsys):
    run = model_file(tmp_path, TABLE_TASK, target="regression=True,", outputs=1, metric="mae")
    rows = written(tmp_path / "rows.csv")
    code, (titles, *lines), _ = predict(capsys, run, rows)
    assert (code, titles) == (0, ["value"])
    assert [float(x) for (x,) in lines] == load_model(run, None).predict(rows).tolist()


def test_parquet_rows_give_what_csv_rows_give(classifier, tmp_path, capsys):
    rows = written(tmp_path / "rows.csv")
    pd.read_csv(rows).to_parquet(tmp_path / "rows.parquet")
    assert predict(capsys, classifier, rows) == predict(
        capsys, classifier, tmp_path / "rows.parquet"
    )


def test_out_writes_the_file_that_the_terminal_would_show(classifier, tmp_path, capsys):
    rows, out = written(tmp_path / "rows.csv"), tmp_path / "out.csv"
    _, lines, _ = predict(capsys, classifier, rows)
    code, said, _ = predict(capsys, classifier, rows, "--out", out)
    assert code == 0 and said == [[f"wrote {out}: 2 rows"]]
    assert list(csv.reader(io.StringIO(out.read_text()))) == lines


def test_kept_columns_stand_to_the_left(classifier, tmp_path, capsys):
    text = 'id,smoker,age,dose,grade\n"a, b",never,40,2,1\nc,former,61,,0\n'
    code, lines, _ = predict(capsys, classifier, written(tmp_path / "r.csv", text), "--keep", "id")
    assert code == 0 and lines[0][:2] == ["id", "class"]
    assert [line[0] for line in lines[1:]] == ["a, b", "c"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("smoker,age\nnever,4\n", "rows.csv: found no column 'dose', expected it"),
        ("smoker,dose\nnever,4\n", "rows.csv: found no column 'age', expected it"),
        (
            "id,smoker,age,dose\n7,never,4,1\n",
            "found the column 'id', which the model does not take",
        ),
        (
            "a b,id,smoker,age,dose\n7,2,never,4,1\n",
            "hint: remove them, or copy them to the predictions: --keep 'a b' --keep id",
        ),
        (
            "smoker,age,dose\nnever,forty,1\n",
            "column 'age', row 1: found 'forty', expected a number",
        ),
        ("smoker,age,dose\nnever,,1\n", "column 'age', row 1: found a missing value"),
        ("smoker,age,dose,age\nnever,4,1,4\n", "found two columns called 'age'"),
        ("smoker,age,dose\n", "rows.csv: found no row below the header"),
        ("", "rows.csv: found an empty file"),
    ],
)
def test_rows_of_other_columns_are_refused_by_name(classifier, tmp_path, capsys, text, says):
    rows, out = written(tmp_path / "rows.csv", text), tmp_path / "out.csv"
    code, lines, err = predict(capsys, classifier, rows, "--out", out)
    assert (code, lines) == (2, []) and says in err and not out.exists()
    assert len(err.splitlines()) <= 2


def test_values_unlike_the_declaration_are_told(classifier, tmp_path, capsys):
    text = "smoker,age,dose\nnever,140,2\npipe,61,-1\npipe,30,9\n"
    code, lines, err = predict(capsys, classifier, written(tmp_path / "rows.csv", text))
    assert code == 0 and len(lines) == 4
    assert err.splitlines() == [
        "warning: 2 rows have a value of 'smoker' that is not declared: it counts as `other`",
        "warning: 1 row has a value of 'age' outside its declared range 0 to 120",
        "warning: 2 rows have a value of 'dose' outside its declared range 0 to 8",
    ]


@pytest.mark.parametrize("ending", ["npy", "npz", "parquet"])
@pytest.mark.parametrize("ranges", [None, ((0, 10), (-5, 5))])
def test_arrays_come_from_a_file_of_an_array(tmp_path, capsys, ending, ranges):
    about = {"model": "torch.nn.Linear(2, 3)", "metric": "accuracy", "ranges": ranges}
    run, path = model_file(tmp_path, ARRAY_TASK, **about), tmp_path / f"rows.{ending}"
    rows = np.array([[1.0, 2.0], [9.0, -4.0]])
    if ranges:  # as the run of such a task records it
        from fedcore.learning.data.arrays import array_layout
        from fedcore.learning.data.statistics import Statistics

        task, layout = load_task("task.py", tmp_path), array_layout(ranges)
        scale = Statistics.of_ranges(layout.names, layout.ranges)
        (run / FILE).write_bytes(model_bytes(nn.Linear(2, 3), task, scale, layout))
    if ending == "parquet":
        pd.DataFrame(rows, columns=["a", "b"]).to_parquet(path)
    else:
        np.save(path, rows) if ending == "npy" else np.savez(path, x=rows, y=np.zeros(2))
    code, (titles, *lines), _ = predict(capsys, run, path)
    assert code == 0 and titles == ["class", "probability_0", "probability_1", "probability_2"]
    found = [[float(value) for value in line[1:]] for line in lines]
    np.testing.assert_array_equal(found, load_model(run, None).predict(rows))


def test_whole_numbers_are_looked_up_by_a_model_that_embeds(tmp_path, capsys):
    model = "torch.nn.Sequential(torch.nn.Embedding(9, 1), torch.nn.Flatten())"
    run = model_file(tmp_path, ARRAY_TASK, model=model, metric="accuracy", ranges=None)
    np.save(tmp_path / "rows.npy", np.array([[1, 2, 3], [4, 5, 6]]))
    code, lines, _ = predict(capsys, run, tmp_path / "rows.npy")
    assert code == 0 and len(lines) == 3


@pytest.mark.parametrize(
    ("name", "rows", "says"),
    [
        ("rows.npy", np.zeros((2, 5)), r"found rows of shape \[5\] and type float32, which the"),
        ("rows.npy", np.array([["a", "b"]]), "found X of dtype <U1, expected numbers"),
        ("rows.npy", np.full((1, 2), np.nan), "found 2 NaN or infinite values in X columns 0, 1"),
        ("rows.npy", np.array([[{}, 1]]), r"rows.npy: found no readable array \(ValueError\)"),
        ("rows.npz", {"a": np.zeros(2), "b": np.zeros(2)}, "found the arrays a, b, expected one"),
        ("rows.csv", None, r"found rows.csv, expected a path ending in .npy, .npz or .parquet"),
        ("none.npy", None, "predict: found no file"),
    ],
)
def test_arrays_that_the_model_does_not_take(tmp_path, capsys, name, rows, says):
    about = {"model": "torch.nn.Linear(2, 3)", "metric": "accuracy", "ranges": None}
    run, path = model_file(tmp_path, ARRAY_TASK, **about), tmp_path / name
    if isinstance(rows, dict):
        np.savez(path, **rows)
    elif rows is not None:
        np.save(path, rows, allow_pickle=True)
    elif name == "rows.csv":
        path.write_text("a,b\n1,2\n")
    code, lines, err = predict(capsys, run, path)
    assert (code, lines) == (2, []) and re.search(says, err)
    assert len(err.splitlines()) <= 2


def test_a_released_file_takes_its_task_from_the_flag(classifier, tmp_path, capsys):
    rows, elsewhere = written(tmp_path / "rows.csv"), tmp_path / "sent"
    elsewhere.mkdir()
    file = (classifier / FILE).rename(elsewhere / "released.safetensors")
    code, _, err = predict(capsys, file, rows)
    assert code == 2 and "found no file" in err and "task.py" in err
    code, lines, err = predict(capsys, file, rows, "--task", tmp_path / "task.py")
    assert (code, err) == (0, "") and len(lines) == 3


def test_a_changed_task_is_told_and_one_of_another_shape_refused(classifier, tmp_path, capsys):
    rows, task = written(tmp_path / "rows.csv"), tmp_path / "task.py"
    text = task.read_text()
    task.write_text(text + "\nLATER = 1\n")
    code, lines, err = predict(capsys, classifier, rows)
    assert code == 0 and len(lines) == 3
    assert err == "warning: the code of the task changed since the model was trained\n"
    task.write_text(text.replace("columns), 1)", "columns), 4)"))
    code, _, err = predict(capsys, classifier, rows)
    assert code == 2 and "makes another model than the one in the file" in err
    task.write_text(text.replace("torch.nn.Linear(", "torch.nn.Bilinear(2, "))
    code, _, err = predict(capsys, classifier, rows)
    assert code == 2 and "makes another model than the one in the file" in err


def test_a_folder_or_file_without_a_model(tmp_path, capsys):
    rows = written(tmp_path / "rows.csv")
    (tmp_path / "compared").mkdir()
    (tmp_path / "compared" / "result.json").write_text('{"kind": "compare"}')
    for run, says in [
        (tmp_path / "compared", "a comparison keeps no model"),
        (tmp_path, "the run did not finish"),
        (tmp_path / "none", "the folder of a run, or the file of a released model"),
        (rows, "found no model of Fedcore in it"),
    ]:
        code, _, err = predict(capsys, run, rows)
        assert code == 2 and says in err, err
        assert len(err.splitlines()) == 2


@pytest.mark.usefixtures("no_drawings")
def test_a_model_that_takes_scaled_inputs_says_so(tmp_path):
    brief = {"rounds": 1, "arms": ("federated",), "resamples": 0}
    run = fedcore.simulate("heart", protection="plain", out=tmp_path, **brief)
    from fedcore.learning.data import heart

    rows = heart._records("VA Long Beach")
    with pytest.warns(UserWarning, match="takes 30 scaled inputs, not raw rows: use run.predict"):
        model = run.model
    with torch.no_grad():
        logits = model(run.inputs(rows))[:, 0].double()
    np.testing.assert_allclose(torch.sigmoid(logits).numpy(), run.predict(rows), rtol=1e-6)
    assert run.classes == ()
