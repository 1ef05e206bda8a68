"""The records that travel in each direction between a coordinator and its sites: rounds, key epochs, jobs."""

from types import MappingProxyType
from typing import get_args

from fedcore.secagg.protocol import epoch, job_messages
from fedcore.wire.limits import KIB, MAX_RECORD, SITE_RECORD
from fedcore.wire.records import FROM_COORDINATOR, FROM_SITES, Table, travelling

METRICS_RECORD = 32 * KIB
"""Bytes of a site's public metrics: 64 of them, with names of 64 characters of four bytes, are 20 KiB."""

TO_COORDINATOR: Table[job_messages.ToCoordinator] = MappingProxyType(
    {
        **FROM_SITES,
        **travelling(
            job_messages.SiteSurvey,
            job_messages.SiteUnavailable,
            job_messages.PlanAgreed,
            job_messages.SiteStatus,
            job_messages.InRound,
            job_messages.KeysErased,
            job_messages.CheckpointSealed,
            job_messages.ModelMade,
            most=SITE_RECORD,
        ),
        **travelling(job_messages.PublicMetrics, most=METRICS_RECORD),
    }
)
FROM_ANY_SITE: Table[job_messages.ToCoordinator] = MappingProxyType(
    {name: entry for name, entry in TO_COORDINATOR.items() if entry.kind is not epoch.Grants}
)
"""Without `Grants`, which only an epoch's maker sends: the one record of a site that may be long."""

TO_SITE: Table[job_messages.ToSite] = MappingProxyType(
    {
        **FROM_COORDINATOR,
        **travelling(*get_args(job_messages.CoordinatorJobMessage), most=MAX_RECORD),
    }
)
