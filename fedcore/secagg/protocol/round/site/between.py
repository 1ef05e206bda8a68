"""Between rounds: key epochs, releases that were missed, and folders put back to an earlier time."""

from __future__ import annotations

from fedcore.errors import (
    HeaderRefused,
    OutOfOrder,
    ReleaseRefused,
    StaleEpoch,
)
from fedcore.secagg.crypto.identity_key import roster_digest
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol.effects import (
    Apply,
    Warn,
)
from fedcore.secagg.protocol.messages import (
    COORDINATOR,
    LEFT,
    Abandon,
    Certificate,
    Leave,
    Notice,
    check_signature,
)
from fedcore.secagg.protocol.round.site.events import (
    CaughtUp,
    Declined,
    NewEpoch,
    OwnSignature,
    SiteParams,
)
from fedcore.secagg.protocol.round.site.journal import (
    CheckpointTaken,
    EpochInstalled,
    FolderFoundOld,
    SiteMove,
)
from fedcore.secagg.protocol.round.site.stages import Halted, Idle
from fedcore.secagg.protocol.shared import (
    SiteProgress,
    check_certificate,
    check_header,
    check_roster,
    check_round_threshold,
)


def decline(move: SiteMove, _: Idle | Halted, event: Declined) -> None:
    """Leave a round that this site did not join."""
    move.send(Leave(event.header.digest, move.member.id, LEFT))


def ignore_abandon(move: SiteMove, stage: Idle | Halted, request: Abandon) -> None:
    """The coordinator tells the whole roster; this site has left before."""


def ignore_notice(move: SiteMove, stage: Idle | Halted, notice: Notice) -> None:
    """Why another site refused, after this one has left or refused itself: its own log says enough."""


def check_certified(_: SiteMove, stage: Idle, certificate: Certificate) -> None:
    """The certificate of the last release, sent again. Raises OutOfOrder for any other."""
    if certificate.hash != stage.standing.certificate:
        raise OutOfOrder(
            "message", found="Certificate of a round this site is not in", expected="none",
            fault=COORDINATOR, remedy="a site that missed a release catches up from the checkpoint",
        )  # fmt: skip


def install_epoch(move: SiteMove, stage: Idle | Halted, event: NewEpoch) -> None:
    """Epochs only grow. Raises StaleEpoch."""
    if event.epoch <= stage.standing.epoch:
        raise StaleEpoch(
            "key epoch", found=event.epoch, expected=f"more than {stage.standing.epoch}",
            fault=COORDINATOR,
        )  # fmt: skip
    move.record(EpochInstalled(event.epoch, event.key_id))


def catch_up(move: SiteMove, stage: Idle, event: CaughtUp) -> None:
    """Take over the state of a release that this site missed. Raises a ProtocolRefused."""
    found = event.certificate
    check_missed(move.member, stage.standing, found)
    if event.state_mac != found.state_mac:
        raise ReleaseRefused(
            "checkpoint", found="another state", expected="the certified one", fault=COORDINATOR
        )
    move.record(CheckpointTaken(found))
    move.do(Apply(found))


def check_missed(member: SiteParams, standing: SiteProgress, found: Certificate) -> None:
    """The certificate proves a release of this job after the one that this site stands at.

    Raises a ProtocolRefused. A state is worth holding only once this has passed (PROTOCOL V).
    """
    _check_same_job(member, found.header)
    if found.header.round <= standing.released:
        raise HeaderRefused(
            "checkpoint", found=f"round {found.header.round}",
            expected=f"one after {standing.released}", fault=COORDINATOR,
        )  # fmt: skip
    check_roster(found.header, member.pins, member.least)
    check_round_threshold(found.header, member.plan.threshold)
    check_certificate(found, found.header, member.pins)


def look_at_own_signature(move: SiteMove, stage: Idle | Halted, event: OwnSignature) -> None:
    """A signature of this site that its folder knows nothing of: the folder is an old one."""
    member, standing = move.member, stage.standing
    number = event.header.round
    known = number < standing.round or (number == standing.round and not event.other)
    if event.header.job != member.job or known or number <= standing.proved:
        return
    check_header(event.said.header, event.header, COORDINATOR)
    check_signature(event.said, {member.id: member.pins[member.id]})
    move.record(FolderFoundOld(number))
    move.do(
        Warn(
            f"this site signed in round {number} of job {member.job}, and its folder ends at round "
            f"{standing.round}: the folder was put back to an earlier time. It takes part again once "
            "it has caught up with a release that is not older than that round."
        )
    )


def _check_same_job(member: SiteParams, header: RoundHeader) -> None:
    for what, found, expected in (
        ("federation", header.federation, member.federation),
        ("job", header.job, member.job),
        ("plan digest", header.plan_digest, member.plan.digest),
        ("pinned keys", header.pins, roster_digest(member.pins)),
    ):
        if found != expected:
            raise HeaderRefused(what, found=found, expected=expected, fault=COORDINATOR)
