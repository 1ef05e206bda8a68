"""What `jobs` and `watch` print: lines for a pipe, tables for a terminal."""

from __future__ import annotations

import io
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fedcore_server.config import METRICS_FILE
from fedcore_server.operators import (
    METRICS_AT_HOME,
    Operator,
    _Away,
    event_lines,
    event_table,
    jobs_table,
    metrics_text,
    round_text,
    save_result,
    value_text,
    write_report,
)
from rich.console import Console

from fedcore.errors import AlreadyExists, BadInput, MalformedMessage
from fedcore.results import JobEvent, JobRow, MetricsRow
from fedcore.wire.frames import FilePart, WatchEvent, json_bytes

RELEASED = {
    "round": 3, "purpose": "update", "seconds": 0.25, "survivors": ["a", "b", "c"],
    "roster": ["a", "b", "c", "d"], "bytes_up": 13_900, "bytes_down": 1_200_000,
}  # fmt: skip
METRICS = {
    "round": 2, "number": 7, "sites": 3, "metrics": {"auc": 0.81234, "accuracy": None},
    "reference": {"metric": "auc", "value": 0.9, "source": "a registry", "gap": 0.08766},
}  # fmt: skip
ABANDONED = {**RELEASED, "survivors": [], "abandoned": {"stage": "submit", "left": 2, "needed": 3}}
ROW, LOST = map(JobRow.from_json, (RELEASED, ABANDONED))
SUMMED = MetricsRow.from_json(METRICS)


def site(**changes):
    return {"connected": True, "evicted": False, "last_seen": time.time(), "doing": "training",
            "unable": "", **changes}  # fmt: skip


def event(**changes):
    return JobEvent.from_json(told(**changes))


def told(**changes):
    return {
        "job": "heart-1", "task": "heart", "protection": "layered", "state": "running", "text": "",
        "stage": "collecting", "step": ["update", 4], "rounds": 20, "rounds_done": 3,
        "new_rounds": [], "waiting": None, "sites": {"a": site(), "d": site(connected=False)},
        "public_metrics": None, "metrics": None, "new_metrics": [], **changes,
    }  # fmt: skip


def shown(renderable):
    console = Console(file=io.StringIO(), width=100)
    console.print(renderable)
    return console.file.getvalue()


def test_a_round_in_one_line():
    assert round_text(ROW, 20) == "round 3/20  3 of 4 sites  0.25 s  up 13.9 kB  down 1.20 MB"
    assert round_text(LOST, 20) == "round 3/20  abandoned at submit: 2 sites left, 3 needed"
    assert round_text(replace(ROW, purpose="metrics", round=21), 20).startswith(
        "metrics after round 20  "
    )


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
    later = event(new_rounds=[RELEASED], sites=sites, waiting=waiting)
    lines = list(event_lines(later, first))
    assert lines[0].startswith("round 3/20") and lines[1] == "d: takes no part: task differs"
    assert lines[2].startswith("waiting for 1 of 4 sites: a (training); at ")
    assert list(event_lines(event(sites=sites, waiting=waiting), later)) == []
    end = event(state="abandoned", text="too few", sites=sites)
    assert list(event_lines(end, later)) == ["heart-1 (heart, layered): abandoned: too few"]


def test_a_terminal_gets_the_whole_picture():
    people = {"a": site(), "[red]": site(evicted=True)}
    text = shown(event_table(event(sites=people), [ROW, LOST], []))
    for part in ("round 4 of 20, collecting", "training", "[red]", "evicted", "abandoned at submit",
                 "in all: up 41.7 kB, down 9.60 MB"):  # fmt: skip
        assert part in text, (part, text)
    assert "metrics" not in text, "nobody knows yet what the plan says"


def test_a_table_has_the_first_metric_and_its_gap_or_says_where_they_are():
    rows = [replace(SUMMED, round=k, number=9 - k) for k in range(8)]
    lines = [
        line.split() for line in shown(event_table(event(public_metrics=True), [], rows)).splitlines()
    ]  # fmt: skip
    at = lines.index(["after", "round", "auc", "gap", "of", "auc", "to", "0.9000"])
    expected = [[str(k), "0.8123", "0.0877"] for k in (4, 3, 2, 1, 0)]
    assert lines[at + 1 : at + 6] == expected, "the last five, in the order of their rounds"
    plain = shown(event_table(event(public_metrics=True), [], [replace(SUMMED, reference=None)]))
    assert "gap" not in plain and "0.8123" in plain
    assert "metrics: none yet" in shown(event_table(event(public_metrics=True), [], []))
    home = shown(event_table(event(public_metrics=False), [], []))
    assert "metrics: known to the sites only" in home and "none yet" not in home


def test_metrics_in_one_line():
    whole = "metrics after round 2: auc 0.8123  accuracy undefined"
    assert metrics_text(replace(SUMMED, reference=None)) == whole
    assert metrics_text(SUMMED) == f"{whole}  (gap of auc to 0.9000 (a registry): 0.0877)"
    odd = replace(SUMMED.reference, source="a\x1b[2Jb\n", gap=None)
    said = metrics_text(replace(SUMMED, reference=odd))
    assert said.endswith("(gap of auc to 0.9000 (a?[2Jb?): undefined)"), said


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.0000"), (-0.5, "-0.5000"), (0.00012345, "1.234e-04"), (12345.0, "1.234e+04"),
     (9999.0, "9999.0000"), (0.001, "0.0010"), (None, "undefined")],
)  # fmt: skip
def test_a_value_in_words(value, text):
    assert value_text(value) == text


def test_a_pipe_gets_each_metric_once_or_one_line_that_there_is_none():
    first = event()
    known = event(public_metrics=False)
    assert list(event_lines(known, first)) == ["metrics: known to the sites only"]
    assert list(event_lines(event(public_metrics=False), known)) == []
    assert "metrics: known to the sites only" in list(event_lines(known, None))
    released = event(public_metrics=True, new_metrics=[METRICS])
    assert list(event_lines(released, first)) == [metrics_text(SUMMED)]


def test_the_page_for_operators_quotes_what_is_printed():
    page = (Path(__file__).parents[3] / "docs" / "operations.md").read_text()
    row = {
        "round": 3, "number": 7, "sites": 3, "metrics": {"auc": 0.8123, "accuracy": 0.75},
        "reference": {"metric": "auc", "value": 0.9, "source": "our registry, 2025", "gap": 0.0877},
    }  # fmt: skip
    assert f"`{metrics_text(MetricsRow.from_json(row))}`" in page and f"`{METRICS_AT_HOME}`" in page
    assert f"`{METRICS_FILE}`" in page


def test_a_report_has_the_metrics_or_says_where_they_are(tmp_path):
    rows = '{"round": 2, "number": 7, "sites": 3, "metrics": {"auc": 0.5}}\n'
    result = {**told(state="finished"), "task_sha256": "00", "public_metrics": True}
    (tmp_path / "result.json").write_text(json.dumps(result))
    (tmp_path / "metrics.jsonl").write_text(rows)
    assert "\n- metrics after round 2: auc 0.5000\n" in write_report(tmp_path).read_text()
    (tmp_path / "metrics.jsonl").unlink()
    assert "metrics" not in write_report(tmp_path).read_text()
    (tmp_path / "result.json").write_text(json.dumps({**result, "public_metrics": False}))
    assert "\nmetrics: known to the sites only\n" in write_report(tmp_path).read_text()


def test_jobs_and_sites_in_a_table():
    text = shown(jobs_table({"jobs": [told()], "sites": {"a": site()}}))
    assert "3/20" in text and "running" in text and "training" in text
    about = [told(metrics=METRICS, public_metrics=True), told(public_metrics=False)]
    text = shown(jobs_table({"jobs": about, "sites": {}}))
    assert "auc 0.8123" in text and "at the sites" in text
    assert "no jobs yet" in shown(jobs_table({"jobs": [], "sites": {}}))


def test_a_watch_goes_on_where_it_was_when_the_coordinator_restarts(monkeypatch):
    """Each call begins with all rounds; a person sees each of them once."""
    answers = [[[RELEASED], [ABANDONED]], [[RELEASED, ABANDONED], [RELEASED]]]
    operator, lost = Operator.__new__(Operator), []

    def stream(*_):
        for rows in answers.pop(0):
            yield WatchEvent(json_bytes(told(new_rounds=rows, new_metrics=rows[:1])))
        if answers:
            raise _Away("gone")

    operator.stream = stream
    monkeypatch.setattr(time, "sleep", lambda _: None)
    found = list(operator.watch("", lost.append))
    assert [each["new_rounds"] for each in found] == [[RELEASED], [ABANDONED], [], [RELEASED]]
    assert [each["new_metrics"] for each in found] == [[RELEASED], [ABANDONED], [], []]
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
