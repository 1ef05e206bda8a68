"""What a site makes of an offer: its job, the plan that follows from it, and the lines that an operator reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fedcore.config import Job, build_job, plan_of, read_settings
from fedcore.errors import FedcoreError
from fedcore.learning.state import JobState
from fedcore.secagg.label import Terms, label_of, leaving_of
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol.job.site.effects import Surveyed
from fedcore.secagg.protocol.job_messages import JobOffer
from fedcore.secagg.scheme import Scheme
from fedcore.types import SiteId


def job_of(offer: JobOffer) -> Job:
    """The job of an offer. Raises BadInput and Refused."""
    return build_job(read_settings(offer.settings))


@dataclass(frozen=True)
class PlanMaker:
    """Makes plans for the sites of a roster."""

    sites: tuple[SiteId, ...]

    def plan(self, offer: JobOffer, survey: Surveyed) -> RoundPlan:
        """The plan of an offer, from what this site surveyed itself."""
        asked = job_of(offer)
        cap = asked.protect.max_examples
        assert cap is not None
        return plan_of(asked, survey.shape, self.sites, cap)

    def first_state(self, plan: RoundPlan, survey: Surveyed) -> JobState:
        """The state before the first round."""
        return JobState.initial(plan, survey.initial)

    def scheme(self, plan: RoundPlan) -> Scheme:
        """What the plan's protection needs in its key epochs."""
        return Scheme.of(plan)


@dataclass(frozen=True)
class About:
    """What an operator should know of a job before a row is read for it; empty where no plan follows."""

    protection: str = ""
    label: Sequence[str] = ()
    leaves: Sequence[str] = ()

    @property
    def lines(self) -> list[str]:
        """For the log."""
        return [f"label: {line}" for line in self.label] + [f"leaves: {x}" for x in self.leaves]

    @classmethod
    def of(cls, offer: JobOffer, sites: Sequence[SiteId]) -> About:
        """Label and list of what leaves, from settings and roster only."""
        try:
            asked = job_of(offer)
            terms = Terms.of_job(asked, tuple(sites))
        except FedcoreError:  # it is refused, with the reason
            return cls()
        return cls(terms.protection, label_of(terms).splitlines(), leaving_of(asked, terms))
