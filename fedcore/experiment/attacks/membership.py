"""Whether a row was among the training rows, from the released model alone.

The adversary has the model, the row with its class, and other rows of the same kind. `quantile` learns from rows that
were not trained on how sure such a model is of a row like this one (Bertran et al. 2023, arXiv:2307.03694, with a
Gaussian whose mean and spread are linear in the row). Attacks with models of their own are in `reference_models.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import BadInput, RoundAbandoned
from fedcore.experiment.attacks.intervals import least_non_members, share_interval
from fedcore.experiment.attacks.scene import Scene
from fedcore.experiment.prepare import Prepared, prepare
from fedcore.learning.confidence import confidences
from fedcore.learning.data.rows import ArrayRows, pool
from fedcore.learning.model import single_thread
from fedcore.learning.state import model_digest
from fedcore.results import AttackRow, RocCurve
from fedcore.seeds import generator

Scores = NDArray[np.float64]
"""(rows,): the higher, the likelier a member."""

RATES = (0.01, 0.001)
"""False positive rates that are reported where there are rows enough."""

_SURE = 0.998
"""Of intervals that decide whether a row is beyond chance: one in a thousand on either side."""

_FOLDS, _RIDGE = 5, 1.0

_POINTS = 200

_NOT_SHOWN = (
    "Encryption does not change black-box membership: the model is the same bits under every protection. Differential "
    "privacy bounds it. With more references or rows another adversary may do better."
)


@dataclass(frozen=True)
class ReleasedModel:
    """A released model, and how sure it is of rows that it was trained on and of others."""

    prepared: Prepared
    members: ArrayRows
    others: ArrayRows
    sure: tuple[Scores, Scores]
    digest: str


def refuse_rates(scene: Scene) -> None:
    """Raise BadInput where the test rows are too few for a rate that was asked for."""
    for rate in scene.rates:
        others = sum(len(site.test) for site in scene.prepared.sites)
        if not 0 < rate < 1:
            raise BadInput(f"--fpr: found {rate:g}, expected a share between 0 and 1")
        if others < least_non_members(rate):
            shown = math.ceil(1000 * (1 - 0.05 ** (1 / others) if others else 1.0)) / 1000
            raise BadInput(
                f"--fpr: {too_few(others, rate)}",
                remedy=f"--fpr {shown:g}, or more test rows (--folds 2)",
            )


def too_few(others: int, rate: float) -> str:
    """Why a false positive rate cannot be claimed."""
    return (
        f"found {others:,} rows that were not trained on, expected at least {least_non_members(rate):,} for a false "
        f"positive rate of {rate:.2%}: with none of them accepted it would not be known to be so low"
    )


def quantile(scene: Scene) -> Iterator[AttackRow | RocCurve]:
    """Confidence against what rows that were not trained on lead one to expect."""
    yield from membership_rows("membership-quantile", scene, _against_expected)


def membership_rows(
    name: str, scene: Scene, attack: Callable[[Scene, ReleasedModel], tuple[Scores, Scores]]
) -> Iterator[AttackRow | RocCurve]:
    """Figures of the scores of members and of others, and their ROC curve, for each protection."""
    if scene.inputs.labels() is None:
        yield AttackRow(
            name, "anyone", "the model", scene.job.protect.protection, "", 0, "ROC-AUC",
            refused="the targets are no classes, and the confidence is that of a row's class",
        )  # fmt: skip
        return
    for protection in scene.protections:
        found = _released(scene, protection)
        member, other = attack(scene, found)
        yield from _rows(name, protection, found, member, other, scene.rates)
        yield RocCurve(name, protection, *roc_points(member, other))


def _released(scene: Scene, protection: str) -> ReleasedModel:
    """The model of all rounds of the job; made once for all attacks."""
    key = f"released {protection}"
    if key not in scene.found:
        with single_thread():
            prepared = prepare(scene.task, scene.of(protection))
            federation = prepared.federation
            while (
                federation.step is not None
                and federation.step.training_round <= prepared.plan.rounds
            ):
                with suppress(RoundAbandoned):
                    federation.advance()
            parts = [site.train for site in prepared.sites], [site.test for site in prepared.sites]
            members, others = (pool([p for p in each if len(p)]) for each in parts)
            assert isinstance(members, ArrayRows)
            assert isinstance(others, ArrayRows)
            model = federation.state.server.model
            prepared.flat.write(model)
            module = prepared.flat.module
            sure = confidences(scene.task, module, members), confidences(scene.task, module, others)
        scene.found[key] = ReleasedModel(prepared, members, others, sure, model_digest(model))
    released: ReleasedModel = scene.found[key]
    return released


def _against_expected(scene: Scene, found: ReleasedModel) -> tuple[Scores, Scores]:
    """Standard scores under what is expected of a row, by regressions that did not see it."""
    member, other = found.sure
    rng = generator(scene.seed, 0, "", "membership folds")
    fold = rng.permutation(len(other)) % _FOLDS
    chosen = rng.integers(_FOLDS, size=len(member))
    both = _features(together(found))
    features = both[len(member) :], both[: len(member)]
    scores = np.empty(len(member)), np.empty(len(other))
    for k in range(_FOLDS):
        seen = fold != k
        mean = _ridge(features[0][seen], other[seen])
        left = np.log(np.abs(other[seen] - features[0][seen] @ mean) + 1e-3)
        spread = _ridge(features[0][seen], left)
        for place, rows, sure, mine in (
            (0, features[1], member, chosen == k),
            (1, features[0], other, fold == k),
        ):
            expected = rows[mine] @ mean
            scores[place][mine] = (sure[mine] - expected) / np.exp(rows[mine] @ spread)
    return scores


def together(found: ReleasedModel) -> ArrayRows:
    """Members, then others."""
    both = pool([found.members, found.others])
    assert isinstance(both, ArrayRows)
    return both


def _features(rows: ArrayRows) -> NDArray[np.float64]:
    """Inputs, class and a one for each row."""
    labels, x = rows.labels(), rows.x.numpy().reshape(len(rows), -1).astype(np.float64)
    assert labels is not None
    classes = np.eye(int(labels.max(initial=0)) + 1)[labels]
    return np.concatenate([x, classes, np.ones((len(rows), 1))], axis=1)


def _ridge(x: NDArray[np.float64], y: Scores) -> Scores:
    return np.asarray(np.linalg.solve(x.T @ x + _RIDGE * np.eye(x.shape[1]), x.T @ y), np.float64)


def _rows(
    name: str,
    protection: str,
    found: ReleasedModel,
    member: Scores,
    other: Scores,
    rates: tuple[float, ...],
) -> Iterator[AttackRow]:
    area, error = roc_area(member, other)
    low, high = max(0.0, area - 1.96 * error), min(1.0, area + 1.96 * error)
    beyond = area - 3.09 * error > 0.5
    about = {"members": float(len(member)), "non_members": float(len(other))}
    told = "can be told from others better than by chance" if beyond else "are not told from others"
    yield AttackRow(
        name, "anyone", "the model", protection, f"model {found.digest[:12]}", len(member) + len(other), "ROC-AUC",
        area, low, high, 0.5, beyond, about,
        f"Training rows {told} by the released model: ROC-AUC {area:.3f} ({low:.3f} to {high:.3f}).", _NOT_SHOWN,
    )  # fmt: skip
    for rate in sorted({*RATES, *rates}, reverse=True):
        yield _at_rate(name, protection, rate, member, other, about)


def _at_rate(
    name: str, protection: str, rate: float, member: Scores, other: Scores, about: dict[str, float]
) -> AttackRow:
    measure = f"true positives at {rate:.1%} false ones"
    if len(other) < least_non_members(rate):
        return AttackRow(
            name, "anyone", "the model", protection, "", len(other), measure, more=about,
            refused=f"{measure}: {too_few(len(other), rate)}",
        )  # fmt: skip
    hits, wrong = at_false_positives(member, other, rate)
    low, high = share_interval(hits, len(member))
    surely, at_most = (
        share_interval(hits, len(member), _SURE)[0],
        share_interval(wrong, len(other), _SURE)[1],
    )
    return AttackRow(
        name, "anyone", "the model", protection, "", len(member), measure, hits / len(member), low, high, rate,
        surely > at_most,
        {
            **about, "false_positives": wrong / len(other),
            "false_positives_at_most": share_interval(wrong, len(other))[1],
        },
        f"{hits} of {len(member):,} training rows are named with {wrong} of {len(other):,} other rows named wrongly.",
        _NOT_SHOWN,
    )  # fmt: skip


def at_false_positives(member: Scores, other: Scores, rate: float) -> tuple[int, int]:
    """(members, others) above the lowest threshold that at most this share of the others is above."""
    allowed = math.floor(rate * len(other))
    threshold = np.sort(other)[len(other) - 1 - allowed]
    return int((member > threshold).sum()), int((other > threshold).sum())


def roc_points(member: Scores, other: Scores) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(false, true) positives over all thresholds, at most _POINTS of them, denser where they are few."""
    ordered = np.sort(other)[::-1]
    picked = np.unique(np.geomspace(1, len(other), _POINTS).astype(int)) - 1
    thresholds = ordered[picked]
    false = (other[:, None] >= thresholds).mean(axis=0)
    true = (member[:, None] >= thresholds).mean(axis=0)
    return tuple(false.round(6).tolist()), tuple(true.round(6).tolist())


def roc_area(member: Scores, other: Scores) -> tuple[float, float]:
    """(area under the ROC curve, its standard error by DeLong et al. 1988). A tie counts half."""
    ordered, reverse = np.sort(other), np.sort(member)
    above = (
        np.searchsorted(ordered, member, "left") + np.searchsorted(ordered, member, "right")
    ) / 2
    below = (np.searchsorted(reverse, other, "left") + np.searchsorted(reverse, other, "right")) / 2
    first, second = above / len(other), 1 - below / len(member)
    variance = first.var(ddof=1) / len(member) + second.var(ddof=1) / len(other)
    return float(first.mean()), math.sqrt(float(variance))
