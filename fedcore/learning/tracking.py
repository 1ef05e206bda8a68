"""Accuracy where pooling is impossible: a deployed site's record of each round.

Three numbers per metric: of the released model on this site's own test rows; of a model that the site
trains alone, as the arm `local_only` does (where the job has it); and over all sites' test rows, from
the sums that rode in the round's vector (of the model the round started from). The gap to a registered
reference is recorded too.

Invariant: nothing here leaves the site, with one exception that the job must ask for: where the plan makes
metrics public, `everywhere_before` is told to the coordinator (`job_messages.told`). It is of the
sums over all sites, which every site opened anyway; `here`, `alone` and `gained` are this site's own.
"""

from collections.abc import Mapping, Sequence

from fedcore.learning.app_jobs import of_arm
from fedcore.learning.private_scores import without_offset
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
            self._alone = OwnModel(local.task, local.flat, local.initial, plan.train, plan.rounds)
        self._trained = 0

    def row(
        self, step: PlannedRound, state: JobState, wides: Mapping[str, Sequence[int]], sites: int
    ) -> Json:
        """What is known after a released step.

        state: the one it led to; wides: its opened sums, of `sites` sites.
        """
        local, transport = self._local, self._local.transport
        rounds = min(step.training_round, self._plan.rounds)
        alone = transport.values([self._alone_after(rounds)])
        scored = local.scored(state, rounds)
        here = transport.values([scored])
        gained = {
            n: None if v is None or (w := alone[n]) is None else v - w for n, v in here.items()
        }
        wides = without_offset(self._plan, wides, sites)
        everywhere = transport.finish(wides, sites, local.target_scale(state))
        row: Json = {
            "round": rounds, "purpose": step.purpose, "sites": sites, "here": here,
            "alone": alone, "gained": gained, "everywhere_before": everywhere,
        }  # fmt: skip
        if (everyone := transport.summed_confusion(wides)) is not None:
            row["confusion"] = {
                "here": transport.confusion([scored]), "everywhere_before": everyone,
            }  # fmt: skip
        if "over_range" in wides:
            row["clipped_fraction"] = wides["over_range"][0] / (sites * self._plan.coordinates)
            row["next_range"] = state.server.bound
        if (reference := local.job.track.reference) is not None:
            row["reference"] = reference.against(everywhere)
        return row

    def _alone_after(self, rounds: int) -> Scored | None:
        """The model trained alone, brought to as many rounds, on the test rows; a new process starts over."""
        local, site, alone = self._local, self._alone_rows, self._alone
        if alone is None:
            return None
        seed = local.job.run.seed
        while self._trained < rounds:
            self._trained += 1
            with of_arm(local.task, "local_only"):
                alone.train(site.train, seed=seed, round_=self._trained, site=site.id)
        with of_arm(local.task, "local_only"):
            return site.scored(local.task, alone.module, seed, rounds)
