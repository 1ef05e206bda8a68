"""Public metrics: the reports of sites on a release, and the row that is kept once enough reports agree."""

from fedcore.errors import PeerRefused
from fedcore.results import MetricsRow
from fedcore.secagg.protocol import public_metrics
from fedcore.secagg.protocol.effects import Warn
from fedcore.secagg.protocol.job.coordinator.facts import JobFacts, Moment
from fedcore.secagg.protocol.job.effects import CoordinatorJobEffect, KeepMetrics
from fedcore.secagg.protocol.job_messages import PublicMetrics
from fedcore.types import SiteId


class Metrics:
    """Reports on the releases of one job since this process started."""

    def __init__(self, facts: JobFacts) -> None:
        self._facts = facts
        self._hearing: public_metrics.Hearing | None = None

    def released(self) -> None:
        """There is a plan or a new release, or the disk was read: sites may report the last release's metrics.

        What was reported since this process started still counts.
        """
        certificate, plan = self._facts.certificate, self._facts.plan
        if plan is None:
            self._hearing = None  # the disk refused the plan: another one may follow
        elif self._hearing is None:
            self._hearing = public_metrics.Hearing(plan, self._facts.id)
        if certificate is None or self._hearing is None:
            return
        number = certificate.header.round
        known = any(row.number == number for row in self._facts.metrics.known)
        self._hearing.released(certificate, believed=known)

    def take(self, site: SiteId, message: PublicMetrics) -> list[CoordinatorJobEffect]:
        """Take a site's report on a release; the values get a row once enough reports agree.

        Raises PeerRefused before there is a plan, and as `publicmetrics.Hearing.take` does.
        """
        if self._hearing is None:
            raise PeerRefused(f"public metrics: found some of {site} before there is a plan")
        found, warning = self._hearing.take(site, message)
        effects: list[CoordinatorJobEffect] = [Warn(warning)] if warning else []
        if found is not None:
            # The sums that ride in a round are of the model that it starts from.
            row = MetricsRow(
                round=found.header.training_round - 1, number=found.header.round,
                sites=found.sites, metrics=found.values,
            )  # fmt: skip
            effects.append(KeepMetrics(row))
        return effects

    def may_come(self, at: Moment) -> bool:
        """Whether a connected site may still report the metrics of the last release."""
        certificate = self._facts.certificate
        if certificate is None or self._hearing is None:
            return False
        return bool(self._hearing.awaited(certificate, self._facts.able(at)))
