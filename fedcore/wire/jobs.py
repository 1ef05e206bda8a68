"""Which records travel each way between a coordinator and its sites: rounds, key epochs and jobs."""

from __future__ import annotations

from types import MappingProxyType

from fedcore.protocol import epoch, job
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
FROM_ANY_SITE: Table = MappingProxyType(
    {name: entry for name, entry in TO_COORDINATOR.items() if name != epoch.Grants.__name__}
)
"""Without what only an epoch's maker says: it is the one record of a site that may be long."""

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
