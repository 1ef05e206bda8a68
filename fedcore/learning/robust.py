"""Means that a few bad groups of sites do not move: the coordinate-wise trimmed mean of group means.

Yin et al. 2018 (arXiv:1803.01498), definition 2, of the means of groups in the place of single updates (as the
median of means, Chen et al. 2017, arXiv:1705.05491, algorithm 2): nobody sees a single update here.

Invariant: sorting and additions in a fixed order, so every party has the same bits (PROTOCOL F).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedcore.types import WideVector


def trimmed_mean(means: Sequence[WideVector], trim: int) -> WideVector:
    """(d,) float64: of each coordinate the mean without the `trim` largest and smallest of the values; less where so
    few groups are left that nothing would remain. means: of the groups, each (d,) float64."""
    trim = min(trim, (len(means) - 1) // 2)
    ordered = np.sort(np.stack(means), axis=0)[trim : len(means) - trim]
    total = np.zeros(ordered.shape[1])
    for row in ordered:
        total += row
    return total / len(ordered)
