"""Whether a row was among the training rows, by models that the adversary trains itself on halves of all rows.

`lira` holds the confidence of the released model against that of the references with the row and of those without it
(Carlini et al. 2022, arXiv:2112.03570, algorithm 1, with one spread for all rows since the references are few). `rmia`
takes two of them: the row's probability under the released model, over its mean under the references, is compared with
the same ratio of other rows (Zarifzadeh et al. 2024, arXiv:2312.03262, equation 5, with gamma 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedcore.experiment.attacks.membership import (
    ReleasedModel,
    Scores,
    membership_rows,
    together,
)
from fedcore.experiment.attacks.scene import Scene
from fedcore.experiment.prepare import Prepared
from fedcore.learning.confidence import confidences
from fedcore.learning.data.rows import ArrayRows
from fedcore.learning.model import single_thread
from fedcore.learning.training import OwnModel
from fedcore.results import AttackRow, RocCurve
from fedcore.seeds import generator

_Inside = NDArray[np.bool_]
"""(models, rows): whether a reference was trained on a row."""


def lira(scene: Scene) -> Iterator[AttackRow | RocCurve]:
    """Confidence against reference models with and without the row."""
    yield from membership_rows("membership-lira", scene, _against_references)


def rmia(scene: Scene) -> Iterator[AttackRow | RocCurve]:
    """Relative probability against that of other rows, with two reference models."""
    yield from membership_rows("membership-rmia", scene, _against_population)


def _against_references(scene: Scene, found: ReleasedModel) -> tuple[Scores, Scores]:
    """Log-likelihood ratios under references with and without each row."""
    values, is_in = _references(scene, found, scene.effort.reference_pairs)
    count = values.shape[1]
    with_row, without = ((values * mask).sum(axis=0) / mask.sum(axis=0) for mask in (is_in, ~is_in))
    left = np.where(is_in, values - with_row, values - without)
    spread = math.sqrt(float((left**2).sum()) / (left.size - 2 * count)) + 1e-9
    here = np.concatenate(found.sure)
    score = ((here - without) ** 2 - (here - with_row) ** 2) / (2 * spread**2)
    return score[: len(found.members)], score[len(found.members) :]


def _against_population(scene: Scene, found: ReleasedModel) -> tuple[Scores, Scores]:
    """Shares of other rows whose ratio is below a row's; these others are rows that were not trained on."""
    values, _ = _references(scene, found, 1)
    # log p of log(p / (1 - p)), and the mean of p over the references, of which one has each row.
    logs = -np.logaddexp(0.0, -np.concatenate(found.sure))
    mean = np.logaddexp.reduce(-np.logaddexp(0.0, -values), axis=0) - math.log(len(values))
    ratio = logs - mean
    population = np.sort(ratio[len(found.members) :])
    score = np.searchsorted(population, ratio, "right") / len(population)
    # Equal shares, of rows above or below all others, are told apart by the ratio.
    score = score + 1e-6 * np.tanh(ratio)
    return score[: len(found.members)], score[len(found.members) :]


def _references(
    scene: Scene, found: ReleasedModel, pairs: int
) -> tuple[NDArray[np.float64], _Inside]:
    """(models, rows): how sure 2 x `pairs` references are of each row, and which rows they were trained on. Made once
    for all attacks and protections, which they do not depend on."""
    both = together(found)
    count = len(both)
    made: list[tuple[Scores, NDArray[np.bool_]]] = scene.found.setdefault("references", [])
    with single_thread():
        while len(made) < 2 * pairs:
            # A half and the other half, so that each row is in half of the references.
            rng = generator(scene.seed, 1 + len(made) // 2, "", "membership halves")
            half = rng.permutation(count) < count // 2
            for mine in (half, ~half):
                picked = np.flatnonzero(mine)
                made.append((_reference(scene, found.prepared, both, picked, len(made)), mine))
    used = made[: 2 * pairs]
    return np.array([sure for sure, _ in used]), np.array([mine for _, mine in used])


def _reference(
    scene: Scene, prepared: Prepared, rows: ArrayRows, picked: NDArray[np.int64], number: int
) -> Scores:
    """How sure a model that is trained on some rows, as one party, is of all."""
    plan = prepared.plan
    initial = prepared.federation.sites[0].initial
    model = OwnModel(scene.task, prepared.flat, initial, plan.train, plan.rounds)
    for round_ in range(1, plan.rounds + 1):
        model.train(rows.take(picked), seed=scene.seed, round_=round_, site=f"reference {number}")
    return confidences(scene.task, model.module, rows)
