"""Between rounds: key epochs, releases that were missed, and folders put back to an earlier time."""

from fedcore.errors import HeaderRefused, OutOfOrder, ReleaseRefused, StaleEpoch
from fedcore.secagg.protocol import checks, effects, messages
from fedcore.secagg.protocol.messages import COORDINATOR, check_signature
from fedcore.secagg.protocol.round.site import entries, events, stages
from fedcore.secagg.protocol.round.site.entries import SiteMove
from fedcore.secagg.protocol.round.site.stages import SiteProgress


def decline(move: SiteMove, _: stages.Between, event: events.Declined) -> None:
    """Leave a round that this site did not join."""
    move.leave(event.header)


def check_certified(_: SiteMove, stage: stages.Idle, certificate: messages.Certificate) -> None:
    """The certificate of the last release, sent again. Raises OutOfOrder for any other."""
    if certificate.hash != stage.standing.certificate:
        raise OutOfOrder(
            "message", "Certificate of a round this site is not in", "none", COORDINATOR,
            remedy="a site that missed a release catches up from the checkpoint",
        )  # fmt: skip


def install_epoch(move: SiteMove, stage: stages.Between, event: events.NewEpoch) -> None:
    """Epochs only grow. Raises StaleEpoch."""
    checks.grows("key epoch", event.epoch, stage.standing.epoch, StaleEpoch)
    move.record(entries.EpochInstalled(event.epoch, event.key_id))


def catch_up(move: SiteMove, stage: stages.Idle, event: events.CaughtUp) -> None:
    """Take over the state of a release that this site missed. Raises a ProtocolRefused."""
    found = event.certificate
    check_missed(move.member, stage.standing, found)
    if event.state_mac != found.state_mac:
        raise ReleaseRefused("checkpoint", "another state", "the certified one", COORDINATOR)
    move.record(entries.CheckpointTaken(found))
    move.do(effects.Apply(found))


def check_missed(
    member: events.SiteParams, standing: SiteProgress, found: messages.Certificate
) -> None:
    """The certificate proves a release of this job after the one that this site stands at.

    Raises a ProtocolRefused. A state is worth holding only once this has passed (PROTOCOL V).
    """
    checks.equal(*member.same_job(found.header))
    if found.header.round <= standing.released:
        raise HeaderRefused(
            "checkpoint", f"round {found.header.round}", f"one after {standing.released}", COORDINATOR,
        )  # fmt: skip
    checks.roster(found.header, member.pins, member.least)
    checks.round_threshold(found.header, member.plan.threshold)
    checks.certificate(found, found.header, member.pins)


def look_at_own_signature(
    move: SiteMove, stage: stages.Between, event: events.OwnSignature
) -> None:
    """A signature of this site that its folder has no record of: the folder is an old one."""
    member, standing = move.member, stage.standing
    number = event.header.round
    known = number < standing.round or (number == standing.round and not event.other)
    if event.header.job != member.job or known or number <= standing.proved:
        return
    checks.of_round(event.said.header, event.header, COORDINATOR)
    check_signature(event.said, {member.id: member.pins[member.id]})
    move.record(entries.FolderFoundOld(number))
    move.do(
        effects.Warn(
            f"this site signed in round {number} of job {member.job}, and its folder ends at round "
            f"{standing.round}: the folder was put back to an earlier time. It takes part again once "
            "it has caught up with a release that is not older than that round."
        )
    )
