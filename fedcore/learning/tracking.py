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

from fedcore.learning.scoring import Scored
from fedcore.learning.site import SiteTrainer
from fedcore.learning.state import JobState
from fedcore.learning.training import OwnModel
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
        here = transport.values([local.scored(state, rounds)])
        alone = transport.values([self._scored_alone(rounds)])
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
        local = self._local
        if self._alone is None:
            return None
        return self._alone_rows.scored(local.task, self._alone.module, local.job.run.seed, rounds)


def _difference(a: Mapping[str, float | None], b: Mapping[str, float | None]) -> Json:
    found: Json = {}
    for name, value in a.items():
        other = b[name]
        found[name] = None if value is None or other is None else value - other
    return found
