"""docs/protocol.md and the two machines say the same: the moves it prints, and every name it uses.

`python tests/unit/protocol/test_protocol_doc.py` writes the printed moves into the page.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest

from fedcore import errors
from fedcore.secagg.protocol import checks, effects, epoch, job_messages, messages
from fedcore.secagg.protocol.job import effects as job_effects
from fedcore.secagg.protocol.job.coordinator import machine as coordinator_job
from fedcore.secagg.protocol.job.site import events as site_events
from fedcore.secagg.protocol.job.site import machine as site_job
from fedcore.secagg.protocol.round import coordinator, site

PAGE = Path(__file__).resolve().parents[3] / "docs" / "protocol.md"
BLOCK = r"<!-- moves: {} -->\n```\n(.*?)```"

ROLES: dict[str, tuple[ModuleType, tuple[type[Any], ...]]] = {
    "site": (site, site.IN_ROUND),
    "coordinator": (coordinator, tuple(coordinator.STAGE_NAMES)),
}
"""{role: (its machine, its stages within a round)}."""


def picture(moves: dict[Any, Any], in_round: Iterable[type[Any]]) -> str:
    """One line a move; what every stage of a round takes in the same way stands once, at the end."""
    inside = [moves[stage] for stage in in_round]
    common = {
        kind: move for kind, move in inside[0].items() if all(m.get(kind) == move for m in inside)
    }
    lines = []
    for stage, legal in moves.items():
        own = {kind: move for kind, move in legal.items() if common.get(kind) != move}
        lines += _lines(stage.__name__, own)
    return "\n".join(lines + _lines("in a round", common)) + "\n"


def _lines(stage: str, legal: dict[Any, Any]) -> list[str]:
    found = []
    for kind, (_, targets) in legal.items():
        to = " | ".join(target.__name__ for target in targets) or "(stays)"
        found.append(f"{stage:<12} {kind.__name__:<14} -> {to}")
        stage = ""
    return found


def printed(role: str) -> str:
    machine, in_round = ROLES[role]
    return picture(machine.MOVES, in_round)


@pytest.mark.parametrize("role", ROLES)
def test_the_page_prints_the_moves_of_the_machine(role):
    found = re.search(BLOCK.format(role), PAGE.read_text(), re.DOTALL)
    assert found is not None, f"docs/protocol.md has no block of moves of the {role}"
    assert found.group(1) == printed(role), (
        "python tests/unit/protocol/test_protocol_doc.py writes it anew"
    )


def test_a_move_of_one_stage_is_never_hidden_among_the_common_ones():
    """The picture of a table in which one stage goes elsewhere on the same event shows that stage."""
    one, two, event = (type(name, (), {}) for name in ("One", "Two", "Event"))
    moves = {one: {event: (None, (two,))}, two: {event: (None, ())}}
    assert picture(moves, (one, two)).split() == [
        "One",
        "Event",
        "->",
        "Two",
        "Two",
        "Event",
        "->",
        "(stays)",
    ]


def test_every_stage_and_every_message_is_on_the_page():
    said = set(re.findall(r"\w+", PAGE.read_text()))
    stages = [stage.__name__ for machine, _ in ROLES.values() for stage in machine.MOVES]
    both = (messages.SiteMessage, messages.CoordinatorMessage)
    spoken = [
        kind.__name__ for union in both for kind in get_args(union) if kind.__name__ != "Leave"
    ]
    assert not set(stages + spoken) - said


@pytest.mark.parametrize("job", [coordinator_job, site_job])
def test_every_part_of_a_job_is_on_the_page(job):
    """Parts are the classes with behaviour that the machine takes from the modules beside it."""
    beside = job.__name__.rpartition(".")[0] + "."
    parts = {
        name
        for name, kind in vars(job).items()
        if inspect.isclass(kind) and kind.__module__.startswith(beside) and kind.__module__ != job.__name__
        and not dataclasses.is_dataclass(kind) and not getattr(kind, "_is_protocol", False)
    }  # fmt: skip
    assert len(parts) >= 6
    assert not parts - set(re.findall(r"\w+", PAGE.read_text()))


def test_every_name_on_the_page_is_one_of_the_code():
    modules = (
        site, coordinator, epoch, messages, effects, checks, errors, job_messages, job_effects, site_events,
        coordinator_job, site_job,
    )  # fmt: skip
    names = set(re.findall(r"`([A-Z][a-z]\w+|MOVES)`", PAGE.read_text()))
    assert len(names) > 40
    assert not {name for name in names if not any(hasattr(module, name) for module in modules)}


def write() -> None:
    """Put the moves as they are now into the page."""
    text = PAGE.read_text()
    for role in ROLES:
        block = f"<!-- moves: {role} -->\n```\n{printed(role)}```"
        text = re.sub(BLOCK.format(role), lambda _, block=block: block, text, flags=re.DOTALL)
    PAGE.write_text(text)


if __name__ == "__main__":
    write()
