"""The tables of a grid's report, and its first sentences; laid out by `grid.py` and by the terminal.

Invariant: as in `tables.py`, texts are plain and unescaped.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedcore.report import phrases
from fedcore.report.phrases import DASH
from fedcore.report.tables import Cell, Grid
from fedcore.results import GridCell, GridResult, Interval


def groups(result: GridResult) -> dict[tuple[str, str], list[GridCell]]:
    """The cells that have a result by task and partition, in their order."""
    found: dict[tuple[str, str], list[GridCell]] = {}
    for cell in result.cells:
        if not cell.failed:
            found.setdefault((cell.task, cell.partition), []).append(cell)
    return found


def title(group: tuple[str, str], cells: Sequence[GridCell]) -> str:
    """`heart, natural: 4 sites, 920 rows`."""
    rows = f", {phrases.count(cells[0].size.rows)} rows" if cells[0].size.rows is not None else ""
    named = ", ".join(map(phrases.plain, group))
    return f"{named}: {phrases.plural(cells[0].size.sites, 'site')}{rows}"


def cell_name(cell: GridCell, among: Sequence[GridCell]) -> str:
    """What tells a cell from those it stands among: its algorithm, protection and privacy where these differ."""
    differing = [i for i in (2, 3, 4) if len({other.names[i] for other in among}) > 1]
    parts = [phrases.plain(cell.names[i]) for i in differing]
    return ", ".join(parts) or phrases.plain(cell.algorithm)


def total(cell: GridCell) -> Interval | None:
    """What was lost against pooling; of a cell with privacy, against pooling without it where that was run."""
    return cell.bound.lost if cell.bound.lost is not None else cell.gap_of("total")


def best(cells: Sequence[GridCell]) -> GridCell | None:
    """Of the cells without privacy the one with the best mean score; None where no score is known."""
    known = [
        (score, cell)
        for cell in cells
        if cell.bound.epsilon is None and (score := cell.score("federated")) is not None
    ]
    if not known:
        return None
    return min(known, key=lambda pair: pair[0] if pair[1].error else -pair[0])[1]


def sentences(result: GridResult) -> list[str]:
    """For each task and partition what its best cell lost against pooling, and whether protection changed anything."""
    found = []
    for group, cells in groups(result).items():
        named = ", ".join(map(phrases.plain, group))
        cell = best(cells)
        if cell is None:
            continue
        lost = total(cell)
        which = f" ({cell_name(cell, cells)})" if len(cells) > 1 else ""
        if lost is None or lost.mean is None:
            score = f"{phrases.metric_name(cell.metric)} {phrases.score(cell.score('federated'))}"
            found.append(f"{named}: {score}{which}; not compared with pooling.")
            continue
        text = f"{named}: {phrases.quantity(cell, cell.metric, lost.mean)} lost against pooling"
        if span := phrases.interval(cell, cell.metric, lost):
            text += f", interval {span}" if span != "exact" else ", exactly"
        found.append(f"{text}{which}.")
    return found


def protection_sentence(result: GridResult) -> str:
    """Whether protection changed a single score of any cell; empty where nothing was compared."""
    parts = [
        interval
        for cell in result.cells
        for interval in cell.gap.get("protection", {}).values()
        if interval.mean is not None
    ]
    if not parts:
        return ""
    moved = sum(part.mean != 0 or (part.ends or (0, 0)) != (0, 0) for part in parts)
    if moved:
        return f"Protection changed {moved} of {len(parts)} scores, which must never happen."
    return f"Protection changed none of {len(parts)} scores: its part of every gap is exactly 0."


def lost_tables(result: GridResult) -> list[Grid]:
    """What was lost and why: a table for each task and partition."""
    found = []
    for group, cells in groups(result).items():
        parts = [part for part in phrases.PARTS if any(cell.gap_of(part) for cell in cells)]
        held = any(cell.bound.dp is not None for cell in cells)
        local = any(cell.bound.local is not None for cell in cells)
        metric = phrases.metric_name(cells[0].metric)
        head = [
            "",
            "pooled",
            "alone",
            "together",
            "lost",
            *parts,
            *(["no privacy"] if held else []),
            *(["noise in the sum"] if local else []),
        ]
        rows = []
        for cell in cells:
            row = [Cell(cell_name(cell, cells), number=False)]
            row += [_score(cell, arm) for arm in ("centralised", "local_only", "federated")]
            row.append(_part(cell, cell.gap_of("total")))
            row += [_part(cell, cell.gap_of(part)) for part in parts]
            row += [_part(cell, cell.bound.dp)] if held else []
            row += [_part(cell, cell.bound.local)] if local else []
            rows.append(tuple(row))
        note = (
            f"{phrases.capitalised(metric)}; losses {phrases.in_units(cells, {cells[0].metric})}."
        )
        if cells[0].size.splits > 1:
            note += f" Means over {_splits(cells)}, with 95 % intervals."
        if held:
            note += " no privacy: what is lost against the same cell without it, whose rounds and rates are others."
        if local:
            note += (
                " noise in the sum: what noise of each site lost against it at the same epsilon."
            )
        found.append(Grid(title(group, cells), tuple(head), tuple(rows), note))
    return found


def _splits(cells: Sequence[GridCell]) -> str:
    counts = sorted({cell.size.splits for cell in cells})
    return phrases.listed(map(str, counts)) + " seeds and folds"


def _score(cell: GridCell, arm: str) -> Cell:
    found = cell.arms.get(arm, {}).get(cell.metric)
    if found is None:
        return Cell(DASH)
    return Cell(
        phrases.score(found.mean), "" if found.sd is None else f"sd {phrases.score(found.sd)}"
    )


def _part(cell: GridCell, part: Interval | None) -> Cell:
    if part is None or part.mean is None:
        return Cell(DASH)
    return Cell(
        phrases.gap_amount(cell, cell.metric, part), phrases.interval(cell, cell.metric, part)
    )


def sites_tables(result: GridResult) -> list[Grid]:
    """How evenly the federated model serves the sites."""
    rows = []
    for group, cells in groups(result).items():
        for cell in cells:
            if (spread := cell.spread) is None:
                continue
            name = ", ".join((*map(phrases.plain, group), cell_name(cell, cells)))
            worst = Cell(phrases.score(spread.worst), phrases.plain(spread.worst_site))
            gained = phrases.amount(cell, cell.metric, spread.gained, signed=True)
            numbers = [phrases.score(v) for v in (spread.mean, spread.best, spread.sd)]
            metric = Cell(phrases.metric_name(cell.metric), number=False)
            row = (Cell(name, number=False), metric, worst, Cell(gained), *map(Cell, numbers))
            rows.append(row)
    head = ("", "metric", "worst site", "it gained", "mean", "best", "sd")
    note = (
        "Together, on each site's own test rows; means over the seeds and folds. It gained: over training alone, "
        "in points where the metric is a fraction. sd: between the sites, all of equal weight."
    )
    return [Grid("Worst site and spread", head, tuple(rows), note)] if rows else []


def cost_tables(result: GridResult) -> list[Grid]:
    """What one run of each cell costs."""
    rows, priced = [], any(cell.cost.money is not None for cell in result.cells)
    for group, cells in groups(result).items():
        for cell in cells:
            name = ", ".join((*map(phrases.plain, group), cell_name(cell, cells)))
            row = [
                Cell(name, number=False),
                Cell(str(cell.size.rounds)),
                Cell(phrases.count(cell.size.parameters)),
            ]
            row += [
                Cell(phrases.size(cell.cost.bytes_site)),
                Cell(phrases.duration(cell.cost.seconds)),
            ]
            row += [Cell(_money(cell.cost.money))] if priced else []
            rows.append(tuple(row))
    head = ["", "rounds", "parameters", "bytes of a site", "seconds"]
    head += [phrases.plain(result.currency)] if priced else []
    note = (
        "One run of the federation. Bytes: up and down over all rounds. Seconds: of all sites and the coordinator on "
        "one core, the other arms left out."
    )
    if priced:
        note += " Money: traffic of all sites and these seconds, at the prices of the grid's file."
    return [Grid("Cost", tuple(head), tuple(rows), note)] if rows else []


def _money(value: float | None) -> str:
    if value is None:
        return DASH
    return f"{value:.2f}" if value >= 0.1 or value == 0 else f"{value:.2g}"


def failures(result: GridResult) -> list[tuple[str, str]]:
    """(cell, why) of those without a result."""
    return [
        (", ".join(map(phrases.plain, cell.names)), phrases.plain(cell.failed))
        for cell in result.cells
        if cell.failed
    ]


def warnings(result: GridResult) -> list[str]:
    """What is said of several cells once, with how many, and the rest with its cell."""
    by_text: dict[str, list[GridCell]] = {}
    for cell in result.cells:
        for text in cell.warnings:
            by_text.setdefault(phrases.plain(text), []).append(cell)
    found = []
    for text, cells in by_text.items():
        of = (
            f"{len(cells)} cells"
            if len(cells) > 1
            else ", ".join(map(phrases.plain, cells[0].names))
        )
        found.append(f"{of}: {text}")
    return found
