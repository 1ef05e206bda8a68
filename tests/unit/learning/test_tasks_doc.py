"""docs/tasks.md promises that a test runs each of its five forms: this is that test."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import fedcore

PAGE = Path(__file__).resolve().parents[3] / "docs" / "tasks.md"
SECTION = re.compile(r"^## (\d)\. (.+?)$(.*?)(?=^## )", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```python\n# (\S+\.py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

FORMS = {title: dict(BLOCK.findall(body)) for _, title, body in SECTION.findall(PAGE.read_text())}


def write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"# {name}\n{text}")


def test_the_page_shows_five_forms():
    assert list(FORMS) == [
        "A data frame",
        "A DataLoader",
        "A Hugging Face dataset, batches as dicts",
        "Your own loops",
        "A package",
    ]
    assert all(FORMS.values())


@pytest.mark.parametrize("title", FORMS)
def test_form_runs(title, tmp_path, monkeypatch):
    write(tmp_path, FORMS[title])
    spec = "task.py"
    if title == "A package":
        (tmp_path / "hospital_tasks" / "__init__.py").touch()
        monkeypatch.syspath_prepend(tmp_path)
        spec = "hospital_tasks.ecg:ecg"
    monkeypatch.chdir(tmp_path)
    try:
        run = fedcore.simulate(spec, rounds=2, protection="plain", out=tmp_path / "run")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "hospital_tasks"]:
            del sys.modules[name]
    assert len(run.result["sites"]) == 3
    for arm in ("centralised", "federated"):
        for metric in run.result["metrics"]:
            assert 0 <= run.result["arms"][arm][metric] <= 1


def test_the_forms_learn(tmp_path, monkeypatch):
    """The data frame's sites agree on one model that beats guessing."""
    write(tmp_path, FORMS["A data frame"])
    monkeypatch.chdir(tmp_path)
    run = fedcore.simulate("task.py", rounds=8, protection="plain", lr=0.3, out=tmp_path / "run")
    assert run.result["sites"] == ["east-coast", "north", "south"]
    assert run.result["arms"]["federated"]["auc"] > 0.8
