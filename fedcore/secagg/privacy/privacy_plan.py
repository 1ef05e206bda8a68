"""What a plan states of differential privacy, and the proof that its vectors have room for the noise.

Invariant: every honest site adds an integer share of noise of standard deviation `z S / sqrt(t - c)` grid units
before its vector is packed, where S is the sensitivity of the sum in grid units, t the threshold and c the sites that
may hand over all they hold. A sum that is opened is of t sites or more, so at least t - c shares in it are unknown
to whoever looks: together the noise of standard deviation z S that the accounting assumes. Nobody sees a sum
without it.

S = C in grid units, and sqrt(d) for rounding: with the same rounding offsets, the rounded vectors of two sets of rows
differ from the exact ones by less than one unit in each of d coordinates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedcore.errors import BadInput, PlanRefused
from fedcore.secagg.privacy import accounting, noise

UNITS = ("record", "column")
"""Whose data a guarantee is about: one row, or all rows with one id in the task's group column, at one site."""

_SPARE = 1e-3
"""The share of delta that pays for the sampler's distance from the exact law."""

_MOST_ROUNDING = 8
"""Rounding adds at most an eighth to the sensitivity; where there is room, 1/128."""


@dataclass(frozen=True)
class PrivacyPlan:
    """epsilon, delta: what all rounds of the job cost a unit, adjacency: add or remove one. clip: C, the largest L2
    norm of a unit's gradient. unit: one of UNITS. colluders: c. noise_multiplier: z, calibrated for the rounds.

    Raises BadInput for values outside their ranges.
    """

    epsilon: float
    delta: float
    clip: float
    unit: str
    colluders: int
    noise_multiplier: float

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("epsilon", 0 < self.epsilon <= 100, "above 0, at most 100"),
            ("delta", 0 < self.delta < 1, "between 0 and 1"),
            ("clip", 0 < self.clip < math.inf, "above 0"),
            ("colluders", self.colluders >= 0, "0 or more"),
            ("noise_multiplier", 0 < self.noise_multiplier < math.inf, "above 0"),
            ("unit", self.unit in UNITS, " or ".join(UNITS)),
        ):
            if not holds:
                found = getattr(self, name)
                raise BadInput(f"privacy.{name}: found {found!r}, expected {expected}")

    @classmethod
    def calibrated(
        cls, epsilon: float, delta: float, rounds: int, *, clip: float, unit: str, colluders: int
    ) -> PrivacyPlan:
        """With the smallest noise for which so many rounds cost at most epsilon. Raises BadInput."""
        checked = cls(epsilon, delta, clip, unit, colluders, 1.0)
        z = accounting.noise_multiplier(checked.epsilon, delta * (1 - _SPARE), rounds)
        return cls(epsilon, delta, clip, unit, colluders, z)

    def spent(self, rounds: int) -> float:
        """Epsilon of so many rounds at the plan's delta."""
        mu = accounting.mu_of(self.noise_multiplier, rounds)
        return accounting.epsilon_of(mu, self.delta * (1 - _SPARE))

    def check(self, *, rounds: int, values: int, shares: int, units: int) -> None:
        """Raise PlanRefused where the noise does not pay for the rounds, or no honest share is left.

        values: integers of noise in one round's sum; shares: t; units: at most so many take part.
        """
        if self.delta * units >= 1:
            raise PlanRefused(
                f"privacy.delta: found {self.delta:g} for up to {units} units, expected less than 1 / {units} = "
                f"{1 / units:.2g}",
                remedy="a mechanism that shows one unit in full satisfies a larger delta",
            )
        if self.colluders >= shares:
            raise PlanRefused(
                f"privacy.colluders: found {self.colluders} with a threshold of {shares}, expected at most "
                f"{shares - 1}",
                remedy="the noise of colluding sites does not count: a sum needs a share of an honest one",
            )
        far = (1 + math.exp(self.epsilon)) * noise.DISTANCE * rounds * values
        if self.spent(rounds) > self.epsilon or far > _SPARE * self.delta:
            raise PlanRefused(
                f"privacy: found noise multiplier {self.noise_multiplier:g}, which costs epsilon "
                f"{self.spent(rounds):.4g} over {rounds} rounds, expected at most {self.epsilon:g}",
                remedy="leave it to the job's epsilon: `fedcore plan` calibrates it",
            )


@dataclass(frozen=True)
class NoiseGrid:
    """The grid of a plan's vectors. clip_units: C in units of the grid; sensitivity: S, in units; sigma: of one
    site's share; reach: the largest magnitude of a share."""

    clip_units: int
    sensitivity: float
    sigma: float
    reach: int

    @property
    def rounding(self) -> float:
        """The part of the sensitivity that rounding adds, as a share of the clip norm."""
        return self.sensitivity / self.clip_units - 1


def solve_grid(
    privacy: PrivacyPlan, *, coordinates: int, shares: int, units: int, bits: int
) -> NoiseGrid:
    """The finest useful grid on which the sum of all units of a site and its share of the noise always fit.

    coordinates: d; shares: t; units: the most at one site; bits: b of a field. Proved: units * C + 1 + reach is at
    most 2^(b-1) - 1, so no field overflows; sigma is 4 to 2^16; rounding adds at most an eighth to the sensitivity.
    Raises PlanRefused with the bits that fit.
    """
    found = _grid(privacy, coordinates, shares, units, bits)
    if found is not None:
        return found
    fits = [b for b in range(bits + 1, 25) if _grid(privacy, coordinates, shares, units, b)]
    raise PlanRefused(
        f"protect.bits: found {bits}, too few for {units} rows of one site, noise multiplier "
        f"{privacy.noise_multiplier:g} and the rounding of {coordinates} coordinates under privacy",
        remedy=f"protect.bits = {fits[0]} has room for them"
        if fits
        else "a smaller protect.max_examples, a smaller model, or a larger epsilon",
    )


def _grid(
    privacy: PrivacyPlan, coordinates: int, shares: int, units: int, bits: int
) -> NoiseGrid | None:
    levels, rounding = (1 << (bits - 1)) - 1, math.sqrt(coordinates)
    per_unit = privacy.noise_multiplier / math.sqrt(shares - privacy.colluders)

    def at(clip_units: int) -> NoiseGrid:
        sensitivity = clip_units + rounding
        sigma = per_unit * sensitivity
        return NoiseGrid(clip_units, sensitivity, sigma, noise.reach_of(sigma))

    def fits(grid: NoiseGrid) -> bool:
        room = units * grid.clip_units + 1 + grid.reach
        return room <= levels and grid.sigma <= noise.MOST_SIGMA

    low, high = (
        0,
        128 * math.ceil(rounding) + 1,
    )  # low fits, or is no grid; high is finer than useful
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(at(middle)) else (low, middle)
    if low < _MOST_ROUNDING * rounding or at(low).sigma < noise.LEAST_SIGMA:
        return None
    return at(low)
