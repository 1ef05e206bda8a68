"""Built-in task `digits`: 1,797 handwritten digits of 8x8 pixels (scikit-learn's), over n sites.

Invariant: the partition is a function of (n, by, alpha, seed); pixels are scaled by the public
maximum 16, so no statistics need to travel.
"""

from typing import Any

import numpy as np
from torch import nn

from fedcore.errors import require_extra
from fedcore.learning.data.partition import split
from fedcore.learning.task import Task

PIXEL_MAXIMUM = 16.0
"""The data set's own scale: counts of set pixels in 4x4 blocks."""

HIDDEN = 32


def sites(n: int = 4, by: str = "iid", alpha: float | None = None, seed: int = 0) -> dict[str, Any]:
    """`{"site-01": (X, y), ...}`: X (rows, 64) float32 in [0, 1], y (rows,) int64 digits."""
    require_extra("task digits", "digits", "sklearn")
    from sklearn.datasets import load_digits  # 0.5 s to import: only where digits are wanted

    pixels, digits = load_digits(return_X_y=True)
    x = (pixels / PIXEL_MAXIMUM).astype(np.float32)
    return split((x, digits.astype(np.int64)), n, by=by, alpha=alpha, seed=seed)


def data(source: Any) -> Any:
    """One part of the partition, as it is."""
    return source


def model() -> nn.Module:
    """64 -> 32 -> 10 with ReLU: 2,410 parameters."""
    return nn.Sequential(nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 10))


task = Task(
    name="digits",
    data=data,
    model=model,
    loss=nn.CrossEntropyLoss(),
    metrics=("accuracy",),
    sites=sites,
)
