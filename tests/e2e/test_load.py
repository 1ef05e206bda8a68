"""Many sites at one coordinator: real sessions over mutual TLS, many sites to a process.

`fedcore bench engine --sites 500 --parameters 10 --rounds 3 --protection encrypted --per-process 125` is
the large form; docs/operations.md says what it measures.
"""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fedcore.bench import engine

MOST_MB = 200
"""Of the coordinator with 40 sites; 120 were measured, most of it libraries."""


@pytest.mark.parametrize(("protection", "sites"), [("encrypted", 40), ("masked", 16)])
def test_many_sites_complete_every_round(protection, sites):
    found = engine.run(
        sites=sites, parameters=10, rounds=2, protection=protection, per_process=sites // 2
    )
    assert (found["timed_rounds"], found["abandoned_rounds"]) == (1, 0)
    assert found["least_survivors"] == sites, "nobody was left behind"
    assert found["rss_mb"]["coordinator"] < MOST_MB
    coordinator = found["cpu_seconds_per_round"]["coordinator"]
    assert 0 < coordinator < found["cpu_seconds_per_round"]["sites"], "the work is the sites'"
    shown = Console(width=400, record=True, file=io.StringIO())
    shown.print(engine.page(found))
    assert f"CPU a cycle, ms: coordinator {1000 * coordinator:.1f}," in shown.export_text()
