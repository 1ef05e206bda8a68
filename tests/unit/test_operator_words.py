"""What `jobs` and `watch` print: lines for a pipe, tables for a terminal."""

from __future__ import annotations

import io
import time

import pytest
from fedcore_server.operators import (
    Operator,
    _Away,
    bytes_text,
    event_lines,
    event_table,
    jobs_table,
    round_text,
    save_result,
)
from rich.console import Console

from fedcore.errors import AlreadyExists, BadInput, MalformedMessage
from fedcore.wire.frames import FilePart, WatchEvent, json_bytes

ROW = {
    "round": 3, "purpose": "update", "seconds": 0.25, "survivors": ["a", "b", "c"],
    "roster": ["a", "b", "c", "d"], "bytes_up": 13_900, "bytes_down": 1_200_000,
}  # fmt: skip
LOST = {**ROW, "survivors": [], "abandoned": {"stage": "submit", "left": 2, "needed": 3}}


def site(**changes):
    return {"connected": True, "evicted": False, "last_seen": time.time(), "doing": "training",
            "unable": "", **changes}  # fmt: skip


def event(**changes):
    return {
        "job": "heart-1", "task": "heart", "protection": "layered", "state": "running", "text": "",
        "stage": "collecting", "step": ["update", 4], "rounds": 20, "rounds_done": 3,
        "new_rounds": [], "waiting": None, "sites": {"a": site(), "d": site(connected=False)},
        **changes,
    }  # fmt: skip


def shown(renderable):
    console = Console(file=io.StringIO(), width=100)
    console.print(renderable)
    return console.file.getvalue()


def test_a_round_in_one_line():
    assert round_text(ROW, 20) == "round 3/20  3 of 4 sites  0.25 s  up 13.9 kB  down 1.2 MB"
    assert round_text(LOST, 20) == "round 3/20  abandoned at submit: 2 sites left, 3 needed"
    assert round_text({**ROW, "purpose": "metrics", "round": 21}, 20).startswith(
        "metrics after round 20  "
    )


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (2.5e12, "2500.0 GB")]
)
def test_bytes_in_words(number, text):
    assert bytes_text(number) == text


def test_a_pipe_gets_what_is_new():
    first = event()
    lines = list(event_lines(first, None))
    assert lines[0] == "a: connected" and lines[1].startswith("d: away, last seen 0 s ago")
    assert lines[2] == "heart-1 (heart, layered): round 4 of 20, collecting"
    assert list(event_lines(event(), first)) == []
    sites = {"a": site(), "d": site(unable="task differs")}
    waiting = {
        "for": {"a": {"doing": "training", "last_seen": None}}, "of": 4, "until": time.time() + 900,
        "then": 0, "least": 3, "in_round": True,
    }  # fmt: skip
    later = event(new_rounds=[ROW], sites=sites, waiting=waiting)
    lines = list(event_lines(later, first))
    assert lines[0].startswith("round 3/20") and lines[1] == "d: takes no part: task differs"
    assert lines[2].startswith("waiting for 1 of 4 sites: a (training); at ")
    assert list(event_lines(event(sites=sites, waiting=waiting), later)) == []
    end = event(state="abandoned", text="too few", sites=sites)
    assert list(event_lines(end, later)) == ["heart-1 (heart, layered): abandoned: too few"]


def test_a_terminal_gets_the_whole_picture():
    text = shown(event_table(event(sites={"a": site(), "[red]": site(evicted=True)}), [ROW, LOST]))
    for part in ("round 4 of 20, collecting", "training", "[red]", "evicted", "abandoned at submit",
                 "in all: up 41.7 kB, down 9.6 MB"):  # fmt: skip
        assert part in text, (part, text)


def test_jobs_and_sites_in_a_table():
    text = shown(jobs_table({"jobs": [event()], "sites": {"a": site()}}))
    assert "3/20" in text and "running" in text and "training" in text
    assert "no jobs yet" in shown(jobs_table({"jobs": [], "sites": {}}))


def test_a_watch_goes_on_where_it_was_when_the_coordinator_restarts(monkeypatch):
    """Each call begins with all rounds; a person sees each of them once."""
    answers = [[[ROW], [LOST]], [[ROW, LOST], [ROW]]]
    operator, lost = Operator.__new__(Operator), []

    def stream(*_):
        for rows in answers.pop(0):
            yield WatchEvent(json_bytes(event(new_rounds=rows)))
        if answers:
            raise _Away("gone")

    monkeypatch.setattr(operator, "stream", stream)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    found = list(operator.watch("", lost.append))
    assert [each["new_rounds"] for each in found] == [[ROW], [LOST], [], [ROW]]
    assert lost == ["gone; trying again for 1 min"]


def test_a_result_is_written_whole_or_not(tmp_path):
    parts = [FilePart("a.txt", 0, b"one", False), FilePart("a.txt", 3, b"two", True)]
    written = save_result(iter([*parts, FilePart("b.txt", 0, b"", True)]), tmp_path / "out")
    assert [path.read_bytes() for path in written] == [b"onetwo", b""]
    with pytest.raises(AlreadyExists):
        save_result(iter(parts), tmp_path / "out")
    with pytest.raises(BadInput, match="its end inside a file"):
        save_result(iter(parts[:1]), tmp_path / "half")
    swapped = [parts[0], FilePart("b.txt", 3, b"x", True)]
    with pytest.raises(MalformedMessage):
        save_result(iter(swapped), tmp_path / "swapped")
    assert not (tmp_path / "half").exists() and not (tmp_path / "swapped").exists()
