"""The hashed lists in requirements/ have the versions of constraints.txt and everything that pyproject.toml names."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[3]
LISTS = sorted((ROOT / "requirements").glob("*-*.txt"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
LINE = re.compile(
    r"(?P<name>[a-z0-9._-]+)==(?P<version>[\w.]+)(?:\+cpu)? --hash=sha256:[0-9a-f]{64}"
)


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {
        canonical(name): version
        for name, _, version in (line.partition("==") for line in lines if not line.startswith("#"))
    }


@pytest.mark.parametrize("path", LISTS, ids=lambda path: path.stem)
def test_every_file_of_a_role_has_a_hash_and_the_tested_version(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    found = {}
    for line in lines:
        match = LINE.fullmatch(line)
        assert match, line
        found[canonical(match["name"])] = match["version"]
    assert found.items() <= pinned().items()
    role = path.name.partition("-")[0]
    wanted = PROJECT["dependencies"] + EXTRAS[role]
    wanted += EXTRAS["postgresql"] if role == "coordinator" else []
    assert {canonical(re.match(r"[\w.-]+", each)[0]) for each in wanted} <= set(found)
    others = ("dev", "digits", "flower", "report", "tables")
    left_out = {canonical(Requirement(line).name) for name in others for line in EXTRAS[name]}
    # torch asks for jinja2 and setuptools itself
    assert not (left_out - {"fedcore-fl", "jinja2", "setuptools"}) & set(found)


def test_there_are_lists_for_the_platform_of_the_tests():
    names = {path.name for path in LISTS}
    assert {f"{role}-linux-x86_64-cp311.txt" for role in ("site", "coordinator")} <= names
