"""`fedcore bench engine`: what it reads of the coordinator's rows, and its page. No figure is tested."""

from __future__ import annotations

import os

from fedcore.bench import engine
from fedcore.report.terminal import as_text

FOUND = {
    "sites": 4, "parameters": 10, "bits": 16, "protection": "layered", "cipher": "bfv", "timed_rounds": 49,
    "seconds_per_round": {"median": 0.1052, "p95": 0.2}, "seconds_of_cycle": {"median": 0.1261, "least": 0.09},
    "seconds_by_stage": {"keys": 0.02}, "commit_ms": 1.25,
    "rss_mb": {"coordinator": 120.5, "fold_workers": 50.0, "site": 118.0},
    "cpu_seconds_per_round": {"coordinator": 0.0312, "fold_workers": 0.0041, "sites": 0.1004},
}  # fmt: skip


def test_only_whole_rows_behind_those_that_were_read_are_read(tmp_path):
    path = tmp_path / "rounds.jsonl"
    assert engine._rest(path, 0) == (b"", 0.0)
    path.write_bytes(b'{"a":1}\n{"b":2}\n{"c":')
    os.utime(path, ns=(0, 1_500_000_000))
    assert engine._rest(path, 0) == (b'{"a":1}\n{"b":2}\n', 1.5)
    assert engine._rest(path, 8) == (b'{"b":2}\n', 1.5)
    assert engine._rest(path, 16) == (b"", 1.5)


def test_the_page_has_round_and_cycle_and_the_cpu_of_each_side():
    words = as_text(engine.page(FOUND), 100)
    assert "cycle, s" in words and "0.105" in words and "0.126" in words
    flat = " ".join(words.split())
    assert "CPU a cycle, ms: coordinator 31.2, its fold workers 4.1, one site 25.1" in flat
