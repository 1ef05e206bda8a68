"""How the vectors of many sites are computed: where they can be batched, or spread over processes."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from fedcore.learning.site import SiteTrainer
from fedcore.learning.state import JobState
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.types import Contribution


class Executor(Protocol):
    """Computes the contributions of several sites to one step."""

    def run(
        self, sites: Sequence[SiteTrainer], plan: RoundPlan, step: PlannedRound, state: JobState
    ) -> Iterator[tuple[int, Contribution]]:
        """(roster index, contribution) of each site, in any order."""
        ...


class Sequential:
    """One site after the other, in this process."""

    def run(
        self, sites: Sequence[SiteTrainer], plan: RoundPlan, step: PlannedRound, state: JobState
    ) -> Iterator[tuple[int, Contribution]]:
        for site in sites:
            yield site.site.index, site.contribute(plan, step, state)
