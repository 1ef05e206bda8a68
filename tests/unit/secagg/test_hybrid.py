"""Hybrid key pairs and envelopes: who can open what, and public keys that are refused."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import replace

import pytest
from cryptography.exceptions import InvalidTag
from hypothesis import given
from hypothesis import strategies as st
from support import reference_keys as reference

from fedcore.errors import BadInput, EnvelopeRefused, KeyRefused
from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.crypto.hybrid import (
    CIPHERTEXT_BYTES,
    ENVELOPE_OVERHEAD,
    HybridKey,
    HybridPublic,
    encapsulate,
    open_envelope,
    seal_envelope,
)

OS = OsEntropy()
ANN, BOB, EVE = (HybridKey.draw(OS) for _ in range(3))
CONTEXT = b"round 7, from ann to bob"
TEXT = b"a key share of 33 bytes, or so..."

PRIME = 2**255 - 19
ORDER_8 = (
    325606250916557431795983626356110631294008115727848805560023387167927233504,
    39382357235489614581723060781553021112529911719440698176882885853963445705823,
)
"""The two u of order 8; -1 has order 4 on the twist, 1 on the curve, and 0 order 2 (RFC 7748's curve)."""
SMALL_ORDER = [0, 1, *ORDER_8, PRIME - 1]


def u_bytes(u: int) -> bytes:
    return u.to_bytes(32, "little")


SPELLINGS = {
    **{f"u{k}": u_bytes(u) for k, u in enumerate(SMALL_ORDER)},
    "p": u_bytes(PRIME),
    "p+1": u_bytes(PRIME + 1),
    **{f"u{k} with the high bit": u_bytes(u + 2**255) for k, u in enumerate(SMALL_ORDER)},
    "p with the high bit": u_bytes(PRIME + 2**255),
    "p+1 with the high bit": u_bytes(PRIME + 1 + 2**255),
}
"""Every encoding of every point of small order: decoding ignores the top bit and reduces mod p."""


class Recorded(OsEntropy):
    """The system's entropy, and what it gave."""

    def __init__(self) -> None:
        self.draws: list[bytes] = []
        self.encapsulations: list[tuple[bytes, bytes]] = []

    def draw(self, length: int) -> bytes:
        self.draws.append(super().draw(length))
        return self.draws[-1]

    def encapsulate(self, mlkem_public: bytes) -> tuple[bytes, bytes]:
        self.encapsulations.append(super().encapsulate(mlkem_public))
        return self.encapsulations[-1]


def seal(mine=ANN, theirs=BOB.public, text=TEXT, context=CONTEXT, entropy=OS) -> bytes:
    return seal_envelope(mine, theirs, text, context=context, recipient="bob", entropy=entropy)


def opened(sealed: bytes, mine=BOB, sender=ANN.public, context=CONTEXT) -> bytes:
    return open_envelope(mine, sender, sealed, context=context, sender="ann")


# ------------------------------------------------------------------------------------- envelopes


@given(text=st.binary(max_size=200), context=st.binary(max_size=80))
def test_what_is_sealed_opens(text, context):
    sealed = seal(text=text, context=context)
    assert len(sealed) == len(text) + ENVELOPE_OVERHEAD
    assert opened(sealed, context=context) == text


def test_an_envelope_has_the_documented_form():
    entropy = Recorded()
    sealed = seal(entropy=entropy)
    ((shared, ciphertext),) = entropy.encapsulations
    assert sealed[:CIPHERTEXT_BYTES] == ciphertext
    info = reference.info(
        b"envelope",
        ANN.public.x25519 + ANN.public.mlkem,
        BOB.public.x25519 + BOB.public.mlkem,
        ciphertext,
    )
    secret = ANN.agree(BOB.public.x25519, "bob") + shared
    key = reference.hkdf(secret, hashlib.sha256(CONTEXT).digest(), info)
    assert reference.open_box(key, sealed[CIPHERTEXT_BYTES:], CONTEXT) == TEXT
    with pytest.raises(InvalidTag):
        reference.open_box(key, sealed[CIPHERTEXT_BYTES:], b"")


def half_of_bob(secrets: bytes) -> HybridKey:
    """An attacker who has one of Bob's two secrets, and knows of course both of his public keys."""
    key = HybridKey.from_bytes(secrets)
    key.public = BOB.public
    return key


STRANGERS = {
    "another recipient": {"mine": EVE},
    "the sender itself, as if it came back": {"mine": ANN, "sender": BOB.public},
    "another sender's keys": {"sender": EVE.public},
    "another sender's X25519": {"sender": replace(ANN.public, x25519=EVE.public.x25519)},
    "another sender's ML-KEM": {"sender": replace(ANN.public, mlkem=EVE.public.mlkem)},
    "another context": {"context": b"round 8, from ann to bob"},
    "a longer context": {"context": CONTEXT + b"\x00"},
    "no context": {"context": b""},
    # One half of the recipient's secret is not enough, whichever it is.
    "X25519 alone": {"mine": half_of_bob(BOB.to_bytes()[:32] + EVE.to_bytes()[32:])},
    "ML-KEM alone": {"mine": half_of_bob(EVE.to_bytes()[:32] + BOB.to_bytes()[32:])},
}


@pytest.mark.parametrize("name", STRANGERS)
def test_nobody_else_opens_it(name):
    sealed = seal()
    assert opened(sealed) == TEXT
    with pytest.raises(EnvelopeRefused, match="does not open") as refused:
        opened(sealed, **STRANGERS[name])
    assert refused.value.fault == "ann"


@given(place=st.integers(0, ENVELOPE_OVERHEAD + len(TEXT) - 1), bit=st.integers(0, 7))
def test_one_flipped_bit_is_refused(place, bit):
    sealed = bytearray(seal())
    assert opened(bytes(sealed)) == TEXT
    sealed[place] ^= 1 << bit
    with pytest.raises(EnvelopeRefused):
        opened(bytes(sealed))


@pytest.mark.parametrize("length", [0, 1, 16, CIPHERTEXT_BYTES, ENVELOPE_OVERHEAD - 1, -1])
def test_a_truncated_envelope_is_refused(length):
    with pytest.raises(EnvelopeRefused) as refused:
        opened(seal()[:length])
    assert refused.value.fault == "ann"


def test_an_extended_envelope_is_refused():
    for extended in (seal() + b"\x00", b"\x00" + seal()):
        with pytest.raises(EnvelopeRefused):
            opened(extended)


def test_halves_of_two_envelopes_do_not_make_one():
    one, two = seal(), seal()
    assert opened(one) == opened(two) == TEXT
    with pytest.raises(EnvelopeRefused):
        opened(one[:CIPHERTEXT_BYTES] + two[CIPHERTEXT_BYTES:])


def test_equal_envelopes_never_show_that_they_are_equal():
    one, two = seal(), seal()
    assert one[:CIPHERTEXT_BYTES] != two[:CIPHERTEXT_BYTES]
    assert one[CIPHERTEXT_BYTES:] != two[CIPHERTEXT_BYTES:]


def test_sealing_to_a_bad_key_is_refused():
    for bad in (
        replace(BOB.public, x25519=u_bytes(1)),
        replace(BOB.public, x25519=b""),
        replace(BOB.public, mlkem=b"\xff" * 1184),
    ):
        with pytest.raises(KeyRefused) as refused:
            seal(theirs=bad)
        assert refused.value.fault == "bob"


def test_opening_from_a_small_order_key_is_refused():
    # With one, anybody would know the X25519 half of the key.
    with pytest.raises(KeyRefused) as refused:
        opened(seal(), sender=replace(ANN.public, x25519=u_bytes(PRIME - 1)))
    assert refused.value.fault == "ann"


# ----------------------------------------------------------------------------------- public keys


@given(x25519=st.binary(min_size=32, max_size=32), seed=st.binary(min_size=64, max_size=64))
def test_every_honest_key_passes(x25519, seed):
    HybridKey(x25519, seed).public.check("bob")


@pytest.mark.parametrize("name", SPELLINGS)
def test_no_spelling_of_a_small_order_point_passes(name):
    bad = replace(BOB.public, x25519=SPELLINGS[name])
    with pytest.raises(KeyRefused) as refused:
        bad.check("bob")
    assert refused.value.fault == "bob"
    # Even unchecked, no secret is ever agreed with one.
    with pytest.raises(KeyRefused, match="small order") as refused:
        ANN.agree(SPELLINGS[name], "bob")
    assert refused.value.fault == "bob"


@pytest.mark.parametrize("u", SMALL_ORDER)
def test_reduced_small_order_points_are_refused_for_their_order(u):
    with pytest.raises(KeyRefused, match="small order"):
        replace(BOB.public, x25519=u_bytes(u)).check("bob")


@pytest.mark.parametrize("u", [2, 3, 4, 5, 6, 7, 8, 9, PRIME - 2, PRIME - 3])
def test_small_numbers_that_are_points_of_large_order_pass(u):
    replace(BOB.public, x25519=u_bytes(u)).check("bob")


def test_a_second_spelling_of_a_key_is_refused():
    # A copy of another site's key would agree on the same secrets without looking like a copy.
    u = int.from_bytes(BOB.public.x25519, "little")
    copy = replace(BOB.public, x25519=u_bytes(u + 2**255))
    assert ANN.agree(copy.x25519, "bob") == ANN.agree(BOB.public.x25519, "bob")
    for other in (copy, replace(BOB.public, x25519=u_bytes(PRIME + 9))):
        with pytest.raises(KeyRefused, match="not reduced"):
            other.check("bob")
    replace(BOB.public, x25519=u_bytes(9)).check("bob")


def unreduced(mlkem: bytes) -> bytes:
    """The first coefficient (12 bits) raised to q = 3329."""
    return bytes([3329 & 0xFF, (mlkem[1] & 0xF0) | (3329 >> 8)]) + mlkem[2:]


def test_malformed_keys_are_refused():
    x25519, mlkem = BOB.public.x25519, BOB.public.mlkem
    BOB.public.check("bob")
    for bad in (
        HybridPublic(x25519[:-1], mlkem),
        HybridPublic(x25519 + b"\x00", mlkem),
        HybridPublic(b"", mlkem),
        HybridPublic(x25519, mlkem[:-1]),
        HybridPublic(x25519, mlkem + b"\x00"),
        HybridPublic(x25519, b""),
        HybridPublic(x25519, unreduced(mlkem)),
        HybridPublic(x25519, b"\xff" * len(mlkem)),
    ):
        with pytest.raises(KeyRefused) as refused:
            bad.check("bob")
        assert refused.value.fault == "bob"
    below = bytes([3328 & 0xFF, (mlkem[1] & 0xF0) | (3328 >> 8)]) + mlkem[2:]
    HybridPublic(x25519, below).check("bob")  # the control: q - 1 is fine


@pytest.mark.parametrize("length", [0, 31, 33])
def test_agreement_with_another_length_is_refused(length):
    with pytest.raises(KeyRefused, match=f"found {length} bytes") as refused:
        ANN.agree(bytes(length), "bob")
    assert refused.value.fault == "bob"


# --------------------------------------------------------------------------------------- the pair


def test_both_sides_agree_and_decapsulate_to_the_same():
    assert ANN.agree(BOB.public.x25519, "bob") == BOB.agree(ANN.public.x25519, "ann")
    assert ANN.agree(BOB.public.x25519, "bob") != ANN.agree(EVE.public.x25519, "eve")
    shared, ciphertext = encapsulate(BOB.public.mlkem, "bob", OS)
    assert BOB.decapsulate(ciphertext, "ann") == shared
    assert EVE.decapsulate(ciphertext, "ann") != shared  # implicit rejection, FIPS 203 section 6.3


@pytest.mark.parametrize("length", [0, 1087, 1089])
def test_a_ciphertext_of_another_length_is_refused(length):
    with pytest.raises(KeyRefused) as refused:
        BOB.decapsulate(bytes(length), "ann")
    assert refused.value.fault == "ann"


def test_encapsulating_to_a_bad_key_is_refused_by_name():
    for bad in (b"", BOB.public.mlkem[:-1], unreduced(BOB.public.mlkem)):
        with pytest.raises(KeyRefused) as refused:
            encapsulate(bad, "bob", OS)
        assert refused.value.fault == "bob"


def test_keys_are_what_entropy_gave_and_return_from_their_bytes():
    entropy = Recorded()
    key = HybridKey.draw(entropy)
    assert [len(one) for one in entropy.draws] == [32, 64]
    assert key.to_bytes() == b"".join(entropy.draws)
    again = HybridKey.from_bytes(key.to_bytes())
    assert again.public == key.public
    assert again.agree(BOB.public.x25519, "bob") == key.agree(BOB.public.x25519, "bob")
    assert opened(seal(mine=again), sender=key.public) == TEXT


@pytest.mark.parametrize("length", [0, 31, 32, 95, 97])
def test_bytes_that_are_no_pair(length):
    with pytest.raises(BadInput):
        HybridKey.from_bytes(bytes(length))
    with pytest.raises(BadInput):
        HybridKey(bytes(33), bytes(63))


def test_the_systems_entropy_is_fresh():
    assert len({OS.draw(32) for _ in range(50)}) == 50
    assert len(OS.draw(48)) == 48
    secrets, ciphertexts = zip(*(OS.encapsulate(BOB.public.mlkem) for _ in range(20)), strict=True)
    assert len(set(secrets)) == len(set(ciphertexts)) == 20


def test_a_pair_keeps_its_secrets_to_itself():
    assert repr(BOB) == "HybridKey(<redacted>)"
    for use in (lambda: BOB == ANN, lambda: hash(BOB), lambda: pickle.dumps(BOB)):
        with pytest.raises(TypeError):
            use()
