"""Every command of the tutorials runs, one after the other, in an empty folder."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from support.preloaded import preloaded

PAGES = sorted((Path(__file__).parents[2] / "docs" / "tutorials").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_tutorial_run(page, tmp_path):
    program = tmp_path / "bin" / "fedcore"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {preloaded().python} -P -m fedcore.cli.main "$@"\n')
    program.chmod(0o755)
    blocks = re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) > 2
    said = ""
    for line in "".join(blocks).splitlines():
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=600,
            env={**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"},
        )  # fmt: skip
        assert done.returncode == 0, (line, done.stdout[-2000:], done.stderr[-2000:])
        said += done.stdout + done.stderr
    if page.stem == "first-federation":
        hashes = re.findall(r"^model\s+(\w{64})", said, re.MULTILINE)
        assert len(hashes) == 2 and len(set(hashes)) == 1  # protection does not change a bit
