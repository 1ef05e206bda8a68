"""A grid of comparisons, from a TOML file: which tasks, partitions, algorithms, protections and privacy go together.

    name = "mine"
    seeds = 2
    settings = { rounds = 20 }                 # of every cell, as in a job file

    [partitions.skewed]                        # keys of [sites]
    by = "dirichlet"
    alpha = 0.1
    n = 10

    [algorithms.prox]                          # keys of a job
    proximal_mu = 0.1

    [[grid]]                                   # every combination of what is named is a cell
    tasks = ["heart", "digits"]
    partitions = ["skewed"]
    algorithms = ["default", "prox"]

A name that has no table of its own: a task is the task of that name, a protection likewise; the partition `natural`
is the task's own sites, the algorithm `default` the task's own settings, and the privacy `none` is off.

Invariant: a cell is a complete list of layers of settings, and two cells differ in their names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from pydantic import Field

from fedcore.errors import BadInput, UnknownName
from fedcore.files.toml import Section, read_toml

Table = dict[str, Any]
"""Settings: keys of a job file, flat or in sections; of a partition the keys of [sites]."""

NATURAL, DEFAULT, NONE = "natural", "default", "none"


class Prices(Section):
    """What traffic and computing cost their user; currency: a word that stands behind the sums."""

    currency: str = "EUR"
    per_gigabyte: float = Field(default=0.0, ge=0)
    per_hour: float = Field(default=0.0, ge=0)


class Block(Section):
    """[[grid]]: every combination of these names is a cell. seeds, settings: in place of, and over, the file's."""

    tasks: tuple[str, ...] = Field(min_length=1)
    partitions: tuple[str, ...] = (NATURAL,)
    algorithms: tuple[str, ...] = (DEFAULT,)
    protections: tuple[str, ...] = ("layered",)
    privacy: tuple[str, ...] = (NONE,)
    seeds: int | None = Field(default=None, ge=1)
    settings: Table = Field(default_factory=dict)


class GridFile(Section):
    """The whole file. seeds: how many of each cell, first_seed, first_seed + 1, ...; settings: of every cell.

    first_seed: settings that were chosen on some splits are reported on others.
    """

    name: str = Field(default="grid", pattern=r"^[\w-]+$")
    seeds: int = Field(default=5, ge=1)
    first_seed: int = Field(default=0, ge=0)
    settings: Table = Field(default_factory=dict)
    tasks: dict[str, Table] = Field(default_factory=dict)
    partitions: dict[str, Table] = Field(default_factory=dict)
    algorithms: dict[str, Table] = Field(default_factory=dict)
    protections: dict[str, Table] = Field(default_factory=dict)
    privacy: dict[str, Table] = Field(default_factory=dict)
    prices: Prices = Prices()
    grid: tuple[Block, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Combination:
    """One comparison of a grid: its names along the five axes, its settings, later layers winning, and its seeds."""

    task: str
    partition: str
    algorithm: str
    protection: str
    privacy: str
    layers: tuple[Mapping[str, Any], ...]
    seeds: tuple[int, ...]

    @property
    def names(self) -> tuple[str, str, str, str, str]:
        """Along the five axes."""
        return self.task, self.partition, self.algorithm, self.protection, self.privacy

    def __str__(self) -> str:
        return ", ".join(self.names)


def read_grid(path: Path) -> GridFile:
    """The grid of a file. Raises BadInput and UnknownName."""
    return read_toml(GridFile, path, paths=())


def cells_of(grid: GridFile, base: Path) -> list[Combination]:
    """Every cell, in the order of the file. base: the folder that relative paths count from.

    Raises UnknownName for a name without a table, BadInput for a cell that the file names twice.
    """
    found: dict[tuple[str, ...], Combination] = {}
    for block in grid.grid:
        axes = block.tasks, block.partitions, block.algorithms, block.protections, block.privacy
        for names in product(*axes):
            if names in found:
                raise BadInput(
                    f"grid: found the cell {', '.join(names)} twice, expected every combination once",
                    remedy="leave it out of one of the [[grid]] blocks",
                )
            layers = grid.settings, *_of_names(grid, names), block.settings
            based = tuple({"base": str(base), **layer} for layer in layers if layer)
            count = grid.seeds if block.seeds is None else block.seeds
            seeds = range(grid.first_seed, grid.first_seed + count)
            found[names] = Combination(*names, based, tuple(seeds))
    return list(found.values())


def _of_names(grid: GridFile, names: tuple[str, ...]) -> Iterator[Table]:
    task, partition, algorithm, protection, privacy = names
    # A key of [sites] by itself leaves the others: a task's `rows` and a partition's `by` add up.
    own = dict(grid.tasks.get(task, {}))
    sites = own.pop("sites", {})
    yield {"task": task, **own, **{f"sites.{key}": value for key, value in sites.items()}}
    dealt = _named("partitions", partition, grid.partitions, {NATURAL: {}})
    yield {f"sites.{key}": value for key, value in dealt.items()}
    yield _named("algorithms", algorithm, grid.algorithms, {DEFAULT: {}})
    yield {"protection": protection, **grid.protections.get(protection, {})}
    yield _named("privacy", privacy, grid.privacy, {NONE: {}})


def _named(
    axis: str, name: str, tables: Mapping[str, Table], built_in: Mapping[str, Table]
) -> Table:
    known = {**built_in, **tables}
    if name not in known:
        raise UnknownName(f"grid.{axis}", name, known)
    return known[name]
