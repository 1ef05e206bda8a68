from __future__ import annotations

import csv
import math

import pytest

import fedcore
from fedcore.cli import scaffold
from fedcore.cli.scaffold import create
from fedcore.errors import AlreadyExists, BadInput


def test_it_runs_as_it_is(tmp_path, monkeypatch):
    create(tmp_path / "mine")
    monkeypatch.chdir(tmp_path)
    run = fedcore.simulate(job=tmp_path / "mine" / "job.toml", rounds=6, out=tmp_path / "run")
    assert run.result["sites"] == ["north", "south", "coast"]
    assert run.result["protection"] == "layered"
    assert run.result["arms"]["federated"]["auc"] > 0.7
    assert not any("not declared" in warning for warning in run.result.warnings)


def test_what_is_written(tmp_path):
    paths = create(tmp_path / "a" / "mine")
    names = {path.relative_to(tmp_path / "a" / "mine").as_posix() for path in paths}
    assert names == {
        "task.py", "job.toml", "README.md", "data/north.csv", "data/south.csv", "data/coast.csv",
    }  # fmt: skip
    assert all(path.is_file() for path in paths)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]
    assert "CHANGE" in (tmp_path / "a" / "mine" / "task.py").read_text()


def test_the_readme_gives_the_formula():
    """Computed again from the words of README.md, without our generator."""
    state, u = 1, []
    for _ in range(6 * scaffold.ROWS):
        state = (1103515245 * state + 12345) % 2**31
        u.append(state / 2**31)
    rows = list(csv.DictReader(scaffold.table_text(1, 45).splitlines()))
    assert len(rows) == 120
    for i, row in enumerate(rows):
        u1, u2, u3, u4, u5, u6 = u[6 * i : 6 * i + 6]
        age = round(45 + 40 * (u1 - 0.5) + 20 * (u2 - 0.5))
        pressure = round(100 + age / 2 + 40 * (u3 - 0.5))
        smoker = "never" if u5 < 0.5 else "former" if u5 < 0.8 else "current"
        z = (age - 55) / 8 + (pressure - 128) / 12 + 2 * (smoker == "current")
        assert row == {
            "age": str(age),
            "pressure": "" if u4 < 0.1 else str(pressure),
            "smoker": smoker,
            "ill": str(int(u6 < 1 / (1 + math.exp(-z)))),
        }


def test_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "mine").mkdir()
    create(tmp_path / "mine")
    assert (tmp_path / "mine" / "job.toml").is_file()


def test_nothing_is_overwritten_without_force(tmp_path):
    (tmp_path / "task.py").write_text("mine")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(AlreadyExists) as caught:
        create(tmp_path)
    assert "notes.txt, task.py" in str(caught.value) and "--force" in caught.value.remedy
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "task.py"]
    create(tmp_path, force=True)
    assert (tmp_path / "task.py").read_text() == scaffold.TASK
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "mine").write_text("")
    with pytest.raises(AlreadyExists, match="file"):
        create(tmp_path / "mine")
    with pytest.raises(BadInput, match="cannot write"):
        create(tmp_path / "mine" / "deeper")
