"""Every command of the tutorials runs, one after the other, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.preloaded import preloaded

PAGES = sorted((Path(__file__).parents[2] / "docs" / "tutorials").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_tutorial_run(page, tmp_path):
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, starts in (
        ("fedcore", f"{preloaded().python} -P -m fedcore.cli.main"),
        ("python", sys.executable),
    ):
        (programs / name).write_text(f'#!/bin/sh\nexec {starts} "$@"\n')
        (programs / name).chmod(0o755)
    text = page.read_text()
    for name, body in re.findall(r"^```python\n# (\S+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        (tmp_path / name).write_text(body)
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) > 2
    said = ""
    for line in "".join(blocks).splitlines():
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600,
            env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
        )  # fmt: skip
        assert done.returncode == 0, (line, done.stdout[-2000:], done.stderr[-2000:])
        said += done.stdout + done.stderr
    hashes = re.findall(r"^model\s+(\w{64})", said, re.MULTILINE)
    assert hashes[-1] == hashes[-2] or page.stem == "own-tables"  # protection does not change a bit
    if page.stem == "own-tables":
        table, found = (
            tmp_path / "mytask" / each for each in ("data/north.csv", "predictions.csv")
        )
        rows = found.read_text().splitlines()
        assert rows[0].startswith("class,probability_")
        assert len(rows) == len(table.read_text().splitlines())
    if page.stem == "own-torch-code":
        *_, scores = re.findall(r"^tensor\(\[\[(.*?), (.*?)\]\]", said, re.MULTILINE)
        assert sum(map(float, scores)) == pytest.approx(1, abs=1e-3)
