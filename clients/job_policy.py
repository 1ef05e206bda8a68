"""The policy of a site as it is for one job: by the rules in force now, over the sites of the job's own roster.

Invariant: where that roster does not pin this site's identity key, the job is refused whatever the rules allow.
"""

from collections.abc import Collection, Mapping
from copy import copy

from fedcore_clients.ledger import Ledger
from fedcore_clients.policy import SitePolicy

from fedcore.errors import PolicyRefused
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol.job.site.participation import Release, RowsInSum
from fedcore.secagg.protocol.job_messages import JobOffer
from fedcore.types import SiteId

ROSTER = "roster"
"""What the coordinator is told, of REASONS in protocol/job_messages.py."""


class JobPolicy:
    """See `participation.Policy`. sites: the job's roster; me, key: this site and its public identity key."""

    def __init__(
        self,
        policy: SitePolicy,
        ledger: Ledger,
        sites: Mapping[SiteId, bytes],
        me: SiteId,
        key: bytes,
    ) -> None:
        self._policy, self._ledger, self._sites = policy, ledger, sites
        self._refused: PolicyRefused | None = None
        self._rows = self._job = ""
        """The ledger's digest of the job's rows, and the job; empty before they were loaded."""
        if sites.get(me) != key:
            found = "another key" if me in sites else "no key"
            self._refused = PolicyRefused(
                f"roster of the job: found {found} for {me!r}, expected this site's identity key",
                word=ROSTER,
                remedy="a replaced identity key counts from the next job on; this one goes on without the site",
            )

    def _now(self) -> SitePolicy:
        """The rules may have changed since; they count the sites of the job."""
        found = copy(self._policy)
        found.sites = len(self._sites)
        return found

    def on_offer(self, offer: JobOffer) -> PolicyRefused | None:
        return self._refused or self._now().on_offer(offer)

    def on_plan(self, plan: RoundPlan) -> PolicyRefused | None:
        return self._refused or self._now().on_plan(plan) or self._on_budget(plan)

    def _on_budget(self, plan: RoundPlan) -> PolicyRefused | None:
        """Refuse a job whose rounds would spend more of its rows' privacy than the policy allows."""
        if plan.privacy is None or not self._rows:
            return None
        spent = self._ledger.spends(self._rows)
        mine = {each.training_round for each in spent if each.job == self._job}
        trained = {each for each in mine if each <= plan.rounds}
        measured = len(mine) if plan.privacy.measures(trains=True) else len(mine - trained)
        left = max(0, plan.privacy.metric_releases - measured)
        return self._policy.on_spend(plan.privacy, plan.rounds - len(trained), spent, left)

    def on_release(self, what: Release) -> PolicyRefused | None:
        if isinstance(what, RowsInSum):
            self._rows, self._job = what.rows, what.job
        refused = self._refused or self._now().on_release(what)
        if refused is None and isinstance(what, RowsInSum) and what.job not in what.before:
            refused = self._on_roster(what.before)
        return refused

    def _on_roster(self, before: Collection[str]) -> PolicyRefused | None:
        """Refuse a job whose sites are nearly those of an earlier one. before: the jobs over the same rows."""
        apart = (self._ledger.apart(job, self._sites) for job in before)
        return next(filter(None, map(self._policy.on_roster, apart)), None)
