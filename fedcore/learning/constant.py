"""The constant prediction: what a model reaches that answers every row alike, which any arm should beat.

Classes: each class as likely as it is among the training rows, so the most frequent one is predicted (of equals
the first) and an AUC is one half. Values: the mean of the training targets. Both are scored by the metrics' own code.

Invariant: it is chosen on training rows and scored on test rows, as the arms are.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from fedcore.learning.data.rows import ArrayRows
from fedcore.learning.metrics import Scores
from fedcore.learning.metrics.definition import Floats, Metric, Values
from fedcore.learning.saved import Module
from fedcore.learning.scoring import probe
from fedcore.learning.site import SiteRows
from fedcore.learning.task import Task


def training_targets(task: Task, module: Module, site: SiteRows, seed: int) -> NDArray[np.generic]:
    """(n,) the targets of a site's training rows as the metrics see them.

    They are known without a pass over the rows, unless the task's own `predict` makes them or a dataset has values
    for targets. Raises what `scoring.probe` raises.
    """
    if task.predict is None and isinstance(site.train, ArrayRows):
        return site.train.y.numpy().reshape(len(site.train), -1)[:, 0]
    labels = site.train.labels() if task.predict is None else None
    if labels is not None:
        return labels
    return probe(task, module, site.train, seed=seed, round_=0, site=site.id).targets


def constant_values(
    metrics: Sequence[Metric], trained_on: Values, tested: Scores
) -> Mapping[str, float | None]:
    """{metric: value of the constant prediction on the tested rows}; None where it is undefined.

    trained_on: (n,) targets of all training rows. tested: of any arm, for the shape of its outputs and the targets.
    """
    found: dict[str, float | None] = {}
    for metric in metrics:
        outputs = (_mean if metric.of_values else _shares)(trained_on, tested.outputs)
        found[metric.name] = metric.exact(outputs, tested.targets)
    return found


def _mean(trained_on: Values, like: Floats) -> Floats:
    return np.full(like.shape, float(np.mean(trained_on.astype(np.float64))))


def _shares(trained_on: Values, like: Floats) -> Floats:
    """The logits of the classes' shares; a class without training rows counts as half a row."""
    classes = 2 if like.ndim == 1 else like.shape[1]
    counts = np.bincount(trained_on.astype(np.int64), minlength=classes)[:classes]
    logs = np.log(np.maximum(counts, 0.5) / len(trained_on))
    if like.ndim == 1:
        return np.full(like.shape, logs[1] - logs[0])
    return np.tile(logs, (len(like), 1))
