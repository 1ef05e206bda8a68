"""The documentation site builds without a warning: links, anchors, references and the help of the commands."""

import re
import shutil
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
    """With the settings of the site, of which two pages stand for all; with a link that leads somewhere it builds."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "docs_site.py", tmp_path / "scripts")
    settings = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[0]
    nav = "\nnav:\n  - Job files: jobs.md\n  - Explanation:\n      - Decisions: decisions/\n"
    (tmp_path / "mkdocs.yml").write_text(settings + nav)
    (tmp_path / "docs" / "decisions").mkdir(parents=True)
    (tmp_path / "docs" / "decisions" / "0001-one.md").write_text("# One\n")
    page = tmp_path / "docs" / "jobs.md"
    page.write_text("# Jobs\n\n[fine](decisions/0001-one.md)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 0, done.stderr
    page.write_text("# Jobs\n\n[broken](no-such-page.md)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    assert "jobs.md" in done.stderr and "no-such-page.md" in done.stderr
