"""How the suite's files are dealt to its test processes: the longest first, so that all end together."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[2]


@pytest.fixture
def longest(request):
    """The names in tests/conftest.py."""
    files = {
        getattr(each, "__file__", None): each for each in request.config.pluginmanager.get_plugins()
    }
    return files[str(TESTS / "conftest.py")].LONGEST


def test_the_longest_files_are_dealt_first(tmp_path, longest):
    """A real test process of xdist: it is told `--dist no`, whatever its controller deals by."""
    shutil.copy(TESTS / "conftest.py", tmp_path)
    first, second = longest[:2]
    for name in ("test_a.py", second, "test_b.py", first):
        (tmp_path / name).write_text("def test():\n    pass\n")
    words = [
        "-v",
        "-n",
        "1",
        "--dist",
        "loadfile",
        "--no-loadscope-reorder",
        "-p",
        "no:cacheprovider",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words, str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    ran = re.findall(r"PASSED (test_\w+\.py)::test", done.stdout)
    assert ran[:2] == [first, second] and sorted(ran[2:]) == ["test_a.py", "test_b.py"]


def test_the_longest_files_are_there(longest):
    names = [path.name for path in TESTS.rglob("test_*.py")]
    assert [name for name in longest if names.count(name) != 1] == []
    assert len(set(longest)) == len(longest)


def test_what_tests_share_does_not_import_the_folder_of_all_tests():
    """The digest of a task covers what its file imports: of a test's task, hundreds of files for each run."""
    imports = re.compile(r"^\s*(from|import) tests\b", re.MULTILINE)
    found = [p.name for p in (TESTS / "support").glob("*.py") if imports.search(p.read_text())]
    assert found == []
