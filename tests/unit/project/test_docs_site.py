"""The documentation site builds without a warning: links, anchors, references and the help of the commands."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def build(root, out):
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(out)],
        cwd=root, capture_output=True, text=True, check=False, timeout=600,
        env={"NO_MKDOCS_2_WARNING": "1", "PATH": "/usr/bin:/bin"},
    )  # fmt: skip


def test_site_builds_and_has_every_name_and_command(tmp_path):
    done = build(ROOT, tmp_path)
    assert done.returncode == 0, done.stderr
    python = (tmp_path / "reference" / "python.html").read_text()
    import fedcore

    for name in set(fedcore.__all__) - {"__version__"}:
        assert re.search(rf'id="fedcore[\w.]*\.{name}"', python), name
    commands = (tmp_path / "reference" / "commands.html").read_text()
    for command in (
        "fedcore simulate",
        "fedcore bench engine",
        "fed-coordinator serve",
        "fed-site check",
    ):
        assert f"Usage: {command} " in commands


def test_a_broken_link_fails_the_build(tmp_path):
    for name in (
        "docs",
        "scripts",
        "fedcore",
        "clients",
        "server",
        "mkdocs.yml",
        "README.md",
        "tests",
    ):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "docs").unlink()
    (tmp_path / "docs").mkdir()
    for each in (ROOT / "docs").iterdir():
        (tmp_path / "docs" / each.name).symlink_to(each)
    page = tmp_path / "docs" / "jobs.md"
    page.unlink()
    page.write_text("# Jobs\n\n[broken](no-such-page.md)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    assert "jobs.md" in done.stderr and "no-such-page.md" in done.stderr
