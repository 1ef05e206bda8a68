"""What follows from a job's settings: its threshold, its plan, and the sizes of its vectors."""

import json
from collections.abc import Collection
from dataclasses import replace
from functools import cached_property

from fedcore.config import Job, build_job, plan_of
from fedcore.errors import FedcoreError
from fedcore.results import MetricsRow, ReferenceGap
from fedcore.secagg.label import Terms
from fedcore.secagg.plan import ModelShape, RoundPlan
from fedcore.secagg.protocol.job.coordinator.events import PlanMade, StopRequested
from fedcore.secagg.protocol.job_messages import JobOffer
from fedcore.secagg.purposes import PURPOSES
from fedcore.secagg.scheme import Scheme, layout_of
from fedcore.types import SiteId


class JobPlan:
    """The settings of one job, for these pinned sites."""

    def __init__(self, offer: JobOffer, sites: Collection[SiteId]) -> None:
        self._offer, self._sites = offer, tuple(sites)

    @cached_property
    def _settings(self) -> Job:
        """As they were submitted, built once."""
        return build_job(json.loads(self._offer.settings))

    def threshold(self) -> int:
        """t. Raises FedcoreError where the roster is another one than when the job was submitted."""
        return Terms.of_job(self._settings, self._sites).threshold

    def made(self, shape: ModelShape) -> PlanMade | StopRequested:
        """The plan for the shape that most sites found; the end of the job where there is none."""
        try:
            cap = self._settings.protect.max_examples
            assert cap is not None
            plan = plan_of(self._settings, shape, self._sites, cap)
        except FedcoreError as error:
            return StopRequested(str(error), "failed")
        return PlanMade(plan, shape.features, vector_sizes(plan, shape.features))

    def compared(self, row: MetricsRow) -> MetricsRow:
        """A row of public metrics, with the gap to the job's reference value if it has one."""
        reference = self._settings.track.reference
        if reference is None:
            return row
        return replace(row, reference=ReferenceGap(**reference.against(row.metrics)))


def vector_sizes(plan: RoundPlan, features: int) -> dict[str, int]:
    """Bytes of one protected vector, by purpose."""
    scheme = Scheme.of(plan)
    purposes = (name for name, each in PURPOSES.items() if each.rounds(plan, features))
    return {each: scheme.upload_bytes(layout_of(plan, features, each)) for each in purposes}
