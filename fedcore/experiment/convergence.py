"""Whether an arm was still improving when it ended, or had been better before: from its score after each round.

The rule, per arm, over scores y_1..y_n of one metric (turned round for an error, so that more is better), n >= 8:

    noise    s^2 = the greatest over k = 1, 2, 4 of the mean of (y[t+k] - 2 y[t] + y[t-k])^2 / 6: what is left where a
             straight line is taken off, so a steady rise is no noise, and scores that wander for some rounds are
    rising   the least-squares line over the last w = max(5, n / 3) rounds rises by g, g > 3 standard errors of g for
             noise s of the last half of the rounds, and the line over the last w / 2 still rises by g / 4
    past     of means of three neighbouring scores the highest is above the last one by d, none of them in both, and
             d > s sqrt(2/3) (3 + sqrt(2 ln n)) for noise s since then: the second term because the highest of n was
             picked

Noise is taken over at least 8 rounds. Nothing is said of a change below a tenth of a point, of an error below a
thousandth of its value. Of curves that are noise around one value less than 1 in 50 is said to rise or to be past its
best (a test measures it).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedcore.results import RoundRow, Trend

LEAST_ROUNDS = 8
WORTH_SAYING = 1e-3
"""A tenth of a point; of an error a thousandth of its value."""

FAR_ABOVE = 2.0
"""A loss that ends above this times the least one was better long before."""

_RISING, _PAST, _LAGS = 3.0, 3.0, (1, 2, 4)


class Divergence(NamedTuple):
    """round: after which the loss was least; least, last: the losses."""

    round: int
    least: float
    last: float


def trends(rows: Sequence[RoundRow], column: str, *, lower: bool) -> Mapping[str, Trend]:
    """{arm: what there is to say of it}, without the arms that there is nothing to say of."""
    found: dict[str, Trend] = {}
    for arm in dict.fromkeys(row.arm for row in rows):
        known = [row for row in rows if row.arm == arm and row.number(column) is not None]
        scores = np.array([row.number(column) for row in known], dtype=np.float64)
        if len(scores) < LEAST_ROUNDS or not np.isfinite(scores).all():
            continue
        gained, window = _rise(-scores if lower else scores)
        best = _past_best(-scores if lower else scores)
        if gained or best is not None:
            found[arm] = Trend(
                last=float(scores[-1]),
                window=window if gained else None,
                gained=gained or None,
                best_round=None if best is None else known[best].round,
                best=None if best is None else float(scores[best]),
            )
    return found


def diverged(rows: Sequence[RoundRow]) -> Divergence | None:
    """Whether the federated arm's loss on test rows ended far above its least one, and the centralised arm's did not,
    as it does where a model learns its training rows by heart."""
    found: Divergence | None = None
    for arm in ("federated", "centralised"):
        known = [
            (loss, r.round) for r in rows if r.arm == arm and (loss := r.number("loss")) is not None
        ]
        if len(known) < 2:
            continue
        (least, at), last = min(known), known[-1][0]
        far = last > FAR_ABOVE * least > 0
        if arm == "federated":
            found = Divergence(at, least, last) if far else None
        elif far:
            return None
    return found


def _rise(scores: NDArray[np.float64]) -> tuple[float, int]:
    """(the improvement over the last rounds, 0.0 where it is within the noise; how many rounds these are)."""
    window = max(5, len(scores) // 3)
    gained, error = _line(scores[-window:])
    error *= _noise(scores[-max(LEAST_ROUNDS, len(scores) // 2) :])
    lately, _ = _line(scores[-((window + 1) // 2) :])
    risen = gained > max(_RISING * error, _worth(scores)) and lately > gained / 4
    return (gained if risen else 0.0), window


def _line(scores: NDArray[np.float64]) -> tuple[float, float]:
    """(by how much the least-squares line rises from the first score to the last, its error for noise of 1)."""
    places = np.arange(len(scores)) - (len(scores) - 1) / 2
    squares = float(places @ places)
    return float(places @ scores) / squares * (len(scores) - 1), (len(scores) - 1) / math.sqrt(
        squares
    )


def _past_best(scores: NDArray[np.float64]) -> int | None:
    """The place of the best score, None where the last ones are as good within the noise."""
    means = (scores[:-2] + scores[1:-1] + scores[2:]) / 3
    top = int(means.argmax())
    if top + 3 > len(means) - 1:
        return None
    picked = _PAST + math.sqrt(2 * math.log(len(scores)))
    since = scores[-max(LEAST_ROUNDS, len(scores) - top) :]
    critical = _noise(since) * math.sqrt(2 / 3) * picked
    if means[top] - means[-1] <= max(critical, _worth(scores)):
        return None
    return top + int(scores[top : top + 3].argmax())


def _noise(scores: NDArray[np.float64]) -> float:
    found = 0.0
    for lag in _LAGS:
        if len(scores) >= 3 * lag + 2:
            bends = scores[2 * lag :] - 2 * scores[lag:-lag] + scores[: -2 * lag]
            found = max(found, float(np.mean(bends**2)))
    return math.sqrt(found / 6)


def _worth(scores: NDArray[np.float64]) -> float:
    """Scores below 0 are errors turned round."""
    return WORTH_SAYING * (abs(float(scores[-1])) if scores[-1] < 0 else 1.0)
