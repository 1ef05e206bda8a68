"""How the fields of a sum sit in slots and ciphertexts, and the proof that no sum can go wrong.

Invariant (headroom): *n sites x largest field value < field modulus*, so no field of a sum ever wraps,
and *43 n + 1 < q / t*, so the decryption of a sum of n fresh ciphertexts is exact, always. Sums still
decrypt two to four bits beyond the second inequality (noise grows like sqrt(n) in practice), so no
test of results can find a solver that is too generous: only this file decides, by integer arithmetic.

One fresh symmetric ciphertext of SEAL carries noise of at most 21 (a centred binomial sampler) and a
rounding of at most 1/2; n of them, and one plaintext subtraction of at most 1/2, stay correct iff
`21.5 n + 0.5 < q / (2 t)`, which is the line above (PROTOCOL Headroom).
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from fractions import Fraction

from fedcore.errors import BadInput, PlanRefused
from fedcore.secagg import protections
from fedcore.secagg.protections import Protection, has_lattice
from fedcore.types import Json

SECURITY_TABLE = {1024: 27, 2048: 54, 4096: 109, 8192: 218}
"""log2 q allowed for 128-bit security with a ternary secret, per ring degree (SEAL's own table, the
HomomorphicEncryption.org standard, 2018). Asserted here whatever the library accepts."""

MAX_SLOT_BITS = 60
"""The sum tag multiplies slots in a 61-bit field, and SEAL's plain modulus ends at 60 bits."""

SEAL_PLAIN_MODULUS_BITS = 60
"""SEAL takes plain moduli of at most 60 bits; t = 2^s has s + 1 bits."""


@dataclass(frozen=True)
class Ring:
    """BFV's ciphertext ring: Z_q[x]/(x^degree + 1) with ONE prime q, so no key-switching material."""

    degree: int
    modulus: int

    def __post_init__(self) -> None:
        if self.modulus.bit_length() > SECURITY_TABLE.get(self.degree, 0):
            raise PlanRefused(
                f"ring: found degree {self.degree} with a {self.modulus.bit_length()}-bit modulus, "
                f"expected at most {SECURITY_TABLE.get(self.degree, 0)} bits for 128-bit security"
            )

    @property
    def modulus_bits(self) -> int:
        """Bits of one ciphertext coefficient on the wire."""
        return self.modulus.bit_length()

    def headroom(self, sites: int, slot_bits: int) -> tuple[int, int]:
        """(needed, available): decryption of a sum is exact iff `needed < available`. Both sides are
        multiplied by t, so the comparison is between integers."""
        return (43 * sites + 1) << slot_bits, self.modulus

    def proves(self, sites: int, slot_bits: int) -> bool:
        """True iff sums of `sites` fresh ciphertexts with t = 2^slot_bits always decrypt exactly."""
        needed, available = self.headroom(sites, slot_bits)
        return slot_bits < SEAL_PLAIN_MODULUS_BITS and needed < available


WIDE_DEGREE = 4096
"""The least degree under `lattice = "wide"`."""

RINGS = (
    # The largest primes = 1 mod 2N of 54 and 60 bits, which SEAL's CoeffModulus.Create also returns.
    Ring(2048, (1 << 54) - 77823),
    Ring(4096, (1 << 60) - 16383),
)


@dataclass(frozen=True)
class Packing:
    """How fields of a sum sit in slots: k fields of w bits in one slot of k w bits.

    bits: quantised bits b of one coordinate; max_sites: the n a sum may have.
    ring: None without a lattice, where a slot travels as itself or under masks and keystreams.
    Raises PlanRefused without a proof, in the solver and at a site that reads another's plan.
    """

    bits: int
    max_sites: int
    fields_per_slot: int
    ring: Ring | None

    def __post_init__(self) -> None:
        fits = 1 <= self.slot_bits <= MAX_SLOT_BITS
        if not fits or (self.ring and not self.ring.proves(self.max_sites, self.slot_bits)):
            raise PlanRefused(
                f"packing: found {self.fields_per_slot} fields of {self.field_width} bits in a slot "
                f"for {self.max_sites} sites, expected a slot that proves headroom",
                remedy="`fedcore plan` solves one",
            )

    @property
    def field_width(self) -> int:
        """w = b + ceil(log2 n): n values below 2^b always fit."""
        return field_width(self.bits, self.max_sites)

    @property
    def slot_bits(self) -> int:
        return self.field_width * self.fields_per_slot

    @property
    def slots_per_block(self) -> int:
        """Slots of one ciphertext; without a lattice the same grain, so canaries sit alike."""
        return self.ring.degree if self.ring else 2048

    @property
    def wire_bits(self) -> int:
        """Bits one slot costs on the way up."""
        return self.ring.modulus_bits if self.ring else self.slot_bits


def field_width(bits: int, max_sites: int) -> int:
    """w = b + ceil(log2 n), the bits a sum of n values below 2^b needs."""
    return bits + (max_sites - 1).bit_length()


def solve_packing(
    bits: int,
    max_sites: int,
    protection: str,
    fields: int | None = None,
    *,
    cipher: str = "bfv",
    lattice: str = "standard",
) -> Packing:
    """The cheapest packing that is proved, or a refusal that names the largest values that fit.

    fields: how many a vector will hold; a small one is cheapest in a small ring, since a ciphertext is
    computed whole, however few of its slots are sent. Without it the price of a long vector decides.
    lattice: "wide" allows rings of degree 4096 and more only. BFV at N = 2048 with 54 bits of modulus is at
    the edge of SECURITY_TABLE (classical 128 bits); 4096 with 60 bits has 49 bits of modulus to spare.
    bits in [2, 24]; raises BadInput outside it, UnknownName for an unknown protection, cipher or lattice,
    and PlanRefused where no ring proves headroom.
    """
    protections.refuse_unknown(protection)
    protections.refuse_cipher(protection, cipher, lattice)
    if not 2 <= bits <= 24:
        raise BadInput(f"protect.bits: found {bits}, expected 2 to 24")
    if max_sites < 1:
        raise BadInput(f"protect.max_sites: found {max_sites}, expected at least 1")
    rings = _rings(protection, cipher, lattice)
    found = _cheapest(bits, max_sites, rings, fields)
    if found is not None:
        return found
    fits = [b for b in range(2, bits) if _cheapest(b, max_sites, rings)]
    counts = range(1, 1 << 30)  # the more sites, the less fits
    sites = max(1, bisect_left(counts, True, key=lambda n: _cheapest(bits, n, rings) is None))
    raise PlanRefused(
        f"protect.bits: found {bits} bits for up to {max_sites} sites, but no ring proves headroom",
        remedy=(
            f"the largest that fit: {max(fits)} bits for {max_sites} sites, or " if fits else ""
        )
        + f"{sites} sites at {bits} bits",
    )


def _rings(protection: str, cipher: str, lattice: str) -> tuple[Ring | None, ...]:
    """The rings a packing may use; (None,) without a lattice, where only the width of fields counts."""
    if not has_lattice(protection, cipher):
        return (None,)
    return tuple(ring for ring in RINGS if lattice == "standard" or ring.degree >= WIDE_DEGREE)


def _cheapest(
    bits: int, max_sites: int, rings: tuple[Ring | None, ...], fields: int | None = None
) -> Packing | None:
    width = field_width(bits, max_sites)
    candidates = [
        Packing(bits, max_sites, k, ring)
        for ring in rings
        for k in range(1, MAX_SLOT_BITS // width + 1)
        if ring is None or ring.proves(max_sites, k * width)
    ]

    def price(packing: Packing) -> tuple[Fraction | int, int]:
        """Bits on the wire of a whole vector, or of one field of a long one; then the smaller ring."""
        k, degree = packing.fields_per_slot, packing.slots_per_block
        # Exact numbers, so that equal prices are equal.
        slots = -(-fields // (k * degree)) * degree if fields else Fraction(1, k)
        # A ciphertext costs the same however full; a masked slot costs 8 bytes of every keystream.
        # One bit for that prefers full slots, and outweighs the rounding up to a last block.
        mask = 0 if packing.ring else 1
        return slots * (packing.wire_bits + mask), degree

    return min(candidates, key=price, default=None)


def price_list(
    bits: int, protection: str, limit: int = 1024, *, cipher: str = "bfv", lattice: str = "standard"
) -> list[Json]:
    """Where the price jumps: for each range of roster sizes, fields per slot and bytes/parameter up. Ends at
    `limit` sites, or at the largest roster that the protection takes."""
    rows: list[Json] = []
    rings = _rings(protection, cipher, lattice)
    most = min(limit, protections.MAX_MASKED_SITES) if Protection.of(protection).masks else limit
    for n in range(protections.MIN_SITES, most + 1):
        packing = _cheapest(bits, n, rings)
        price: Json = {"fields_per_slot": None, "degree": None, "bytes_up_per_parameter": None}
        if packing is not None:
            k = packing.fields_per_slot
            price["fields_per_slot"] = k
            price["degree"] = packing.ring.degree if packing.ring else None
            price["bytes_up_per_parameter"] = round(packing.wire_bits / 8 / k, 3)
        if rows and rows[-1].items() >= price.items():
            rows[-1]["to_sites"] = n
        else:
            rows.append({"from_sites": n, "to_sites": n} | price)
    return rows
