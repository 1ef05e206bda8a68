"""From a run directory to its report: files whole or not at all, and nothing heavy imported."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedcore import report
from fedcore.errors import BadInput

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    shutil.copy(FIXTURES / "heart.json", tmp_path / "result.json")
    shutil.copy(FIXTURES / "heart.rounds.jsonl", tmp_path / "rounds.jsonl")
    return tmp_path


def test_write_leaves_both_reports_and_nothing_else(run_dir):
    path = report.write(run_dir)
    assert path == run_dir / "report.html"
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert (run_dir / "report.md").read_text(encoding="utf-8").startswith("# heart: 4 sites")
    names = {p.name for p in run_dir.iterdir()}
    assert names == {"result.json", "rounds.jsonl", "report.html", "report.md"}


def test_a_report_that_cannot_be_made_leaves_the_former_one(run_dir):
    before = report.write(run_dir).read_bytes()
    result = run_dir / "result.json"
    result.write_text(result.read_text().replace('"per_site"', '"of_site"'))
    with pytest.raises(BadInput):
        report.write(run_dir)
    assert (run_dir / "report.html").read_bytes() == before


def linked(page):
    return re.findall(r'<a href="([^"]*)"', page.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "more", [(), ("model.safetensors",), ("model.safetensors", "plan.json", "notes.txt")]
)
def test_the_page_links_to_the_known_files_beside_it_and_to_nothing_else(run_dir, more):
    for name in more:
        (run_dir / name).touch()
    known = {"result.json", "rounds.jsonl", "report.md", *more} - {"notes.txt"}
    assert set(linked(report.write(run_dir))) == known


def test_the_page_says_how_to_load_the_model(run_dir):
    (run_dir / "model.safetensors").touch()
    text = report.write(run_dir).read_text(encoding="utf-8")
    assert 'fedcore.load("runs/heart-encrypted-001")' in text
    assert "<code>fedcore.load(folder).model</code>" in text


def test_a_comparison_has_no_rounds(tmp_path):
    shutil.copy(FIXTURES / "heart_compare.json", tmp_path / "result.json")
    result, rounds = report.read(tmp_path)
    assert result["kind"] == "compare" and rounds == []
    assert "By seed and fold" in report.write(tmp_path).read_text(encoding="utf-8")


def test_bad_directories_are_one_clear_line(tmp_path):
    with pytest.raises(BadInput, match=r"result\.json"):
        report.read(tmp_path)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(BadInput, match="JSON"):
        report.read(tmp_path)
    (tmp_path / "result.json").write_text('{"schema": 2}')
    with pytest.raises(BadInput, match="found schema 2, expected 1"):
        report.read(tmp_path)


def test_render_knows_three_forms(run_dir):
    run = report.read(run_dir)
    assert report.render([run]).startswith("<!doctype html>")
    assert report.render([run, run], "md").count("## Methods") == 2
    assert "\\toprule" in report.render([run], "latex")
    with pytest.raises(BadInput, match="found 'pdf'"):
        report.render([run], "pdf")
    with pytest.raises(BadInput, match="no run"):
        report.render([], "md")


def test_the_terminal_needs_neither_torch_nor_plotting_nor_numpy():
    code = (
        "import sys, fedcore.report.terminal, fedcore.report.markdown, fedcore.report.latex\n"
        "heavy = {'torch', 'matplotlib', 'numpy', 'tenseal', 'jinja2'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
