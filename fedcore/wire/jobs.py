"""Which records travel each way between a coordinator and its sites: rounds, key epochs and jobs."""

from __future__ import annotations

from types import MappingProxyType

from fedcore.protocol import job
from fedcore.wire.limits import MAX_RECORD, SITE_RECORD
from fedcore.wire.records import FROM_COORDINATOR, FROM_SITES, Table, travelling

TO_COORDINATOR: Table = MappingProxyType(
    {
        **FROM_SITES,
        **travelling(
            job.Survey,
            job.Unable,
            job.PlanAgreed,
            job.AtRest,
            job.CheckpointSealed,
            most=SITE_RECORD,
        ),
    }
)
TO_SITE: Table = MappingProxyType(
    {
        **FROM_COORDINATOR,
        **travelling(
            job.JobOffer,
            job.PlanOffer,
            job.CheckpointWanted,
            job.CheckpointOffer,
            job.JobEnded,
            most=MAX_RECORD,
        ),
    }
)
