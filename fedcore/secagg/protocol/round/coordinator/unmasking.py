"""The masks that are still in a sum, rebuilt from the survivors' key shares (PROTOCOL P)."""

import hashlib

from fedcore.errors import ShareRefused
from fedcore.secagg.crypto import shamir
from fedcore.secagg.crypto.pairwise import MaskRoot
from fedcore.secagg.protocol.effects import Mask
from fedcore.secagg.protocol.messages import Keys, survivors_of
from fedcore.secagg.protocol.round.coordinator.stages import Unmasking
from fedcore.secagg.protocol.round.coordinator.taking import parcels_of
from fedcore.secagg.protocol.round.masks import pair_mask, self_mask
from fedcore.types import SiteId


def rebuild_masks(stage: Unmasking) -> tuple[Mask, ...]:
    """Every mask that is still in the sum: the survivors' self masks, and the pairwise masks between a
    survivor and a site that shared and then dropped.

    Raises ShareRefused where what is rebuilt is not what its owner advertised.
    """
    header = stage.header
    survivors = survivors_of(stage.submissions)
    public = {keys.site: keys for keys in stage.bundle}
    shares: dict[SiteId, dict[int, bytes]] = {}
    for unmask in stage.answers:
        for answer in unmask.answers:
            shares.setdefault(answer.of, {})[header.place(unmask.site) + 1] = answer.share
    masks: list[Mask] = []
    parcels = parcels_of(stage.shares)
    for site, points in shares.items():
        secret = shamir.combine(points, header.threshold, owner=site)
        if site in survivors:
            _check_self_seed(secret, public[site])
            masks.append(self_mask(secret, site, header, public[site].state_tag))
            continue
        root = _checked_root(secret, public[site])
        for other in survivors:
            peer, offer = public[other], parcels[other, site].offer
            seed, sign = pair_mask(root, site, peer, offer, header, peer.state_tag)
            masks.append((seed, -sign))  # as the survivor added it
    return tuple(masks)


def _check_self_seed(secret: bytes, keys: Keys) -> None:
    if hashlib.sha256(secret).digest() != keys.self_seed_hash:
        raise ShareRefused(
            "rebuilt self-seed", "another one", "the one its site committed to", keys.site
        )


def _checked_root(secret: bytes, keys: Keys) -> MaskRoot:
    root = MaskRoot(secret)
    if root.keys.public != keys.mask:
        raise ShareRefused(
            "rebuilt mask root", "one of other keys", "the advertised mask keys", keys.site
        )
    return root
