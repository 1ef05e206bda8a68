"""How the targets of a regression are scaled for training: by a public range, or by their size over all sites.

The loss sees targets of a size near 1, at which learning rates and ranges are made; outputs are taken back to the
target's own unit before anything else reads them, so metrics and predictions are in it.

Invariant: the same at every site: a function of what the task declares, or of released federated statistics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedcore.learning.data.statistics import SPREAD, Column

SIZES: Column = ("log2 of the target's size", -64.0, 64.0)
"""The column of federated statistics that targets without a declared range have: log2 |y|, missing where y is 0. Its
mean is the logarithm of their geometric mean, which one large value hardly moves, and no range has to be known."""


@dataclass(frozen=True)
class TargetScale:
    """Targets are centre + spread * (what the model learns), both in the target's unit."""

    centre: float
    spread: float

    @classmethod
    def of_range(cls, low: float, high: float) -> TargetScale:
        """Of a public range, as inputs are scaled: its middle becomes 0 and an eighth of its width 1."""
        return cls((low + high) / 2, (high - low) / 2 * SPREAD)

    @classmethod
    def of_sizes(cls, mean: float) -> TargetScale:
        """Of the mean of log2 |y| over all sites: the nearest power of two becomes 1."""
        return cls(0.0, 2.0 ** round(mean))

    @property
    def step(self) -> float:
        """The power of two nearest to the spread: the unit of fixed-point metric sums, exact to divide by."""
        return float(2.0 ** round(math.log2(self.spread)))

    def to_model(self, targets: torch.Tensor) -> torch.Tensor:
        """(n, ...) targets of any real dtype as the loss sees them, in their own floating dtype, else float32."""
        dtype = targets.dtype if targets.is_floating_point() else torch.float32
        return ((targets.to(torch.float64) - self.centre) / self.spread).to(dtype)

    def to_unit(self, outputs: NDArray[np.float64]) -> NDArray[np.float64]:
        """Outputs of the model in the target's unit."""
        return outputs * self.spread + self.centre


def sizes(targets: torch.Tensor) -> NDArray[np.float64]:
    """(n, 1) float64 log2 |y| of (n,) or (n, 1) targets, NaN where y is 0."""
    values = np.abs(targets.to(torch.float64).numpy().reshape(-1, 1))
    return np.log2(np.where(values > 0, values, np.nan))
