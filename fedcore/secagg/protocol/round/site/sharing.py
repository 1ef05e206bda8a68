"""Keys and shares: a site shares its secrets of the round and agrees on its masks (PROTOCOL P, C)."""

from collections.abc import Sequence

from fedcore.errors import KeyRefused, ShareRefused
from fedcore.secagg.crypto import shamir
from fedcore.secagg.crypto.hybrid import HybridKey, open_envelope, seal_envelope
from fedcore.secagg.crypto.pairwise import MaskRoot, make_offer, pair_mask, self_mask
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol import checks, messages
from fedcore.secagg.protocol.effects import MakeVector, Mask
from fedcore.secagg.protocol.messages import COORDINATOR, MASK_ROOT, SELF_SEED, share_digest, sign
from fedcore.secagg.protocol.round.site import entries, stages
from fedcore.secagg.protocol.round.site.entries import SiteMove
from fedcore.secagg.protocol.round.site.events import SiteParams
from fedcore.secagg.protocol.round.site.stages import exchange
from fedcore.secagg.protocol.wire_form import digest, encode, encode_message
from fedcore.types import SiteId


def share_secrets(
    move: SiteMove, stage: stages.Advertised, bundle: messages.KeyBundle, *, sent: bool = False
) -> None:
    """Check the key bundle (U1); split and seal both secrets for each of its sites, once. sent: that was ahead."""
    _check_bundle(move.member, stage, bundle)
    if stage.sealed is None:
        own, shares = make_shares(move.member, stage.header, stage.secrets, bundle.keys)
    else:
        _check_sealed(stage.sealed, bundle)
        own, shares = stage.sealed.own, stage.sealed.shares
    move.record(entries.SharesMade(bundle.keys, own, shares, exchange(bundle, shares)))
    if not sent:
        move.send(shares)


def make_shares(
    member: SiteParams,
    header: RoundHeader,
    secrets: stages.Secrets,
    bundle: Sequence[messages.PublicKeys],
) -> tuple[stages.HeldShares, messages.Shares]:
    """Split both secrets of a round, and seal a share of each for every site of the bundle.

    Returns the shares that this site keeps of its own, and the message with the others.
    """
    count, draw = len(header.roster), member.entropy.draw
    self_shares, root_shares = (
        shamir.split(secret.reveal(), header.threshold, count, draw)
        for secret in (secrets.self_seed, secrets.root)
    )
    pairs = list(zip(self_shares, root_shares, strict=True))
    channel, root = secrets.keys
    parcels = tuple(
        _parcel(member, header, keys, pairs[header.place(keys.site)], channel, root)
        for keys in bundle
    )
    listed = tuple((parcel.recipient, digest(parcel)) for parcel in parcels)
    head = sign(messages.SharesHead(header.digest, member.id, listed, b""), member.identity)
    own = stages.HeldShares(member.id, *map(SecretBytes, pairs[header.place(member.id)]))
    return own, messages.Shares(head, parcels)


def _check_sealed(sealed: stages.SealedAhead, bundle: messages.KeyBundle) -> None:
    """Shares were sealed ahead for these very keys: secrets are split once, and each share can be opened."""
    for keys, before in zip(bundle.keys, sealed.bundle, strict=False):
        if (keys.site, keys.public) != (before.site, before.public):
            raise KeyRefused(
                "key bundle", f"other public keys of {keys.site!r}", "those that shares are sealed for",
                keys.site,
            )  # fmt: skip
    if len(bundle.keys) != len(sealed.bundle):
        raise KeyRefused(
            "key bundle", f"{len(bundle.keys)} sites", f"the {len(sealed.bundle)} that shares are sealed for",
            COORDINATOR,
        )  # fmt: skip


def _check_bundle(member: SiteParams, stage: stages.Advertised, bundle: messages.KeyBundle) -> None:
    header = stage.header
    checks.of_round(bundle.header, header, COORDINATOR)
    names = [keys.site for keys in bundle.keys]
    checks.members(names, header.roster, header.threshold, "key bundle", member.id)
    for keys in bundle.keys:
        if keys.site != member.id:
            checks.keys(keys, header, member.pins)
        elif keys != stage.keys:
            raise KeyRefused("key bundle", "other keys for this site", "those it sent", COORDINATOR)
    public = [(keys.site, each) for keys in bundle.keys for each in keys.public]
    checks.distinct(public, "key bundle")
    checks.same_state(bundle.keys, stage.state_tag, stage.standing.key_id)


def _context(header: RoundHeader, sender: SiteId, recipient: SiteId) -> bytes:
    """What an envelope is bound to: version, h, and who writes to whom."""
    return encode(("fedcore/1 shares", header.digest, sender, recipient))


def _parcel(
    member: SiteParams,
    header: RoundHeader,
    keys: messages.PublicKeys,
    shares: tuple[bytes, bytes],
    channel: HybridKey,
    root: MaskRoot,
) -> messages.Parcel:
    """shares: of the self-seed and of the mask root, for the owner of `keys`."""
    mine, to, h, entropy = member.id, keys.site, header.digest, member.entropy
    digests = (
        share_digest(h, mine, to, SELF_SEED, shares[0]),
        share_digest(h, mine, to, MASK_ROOT, shares[1]),
    )
    if to == mine:
        return _written(messages.Parcel(mine, to, b"", b"", *digests))
    envelope = seal_envelope(
        channel, keys.channel, b"".join(shares), context=_context(header, mine, to), recipient=to,
        entropy=entropy,
    )  # fmt: skip
    offer = b""
    if header.place(mine) < header.place(to):
        _, offer = make_offer(
            root, keys.mask.mlkem, sender=mine, recipient=to, header=h, entropy=entropy
        )
    return _written(messages.Parcel(mine, to, envelope, offer, *digests))


def _written(parcel: messages.Parcel) -> messages.Parcel:
    """The parcel with its byte form: it is hashed, journalled and sent."""
    encode_message(parcel)
    return parcel


def open_shares(move: SiteMove, stage: stages.Shared, delivery: messages.Delivery) -> None:
    """Check U2 and its parcels; keep the others' key shares and agree on the masks."""
    member, header = move.member, stage.header
    checks.of_round(delivery.header, header, COORDINATOR)
    joined = [keys.site for keys in stage.bundle]
    cohort = tuple(head.site for head in delivery.heads)
    checks.members(cohort, joined, header.threshold, "shares", member.id)
    if [parcel.sender for parcel in delivery.parcels] != list(cohort):
        raise ShareRefused(
            "parcels", f"{len(delivery.parcels)} that do not match the heads",
            f"one of each of {len(cohort)} sites", COORDINATOR,
        )  # fmt: skip
    channel, root = stage.secrets.keys
    self_seed = stage.secrets.self_seed.reveal()
    held, masks = [stage.own], [self_mask(self_seed, member.id, header, stage.state_tag)]
    for head, parcel in zip(delivery.heads, delivery.parcels, strict=True):
        _check_parcel(member, stage, head, parcel, joined)
        if head.site != member.id:
            held.append(_open_parcel(member, stage, parcel, channel))
            masks.append(_pairwise_mask(member, stage, parcel, root))
    move.record(entries.DeliveryOpened(cohort, tuple(held), tuple(masks), exchange(delivery)))
    move.do(MakeVector(header, stage.state_tag, tuple(masks)))


def _check_parcel(
    member: SiteParams,
    stage: stages.Shared,
    head: messages.SharesHead,
    parcel: messages.Parcel,
    joined: Sequence[SiteId],
) -> None:
    checks.head(head, stage.header, member.pins, joined)
    if parcel.recipient != member.id or digest(parcel) != dict(head.parcels)[member.id]:
        raise ShareRefused(
            "parcel", "other bytes than its sender signed", "the signed parcel", COORDINATOR
        )


def _keys_of(stage: stages.Shared, site: SiteId) -> messages.Keys:
    return next(keys for keys in stage.bundle if keys.site == site)


def _open_parcel(
    member: SiteParams, stage: stages.Shared, parcel: messages.Parcel, channel: HybridKey
) -> stages.HeldShares:
    """Both key shares of a sender, checked against the digests it signed."""
    header, sender = stage.header, parcel.sender
    plain = open_envelope(
        channel, _keys_of(stage, sender).channel, parcel.envelope,
        context=_context(header, sender, member.id), sender=sender,
    )  # fmt: skip
    parts = plain[: shamir.SHARE_BYTES], plain[shamir.SHARE_BYTES :]
    for share, kind in zip(parts, (SELF_SEED, MASK_ROOT), strict=True):
        checks.share(header.digest, parcel, kind, share, sender)
    return stages.HeldShares(sender, *map(SecretBytes, parts))


def _pairwise_mask(
    member: SiteParams, stage: stages.Shared, parcel: messages.Parcel, root: MaskRoot
) -> Mask:
    """The mask shared with the sender of a parcel, whose offer must be from the first of the pair."""
    header, peer = stage.header, parcel.sender
    if bool(parcel.offer) == (header.place(member.id) < header.place(peer)):
        raise ShareRefused(
            "pair-seed offer", "one" if parcel.offer else "none",
            "one from the first of the pair only", peer,
        )  # fmt: skip
    pair, keys = (member.id, peer), _keys_of(stage, peer)
    return pair_mask(root, pair, keys.mask, parcel.offer, header, stage.state_tag)
