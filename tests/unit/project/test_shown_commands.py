"""Every command line that a page of the docs shows is one that the three programs take."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path

import click
import pytest
from fedcore_clients.cli import app as site
from fedcore_server.cli import app as coordinator

from fedcore.cli.console import command_of
from fedcore.cli.main import app as fedcore
from fedcore.errors import FedcoreError

ROOT = Path(__file__).parents[3]
PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]
OFFICERS = "docs/for-security-officers.md"
PROGRAMS = {
    name: command_of(app)
    for name, app in (("fedcore", fedcore), ("fed-coordinator", coordinator), ("fed-site", site))
}
SHELL = ("", "sh", "console")
"""Languages of the blocks that show commands. A block with prompts has output on its other lines."""


def command(line: str) -> list[str]:
    """The words of the command of ours in a line of a shell; [] if there is none. Other programs may start ours."""
    found = re.search(r"(?:^|[\s/])(fed-(?:site|coordinator) .*)|^(?:\S*/)?(fedcore .*)", line)
    if not found:
        return []
    reader = shlex.shlex(found[1] or found[2], posix=True, punctuation_chars="|<>;&")
    reader.whitespace_split = True
    return list(itertools.takewhile(lambda word: not re.fullmatch("[|<>;&]+", word), reader))


def in_blocks(text: str) -> list[list[str]]:
    """The commands of the blocks of a page; brackets, as of `[JOB]`, are left out."""
    lines = re.findall(r"^ {4}(fed\S+ .*)$", text, re.MULTILINE)
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language in SHELL:
            whole = block.replace("\\\n", " ").splitlines()
            typed = [line[2:] for line in whole if line.startswith("$ ")]
            lines += typed or whole
    return [words for line in lines if (words := command(re.sub(r"[][]", "", line)))]


def in_sentences(text: str) -> list[list[str]]:
    """The commands between back-ticks in the sentences of a page; `verify|show` is two."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    found = []
    for shown in re.findall(r"`((?:fedcore|fed-site|fed-coordinator) [^`\n]+)`", prose):
        words = [re.sub(r"[][]", "", word).split("|") for word in shlex.split(shown)]
        found += [list(each) for each in itertools.product(*words)]
    return found


def problem(words: list[str], *, whole: bool = True) -> str:
    """Why the program refuses a command line, or "". whole: its arguments stand there too, with values that fit."""
    at, name, rest = PROGRAMS[words[0]], words[0], words[1:]
    while isinstance(at, click.Group) and rest and not rest[0].startswith("-"):
        if rest[0] not in at.commands:
            return f"{name}: no command {rest[0]}"
        at, name, rest = at.commands[rest[0]], f"{name} {rest[0]}", rest[1:]
    try:
        at.make_context(name, [each for each in rest if each != "..."])
    except (click.BadParameter, click.BadOptionUsage) as error:
        return error.format_message() if whole else ""
    except click.exceptions.Exit:  # --help
        return ""
    except click.UsageError as error:
        return error.format_message()
    except FedcoreError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_parse(page):
    text = (ROOT / page).read_text()
    found = [(words, problem(words)) for words in in_blocks(text)]
    found += [(words, problem(words, whole=False)) for words in in_sentences(text)]
    assert not [(" ".join(words), why) for words, why in found if why]


@pytest.mark.parametrize("program", ["fed-coordinator", "fed-site"])
def test_operations_has_every_command_of_a_deployment(program):
    shown = in_blocks((ROOT / "docs/operations.md").read_text())
    assert {words[1] for words in shown if words[0] == program} == {*PROGRAMS[program].commands}


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("fed-site audit verify --config site.toml", ""),
        ("runuser -u site -- /usr/bin/fed-site join --out . < line", ""),
        ("fed-site audit export --format cef | logger", ""),
        ("fed-coordinator submit job.toml --lr 0.1", ""),
        ("fed-site audit check", "no command check"),
        ("fed-site check --verbose", "--verbose"),
        ("fed-site roster approve four", "four"),
        ("fed-site veto", "JOB"),
        ("fed-site pause va", "va"),
    ],
)
def test_what_does_not_parse_is_found(line, why):
    found = problem(command(line))
    assert (why in found) if why else not found


def test_blocks_and_sentences_are_read():
    block = "```console\n$ fed-site jobs\nfed-site answers\n```\n"
    text = f"{block}`fed-site audit verify|show` and `a b`\n\n    fedcore doctor\n"
    assert in_blocks(text) == [["fedcore", "doctor"], ["fed-site", "jobs"]]
    assert in_sentences(text) == [["fed-site", "audit", verb] for verb in ("verify", "show")]


def test_each_answer_to_a_security_officer_has_a_command_and_evidence():
    text = (ROOT / OFFICERS).read_text()
    table, *answers = re.split(r"^## \d+\. ", text, flags=re.MULTILINE)
    rows = re.findall(r"^\| (\d+) \|.*$", table, re.MULTILINE)
    assert [int(row) for row in rows] == list(range(1, 16))
    assert len(answers) == 15
    for answer in answers:
        assert in_blocks(answer), answer
        assert re.search(r"`tests/[\w/]+\.py", answer), answer
