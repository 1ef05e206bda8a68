"""What the vectors of a round are for: the one place that knows purposes by name, in the order of a job.

A job's rounds are those of its purposes, one purpose after the other (`protocol/schedule.py`). Another
purpose is one entry of PURPOSES. The protocol machines use this module, so nothing here trains, reads or
writes: a purpose asks the site for what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fedcore.errors import UnknownName
from fedcore.learning.data.statistics import statistics_vector
from fedcore.learning.released import OpenedSum, applied, calibrated, measured, standardised
from fedcore.secagg.algorithms import algorithm_of
from fedcore.secagg.judge_plan import is_judged
from fedcore.secagg.plan import RoundPlan, VectorSpec
from fedcore.secagg.privacy.privacy_plan import IN_SUM, SITE, PrivacyPlan

if TYPE_CHECKING:
    from fedcore.config import Job
    from fedcore.learning.site import SiteTrainer
    from fedcore.learning.state import JobState
    from fedcore.secagg.label import Terms
    from fedcore.secagg.protocol.schedule import PlannedRound
    from fedcore.types import Contribution


@dataclass(frozen=True)
class Purpose:
    """One kind of vector.

    rounds: its training rounds in a job whose task standardises so many columns, ascending; empty where the
    job has none. vector: what its vectors hold, for as many columns. contribute: a site's vector for a step
    from a state. apply: the state that a sum leads to; raises ImpossibleSum, and Refused.
    leaving: what leaves a site, for its operator; "" where a job on these terms has none.

    trains: whether its rounds are the job's rounds of training. measures: whether its vectors carry metric
    sums of the model they start from, which a guard judges first. needed: whether nothing can follow
    without it, so that it is tried until it is released. of_columns: whether its sums are of single columns,
    which a ledger names, and which the same rows enter with the same sites only.
    """

    name: str
    rounds: Callable[[RoundPlan, int], Sequence[int]]
    vector: Callable[[RoundPlan, int], VectorSpec]
    contribute: Callable[[SiteTrainer, RoundPlan, PlannedRound, JobState], Contribution]
    apply: Callable[[RoundPlan, JobState, OpenedSum], JobState]
    leaving: Callable[[Job, Terms], str]
    trains: bool = False
    measures: bool = False
    needed: bool = False
    of_columns: bool = False


_TEST = "the sums of this site's metrics on its test rows"
_ZEROS = "and zeros in the place of counts and metrics"


_METRIC_NOISE = ", with a share of the noise in them"


def _beside(job: Job) -> str:
    """What is beside a clipped sum with noise."""
    if not (job.privacy.metric_share and is_judged(job.round)):
        return _ZEROS
    return f"{_TEST}{_METRIC_NOISE}, and zeros in the place of counts"


def _times(rounds: int) -> str:
    return "one sum" if rounds == 1 else f"up to {rounds} sums, one a round"


def _but_for(job: Job) -> str:
    """Which parameters a job leaves out of its updates, in words."""
    names = [*job.train.local_parameters, *job.train.frozen_parameters]
    return f" but for {', '.join(names)}" if names else ""


def _with_noise(privacy: PrivacyPlan) -> str:
    """What a vector holds of a site under privacy."""
    of_rows = "the sum of the clipped gradients of this site's training rows"
    if privacy.sample_rate < 1:
        of_rows += f", each taken with probability {privacy.sample_rate:g}"
    what = "the clipped update of this site's training" if privacy.unit == SITE else of_rows
    noise = (
        "this site's share of the noise"
        if privacy.noise == IN_SUM
        else "noise that is enough alone"
    )
    return f"{what}, with {noise} in it"


def _second_block(job: Job) -> str:
    found = algorithm_of(job.train.algorithm).second_block
    return f"{found}, " if found else ""


PURPOSES = {
    each.name: each
    for each in (
        Purpose(
            "statistics",
            rounds=lambda plan, columns: range(1 if columns else 0),
            vector=lambda plan, columns: statistics_vector(columns, plan.max_examples),
            contribute=lambda site, plan, step, state: site.statistics(),
            apply=standardised,
            leaving=lambda job, terms: (
                "statistics (one sum): for each column of the task the count, sum and sum of squares of "
                "this site's training rows, and of how many sites they are"
                if terms.statistics == "federated"
                else ""
            ),
            needed=True,
            of_columns=True,
        ),
        Purpose(
            "range",
            rounds=lambda plan, columns: range(1 if plan.range.start is None else 0),
            vector=lambda plan, columns: plan.range_vector,
            contribute=lambda site, plan, step, state: site.exceeding(plan, state),
            apply=calibrated,
            leaving=lambda job, terms: (
                "range (one sum): how many coordinates of this site's first update exceed each of 24 "
                "powers of two"
                if job.protect.range is None and terms.privacy is None
                else ""
            ),
            needed=True,
        ),
        Purpose(
            "update",
            rounds=lambda plan, columns: range(1, plan.rounds + 1),
            vector=lambda plan, columns: plan.update_vector,
            contribute=lambda site, plan, step, state: site.update(plan, step, state),
            apply=applied,
            leaving=lambda job, terms: (
                f"update ({_times(job.round.rounds)}): {_with_noise(terms.privacy)}, {_beside(job)}"
                if terms.privacy is not None
                else f"update ({_times(job.round.rounds)}): how training here changed the parameters of the "
                f"model{_but_for(job)}, {_second_block(job)}the number of training rows, how many coordinates exceed "
                f"the range, and {_TEST}"
            ),
            trains=True,
            measures=True,
        ),
        Purpose(
            "metrics",
            rounds=lambda plan, columns: range(
                plan.rounds + 1,
                plan.rounds + (2 if plan.privacy is None or plan.privacy.metric_share else 1),
            ),
            vector=lambda plan, columns: plan.metrics_vector,
            contribute=lambda site, plan, step, state: site.metrics(plan, step, state),
            apply=measured,
            leaving=lambda job, terms: (
                f"metrics (one sum, after the last round): {_TEST}{_METRIC_NOISE if terms.privacy else ''}"
                if terms.privacy is None or terms.privacy.metric_share
                else ""
            ),
            measures=True,
        ),
    )
}
"""{name: purpose}, in the order in which a job comes to them."""


def purpose_of(name: str) -> Purpose:
    """By its name. Raises UnknownName."""
    if name not in PURPOSES:
        raise UnknownName("purpose", name, PURPOSES)
    return PURPOSES[name]


def trains(name: str) -> bool:
    """`Purpose.trains`; False for a name that only another version knows."""
    return name in PURPOSES and PURPOSES[name].trains


def measures(name: str) -> bool:
    """`Purpose.measures`; False for a name that only another version knows."""
    return name in PURPOSES and PURPOSES[name].measures


def of_columns(name: str) -> bool:
    """`Purpose.of_columns`; False for a name that only another version knows."""
    return name in PURPOSES and PURPOSES[name].of_columns


def leaving(job: Job, terms: Terms) -> list[str]:
    """One line for each purpose that a job on these terms has."""
    return [said for each in PURPOSES.values() if (said := each.leaving(job, terms))]
