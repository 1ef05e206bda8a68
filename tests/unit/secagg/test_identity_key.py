"""Identities: what a signature speaks for, and rosters whose keys are refused."""

from __future__ import annotations

import pickle

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import BadInput, RosterRefused, SignatureRefused
from fedcore.secagg.crypto import identity_key
from fedcore.secagg.crypto.identity_key import IdentityKey, roster_digest, verify

ANN, BOB = IdentityKey(bytes(range(32))), IdentityKey(bytes(range(1, 33)))
PRIME = 2**255 - 19

# ------------------------------------------------------------------------------------- signatures


@given(label=st.binary(max_size=12), message=st.binary(max_size=80))
def test_what_is_signed_verifies(label, message):
    label = label.replace(b"\x00", b"")
    signature = ANN.sign(label, message)
    assert len(signature) == 64
    verify(ANN.public, label, message, signature, signer="ann")


def test_the_signed_bytes_are_the_documented_ones():
    raw = Ed25519PublicKey.from_public_bytes(ANN.public)
    raw.verify(ANN.sign(b"keys", b"message"), b"fedcore/1 keys\x00message")


SIGNED = ANN.sign(b"keys", b"h and more")
FORGED = {
    "another key": (BOB.public, b"keys", b"h and more", SIGNED),
    "another label": (ANN.public, b"shares", b"h and more", SIGNED),
    "another message": (ANN.public, b"keys", b"h and mare", SIGNED),
    "a longer message": (ANN.public, b"keys", b"h and more.", SIGNED),
    "border moved": (ANN.public, b"key", b"s\x00h and more", SIGNED),
    "no label": (ANN.public, b"", b"keys\x00h and more", SIGNED),
    "a flipped bit": (ANN.public, b"keys", b"h and more", bytes([SIGNED[0] ^ 1]) + SIGNED[1:]),
    "a short signature": (ANN.public, b"keys", b"h and more", SIGNED[:-1]),
    "no signature": (ANN.public, b"keys", b"h and more", b""),
    "zeros": (ANN.public, b"keys", b"h and more", bytes(64)),
    "a short key": (ANN.public[:-1], b"keys", b"h and more", SIGNED),
    "no key": (b"", b"keys", b"h and more", SIGNED),
}


@pytest.mark.parametrize("name", FORGED)
def test_nothing_else_verifies(name):
    verify(ANN.public, b"keys", b"h and more", SIGNED, signer="ann")
    with pytest.raises(SignatureRefused) as refused:
        verify(*FORGED[name], signer="ann")
    assert refused.value.fault == "ann"


def test_border_of_label_and_message_without_the_separator_would_be_ambiguous():
    assert ANN.sign(b"a", b"b") != ANN.sign(b"ab", b"")
    with pytest.raises(BadInput, match="zero byte"):
        ANN.sign(b"a\x00b", b"c")
    with pytest.raises(BadInput, match="zero byte"):
        verify(ANN.public, b"a\x00b", b"c", ANN.sign(b"a", b"b\x00c"), signer="ann")


def test_identities_are_drawn_from_the_system_unless_given():
    assert len({IdentityKey().public for _ in range(20)}) == 20
    assert IdentityKey(bytes(range(32))).public == ANN.public
    for length in (0, 31, 33):
        with pytest.raises(BadInput, match=f"{length} bytes"):
            IdentityKey(bytes(length))


def test_an_identity_keeps_its_secret_to_itself():
    assert repr(ANN) == "IdentityKey(<redacted>)"
    for use in (lambda: ANN == BOB, lambda: hash(ANN), lambda: pickle.dumps(ANN)):
        with pytest.raises(TypeError):
            use()


# -------------------------------------------------------------------------------------- the roster


def test_a_roster_digest_changes_with_every_id_key_and_place():
    a, b = ANN.public, BOB.public
    rosters = [
        {},
        {"ann": a},
        {"ann": b},
        {"ann": a, "bob": b},
        {"bob": b, "ann": a},
        {"ann": b, "bob": a},
        {"ann": a, "bobo": b},
        {"an": a, "bob": b},
    ]
    digests = [roster_digest(roster) for roster in rosters]
    assert len(set(digests)) == len(rosters)
    assert all(len(bytes.fromhex(one)) == 32 for one in digests)
    assert roster_digest({"ann": bytes(a), "bob": bytes(b)}) == digests[3]


def test_a_roster_digest_frames_ids_and_keys():
    # Without lengths, one site whose id swallows a key would have the digest of two sites.
    two = {"ann": b"k" * 32, "bob": b"l" * 32}
    one = {"ann" + "k" * 32 + "bob": b"l" * 32}
    assert roster_digest(two) != roster_digest(one)


REFUSED = {
    "no key": ("bob", b"", "0 bytes"),
    "a short key": ("bob", BOB.public[:-1], "31 bytes"),
    "a long key": ("bob", BOB.public + b"\x00", "33 bytes"),
    "another site's key": ("bob", ANN.public, "the key of ann"),
    "p": ("bob", PRIME.to_bytes(32, "little"), "not reduced"),
    "the largest coordinate": ("bob", b"\xff" * 32, "not reduced"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_rosters(name):
    site, key, found = REFUSED[name]
    roster_digest({"ann": ANN.public, site: BOB.public})
    with pytest.raises(RosterRefused, match=found) as refused:
        roster_digest({"ann": ANN.public, site: key})
    assert refused.value.fault == site


def test_the_list_of_small_order_points_is_whole():
    # x^2 = -y^2 makes a point double to y = 0, which has order 4; on the curve that is the equation.
    d = -121665 * pow(121666, -1, PRIME) % PRIME
    y = identity_key._Y_OF_ORDER_8
    assert (d * y**4 + 2 * y**2 - 1) % PRIME == 0
    # One, minus one, two with y = 0 and four of order 8 are all eight.
    assert {1, PRIME - 1, 0, y, PRIME - y} == identity_key._SMALL_ORDER_Y


@pytest.mark.parametrize("sign", [0, 1])
@pytest.mark.parametrize("y", sorted(identity_key._SMALL_ORDER_Y))
def test_small_order_identities_are_refused(y, sign):
    with pytest.raises(RosterRefused, match="small order"):
        roster_digest({"ann": ANN.public, "bob": (y + (sign << 255)).to_bytes(32, "little")})


def test_what_a_small_order_identity_could_do():
    # The control of the refusal: under the neutral element one signature is good for every message.
    neutral = (1).to_bytes(32, "little")
    signature = neutral + bytes(32)
    for message in (b"survivors: ann, bob", b"survivors: ann, cat"):
        verify(neutral, b"confirm", message, signature, signer="eve")
