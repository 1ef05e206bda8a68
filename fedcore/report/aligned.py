"""The table of sites of one result, with all metrics beside each other and one row for each site.

Invariant: it has the cells of `tables.per_site`, so that page, Markdown and LaTeX show the same numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from fedcore.report import phrases, tables
from fedcore.report import sentences as say
from fedcore.report.phrases import DASH
from fedcore.report.tables import Cell
from fedcore.results import Result


@dataclass(frozen=True)
class SiteTable:
    """metrics: names over the columns of each. columns: of each metric, `gained` the last where it is known.

    tested: whether the second cell of every row is the number of test rows. rows: name, test rows, cells of the
    metrics in their order. mean: the same of the unweighted mean over sites, empty where there is none.
    """

    metrics: tuple[str, ...]
    columns: tuple[str, ...]
    tested: bool
    rows: tuple[tuple[Cell, ...], ...]
    mean: tuple[Cell, ...] = ()

    @property
    def labels(self) -> Iterator[str]:
        """The whole name of each column, in the order of a row's cells."""
        yield from ("site", *(["test rows"] if self.tested else []))
        for metric in self.metrics:
            yield from (f"{metric} {column}".rstrip() for column in self.columns)


def site_table(result: Result) -> SiteTable | None:
    """None where nothing is known of any site."""
    grids = tables.per_site([result])
    if not grids:
        return None
    tested = grids[0].head[1] == "test rows"
    first = 2 if tested else 1
    alone = "local_only" in result.arm_names
    sites = len(result.per_site)  # a grid's next row, where it has one, is the mean
    rows = tuple(
        (*grids[0].rows[i][:first], *(cell for grid in grids for cell in grid.rows[i][first:]))
        for i in range(sites)
    )
    unknown = (Cell(DASH),) * (len(grids[0].head) - first)
    means = [grid.rows[sites][first:] if len(grid.rows) > sites else unknown for grid in grids]
    known = any(len(grid.rows) > sites for grid in grids)
    empty = [Cell("")] if tested else []
    mean = (Cell("site mean", number=False), *empty, *(cell for cells in means for cell in cells))
    return SiteTable(
        tuple(phrases.metric_name(metric) for metric in say.ordered_metrics(result)[: len(grids)]),
        ("alone", "together", "gained") if alone else ("",),
        tested,
        rows,
        mean if known else (),
    )
