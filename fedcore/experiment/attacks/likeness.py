"""How like the true rows reconstructed ones are, and how like they are to rows that they cannot come from.

Reconstructions are assigned to the true rows so that the squared error is least (Hungarian method), since a batch has
no order. Chance is measured with the same reconstructions: they are assigned in the same way to as many other rows
of the task, drawn anew DRAWS times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Flat = NDArray[np.float64]
"""(rows, values)."""

DRAWS = 999
"""An attack without any information is above all draws in one case of a thousand."""

CANDIDATES = 100
"""A row is identified where its reconstruction is closer to it than to 99 other rows."""

MOST_PSNR = 80.0
"""Decibel; an exact copy has infinitely many."""

_NAMED_DRAWS = 50
"""Of the draws: in which it is counted, too, how many other rows are identified."""

_WINDOW = 7


@dataclass
class Likeness:
    """What reconstructions of several rounds came to, row by row.

    psnr: in dB, of the width of the valid range; ssim: of pictures; identified: closest of CANDIDATES rows to its
    reconstruction; null: (DRAWS,) for each round, mean psnr against other rows; null_identified: for each round, the
    share of other rows that are identified, which is above 1 / CANDIDATES where there are more guesses than rows.
    """

    psnr: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    identified: list[bool] = field(default_factory=list)
    null: list[Flat] = field(default_factory=list)
    null_identified: list[float] = field(default_factory=list)

    @property
    def chance(self) -> Flat:
        """(DRAWS,) the mean psnr over all rounds against other rows."""
        return np.mean(self.null, axis=0) if self.null else np.zeros(DRAWS)

    def add(
        self, guesses: Flat, truth: Flat, others: Flat, picture: Sequence[int] | None, width: float,
        rng: np.random.Generator,
    ) -> list[tuple[int, int]]:  # fmt: skip
        """Count one round. others: (n, values) rows of the task that the round was not about; fewer guesses than rows
        count as the best constant that needs no view, the mean of all rows. Returns [(row, its guess)]."""
        missing = max(0, len(truth) - len(guesses))
        filled = np.concatenate([guesses, np.repeat(others.mean(0)[None], missing, axis=0)])
        to_truth, to_others = _errors(filled, truth), _errors(filled, others)
        pairs = _assigned(to_truth)
        for guess, row in pairs:
            error = to_truth[guess, row]
            self.psnr.append(float(_psnr(error, width)))
            self.identified.append(_closest(error, to_others[guess], rng))
            if picture is not None:
                self.ssim.append(similarity(filled[guess], truth[row], picture, width))
        null, named = np.empty(DRAWS), []
        if len(truth) == 1:
            drawn = rng.integers(len(others), size=DRAWS)
            null = _psnr(to_others.min(axis=0)[drawn], width)
            pairs_of = [[(int(to_others[:, row].argmin()), row)] for row in drawn[:_NAMED_DRAWS]]
        else:
            pairs_of = []
            for draw in range(DRAWS):
                drawn = rng.choice(len(others), len(truth), replace=False)
                found = [(guess, drawn[row]) for guess, row in _assigned(to_others[:, drawn])]
                null[draw] = np.mean([_psnr(to_others[pair], width) for pair in found])
                pairs_of += [found] if draw < _NAMED_DRAWS else []
        for found in pairs_of:
            left = np.delete(to_others, [row for _, row in found], axis=1)
            named += [_closest(to_others[guess, row], left[guess], rng) for guess, row in found]
        self.null.append(null)
        self.null_identified.append(float(np.mean(named)))
        return [(row, guess) for guess, row in pairs if guess < len(guesses)]


def _closest(error: float, others: Flat, rng: np.random.Generator) -> bool:
    """Whether an error is below those of CANDIDATES - 1 other rows."""
    drawn = rng.choice(len(others), min(CANDIDATES - 1, len(others)), replace=False)
    return bool(error < others[drawn].min())


def _errors(guesses: Flat, rows: Flat) -> Flat:
    """(guesses, rows) mean squared errors."""
    squares = (guesses**2).mean(1)[:, None] + (rows**2).mean(1)[None, :]
    found: Flat = np.maximum(squares - 2 * guesses @ rows.T / guesses.shape[1], 0.0)
    return found


def _assigned(errors: Flat) -> list[tuple[int, int]]:
    """(guess, row) pairs with the least sum of errors, one for each row."""
    if errors.shape[1] == 1:
        return [(int(errors[:, 0].argmin()), 0)]
    from scipy.optimize import linear_sum_assignment

    return [
        (int(guess), int(row)) for guess, row in zip(*linear_sum_assignment(errors), strict=True)
    ]


def _psnr(errors: Flat, width: float) -> Flat:
    """Peak signal-to-noise ratios in dB."""
    least = width**2 * 10 ** (-MOST_PSNR / 10)
    found: Flat = 10 * np.log10(width**2 / np.maximum(errors, least))
    return found


def similarity(one: Flat, other: Flat, picture: Sequence[int], width: float) -> float:
    """Structural similarity (Wang et al. 2004, equation 13), -1 to 1, 1 for equal pictures: the mean over all windows
    of 7 x 7 pixels, over channels."""
    first, second = (each.reshape(-1, *picture[-2:]) for each in (one, other))
    side = min(_WINDOW, *picture[-2:])
    near, far = (
        np.lib.stride_tricks.sliding_window_view(each, (side, side), axis=(1, 2)).reshape(
            *each.shape[:1], -1, side * side
        )
        for each in (first, second)
    )
    small, large = (0.01 * width) ** 2, (0.03 * width) ** 2
    means, variances = (near.mean(-1), far.mean(-1)), (near.var(-1), far.var(-1))
    together = (near * far).mean(-1) - means[0] * means[1]
    found = (2 * means[0] * means[1] + small) * (2 * together + large)
    found /= (means[0] ** 2 + means[1] ** 2 + small) * (variances[0] + variances[1] + large)
    return float(found.mean())
