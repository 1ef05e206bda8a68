"""Metrics that a plan makes public: when a coordinator believes what sites report, and the row it keeps then.

A site reports them once it applied a certified release, of the sums over all sites that this release opened: every
site of it reports the same bytes. Invariant (PROTOCOL R): a value is believed only once as many survivors of the
release as its threshold report exactly the same. The threshold is more than half of the cohort, so no two values
can be believed, and one that nobody but liars reports never is while they are fewer than the threshold.

Nothing of a single site is in it.
"""

from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from fedcore import errors
from fedcore.results import MetricsRow
from fedcore.secagg.plan import RoundHeader, RoundPlan
from fedcore.secagg.protocol.effects import Warn
from fedcore.secagg.protocol.job.coordinator.facts import JobFacts, Moment
from fedcore.secagg.protocol.job.effects import JobEffects, KeepMetrics
from fedcore.secagg.protocol.job_messages import PublicMetric, PublicMetrics, values_of
from fedcore.secagg.protocol.messages import Certificate
from fedcore.secagg.purposes import measures
from fedcore.types import SiteId

KEPT = 64
"""Releases that are waited for at a time: a site's record may come some rounds later than its release."""


@dataclass
class _Release:
    header: RoundHeader
    survivors: tuple[SiteId, ...]
    said: dict[SiteId, tuple[PublicMetric, ...]] = field(default_factory=dict)
    believed: bool = False

    @property
    def counts(self) -> Counter[tuple[PublicMetric, ...]]:
        return Counter(self.said.values())


class Hearing:
    """A coordinator's side of one job: who said what of which release, since this process began."""

    def __init__(self, plan: RoundPlan, job: str) -> None:
        self._plan, self._job = plan, job
        self._releases: dict[str, _Release] = {}

    def released(self, certificate: Certificate, *, believed: bool = False) -> None:
        """A round ended with this certificate: from now on a site may speak of it.

        believed: its values are known from before this process began.
        """
        header = certificate.header
        if self._plan.public_metrics and measures(header.purpose):
            found = _Release(header, certificate.survivors, believed=believed)
            self._releases.setdefault(certificate.hash, found)
        while len(self._releases) > KEPT:
            del self._releases[next(iter(self._releases))]

    def take(self, site: SiteId, message: PublicMetrics) -> tuple[MetricsRow | None, str]:
        """(the row, if this word is the one that makes its values believed; a warning where sites differ).

        Raises ProtocolRefused (fault: site) for what no honest site says, and OutOfOrder for a release
        that is too long ago.
        """
        release = self._release(site, message)
        values = values_of(self._plan, message, site)
        before = release.said.get(site)
        if before is not None and before != message.values:
            raise errors.Conflicting("public metrics", "other values than before", "the same", site)
        if before is not None:
            return None, ""  # said again after a new session
        release.said[site] = message.values
        enough = release.counts[message.values] >= release.header.threshold
        fresh, release.believed = enough and not release.believed, enough or release.believed
        if not fresh:
            return None, _warning(release)
        # The sums that ride in a round are of the model that it starts from.
        row = MetricsRow(
            round=release.header.training_round - 1, number=release.header.round,
            sites=len(release.survivors), metrics=values,
        )  # fmt: skip
        return row, _warning(release)

    def _release(self, site: SiteId, message: PublicMetrics) -> _Release:
        if not self._plan.public_metrics:
            raise errors.HeaderRefused(
                "public metrics", "them said", "nothing: the plan keeps them at the sites", site
            )
        if (message.job, message.site) != (self._job, site):
            raise errors.HeaderRefused(
                "public metrics", "those of another job or site", "the sender's own word", site
            )
        release = self._releases.get(message.certificate)
        if release is None or release.header.round != message.round:
            known = [each.header.round for each in self._releases.values()]
            if release is None and message.round < min(known, default=0):
                raise errors.OutOfOrder(
                    "public metrics", f"those of round {message.round}",
                    f"of round {min(known)} or later", site,
                )  # fmt: skip
            raise errors.HeaderRefused(
                "public metrics", "a release that is not certified here", "one with a certificate",
                site,
            )  # fmt: skip
        if site not in release.survivors:
            raise errors.ListRefused(
                "public metrics", "a site that is not in the sum", "one of its survivors", site
            )
        return release

    def awaited(self, certificate: Certificate, here: Collection[SiteId]) -> Sequence[SiteId]:
        """Connected survivors whose word may still make this release's values believed."""
        release = self._releases.get(certificate.hash)
        if release is None or release.believed:
            return ()
        silent = [name for name in release.survivors if name in here and name not in release.said]
        most = max(release.counts.values(), default=0)
        return silent if most + len(silent) >= release.header.threshold else ()


def differing(said: Mapping[SiteId, Hashable]) -> str:
    """Who says what: `a, b - d`, the largest group first, or "" where nobody differs."""
    counts = Counter(said.values())
    if len(counts) < 2:
        return ""
    return " - ".join(
        ", ".join(name for name, word in said.items() if word == each)
        for each, _ in counts.most_common()
    )


def _warning(release: _Release) -> str:
    groups = differing(release.said)
    if not groups:
        return ""
    return (
        f"public metrics of round {release.header.round}: sites differ ({groups}); values are shown once "
        f"{release.header.threshold} say the same"
    )


class Metrics:
    """Reports on the releases of one job since this process started."""

    def __init__(self, facts: JobFacts) -> None:
        self._facts = facts
        self._hearing: Hearing | None = None

    def released(self) -> None:
        """There is a plan or a new release, or the disk was read: sites may report the last release's metrics.

        What was reported since this process started still counts.
        """
        certificate, plan = self._facts.certificate, self._facts.plan
        if plan is None:
            self._hearing = None  # the disk refused the plan: another one may follow
        elif self._hearing is None:
            self._hearing = Hearing(plan, self._facts.id)
        if certificate is None or self._hearing is None:
            return
        number = certificate.header.round
        known = any(row.number == number for row in self._facts.metrics.known)
        self._hearing.released(certificate, believed=known)

    def take(self, site: SiteId, message: PublicMetrics) -> JobEffects:
        """Take a site's report on a release; the values get a row once enough reports agree.

        Raises PeerRefused before there is a plan, and as `Hearing.take` does.
        """
        if self._hearing is None:
            raise errors.PeerRefused(f"public metrics: found some of {site} before there is a plan")
        row, warning = self._hearing.take(site, message)
        found: JobEffects = [Warn(warning)] if warning else []
        return [*found, KeepMetrics(row)] if row is not None else found

    def may_come(self, at: Moment) -> bool:
        """Whether a connected site may still report the metrics of the last release."""
        certificate = self._facts.certificate
        if certificate is None or self._hearing is None:
            return False
        return bool(self._hearing.awaited(certificate, self._facts.able(at)))
