"""Built-in task `digits`: 1,797 handwritten digits of 8x8 pixels (scikit-learn's), over n sites.

Invariant: the partition is a function of (n, by, alpha, seed); pixels are scaled by the public
maximum 16, so no statistics need to travel.

More sites than digits, for simulations of thousands, draw theirs with replacement: training rows from four fifths
of the digits and test rows from the last fifth, so that no row is trained on anywhere and tested on elsewhere.
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

TRAINED_ON, TESTED_ON = 16, 4
"""Rows of each site where there are more sites than digits."""


def sites(n: int = 4, by: str = "iid", alpha: float | None = None, seed: int = 0) -> dict[str, Any]:
    """`{"site-01": (X, y), ...}`: X (rows, 64) float32 in [0, 1], y (rows,) int64 digits."""
    require_extra("task digits", "digits", "sklearn")
    from sklearn.datasets import load_digits  # 0.5 s to import: only where digits are wanted

    pixels, digits = load_digits(return_X_y=True)
    x, y = (pixels / PIXEL_MAXIMUM).astype(np.float32), digits.astype(np.int64)
    if n > len(x) and by == "iid" and alpha is None:
        return _drawn(x, y, n, seed)
    return split((x, y), n, by=by, alpha=alpha, seed=seed)


def _drawn(x: Any, y: Any, n: int, seed: int) -> dict[str, Any]:
    """`{"site-00001": ((X, y), (X, y)), ...}`: rows to train on and to test on, drawn with replacement."""
    generator = np.random.default_rng(seed)
    mixed = generator.permutation(len(x))
    kept = len(x) // 5
    parts = (
        (generator.choice(mixed[kept:], TRAINED_ON), generator.choice(mixed[:kept], TESTED_ON))
        for _ in range(n)
    )
    return {
        f"site-{i + 1:0{len(str(n))}d}": tuple((x[rows], y[rows]) for rows in part)
        for i, part in enumerate(parts)
    }


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
