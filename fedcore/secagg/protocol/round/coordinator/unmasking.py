"""The masks that are still in a sum, rebuilt from the survivors' key shares (PROTOCOL P)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from fedcore.errors import (
    ShareRefused,
)
from fedcore.secagg.crypto import shamir
from fedcore.secagg.crypto.pairwise import (
    MaskRoot,
    open_offer,
    pair_secret,
    pair_seed,
    self_mask_seed,
)
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol.effects import (
    Mask,
)
from fedcore.secagg.protocol.messages import (
    Keys,
    Parcel,
)
from fedcore.secagg.protocol.round.coordinator.stages import Unmasking
from fedcore.secagg.protocol.round.coordinator.taking import parcels_of
from fedcore.secagg.protocol.shared import (
    survivors_of,
)
from fedcore.types import SiteId


def rebuild_masks(stage: Unmasking) -> tuple[Mask, ...]:
    """Every mask that is still in the sum: the survivors' self masks, and the pairwise masks between
    a survivor and a site that shared and then dropped. Raises ShareRefused where what is rebuilt is
    not what its owner advertised."""
    header = stage.header
    survivors = survivors_of(stage.submissions)
    public = {keys.site: keys for keys in stage.bundle}
    shares: dict[SiteId, dict[int, bytes]] = {}
    for unmask in stage.answers:
        for answer in unmask.answers:
            shares.setdefault(answer.of, {})[header.place(unmask.site) + 1] = answer.share
    masks: list[Mask] = []
    offers = parcels_of(stage.shares)
    for site, points in shares.items():
        secret = shamir.combine(points, header.threshold, owner=site)
        if site in survivors:
            masks.append(_self_mask(secret, public[site], header))
        else:
            root = _checked_root(secret, public[site])
            masks += [_pairwise(root, site, other, stage, public, offers) for other in survivors]
    return tuple(masks)


def _self_mask(secret: bytes, keys: Keys, header: RoundHeader) -> Mask:
    if hashlib.sha256(secret).digest() != keys.self_seed_hash:
        raise ShareRefused(
            "rebuilt self-seed", found="another one", expected="the one its site committed to",
            fault=keys.site,
        )  # fmt: skip
    seed = self_mask_seed(secret, site=keys.site, header=header.digest, state_tag=keys.state_tag)
    return SecretBytes(seed), 1


def _checked_root(secret: bytes, keys: Keys) -> MaskRoot:
    root = MaskRoot(secret)
    if root.keys.public != keys.mask:
        raise ShareRefused(
            "rebuilt mask root", found="one of other keys", expected="the advertised mask keys",
            fault=keys.site,
        )  # fmt: skip
    return root


def _pairwise(
    root: MaskRoot,
    dropped: SiteId,
    survivor: SiteId,
    stage: Unmasking,
    public: Mapping[SiteId, Keys],
    parcels: Mapping[tuple[SiteId, SiteId], Parcel],
) -> Mask:
    """The mask between a dropout and a survivor, with the sign it has in the survivor's vector."""
    header = stage.header
    lower = header.place(survivor) < header.place(dropped)
    if lower:
        offer = parcels[survivor, dropped].offer
        offered = open_offer(root, offer, sender=survivor, recipient=dropped, header=header.digest)
    else:
        offered = pair_secret(root, sender=dropped, recipient=survivor, header=header.digest)
    seed = pair_seed(
        root, public[survivor].mask, offered, mine=dropped, theirs=survivor, header=header.digest,
        state_tag=public[survivor].state_tag,
    )  # fmt: skip
    return SecretBytes(seed), 1 if lower else -1
