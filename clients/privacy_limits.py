"""What a site's operator allows to be spent of the privacy of its rows, and what was spent.

Invariant: what a round's noise pays for is in the ledger, on disk, before the round's vector is trained. A spend is
that of a vector that may be opened: a crash, or a round that is abandoned, leaves one that was not, never a vector
without a spend. Rounds of all jobs over the same rows are one Gaussian mechanism, whose squared sensitivity over noise
(`mu2`) is the sum of theirs (`secagg/privacy/accounting.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

from fedcore_clients.resources import MachineSection
from pydantic import Field

from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.privacy.accounting import epsilon_of
from fedcore.secagg.privacy.privacy_plan import PrivacyPlan
from fedcore.types import Json


class PrivacyLimits(MachineSection):
    """Keys of the policy. most_epsilon: of one job. lifetime_epsilon: of all jobs over the same rows together, at
    lifetime_delta; its jobs have one unit. With either, a job without privacy is refused; None: any job."""

    most_epsilon: float | None = Field(default=None, gt=0)
    lifetime_epsilon: float | None = Field(default=None, gt=0)
    lifetime_delta: float = Field(default=1e-5, gt=0, lt=1)


@dataclass(frozen=True)
class Spend:
    """What one vector cost. header: digest of its round's header, hex; rows: the ledger's digest of the rows; mu2:
    1 / noise multiplier^2; unit: whose data it is about; at: seconds since 1970."""

    header: str
    rows: str
    job: str
    training_round: int
    mu2: float
    unit: str
    at: float

    @classmethod
    def of(cls, header: RoundHeader, rows: str, privacy: PrivacyPlan) -> Spend:
        """The spend of a vector, now."""
        return cls(
            header.digest.hex(), rows, header.job, header.training_round, cost_of(privacy), privacy.unit, time.time()
        )  # fmt: skip

    def to_json(self) -> Json:
        return asdict(self)


def cost_of(privacy: PrivacyPlan, rounds: int = 1) -> float:
    """mu2 of so many rounds."""
    return rounds / privacy.noise_multiplier**2


def total_epsilon(spends: Iterable[Spend], delta: float, besides: float = 0.0) -> float:
    """Epsilon of all spends together, and of `besides`, a further mu2."""
    return epsilon_of(math.sqrt(math.fsum(each.mu2 for each in spends) + besides), delta)


def spend_lines(spends: Sequence[Spend], limits: PrivacyLimits) -> Iterator[str]:
    """What was spent of each set of rows, in words."""
    if not spends:
        yield "no job with privacy had a vector of this site's rows"
    for rows in dict.fromkeys(each.rows for each in spends):
        here = [each for each in spends if each.rows == rows]
        total, most = total_epsilon(here, limits.lifetime_delta), limits.lifetime_epsilon
        of = "" if most is None else f" of {most:g}"
        yield f"rows {rows[:16]}: epsilon {total:.4g}{of} at delta {limits.lifetime_delta:g}"
        for job in dict.fromkeys(each.job for each in here):
            mine = [each for each in here if each.job == job]
            yield (
                f"  job {job}: {len(mine)} vectors, epsilon {total_epsilon(mine, limits.lifetime_delta):.4g} alone, "
                f"unit {mine[0].unit}"
            )
