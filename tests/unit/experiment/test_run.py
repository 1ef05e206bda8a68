"""Run directories: numbered, resumable, reproducible; the model takes raw rows after loading."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fedcore
from fedcore.cli.reproduce import reproduce
from fedcore.errors import AlreadyExists, BadInput, TaskFailed
from fedcore.experiment import api
from fedcore.experiment.run import list_runs
from fedcore.files import read_json, write_atomic
from fedcore.learning import saved
from fedcore.secagg.protections import PROTECTIONS

pytestmark = pytest.mark.usefixtures("no_drawings")


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def heart(**settings):
    return fedcore.simulate("heart", **{"rounds": 2, "protection": "plain"} | settings)


def test_runs_are_numbered_and_latest_points_to_the_newest():
    assert heart().directory == Path("runs/heart-plain-001")
    assert heart().directory == Path("runs/heart-plain-002")
    assert Path("runs/latest").resolve() == Path("runs/heart-plain-002").resolve()
    assert [run.folder for run in list_runs()] == ["runs/heart-plain-001", "runs/heart-plain-002"]


def test_a_run_holds_what_it_says():
    found = heart(protection="layered")
    names = {path.name for path in found.directory.iterdir()}
    assert names >= {
        "plan.json", "job.json", "rounds.jsonl", "result.json", "model.safetensors", "report.html", "report.md",
    }  # fmt: skip
    assert "checkpoint.pt" not in names
    assert len(found.rounds) == 2 * 4
    assert {"round", "arm", "accuracy", "auc"} <= set(found.rounds[0])
    assert found.result["label"] == read_json(found.directory / "plan.json")["label"]


def test_rows_hold_the_metrics_of_each_site_for_the_arms_that_a_site_compares():
    found = heart()
    last = {row.arm: row.per_site for row in found.rounds if row.round == 2}
    per_site = found.result.per_site
    for arm in ("local_only", "federated"):
        assert last[arm] == {site: values.arms[arm] for site, values in per_site.items()}
    assert last["centralised"] == last["federated_float"] == {}


def test_rows_of_very_many_sites_hold_none_of_their_metrics():
    job = [{"task": "digits", "sites": {"n": 65, "by": "iid"}}]
    settings = {"rounds": 1, "protection": "plain", "arms": ["federated"], "resamples": 10}
    (row,) = fedcore.simulate(job=job, **settings).rounds
    assert row.per_site == {} and row.number("accuracy") is not None


def test_an_existing_directory_needs_force_and_force_takes_only_runs(tmp_path):
    heart(out="here")
    with pytest.raises(AlreadyExists, match="found here"):
        heart(out="here")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("years of work")
    with pytest.raises(AlreadyExists, match="no run of ours"):
        heart(out="thesis", force=True)
    assert (tmp_path / "thesis" / "chapter.txt").read_text() == "years of work"
    assert heart(out="here", force=True, seed=1).result["seed"] == 1


def failing(when):
    def data(source):
        rng = np.random.default_rng(source)
        return rng.normal(size=(40, 3)).astype("f4"), rng.integers(0, 2, 40)

    def train(module, rows, fit):
        if fit.round == when:
            raise RuntimeError("the disk is on fire")

    return fedcore.Task(
        "failing", data, lambda: torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy, train=train,
        sites={"a": 1, "b": 2, "c": 3},
    )  # fmt: skip


def test_a_failure_before_the_first_whole_round_leaves_nothing():
    with pytest.raises(TaskFailed, match="round 1"):
        fedcore.simulate(failing(1), rounds=2)
    assert not list(Path("runs").glob("failing-*"))


def test_a_forced_run_that_fails_gives_the_former_one_back():
    before = heart(out="here").result
    with pytest.raises(TaskFailed):
        fedcore.simulate(failing(1), rounds=2, out="here", force=True)
    assert fedcore.load("here").result == before
    assert [path.name for path in Path().iterdir() if "replaced" in path.name] == []


def test_a_failure_later_keeps_the_rounds_that_were_whole():
    with pytest.raises(TaskFailed, match="round 2"):
        fedcore.simulate(failing(2), rounds=3)
    (directory,) = Path("runs").glob("failing-*")
    assert (directory / "checkpoint.pt").is_file()


def interrupt_after(round_, arm="federated"):
    def stop(row):
        if (row["round"], row["arm"]) == (round_, arm):
            raise KeyboardInterrupt

    return stop


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_an_interrupted_run_resumes_to_the_same_bits(protection):
    settings = {"rounds": 4, "protection": protection, "optimiser": "adam", "server": "fedadam"}
    whole = heart(**settings)
    for round_, arm in ((1, "centralised"), (2, "federated"), (3, "local_only")):
        out = f"broken-{round_}"
        with pytest.raises(KeyboardInterrupt):
            heart(**settings, on_round=interrupt_after(round_, arm), out=out)
        found = api.resume(out)
        assert found.result["model_sha256"] == whole.result["model_sha256"]
        for key in ("arms", "gap", "per_site", "clipped_fraction"):
            assert found.result[key] == whole.result[key], key
        measured = ("seconds", "peak", "bytes")
        rows = [
            [{k: v for k, v in row.items() if not k.startswith(measured)} for row in r.rounds]
            for r in (found, whole)
        ]
        assert rows[0] == rows[1]


def test_a_checkpoint_of_another_version_is_refused_by_its_form():
    with pytest.raises(KeyboardInterrupt):
        heart(rounds=3, on_round=interrupt_after(2), out="broken")
    path = Path("broken") / "checkpoint.pt"
    kept = saved.read_checkpoint(path.read_bytes())
    del kept["form"]
    path.write_bytes(saved.checkpoint_bytes(kept))
    with pytest.raises(BadInput, match="found a checkpoint of form 1, expected 3") as refused:
        api.resume("broken")
    assert "new run" in refused.value.remedy
    assert path.is_file(), "it is left as it was"


def test_a_finished_run_is_not_resumed():
    with pytest.raises(BadInput, match="is finished"):
        api.resume(heart().directory)


def test_resume_notices_a_changed_task(tmp_path):
    text = """
import numpy as np, torch, fedcore
def data(s):
    r = np.random.default_rng(int(s)); return r.normal(size=(40, 3)).astype("f4"), r.integers(0, 2, 40)
def model():
    return torch.nn.Linear(3, 2)
task = fedcore.Task("mine", data, model, torch.nn.functional.cross_entropy, sites={"a": "1", "b": "2", "c": "3"})
"""
    Path("mine.py").write_text(text)
    with pytest.raises(KeyboardInterrupt):
        fedcore.simulate("mine.py", rounds=3, on_round=interrupt_after(2), out="run")
    import linecache

    Path("mine.py").write_text(text.replace("Linear(3, 2)", "Linear(3, 2, bias=True)"))
    linecache.clearcache()
    with pytest.raises(BadInput, match="the task changed"):
        api.resume("run")


def test_reproduce_says_same_or_where_it_first_differs():
    found = heart(protection="layered")
    assert reproduce(found.directory).same
    rows = found.rounds
    rows[5]["auc"] += 1e-9
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomic(found.directory / "rounds.jsonl", text.encode())
    again = reproduce(found.directory)
    assert not again.same
    assert re.match(r"round 2, arm local_only: auc was", again.difference)


def test_reproduce_notices_another_model_hash_alone():
    found = heart()
    result = found.result.to_json() | {"model_sha256": "0" * 64}
    (found.directory / "result.json").write_text(json.dumps(result))
    assert "final model differs" in reproduce(found.directory).difference


def test_a_run_made_in_memory_says_why_it_cannot_be_made_again():
    task = failing(9)
    found = fedcore.simulate(task, rounds=1)
    with pytest.raises(BadInput, match="made in memory"):
        reproduce(found.directory)
    assert reproduce(found.directory, task=task).same


def test_a_loaded_model_takes_raw_rows():
    import pandas as pd

    from fedcore.learning.data import heart as module

    found = heart(rounds=5)
    frame = pd.read_csv(Path(module.__file__).with_name("heart.csv"))
    direct = found.predict(frame)
    loaded = fedcore.load(found.directory)
    np.testing.assert_array_equal(loaded.predict(frame), direct)
    assert direct.shape == (len(frame),) and ((direct > 0) & (direct < 1)).all()
    assert ((direct > 0.5) == (frame["num"] > 0)).mean() > 0.7
    subset = frame.drop(columns="num").iloc[:3]
    np.testing.assert_allclose(loaded.predict(subset), direct[:3], rtol=1e-6)


def test_a_model_of_a_task_in_memory_needs_the_task():
    task = failing(9)
    found = fedcore.simulate(task, rounds=1)
    with pytest.raises(BadInput, match="made in memory"):
        _ = fedcore.load(found.directory).model
    model = fedcore.load(found.directory, task=task).model
    assert isinstance(model, torch.nn.Linear) and not model.training


def test_print_is_plain_text_and_names_the_gap():
    text = str(heart())
    assert "\x1b" not in text and "points" in text and "reproduce" in text


def test_gap_reads_by_metric():
    gap = heart().gap["auc"]
    assert gap.mean == gap["mean"] == gap["total"]["mean"]
    assert set(gap.parts) == {"total", "federation", "quantisation", "protection", "local_only"}
    assert gap.low <= gap.high


def test_plot_is_a_figure():
    figure = heart().plot()
    assert len(figure.axes) >= 1


def test_compare_tables():
    found = fedcore.compare("heart", seeds=2, folds=2, rounds=2, protection="plain")
    table = found.table()
    assert len(table) == 2 * 2 * 4 and set(table["arm"]) >= {"centralised", "federated"}
    assert "tabular" in found.latex()
    assert len(found.rounds) == 2 * 2 * 4 * 2 and {"seed", "fold"} <= set(found.rounds[0])
    assert "Round by round" in found.report().read_text()
    assert found.report().is_file()
    gap = found.result["gap"]["total"]["auc"]
    assert gap["n"] == 4 and "Nadeau" in gap["method"]
    assert found.result["gap"]["protection"]["auc"]["mean"] == 0
    assert fedcore.load(found.directory).result == found.result
    assert reproduce(found.directory).same


def test_overlay_of_two_runs():
    from fedcore import report

    a, b = heart(), heart(seed=1)
    page = report.render([report.read(a.directory), report.read(b.directory)])
    assert "heart-plain-001" in page and "heart-plain-002" in page


@pytest.mark.parametrize("content", ["", "[]", "{broken"])
def test_a_broken_result_is_refused_by_name(tmp_path, content):
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(BadInput, match=re.escape("result.json")):
        fedcore.load(tmp_path)


def test_an_interrupt_before_the_first_round_can_be_resumed():
    def stop(row):
        raise KeyboardInterrupt

    whole = heart()
    with pytest.raises(KeyboardInterrupt):
        heart(out="early", on_round=stop)
    assert not (Path("early") / "checkpoint.pt").is_file()
    assert api.resume("early").result["model_sha256"] == whole.result["model_sha256"]


def test_an_interrupted_forced_run_gives_the_former_one_back():
    before = heart(out="here").result
    with pytest.raises(KeyboardInterrupt):
        heart(out="here", force=True, seed=1, on_round=interrupt_after(1, "centralised"))
    assert fedcore.load("here").result == before


def test_a_run_whose_report_failed_is_kept_and_resume_draws_it(monkeypatch):
    from fedcore import report

    def broken(directory):
        raise RuntimeError("no ink")

    with monkeypatch.context() as patch:
        patch.setattr(report, "write", broken)
        with pytest.raises(RuntimeError, match="no ink"):
            heart(out="kept")
    assert not Path("kept/report.html").exists()
    assert api.resume("kept").result == fedcore.load("kept").result
    assert Path("kept/report.html").is_file()


def test_of_two_runs_that_take_one_directory_one_is_refused():
    def second(prepared, directory):
        with pytest.raises(BadInput, match="writing into it, expected one command"):
            heart(out="same")

    assert heart(out="same", on_ready=second).result["rounds"] == 2
    assert len(fedcore.load("same").rounds) == 8


def test_a_stopped_run_reproduces():
    found = heart(rounds=6, on_round=lambda row: fedcore.STOP if row["round"] == 2 else None)
    assert found.result["rounds"] == 2
    assert reproduce(found.directory).same


def test_a_comparison_reproduces_with_its_seeds_in_their_order():
    found = fedcore.compare("heart", seeds=(3, 1), folds=2, rounds=1, protection="plain")
    assert [cell["seed"] for cell in found.result["cells"]] == [3, 3, 1, 1]
    assert reproduce(found.directory).same


def test_a_comparison_is_not_resumed_as_a_run():
    found = fedcore.compare("heart", seeds=1, folds=2, rounds=1, protection="plain")
    (found.directory / "result.json").unlink()
    with pytest.raises(BadInput, match="found the comparison"):
        api.resume(found.directory)


def test_own_test_rows_make_folds_pointless_and_the_comparison_says_so():
    def data(source):
        rng = np.random.default_rng(source)
        x, y = rng.normal(size=(60, 3)).astype("f4"), rng.integers(0, 2, 60)
        return (x[:40], y[:40]), (x[40:], y[40:])

    task = fedcore.Task(
        "own", data, lambda: torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy,
        sites={"a": 1, "b": 2, "c": 3},
    )  # fmt: skip
    found = fedcore.compare(task, seeds=2, folds=4, rounds=1, protection="plain").result
    assert len(found["cells"]) == 2 and found["folds"] == 1
    assert any("brings its own test rows" in line for line in found["warnings"])
    assert not any("gave the same scores" in line for line in found["warnings"]), "control"


def table_task(high, categories=("x", "y")):
    import pandas as pd

    def frame(source):
        rng = np.random.default_rng(source)
        age = rng.uniform(20, 80, 60)
        kind = rng.choice(["x", "y"], 60)
        return reader(pd.DataFrame({"age": age, "kind": kind, "ill": (age > 50).astype(int)}))

    reader = fedcore.table(
        target="ill",
        columns={"age": fedcore.number(0, high), "kind": fedcore.category(*categories)},
    )
    return fedcore.Task(
        "table", frame, fedcore.linear(), torch.nn.functional.binary_cross_entropy_with_logits,
        predict=lambda model, batch: (model(batch[0])[:, 0], batch[1].float()),
        sites={"a": 1, "b": 2, "c": 3},
    )  # fmt: skip


@pytest.mark.parametrize("changed", [table_task(90), table_task(120, ("y", "x"))])
def test_the_plan_covers_how_columns_become_inputs(changed):
    from fedcore.experiment.prepare import job_for, prepare

    digests = {prepare(*job_for(task, {})).plan.digest for task in (table_task(120), changed)}
    assert len(digests) == 2
    with pytest.raises(KeyboardInterrupt):
        fedcore.simulate(table_task(120), rounds=3, out="run", on_round=interrupt_after(2))
    with pytest.raises(BadInput, match=r"columns of the tables changed|the task changed"):
        api.resume("run", task=changed)


def test_resume_notices_changed_rows(tmp_path):
    assert fedcore.simulate  # the façade is loaded before the folder changes
    from fedcore.cli.scaffold import create

    create(tmp_path / "mine")
    with pytest.raises(KeyboardInterrupt):
        fedcore.simulate(job=tmp_path / "mine", rounds=3, out="run", on_round=interrupt_after(2))
    csv = next((tmp_path / "mine" / "data").glob("*.csv"))
    lines = csv.read_text().splitlines()
    csv.write_text("\n".join(lines[:-5]) + "\n")
    with pytest.raises(BadInput, match="rows of the sites changed"):
        api.resume("run")


def test_a_loaded_model_finds_its_task_from_any_folder(tmp_path, monkeypatch):
    import pandas as pd

    from fedcore.cli.scaffold import create

    create(tmp_path / "mine")
    found = fedcore.simulate(job=tmp_path / "mine", rounds=2, out="run")
    csv = next((tmp_path / "mine" / "data").glob("*.csv"))
    expected = found.predict(pd.read_csv(csv))
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "task.py").write_text("raise RuntimeError('a stranger was run')")
    monkeypatch.chdir(elsewhere)
    loaded = fedcore.load(tmp_path / "run")
    np.testing.assert_array_equal(loaded.predict(pd.read_csv(csv)), expected)


def test_paths_count_from_the_layer_they_stand_in(tmp_path):
    from fedcore.cli.scaffold import create

    create(tmp_path / "mine")
    Path("north").mkdir()  # a folder named like nothing in particular
    found = fedcore.simulate("mine/task.py", job=tmp_path / "mine", rounds=1, protection="plain")
    assert len(found.result["sites"]) == 3
    Path("va").mkdir()
    assert heart(sites={"cleveland": "cleveland", "va": "va", "hungary": "hungary"}).result[
        "rounds"
    ]


def test_a_hint_travels_with_the_exception():
    with pytest.raises(BadInput) as caught:
        fedcore.simulate("hart")
    assert caught.value.__notes__ == ["hint: did you mean 'heart'?"]
    with pytest.raises(BadInput, match="task: found int"):
        fedcore.simulate(5)


def test_site_ids_may_be_numbers_but_not_twice_the_same():
    task = failing(9)
    assert fedcore.simulate(task, sites={1: 1, 2: 2, 3: 3}, rounds=1).result["sites"] == [
        "1",
        "2",
        "3",
    ]
    with pytest.raises(BadInput, match="same site id twice"):
        fedcore.simulate(task, sites={1: 1, "1": 2, 3: 3}, rounds=1)


def test_an_own_error_metric_has_the_right_sign():
    def evaluate(module, rows):
        total = sum(float((module(x)[:, 0] - y).abs().sum()) for x, y in rows.batches(8, None))
        return {"mistake": (total, len(rows))}

    base = failing(9)
    task = fedcore.Task(
        "own", base.data, base.model, base.loss, ("mistake",), evaluate=evaluate,
        lower_is_better=("mistake",), sites=base.sites,
    )  # fmt: skip
    result = fedcore.simulate(task, rounds=2, lr=0.5).result
    arms = result["arms"]
    assert result["gap"]["total"]["mistake"]["mean"] == pytest.approx(
        arms["federated"]["mistake"] - arms["centralised"]["mistake"]
    )
    assert result["lower_is_better"] == ["mistake"]


def test_sites_of_a_task_that_makes_them_have_one_spelling():
    found = fedcore.simulate("digits", rounds=1, protection="plain", **{"sites.n": 5})
    assert len(found.result["sites"]) == 5
    with pytest.raises(BadInput) as caught:
        fedcore.simulate("digits", sites={"n": 5, "bby": "iid"})
    assert "sites.by" in caught.value.remedy


def test_an_empty_directory_is_claimed_once(tmp_path):
    """Both of two runs may find it empty; only the first to put its file there has it."""
    from fedcore.experiment.run import _claim

    (tmp_path / "free").mkdir()
    _claim(tmp_path / "free")
    with pytest.raises(AlreadyExists, match="another run has just taken"):
        _claim(tmp_path / "free")
