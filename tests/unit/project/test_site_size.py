"""scripts/site-size: what is counted, and that a site needs little beside torch, tenseal and grpcio."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.scripts import load_script

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def script():
    return load_script("site-size")


def install(packages, name, kilobytes, *needs):
    """A distribution with one file of code and one of bytecode."""
    about = packages / f"{name}-1.0.dist-info"
    about.mkdir(parents=True)
    lines = [
        f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.0",
        *(f"Requires-Dist: {x}" for x in needs),
    ]
    (about / "METADATA").write_text("\n".join(lines) + "\n")
    for ending, size in (("py", kilobytes * 1000), ("pyc", 9_000_000)):
        with (packages / f"{name}.{ending}").open("wb") as file:
            file.truncate(size)
    (about / "RECORD").write_text(f"{name}.py,,\n{name}.pyc,,\n")


@pytest.mark.parametrize(("kilobytes", "code"), [(300, 0), (61_000, 1)])
def test_what_torch_needs_is_not_counted_as_added(script, tmp_path, capsys, kilobytes, code):
    install(tmp_path, "torch", 2000, "Nu_Mpy>1", "absent; extra == 'gpu'")
    install(tmp_path, "nu.mpy", 1500)
    install(tmp_path, "rich", kilobytes)
    assert script.report(tmp_path) == code
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("MB in 3 packages")
    assert lines[1].endswith("and what they need: 3.5 MB")
    assert lines[2] == f"everything else: {kilobytes / 1000:.1f} MB, expected at most 60 MB"
    assert re.fullmatch(rf" +{kilobytes / 1000:.1f} MB  rich", lines[3]) and len(lines) == 4


def test_a_site_needs_at_most_60_mb_beside_torch_tenseal_and_grpcio(script):
    """Of the versions that the tests run on, without an environment of its own."""
    installed = {canonicalize_name(each.metadata["Name"]): each for each in distributions()}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = tuple(Requirement(line).name for line in project["dependencies"])
    assert {canonicalize_name(name) for name in named} <= {*installed}
    added = script.needed(installed, named) - script.needed(installed, script.HEAVY)
    assert {"cryptography", "sqlalchemy", "pydantic"} <= added
    source = [
        path for folder in ("fedcore", "clients", "server") for path in (ROOT / folder).rglob("*")
    ]
    ours = sum(path.stat().st_size for path in source if path.is_file() and path.suffix != ".pyc")
    total = sum(script.size(installed[name]) for name in added) + ours
    assert 20e6 < total < script.MOST_MB * 1e6


def test_a_folder_that_exists_is_not_replaced(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["site-size", "--keep", str(tmp_path)])
    assert script.main() == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: --keep: found ") and hint.startswith("hint: ")
