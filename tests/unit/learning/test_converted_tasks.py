"""The examples of docs/coming-from-*.md run, and learn."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import fedcore

DOCS = Path(__file__).resolve().parents[3] / "docs"
BLOCK = re.compile(r"^```python\n(# task\.py\n.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\$ fedcore simulate task\.py --rounds (\d+)(?: --lr (\S+))?$", re.MULTILINE)
PAGES = {
    page.stem.removeprefix("coming-from-"): page.read_text()
    for page in DOCS.glob("coming-from-*.md")
    if BLOCK.search(page.read_text())
}


def test_each_framework_has_a_page():
    assert {"fate", "nvflare", "openfl"} <= set(PAGES)


@pytest.mark.parametrize("name", sorted(PAGES))
def test_the_converted_example_learns(name, tmp_path, monkeypatch):
    (block,) = BLOCK.findall(PAGES[name])
    (tmp_path / "task.py").write_text(block)
    ((rounds, rate),) = COMMAND.findall(PAGES[name])
    monkeypatch.chdir(tmp_path)
    settings = {"lr": float(rate)} if rate else {}
    run = fedcore.simulate(
        "task.py",
        rounds=int(rounds),
        protection="plain",
        arms=("federated",),
        out=tmp_path / "run",
        **settings,
    )
    metric = next(iter(run.result["metrics"]))
    assert run.result["arms"]["federated"][metric] > 0.85
