"""The reading path in docs/architecture.md: short enough, in order, and of functions that are where it says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
STEP = re.compile(r"^(\d+)\. (?:\*\*(\w+)\*\*: )?\[`([\w/.]+)`\]\(\.\./([\w/.]+)\) `([\w.]+)`")
PARTS = ["Training", "Quantising", "Masking", "Folding", "Releasing", "Evaluating"]


def paths():
    """(number, part, shown file, linked file, function) of each step, a list for each path."""
    found = []
    for line in PAGE.partition("### The reading path")[2].partition("\n## ")[0].splitlines():
        if line[:1].isdigit():
            step = STEP.match(line)
            assert step, f"a step without its file and function: {line}"
            if step[1] == "1":
                found.append([])
            found[-1].append(step.groups())
    return found


@pytest.mark.parametrize(("place", "most"), [(0, 8), (1, 12)], ids=["simulation", "network"])
def test_one_update_is_followed_through_few_files_in_order(place, most):
    steps = paths()[place]
    assert [int(step[0]) for step in steps] == list(range(1, len(steps) + 1))
    assert len({step[2] for step in steps}) == len(steps) <= most, "no file twice: never back"
    assert [step[1] for step in steps if step[1]] == PARTS


def test_each_step_names_a_function_that_stands_in_its_file():
    assert len(paths()) == 2
    for _, _, shown, linked, function in [step for path in paths() for step in path]:
        assert shown == linked
        scope = ast.parse((ROOT / linked).read_text()).body
        for name in function.split("."):
            named = {each.name: each for each in scope if hasattr(each, "name")}
            assert name in named, f"{linked} has no {function}"
            scope = named[name].body


def test_readme_leads_to_the_path():
    assert "docs/architecture.md" in (ROOT / "README.md").read_text()
