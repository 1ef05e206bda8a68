"""What people read of a command: waits, times, and log lines that stay lines."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime

import pytest
import typer
from grpc._cython import cygrpc

import fedcore
from fedcore.cli import console
from fedcore.cli.console import JsonLines, Repeated, TextLines, ago, start_logging, waiting_text

NOW = datetime(2026, 11, 21, 14, 0, 30).timestamp()  # noqa: DTZ001 - as a clock on the wall shows it


def waits(**changes):
    return {
        "for": {"va": {"doing": "", "last_seen": NOW - 120}}, "of": 4, "until": NOW + 270, "then": 3,
        "least": 3, "in_round": False, **changes,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({}, "waiting for 1 of 4 sites: va (last seen 2 min ago); at 14:05 goes on with 3"),
        ({"until": NOW + 5}, "va (last seen 2 min ago); at 14:00:35 goes on with 3"),
        ({"then": 0}, "at 14:05 gives up the job: it needs 3"),
        ({"then": 0, "in_round": True}, "at 14:05 gives up this round: it needs 3"),
        ({"until": NOW + 86400, "then": 0}, "at 22 Nov 14:00 gives up the job"),
        ({"until": None}, "waiting for 1 of 4 sites: va (last seen 2 min ago)"),
        ({"for": {"va": None, "north": {"doing": "training", "last_seen": None}}},
         "waiting for 2 of 4 sites: va, north (training); at 14:05"),
        ({"for": {"va": {"doing": "", "last_seen": None}}}, "va (not seen yet)"),
    ],
)  # fmt: skip
def test_a_wait_in_words(changes, text):
    assert text in waiting_text(waits(**changes), NOW)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-3, "0 s"), (59.4, "59 s"), (60, "1 min"), (7199, "1 h"),
     (86400, "24 h"), (90 * 3600, "3 days")],
)  # fmt: skip
def test_a_length_of_time_in_words(seconds, text):
    assert ago(seconds) == text


def record(text, *args, fault=None):
    return logging.LogRecord("fedcore.site", logging.WARNING, "x.py", 1, text, args, fault)


def test_a_json_line_is_one_line_whatever_it_quotes():
    line = JsonLines().format(record('said "%s"', 'a"b\nc\x1b[31m'))
    assert "\n" not in line and "\x1b" not in line
    found = json.loads(line)
    assert found["text"] == 'said "a"b\nc\x1b[31m"'
    assert (found["level"], found["from"]) == ("warning", "fedcore.site")


def test_a_json_line_holds_the_traceback():
    try:
        raise ValueError("here")
    except ValueError:
        line = JsonLines().format(record("fault", fault=sys.exc_info()))
    assert "\n" not in line and "ValueError: here" in json.loads(line)["traceback"]


def test_a_text_line_moves_no_cursor():
    assert "\x1b" not in TextLines().format(record("a\x1b[2Jb"))


def test_a_peer_that_went_as_it_was_answered_is_no_traceback(monkeypatch, capsys):
    """grpc tells of it as of a fault of its own; of every other fault it still may."""
    monkeypatch.setattr(logging.root, "handlers", [])
    start_logging()
    told = logging.getLogger("grpc._cython.cygrpc")
    gone = cygrpc.ExecuteBatchError("Failed: SendStatusFromServerOperation")
    for error in (gone, cygrpc.InternalError("something else")):
        told.error("raised in core by a method", exc_info=error)
    logging.getLogger("fedcore.site").error("ours", exc_info=gone)
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["from"] for line in said] == ["grpc._cython.cygrpc", "fedcore.site"]
    assert "something else" in said[0]["traceback"]


def programs():
    from fedcore_clients.cli import app as site
    from fedcore_server.cli import app as coordinator

    from fedcore.cli.main import app as fedcore

    return {"fedcore": fedcore, "fed-coordinator": coordinator, "fed-site": site}


@pytest.mark.parametrize("name", programs())
def test_every_program_prints_its_version_and_plain_help(name, capsys):
    app = programs()[name]
    with pytest.raises(SystemExit) as ended:
        console.run(app, name, ["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{name} {fedcore.__version__}\n"
    commands = typer.main.get_command(app).commands
    for command in [[], *([each] for each in commands)]:
        with pytest.raises(SystemExit) as ended:
            console.run(app, name, [*command, "-h"])
        said = capsys.readouterr().out
        assert ended.value.code == 0 and said.startswith("Usage: ") and "\\[" not in said


# ------------------------------------------------------------------------------ repeated records


class Lines:
    """A logger whose handler has the filter, and a clock that is set by hand."""

    def __init__(self):
        self.now, self.said = 0.0, []
        handler = logging.Handler()
        handler.emit = lambda record: self.said.append((self.now, record.getMessage()))
        handler.addFilter(Repeated(lambda: self.now))
        self.logger = logging.getLogger(f"fedcore.test.{id(self)}")
        self.logger.propagate = False
        self.logger.setLevel(logging.INFO)
        self.logger.addHandler(handler)


def test_a_repeated_warning_is_logged_once_and_then_after_growing_pauses():
    lines = Lines()
    for second in range(1000):
        lines.now = float(second)
        lines.logger.warning("site %s: away", "b")
    assert [at for at, _ in lines.said] == [0.0, 60.0, 180.0, 420.0, 900.0]
    assert [text for _, text in lines.said[:2]] == [
        "site b: away", "site b: away (59 times more since it was last logged)",
    ]  # fmt: skip


def test_other_warnings_and_what_is_no_warning_are_logged_each_time():
    lines = Lines()
    for number in range(3):
        lines.logger.warning("site %s: away", "abc"[number])
        lines.logger.info("round over")
        lines.logger.error("site a: away")
    assert len(lines.said) == 3 + 3 + 1


def test_a_warning_that_had_stopped_for_long_begins_again():
    lines = Lines()
    for second in (0.0, 60.0, 180.0, 10_000.0, 10_030.0, 10_060.0):
        lines.now = second
        lines.logger.warning("disk full")
    assert [at for at, _ in lines.said] == [0.0, 60.0, 180.0, 10_000.0, 10_060.0]


def test_only_so_many_messages_are_remembered():
    lines = Lines()
    for number in range(Repeated.MOST + 1):
        lines.logger.warning("site %d: away", number)
    lines.logger.warning("site 0: away")
    lines.logger.warning("site 5: away")
    assert len(lines.said) == Repeated.MOST + 2
