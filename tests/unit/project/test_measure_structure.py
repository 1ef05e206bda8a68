"""scripts/measure-structure: a small tree with every kind of finding, and this repository."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "scripts" / "measure-structure"

TREE = {
    "fedcore/__init__.py": "",
    "fedcore/plan.py": """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            from fedcore.report import page  # not counted
        MASKS = ("masked", "layered")
        class Plan:
            rounds: int
            sites = 2
            def __init__(self):
                self.rounds = 1
                self.seed = 0
                other.key = 3
            @property
            def first(self):
                self.done: bool = False
        def check(protection, plan, name, row, step):
            a = protection == "plain"
            b = plan.protection not in MASKS
            c = name in (*MASKS, "encrypted")
            d = row["purpose"] in {"update"} or row.get("purpose") != "range"
            e = step == Step("update", 1)
            not_these = plan.protection == other.protection, row["name"] == "update", a > b
        """,
    "fedcore/report/__init__.py": """
        def draw():
            from . import page
            from fedcore import plan
        """,
    "fedcore/report/page.py": """
        import fedcore.plan
        from .. import report
        TABLE = {"plain": 1, "masked": 2}
        OTHER = {"metrics": 1, "rounds": 2}
        class Plan: ...
        class _Row: ...
        """,
    "fedcore/secagg/protocol/round/site.py": """
        def step(stage: Any, event: "Event", now: Any) -> Any:
            match stage.purpose:
                case "update" | "range": ...
                case other: ...
        """,
    "fedcore/secagg/protocol/epoch/site.py": "waiting_events: list[Any] = []",
    "fedcore/secagg/protections.py": 'def masks(protection): return protection == "masked"',
    "server/job_runner.py": "from fedcore_server.job_log import Rows\nimport fedcore\nclass _Row: ...",
    "server/rows.py": "class Rows: ...\nclass Runner: ...",  # one Runner at each role: one meaning
    "clients/jobs.py": "from fedcore.report.page import Plan",
    "clients/page.py": "class Runner: ...\nclass Keys(TypedDict):\n    a: int; b: int; c: int; d: int; e: int",
    "pyproject.toml": """
        [[tool.importlinter.contracts]]
        type = "layers"
        layers = ["server | clients", "fedcore"]
        [[tool.importlinter.contracts]]
        type = "layers"
        layers = ["report", "plan : secagg", "errors"]
        [[tool.importlinter.contracts]]
        type = "forbidden"
        """,
}
FIGURES = {
    "largest_class_attributes": 4,  # rounds, sites, seed, done
    "largest_class_methods": 2,
    "largest_file_lines": 23,
    "room_arrows": 3,
    "layers": 3,
    "string_comparisons": 8,
    "import_cycles": 1,
    "any_stages": 2,
    "double_names": 3,
    "lines": 54,
}


@pytest.fixture
def tree(tmp_path):
    for path, text in TREE.items():
        lines = [line.removeprefix("        ") for line in text.splitlines()]
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("\n".join(lines) + "\n")
    return tmp_path


def measure(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)], capture_output=True, text=True
    )


def test_measures_every_kind_of_finding(tree):
    assert json.loads(measure("--root", tree, "--json").stdout) == FIGURES


@pytest.mark.parametrize(
    ("key", "places"),
    [
        ("largest_class_methods", ["2  fedcore/plan.py:6  Plan"]),
        (
            "room_arrows",
            [
                "clients -> report  clients/jobs.py:1",
                "report -> plan  fedcore/report/__init__.py:4 fedcore/report/page.py:2",
                "server -> fedcore  server/job_runner.py:2",
            ],
        ),
        (
            "import_cycles",
            [
                "fedcore.report <-> fedcore.report.page"
                "  fedcore/report/__init__.py:3 fedcore/report/page.py:3"
            ],
        ),
        (
            "string_comparisons",
            [
                'fedcore/plan.py:17  a = protection == "plain"',
                "fedcore/plan.py:18  b = plan.protection not in MASKS",
                'fedcore/plan.py:19  c = name in (*MASKS, "encrypted")',
                'fedcore/plan.py:20  d = row["purpose"] in {"update"} or row.get("purpose") != "range"',
                'fedcore/plan.py:20  d = row["purpose"] in {"update"} or row.get("purpose") != "range"',
                'fedcore/plan.py:21  e = step == Step("update", 1)',
                'fedcore/report/page.py:4  TABLE = {"plain": 1, "masked": 2}',
                'fedcore/secagg/protocol/round/site.py:4  case "update" | "range": ...',
            ],
        ),
        (
            "any_stages",
            [
                "fedcore/secagg/protocol/epoch/site.py:1  waiting_events: list[Any] = []",
                'fedcore/secagg/protocol/round/site.py:2  def step(stage: Any, event: "Event",'
                " now: Any) -> Any:",
            ],
        ),
        (
            "double_names",
            [
                "class Plan  fedcore/plan.py:6 fedcore/report/page.py:6",
                "class _Row  fedcore/report/page.py:7 server/job_runner.py:3",
                "file page  clients/page.py fedcore/report/page.py",
            ],
        ),
    ],
)
def test_lists_the_places_behind_a_number(tree, key, places):
    found = measure("--root", tree, "--list", key).stdout.splitlines()
    assert [line.strip() for line in found][: len(places)] == places
    if not key.startswith("largest"):
        assert len(found) == FIGURES[key]


def test_check_fails_when_a_target_is_missed_and_says_which(tree):
    missed = measure("--root", tree, "--check")
    assert missed.returncode == 1
    assert [line.split()[0] for line in missed.stdout.splitlines() if line.endswith("missed")] == [
        "string_comparisons",
        "import_cycles",
        "any_stages",
    ]
    for path in ("plan.py", "report/page.py", "report/__init__.py"):
        (tree / "fedcore" / path).write_text("")
    for path in ("epoch/site.py", "round/site.py"):
        (tree / "fedcore/secagg/protocol" / path).write_text("")
    met = measure("--root", tree, "--check")
    assert (met.returncode, "missed" in met.stdout) == (0, False)


def test_measures_this_repository():
    found = measure("--json")
    assert found.returncode == 0, found.stderr
    figures = json.loads(found.stdout)
    assert list(figures) == list(FIGURES)
    assert figures["layers"] > 0
    assert figures["room_arrows"] > 0
    assert figures["lines"] > 10 * figures["largest_file_lines"] > 0
