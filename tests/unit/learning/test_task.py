from __future__ import annotations

import sys

import pytest
import torch

from fedcore.errors import BadInput, TaskFailed, UnknownName
from fedcore.learning import task_code
from fedcore.learning.data.linear import linear
from fedcore.learning.data.tabular import number, table
from fedcore.learning.task import Task, load_task, user_traceback

TEXT = """
import fedcore
other = fedcore.Task(name="other", data=len, model=list, loss=max)
task = fedcore.Task(name="mine", data=len, model=list, loss=max)
number = 3
"""


def make(**changed):
    parts = {"name": "t", "data": lambda s: s, "model": lambda: None, "loss": lambda o, t: o}
    return Task(**(parts | changed))


def test_file_with_and_without_attribute(tmp_path):
    (tmp_path / "task.py").write_text(TEXT)
    assert load_task(str(tmp_path / "task.py")).name == "mine"
    assert load_task("task.py:other", tmp_path).name == "other"


def test_built_in_and_package():
    assert load_task("heart").origin == "heart"
    assert load_task("fedcore.learning.data.heart:task").name == "heart"


@pytest.mark.parametrize(
    ("spec", "kind", "says", "hint"),
    [
        ("hart", UnknownName, "'hart'", "heart"),
        ("task", UnknownName, "'task'", "digits, fashion"),
        ("no.py", BadInput, "no file", "fedcore new"),
        ("task.py:missing", BadInput, "no attribute 'missing'", "ATTRIBUTE"),
        ("task.py:number", BadInput, "found int in attribute 'number'", "fedcore.Task"),
        ("no_such_package_here:task", BadInput, "no module", "install"),
    ],
)
def test_what_is_not_there(tmp_path, spec, kind, says, hint):
    (tmp_path / "task.py").write_text(TEXT)
    with pytest.raises(kind) as caught:
        load_task(spec, tmp_path)
    assert says in str(caught.value) and hint in caught.value.remedy


def test_a_stranger_beside_the_task_does_no_harm(tmp_path):
    (tmp_path / "server.py").write_text("raise SystemExit('a stranger ran')")
    (tmp_path / "clients").mkdir()
    (tmp_path / "task.py").write_text(TEXT)
    before = set(sys.modules)
    load_task("task.py", tmp_path)
    added = {name: sys.modules[name] for name in set(sys.modules) - before}
    ours = {
        name
        for name, module in added.items()
        if str(tmp_path) in str(getattr(module, "__file__", ""))
    }
    assert ours and all(name.startswith("_fedcore_task_") for name in ours)
    assert str(tmp_path) not in sys.path


@pytest.mark.parametrize(
    ("text", "kind", "hint"),
    [
        ("1 / 0", "ZeroDivisionError", ""),
        ("def broken(:", "SyntaxError", ""),
        ("import helper_beside", "ModuleNotFoundError", "package"),
        ("import no_such_module_anywhere", "ModuleNotFoundError", ""),
    ],
)
def test_a_file_that_fails(tmp_path, text, kind, hint):
    (tmp_path / "helper_beside.py").touch()
    (tmp_path / "task.py").write_text(text)
    with pytest.raises(TaskFailed, match=kind) as caught:
        load_task("task.py", tmp_path)
    shown = caught.value.user_traceback
    assert (
        "task.py" in shown and "fedcore/learning/task.py" not in shown and "importlib" not in shown
    )
    assert bool(caught.value.remedy) == bool(hint) and hint in caught.value.remedy
    assert not any("_fedcore_task_" in name and sys.modules[name] is None for name in sys.modules)


def test_traceback_starts_at_the_users_frame():
    from fedcore.learning.data.loading import load_rows

    def data(source):
        raise ValueError("theirs")

    with pytest.raises(TaskFailed) as caught:
        load_rows(make(data=data), None, "va")
    lines = caught.value.user_traceback.splitlines()
    assert lines[0].startswith("Traceback") and "test_task.py" in lines[1]
    assert lines[-1] == "ValueError: theirs"


def test_traceback_without_a_users_frame_hides_ours():
    with pytest.raises(BadInput) as caught:
        table(target="a", columns={"a": number(0, 1)})
    error = caught.value
    error.__traceback__ = error.__traceback__.tb_next  # drops this test's own frame
    assert "Traceback" not in user_traceback(error)


def test_bad_parts():
    sklearn = pytest.importorskip("sklearn.linear_model")
    with pytest.raises(BadInput) as caught:
        make(model=sklearn.LogisticRegression())
    assert "LogisticRegression" in str(caught.value) and "fedcore.linear" in caught.value.remedy
    with pytest.raises(BadInput, match=r"task.name: found 'a b'"):
        make(name="a b")
    with pytest.raises(BadInput, match=r"task.loss: found str"):
        make(loss="mse")
    with pytest.raises(BadInput) as caught:
        make(metrics="auc")
    assert 'metrics=("auc",)' in caught.value.remedy


def test_digest_follows_text_and_declarations():
    def data(source):
        return source

    def other(source):
        return list(source)

    same = make(data=data, model=linear(3, 2))
    assert same.digest() == make(data=data, model=linear(3, 2)).digest()
    changed = [
        make(data=other, model=linear(3, 2)),
        make(data=data, model=linear(4, 2)),
        make(data=data, model=linear(3, 2), name="u"),
        make(data=data, model=linear(3, 2), metrics=("auc",)),
        make(data=data, model=linear(3, 2), statistics=((0, 1),)),
        make(data=table(target="t", columns={"a": number(0, 1)}), model=linear(3, 2)),
        make(data=table(target="t", columns={"a": number(0, 2)}), model=linear(3, 2)),
    ]
    assert len({same.digest(), *(task.digest() for task in changed)}) == 8
    assert make(data=len).digest() == make(data=len).digest()  # no source to read


def write(folder, helper="return source", extra=""):
    folder.mkdir()
    path = folder / "my.py"
    path.write_text(
        f"import torch, fedcore\n{extra}\n"
        f"def helper(source):\n    {helper}\n"
        "def data(source):\n    return helper(source)\n"
        "def model():\n    return torch.nn.Linear(4, 2)\n"
        "COLUMNS = {'age': fedcore.number(0, 120)}\n"
        "task = fedcore.Task('h', data, model, torch.nn.functional.cross_entropy)\n"
        "other = fedcore.Task('h', data, model, torch.nn.functional.mse_loss)\n"
    )
    return path


def test_digest_covers_the_whole_file(tmp_path):
    """A helper, a declaration that no function's text shows, and an import are part of what an operator allows."""
    path = write(tmp_path / "a")
    first = load_task(str(path))
    assert first.covers() == "task.py"
    assert (
        load_task(str(write(tmp_path / "b"))).digest() == first.digest()
    )  # the same text elsewhere
    changed = [
        write(tmp_path / "c", helper="import os; os.system('touch x'); return source"),
        write(tmp_path / "d", extra="import json"),
        write(tmp_path / "e", extra="# a comment"),
    ]
    digests = {first.digest(), *(load_task(str(each)).digest() for each in changed)}
    digests.add(load_task(f"{path}:other").digest())
    assert len(digests) == 5


@pytest.mark.parametrize(
    "how", ["import mylib", "from mylib.io import rows", "import mylib.io as m"]
)
def test_digest_covers_local_packages_that_the_file_imports(tmp_path, monkeypatch, how):
    for name in ("mylib", "mylib.io", "mysecond"):  # of the case before
        monkeypatch.delitem(sys.modules, name, raising=False)
    library = tmp_path / "src" / "mylib"
    library.mkdir(parents=True)
    (library / "__init__.py").write_text("import mysecond\n")
    (library / "io.py").write_text("rows = 1\n")
    (tmp_path / "src" / "mysecond.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path / "src")
    path = write(tmp_path / "t", extra=how)
    task = load_task(str(path))
    assert task.covers() == "mylib (2 files) and mysecond.py and task.py"
    seen = {task.digest()}
    (library / "io.py").write_text("rows = 2\n")
    seen.add(task.digest())
    (tmp_path / "src" / "mysecond.py").write_text("x = 2\n")
    seen.add(task.digest())
    (library / "more.py").write_text("")
    seen.add(task.digest())
    assert len(seen) == 4


def test_digest_covers_the_file_beside_a_module_that_is_called_task(tmp_path, monkeypatch):
    """Both files have the name `task.py` in the hash."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "task.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(tmp_path / "src")
    monkeypatch.delitem(sys.modules, "task", raising=False)
    path = write(tmp_path / "t", extra="import task as theirs")
    first = load_task(str(path))
    seen = {first.digest(), load_task(str(write(tmp_path / "u", extra="import task"))).digest()}
    assert first.covers() == "task.py (2 files)"
    (tmp_path / "src" / "task.py").write_text("x = 2\n")
    seen.add(first.digest())
    path.write_text(path.read_text() + "# changed\n")
    seen.add(first.digest())
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("name", "place"), [("heartlib", "src"), ("fedcore_heart", "src"), ("sitelib", "site-packages")]
)
def test_digest_of_a_task_from_a_package_covers_the_package(tmp_path, monkeypatch, name, place):
    package = tmp_path / place / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "helpers.py").write_text("x = 1\n")
    (package / "template.py").write_text("{{ no Python }}\n")
    write(tmp_path / "t").rename(package / "tasks.py")
    monkeypatch.syspath_prepend(tmp_path / place)
    task = load_task(f"{name}.tasks:task")
    assert task.covers() == f"{name} (4 files)"
    before = task.digest()
    (package / "helpers.py").write_text("x = 2\n")
    assert task.digest() != before


def test_a_file_of_known_content_is_not_parsed_again_however_many_there_are(tmp_path, monkeypatch):
    """A run takes two digests; a cache of 256 files made each of them parse 300 files anew, 2 s of CPU."""
    monkeypatch.syspath_prepend(str(tmp_path))
    package = tmp_path / "wide_package"
    package.mkdir()
    for place in range(300):
        (package / f"part{place}.py").write_text(f"import json\nNUMBER = {place}\n")
    (package / "__init__.py").write_text("")
    task = load_task(str(write(tmp_path / "t", extra="import wide_package")))
    digest = task.digest()
    assert "wide_package (301 files)" in task.covers()
    monkeypatch.setattr(task_code, "_imports", None)
    assert task.digest() == digest
    (package / "part7.py").write_text("import wide_package\n")
    with pytest.raises(TypeError):  # control: content that is not known is parsed
        task.digest()


def test_installed_libraries_and_fedcore_are_not_covered():
    assert load_task("heart").covers() == "fedcore/learning/data/heart.py"
    assert load_task("heart").digest() == load_task("heart").digest()
    exec("def data(source):\n    return source", code := {"__name__": "__main__"})
    task = Task("t", code["data"], code["data"], torch.nn.MSELoss())
    assert task.covers() == "the source of its functions, without what they call"


@pytest.mark.parametrize("name", ["loss", "round", "arm", "confusion", "predicts", "seconds_train"])
def test_metric_with_the_name_of_a_column_of_every_run_is_refused(name):
    with pytest.raises(
        BadInput, match=f"task.metrics: found '{name}', which every run has"
    ) as caught:
        make(metrics=("accuracy", name), evaluate=lambda model, rows: {})
    assert caught.value.remedy == f"such as eval_{name}"
    assert make(metrics=("eval_loss",), evaluate=lambda model, rows: {}).metrics == ("eval_loss",)
