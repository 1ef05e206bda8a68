"""`result.json` of a grid of comparisons, and the rows of its table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from fedcore.results.arm_scores import Interval, Spread
from fedcore.results.json_record import JsonRecord

GRID_SCHEMA = 1
"""Version of a grid's result.json. One of another version is refused."""


@dataclass(frozen=True, kw_only=True)
class SitesSpread(JsonRecord):
    """How an arm's scores differ between the sites: means over the splits, of the sites with a defined score.

    worst: the site with the worst score, and its score; best, mean, sd: over the sites, all of equal weight; gained: by
    how much the worst site is better off than alone, None where it did not train alone.
    """

    worst_site: str
    worst: float
    best: float
    mean: float
    sd: float
    sites: int
    gained: float | None = None


@dataclass(frozen=True, kw_only=True)
class CellCost(JsonRecord):
    """What a site and the machine spend on one run of a cell. bytes_site: up and down, over all rounds; seconds: of the
    federated arm, all sites and the coordinator on one core; money: at the grid's prices, of all sites together."""

    bytes_site: int | None = None
    seconds: float | None = None
    money: float | None = None


@dataclass(frozen=True, kw_only=True)
class CellSize(JsonRecord):
    """How large a cell is. rows: of all sites; parameters: of the model; splits: seeds and folds."""

    sites: int = 0
    rows: int | None = None
    parameters: int | None = None
    rounds: int = 0
    splits: int = 0


@dataclass(frozen=True, kw_only=True)
class PrivacyBound(JsonRecord):
    """Of a cell with privacy. epsilon: of all rounds; dp: what privacy lost against the cell without it; lost:
    everything together against pooling without it; local: of a cell with noise in each site's vector, what that lost
    against the cell of the same budget with noise inside the sum. Each over the splits that the two cells share, None
    without such a cell."""

    epsilon: float | None = None
    dp: Interval | None = None
    lost: Interval | None = None
    local: Interval | None = None


@dataclass(frozen=True, kw_only=True)
class GridCell(JsonRecord):
    """One comparison of a grid.

    number: from 1; folder: below that of the grid. failed: why it has no result, empty where it has one. metric: the
    one that tables show; error: less of it is better. gap: {part: what was lost}, of the cell itself.
    by_bytes: (bytes of a site so far, mean score) after each round.
    """

    number: int
    task: str
    partition: str
    algorithm: str
    protection: str
    privacy: str
    folder: str
    failed: str = ""
    metric: str = ""
    error: bool = False
    size: CellSize = CellSize()
    bound: PrivacyBound = PrivacyBound()
    arms: Mapping[str, Mapping[str, Spread]] = field(default_factory=dict)
    gap: Mapping[str, Mapping[str, Interval]] = field(default_factory=dict)
    spread: SitesSpread | None = None
    cost: CellCost = CellCost()
    by_bytes: tuple[tuple[float, ...], ...] = ()
    warnings: tuple[str, ...] = ()
    _beside: ClassVar[tuple[str, ...]] = ("size", "bound")

    @property
    def names(self) -> tuple[str, str, str, str, str]:
        """Along the five axes."""
        return self.task, self.partition, self.algorithm, self.protection, self.privacy

    def is_error(self, metric: str) -> bool:  # noqa: ARG002 - as of a result, which has several
        """Whether less of the cell's metric is better."""
        return self.error

    def score(self, arm: str) -> float | None:
        """What an arm reached in the cell's metric."""
        found = self.arms.get(arm, {}).get(self.metric)
        return found.mean if found is not None else None

    def gap_of(self, part: str) -> Interval | None:
        """One part of what was lost in the cell's metric, None where it was not measured."""
        return self.gap.get(part, {}).get(self.metric)


@dataclass(frozen=True, kw_only=True)
class GridResult(JsonRecord):
    """`result.json` of a grid. asked: the grid as its file has it. environment: versions and machine."""

    schema: int = GRID_SCHEMA
    kind: str = "grid"
    name: str
    started: str
    seconds_total: float
    workers: int
    currency: str
    cells: tuple[GridCell, ...]
    asked: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
