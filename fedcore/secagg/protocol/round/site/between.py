"""Between rounds: what a site checks before it joins one; key epochs, missed releases and restored folders."""

from collections.abc import Iterable
from dataclasses import replace

from fedcore import errors
from fedcore.secagg.crypto.hybrid import HybridKey
from fedcore.secagg.crypto.pairwise import MaskRoot
from fedcore.secagg.plan import PLAN_VERSION, RoundHeader
from fedcore.secagg.protocol import checks, effects, messages
from fedcore.secagg.protocol.effects import MakeVector
from fedcore.secagg.protocol.messages import COORDINATOR, Keys, check_signature, sign
from fedcore.secagg.protocol.round.site import entries, events, stages
from fedcore.secagg.protocol.round.site.entries import SiteMove
from fedcore.secagg.protocol.round.site.sharing import share_secrets
from fedcore.secagg.protocol.round.site.stages import SiteProgress, exchange
from fedcore.types import SiteId


def join_round(move: SiteMove, stage: stages.Idle, event: events.Invited) -> None:
    """Use up the round number and send keys, or under `encrypted` begin with the vector.

    Where the announcement has the keys that all sites sent ahead, this site's among them, shares follow at once, if
    they were not sent ahead, too.
    """
    member, standing, announce = move.member, stage.standing, event.announce
    header, ahead = announce.header, stage.ahead
    if ahead is not None and (ahead.header, ahead.state_tag) != (header, event.state_tag):
        ahead = None
    _check_invitation(member, standing, header, ahead)
    check_company(member, header, header.roster, "cohort")
    if announce.keys and ahead is None:
        raise errors.KeyRefused(
            "announcement", "keys that were sent ahead", "none: this site sent none for this round",
            COORDINATOR,
        )  # fmt: skip
    if not header.layers.masks:
        move.record(entries.JoinedUnmasked(header, event.state_tag, exchange(event.announce)))
        move.do(MakeVector(header, event.state_tag, ()))
        return
    if ahead is None:
        ahead = draw_keys(member, header, event.state_tag, standing.key_id)
    found = header, event.state_tag, ahead.secrets, ahead.keys
    if announce.keys:
        move.record(entries.Joined(*found, exchange(announce)))
        assert isinstance(move.stage, stages.Advertised)
        begun = replace(move.stage, sealed=ahead.sealed)
        bundle = messages.KeyBundle(header.digest, announce.keys)
        share_secrets(move, begun, bundle, sent=ahead.sealed is not None and ahead.sealed.arrived)
        return
    move.record(entries.Joined(*found, exchange(announce, ahead.keys)))
    assert isinstance(move.stage, stages.Advertised)
    # A coordinator that lost the shares asks anew, and gets the same ones.
    move.stage = replace(move.stage, sealed=ahead.sealed)
    move.send(ahead.keys)


def draw_keys(
    member: events.SiteParams, header: RoundHeader, state_tag: bytes, key_id: bytes
) -> stages.Ahead:
    """Fresh secrets and signed keys for one round."""
    return keys_of(member, header, state_tag, key_id, draw_secrets(member))


def draw_secrets(member: events.SiteParams) -> stages.Secrets:
    """Fresh secrets of one round."""
    root, self_seed = MaskRoot(member.entropy.draw(32)), member.entropy.draw(32)
    return stages.Secrets.of(HybridKey.draw(member.entropy), root, self_seed)


def keys_of(
    member: events.SiteParams,
    header: RoundHeader,
    state_tag: bytes,
    key_id: bytes,
    secrets: stages.Secrets,
) -> stages.Ahead:
    """The signed keys of these secrets for a round."""
    keys = Keys(header.digest, member.id, *secrets.public, state_tag, key_id, b"")
    return stages.Ahead(header, state_tag, secrets, sign(keys, member.identity))


def _check_invitation(
    member: events.SiteParams,
    standing: SiteProgress,
    header: RoundHeader,
    ahead: stages.Ahead | None,
) -> None:
    checks.roster(header, member.pins, member.least, member.id)
    checks.round_threshold(header, member.plan.threshold)
    checks.equal(
        ("protocol version", header.version, PLAN_VERSION),
        ("protection", header.protection, member.plan.protection),
        *member.same_job(header),
    )
    checks.protection(header.protection)
    if header.epoch != standing.epoch:
        raise errors.StaleEpoch(
            "key epoch", header.epoch, standing.epoch, COORDINATOR,
            remedy="install the announced epoch's secrets first",
        )  # fmt: skip
    _check_one_sum(standing, header)
    if ahead is None:  # else its number was used up for this very round
        checks.grows("round", header.round, standing.round)
    if standing.proved > standing.released:
        raise errors.OldFolder(
            "round", f"an invitation to round {header.round}",
            f"the state of round {standing.proved} or of a later one first", COORDINATOR,
            remedy="this site's folder was put back to an earlier time: it catches up, then takes part",
        )  # fmt: skip
    if header.certificate != standing.certificate:
        raise errors.HeaderRefused(
            "release certificate", header.certificate[:16] or "none",
            standing.certificate[:16] or "none", COORDINATOR,
            remedy="a site that missed a release catches up from the sealed checkpoint",
        )  # fmt: skip


def check_company(
    member: events.SiteParams, header: RoundHeader, sites: Iterable[SiteId], what: str
) -> None:
    """Sums over the same rows have the same sites, also across jobs (PROTOCOL H). Raises OtherSites."""
    wanted = member.only_with.get(header.purpose)
    if wanted is not None and set(sites) != set(wanted):
        raise errors.OtherSites(
            f"{what} ({header.purpose})", ", ".join(sorted(sites)),
            f"exactly {', '.join(sorted(wanted)) or 'no sites at all'}: such a sum over the "
            "same rows was given before, and two that differ by a site show that site's part",
            COORDINATOR,
            remedy="`fed-site ledger` shows the earlier sums; evict the other sites for this job, or "
            "scale by declared ranges, which takes no sum",
        )  # fmt: skip


def _check_one_sum(standing: SiteProgress, header: RoundHeader) -> None:
    """Of one state at most one sum (PROTOCOL H), whatever the purpose, cohort or key epoch."""
    if standing.exposed:
        raise errors.SecondSum(
            "round", f"an invitation to round {header.round} ({header.purpose})",
            f"the release of the round whose sum may be known ({standing.exposed.hex()[:16]})",
            COORDINATOR, remedy="the job goes on after that release, or it ends",
        )  # fmt: skip
    if not header.layers.masks and (header.purpose, header.training_round) in standing.submitted:
        raise errors.SecondSum(
            "round", f"a second sum for {header.purpose} of round {header.training_round}",
            "one vector for each step and state", COORDINATOR,
        )  # fmt: skip


def decline(move: SiteMove, stage: stages.Between, event: events.Declined) -> None:
    """Leave a round that this site did not join. Keys that were sent ahead for it are not used any more."""
    if isinstance(stage, stages.Idle):
        move.stage = stages.Idle(stage.standing)
    move.leave(event.header)


def session_restored(move: SiteMove, stage: stages.Between, _: events.SessionRestored) -> None:
    """Shares that were sent ahead may be lost: they are sent again when their round begins."""
    if (
        isinstance(stage, stages.Idle)
        and stage.ahead is not None
        and stage.ahead.sealed is not None
    ):
        sealed = replace(stage.ahead.sealed, arrived=False)
        move.stage = replace(stage, ahead=replace(stage.ahead, sealed=sealed))


def check_certified(_: SiteMove, stage: stages.Idle, certificate: messages.Certificate) -> None:
    """The certificate of the last release, sent again. Raises OutOfOrder for any other."""
    if certificate.hash != stage.standing.certificate:
        raise errors.OutOfOrder(
            "message", "Certificate of a round this site is not in", "none", COORDINATOR,
            remedy="a site that missed a release catches up from the checkpoint",
        )  # fmt: skip


def install_epoch(move: SiteMove, stage: stages.Between, event: events.NewEpoch) -> None:
    """Epochs only grow. Raises StaleEpoch."""
    checks.grows("key epoch", event.epoch, stage.standing.epoch, errors.StaleEpoch)
    move.record(entries.EpochInstalled(event.epoch, event.key_id))


def catch_up(move: SiteMove, stage: stages.Idle, event: events.CaughtUp) -> None:
    """Take over the state of a release that this site missed. Raises a ProtocolRefused."""
    found = event.certificate
    check_missed(move.member, stage.standing, found)
    if event.state_mac != found.state_mac:
        raise errors.ReleaseRefused("checkpoint", "another state", "the certified one", COORDINATOR)
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
        raise errors.HeaderRefused(
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
    text = (
        f"this site signed in round {number} of job {member.job}, and its folder ends at round "
        f"{standing.round}: the folder was put back to an earlier time. It takes part again once "
        "it has caught up with a release that is not older than that round."
    )
    move.do(effects.Warn(text))
