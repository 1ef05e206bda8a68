"""docs/operations.md says nothing that the programs do not: states, keys, codes and files."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from fedcore_clients.config import SiteConfig
from fedcore_clients.policy import PolicySection
from fedcore_server.config import FederationConfig, LimitsSection

from fedcore import errors
from fedcore.secagg.protocol.job.coordinator.facts import RUNNING, WAITING
from fedcore.secagg.protocol.job.coordinator.rounds import MOST_TRIES
from fedcore.secagg.protocol.job_messages import OUTCOMES, REASONS
from fedcore.secagg.protocol.round import coordinator
from fedcore.secagg.protocol.wire_form import type_name
from fedcore.wire.frames import GOODBYES

PAGE = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()


def rows(heading):
    """The first cell of each row of the first table behind a heading, without its back-ticks."""
    _, _, rest = PAGE.partition(f"\n## {heading}\n")
    assert rest, heading
    lines = re.search(r"((?:^\|.*\n)+)", rest, re.MULTILINE).group(1).splitlines()[2:]
    return [line.split("|")[1].strip() for line in lines]


def test_the_states_of_a_job_are_those_of_the_code():
    states = {row.strip("`") for row in rows("The states of a job")}
    assert states == {WAITING, RUNNING, *OUTCOMES}


def test_the_stages_of_a_round_are_those_of_the_code():
    told = {}
    for row in rows("The states of a round"):
        stage, *word = re.findall(r"`(\w+)`", row)
        told[stage] = word[0] if word else ""
    names = {type_name(stage).lower(): word for stage, word in coordinator.STAGE_NAMES.items()}
    assert told == {**names, "released": "", "abandoned": ""}


def test_the_tries_of_a_step_are_those_of_the_code():
    assert f"abandoned {MOST_TRIES} times in a row" in PAGE


def test_the_keys_and_defaults_are_those_of_the_code():
    for key, value in re.findall(r"`(\w+_seconds)`(?: of site\.toml)? \((\d+)\)", PAGE):
        fields = {**LimitsSection.model_fields, **SiteConfig.model_fields}
        assert fields[key].default == float(value), key
    keys = {*LimitsSection.model_fields, *SiteConfig.model_fields, *FederationConfig.model_fields}
    for key in set(re.findall(r"`(\w+_(?:seconds|bytes|sites|workers|vectors))`", PAGE)):
        assert key in keys, key


def test_the_exit_codes_are_those_of_the_code():
    line = next(line for line in PAGE.splitlines() if line.startswith("Exit codes:"))
    numbers = {name: getattr(errors, name) for name in dir(errors) if name.startswith("EXIT_")}
    assert {int(number) for number in re.findall(r"\d+", line)} == set(numbers.values())


def test_the_words_of_a_refused_site_are_those_of_the_code():
    for code in re.findall(r"found this site refused \((\w+):", PAGE):
        assert not GOODBYES[code], "a site that may come back says so in its log and goes on"
    assert "replaced" in PAGE
    assert "evicted" in PAGE
    for reason in REASONS:
        assert f"`{reason}`" in PAGE or f": {reason}`" in PAGE


ROOT = Path(__file__).parents[3]


def test_the_error_lines_of_the_page_are_in_the_code():
    """Each fixed part of a quoted line, between what changes from case to case, is in a source."""
    sources = "".join(
        re.sub(r'"\s*\n\s*f?"', "", path.read_text())
        for folder in ("fedcore", "server", "clients")
        for path in (ROOT / folder).rglob("*.py")
    )
    table = PAGE[PAGE.index("## When something is wrong") :]
    quoted = re.findall(r"`(error: [^`]+|spool [^`]+|calls: [^`]+|certificate of [^`]+)`", table)
    assert len(quoted) >= 10
    for line in quoted:
        values = r"\.\.\.|\d[\d.:]*|\([^)]*\)|'[^']*'|,|\b(?:error|found|expected|observer|operator|certificate of)\b"
        parts = re.split(values, line)
        for part in parts:
            fixed = part.strip(" ,:()")
            if len(fixed) > 6:
                assert fixed in sources, (line, fixed)


def test_the_policy_table_has_the_keys_and_defaults_of_the_code():
    part = PAGE[PAGE.index("## What a site allows") :].split("\n## ")[0]
    told = {}
    for line in re.findall(r"^\| `.*$", part, re.MULTILINE):
        keys, default = (cell.strip() for cell in line.split("|")[1:3])
        told |= dict(zip(re.findall(r"`(\w+)`", keys), default.split(", "), strict=False))
        if len(re.findall(r"`(\w+)`", keys)) == 1:
            told[re.findall(r"`(\w+)`", keys)[0]] = default.strip("`")
    rules = PolicySection()
    assert told.keys() == PolicySection.model_fields.keys()
    for key, default in told.items():
        value = getattr(rules, key)
        if value is not None:
            value = list(value) if isinstance(value, tuple) else value
            assert tomllib.loads(f"x = {default}")["x"] == value, key
