"""The encoded updates of many sites as one sum, for a simulation that adds without cryptography.

Invariant: the sum is that of the fields which `SiteTrainer.update` makes of each site, bit for bit: the same training,
and `quantise_sum` with each site's own generator.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedcore.learning.site import SiteTrainer
from fedcore.learning.state import JobState
from fedcore.secagg.encode.partial import PartialSum
from fedcore.secagg.encode.quantise import quantise_sum
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.secagg.purposes import purpose_of
from fedcore.seeds import generator

VALUES_TOGETHER = 1 << 20
"""Values of the updates that are encoded by one call: 4 MiB."""


def together(plan: RoundPlan) -> int:
    """How many sites are encoded by one call."""
    return max(1, VALUES_TOGETHER // plan.coordinates)


def encodes_together(sites: Sequence[SiteTrainer], plan: RoundPlan, step: PlannedRound) -> bool:
    """Whether the vectors of these sites for a step are what `update_sum` adds."""
    trains = purpose_of(step.purpose).trains and plan.privacy is None
    return trains and not any(site.own_vectors for site in sites)


def update_sum(
    sites: Sequence[SiteTrainer], plan: RoundPlan, step: PlannedRound, state: JobState
) -> PartialSum:
    """Train the sites, where that is not done ahead, and add up their quantised weighted updates and what rides with
    each. Raises as `SiteTrainer.update`."""
    watch, round_ = sites[0].watch, step.training_round
    updates = np.empty((len(sites), plan.coordinates), dtype=np.float32)
    for row, site in zip(updates, sites, strict=True):
        with watch("train"):
            row[:] = site.train(plan, state, round_)
    with watch("encode"):
        factors = np.array([site.factor(plan) for site in sites])
        rounding = [generator(s.job.run.seed, round_, s.site.id, "rounding") for s in sites]
        found = quantise_sum(updates, factors, plan.packing.bits, state.server.bound, rounding)
    counts = zip(found.over.tolist(), found.over_half.tolist(), strict=True)
    wides = [site.beside(plan, step, state, *of) for site, of in zip(sites, counts, strict=True)]
    return PartialSum(tuple(site.site.index for site in sites), found.total, wides)
