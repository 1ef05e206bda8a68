"""What coordinator and sites say about a job outside its rounds: offer, survey, plan, catching up, end.

A job is WHAT to run: its settings travel as canonical JSON, never code. Every site looks up the task it
has installed itself, surveys its own rows, and makes the plan itself; it goes on only if the plan it is
sent has the same digest. Nothing here is secret, and nothing derived from a site's rows is in it but the
shape of the model, the columns' declaration and, where the plan says so, the metrics over all sites of a
release that is certified, and its model after the last round (PROTOCOL R).
"""

import hashlib
import math
import struct
from collections.abc import Mapping

from fedcore.errors import MalformedMessage, PlanRefused
from fedcore.secagg.plan import ModelShape, RoundPlan, Wide
from fedcore.secagg.protocol.epoch import CoordinatorEpochMessage, SiteEpochMessage
from fedcore.secagg.protocol.messages import THIS_SITE, Certificate, CoordinatorMessage, SiteMessage
from fedcore.secagg.protocol.wire_form import record
from fedcore.types import SiteId

record("Wide")(Wide)
record("ModelShape")(ModelShape)

UNABLE = "unable"

REASONS = {
    "policy": "the site's policy refuses the job",
    "task not allowed": "the site's operator has not allowed this task",
    "task differs": "the site has another version of the task",
    "vetoed": "the site's operator said no to this job",
    "roster": "the site has not approved the job's roster, or its key there is another one",
    UNABLE: "the site cannot take part; its own log says why",
}
"""Every reason a site may give, and what it means: nothing else about a failure leaves a site.

`unable` is the one word for whatever depends on rows, on what the task does with them, or on the state of
the site: two words there would let a coordinator ask about rows (PROTOCOL U)."""

CHOSEN = REASONS.keys() - {UNABLE}
"""What a site's operator decides, and may decide otherwise: a site that agrees to the plan again takes part again."""

OUTCOMES = ("finished", "abandoned", "stopped", "failed")


@record("JobOffer")
class JobOffer:
    """Coordinator to sites: a job begins. settings: canonical JSON of the job file's tables."""

    job: str
    task: str
    task_digest: str
    settings: bytes


@record("Survey")
class SiteSurvey:
    """A site found the task, loaded its rows and built the model: this is its shape."""

    job: str
    site: SiteId
    shape: ModelShape


@record("Unable")
class SiteUnavailable:
    """A site cannot take part, or not any more. reason: one of REASONS."""

    job: str
    site: SiteId
    reason: str


@record("PlanOffer")
class PlanOffer:
    """Coordinator to sites: the plan, as canonical JSON. A site compares it with its own."""

    job: str
    plan: bytes


@record("PlanAgreed")
class PlanAgreed:
    """A site found the same plan itself."""

    job: str
    site: SiteId
    plan_digest: str


@record("AtRest")
class SiteStatus:
    """A site is between rounds and stands here: key epoch, hash of its last certificate, last round.

    A coordinator invites only sites that stand where the job stands; others catch up first.
    """

    job: str
    site: SiteId
    epoch: int
    certificate: str
    round: int


@record("InRound")
class InRound:
    """A site with a new connection is in this round still. header: the digest of the round's header.

    A coordinator that is past that round says how it ended: the word of it was lost.
    """

    job: str
    site: SiteId
    header: bytes


@record("CheckpointWanted")
class CheckpointWanted:
    """Coordinator to a site that has the state of this certificate: seal it for those that missed it."""

    job: str
    certificate: str


@record("CheckpointSealed")
class CheckpointSealed:
    """A site uploaded the sealed state of this certificate."""

    job: str
    site: SiteId
    certificate: str
    digest: bytes
    size: int


@record("CheckpointOffer")
class CheckpointOffer:
    """Coordinator to a site that missed a release: its certificate, and the sealed state to download."""

    job: str
    certificate: Certificate
    digest: bytes
    size: int


@record("PublicMetric")
class PublicMetric:
    """One metric over all sites of a release. value: the 8 bytes of a float, or None where the sums
    leave it undefined."""

    name: str
    value: bytes | None


@record("PublicMetrics")
class PublicMetrics:
    """A site applied the release of this certificate: the metrics that its sums give, in the plan's order.

    Only under a plan that makes them public. It is the same at every site but for `site`: nothing of the
    site itself is in it.
    """

    job: str
    site: SiteId
    round: int
    certificate: str
    values: tuple[PublicMetric, ...]


_FLOAT = struct.Struct(">d")

Values = Mapping[str, float | None]


def told(plan: RoundPlan, certificate: Certificate, site: SiteId, values: Values) -> PublicMetrics:
    """What a site says of a release that it applied.

    values: of the release's sums, by the names of the plan. Raises PlanRefused under a plan that does not
    make them public, and MalformedMessage (fault: this site) for other names or a value that is not finite.
    """
    if not plan.public_metrics:
        raise PlanRefused(
            "public metrics: found a plan that keeps them at the sites, expected one that does not"
        )
    header = certificate.header
    packed = tuple(
        PublicMetric(name, None if value is None else _FLOAT.pack(value))
        for name, value in values.items()
    )
    message = PublicMetrics(header.job, site, header.round, certificate.hash, packed)
    values_of(plan, message, THIS_SITE)
    return message


def values_of(plan: RoundPlan, message: PublicMetrics, fault: str) -> dict[str, float | None]:
    """The values of a record, by name. Raises MalformedMessage (fault: `fault`)."""
    if tuple(each.name for each in message.values) != plan.metrics:
        raise MalformedMessage(
            "public metrics", "other names", "those of the plan, in its order", fault
        )
    found: dict[str, float | None] = {}
    for each in message.values:
        if each.value is not None and len(each.value) != _FLOAT.size:
            size = f"{len(each.value)} bytes"
            raise MalformedMessage("public metric", size, "8 or none", fault)
        value = None if each.value is None else float(_FLOAT.unpack(each.value)[0])
        if value is not None and not math.isfinite(value):
            raise MalformedMessage("public metric", "one that is not finite", "a number", fault)
        found[each.name] = value
    return found


@record("ModelWanted")
class ModelWanted:
    """Coordinator to a site, after the last round, under a plan that gives it the model: say which file
    the release of this certificate leads to (digest empty), or upload the file of this digest."""

    job: str
    certificate: str
    digest: bytes


@record("ModelMade")
class ModelMade:
    """The file that the release of this certificate leads to: the same bytes at every site.

    digest: of the container it would travel in.
    """

    job: str
    site: SiteId
    certificate: str
    digest: bytes


@record("KeysErased")
class KeysErased:
    """A site was asked to pass the key epoch of an ended job on to `wanted`, and has erased it (PROTOCOL V)."""

    job: str
    site: SiteId
    wanted: SiteId


@record("TrainingOver")
class TrainingOver:
    """A site is at the release of this certificate, by whose sums training is over before its last round.

    Every site of the release says the same, or its state would have another HMAC.
    """

    job: str
    site: SiteId
    certificate: str


def model_upload(certificate: str) -> bytes:
    """What a model's upload goes under, where a vector's has the digest of its round's header."""
    return hashlib.sha256(b"fedcore model " + certificate.encode()).digest()


@record("JobEnded")
class JobEnded:
    """Coordinator to sites: no further round of this job. outcome: one of OUTCOMES.

    certificate: hash of the last release; a site that stands elsewhere catches up first. Empty: none was
    released, or nobody left its state, and every site stays where it is.
    """

    job: str
    outcome: str
    text: str
    certificate: str = ""


SiteJobMessage = (
    SiteSurvey | SiteUnavailable | PlanAgreed | SiteStatus | InRound | KeysErased |
    CheckpointSealed | ModelMade | PublicMetrics | TrainingOver
)  # fmt: skip
CoordinatorJobMessage = (
    JobOffer | PlanOffer | CheckpointWanted | CheckpointOffer | ModelWanted | JobEnded
)
ToCoordinator = SiteMessage | SiteEpochMessage | SiteJobMessage
ToSite = CoordinatorMessage | CoordinatorEpochMessage | CoordinatorJobMessage
"""Everything that travels one way: of rounds, key epochs and the job."""
