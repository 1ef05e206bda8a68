"""The table of attacks names tests that exist, and every file of the suite is in it."""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAMED = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")


def missing(text):
    """The tests that are named there and are not in their files."""
    found = []
    for path, name in NAMED.findall(text):
        file = ROOT / path
        source = file.read_text(encoding="utf-8") if file.is_file() else None
        if source is None or (name and f"\ndef {name}(" not in source):
            found.append(f"{path}::{name}")
    return found


def test_every_test_of_the_table_exists():
    text = (HERE / "README.md").read_text(encoding="utf-8")
    assert missing(text) == []
    assert missing("`tests/hostile/test_masks.py::test_gone` `tests/gone.py`") == [
        "tests/hostile/test_masks.py::test_gone", "tests/gone.py::",
    ]  # fmt: skip
    named = {path for path, _ in NAMED.findall(text)}
    files = {f"tests/hostile/{path.name}" for path in HERE.glob("test_*.py")}
    assert files - named == {"tests/hostile/test_table.py"}
