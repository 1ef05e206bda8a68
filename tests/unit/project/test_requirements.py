"""The hashed lists in requirements/ have the versions of constraints.txt and everything that pyproject.toml names."""

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
LISTS = sorted((ROOT / "requirements").glob("site-*.txt"))
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
def test_every_file_of_a_site_has_a_hash_and_the_tested_version(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    found = {}
    for line in lines:
        match = LINE.fullmatch(line)
        assert match, line
        found[canonical(match["name"])] = match["version"]
    assert found.items() <= pinned().items()
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {canonical(re.match(r"[\w-]+", each)[0]) for each in wanted} <= set(found)


def test_there_is_a_list_for_the_platform_of_the_tests():
    assert "site-linux-x86_64-cp311.txt" in {path.name for path in LISTS}
