"""What each party held of ONE site's update in a round, measured on that round's own messages.

Three parties follow the protocol and keep what they get: the coordinator, another site, and both
together. Each reads the named site's upload as far as it can open it, and what the sum gives away:
the sum less another site's own vector is the mean of the rest. The same vectors sent under `plain`
stand beside that. A reading is compared with the update, coordinate by coordinate.

Invariant: the reading code is given what the party has and nothing of the update; a reading that
opens the upload equals it in every coordinate, so its correlation is 1 and not almost 1.
A measurement and no proof: these readings fail, that every other fails is the protocol's argument;
what a coordinator that breaks the protocol can do stands in the label (PROTOCOL L).
"""

import math
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore.results import PartyView, Reading, UpdateExposure
from fedcore.secagg.crypto import Sealer
from fedcore.secagg.crypto.masking import mask_sum
from fedcore.secagg.crypto.plain import PlainSealer
from fedcore.secagg.encode.bitpack import packed_size, unpack_words
from fedcore.secagg.encode.pack import Layout
from fedcore.secagg.packing import Packing
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.scheme import Masks
from fedcore.secagg.summing import RoundTrace
from fedcore.types import SiteId, Slots

COORDINATOR, SITE, BOTH = PARTIES = ("coordinator", "another site", "both together")

DRAWN = 96
"""Coordinates of a strip: as many bars as half a page can show."""

ONE_IN_1000 = 3.29
"""Two-sided normal quantile: |z| beyond it has probability 1/1000. Not 2 (1 in 20): a report holds
several readings, and a false alarm in every fifth report would teach readers to ignore a true one."""


def watch_one(roster: Sequence[SiteId], absent: Container[SiteId]) -> RoundTrace | None:
    """A trace of the first site that stays to the end of a round, as the next one that does sees it; None if
    there are not two. absent: sites that leave the round at some stage."""
    staying = [index for index, site in enumerate(roster) if site not in absent]
    return RoundTrace(staying[0], staying[1]) if len(staying) > 1 else None


def observe(
    trace: RoundTrace, plan: RoundPlan, sealer: Sealer, training_round: int
) -> UpdateExposure:
    """What each party held of the target's update in a round that has ended.

    trace: of that round. sealer: the other site's, which opens what the sites' shared key opens.
    """
    layout, slots = trace.layout, trace.slots
    assert layout is not None
    assert slots is not None
    size, sites = layout.spec.coordinates, len(trace.survivors)
    fields = layout.fields_of(slots)[:size]
    update, under = _Update(fields, layout), held(trace, plan, sealer)
    under_plain = PlainSealer(plan.packing)
    unprotected = layout.fields_of(under_plain.open(under_plain.protect(slots), layout.slots))
    without = {
        COORDINATOR: InHand(unprotected[:size], sum_of(trace) / sites),
        SITE: under[SITE],
        BOTH: InHand(unprotected[:size], under[BOTH].mean),
    }

    return UpdateExposure(
        site=plan.sites[trace.target],
        other=plan.sites[trace.other],
        round=training_round,
        protection=plan.protection,
        coordinates=size,
        contributors=sites,
        chance=chance(size),
        strip=update.strip(fields),
        own=correlation(fields, _fields(trace, trace.other_slots)),
        parties={name: update.seen(view) for name, view in under.items()},
        plain={name: update.seen(view) for name, view in without.items()},
    )


@dataclass(frozen=True)
class InHand:
    """What one party has of the target's update, (d,) fields each: its upload as the party reads it, and the mean over
    the sites whose sum it has, the target among them. None where it has nothing to read."""

    upload: NDArray[np.uint64] | None
    mean: NDArray[np.float64] | None


def held(trace: RoundTrace, plan: RoundPlan, sealer: Sealer) -> dict[str, InHand]:
    """{party: what it has} of a round that has ended; the arguments are those of `observe`."""
    layout = trace.layout
    assert layout is not None
    sites, total = len(trace.survivors), sum_of(trace)
    others = (total - _fields(trace, trace.other_slots)) / (sites - 1)
    size = layout.spec.coordinates
    coordinator, both = (
        layout.fields_of(slots)[:size] for slots in _uploads(trace, plan.packing, sealer, layout)
    )
    return {
        COORDINATOR: InHand(coordinator, None if plan.layers.encrypts else total / sites),
        SITE: InHand(None, others),
        BOTH: InHand(both, others),
    }


def sum_of(trace: RoundTrace) -> NDArray[np.uint64]:
    """(d,) fields of the round's opened sum."""
    return _fields(trace, trace.total)


def _fields(trace: RoundTrace, slots: Slots | None) -> NDArray[np.uint64]:
    assert trace.layout is not None
    assert slots is not None
    return trace.layout.fields_of(slots)[: trace.layout.spec.coordinates]


def _uploads(
    trace: RoundTrace, packing: Packing, sealer: Sealer, layout: Layout
) -> tuple[Slots, Slots]:
    """The target's upload as slots, as the coordinator reads it with the masks it has rebuilt, and as it does with
    the other site, whose masks and keystream it then has too."""
    upload, rebuilt = trace.upload, trace.masks_among(trace.rebuilt_masks)
    either = (*trace.masks_among(trace.rebuilt_masks, trace.other_masks), *trace.stream)
    if packing.ring is not None:
        coordinator = ciphertext_as_slots(packing, upload, layout.slots)
        together = _decrypt(packing, sealer, upload, layout)
    else:
        together = sealer.open(upload, layout.slots)
        coordinator = _unmask(together, rebuilt, packing)
    return coordinator, _unmask(together, either, packing)


def ciphertext_as_slots(packing: Packing, upload: Sequence[bytes], slots: int) -> Slots:
    """(S,) uint64: the words of the ciphertexts' first polynomials, scaled from mod q to mod t.

    All that depends on the slots is in those words, and a ciphertext whose key is 0 reads as its
    slots this way (`words = slots * q / t + noise`). slots: S.
    """
    from fedcore.secagg.crypto.bfv_chunks import BLOCKS_PER_CHUNK

    ring, bits = packing.ring, packing.slot_bits
    assert ring is not None
    parts, left = [], slots
    for chunk in upload:
        count = min(BLOCKS_PER_CHUNK * ring.degree, left)
        tail = memoryview(chunk)[-packed_size(count, ring.modulus_bits) :]
        # Python integers: a product of 60 by 52 bits fits no machine word.
        words = unpack_words(tail, ring.modulus_bits, count).astype(object)
        scaled = ((words << bits) + ring.modulus // 2) // ring.modulus
        parts.append((scaled & ((1 << bits) - 1)).astype(np.uint64))
        left -= count
    return np.concatenate(parts)


def _decrypt(packing: Packing, sealer: Sealer, upload: Sequence[bytes], layout: Layout) -> Slots:
    """What a coordinator and a site with the shared key get: a "sum" of this one upload, opened."""
    from fedcore.secagg.crypto.bfv import EncryptedFold, PublicContext

    fold = EncryptedFold(PublicContext.of(packing), layout.slots)
    for index, chunk in enumerate(upload):
        fold.add(index, chunk)
    return sealer.open(fold.total(), layout.slots)


def _unmask(slots: Slots, masks: Masks, packing: Packing) -> Slots:
    """Take the known masks off, in the slot ring."""
    known = mask_sum(masks, len(slots), packing.slot_bits)
    return (slots - known) & np.uint64((1 << packing.slot_bits) - 1)


@dataclass(frozen=True)
class _Update:
    """The target's (d,) fields, which readings are compared with."""

    fields: NDArray[np.uint64]
    layout: Layout

    def seen(self, view: InHand) -> PartyView:
        """One party's readings of the upload as it opens it, and of the sum."""
        size, opened, rest = len(self.fields), view.upload, view.mean
        message, from_sum = self._reading(opened), self._reading(rest)
        tells = message is not None and (from_sum is None or tells_more_than_chance(message, size))
        best, values = (message, opened) if tells else (from_sum, rest)
        if best is not None and values is not None:
            best = replace(best, strip=self.strip(values))
        return PartyView(message, from_sum, best)

    def _reading(self, values: NDArray[Any] | None) -> Reading | None:
        if values is None:
            return None
        exact = float(np.mean(values == self.fields)) if len(values) else 1.0
        return Reading(correlation(self.fields, values), exact)

    def strip(self, values: NDArray[Any]) -> tuple[int, ...]:
        """The first coordinates about their zero, in per cent of the largest of them."""
        packing = self.layout.packing
        drawn = values[:DRAWN].astype(np.float64)
        # An update's zero is the offset; noise over the whole field has its middle elsewhere.
        zero = 1 << (packing.bits - 1)
        if drawn.max(initial=0) > 2 * zero:
            zero = 1 << (packing.field_width - 1)
        drawn -= zero
        largest = float(np.abs(drawn).max(initial=0.0)) or 1.0
        return tuple(int(value) for value in np.rint(100 * drawn / largest))


def tells_more_than_chance(reading: Reading, coordinates: int) -> bool:
    """Whether a reading of an upload is the update, or resembles it more than unrelated values do."""
    found = reading.correlation
    return reading.exact == 1 or (found is not None and abs(found) > chance(coordinates))


def correlation(one: NDArray[Any], other: NDArray[Any]) -> float | None:
    """Pearson's, in [-1, 1] and 1.0 for equal vectors; None where either does not vary."""
    if not len(one):
        return None
    x, y = (v.astype(np.float64) - v.mean(dtype=np.float64) for v in (one, other))
    # As one root of a product: for equal vectors it is exactly their product with themselves.
    scale = math.sqrt(float(x @ x) * float(y @ y))
    return None if scale == 0 else max(-1.0, min(1.0, float(x @ y) / scale))


def chance(coordinates: int) -> float:
    """What |correlation| of unrelated values stays below, but for one reading in 1000.

    Fisher's z: atanh(r) has standard deviation 1 / sqrt(d - 3), about 3.3 / sqrt(d) in all; below
    four coordinates every correlation is chance.
    """
    return math.tanh(ONE_IN_1000 / math.sqrt(coordinates - 3)) if coordinates > 3 else 1.0
