"""How a protection is carried out: a key epoch's payload, and what a site does with it.

The drivers, in one process or over a network, call this to carry out effects, so that the order of packing,
tag, masks, encryption and the checks of an opened sum is written once.

Invariant: nothing of a sum is returned before its tag was checked against exactly the listed survivors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from fedcore.errors import ReleaseRefused
from fedcore.secagg.crypto import Sealer, UnmaskableFold, bfv
from fedcore.secagg.crypto.bfv_chunks import BLOCKS_PER_CHUNK, SEEDED, sum_size, vector_size
from fedcore.secagg.crypto.entropy import Entropy
from fedcore.secagg.crypto.masked import MaskedFold, MaskedSealer
from fedcore.secagg.crypto.masking import add_masks, draw_salt, stream_key
from fedcore.secagg.crypto.sealed import open_checkpoint, open_notice, seal_checkpoint, seal_notice
from fedcore.secagg.crypto.sumtag import GroupSecret, SumTag, state_mac, state_tag
from fedcore.secagg.encode.bitpack import packed_size
from fedcore.secagg.encode.pack import Layout, Opened
from fedcore.secagg.plan import RoundHeader, RoundPlan
from fedcore.secagg.protocol import effects, messages
from fedcore.secagg.purposes import PURPOSES, purpose_of
from fedcore.store.container import VectorDigest
from fedcore.types import SiteId, Slots

Masks = tuple[tuple[bytes, int], ...]
"""(seed, sign) of the masks of one vector."""


@dataclass(frozen=True)
class EpochSecrets:
    """A site's secrets of one key epoch: the group secret, and the sealer that opens sums with it.

    streams: whether vectors travel under a keystream of G, and no sealer of a lattice.
    """

    group: GroupSecret
    sealer: Sealer
    streams: bool = False

    def tag(self, header: RoundHeader, state: bytes) -> bytes:
        """HMAC under G of a site's own state."""
        return state_tag(self.group, header.job, header.round, state)

    def put_tag(
        self, slots: Slots, layout: Layout, asked: effects.MakeVector, site: SiteId
    ) -> None:
        """The sum tag's share of this site, in place."""
        tag = SumTag(self.group, asked.header, asked.state_tag)
        layout.put_tag(slots, tag.tag(slots[: layout.tagged_slots], site))

    def prepare(self, slots: int) -> None:
        """Do now what a later vector of so many slots needs, and that depends neither on it nor on its round."""
        if isinstance(self.sealer, bfv.EncryptedSealer):
            self.sealer.prepare(slots)

    def protect(
        self,
        slots: Slots,
        layout: Layout,
        asked: effects.MakeVector,
        site: SiteId,
        entropy: Entropy,
    ) -> tuple[list[bytes], bytes]:
        """Masks, then encryption: the chunks of a tagged vector, and the salt of its keystream. The salt is
        drawn here, for this vector alone; b"" under another cipher. The slots are used up."""
        masks = revealed(asked.masks)
        salt = draw_salt(entropy) if self.streams else b""
        if self.streams:
            masks = (*masks, self.stream(asked.header, asked.state_tag, site, salt))
        add_masks(slots, masks, layout.packing.slot_bits)
        return list(self.sealer.protect(slots)), salt

    def stream(
        self, header: RoundHeader, tag: bytes, site: SiteId, salt: bytes
    ) -> tuple[bytes, int]:
        """The keystream of one vector, as a mask that was added to it. tag: the sites' state tag."""
        return stream_key(self.group, header.digest, tag, site, salt), 1

    def open(
        self, chunks: Iterable[bytes], layout: Layout, asked: effects.OpenSum
    ) -> tuple[Slots, Opened]:
        """The sum, once its tag holds. Raises TagRefused and ChunkRefused."""
        total, opened, _ = self.open_with_mac(chunks, layout, asked)
        return total, opened

    def open_with_mac(
        self, chunks: Iterable[bytes], layout: Layout, asked: effects.OpenSum
    ) -> tuple[Slots, Opened, bytes]:
        """`open`, and the `sum_mac` of what was opened. Tag and HMAC are computed of each chunk before the next one is
        asked for: while it comes."""
        tag = SumTag(self.group, asked.header, asked.state_tag)
        product, mac, seen = tag.product(), self.group.authenticator(b"sum"), 0
        mac.update(asked.header.digest)

        def take(slots: Slots) -> None:
            nonlocal seen
            product.take(slots[: max(0, layout.tagged_slots - seen)])
            mac.update(slots.tobytes())
            seen += len(slots)

        if isinstance(self.sealer, bfv.EncryptedSealer):
            total = self.sealer.open(chunks, layout.slots, take)
        else:
            total = self.sealer.open(chunks, layout.slots)
            if self.streams:
                self.take_off_streams(total, layout, asked)
            take(total)
        tagged = total[: layout.tagged_slots]
        tag.check(tagged, layout.read_tag(total), asked.survivors, product)
        places = [asked.header.place(each) for each in asked.survivors]
        return total, layout.unpack(total, places), mac.digest()

    def take_off_streams(self, total: Slots, layout: Layout, asked: effects.OpenSum) -> None:
        """Subtract the survivors' keystreams from their sum, in place, block by block."""
        streams = (
            self.stream(asked.header, asked.state_tag, site, salt)
            for site, salt in zip(asked.survivors, asked.salts, strict=True)
        )
        add_masks(total, [(key, -sign) for key, sign in streams], layout.packing.slot_bits)

    def sum_mac(self, header: RoundHeader, total: Slots) -> bytes:
        return self.group.authenticate(b"sum", header.digest + total.tobytes())

    def state_mac(self, header: RoundHeader, state: bytes) -> bytes:
        """HMAC under G of the state a release leads to."""
        return state_mac(self.group, header.digest, state)

    def seal_cause(
        self, error: Exception | str, header: RoundHeader, site: SiteId, entropy: Entropy
    ) -> bytes:
        """Why this site refuses, for the other sites; the coordinator carries it and cannot read it."""
        return seal_notice(self.group, str(error), header=header.digest, site=site, entropy=entropy)

    def read_notice(self, notice: messages.Notice) -> str:
        """The cause of another site's refusal. Raises EnvelopeRefused."""
        return open_notice(self.group, notice.sealed, header=notice.header, site=notice.site)

    def seal_state(
        self, state: bytes, certificate: messages.Certificate, entropy: Entropy
    ) -> bytes:
        """A released state, for sites that missed it."""
        header = certificate.header
        return seal_checkpoint(
            self.group, state, job=header.job, round_=header.round, certificate=certificate.hash,
            entropy=entropy,
        )  # fmt: skip

    def open_state(self, sealed: bytes, certificate: messages.Certificate) -> bytes:
        """The state of a certificate. Raises EnvelopeRefused."""
        header = certificate.header
        return open_checkpoint(
            self.group, sealed, job=header.job, round_=header.round, certificate=certificate.hash
        )


def revealed(masks: Iterable[effects.Mask]) -> Masks:
    """The seeds of masks in clear, to add or subtract the masks."""
    return tuple((seed.reveal(), sign) for seed, sign in masks)


def layout_of(plan: RoundPlan, features: int, purpose: str) -> Layout:
    """How the vectors of a round are packed, by the round's purpose."""
    return Layout(purpose_of(purpose).vector(plan, features), plan.packing, plan.per_round)


def announced(chunks: Iterable[bytes], asked: effects.OpenSum) -> Iterator[bytes]:
    """The chunks of a sum, as they come. Raises ReleaseRefused behind the last one for other bytes than the coordinator
    announced: whoever reads to the end uses nothing of another sum."""
    digest = VectorDigest()
    for chunk in chunks:
        digest.update(chunk)
        yield chunk
    if digest.digest() != asked.digest:
        other = "other bytes than announced"
        raise ReleaseRefused("sum", other, "the announced digest", messages.COORDINATOR)


def check_announced(chunks: Sequence[bytes], asked: effects.OpenSum) -> None:
    """Raise ReleaseRefused for other bytes than the coordinator announced."""
    for _ in announced(chunks, asked):
        pass


class Scheme:
    """Payloads, sealers and folds of one plan, by its cipher."""

    def __init__(self, plan: RoundPlan) -> None:
        self.plan = plan
        self._public: bfv.PublicContext | None = None
        self._courier: bfv.Courier | None = None
        if plan.packing.ring is not None:
            self._public, self._courier = bfv.PublicContext.of(plan.packing), bfv.Courier()

    @classmethod
    def of(cls, plan: RoundPlan) -> Scheme:
        return (plan.layers.scheme or cls)(plan)

    def make_payload(self) -> bytes:
        if self._public is None:
            return GroupSecret().to_bytes()
        return bfv.SecretContext(self._public).to_payload()

    def open_payload(self, payload: bytes, maker: SiteId) -> EpochSecrets:
        """A site's secrets and its sealer. Raises EnvelopeRefused, the maker's fault."""
        if self._public is None:
            group = GroupSecret.from_bytes(payload, sender=maker)
            sealer = MaskedSealer(self.plan.packing)
            return EpochSecrets(group, sealer, streams=bool(self.plan.salt_bytes))
        secret = bfv.SecretContext.from_payload(self._public, payload, sender=maker)
        return EpochSecrets(secret.group, bfv.EncryptedSealer(secret, self._courier))

    def upload_bytes(self, layout: Layout) -> int:
        """Bytes of every site's vector: a pure function, so any other size is refused."""
        return vector_bytes(layout, layout.sites)[0]

    def fold(self, slots: int) -> UnmaskableFold:
        if self._public is None:
            return MaskedFold(self.plan.packing, slots)
        short = slots <= BLOCKS_PER_CHUNK * self._public.ring.degree
        return bfv.EncryptedFold(self._public, slots, self._courier, seeds=short)


def vector_bytes(layout: Layout, sites: int) -> tuple[int, int]:
    """Bytes of one protected vector, and of the sum of so many: a pure function, for every protection."""
    ring = layout.packing.ring
    if ring is None:
        size = packed_size(layout.slots, layout.packing.slot_bits)
        return size, size
    return vector_size(ring, layout.slots, SEEDED), sum_size(ring, layout.slots, sites)


def vector_sizes(plan: RoundPlan, features: int) -> dict[str, int]:
    """Bytes of one protected vector, by purpose."""
    scheme = Scheme.of(plan)
    purposes = (name for name, each in PURPOSES.items() if each.rounds(plan, features))
    return {each: scheme.upload_bytes(layout_of(plan, features, each)) for each in purposes}
