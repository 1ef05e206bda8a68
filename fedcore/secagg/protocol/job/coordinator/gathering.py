"""The sites that a round waits for before it begins, and how long it waits for a site that left during it."""

from collections.abc import Collection

from fedcore.secagg.protocol.job.coordinator.facts import JobFacts, Moment
from fedcore.secagg.protocol.round import coordinator
from fedcore.types import SiteId


class Gathering:
    """The waits of one job for its sites."""

    def __init__(self, facts: JobFacts) -> None:
        self._facts = facts
        self._since: float | None = None
        """Clock seconds since which sites are waited for."""

    def check(self, present: Collection[SiteId], at: Moment) -> bool | str:
        """Whether to go on: all sites are there, or enough are and the timeout for more is over.

        Once the timeout for enough sites is over: why the job ends. A site that missed a timeout is not waited for
        again before it connects or reports its status. One that failed in a round is waited for as its backoff
        allows, once it reported its status: it may have to catch up. Where too many sites reported that they
        cannot take part, the job waits no longer than for one more site.
        """
        sites, limits, there = self._facts.sites, self._facts.limits, set(present)
        needed = max(limits.minimum, self._facts.threshold)
        enough = len(present) >= needed
        for name in present:
            sites[name].missed = False
        others = {name: sites[name] for name in sites if name not in there}
        following = self._facts.number + 1
        awaited = tuple(
            n for n, v in others.items()
            if not v.missed and (not v.unable or v.retries(following))
        )  # fmt: skip
        if enough and not awaited:
            return self._over(at)
        if self._since is None:
            self._since = at.now
        unable = [name for name, view in others.items() if view.unable]
        timeout = limits.enough if len(sites) - len(unable) >= needed else limits.gather
        until = self._since + (limits.gather if enough else timeout)
        if at.now < until:
            self._facts.progress.wait(awaited or tuple(others), until, at)
            return False
        self._over(at)
        if not enough:
            text = (
                f"{len(present)} sites were there after {timeout:.0f} s, too few for a round, "
                f"which needs {needed}"
            )
            if unable:
                reasons = ", ".join(f"{name} ({others[name].unable})" for name in unable)
                text += f"; cannot take part: {reasons}"
            why = self._facts.progress.text
            return f"{text}: {why}" if why else text
        for name in awaited:
            sites[name].missed = True
        return True

    def _over(self, at: Moment) -> bool:
        self._since = None
        self._facts.progress.wait((), None, at)
        return True

    def connected(self, name: SiteId) -> None:
        """A site has a new session; its status is what it reports in this one."""
        view = self._facts.sites[name]
        view.rest, view.missed, view.away_since = None, False, None

    def lost(self, at: Moment) -> list[SiteId]:
        """Sites that lost their connection longer ago than the grace, or that no round waits for: a round goes on
        without them."""
        found = []
        for name, view in self._facts.sites.items():
            if name in at.here:
                view.away_since = None
                continue
            if view.away_since is None:
                view.away_since = at.now
            if view.missed or at.now - view.away_since >= self._facts.limits.grace:
                found.append(name)
        return found

    def show(self, short_since: float | None, at: Moment) -> None:
        """During a round: show the sites that are not connected, and when the round goes on without them.

        short_since: clock seconds since which too few sites are there to release the round.
        """
        facts, stage = self._facts, self._facts.stage
        if not isinstance(stage, coordinator.Waiting):
            return
        lost = tuple(name for name in coordinator.waiting_for(stage) if name not in at.here)
        since = [facts.sites[name].away_since or at.now for name in lost]
        until = min([stage.until, *(moment + facts.limits.grace for moment in since)])
        if short_since is not None:
            until = short_since + facts.limits.enough
        facts.progress.wait(lost, until if lost else None, at)
