"""A site in a round: `step(member, stage, event, now) -> (stage, effects)`, without input or output.

The stages hold only what is true in them; `MOVES` is the table of legal moves. Anything else raises a
typed error and leaves the stage as it was; the shell then steps with `Refused(error)`, which leaves the
round in the way PROTOCOL R allows: the coordinator learns that this site left, never why.

Invariant (PROTOCOL D): a round number is used once; one vector, one survivor list and one answer to
unmask leave this site in a round, each journalled before it is sent; an identical request gets the
stored bytes again, a different one is refused. `replay` of the journal gives the live stage.
Invariant (PROTOCOL H): of the state that a site stands at, at most one sum that holds its vector is ever
opened with its help. Once it has answered unmask (or begins to open a sum) it is exposed, and joins no
other round until that state is behind it.
Bonawitz et al. 2017 (ePrint 2017/281), figure 4, the variant against an active adversary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import get_args

from fedcore.errors import (
    EnvelopeRefused,
    HeaderRefused,
    KeyRefused,
    ListRefused,
    OldFolder,
    OtherSites,
    OutOfOrder,
    ReleaseRefused,
    SecondSum,
    ShareRefused,
    StaleEpoch,
    VectorRefused,
)
from fedcore.secagg.crypto import shamir
from fedcore.secagg.crypto.entropy import Entropy
from fedcore.secagg.crypto.hybrid import HybridKey, open_envelope, seal_envelope
from fedcore.secagg.crypto.identity_key import IdentityKey, roster_digest
from fedcore.secagg.crypto.pairwise import (
    MaskRoot,
    make_offer,
    open_offer,
    pair_secret,
    pair_seed,
    self_mask_seed,
)
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.plan import RoundHeader, RoundPlan
from fedcore.secagg.protocol.effects import (
    Apply,
    Erase,
    MakeVector,
    OpenSum,
    Persist,
    Send,
    ShowNotice,
    Upload,
    Warn,
)
from fedcore.secagg.protocol.messages import (
    COORDINATOR,
    LEFT,
    MASK_ROOT,
    MATERIAL,
    RELEASE_REFUSED,
    SELF_SEED,
    Abandon,
    Aggregate,
    Announce,
    Answer,
    Certificate,
    Confirm,
    Confirmations,
    CoordinatorMessage,
    Delivery,
    KeyBundle,
    Keys,
    Leave,
    Notice,
    Parcel,
    Shares,
    SharesHead,
    Signed,
    SiteMessage,
    Statement,
    Submit,
    SurvivorList,
    Unmask,
    check_signature,
    sign,
)
from fedcore.secagg.protocol.moves import Move, Restarted, Tick, on, table
from fedcore.secagg.protocol.shared import (
    THIS_SITE,
    Exchange,
    History,
    SiteProgress,
    answered,
    check_certificate,
    check_confirm,
    check_distinct,
    check_header,
    check_keys,
    check_members,
    check_protection,
    check_roster,
    check_round_threshold,
    check_same_state,
    check_submission,
    exchange,
    listed,
    not_legal,
    refuse_missing,
    survivors_of,
)
from fedcore.secagg.protocol.wire_form import decode, digest, encode, record, type_name
from fedcore.types import SiteId


@dataclass(frozen=True)
class SiteParams:
    """Who this site is and what it insists on; the same for a whole job.

    pins: {site: Ed25519 public key} of the federation's roster, as this site's operator approved it.
    minimum: the smallest cohort it takes part in, where the plan's threshold is lower. patience: seconds
    it waits at any stage; well above the coordinator's, which alone decides who is late: a site that
    gives up first leaves a good round. only_with: {purpose: sites}; a sum of this purpose is given with
    exactly these, because the ledger of this site has one over the same rows (PROTOCOL H, across jobs).
    """

    id: SiteId
    identity: IdentityKey
    pins: Mapping[SiteId, bytes]
    plan: RoundPlan
    federation: str
    job: str
    entropy: Entropy
    minimum: int = 3
    patience: float = 1800.0
    only_with: Mapping[str, tuple[SiteId, ...]] = field(default_factory=dict)

    @property
    def least(self) -> int:
        """The smallest cohort this site takes part in."""
        return max(self.minimum, self.plan.threshold)


# ------------------------------------------------------------------------------------ what happens


@dataclass(frozen=True)
class Invited:
    """A round was announced. state_tag: HMAC under G of this site's own state for it (PROTOCOL S)."""

    announce: Announce
    state_tag: bytes


@dataclass(frozen=True)
class MessageFromCoordinator:
    """Any other message of the coordinator."""

    message: CoordinatorMessage


@dataclass(frozen=True)
class VectorMade:
    """The protected vector is spooled, its chunks on disk: its digest, size in bytes and salt."""

    digest: bytes
    size: int
    salt: bytes = b""


@dataclass(frozen=True)
class SumOpened:
    """The sum decrypted and its tag held; HMACs under G of the sum and of the state it leads to."""

    sum_mac: bytes
    state_mac: bytes


@dataclass(frozen=True)
class CheckFailed:
    """A step of this round raised, the tag did not hold, or somebody here said no: leave it.

    sealed: the cause under G for the other sites; all have one length.
    """

    error: Exception
    sealed: bytes = b""


@dataclass(frozen=True)
class Superseded:
    """A later round was announced while this one is open: the word that ended it was lost."""


@dataclass(frozen=True)
class Declined:
    """An invitation raised: the coordinator need not wait for this site."""

    header: RoundHeader


@dataclass(frozen=True)
class SessionRestored:
    """The connection is new: what was sent last may not have arrived."""


@dataclass(frozen=True)
class CaughtUp:
    """A certificate for a release this site missed; its state was unsealed and matches state_mac."""

    certificate: Certificate
    state_mac: bytes


@dataclass(frozen=True)
class OwnSignature:
    """The coordinator showed this site something (`said`) that it signed itself, of this round.

    other: it said something else itself in this very round.
    """

    said: Signed
    header: RoundHeader
    other: bool = False


@dataclass(frozen=True)
class NewEpoch:
    """A later key epoch is installed here."""

    epoch: int
    key_id: bytes


SiteEvent = (
    Invited
    | MessageFromCoordinator
    | VectorMade
    | SumOpened
    | CheckFailed
    | Superseded
    | Declined
    | SessionRestored
    | Restarted
    | Tick
    | CaughtUp
    | OwnSignature
    | NewEpoch
)


# -------------------------------------------------------------------------------------- the stages


def _until() -> float:
    return field(default=0.0, compare=False, metadata={"byte_form": False})


@record("Secrets")
@dataclass(frozen=True)
class Secrets:
    """The round's own secrets: mask root, self-seed, and the channel key of the envelopes."""

    root: SecretBytes
    self_seed: SecretBytes
    channel: SecretBytes


@record("Held")
@dataclass(frozen=True)
class HeldShares:
    """Two key shares of one site, kept until unmask asks for exactly one of them."""

    of: SiteId
    self_share: SecretBytes
    root_share: SecretBytes


@record("Idle")
@dataclass(frozen=True)
class Idle:
    """Between rounds."""

    standing: SiteProgress


@record("Halted")
@dataclass(frozen=True)
class Halted:
    """A release was refused: no further round under this key epoch (PROTOCOL R)."""

    standing: SiteProgress


@record("Advertised")
@dataclass(frozen=True)
class Advertised:
    """Keys are sent; the bundle is awaited."""

    standing: SiteProgress
    header: RoundHeader
    state_tag: bytes
    secrets: Secrets
    keys: Keys
    history: History
    until: float = _until()


@record("Shared")
@dataclass(frozen=True)
class Shared:
    """Shares are sent; the others' are awaited. own: the shares kept of this site's own secrets."""

    standing: SiteProgress
    header: RoundHeader
    state_tag: bytes
    secrets: Secrets
    bundle: tuple[Keys, ...]
    own: HeldShares
    shares: Shares
    history: History
    until: float = _until()


@record("Masking")
@dataclass(frozen=True)
class Masking:
    """The vector is being made. masks: (seed, sign) of each; mask root and self-seed are gone."""

    standing: SiteProgress
    header: RoundHeader
    state_tag: bytes
    bundle: bytes
    cohort: tuple[SiteId, ...]
    held: tuple[HeldShares, ...]
    masks: tuple[tuple[SecretBytes, int], ...]
    history: History
    until: float = _until()


@record("Submitted")
@dataclass(frozen=True)
class Submitted:
    """The vector is on its way; the survivor list is awaited. The masks are gone."""

    standing: SiteProgress
    header: RoundHeader
    state_tag: bytes
    bundle: bytes
    cohort: tuple[SiteId, ...]
    held: tuple[HeldShares, ...]
    submit: Submit
    history: History
    until: float = _until()


@record("Confirmed")
@dataclass(frozen=True)
class Confirmed:
    """One survivor list is signed; the others' signatures are awaited."""

    standing: SiteProgress
    header: RoundHeader
    state_tag: bytes
    cohort: tuple[SiteId, ...]
    held: tuple[HeldShares, ...]
    submissions: tuple[Submit, ...]
    confirm: Confirm
    history: History
    until: float = _until()


@record("Answered")
@dataclass(frozen=True)
class Answered:
    """Unmask is answered, so the round counts as released; the sum is awaited. The shares are gone."""

    standing: SiteProgress
    header: RoundHeader
    state_tag: bytes
    submissions: tuple[Submit, ...]
    history: History


@record("Opening")
@dataclass(frozen=True)
class Opening:
    """The sum is being opened and its tag checked."""

    standing: SiteProgress
    header: RoundHeader
    state_tag: bytes
    submissions: tuple[Submit, ...]
    aggregate: Aggregate
    history: History


@record("Stated")
@dataclass(frozen=True)
class Stated:
    """What the sum leads to is signed; the certificate is awaited, and nothing is applied before it."""

    standing: SiteProgress
    header: RoundHeader
    submissions: tuple[Submit, ...]
    statement: Statement
    history: History


Waiting = Advertised | Shared | Masking | Submitted | Confirmed
"""Stages that end by themselves, after the site's patience."""
Exposed = Answered | Opening | Stated
"""Stages after unmask was answered: the coordinator may hold this round's sum. They have no timeout:
leaving such a round helps nobody, because no other round may follow it from the same state."""
InRound = Waiting | Exposed
SiteStage = Idle | Halted | InRound

BETWEEN: tuple[type[Idle | Halted], ...] = (Idle, Halted)
IN_ROUND: tuple[type[InRound], ...] = get_args(InRound)
EXPOSED: tuple[type[Exposed], ...] = get_args(Exposed)


# ------------------------------------------------------------------------- what the journal records


@record("Joined")
@dataclass(frozen=True)
class Joined:
    """A round begins here, under masks: its number is used up with this record."""

    header: RoundHeader
    state_tag: bytes
    secrets: Secrets
    keys: Keys
    exchange: Exchange


@record("JoinedUnmasked")
@dataclass(frozen=True)
class JoinedUnmasked:
    """A round begins here under `encrypted`: there is no key to agree on."""

    header: RoundHeader
    state_tag: bytes
    exchange: Exchange


@record("SharesMade")
@dataclass(frozen=True)
class SharesMade:
    """The bundle is accepted, and the shares are made."""

    bundle: tuple[Keys, ...]
    own: HeldShares
    shares: Shares
    exchange: Exchange


@record("DeliveryOpened")
@dataclass(frozen=True)
class DeliveryOpened:
    """The others' shares are held, and the masks agreed."""

    cohort: tuple[SiteId, ...]
    held: tuple[HeldShares, ...]
    masks: tuple[tuple[SecretBytes, int], ...]
    exchange: Exchange


@record("VectorSpooled")
@dataclass(frozen=True)
class VectorSpooled:
    """The final chunks are on disk."""

    submit: Submit


@record("ListSigned")
@dataclass(frozen=True)
class ListSigned:
    """The one survivor list of this round."""

    submissions: tuple[Submit, ...]
    confirm: Confirm
    exchange: Exchange


@record("UnmaskAnswered")
@dataclass(frozen=True)
class UnmaskAnswered:
    """The one answer of this round."""

    exchange: Exchange


@record("SumAnnounced")
@dataclass(frozen=True)
class SumAnnounced:
    """Which sum this site was asked to open."""

    aggregate: Aggregate
    exchange: Exchange


@record("SumStated")
@dataclass(frozen=True)
class SumStated:
    """What this site found in it."""

    statement: Statement


@record("Certified")
@dataclass(frozen=True)
class Certified:
    """The release is proved; the new state is on disk beside this record."""

    certificate: Certificate


@record("Departed")
@dataclass(frozen=True)
class Departed:
    """This site left the round before its end."""

    stage: str


@record("ReleaseRefusedHere")
@dataclass(frozen=True)
class ReleaseRefusedHere:
    """A release failed its checks: the key epoch ends here."""

    stage: str


@record("EpochInstalled")
@dataclass(frozen=True)
class EpochInstalled:
    """A later key epoch."""

    epoch: int
    key_id: bytes


@record("CheckpointTaken")
@dataclass(frozen=True)
class CheckpointTaken:
    """The state of a release this site missed."""

    certificate: Certificate


@record("FolderFoundOld")
@dataclass(frozen=True)
class FolderFoundOld:
    """This site signed in a round that its folder does not know: it was put back to an earlier time."""

    round: int


SiteEntry = (
    Joined
    | JoinedUnmasked
    | SharesMade
    | DeliveryOpened
    | VectorSpooled
    | ListSigned
    | UnmaskAnswered
    | SumAnnounced
    | SumStated
    | Certified
    | Departed
    | ReleaseRefusedHere
    | EpochInstalled
    | CheckpointTaken
    | FolderFoundOld
)

SiteEffect = (
    Persist[SiteEntry]
    | Send[SiteMessage]
    | Warn
    | MakeVector
    | Upload
    | OpenSum
    | ShowNotice
    | Apply
    | Erase
)


def evolve(stage: SiteStage, entry: SiteEntry) -> SiteStage:
    """The stage after a journal record. Total on what `step` records, and on nothing else."""
    match entry:
        case Joined(header, tag, secrets, keys, first) if isinstance(stage, Idle):
            return Advertised(_used(stage.standing, header), header, tag, secrets, keys, (first,))
        case JoinedUnmasked(header, tag, first) if isinstance(stage, Idle):
            standing = _used(stage.standing, header)
            return Masking(standing, header, tag, b"", header.roster, (), (), (first,))
        case SharesMade(bundle, own, shares, last) if isinstance(stage, Advertised):
            return Shared(
                stage.standing, stage.header, stage.state_tag, stage.secrets, bundle, own, shares,
                (*stage.history, last),
            )  # fmt: skip
        case DeliveryOpened(cohort, held, masks, last) if isinstance(stage, Shared):
            return Masking(
                stage.standing, stage.header, stage.state_tag, digest(stage.bundle), cohort, held,
                masks, (*stage.history, last),
            )  # fmt: skip
        case VectorSpooled(submit) if isinstance(stage, Masking):
            return Submitted(
                _sent(stage.standing, stage.header), stage.header, stage.state_tag, stage.bundle,
                stage.cohort, stage.held, submit, stage.history,
            )  # fmt: skip
        case ListSigned(submissions, confirm, last) if isinstance(stage, Submitted):
            return Confirmed(
                stage.standing, stage.header, stage.state_tag, stage.cohort, stage.held, submissions,
                confirm, (*stage.history, last),
            )  # fmt: skip
        case UnmaskAnswered(last) if isinstance(stage, Confirmed):
            return Answered(
                _exposed(stage.standing, stage.header), stage.header, stage.state_tag,
                stage.submissions, (*stage.history, last),
            )  # fmt: skip
        case SumAnnounced(aggregate, last) if isinstance(stage, Answered | Confirmed | Submitted):
            return Opening(
                _exposed(stage.standing, stage.header), stage.header, stage.state_tag,
                aggregate.submissions, aggregate, (*stage.history, last),
            )  # fmt: skip
        case SumStated(statement) if isinstance(stage, Opening):
            last = exchange(stage.aggregate, statement)
            return Stated(
                stage.standing, stage.header, stage.submissions, statement,
                (*stage.history[:-1], last),
            )  # fmt: skip
        case Certified(certificate) if isinstance(stage, Stated):
            return Idle(_released(stage.standing, certificate))
        case Departed() if isinstance(stage, InRound):
            return Idle(stage.standing)
        case ReleaseRefusedHere() if isinstance(stage, InRound):
            return Halted(stage.standing)
        case EpochInstalled(epoch, key_id) if isinstance(stage, Idle | Halted):
            return Idle(replace(stage.standing, epoch=epoch, key_id=key_id))
        case CheckpointTaken(certificate) if isinstance(stage, Idle):
            return Idle(_released(stage.standing, certificate))
        case FolderFoundOld(number) if isinstance(stage, Idle | Halted):
            return replace(stage, standing=_proved(stage.standing, number))
    raise OutOfOrder(
        "journal", found=f"{type_name(type(entry))} after {type_name(type(stage))}",
        expected="a record this stage can have written", fault=THIS_SITE,
    )  # fmt: skip


def _used(standing: SiteProgress, header: RoundHeader) -> SiteProgress:
    return replace(standing, round=header.round)


def _sent(standing: SiteProgress, header: RoundHeader) -> SiteProgress:
    """Without masks a vector that was sent is all that a colluding site needs, opened or not."""
    if header.layers.masks:
        return standing
    return replace(standing, submitted=(*standing.submitted, _step(header)))


def _step(header: RoundHeader) -> tuple[str, int]:
    return header.purpose, header.training_round


def _exposed(standing: SiteProgress, header: RoundHeader) -> SiteProgress:
    return replace(standing, exposed=header.digest)


def _proved(standing: SiteProgress, number: int) -> SiteProgress:
    return replace(standing, proved=max(standing.proved, number), round=max(standing.round, number))


def _released(standing: SiteProgress, certificate: Certificate) -> SiteProgress:
    """The state is another one now, so nothing that bound this site to the one before does."""
    number = certificate.header.round
    return replace(
        standing, certificate=certificate.hash, released=number, exposed=b"", submitted=(),
        round=max(standing.round, number),
        proved=standing.proved if standing.proved > number else 0,
    )  # fmt: skip


def replay(start: SiteStage, journal: Iterable[SiteEntry]) -> SiteStage:
    """The stage that the records of a journal lead to."""
    for entry in journal:
        start = evolve(start, entry)
    return start


# --------------------------------------------------------------------------------- the moves


@dataclass
class _SiteMove(Move[SiteStage, SiteEntry, SiteEffect]):
    """A step of this role."""

    member: SiteParams = field(kw_only=True)

    def send(self, message: SiteMessage) -> None:
        self.effects.append(Send(COORDINATOR, message))


def _join(move: _SiteMove, stage: Idle, event: Invited) -> None:
    member, standing, header = move.member, stage.standing, event.announce.header
    _check_invitation(member, standing, header)
    _check_company(member, header, header.roster, "cohort")
    if not header.layers.masks:
        move.record(JoinedUnmasked(header, event.state_tag, exchange(event.announce)))
        move.do(MakeVector(header, event.state_tag, ()))
        return
    root, self_seed = member.entropy.draw(32), member.entropy.draw(32)
    channel = HybridKey.draw(member.entropy)
    keys = sign(
        Keys(
            header.digest, member.id, channel.public, MaskRoot(root).keys.public,
            hashlib.sha256(self_seed).digest(), event.state_tag, standing.key_id, b"",
        ),
        member.identity,
    )  # fmt: skip
    secrets = Secrets(SecretBytes(root), SecretBytes(self_seed), SecretBytes(channel.to_bytes()))
    move.record(Joined(header, event.state_tag, secrets, keys, exchange(event.announce, keys)))
    move.send(keys)


def _check_invitation(member: SiteParams, standing: SiteProgress, header: RoundHeader) -> None:
    check_roster(header, member.pins, member.least)
    if member.id not in header.roster:
        refuse_missing(member.id, header.roster, "roster")
    check_round_threshold(header, member.plan.threshold)
    expected: dict[str, tuple[object, object]] = {
        "federation": (header.federation, member.federation),
        "job": (header.job, member.job),
        "protocol version": (header.version, member.plan.version),
        "protection": (header.protection, member.plan.protection),
        "plan digest": (header.plan_digest, member.plan.digest),
        "pinned keys": (header.pins, roster_digest(member.pins)),
    }
    for what, (found, wanted) in expected.items():
        if found != wanted:
            raise HeaderRefused(what, found=found, expected=wanted, fault=COORDINATOR)
    check_protection(header.protection)
    if header.epoch != standing.epoch:
        raise StaleEpoch(
            "key epoch", found=header.epoch, expected=standing.epoch, fault=COORDINATOR,
            remedy="install the announced epoch's secrets first",
        )  # fmt: skip
    _check_one_sum(standing, header)
    if header.round <= standing.round:
        raise HeaderRefused(
            "round", found=header.round, expected=f"more than {standing.round}", fault=COORDINATOR
        )
    if standing.proved > standing.released:
        raise OldFolder(
            "round", found=f"an invitation to round {header.round}",
            expected=f"the state of round {standing.proved} or of a later one first",
            fault=COORDINATOR,
            remedy="this site's folder was put back to an earlier time: it catches up, then takes part",
        )  # fmt: skip
    if header.certificate != standing.certificate:
        raise HeaderRefused(
            "release certificate", found=header.certificate[:16] or "none",
            expected=standing.certificate[:16] or "none", fault=COORDINATOR,
            remedy="a site that missed a release catches up from the sealed checkpoint",
        )  # fmt: skip


def _check_company(
    member: SiteParams, header: RoundHeader, sites: Iterable[SiteId], what: str
) -> None:
    """These rows meet the same sites again, or none (PROTOCOL H, across jobs). Raises OtherSites."""
    wanted = member.only_with.get(header.purpose)
    if wanted is not None and set(sites) != set(wanted):
        raise OtherSites(
            f"{what} ({header.purpose})", found=", ".join(sorted(sites)),
            expected=f"exactly {', '.join(sorted(wanted)) or 'no sites at all'}: such a sum over the "
            "same rows was given before, and two that differ by a site show that site's part",
            fault=COORDINATOR,
            remedy="`fed-site ledger` shows the earlier sums; evict the other sites for this job, or "
            "scale by declared ranges, which takes no sum",
        )  # fmt: skip


def _check_one_sum(standing: SiteProgress, header: RoundHeader) -> None:
    """Of one state at most one sum (PROTOCOL H), whatever the purpose, cohort or key epoch."""
    if standing.exposed:
        raise SecondSum(
            "round", found=f"an invitation to round {header.round} ({header.purpose})",
            expected=f"the release of the round whose sum may be known ({standing.exposed.hex()[:16]})",
            fault=COORDINATOR, remedy="the job goes on after that release, or it ends",
        )  # fmt: skip
    if not header.layers.masks and _step(header) in standing.submitted:
        raise SecondSum(
            "round", found=f"a second sum for {header.purpose} of round {header.training_round}",
            expected="one vector for each step and state", fault=COORDINATOR,
        )  # fmt: skip


def _share(move: _SiteMove, stage: Advertised, bundle: KeyBundle) -> None:
    member = move.member
    header = stage.header
    _check_bundle(member, stage, bundle)
    count, root, seed = len(header.roster), stage.secrets.root, stage.secrets.self_seed
    draw = member.entropy.draw
    self_shares = shamir.split(seed.reveal(), header.threshold, count, draw)
    root_shares = shamir.split(root.reveal(), header.threshold, count, draw)
    channel, mask_root = _own_keys(stage)
    parcels = tuple(
        _parcel(member, header, keys, (self_shares[place], root_shares[place]), channel, mask_root)
        for keys in bundle.keys
        for place in (header.place(keys.site),)
    )
    own = header.place(member.id)
    head = SharesHead(
        header.digest, member.id, tuple((p.recipient, digest(p)) for p in parcels), b""
    )
    shares = Shares(sign(head, member.identity), parcels)
    held = HeldShares(member.id, SecretBytes(self_shares[own]), SecretBytes(root_shares[own]))
    move.record(SharesMade(bundle.keys, held, shares, exchange(bundle, shares)))
    move.send(shares)


def _check_bundle(member: SiteParams, stage: Advertised, bundle: KeyBundle) -> None:
    header = stage.header
    check_header(bundle.header, header, COORDINATOR)
    names = [keys.site for keys in bundle.keys]
    check_members(names, header.roster, header.threshold, "key bundle")
    refuse_missing(member.id, names, "key bundle")
    for keys in bundle.keys:
        if keys.site != member.id:
            check_keys(keys, header, member.pins)
        elif keys != stage.keys:
            raise KeyRefused(
                "key bundle", found="other keys for this site", expected="those it sent",
                fault=COORDINATOR,
            )  # fmt: skip
    check_distinct(bundle.keys)
    check_same_state(bundle.keys, stage.state_tag, stage.standing.key_id)


def _context(header: RoundHeader, sender: SiteId, recipient: SiteId) -> bytes:
    """What an envelope is bound to: version, h, and who writes to whom."""
    return encode(("fedcore/1 shares", header.digest, sender, recipient))


def share_digest(header: bytes, of: SiteId, holder: SiteId, kind: str, share: bytes) -> bytes:
    """What a sender signs of one plaintext key share."""
    return digest((header, of, holder, kind, share))


def _own_keys(stage: Advertised | Shared) -> tuple[HybridKey, MaskRoot]:
    """The channel key and the mask root, made from their bytes once a step."""
    secrets = stage.secrets
    return HybridKey.from_bytes(secrets.channel.reveal()), MaskRoot(secrets.root.reveal())


def _parcel(
    member: SiteParams,
    header: RoundHeader,
    keys: Keys,
    shares: tuple[bytes, bytes],
    channel: HybridKey,
    root: MaskRoot,
) -> Parcel:
    """shares: of the self-seed and of the mask root, for the owner of `keys`."""
    to, entropy = keys.site, member.entropy
    digests = tuple(
        share_digest(header.digest, member.id, to, kind, share)
        for kind, share in zip((SELF_SEED, MASK_ROOT), shares, strict=True)
    )
    if to == member.id:
        return Parcel(member.id, to, b"", b"", *digests)
    envelope = seal_envelope(
        channel, keys.channel, b"".join(shares), context=_context(header, member.id, to),
        recipient=to, entropy=entropy,
    )  # fmt: skip
    offer = b""
    if header.place(member.id) < header.place(to):
        _, offer = make_offer(
            root, keys.mask.mlkem, sender=member.id, recipient=to, header=header.digest,
            entropy=entropy,
        )  # fmt: skip
    return Parcel(member.id, to, envelope, offer, *digests)


def _open_delivery(move: _SiteMove, stage: Shared, delivery: Delivery) -> None:
    member = move.member
    header = stage.header
    check_header(delivery.header, header, COORDINATOR)
    joined = [keys.site for keys in stage.bundle]
    cohort = tuple(head.site for head in delivery.heads)
    check_members(cohort, joined, header.threshold, "shares")
    refuse_missing(member.id, cohort, "shares")
    if [parcel.sender for parcel in delivery.parcels] != list(cohort):
        raise ShareRefused(
            "parcels", found=f"{len(delivery.parcels)} that do not match the heads",
            expected=f"one of each of {len(cohort)} sites", fault=COORDINATOR,
        )  # fmt: skip
    channel, root = _own_keys(stage)
    held, masks = [stage.own], [_self_mask(member, stage)]
    for head, parcel in zip(delivery.heads, delivery.parcels, strict=True):
        _check_head(member, stage, head, parcel, joined)
        if head.site != member.id:
            held.append(_open_parcel(member, stage, parcel, channel))
            masks.append(_pairwise_mask(member, stage, parcel, root))
    move.record(DeliveryOpened(cohort, tuple(held), tuple(masks), exchange(delivery)))
    move.do(MakeVector(header, stage.state_tag, tuple(masks)))


def _check_head(
    member: SiteParams, stage: Shared, head: SharesHead, parcel: Parcel, joined: list[SiteId]
) -> None:
    check_header(head.header, stage.header, head.site)
    check_signature(head, member.pins)
    if [recipient for recipient, _ in head.parcels] != joined:
        raise ShareRefused(
            "shares", found=f"parcels for {len(head.parcels)} sites",
            expected=f"one for each of the {len(joined)} that joined", fault=head.site,
        )  # fmt: skip
    signed = dict(head.parcels)[member.id]
    if parcel.recipient != member.id or digest(parcel) != signed:
        raise ShareRefused(
            "parcel", found="other bytes than its sender signed", expected="the signed parcel",
            fault=COORDINATOR,
        )  # fmt: skip


def _open_parcel(
    member: SiteParams, stage: Shared, parcel: Parcel, channel: HybridKey
) -> HeldShares:
    """Both key shares of a sender, checked against the digests it signed."""
    header, sender = stage.header, parcel.sender
    theirs = next(keys for keys in stage.bundle if keys.site == sender)
    plain = open_envelope(
        channel, theirs.channel, parcel.envelope, context=_context(header, sender, member.id),
        sender=sender,
    )  # fmt: skip
    parts = plain[: shamir.SHARE_BYTES], plain[shamir.SHARE_BYTES :]
    kinds = (SELF_SEED, parcel.self_share_digest), (MASK_ROOT, parcel.root_share_digest)
    for share, (kind, signed) in zip(parts, kinds, strict=True):
        found = share_digest(header.digest, sender, member.id, kind, share)
        if len(share) != shamir.SHARE_BYTES or found != signed:
            raise ShareRefused(
                f"{kind} share", found="one that differs from its signed digest",
                expected="the share its sender signed", fault=sender,
            )  # fmt: skip
    return HeldShares(sender, SecretBytes(parts[0]), SecretBytes(parts[1]))


def _self_mask(member: SiteParams, stage: Shared) -> tuple[SecretBytes, int]:
    seed = self_mask_seed(
        stage.secrets.self_seed.reveal(), site=member.id, header=stage.header.digest,
        state_tag=stage.state_tag,
    )  # fmt: skip
    return SecretBytes(seed), 1


def _pairwise_mask(
    member: SiteParams, stage: Shared, parcel: Parcel, root: MaskRoot
) -> tuple[SecretBytes, int]:
    """The mask shared with the sender: the lower of the pair in the roster adds it."""
    header, peer = stage.header, parcel.sender
    lower = header.place(member.id) < header.place(peer)
    if bool(parcel.offer) == lower:
        raise ShareRefused(
            "pair-seed offer", found="one" if parcel.offer else "none",
            expected="one from the first of the pair only", fault=peer,
        )  # fmt: skip
    if lower:
        offered = pair_secret(root, sender=member.id, recipient=peer, header=header.digest)
    else:
        offered = open_offer(
            root, parcel.offer, sender=peer, recipient=member.id, header=header.digest
        )
    public = next(keys.mask for keys in stage.bundle if keys.site == peer)
    seed = pair_seed(
        root, public, offered, mine=member.id, theirs=peer, header=header.digest,
        state_tag=stage.state_tag,
    )  # fmt: skip
    return SecretBytes(seed), 1 if lower else -1


def _submit(move: _SiteMove, stage: Masking, made: VectorMade) -> None:
    member = move.member
    _check_company(member, stage.header, stage.header.roster, "cohort")
    submit = sign(
        Submit(
            stage.header.digest, member.id, made.digest, made.size, stage.state_tag,
            stage.standing.key_id, made.salt, b"",
        ),
        member.identity,
    )  # fmt: skip
    move.record(VectorSpooled(submit))
    move.send(submit)
    move.do(Upload(submit))


def _check_list(
    member: SiteParams, stage: Submitted, header: bytes, submissions: tuple[Submit, ...],
    cohort: Iterable[SiteId],
) -> None:  # fmt: skip
    """U3: a subset of U2, at least t, with this site's own submission, each signed by its site."""
    check_header(header, stage.header, COORDINATOR)
    names = survivors_of(submissions)
    check_members(names, list(cohort), stage.header.threshold, "survivor list")
    refuse_missing(member.id, names, "survivor list")
    _check_company(member, stage.header, names, "survivor list")
    for submit in submissions:
        check_submission(submit, stage.header, member.pins, member.plan.salt_bytes)
    check_same_state(submissions, stage.state_tag, stage.standing.key_id)


def _check_own_submission(submissions: tuple[Submit, ...], own: Submit) -> None:
    if own not in submissions:
        raise VectorRefused(
            "survivor list", found="another submission of this site", expected="the one it sent",
            fault=COORDINATOR,
        )  # fmt: skip


def _confirm(move: _SiteMove, stage: Submitted, request: SurvivorList) -> None:
    member = move.member
    _must_mask(stage.header, request)
    _check_list(member, stage, request.header, request.submissions, stage.cohort)
    _check_own_submission(request.submissions, stage.submit)
    confirm = sign(
        Confirm(
            stage.header.digest, member.id, stage.bundle, digest(stage.cohort),
            listed(request.submissions), b"",
        ),
        member.identity,
    )  # fmt: skip
    move.record(ListSigned(request.submissions, confirm, exchange(request, confirm)))
    move.send(confirm)


def _must_mask(header: RoundHeader, request: CoordinatorMessage) -> None:
    if not header.layers.masks:
        raise OutOfOrder(
            "message", found=type_name(type(request)), expected="none under `encrypted`",
            fault=COORDINATOR,
        )  # fmt: skip


def _answer(move: _SiteMove, stage: Confirmed, request: Confirmations) -> None:
    member = move.member
    check_header(request.header, stage.header, COORDINATOR)
    survivors = survivors_of(stage.submissions)
    _check_company(member, stage.header, survivors, "survivor list")
    signers = [confirm.site for confirm in request.confirms]
    check_members(signers, survivors, stage.header.threshold, "confirmations")
    refuse_missing(member.id, signers, "confirmations")
    for confirm in request.confirms:
        check_confirm(confirm, stage.confirm, member.pins)
    held = {each.of: each for each in stage.held}
    answers = tuple(_one_share(held[of], of in survivors) for of in stage.cohort)
    unmask = Unmask(stage.header.digest, member.id, answers)
    move.record(UnmaskAnswered(exchange(request, unmask)))
    move.send(unmask)


def _one_share(held: HeldShares, survived: bool) -> Answer:
    """Exactly one of the two: both would open the update of a site."""
    if survived:
        return Answer(held.of, SELF_SEED, held.self_share.reveal())
    return Answer(held.of, MASK_ROOT, held.root_share.reveal())


def _open(move: _SiteMove, stage: Submitted | Confirmed | Answered, request: Aggregate) -> None:
    member, header = move.member, stage.header
    if isinstance(stage, Submitted):
        if header.layers.masks:
            raise OutOfOrder(
                "message", found="Aggregate", expected="SurvivorList first", fault=COORDINATOR
            )
        _check_list(member, stage, request.header, request.submissions, stage.cohort)
        _check_own_submission(request.submissions, stage.submit)
    else:
        check_header(request.header, header, COORDINATOR)
        if request.submissions != stage.submissions:
            raise ListRefused(
                "sum", found="another survivor list", expected="the one this site signed",
                fault=COORDINATOR,
            )  # fmt: skip
        if isinstance(stage, Confirmed):  # it has not helped yet, and this would be its help
            _check_company(member, header, survivors_of(stage.submissions), "survivor list")
    move.record(SumAnnounced(request, exchange(request)))
    assert isinstance(move.stage, Opening)
    move.do(_open_sum(move.stage))


def _open_sum(stage: Opening) -> OpenSum:
    names, found = survivors_of(stage.submissions), stage.aggregate
    salts = tuple(submit.salt for submit in stage.submissions)
    return OpenSum(stage.header, names, salts, stage.state_tag, found.digest, found.size)


def _state(move: _SiteMove, stage: Opening, opened: SumOpened) -> None:
    member = move.member
    survivors = digest(survivors_of(stage.submissions))
    statement = sign(
        Statement(stage.header.digest, member.id, survivors, opened.sum_mac, opened.state_mac, b""),
        member.identity,
    )
    move.record(SumStated(statement))
    move.send(statement)


def _release(move: _SiteMove, stage: Stated, certificate: Certificate) -> None:
    member = move.member
    check_certificate(certificate, stage.header, member.pins)
    own = stage.statement
    if certificate.statement(member.id, own.signature) != own:
        raise ReleaseRefused(
            "certificate", found="another sum, state or survivor list",
            expected="what this site found in the sum", fault=COORDINATOR,
        )  # fmt: skip
    move.record(Certified(certificate))
    move.do(Apply(certificate))
    move.do(Erase(stage.header))


def _abandon(move: _SiteMove, stage: InRound, request: Abandon) -> None:
    check_header(request.header, stage.header, COORDINATOR)
    _depart(move, stage)


def _decline(move: _SiteMove, _: Idle | Halted, event: Declined) -> None:
    move.send(Leave(event.header.digest, move.member.id, LEFT))


def _show(move: _SiteMove, stage: InRound, notice: Notice) -> None:
    check_header(notice.header, stage.header, COORDINATOR)
    move.do(ShowNotice(notice))


def _stay(move: _SiteMove, stage: SiteStage, event: Tick | SessionRestored | Restarted) -> None:
    """Nothing is due."""


def _supersede(move: _SiteMove, stage: InRound, _: Superseded) -> None:
    _depart(move, stage)


def _ended_already(move: _SiteMove, stage: Idle | Halted, request: Abandon) -> None:
    """The coordinator tells the whole roster; this site has left before."""


def _heard_too_late(move: _SiteMove, stage: Idle | Halted, notice: Notice) -> None:
    """Why another site refused, after this one has left or refused itself: its own log says enough."""


def _certified_already(_: _SiteMove, stage: Idle, certificate: Certificate) -> None:
    if certificate.hash != stage.standing.certificate:
        raise OutOfOrder(
            "message", found="Certificate of a round this site is not in", expected="none",
            fault=COORDINATOR, remedy="a site that missed a release catches up from the checkpoint",
        )  # fmt: skip


def _depart(move: _SiteMove, stage: InRound) -> None:
    """Leave the round: nothing is applied, and what was secret is erased."""
    if isinstance(stage, EXPOSED):
        move.do(
            Warn(
                f"round {stage.header.round} was left after this site had helped to open its sum, and "
                "without a release: that sum may be known. This site joins no other round of the job "
                "before it has the state of a later release."
            )
        )
    move.record(Departed(type_name(type(stage))))
    move.do(Erase(stage.header))


def _refuse(move: _SiteMove, stage: InRound, event: CheckFailed) -> None:
    """One uniform refusal in the release, a plain departure before it (PROTOCOL R)."""
    if isinstance(stage, Opening | Stated):
        move.record(ReleaseRefusedHere(type_name(type(stage))))
        move.send(Leave(stage.header.digest, move.member.id, RELEASE_REFUSED, event.sealed))
        move.do(Erase(stage.header))
        return
    _depart(move, stage)
    anothers = event.sealed and _is_anothers_material(move.member, stage, event.error)
    code = MATERIAL if anothers else LEFT
    # While a vector is made every cause comes with a notice, so that none can be told from another.
    told = anothers or isinstance(stage, Masking)
    move.send(Leave(stage.header.digest, move.member.id, code, event.sealed if told else b""))


def _is_anothers_material(member: SiteParams, stage: InRound, error: Exception) -> bool:
    """Whether a parcel failed whose digest another site signed: the coordinator cannot have changed it.

    The other sites hear it, sealed; they take this site's word for it, so nothing but a line in their logs
    follows: a lying site can accuse an honest one. Proving it to all would show this site's channel key,
    and with it every key share sealed for it.
    """
    fault = getattr(error, "fault", COORDINATOR)
    blamed = fault in member.pins and fault != member.id
    return (
        blamed and isinstance(stage, Shared) and isinstance(error, EnvelopeRefused | ShareRefused)
    )


def _resend(move: _SiteMove, stage: InRound, _: SessionRestored | Restarted) -> None:
    """What was sent last, byte for byte as the journal has it."""
    match stage:
        case Advertised(keys=keys):
            move.send(keys)
        case Shared(shares=shares):
            move.send(shares)
        case Submitted(submit=submit):
            move.send(submit)
            move.do(Upload(submit))
        case Confirmed(confirm=confirm):
            move.send(confirm)
        case Answered(history=history):
            move.send(decode(history[-1].answer, Unmask))
        case Stated(statement=statement):
            move.send(statement)


def _restart(move: _SiteMove, stage: InRound, event: Restarted) -> None:
    """Go on from the journal, or leave the round (PROTOCOL V, D).

    The folder may have been put back to an earlier time, which a new process cannot see. Under masks it
    signs and answers nothing from there; what it answered already it may say again, byte for byte. A
    half-made vector is never made a second time.
    """
    masked = stage.header.layers.masks and not isinstance(stage, EXPOSED)
    if masked or isinstance(stage, Masking):
        _depart(move, stage)
        move.send(Leave(stage.header.digest, move.member.id, LEFT))
    elif isinstance(stage, Opening):
        move.do(_open_sum(stage))
    else:
        _resend(move, stage, event)


def _install(move: _SiteMove, stage: Idle | Halted, event: NewEpoch) -> None:
    if event.epoch <= stage.standing.epoch:
        raise StaleEpoch(
            "key epoch", found=event.epoch, expected=f"more than {stage.standing.epoch}",
            fault=COORDINATOR,
        )  # fmt: skip
    move.record(EpochInstalled(event.epoch, event.key_id))


def _catch_up(move: _SiteMove, stage: Idle, event: CaughtUp) -> None:
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


def _look_at_own(move: _SiteMove, stage: Idle | Halted, event: OwnSignature) -> None:
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


MOVES = table(
    on(Idle, Invited, _join, Advertised, Masking),
    on(BETWEEN, NewEpoch, _install, Idle),
    on(Idle, CaughtUp, _catch_up, Idle),
    on(Idle, Certificate, _certified_already),
    on(BETWEEN, OwnSignature, _look_at_own),
    on(BETWEEN, Declined, _decline),
    on(BETWEEN, Abandon, _ended_already),
    on(BETWEEN, Notice, _heard_too_late),
    on(BETWEEN, Tick, _stay),
    on(BETWEEN, SessionRestored, _stay),
    on(BETWEEN, Restarted, _stay),
    on(Advertised, KeyBundle, _share, Shared),
    on(Shared, Delivery, _open_delivery, Masking),
    on(Masking, VectorMade, _submit, Submitted),
    on(Submitted, SurvivorList, _confirm, Confirmed),
    on(Submitted, Aggregate, _open, Opening),
    on(Confirmed, Confirmations, _answer, Answered),
    on(Confirmed, Aggregate, _open, Opening),
    on(Answered, Aggregate, _open, Opening),
    on(Opening, SumOpened, _state, Stated),
    on(Stated, Certificate, _release, Idle),
    on(IN_ROUND, Abandon, _abandon, Idle),
    on(IN_ROUND, CheckFailed, _refuse, Idle, Halted),
    on(IN_ROUND, Superseded, _supersede, Idle),
    on(IN_ROUND, Tick, _stay, Idle),
    on(IN_ROUND, SessionRestored, _resend),
    on(IN_ROUND, Restarted, _restart, Idle),
    on(IN_ROUND, Notice, _show),
)


def step(
    member: SiteParams, stage: SiteStage, event: SiteEvent, now: float
) -> tuple[SiteStage, tuple[SiteEffect, ...]]:
    """One event. Raises a ProtocolRefused and changes nothing where the event is not legal here.

    now: seconds of a clock that never goes back; after `patience` at one stage the site leaves, if it is
    not exposed by then.
    """
    if isinstance(event, Tick) and isinstance(stage, Waiting) and now >= stage.until:
        event = CheckFailed(TimeoutError(f"no progress at {type_name(type(stage))}"))
    found = event.message if isinstance(event, MessageFromCoordinator) else event
    if isinstance(stage, InRound):
        request = event.announce if isinstance(event, Invited) else found
        past = answered(stage.history, request)
        if past is not None:
            return stage, _said_again(past)
    kind, legal = type(found), MOVES[type(stage)]
    if kind not in legal:
        said = isinstance(event, MessageFromCoordinator)
        raise not_legal(kind, legal, message=said, fault=COORDINATOR if said else THIS_SITE)
    move = _SiteMove(stage, evolve, member=member)
    handle, _ = legal[kind]
    handle(move, stage, found)
    return _timed(move.stage, stage, event, now, member.patience), tuple(move.effects)


def _said_again(past: Exchange) -> tuple[SiteEffect, ...]:
    if not past.answer:
        return ()
    answer = decode(past.answer, object)
    assert isinstance(answer, SiteMessage)
    return (Send(COORDINATOR, answer),)


def waits(stage: SiteStage) -> bool:
    """Whether a stage ends by itself, after the site's patience."""
    return isinstance(stage, Waiting)


def _timed(
    new: SiteStage, old: SiteStage, event: SiteEvent, now: float, patience: float
) -> SiteStage:
    """Every stage before exposure has its own patience; so has one that comes from a journal."""
    if not isinstance(new, Waiting) or (new is old and not isinstance(event, Restarted)):
        return new
    return replace(new, until=now + patience)
