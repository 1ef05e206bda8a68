"""The masks of a vector, as its site adds them and as the coordinator rebuilds those of a dropout (PROTOCOL P)."""

from fedcore.secagg.crypto.pairwise import (
    MaskRoot,
    open_offer,
    pair_secret,
    pair_seed,
    self_mask_seed,
)
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol.effects import Mask
from fedcore.secagg.protocol.messages import Keys
from fedcore.types import SiteId


def self_mask(secret: bytes, site: SiteId, header: RoundHeader, state_tag: bytes) -> Mask:
    """The mask that a site adds alone, from its 32-byte self-seed."""
    seed = self_mask_seed(secret, site=site, header=header.digest, state_tag=state_tag)
    return SecretBytes(seed), 1


def pair_mask(
    root: MaskRoot, mine: SiteId, peer: Keys, offer: bytes, header: RoundHeader, state_tag: bytes
) -> Mask:
    """The mask between `mine`, whose root is given, and a peer, with its sign in the vector of `mine`.

    The first of the pair in the roster adds it and offers its seed; offer: that of the peer, if it is the
    first. Raises EnvelopeRefused for an offer that does not open.
    """
    theirs, h = peer.site, header.digest
    first = header.place(mine) < header.place(theirs)
    if first:
        offered = pair_secret(root, sender=mine, recipient=theirs, header=h)
    else:
        offered = open_offer(root, offer, sender=theirs, recipient=mine, header=h)
    seed = pair_seed(
        root, peer.mask, offered, mine=mine, theirs=theirs, header=h, state_tag=state_tag
    )
    return SecretBytes(seed), 1 if first else -1
