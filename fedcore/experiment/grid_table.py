"""The table of a grid: what each cell lost and why, how its sites differ, what it cost; and its numbers, one a row.

What privacy costs is the difference between two cells, with privacy and without, over the same seeds and folds, so its
interval is that of paired splits like those of the other parts (`experiment/gap.py`).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedcore.config.grid_file import DEFAULT, NONE, Prices
from fedcore.experiment.gap import nadeau_bengio
from fedcore.files import read_result, read_rounds
from fedcore.report.sentences import primary_metric
from fedcore.results import (
    CellCost,
    CellSize,
    ComparisonResult,
    GridCell,
    GridResult,
    Interval,
    PrivacyBound,
    RoundRow,
    SitesSpread,
    SplitResult,
)
from fedcore.secagg.privacy.privacy_plan import EACH_SITE, IN_SUM
from fedcore.types import Json

Facts = Mapping[str, Any]
"""cell.json: seconds, rows, test_fraction_ratio."""

MOST_POINTS = 60
"""Rounds that a curve keeps: more cannot be told apart in a drawing."""


def grid_cells(
    cells: Sequence[GridCell], known: Mapping[int, tuple[ComparisonResult, Facts]], prices: Prices
) -> Iterator[GridCell]:
    """The cells with what their comparisons found. known: {number: (result, facts)} of those that have one."""
    for cell in cells:
        if cell.number not in known:
            yield cell
            continue
        result, facts = known[cell.number]
        base = next(
            (known[other.number][0] for other in _without_privacy(cell, cells) if other.number in known),
            None,
        )  # fmt: skip
        filled = _filled(cell, result, facts, prices, base)
        if (inside := _noise_inside(cell, cells, known)) is not None:
            ratio = facts["test_fraction_ratio"]
            local = _paired(result, inside, filled.metric, "federated", ratio)
            filled = replace(filled, bound=replace(filled.bound, local=local))
        yield filled


def _noise_inside(
    cell: GridCell, cells: Sequence[GridCell], known: Mapping[int, tuple[ComparisonResult, Facts]]
) -> ComparisonResult | None:
    """The result with the same budget and noise inside the sum; None for a cell that has not noise of each site."""
    mine = _privacy_of(known[cell.number][0])
    if mine.get("noise") != EACH_SITE:
        return None
    for other in cells:
        if other.names[:4] == cell.names[:4] and other.number in known:
            found = known[other.number][0]
            theirs = _privacy_of(found)
            same = all(theirs.get(key) == mine[key] for key in ("epsilon", "delta", "unit"))
            if same and theirs["noise"] == IN_SUM:
                return found
    return None


def _privacy_of(result: ComparisonResult) -> Json:
    found: Json = result.plan.get("train", {}).get("privacy") or {}
    return found


def _without_privacy(cell: GridCell, cells: Sequence[GridCell]) -> list[GridCell]:
    """The cells that one with privacy is held against, the likest first; none for a cell without."""
    if cell.privacy == NONE:
        return []
    same = [
        other
        for other in cells
        if (other.task, other.partition, other.privacy) == (cell.task, cell.partition, NONE)
    ]
    order = [(cell.algorithm, cell.protection), (DEFAULT, cell.protection)]
    ranked = [o for wanted in order for o in same if (o.algorithm, o.protection) == wanted]
    return ranked + [other for other in same if other.algorithm == DEFAULT]


def _filled(
    cell: GridCell,
    result: ComparisonResult,
    facts: Facts,
    prices: Prices,
    base: ComparisonResult | None,
) -> GridCell:
    metric = primary_metric(result) or (result.metrics[0] if result.metrics else "")
    noise = result.plan.get("noise") or {}
    found = replace(
        cell,
        metric=metric,
        error=result.is_error(metric),
        size=CellSize(
            sites=len(result.sites),
            rows=facts["rows"],
            parameters=result.model.coordinates,
            rounds=result.rounds,
            splits=len(result.cells),
        ),
        bound=PrivacyBound(epsilon=noise.get("epsilon")),
        arms=result.arms,
        gap=result.gap,
        spread=_spread(result, metric),
        cost=_cost(result, facts["seconds"], prices),
        warnings=result.warnings,
    )
    if base is None:
        return found
    ratio = facts["test_fraction_ratio"]
    dp = _paired(result, base, metric, "federated", ratio)
    lost = _paired(result, base, metric, "centralised", ratio)
    return replace(found, bound=replace(found.bound, dp=dp, lost=lost))


def _paired(
    result: ComparisonResult, base: ComparisonResult, metric: str, arm: str, ratio: float
) -> Interval | None:
    """How much better this arm of `base` is than the federated one here, over the splits that both have."""
    theirs = {(split.seed, split.fold): _score(split, arm, metric) for split in base.cells}
    lost = [
        result.better_by(metric, theirs.get((own.seed, own.fold)), _score(own, "federated", metric))
        for own in result.cells
    ]
    known = [value for value in lost if value is not None]
    return nadeau_bengio(known, ratio) if known and ratio > 0 else None


def _score(split: SplitResult, arm: str, metric: str) -> float | None:
    return split.arms.get(arm, {}).get(metric)


def _spread(result: ComparisonResult, metric: str) -> SitesSpread | None:
    known = {
        site: value
        for site in result.per_site
        if (value := result.site_score(site, "federated", metric)) is not None
    }
    if not known:
        return None
    error = result.is_error(metric)
    ranked = sorted(known, key=lambda site: known[site], reverse=error)
    worst, best = ranked[0], ranked[-1]
    alone = result.site_score(worst, "local_only", metric)
    return SitesSpread(
        worst_site=worst, worst=known[worst], best=known[best], mean=statistics.fmean(known.values()),
        sd=statistics.pstdev(known.values()), sites=len(known), gained=result.better_by(metric, known[worst], alone),
    )  # fmt: skip


def _cost(result: ComparisonResult, seconds: float | None, prices: Prices) -> CellCost:
    up, down, rounds = result.cost.bytes_up, result.cost.bytes_down, result.rounds
    traffic = None if up is None or down is None else (up + down) * rounds
    money = None
    if prices.per_gigabyte or prices.per_hour:
        money = (traffic or 0) * len(result.sites) / 1e9 * prices.per_gigabyte
        money += (seconds or 0.0) / 3600 * prices.per_hour
    return CellCost(bytes_site=traffic, seconds=seconds, money=money)


def with_curves(result: GridResult, directory: Path) -> GridResult:
    """The result with `by_bytes` of every cell, from its rounds.jsonl."""
    cells = (
        cell if cell.failed else replace(cell, by_bytes=_by_bytes(cell, read_rounds(directory / cell.folder)))
        for cell in result.cells
    )  # fmt: skip
    return replace(result, cells=tuple(cells))


def _by_bytes(cell: GridCell, rows: Sequence[RoundRow]) -> tuple[tuple[float, ...], ...]:
    """(bytes of a site so far, mean score over the splits) after each round, at most `MOST_POINTS` of them."""
    scores: dict[int, list[float]] = {}
    for row in rows:
        value = row.number(cell.metric)
        if row.arm == "federated" and value is not None:
            scores.setdefault(row.round, []).append(value)
    if not scores or not cell.cost.bytes_site or not cell.size.rounds:
        return ()
    each = cell.cost.bytes_site / cell.size.rounds
    step = max(1, -(-len(scores) // MOST_POINTS))
    picked = sorted(scores)[::step]
    if picked[-1] != max(scores):
        picked.append(max(scores))
    return tuple((round_ * each, statistics.fmean(scores[round_])) for round_ in picked)


def tidy(result: GridResult, directory: Path) -> list[Json]:
    """Every score and every loss of every split, one number a row, for a data frame: `pandas.read_json`."""
    rows: list[Json] = []
    for cell in result.cells:
        if cell.failed:
            continue
        found = read_result(directory / cell.folder)
        assert isinstance(found, ComparisonResult)
        axes = dict(
            zip(
                ("task", "partition", "algorithm", "protection", "privacy"), cell.names, strict=True
            )
        )
        for split in found.cells:
            place: Json = {
                **axes,
                "epsilon": cell.bound.epsilon,
                "seed": split.seed,
                "fold": split.fold,
            }
            rows += (place | number for number in _numbers(split))
    return rows


def _numbers(split: SplitResult) -> Iterator[Json]:
    """quantity: `score` of an arm over all test rows or, with a site, over its own; `lost` by a cause."""
    for quantity, tables in (("score", split.arms), ("lost", split.gap)):
        for name, by_metric in tables.items():
            for metric, value in by_metric.items():
                yield {
                    "quantity": quantity,
                    "name": name,
                    "site": None,
                    "metric": metric,
                    "value": value,
                }
    for site, arms in split.per_site.items():
        for name, by_metric in arms.items():
            for metric, value in by_metric.items():
                yield {
                    "quantity": "score",
                    "name": name,
                    "site": site,
                    "metric": metric,
                    "value": value,
                }
