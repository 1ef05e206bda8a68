"""Accuracy where pooling is impossible: a deployed site's record of each round.

Three numbers per metric: of the released model on this site's own test rows; of a model that the site
trains alone, as the arm `local_only` does (where the job has it); and over all sites' test rows, from
the sums that rode in the round's vector (of the model the round started from). The gap to a registered
reference is recorded too.

Invariant: nothing here leaves the site, with one exception that the job must ask for: where the plan makes
metrics public, `everywhere_before` is told to the coordinator (`protocol/public_metrics.py`). It is of the
sums over all sites, which every site opened anyway; `here`, `alone` and `gained` are this site's own.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from fedcore.learning.baseline import OwnModel
from fedcore.learning.metric_sums import MetricTransport
from fedcore.learning.metrics import Scores, evaluate_scores
from fedcore.learning.scoring import Scored, score
from fedcore.learning.site import SiteTrainer
from fedcore.learning.state import JobState
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.types import Json


class Tracker:
    """One site's record of a job, round by round."""

    def __init__(self, local: SiteTrainer, plan: RoundPlan) -> None:
        self._local, self._plan = local, plan
        self._alone_rows = local.rows_alone()
        self._alone = None
        if "local_only" in local.job.track.arms:
            self._alone = OwnModel(local.task, local.flat, local.initial, plan.train)
        self._trained = 0

    def row(
        self, step: PlannedRound, state: JobState, wides: Mapping[str, Sequence[int]], sites: int
    ) -> Json:
        """What is known after a released step.

        state: the one it led to; wides: its opened sums, of `sites` sites.
        """
        local, transport = self._local, self._local.transport
        rounds = min(step.training_round, self._plan.rounds)
        self._train_alone(rounds)
        shared = local.scored(state, rounds)
        here, alone = values_of(transport, shared), values_of(transport, self._scored_alone(rounds))
        everywhere = transport.finish(wides, sites)
        row: Json = {
            "round": rounds, "purpose": step.purpose, "sites": sites, "here": here,
            "alone": alone, "gained": _difference(here, alone),
            "everywhere_before": everywhere,
        }  # fmt: skip
        reference = local.job.track.reference
        if reference is not None:
            row["reference"] = reference.against(everywhere)
        return row

    def _train_alone(self, rounds: int) -> None:
        """Bring the model trained alone to the same number of rounds; a new process starts over."""
        site = self._alone_rows
        while self._alone is not None and self._trained < rounds:
            self._trained += 1
            self._alone.train(
                site.train, seed=self._local.job.run.seed, round_=self._trained, site=site.id
            )

    def _scored_alone(self, rounds: int) -> Scored | None:
        site = self._alone_rows
        if self._alone is None or not len(site.test):
            return None
        return score(
            self._local.task, self._alone.module, site.test, seed=self._local.job.run.seed,
            round_=rounds, site=site.id,
        )  # fmt: skip


def values_of(transport: MetricTransport, scored: Scored | None) -> dict[str, float | None]:
    """{metric: value} of one site's scored rows; None where it is undefined."""
    names = [metric.name for metric in transport.metrics] + list(transport.own)
    if scored is None:
        return dict.fromkeys(names)
    if scored.own is not None:
        pairs = ((name, scored.own[name]) for name in transport.own)
        return {name: total / count if count else None for name, (total, count) in pairs}
    rows = Scores(scored.outputs, scored.targets, np.zeros(len(scored.targets), dtype=np.int64))
    return evaluate_scores(rows, transport.metrics)


def _difference(a: Mapping[str, float | None], b: Mapping[str, float | None]) -> Json:
    found: Json = {}
    for name, value in a.items():
        other = b[name]
        found[name] = None if value is None or other is None else value - other
    return found
