"""What a plan states of differential privacy, and the proof that its vectors have room for the noise.

Invariant: every honest site adds an integer share of noise of standard deviation `z S / sqrt(t - c)` grid units
before its vector is packed, where S is the sensitivity of the sum in grid units, t the threshold and c the sites that
may hand over all they hold. A sum that is opened is of t sites or more, so at least t - c shares in it are unknown
to whoever looks: together the noise of standard deviation z S that the accounting assumes. Nobody sees a sum
without it. With `noise = "site"` (local privacy) each share is of z S by itself, so the bound needs no other site.

S = C in grid units, and sqrt(d) for rounding: with the same rounding offsets, the rounded vectors of two sets of rows
differ from the exact ones by less than one unit in each of d coordinates.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from fedcore.errors import BadInput, PlanRefused
from fedcore.secagg.privacy import accounting, noise
from fedcore.secagg.privacy.sampled import Round

RECORD, COLUMN, SITE = UNITS = ("record", "column", "site")
"""Whose data a guarantee is about: one row, all rows with one id in the task's group column at one site, or all rows
of a site."""

IN_SUM, EACH_SITE = NOISE = ("sum", "site")
"""Where there is enough noise: in the sums that are opened, or in each site's vector."""

LEAST_EPSILON, LEAST_SAMPLE_RATE = 0.01, 1e-5
"""Below, noise is all that is left, and accounting takes long, at every site, for settings that a submitter chooses."""

LEAST_SITES = 100
"""Of a job whose unit is a site: with fewer the noise is larger than what is learnt."""

_SPARE = 1e-3
"""The share of delta that pays for the sampler's distance from the exact law."""

_MOST_ROUNDING = 8
"""Rounding adds at most an eighth to the sensitivity; where there is room, 1/128."""


class PrivacySettings(Protocol):
    """What a job sets: [privacy]."""

    @property
    def epsilon(self) -> float | None: ...
    @property
    def delta(self) -> float: ...
    @property
    def clip(self) -> float: ...
    @property
    def unit(self) -> str: ...
    @property
    def colluders(self) -> int: ...
    @property
    def noise(self) -> str: ...
    @property
    def sample_rate(self) -> float: ...
    @property
    def metric_share(self) -> float: ...


@dataclass(frozen=True)
class PrivacyPlan:
    """epsilon, delta: what all rounds of the job cost a unit, adjacency: add or remove one. clip: C, the largest L2
    norm of a unit's gradient, or of a site's update where the unit is a site. unit: one of UNITS. colluders: c.
    noise_multiplier: z, calibrated for the rounds. metric_share: of the budget, in terms of 1 / z^2, for the sums of
    metrics, which are released metric_releases times with noise of metric_multiplier; 0: never. noise: one of NOISE.
    sample_rate: q, the probability with which a unit is in a round, of which only its site knows.

    Raises BadInput for values outside their ranges.
    """

    epsilon: float
    delta: float
    clip: float
    unit: str
    colluders: int
    noise_multiplier: float
    noise: str = IN_SUM
    sample_rate: float = 1.0
    metric_share: float = 0.0
    metric_multiplier: float = 0.0
    metric_releases: int = 0

    def __post_init__(self) -> None:
        for name, holds, expected in (
            ("epsilon", LEAST_EPSILON <= self.epsilon <= 100, f"{LEAST_EPSILON:g} to 100"),
            ("delta", 0 < self.delta < 1, "between 0 and 1"),
            ("clip", 0 < self.clip < math.inf, "above 0"),
            ("colluders", self.colluders >= 0, "0 or more"),
            ("noise_multiplier", 0 < self.noise_multiplier < math.inf, "above 0"),
            (
                "metric_share",
                self.metric_share == 0 or (0 < self.metric_share <= 0.9 and self.unit == RECORD),
                "0 to 0.9, and 0 with another unit than 'record': how many test rows a person or a site has is not "
                "bounded",
            ),
            ("unit", self.unit in UNITS, " or ".join(UNITS)),
            ("noise", self.noise in NOISE, " or ".join(NOISE)),
            (
                "sample_rate",
                LEAST_SAMPLE_RATE <= self.sample_rate <= 1
                and (self.unit != SITE or self.sample_rate == 1),
                f"{LEAST_SAMPLE_RATE:g} to 1, and 1 with the unit 'site': that a site takes part is seen",
            ),
        ):
            if not holds:
                found = getattr(self, name)
                raise BadInput(f"privacy.{name}: found {found!r}, expected {expected}")

    @classmethod
    def asked(cls, job: PrivacySettings) -> PrivacyPlan:
        """What a job asks for, with a noise multiplier of 1 until it is `calibrated`. Raises BadInput."""
        assert job.epsilon is not None
        rest = (job.delta, job.clip, job.unit, job.colluders)
        return cls(job.epsilon, *rest, 1.0, job.noise, job.sample_rate, job.metric_share)

    def calibrated(self, rounds: int, *, judged: bool = False) -> PrivacyPlan:
        """With the smallest noise for which so many rounds, and the metrics, cost at most epsilon. judged: whether the
        metrics ride in every round, and are not released once at the end only."""
        budget = self.epsilon, self.accounted_delta
        if not self.metric_share:
            z = accounting.noise_multiplier(*budget, rounds, self.sample_rate)
            return replace(self, noise_multiplier=z)
        releases = rounds + 1 if judged else 1
        of_all = accounting.noise_multiplier(*budget, 1)
        # A little more noise than the share would need, in steps that are the same on every machine.
        z = math.ceil(of_all * math.sqrt(releases / self.metric_share) * 1e4) / 1e4
        besides = ((Round(z), releases),)
        of_rounds = accounting.noise_multiplier(*budget, rounds, self.sample_rate, besides)
        return replace(
            self, noise_multiplier=of_rounds, metric_multiplier=z, metric_releases=releases
        )

    @property
    def accounted_delta(self) -> float:
        """The delta that the rounds are accounted at: without what the sampler's distance costs."""
        return self.delta * (1 - _SPARE)

    def rounds(self, count: int, measured: int | None = None) -> Mapping[Round, int]:
        """So many rounds and releases of metrics, by default those of the whole job, as the accounting counts them."""
        measured = self.metric_releases if measured is None else measured
        found = Counter({Round(self.noise_multiplier, self.sample_rate): count})
        if measured:
            found[Round(self.metric_multiplier)] += measured
        return found

    def of_vector(self, *, trains: bool) -> tuple[int, int]:
        """(rounds, releases of metrics) that a vector is."""
        return (1, int(self.metric_releases > 1)) if trains else (0, 1)

    def measures(self, *, trains: bool) -> bool:
        """Whether such a vector has sums of metrics in it."""
        return self.metric_releases > 0 and self.of_vector(trains=trains)[1] > 0

    def spent(self, rounds: int) -> float:
        """Epsilon of so many rounds, and of all metrics, at the plan's delta."""
        return accounting.epsilon_of_rounds(self.rounds(rounds), self.accounted_delta)

    def shares(self, threshold: int) -> int:
        """How many shares together are the noise of the accounting, of `threshold` or more in a sum."""
        return threshold - self.colluders if self.noise == IN_SUM else 1

    def scale(self, lr: float, max_examples: int) -> float:
        """What a site's clipped sum is multiplied by: the mean over the sites is then the step. Every number in it is
        public. A site's update, where the unit is a site, is the step as it is."""
        return 1.0 if self.unit == SITE else lr / (self.sample_rate * max_examples)

    def most_units(self, max_examples: int) -> int:
        """How many units one site's sum has at most."""
        return 1 if self.unit == SITE else max_examples

    def check(
        self, *, rounds: int, values: int, threshold: int, sites: int, max_examples: int
    ) -> None:
        """Raise PlanRefused where the noise does not pay for the rounds, or no honest share is left.

        values: integers of noise in one round's sum; threshold: t; sites: that may take part.
        """
        units = sites * self.most_units(max_examples)
        if self.unit == SITE and sites < LEAST_SITES:
            raise _too_few_sites(self, sites)
        if self.delta * units >= 1:
            raise PlanRefused(
                f"privacy.delta: found {self.delta:g} for up to {units} units, expected less than 1 / {units} = "
                f"{1 / units:.2g}",
                remedy="a mechanism that shows one unit in full satisfies a larger delta",
            )
        if self.shares(threshold) < 1:
            raise PlanRefused(
                f"privacy.colluders: found {self.colluders} with a threshold of {threshold}, expected at most "
                f"{threshold - 1}",
                remedy="the noise of colluding sites does not count: a sum needs a share of an honest one; "
                'noise = "site" needs none of another site',
            )
        far = (1 + math.exp(self.epsilon)) * noise.DISTANCE * rounds * values
        if far > _SPARE * self.delta:
            raise PlanRefused(
                f"privacy.epsilon: found {self.epsilon:g} at delta {self.delta:g}, expected at most "
                f"{math.log(_SPARE * self.delta / (noise.DISTANCE * rounds * values)):.0f}",
                remedy="beyond, the distance of sampled noise from its exact law, 2^-79, would count; such an epsilon "
                "bounds nothing that anyone can use",
            )
        if self.spent(rounds) > self.epsilon:
            raise PlanRefused(
                f"privacy: found noise multiplier {self.noise_multiplier:g}, which costs epsilon "
                f"{self.spent(rounds):.4g} over {rounds} rounds, expected at most {self.epsilon:g}",
                remedy="leave it to the job's epsilon: `fedcore plan` calibrates it",
            )


def _too_few_sites(privacy: PrivacyPlan, sites: int) -> PlanRefused:
    """The noise of one coordinate of the mean over the sites, beside what a coordinate has."""
    z = privacy.noise_multiplier
    return PlanRefused(
        f"privacy.unit: found 'site' for {sites} sites, expected {LEAST_SITES} sites or more: with noise multiplier "
        f"{z:.3g} each coordinate of the mean of {sites} has noise of {z / sites:.2g} times the clip norm in every "
        f"round, while one of 1000 equal coordinates of an update is {1000**-0.5:.2g} of it",
        remedy='unit = "record", or "column" for all rows of one person',
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
    privacy: PrivacyPlan, *, coordinates: int, threshold: int, units: int, bits: int
) -> NoiseGrid:
    """The finest useful grid on which the sum of all units of a site and its share of the noise always fit.

    coordinates: d; threshold: t; units: the most at one site; bits: b of a field. Proved: units * C + 1 + reach is at
    most 2^(b-1) - 1, so no field overflows; sigma is 4 to 2^16; rounding adds at most an eighth to the sensitivity.
    Raises PlanRefused with the bits that fit.
    """
    shares = privacy.shares(threshold)
    found = _grid(privacy, coordinates, shares, units, bits)
    if found is not None:
        return found
    fits = [b for b in range(bits + 1, 25) if _grid(privacy, coordinates, shares, units, b)]
    raise PlanRefused(
        f"protect.bits: found {bits}, too few for {units} units of one site, noise multiplier "
        f"{privacy.noise_multiplier:g} and the rounding of {coordinates} coordinates under privacy",
        remedy=f"protect.bits = {fits[0]} has room for them"
        if fits
        else "a smaller protect.max_examples, a smaller model, or a larger epsilon",
    )


def _grid(
    privacy: PrivacyPlan, coordinates: int, shares: int, units: int, bits: int
) -> NoiseGrid | None:
    levels, rounding = (1 << (bits - 1)) - 1, math.sqrt(coordinates)
    per_unit = privacy.noise_multiplier / math.sqrt(shares)

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
