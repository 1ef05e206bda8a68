"""README's commands and Python, run as a newcomer runs them: from a fresh clone, in the page's order.

Those of the other pages with screens (benchmarks, absences) follow in the same clone.

Where scripts/setup made the environment that this test runs in, from the same pins, the installation
that README begins with has just been run, and the clone borrows its libraries; elsewhere the clone sets
itself up like any fresh machine. The tests that README starts must not start this test again, so it
steps aside when it finds itself inside itself.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest
from test_contract import COMPARE

ROOT = Path(__file__).resolve().parents[2]
INSIDE = "FEDCORE_README_TEST"
OTHERS = ("benchmarks.md", "jobs.md")
PINS = ("pyproject.toml", "constraints.txt")
FEWER = {
    "fedcore bench protect": "--parameters 10000 --repeats 1",
    "fedcore bench secagg": "--parameters 10000 --sites 4,16",
    "fedcore bench fold": "--parameters 10000",
    "fedcore simulate my-task": "--rounds 5",
    "fedcore up my-task": "--rounds 2",
}
"""Commands that measure or train for long, and what makes them short: options that come again replace
the first ones, and whether the command runs is seen all the same."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(INSIDE in os.environ, reason="already inside README's own commands"),
]


def fenced(kind: str, markdown: str) -> list[str]:
    """The texts of the fenced blocks of this kind, also of those inside a list, without its indentation."""
    blocks = re.findall(rf"^( *)```{kind}\n(.*?)^\1```", markdown, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(text) for _, text in blocks]


def commands(markdown: str) -> list[str]:
    """The lines after `$ ` in fenced `console` blocks; a trailing backslash continues a command.

    A block whose fence says `console skip` shows what needs something a clone does not have.
    """
    found = []
    for block in fenced("console", markdown):
        joined = block.replace("\\\n", " ")
        found += [line[2:].strip() for line in joined.splitlines() if line.startswith("$ ")]
    return found


def label(text: str) -> list[str]:
    """The words of the label as a run prints it, whatever the width it was wrapped at."""
    found = re.search(
        r"^Protects against: .*?(?=^(?:hint:|round ))", text, re.DOTALL | re.MULTILINE
    )
    return found.group().split() if found else []


def tables(text: str) -> list[list[str]]:
    """The words of the rows that have figures under a ruler: arms, causes and sites."""
    blocks = re.findall(r"^─+\n(.*?)\n\n", text, re.DOTALL | re.MULTILINE)
    return [line.split() for block in blocks for line in block.splitlines()]


def test_commands_are_read_from_console_blocks_only():
    page = "```console\n$ one \\\n  two\nout\n$ three\n```\n```console skip\n$ no\n```\n```sh\n$ no\n```\n"
    page += "1. In a list:\n\n   ```console\n   $ four\n   ```\n"
    assert [" ".join(line.split()) for line in commands(page)] == ["one two", "three", "four"]


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    if shutil.which("git") is None:
        pytest.skip("no git on this machine")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode != 0:
        pytest.skip("not a git repository with a commit: there is nothing to clone")
    folder = tmp_path_factory.mktemp("clone") / "fedcore"
    subprocess.run(
        ["git", "clone", "--quiet", "--no-local", str(ROOT), str(folder)], check=True, timeout=300
    )
    if was_set_up_for(folder):
        borrow(folder)
    return folder


def was_set_up_for(clone: Path) -> bool:
    """Whether scripts/setup installed the pins of this clone into the environment of this test."""
    here = Path(sys.prefix)
    same = all((ROOT / name).read_bytes() == (clone / name).read_bytes() for name in PINS)
    return here == ROOT / ".venv" and (here / "fedcore-setup").is_file() and same


def borrow(clone: Path) -> None:
    """What scripts/setup would make in this clone, but for the libraries: those are where they are."""
    venv = clone / ".venv"
    run = {"check": True, "timeout": 300, "capture_output": True, "text": True}
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], **run)
    python = venv / "bin" / "python"
    ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    purelib = Path(subprocess.run(ask, **run).stdout.strip())
    libraries = [path for path in sys.path if path.endswith("-packages")]
    assert sysconfig.get_path("purelib") in libraries
    # What a .pth names comes behind, and no .pth in there is read: not the one of our own install.
    (purelib / "borrowed.pth").write_text("\n".join(libraries) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--no-index", "--no-build-isolation", "--editable", clone], **run)
    # The stamp by which scripts/setup sees that nothing is left to do, by its own words.
    wanted = next(
        line
        for line in (clone / "scripts" / "setup").read_text().splitlines()
        if line.startswith("wanted()")
    )
    stamp = subprocess.run(
        ["bash", "-c", f"root={shlex.quote(str(clone))}\n{wanted}\nwanted"], **run
    )
    (venv / "fedcore-setup").write_text(stamp.stdout)


def test_readme_runs_from_a_fresh_clone(clone):
    page = (clone / "README.md").read_text()
    others = [commands((clone / "docs" / name).read_text()) for name in OTHERS]
    assert all(others)
    found = sum(others, commands(page))
    assert found[0].startswith("scripts/demo"), "the page begins with the demo"
    # The commands a reader types after `. .venv/bin/activate` find `fedcore` the same way here.
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    env |= {INSIDE: "1", "PATH": f"{clone / '.venv' / 'bin'}:{os.environ['PATH']}"}
    # `scripts/test` is on the page; the whole suite runs outside of this test already, and is not even
    # collected here: one file that loads no torch stands for it.
    env["PYTEST_ADDOPTS"] = str(next((clone / "tests").rglob("test_mailbox.py")))
    outputs = {}
    assert COMPARE in found
    for command in found:
        if command == COMPARE:
            continue  # test_contract.py runs it, and looks at what comes out
        fewer = next((more for start, more in FEWER.items() if command.startswith(start)), "")
        done = subprocess.run(
            ["bash", "-c", f"{command} {fewer}"],
            cwd=clone,
            env=env,
            capture_output=True,
            text=True,
            timeout=900,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, f"$ {command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        outputs[command] = done.stdout + done.stderr
    assert (clone / "runs" / "latest" / "report.html").is_file()

    for block in fenced("python", page):
        script = [str(clone / ".venv" / "bin" / "python"), "-c", block]
        done = subprocess.run(
            script, cwd=clone, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{block}\n{done.stderr[-4000:]}"

    demo = outputs[found[0]]
    assert ("set-up:" in demo) is not was_set_up_for(clone)
    assert "centralised" in demo and "federated" in demo
    assert label(page) and label(page) == label(demo), (
        "the page shows the label that the demo prints"
    )
    shown = page.partition("$ scripts/demo\n")[2].partition("```")[0]
    assert len(tables(shown)) > 8 and tables(shown) == tables(demo), "README shows other figures"
    dropped = next(
        line for line in found if line.startswith("fedcore simulate") and "--drop" in line
    )
    absences = (clone / "docs" / "jobs.md").read_text()
    stayed = re.findall(r"^round .+ abandoned at .+$", absences, re.MULTILINE)
    assert stayed and stayed == re.findall(
        r"^round .+ abandoned at .+$", outputs[dropped], re.MULTILINE
    )
