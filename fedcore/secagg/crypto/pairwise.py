"""Seeds of pairwise masks and of the self mask, so that a dropped site's can be made again (PROTOCOL P, S).

Per round a site draws a mask root. Of it come the mask key pair and rho; of rho one secret r for every
peer it makes an offer to, sealed to the peer's ML-KEM mask key. The seed of a pair is
`HKDF(X25519 || r, salt h, info ids, both mask keys, state tag)`.
Invariant: the seed of a pair follows from either side's root, the other's public keys and the offer, and
needs no third site; another header, peer, direction, key or state gives an unrelated one.
X25519 alone would fall to a later quantum computer; r alone rests on ML-KEM. Double masks: Bonawitz et al.
2017 (ePrint 2017/281), section 4. `protocol/` decides which roots may be rebuilt, and when.
"""

from functools import cached_property

from fedcore.errors import BadInput, EnvelopeRefused
from fedcore.secagg.crypto import hybrid, symmetric
from fedcore.secagg.crypto.entropy import Entropy
from fedcore.secagg.crypto.hybrid import HybridKey, HybridPublic, encapsulate
from fedcore.secagg.crypto.secret import Secret, SecretBytes
from fedcore.secagg.crypto.shared_work import keep, shared
from fedcore.secagg.crypto.symmetric import Label, derive, open_box, seal_box
from fedcore.secagg.plan import RoundHeader
from fedcore.types import SiteId

ROOT_BYTES = 32
OFFER_BYTES = hybrid.CIPHERTEXT_BYTES + symmetric.KEY_BYTES + symmetric.BOX_OVERHEAD


class MaskRoot(Secret):
    """The 32 bytes behind all pairwise masks of one site in one round. Prints redacted."""

    def __init__(self, root: bytes) -> None:
        """Raises BadInput for another length."""
        if len(root) != ROOT_BYTES:
            raise BadInput(f"mask root: found {len(root)} bytes, expected {ROOT_BYTES}")
        self._root = root

    @cached_property
    def keys(self) -> HybridKey:
        """The mask key pair: the same from a rebuilt root, so the coordinator checks a root by it."""
        return shared((MaskRoot, self._root), self._make_keys)

    def _make_keys(self) -> HybridKey:
        return HybridKey(
            derive(self._root, Label.MASK_X25519),
            derive(self._root, Label.MASK_MLKEM, length=hybrid.MLKEM_SEED_BYTES),
        )

    @cached_property
    def offer_secret(self) -> bytes:
        """rho: 32 bytes."""
        return derive(self._root, Label.OFFER_ROOT)

    def to_bytes(self) -> bytes:
        """32 bytes of secret, for the key shares and the journal only."""
        return self._root


def pair_secret(root: MaskRoot, *, sender: SiteId, recipient: SiteId, header: bytes) -> bytes:
    """r of the pair, 32 bytes, from the root of the site that made the offer. header: h."""
    ids = sender.encode(), recipient.encode()
    return shared(
        (pair_secret, root.keys.public, ids, header),
        lambda: derive(root.offer_secret, Label.OFFERED, *ids, salt=header),
    )


def make_offer(
    root: MaskRoot,
    peer_mask_mlkem: bytes,
    *,
    sender: SiteId,
    recipient: SiteId,
    header: bytes,
    entropy: Entropy,
) -> tuple[bytes, bytes]:
    """(r, offer): r sealed to the recipient's mask key, 1088 + 48 bytes. Raises KeyRefused. The offer can be
    opened again once the recipient's root is rebuilt."""
    secret = pair_secret(root, sender=sender, recipient=recipient, header=header)
    encapsulated, ciphertext = encapsulate(peer_mask_mlkem, recipient, entropy)
    key = _offer_key(encapsulated, peer_mask_mlkem, ciphertext, sender, recipient, header)
    offer = ciphertext + seal_box(key, secret, b"")
    keep((_opened_offer, peer_mask_mlkem, offer, sender, recipient, header), secret)
    return secret, offer


def open_offer(
    root: MaskRoot, offer: bytes, *, sender: SiteId, recipient: SiteId, header: bytes
) -> bytes:
    """r of the pair, from the recipient's root. Raises EnvelopeRefused."""
    if len(offer) != OFFER_BYTES:
        found, expected = f"{len(offer)} bytes", f"{OFFER_BYTES} bytes"
        raise EnvelopeRefused(f"mask offer from {sender}", found, expected, sender)
    of = root.keys.public.mlkem, offer, sender, recipient, header
    return shared((_opened_offer, *of), lambda: _opened_offer(root, *of[1:]))


def _opened_offer(
    root: MaskRoot, offer: bytes, sender: SiteId, recipient: SiteId, header: bytes
) -> bytes:
    ciphertext, box = offer[: hybrid.CIPHERTEXT_BYTES], offer[hybrid.CIPHERTEXT_BYTES :]
    secret = root.keys.decapsulate(ciphertext, sender)
    key = _offer_key(secret, root.keys.public.mlkem, ciphertext, sender, recipient, header)
    return open_box(key, box, b"", sender=sender)


def _offer_key(
    encapsulated: bytes,
    mlkem: bytes,
    ciphertext: bytes,
    sender: SiteId,
    recipient: SiteId,
    header: bytes,
) -> bytes:
    # All that an offer belongs to is in its key, so its box needs no further context.
    ids = (sender.encode(), recipient.encode())
    return derive(encapsulated, Label.OFFER_BOX, *ids, mlkem, ciphertext, salt=header)


def pair_seed(
    root: MaskRoot,
    peer: HybridPublic,
    secret: bytes,
    *,
    mine: SiteId,
    theirs: SiteId,
    header: bytes,
    state_tag: bytes,
) -> bytes:
    """k of the pair, 32 bytes: the same at both sites, and from either one's rebuilt root.

    peer: the other's mask keys, already checked; secret: r, made or opened. state_tag: this site's own,
    never an announced one, so that sites with different models fail to cancel. Raises KeyRefused.
    """
    own = root.keys.public
    # Ordered by id, so that both sides hash the same bytes.
    (first, first_keys), (second, second_keys) = sorted(
        ((mine, own.to_bytes()), (theirs, peer.to_bytes()))
    )
    parts = (first.encode(), second.encode(), first_keys, second_keys, state_tag)

    def make() -> bytes:
        agreed = root.keys.agree(peer.x25519, theirs) + secret
        return derive(agreed, Label.PAIR_SEED, *parts, salt=header)

    return shared((pair_seed, parts, secret, header), make)


def self_mask_seed(self_seed: bytes, *, site: SiteId, header: bytes, state_tag: bytes) -> bytes:
    """What is expanded into the self mask, 32 bytes; self_seed: what the site shared."""
    return derive(self_seed, Label.SELF_MASK, site.encode(), state_tag, salt=header)


def self_mask(
    secret: bytes, site: SiteId, header: RoundHeader, state_tag: bytes
) -> tuple[SecretBytes, int]:
    """(seed, sign) of the mask that a site adds alone, from its 32-byte self-seed."""
    seed = self_mask_seed(secret, site=site, header=header.digest, state_tag=state_tag)
    return SecretBytes(seed), 1


def pair_mask(
    root: MaskRoot, pair: tuple[SiteId, SiteId], peer: HybridPublic, offer: bytes,
    header: RoundHeader, state_tag: bytes,
) -> tuple[SecretBytes, int]:  # fmt: skip
    """(seed, sign) of the mask of a pair, in the vector of its one site, whose root is given.

    pair: that site, and its peer. The first of the two in the roster adds it and offers its seed; offer: that of
    the peer, if it is the first. Raises EnvelopeRefused for an offer that does not open.
    """
    (mine, theirs), h = pair, header.digest
    first = header.place(mine) < header.place(theirs)
    if first:
        offered = pair_secret(root, sender=mine, recipient=theirs, header=h)
    else:
        offered = open_offer(root, offer, sender=theirs, recipient=mine, header=h)
    seed = pair_seed(root, peer, offered, mine=mine, theirs=theirs, header=h, state_tag=state_tag)
    return SecretBytes(seed), 1 if first else -1
