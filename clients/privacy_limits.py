"""What a site's operator allows to be spent of the privacy of its rows, and what was spent.

Invariant: what a round's noise pays for is in the ledger, on disk, before the round's vector is trained. A spend is
that of a vector that may be opened: a crash, or a round that is abandoned, leaves one that was not, never a vector
without a spend. Rounds of all jobs over the same rows are accounted together (`secagg/privacy/accounting.py`): those
over all units are one Gaussian mechanism, whose squared sensitivity over noise (`mu2`) is the sum of theirs.
"""

from __future__ import annotations

import math
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

from fedcore_clients.resources import MachineSection
from pydantic import Field

from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.privacy.accounting import epsilon_of_rounds
from fedcore.secagg.privacy.privacy_plan import PrivacyPlan
from fedcore.secagg.privacy.sampled import Round
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
    1 / noise multiplier^2; unit: whose data it is about; at: seconds since 1970; sample_rate: the probability with
    which a unit was in it, 1 in lines of an earlier version."""

    header: str
    rows: str
    job: str
    training_round: int
    mu2: float
    unit: str
    at: float
    sample_rate: float = 1.0

    @classmethod
    def of(cls, header: RoundHeader, rows: str, privacy: PrivacyPlan, *, trains: bool) -> Spend:
        """The spend of a vector, now. trains: whether it is a step; else it is of metrics alone."""
        kinds = privacy.rounds(*privacy.of_vector(trains=trains)).items()
        # One kind of round, or several over all units, which are one of the sum.
        mu2 = math.fsum(count / kind.noise_multiplier**2 for kind, count in kinds if count)
        return cls(
            header.digest.hex(), rows, header.job, header.training_round, mu2, privacy.unit,
            time.time(), privacy.sample_rate if trains else 1.0,
        )  # fmt: skip

    def to_json(self) -> Json:
        return asdict(self)


def total_epsilon(
    spends: Iterable[Spend], delta: float, besides: Mapping[Round, int] | None = None
) -> float:
    """Epsilon of all spends together, and of further rounds `besides`."""
    strength: defaultdict[float, list[float]] = defaultdict(list)
    for each in spends:
        strength[each.sample_rate].append(each.mu2)
    rounds: Counter[Round] = Counter(besides or {})
    # Of rounds over all units only the sum counts; one round of all of them is as exact and needs no list.
    if whole := strength.pop(1.0, []):
        rounds[Round(math.fsum(whole) ** -0.5)] += 1
    for rate, all_mu2 in strength.items():
        for mu2, count in Counter(all_mu2).items():
            rounds[Round(mu2**-0.5, rate)] += count
    return epsilon_of_rounds(rounds, delta)


def spends_json(spends: Sequence[Spend], limits: PrivacyLimits) -> Json:
    """The output of `fed-site privacy --json`."""
    rows = dict.fromkeys(each.rows for each in spends)
    delta, most = limits.lifetime_delta, limits.lifetime_epsilon
    totals = {each: total_epsilon([s for s in spends if s.rows == each], delta) for each in rows}
    return {
        "epsilon": totals, "delta": delta, "lifetime_epsilon": most, "most_epsilon": limits.most_epsilon,
        "left": None if most is None else {each: max(0.0, most - total) for each, total in totals.items()},
        "spends": [each.to_json() for each in spends],
    }  # fmt: skip


def spend_lines(spends: Sequence[Spend], limits: PrivacyLimits) -> Iterator[str]:
    """What was spent of each set of rows, in words."""
    found, delta = spends_json(spends, limits), limits.lifetime_delta
    if not spends:
        yield "no job with privacy had a vector of this site's rows"
    for rows, total in found["epsilon"].items():
        here = [each for each in spends if each.rows == rows]
        left = found["left"] and f", {found['left'][rows]:.4g} left of {limits.lifetime_epsilon:g}"
        yield f"rows {rows[:16]}: epsilon {total:.4g} at delta {delta:g}{left or ''}"
        for job in dict.fromkeys(each.job for each in here):
            mine = [each for each in here if each.job == job]
            last = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(max(m.at for m in mine)))
            sampled = (
                ""
                if mine[0].sample_rate == 1
                else f", each over a secret sample of {mine[0].sample_rate:g}"
            )
            yield (
                f"  job {job}: {len(mine)} vectors, epsilon {total_epsilon(mine, delta):.4g} alone, unit "
                f"{mine[0].unit}, noise multiplier {mine[0].mu2 ** -0.5:.4g}{sampled}, the last at {last}"
            )
    for key in ("most_epsilon", "lifetime_epsilon"):
        most, of = (
            getattr(limits, key),
            "one job" if key == "most_epsilon" else "all jobs over the same rows",
        )
        yield f"{key}: {'none, no limit' if most is None else f'{most:g}'} for {of}"
