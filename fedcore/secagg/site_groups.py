"""Groups of sites, one protected sum each, so that a few bad groups are left out of the mean (`learning/robust.py`).

The sites are dealt out once for the job. Groups that change from round to round would be new equations about updates
that hardly change: after as many rounds as a group has sites they give each site's own.

Invariant: a plan's groups are disjoint, cover its roster, and each has at least LEAST_GROUP sites.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fedcore.errors import BadInput, PlanRefused
from fedcore.seeds import generator
from fedcore.types import SiteId

LEAST_GROUP, LEAST_SITES = 5, 15
"""Sites of a group, so that an update is hidden in its sum; and of a roster, for three groups to compare."""

AGGREGATES = ("mean", "trimmed")


@dataclass(frozen=True)
class GroupPlan:
    """groups: the sites of each. trim: how many of the largest, and of the smallest, group means are left out of each
    coordinate. Raises PlanRefused where none would be left, or a group is too small."""

    groups: tuple[tuple[SiteId, ...], ...]
    trim: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(map(tuple, self.groups)))  # of JSON
        if 2 * self.trim >= len(self.groups):
            raise PlanRefused(
                f"round.trim: found {self.trim} of {len(self.groups)} groups, expected less than half of them",
                remedy=f"trim = {max(1, (len(self.groups) - 1) // 2)}, or smaller groups (round.group_sites)",
            )
        if self.smallest < LEAST_GROUP:
            raise PlanRefused(
                f"round.group_sites: found a group of {self.smallest} sites, expected at least {LEAST_GROUP}: its "
                "sum is opened, and its updates hide among each other only"
            )

    @property
    def smallest(self) -> int:
        """Sites of the smallest group."""
        return min(map(len, self.groups))

    def survivors(self, sites: Sequence[SiteId]) -> list[list[SiteId]]:
        """Those of these sites that are in each group; groups without one are left out."""
        found = [[site for site in group if site in sites] for group in self.groups]
        return [group for group in found if group]


class GroupSettings(Protocol):
    """What [round] of a job has of it."""

    @property
    def aggregate(self) -> str: ...
    @property
    def group_sites(self) -> int: ...
    @property
    def trim(self) -> int: ...


def group_plan(settings: GroupSettings, sites: Sequence[SiteId], seed: int) -> GroupPlan | None:
    """The groups of a job; None for the mean of all sites. Raises PlanRefused for too few sites."""
    if settings.aggregate == "mean":
        return None
    refuse_few(settings, len(sites))
    count = len(sites) // settings.group_sites
    order = generator(seed, 0, "", "groups").permutation(len(sites))
    dealt = [sorted(order[start::count].tolist()) for start in range(count)]
    return GroupPlan(tuple(tuple(sites[k] for k in group) for group in dealt), settings.trim)


def smallest_group(settings: GroupSettings, sites: int | Sequence[SiteId]) -> int:
    """Sites of the smallest group of a job on a roster; 0 where it has none. Raises PlanRefused for too few sites."""
    count = sites if isinstance(sites, int) else len(sites)
    refuse_few(settings, count)
    return 0 if settings.aggregate == "mean" else count // (count // settings.group_sites)


def refuse_few(settings: GroupSettings, sites: int) -> None:
    """Raise PlanRefused where a roster of so many sites has too few groups."""
    if settings.aggregate != "mean" and sites < max(LEAST_SITES, 3 * settings.group_sites):
        raise PlanRefused(
            f"round.aggregate: found 'trimmed' with {sites} sites in groups of {settings.group_sites}, expected "
            f"at least {max(LEAST_SITES, 3 * settings.group_sites)} sites: of fewer than three "
            "groups none can be told to be bad",
            remedy='aggregate = "mean": the range bounds what a site adds, and the guards judge the model',
        )


def refuse_groups(settings: GroupSettings) -> None:
    """Raise BadInput for settings of groups that the mean of all sites does not read."""
    for key, usual in (("group_sites", LEAST_GROUP), ("trim", 1)):
        if settings.aggregate == "mean" and (found := getattr(settings, key)) != usual:
            raise BadInput(
                f"round.{key}: found {found} with round.aggregate 'mean', which has no groups",
                remedy='aggregate = "trimmed", or leave it out',
            )
