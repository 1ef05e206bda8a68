"""The report of a grid: what its tables say, its two plots, and that nothing from a result reaches it unescaped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedcore.cli.grids import preset_file
from fedcore.config.grid_file import GridFile, cells_of, read_grid
from fedcore.report import grid_page, grid_tables
from fedcore.report.grid_terminal import summary
from fedcore.report.terminal import as_text
from fedcore.results import (
    CellCost,
    CellSize,
    GridCell,
    GridResult,
    Interval,
    PrivacyBound,
    SitesSpread,
    Spread,
)

HOSTILE = "<script>x</script>[red]$y^2$"


def between(mean, reach=0.01):
    return Interval(mean, mean - reach, mean + reach, "t", 4)


def spread_of(mean):
    return Spread(mean, mean - 0.01, mean + 0.01, "t", 4, 0.005)


EXACT = Interval(0.0, 0.0, 0.0, "t", 4)


def cell(number, algorithm="default", privacy="none", *, together=0.88, epsilon=None, **more):
    gap = {
        "total": between(0.9 - together),
        "federation": between(0.9 - together),
        "quantisation": EXACT,
    }
    gap |= {"protection": EXACT} | ({"privacy": between(0.02)} if epsilon else {})
    arms = {"centralised": 0.9, "local_only": 0.8, "federated": together}
    given = {
        "task": "heart", "partition": "natural", "protection": "layered", "metric": "auc",
        "size": CellSize(sites=4, rows=920, parameters=31, rounds=3, splits=4),
        "bound": PrivacyBound(epsilon=epsilon, dp=between(0.02) if epsilon else None),
        "arms": {name: {"auc": spread_of(value)} for name, value in arms.items()},
        "gap": {part: {"auc": interval} for part, interval in gap.items()},
        "spread": SitesSpread(worst_site="va", worst=0.7, best=0.95, mean=0.85, sd=0.1, sites=4, gained=0.05),
        "cost": CellCost(bytes_site=3_000_000, seconds=75.0, money=0.25),
        "by_bytes": ((1e6, 0.7), (2e6, 0.8), (3e6, together)),
    }  # fmt: skip
    return GridCell(
        number=number,
        algorithm=algorithm,
        privacy=privacy,
        folder=f"cells/{number:02d}",
        **given | more,
    )


def grid(*cells):
    return GridResult(
        name="mine", started="2026-11-30T12:00:00Z", seconds_total=61.0, workers=2, currency="USD", cells=cells,
        environment={"machine": "2 cores, x86_64", "torch": "2.13.0", "python": "3.11.7", "fedcore": "0.1.0"},
    )  # fmt: skip


WHOLE = grid(
    cell(1), cell(2, "scaffold", together=0.895),
    cell(3, privacy="epsilon 1", together=0.85, epsilon=1.0), cell(4, privacy="epsilon 3", together=0.87, epsilon=3.0),
    cell(5, task="digits", failed="seed 0: no such rate"),
)  # fmt: skip


def test_the_sentence_is_of_the_best_cell_without_privacy():
    assert grid_tables.sentences(WHOLE) == [
        "heart, natural: 0.50 points of AUC lost against pooling, interval -0.50 to 1.50 (scaffold, none)."
    ]
    assert "exactly 0" in grid_tables.protection_sentence(WHOLE)
    moved = cell(1, gap={"protection": {"auc": between(0.01)}})
    assert "must never happen" in grid_tables.protection_sentence(grid(moved))


def test_an_error_is_better_where_it_is_less_and_has_its_own_unit():
    arms = {"federated": {"auc": spread_of(0.5)}, "centralised": {"auc": spread_of(0.4)}}
    worse = cell(1, error=True, arms=arms, gap={"total": {"auc": between(0.1)}})
    better = cell(2, "scaffold", error=True, together=0.4)
    assert grid_tables.best([worse, better]) is better
    (table,) = grid_tables.lost_tables(grid(worse))
    assert table.rows[0][4].text == "0.100" and "own unit" in table.note


def test_each_part_of_the_gap_has_a_column_and_privacy_is_held_against_the_cell_without():
    (table,) = grid_tables.lost_tables(WHOLE)
    assert table.title == "heart, natural: 4 sites, 920 rows"
    assert table.head[4:] == (
        "lost",
        "federation",
        "quantisation",
        "privacy",
        "protection",
        "no privacy",
    )
    rows = {row[0].text: [cell.text for cell in row[1:]] for row in table.rows}
    assert rows["default, none"] == ["0.900", "0.800", "0.880", "2.00", "2.00", "0", "–", "0", "–"]
    assert rows["default, epsilon 1"][3:] == ["5.00", "5.00", "0", "2.00", "0", "2.00"]


def test_the_page_draws_both_plots_and_links_to_every_comparison():
    html = grid_page.render(WHOLE, ["result.json"])
    assert html.count("<figure>") == 2 and html.count("<svg") >= 4
    assert [f'href="cells/0{i}/report.html"' in html for i in range(1, 6)] == [True] * 4 + [False]
    assert "no such rate" in html and "exactly 0" in html and "USD" in html
    assert "http://" not in html and "https://" not in html and "<script" not in html
    assert "Score by epsilon and by bytes" in html and "pooled, " in html
    alone = grid_page.render(grid(cell(1, by_bytes=())), [])
    assert "<figure>" not in alone
    alone = grid_page.render(grid(cell(1)), [])
    assert "Score by bytes" in alone and "pooled" in alone
    without = {arm: found for arm, found in cell(1).arms.items() if arm != "centralised"}
    unpooled = grid_page.render(grid(cell(1, arms=without)), [])
    colour = "stroke: var(--plot-centralised)"
    assert (
        alone.count(colour) == unpooled.count(colour) + 2
    )  # drawn for a wide page and for a phone


def test_nothing_of_a_result_reaches_a_page_unescaped():
    names = {"task": HOSTILE, "partition": HOSTILE, "warnings": (HOSTILE,)}
    hostile = grid(
        cell(1, HOSTILE, **names),
        cell(2, "b", **names),
        cell(3, HOSTILE, **names | {"failed": HOSTILE}),
    )
    html = grid_page.render(replace(hostile, name=HOSTILE, currency=HOSTILE), [])
    assert "<script" not in html and "&lt;script&gt;" in html
    text = grid_page.as_markdown(replace(hostile, name=HOSTILE))
    assert "<script" not in text and "[red]" not in text.replace(r"\[red\]", "")
    assert HOSTILE in as_text(summary(hostile, "report.html"), width=400)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_terminal_cuts_nothing(width):
    text = as_text(summary(WHOLE, "out/report.html"), width=width)
    for word in (
        "default,",
        "federation",
        "scaffold",
        "out/report.html",
        "0.895",
        "3.00 MB",
        "no such rate",
    ):
        assert word in text


def test_the_text_has_every_table():
    text = grid_page.as_markdown(WHOLE)
    for title in ("## heart, natural: 4 sites, 920 rows", "## Worst site and spread", "## Cost"):
        assert title in text
    assert "2 cores, x86\\_64" in text and "**Failed:**" in text


KEPT = sorted((Path(__file__).parents[3] / "docs" / "benchmarks").glob("*.json"))


@pytest.mark.parametrize("file", KEPT, ids=lambda file: file.stem)
def test_results_that_are_kept_are_of_the_grid_beside_them_and_name_no_machine(file):
    found = json.loads(file.read_text())
    result = GridResult.from_json(found)
    beside = file.with_suffix(".toml")
    asked_for = read_grid(beside if beside.is_file() else preset_file(file.stem))
    asked = dict(result.asked)
    assert (asked.pop("kind"), Path(asked.pop("base")).is_absolute()) == ("grid", False)
    assert GridFile.model_validate(asked) == asked_for
    assert [cell.names for cell in result.cells] == [
        c.names for c in cells_of(asked_for, file.parent)
    ]
    for cell in result.cells:
        protection = cell.gap_of("protection")
        assert protection.mean == protection.low == protection.high == 0
    assert result.environment["machine"].endswith("x86_64") and "platform" not in result.environment


def test_there_are_results_that_are_kept():
    assert KEPT
