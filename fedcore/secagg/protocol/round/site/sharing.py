"""Keys and shares: a site shares its secrets of the round and agrees on its masks (PROTOCOL P, C)."""

from __future__ import annotations

from fedcore.errors import (
    KeyRefused,
    ShareRefused,
)
from fedcore.secagg.crypto import shamir
from fedcore.secagg.crypto.hybrid import HybridKey, open_envelope, seal_envelope
from fedcore.secagg.crypto.pairwise import (
    MaskRoot,
    make_offer,
    open_offer,
    pair_secret,
    pair_seed,
    self_mask_seed,
)
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol.effects import (
    MakeVector,
)
from fedcore.secagg.protocol.messages import (
    COORDINATOR,
    MASK_ROOT,
    SELF_SEED,
    Delivery,
    KeyBundle,
    Keys,
    Parcel,
    Shares,
    SharesHead,
    check_signature,
    sign,
)
from fedcore.secagg.protocol.round.site.events import SiteParams
from fedcore.secagg.protocol.round.site.journal import DeliveryOpened, SharesMade, SiteMove
from fedcore.secagg.protocol.round.site.stages import Advertised, HeldShares, Shared
from fedcore.secagg.protocol.shared import (
    check_distinct,
    check_header,
    check_keys,
    check_members,
    check_same_state,
    exchange,
    refuse_missing,
    share_digest,
)
from fedcore.secagg.protocol.wire_form import digest, encode
from fedcore.types import SiteId


def share_secrets(move: SiteMove, stage: Advertised, bundle: KeyBundle) -> None:
    """Check the key bundle (U1); split and seal both secrets for each of its sites."""
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


def open_shares(move: SiteMove, stage: Shared, delivery: Delivery) -> None:
    """Check U2 and its parcels; keep the others' key shares and agree on the masks."""
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
