"""Sums by groups in one process: each group's update vectors are a protected sum of their own.

What is no update (statistics, range, the last metrics) is one sum over all sites, as ever. Invariant: the groups' sums
are put side by side as one opened sum: coordinates and weights one group after the other, all other integers added up,
marks in the places of the roster. So a state follows from it as from any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np

from fedcore.errors import RoundAbandoned
from fedcore.learning.stopwatch import Stopwatch
from fedcore.secagg.crypto import Sealer
from fedcore.secagg.encode.pack import Opened
from fedcore.secagg.encode.partial import PartialSum
from fedcore.secagg.plan import WEIGHT, RoundPlan, VectorSpec, default_threshold
from fedcore.secagg.protocol.absences import Absences
from fedcore.secagg.summing import (
    AddUp,
    Contribute,
    Lead,
    ProtectedTotal,
    RoundTrace,
    SumEngine,
    sites_of,
)
from fedcore.types import Contribution

MakeEngine = Callable[[str, RoundPlan], SumEngine]


class GroupedSums(SumEngine):
    """make: an engine for sums of other sites. Raises RoundAbandoned from `sum` where so few groups or sites stay that
    nothing could be trimmed, or that the plan's threshold is not met."""

    def __init__(self, job: str, plan: RoundPlan, make: MakeEngine) -> None:
        assert plan.server.groups is not None
        self.plan = plan
        self._all = make(job, replace(plan, server=replace(plan.server, groups=None)))
        self.as_planned = self._all.as_planned
        self._parts = [
            make(f"{job}-{number}", part_of(plan, number))
            for number in range(len(plan.server.groups.groups))
        ]
        self._trim = plan.server.groups.trim

    @property
    def sealer(self) -> Sealer:
        return self._all.sealer

    def sum(
        self,
        spec: VectorSpec,
        training_round: int,
        contribute: Contribute,
        state: bytes,
        watch: Stopwatch,
        *,
        lead: Lead | None = None,
        absences: Absences | None = None,
        witness: RoundTrace | None = None,
        roster: Sequence[int] | None = None,
        add_up: AddUp | None = None,
    ) -> ProtectedTotal:
        """As `SumEngine.sum`. witness: not filled for sums of groups."""
        if not spec.coordinates:
            return self._all.sum(
                spec, training_round, contribute, state, watch,
                lead=lead, absences=absences, witness=witness, roster=roster, add_up=add_up,
            )  # fmt: skip
        found, lost = [], None
        for part in self._parts:
            try:
                total = part.sum(
                    spec, training_round, self._of_part(part, contribute), state, watch,
                    absences={n: s for n, s in (absences or {}).items() if n in part.plan.sites},
                    add_up=None if add_up is None else self._sums_of_part(part, add_up),
                )  # fmt: skip
                found.append((part, total))
            except RoundAbandoned as abandoned:
                lost = abandoned
        survivors = sum(len(total.survivors) for _, total in found)
        if survivors < self.plan.threshold or len(found) <= 2 * self._trim:
            raise RoundAbandoned(lost.stage if lost else "submit", survivors, self.plan.threshold)
        opened = self._beside(
            spec, [(part, total.opened, total.survivors) for part, total in found]
        )
        twin = opened
        if any(total.twin is not total.opened for _, total in found):
            twin = self._beside(
                spec, [(part, total.twin, total.survivors) for part, total in found]
            )
        places = sorted(
            self.plan.sites.index(name)
            for part, total in found
            for name in sites_of(part.plan.sites, total.survivors)
        )
        if lead is not None:
            lead(opened, sites_of(self.plan.sites, places))
        totals = [total for _, total in found]
        return ProtectedTotal(
            opened, twin, tuple(places),
            max(total.bytes_up for total in totals), max(total.bytes_down for total in totals),
        )  # fmt: skip

    def _of_part(self, part: SumEngine, contribute: Contribute) -> Contribute:
        """`contribute` by the places of a group's own roster."""
        places = self._places(part)

        def of_part(indices: Sequence[int]) -> Iterable[tuple[int, Contribution]]:
            asked = {places[index]: index for index in indices}
            for place, content in contribute(list(asked)):
                yield asked[place], content

        return of_part

    def _sums_of_part(self, part: SumEngine, add_up: AddUp) -> AddUp:
        """`add_up` by the places of a group's own roster."""
        places = self._places(part)

        def of_part(indices: Sequence[int]) -> Iterable[PartialSum]:
            asked = {places[index]: index for index in indices}
            for found in add_up(list(asked)):
                yield replace(found, indices=tuple(asked[place] for place in found.indices))

        return of_part

    def _places(self, part: SumEngine) -> list[int]:
        """Of a group's sites in the roster of the job."""
        return [self.plan.sites.index(name) for name in part.plan.sites]

    def _beside(
        self, spec: VectorSpec, found: Sequence[tuple[SumEngine, Opened, Sequence[int]]]
    ) -> Opened:
        """The sums of groups as one."""
        wides: dict[str, list[int]] = {}
        for wide in spec.wides:
            each = [opened.wides[wide.name] for _, opened, _ in found]
            if wide.name == WEIGHT:
                wides[wide.name] = [total for totals in each for total in totals]
            else:
                wides[wide.name] = [sum(values) for values in zip(*each, strict=True)]
        for mark in spec.marks:
            wides[mark] = [0] * len(self.plan.sites)
            for part, opened, _ in found:
                for name, value in zip(part.plan.sites, opened.wides[mark], strict=True):
                    wides[mark][self.plan.sites.index(name)] = value
        return Opened(np.concatenate([opened.coordinates for _, opened, _ in found]), wides)


def part_of(plan: RoundPlan, number: int) -> RoundPlan:
    """The plan of one group's sums: its own roster, with the default threshold for so many sites."""
    assert plan.server.groups is not None
    sites = plan.server.groups.groups[number]
    return replace(
        plan,
        sites=sites,
        threshold=default_threshold(len(sites)),
        server=replace(plan.server, groups=None),
    )
