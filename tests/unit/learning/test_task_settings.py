"""Settings that a task declares: given to its functions, typed, recorded, the same simulated and deployed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from fedcore_clients.worker import Worker
from fedcore_server import operators
from torch import nn

import fedcore
from fedcore.cli.reproduce import reproduce
from fedcore.config import build_job, read_job_file, settings_digest, wire_settings
from fedcore.errors import BadInput, UnknownName
from fedcore.experiment.prepare import job_for
from fedcore.learning.data.split import FoldSplit
from fedcore.learning.task import Task, load_task

TASK_FILE = """
import numpy as np, torch, fedcore

def data(source, rows):
    x = np.random.default_rng(source).normal(size=(rows, 3))
    return x, (x.sum(axis=1) > 0).astype(int)

def model(*, hidden, activation="relu"):
    between = {"relu": torch.nn.ReLU, "tanh": torch.nn.Tanh}[activation]
    return torch.nn.Sequential(torch.nn.Linear(3, hidden), between(), torch.nn.Linear(hidden, 2))

task = fedcore.Task(name="own", data=data, model=model, loss=torch.nn.CrossEntropyLoss(),
    sites={"a": 1, "b": 2, "c": 3}, settings={"hidden": 8, "rows": 20, "activation": "relu"})
"""
BRIEF = {"protection": "plain", "arms": ["federated"], "rounds": 1, "resamples": 0}


@pytest.fixture
def file(tmp_path):
    (tmp_path / "task.py").write_text(TASK_FILE)
    return tmp_path / "task.py"


def task_of(settings, **parts):
    given = {
        "data": lambda source: source,
        "model": lambda: nn.Linear(3, 2),
        "loss": nn.functional.cross_entropy,
    }
    return Task(name="t", settings=settings, **given | parts)


def seen(*names):
    """A function that returns what it was given."""
    text = (
        f"lambda *args, {', '.join(names)}: (args, {{{', '.join(f'{n!r}: {n}' for n in names)}}})"
    )
    return eval(text)


def test_each_function_gets_the_settings_that_it_names():
    settings = {"a": 1, "b": 0.5, "c": "x"}
    parts = {
        "data": seen("a"), "model": seen("a", "b", "c"), "loss": seen("b"), "predict": seen("c"),
        "train": seen("a", "c"), "evaluate": lambda model, rows: "none",
    }  # fmt: skip
    task = task_of(settings, **parts).with_settings({"a": 2, "c": "y"})
    assert task.data("source") == (("source",), {"a": 2})
    assert task.model() == ((), {"a": 2, "b": 0.5, "c": "y"})
    assert task.loss("o", "t") == (("o", "t"), {"b": 0.5})
    assert task.predict("m", "b") == (("m", "b"), {"c": "y"})
    assert task.train("m", "r", "f") == (("m", "r", "f"), {"a": 2, "c": "y"})
    assert task.evaluate("m", "r") == "none"
    assert task.values == {"a": 2, "b": 0.5, "c": "y"} and task.given == {"a": 2, "c": "y"}


def test_an_argument_of_the_call_is_no_setting_though_it_has_its_name():
    task = task_of({"rows": 3}, data=lambda rows: rows, train=lambda model, part, fit, rows: rows)
    assert task.data("the source") == "the source" and task.train(0, 0, 0) == 3


class Net(nn.Linear):
    def __init__(self, hidden, depth=1):
        super().__init__(hidden, depth)


def test_a_class_of_modules_takes_settings_too():
    task = task_of({"hidden": 3, "depth": 2}, model=Net).with_settings({"depth": 5})
    assert task.model().weight.shape == (5, 3)


def test_defaults_come_back_and_change_nothing():
    task = task_of({"a": 1, "b": (1, 2)}, model=seen("a", "b"))
    other = task.with_settings({"a": 2, "b": [3]})
    assert other.model() == ((), {"a": 2, "b": (3,)})
    assert other.with_settings({}).model() == task.model()
    assert task.with_settings({"a": 1, "b": [1, 2]}) is task
    assert other.digest() == task.digest()


@pytest.mark.parametrize(
    ("default", "given", "found"),
    [
        (64, 32, 32), (0.5, 1, 1.0), (0.5, 0.25, 0.25), ("relu", "tanh", "tanh"), (True, False, False),
        ((64, 32), [8], (8,)), ((0.5,), [1, 2], (1.0, 2.0)), ((), ["any"], ("any",)),
    ],
)  # fmt: skip
def test_a_value_has_the_type_of_the_default(default, given, found):
    value = task_of({"a": default}, model=seen("a")).with_settings({"a": given}).values["a"]
    assert value == found and type(value) is type(found)


@pytest.mark.parametrize(
    ("default", "given", "says"),
    [
        (64, 2.5, "task.a: found 2.5, expected a whole number, as its default 64"),
        (64, "64", "task.a: found '64', expected a whole number"),
        (64, True, "task.a: found True, expected a whole number"),
        (0.5, "x", "task.a: found 'x', expected a number"),
        (0.5, float("nan"), "task.a: found nan, expected a number"),
        ("relu", 3, "task.a: found 3, expected a text, as its default 'relu'"),
        (True, 1, "task.a: found 1, expected true or false"),
        ((1, 2), 3, "task.a: found 3, expected a list"),
        ((1, 2), ["x"], "task.a: found 'x', expected a whole number"),
    ],
)
def test_a_value_of_another_type_is_refused(default, given, says):
    with pytest.raises(BadInput, match=says):
        task_of({"a": default}, model=seen("a")).with_settings({"a": given})


def test_an_unknown_setting_is_refused_with_the_nearest():
    with pytest.raises(UnknownName, match=r"task\.hiden") as caught:
        task_of({"hidden": 1}, model=seen("hidden")).with_settings({"hiden": 2})
    assert caught.value.remedy == "did you mean 'task.hidden'?"
    with pytest.raises(BadInput, match=r"task\.hidden: task 'heart' declares no settings"):
        job_for(None, {"task": "heart", "task.hidden": 3})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"unused": 1}, "found 'unused', which no function of the task takes"),
        ({"a b": 1}, "found the name 'a b', expected that of a parameter"),
        ({"a": None}, "found None as the default of 'a', expected a number"),
        ({"a": [object()]}, "as the default of 'a', expected a number"),
        (["a"], "found list, expected names with their defaults"),
    ],
)
def test_a_declaration_that_cannot_be_is_refused(settings, says):
    with pytest.raises(BadInput, match=says):
        task_of(settings, model=lambda a=1: None)


def test_file_flag_and_keyword_set_the_same_and_later_ones_win(file):
    toml = file.with_name("job.toml")
    toml.write_text('task = "task.py"\n[task_settings]\nhidden = 4\nrows = 30\n')
    _, job = job_for(None, read_job_file(toml), {"task.hidden": 5})
    task, same = job_for(None, {"task": str(file)}, {"task_settings": {"hidden": 5, "rows": 30}})
    assert job.task_settings == same.task_settings == task.given == {"hidden": 5, "rows": 30}
    _, none = job_for(None, {"task": str(file), "task.hidden": 8})
    assert none.task_settings == {} and "task_settings" not in wire_settings(none)


def test_a_table_for_the_task_s_name_is_refused():
    with pytest.raises(BadInput, match="task: found a table, expected the task's name or file"):
        job_for(None, {"task": {"name": "heart", "hidden": 3}})
    with pytest.raises(BadInput, match="task_settings: found int, expected a table"):
        build_job({"task_settings": 3})


@pytest.mark.usefixtures("no_drawings")
def test_a_run_records_its_settings_and_everything_after_it_uses_them(file):
    own = {"hidden": 3, "activation": "tanh"}
    run = fedcore.simulate(str(file), task_settings=own, out=file.parent / "run", **BRIEF)
    assert json.loads((run.directory / "job.json").read_text())["task_settings"] == own
    assert run.result.plan["task_settings"] == {"rows": 20, **own}
    loaded = fedcore.load(run.directory)
    assert [type(m).__name__ for m in loaded.model] == ["Linear", "Tanh", "Linear"]
    assert loaded.model[0].weight.shape == (3, 3)
    rows = np.eye(3)
    exported = torch.jit.load(loaded.export())
    np.testing.assert_allclose(exported(torch.eye(3)).numpy(), loaded.predict(rows), rtol=1e-6)
    assert reproduce(run.directory).same


def test_settings_are_part_of_what_sites_check_and_reach_the_training_process(file):
    path = file.with_name("job.toml")
    path.write_text('task = "task.py"\n[protect]\nmax_examples = 64\n')
    request = operators.prepare(path, read_job_file(path), {"task.hidden": 3, "task.rows": 20})
    sent = json.loads(request.about)["settings"]
    assert sent["task_settings"] == {"hidden": 3}
    plain = operators.prepare(path, read_job_file(path), {})
    digests = {
        settings_digest(build_job(json.loads(each.about)["settings"]), 64)
        for each in (request, plain)
    }
    assert len(digests) == 2, "another plan, which the sites would notice"
    head, blobs = Worker().answer(
        {
            "do": "load", "job": "j", "task": "task.py", "base": str(file.parent), "site": "a", "source": 1,
            "digest": load_task(str(file)).digest(), "settings": sent,
            "split": FoldSplit(0, 0, 5).to_json(),
        }, [],
    )  # fmt: skip
    assert head["shape"]["parameters"] == 3 * 3 + 3 + 3 * 2 + 2
    assert len(blobs[0]) == 4 * head["shape"]["parameters"]


def test_a_deployment_s_job_is_refused_by_name_when_it_is_submitted(file):
    path = Path(file.with_name("job.toml"))
    path.write_text('task = "task.py"\n[task_settings]\nhidden = "wide"\n')
    with pytest.raises(BadInput, match=r"task\.hidden: found 'wide', expected a whole number"):
        operators.prepare(path, read_job_file(path), {})
