"""Public metrics: what sites report of a release, and the row that is kept once enough report the same."""

from __future__ import annotations

from fedcore.errors import PeerRefused
from fedcore.secagg.protocol import public_metrics
from fedcore.secagg.protocol.effects import Warn
from fedcore.secagg.protocol.job.coordinator.facts import JobFacts, Moment
from fedcore.secagg.protocol.job.effects import CoordinatorJobEffect, KeepMetrics
from fedcore.secagg.protocol.job_messages import PublicMetrics
from fedcore.types import Json, SiteId


class Metrics:
    """What sites reported of the releases of one job since this process started."""

    def __init__(self, facts: JobFacts) -> None:
        self._facts = facts
        self._hearing: public_metrics.Hearing | None = None

    def planned(self) -> None:
        """There is a plan: from now on records are judged by it."""
        assert self._facts.plan is not None
        self._hearing = public_metrics.Hearing(self._facts.plan, self._facts.id)

    def restored(self) -> None:
        """The disk was read, at first or again: what was reported since this process started still counts."""
        if self._hearing is None:
            self.planned()
        self.released()

    def released(self) -> None:
        """From now on sites may report the metrics of the last release."""
        certificate = self._facts.certificate
        if certificate is None or self._hearing is None:
            return
        number = certificate.header.round
        known = any(row["number"] == number for row in self._facts.metrics.known)
        self._hearing.released(certificate, believed=known)

    def take(self, site: SiteId, message: PublicMetrics) -> list[CoordinatorJobEffect]:
        """A site's report on a release; the report that makes it enough gives the values a row.

        Raises PeerRefused before there is a plan, and as `publicmetrics.Hearing.take` does.
        """
        if self._hearing is None:
            raise PeerRefused(f"public metrics: found some of {site} before there is a plan")
        found, warning = self._hearing.take(site, message)
        effects: list[CoordinatorJobEffect] = [Warn(warning)] if warning else []
        if found is not None:
            # The sums that ride in a round are of the model that it starts from.
            row: Json = {
                "round": found.header.training_round - 1, "number": found.header.round,
                "sites": found.sites, "metrics": found.values,
            }  # fmt: skip
            effects.append(KeepMetrics(row))
        return effects

    def may_come(self, at: Moment) -> bool:
        """Whether a connected site may still report the metrics of the last release."""
        certificate = self._facts.certificate
        if certificate is None or self._hearing is None:
            return False
        return bool(self._hearing.awaited(certificate, self._facts.able(at)))
