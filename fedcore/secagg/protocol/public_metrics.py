"""Metrics that a plan makes public: what a site says of a release, and when a coordinator believes it.

A site says it once it applied a certified release, of the sums over all sites that this release opened: every
site of it says the same bytes. Invariant (PROTOCOL R): a value is believed only once as many survivors of the
release as its threshold say exactly the same. The threshold is more than half of the cohort, so no two values
can be believed, and one that nobody but liars says never is while they are fewer than the threshold.

Nothing of a single site is in it. Sending, storing and showing are left to the shells.
"""

import math
import struct
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from fedcore import errors
from fedcore.secagg.plan import RoundHeader, RoundPlan
from fedcore.secagg.protocol.job_messages import PublicMetric, PublicMetrics
from fedcore.secagg.protocol.messages import THIS_SITE, Certificate
from fedcore.secagg.purposes import measures
from fedcore.types import SiteId

KEPT = 64
"""Releases that are waited for at a time: a site's record may come some rounds later than its release."""

_FLOAT = struct.Struct(">d")

Values = Mapping[str, float | None]


def told(plan: RoundPlan, certificate: Certificate, site: SiteId, values: Values) -> PublicMetrics:
    """What a site says of a release that it applied.

    values: of the release's sums, by the names of the plan. Raises PlanRefused under a plan that does not
    make them public, and MalformedMessage (fault: this site) for other names or a value that is not finite.
    """
    if not plan.public_metrics:
        raise errors.PlanRefused(
            "public metrics: found a plan that keeps them at the sites, expected one that does not"
        )
    header = certificate.header
    packed = tuple(PublicMetric(name, _packed(value)) for name, value in values.items())
    message = PublicMetrics(header.job, site, header.round, certificate.hash, packed)
    values_of(plan, message, THIS_SITE)
    return message


def _packed(value: float | None) -> bytes | None:
    return None if value is None else _FLOAT.pack(value)


def values_of(plan: RoundPlan, message: PublicMetrics, fault: str) -> dict[str, float | None]:
    """The values of a record, by name. Raises MalformedMessage (fault: `fault`)."""
    if tuple(each.name for each in message.values) != plan.metrics:
        raise errors.MalformedMessage(
            "public metrics", "other names", "those of the plan, in its order", fault
        )
    found: dict[str, float | None] = {}
    for each in message.values:
        if each.value is not None and len(each.value) != _FLOAT.size:
            size = f"{len(each.value)} bytes"
            raise errors.MalformedMessage("public metric", size, "8 or none", fault)
        value = None if each.value is None else float(_FLOAT.unpack(each.value)[0])
        if value is not None and not math.isfinite(value):
            raise errors.MalformedMessage(
                "public metric", "one that is not finite", "a number", fault
            )
        found[each.name] = value
    return found


@dataclass(frozen=True)
class Believed:
    """Values that enough survivors of a release say. sites: how many are in its sum."""

    header: RoundHeader
    sites: int
    values: dict[str, float | None]


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

    def take(self, site: SiteId, message: PublicMetrics) -> tuple[Believed | None, str]:
        """(values, if this word is the one that makes them believed; a warning where sites differ).

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
        found = Believed(release.header, len(release.survivors), values) if fresh else None
        return found, _warning(release)

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
