"""One site's vector with its share of the noise: rounded, then integers of noise added, before anything is packed.

Invariant: a field is in [1, 2^b - 1], which the plan's grid proves, so nothing is cut off and the sum of the fields is
the exact sum of the rounded vectors and of all shares.
"""

import numpy as np

from fedcore.secagg.crypto.entropy import Entropy
from fedcore.secagg.encode.quantise import quantise
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.privacy.noise import draw
from fedcore.types import Fields, WideVector


def with_noise(
    total: WideVector, plan: RoundPlan, rounding: np.random.Generator, entropy: Entropy
) -> Fields:
    """The fields of one site's step: its clipped sum, times what makes a step of it, and its noise.

    total: (d,) float64, minus the sum of the clipped gradients of at most plan.max_examples units, or a site's clipped
    update. rounding: of the offsets of stochastic rounding, the same whatever the rows are; entropy: of the noise.
    """
    bits, bound, privacy = plan.packing.bits, plan.range.start, plan.privacy
    assert bound is not None
    assert privacy is not None
    step = total * privacy.scale(plan.train.lr, plan.max_examples)
    fields = quantise(step, bits, bound, rounding).fields.astype(np.int64)
    fields += draw(len(fields), plan.noise_grid.sigma, entropy)
    assert 1 <= fields.min() <= fields.max() < 1 << bits  # the grid has room: `solve_grid`
    return fields.astype(np.uint64)
