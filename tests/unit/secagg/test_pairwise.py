"""Pair seeds, offers and self masks: equal at both sites, recoverable, and bound to all they belong to."""

from __future__ import annotations

import ast
import hashlib
import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import reference_keys as reference

import fedcore
from fedcore.errors import BadInput, EnvelopeRefused, KeyRefused
from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.crypto.hybrid import CIPHERTEXT_BYTES, HybridKey, HybridPublic
from fedcore.secagg.crypto.pairwise import (
    OFFER_BYTES,
    MaskRoot,
    make_offer,
    open_offer,
    pair_secret,
    pair_seed,
    self_mask_seed,
)
from fedcore.secagg.crypto.symmetric import Label, derive, framed

OS = OsEntropy()
HEADER, OTHER_HEADER = (hashlib.sha256(text).digest() for text in (b"round 7", b"round 8"))
STATE = b"state tag of round 7".ljust(32, b".")
ANN, BOB, CAT = (MaskRoot(name.ljust(32, b"-")) for name in (b"ann", b"bob", b"cat"))
R = bytes(range(32))


def offer(root=ANN, peer=BOB, sender="ann", recipient="bob", header=HEADER) -> tuple[bytes, bytes]:
    return make_offer(
        root,
        peer.keys.public.mlkem,
        sender=sender,
        recipient=recipient,
        header=header,
        entropy=OS,
    )


def opened(sealed, root=BOB, sender="ann", recipient="bob", header=HEADER) -> bytes:
    return open_offer(root, sealed, sender=sender, recipient=recipient, header=header)


def seed_of(
    root=ANN, peer=BOB, secret=R, mine="ann", theirs="bob", header=HEADER, state_tag=STATE
) -> bytes:
    return pair_seed(
        root,
        peer.keys.public if isinstance(peer, MaskRoot) else peer,
        secret,
        mine=mine,
        theirs=theirs,
        header=header,
        state_tag=state_tag,
    )


# ------------------------------------------------------------------------------ one seed, four ways


def test_both_sites_and_both_recoveries_have_one_seed():
    secret, sealed = offer()
    at_ann = seed_of(secret=secret)
    at_bob = seed_of(BOB, ANN, opened(sealed), mine="bob", theirs="ann")
    # Ann is gone: her root gives r again. Bob is gone: his root opens the kept offer (attack 5).
    ann_again, bob_again = MaskRoot(ANN.to_bytes()), MaskRoot(BOB.to_bytes())
    names = {"sender": "ann", "recipient": "bob", "header": HEADER}
    without_ann = seed_of(ann_again, secret=pair_secret(ann_again, **names))
    without_bob = seed_of(
        bob_again, ANN, open_offer(bob_again, sealed, **names), mine="bob", theirs="ann"
    )
    assert at_ann == at_bob == without_ann == without_bob
    assert len(at_ann) == 32


def test_the_seed_of_a_pair_is_the_documented_one():
    ids = (b"ann", b"bob")
    keys = [root.keys.public for root in (ANN, BOB)]
    info = reference.info(b"pair seed", *ids, *(k.x25519 + k.mlkem for k in keys), STATE)
    shared = ANN.keys.agree(keys[1].x25519, "bob")
    assert seed_of() == reference.hkdf(shared + R, HEADER, info)


def test_roots_offers_and_self_masks_are_the_documented_ones():
    root = ANN.to_bytes()
    pair = HybridKey(
        reference.hkdf(root, b"", reference.info(b"mask x25519")),
        reference.hkdf(root, b"", reference.info(b"mask mlkem"), 64),
    )
    assert ANN.keys.to_bytes() == pair.to_bytes()
    rho = reference.hkdf(root, b"", reference.info(b"offer root"))
    assert ANN.offer_secret == rho
    secret, sealed = offer()
    assert secret == reference.hkdf(rho, HEADER, reference.info(b"offered value", b"ann", b"bob"))

    ciphertext, box = sealed[:CIPHERTEXT_BYTES], sealed[CIPHERTEXT_BYTES:]
    info = reference.info(b"offer box", b"ann", b"bob", BOB.keys.public.mlkem, ciphertext)
    key = reference.hkdf(BOB.keys.decapsulate(ciphertext, "ann"), HEADER, info)
    assert reference.open_box(key, box, b"") == secret

    found = self_mask_seed(R, site="ann", header=HEADER, state_tag=STATE)
    assert found == reference.hkdf(R, HEADER, reference.info(b"self mask", b"ann", STATE))


# -------------------------------------------------------------------------- what a seed depends on

SEEDS = {
    "as it is": {},
    "ids swapped": {"mine": "bob", "theirs": "ann"},
    "another header": {"header": OTHER_HEADER},
    "another state": {"state_tag": STATE[:-1] + b"!"},
    "no state": {"state_tag": b""},
    "another r": {"secret": R[:-1] + b"!"},
    "another peer": {"peer": CAT},
    "another root": {"root": CAT},
    "another peer's id": {"theirs": "cat"},
    "another id of mine": {"mine": "cat"},
    "the peer with another ML-KEM key": {
        "peer": HybridPublic(BOB.keys.public.x25519, CAT.keys.public.mlkem)
    },
    "id borders moved": {"mine": "an", "theirs": "nbob"},
}


def test_a_seed_changes_with_everything_it_is_made_from():
    seeds = {name: seed_of(**change) for name, change in SEEDS.items()}
    assert len(set(seeds.values())) == len(SEEDS)
    assert seed_of() == seeds["as it is"]


def test_a_copied_key_under_another_id_shares_no_seed():
    # Cat announces Bob's mask keys as hers: she gets no seed of Bob's, even if she knew r.
    assert seed_of(theirs="bob") != seed_of(theirs="cat")


SECRETS = {
    "as it is": {},
    "another recipient": {"recipient": "cat"},
    "another sender": {"sender": "cat"},
    "direction swapped": {"sender": "bob", "recipient": "ann"},
    "another header": {"header": OTHER_HEADER},
    "id borders moved": {"sender": "an", "recipient": "nbob"},
    "another root": {"root": CAT},
}


def test_an_offered_value_changes_with_everything_it_is_made_from():
    usual = {"root": ANN, "sender": "ann", "recipient": "bob", "header": HEADER}

    def secret(change) -> bytes:
        arguments = usual | change
        return pair_secret(arguments.pop("root"), **arguments)

    assert len({secret(change) for change in SECRETS.values()}) == len(SECRETS)


@given(ids=st.lists(st.text(max_size=5), min_size=2, max_size=2))
def test_the_order_in_which_ids_are_given_does_not_matter_to_the_two_sides(ids):
    one, two = ids
    assert seed_of(mine=one, theirs=two) == seed_of(BOB, ANN, mine=two, theirs=one)


SELF_MASKS = {
    "as it is": {},
    "another site": {"site": "bob"},
    "another header": {"header": OTHER_HEADER},
    "another state": {"state_tag": STATE[:-1] + b"!"},
    "no state": {"state_tag": b""},
    "border moved": {"site": "an", "state_tag": b"n" + STATE},
    "another seed": {"self_seed": R[::-1]},
}


def test_a_self_mask_changes_with_everything_it_is_made_from():
    usual = {"self_seed": R, "site": "ann", "header": HEADER, "state_tag": STATE}

    def found(change) -> bytes:
        arguments = usual | change
        return self_mask_seed(arguments.pop("self_seed"), **arguments)

    assert len({found(change) for change in SELF_MASKS.values()}) == len(SELF_MASKS)


def test_what_comes_of_one_root_is_pairwise_different():
    secret, _ = offer()
    x25519, mlkem = ANN.keys.to_bytes()[:32], ANN.keys.to_bytes()[32:]
    parts = (ANN.to_bytes(), x25519, mlkem[:32], mlkem[32:], ANN.offer_secret, secret, seed_of())
    assert len(set(parts)) == len(parts)


def test_a_small_order_peer_is_refused():
    with pytest.raises(KeyRefused) as refused:
        seed_of(peer=HybridPublic(bytes(32), BOB.keys.public.mlkem))
    assert refused.value.fault == "bob"


# ----------------------------------------------------------------------------------------- offers

STRANGERS = {
    "another recipient": {"root": CAT},
    "another recipient's id": {"recipient": "cat"},
    "another sender's id": {"sender": "cat"},
    "direction swapped": {"sender": "bob", "recipient": "ann"},
    "another header": {"header": OTHER_HEADER},
    "id borders moved": {"sender": "an", "recipient": "nbob"},
    "the sender": {"root": ANN},
}


@pytest.mark.parametrize("name", STRANGERS)
def test_an_offer_opens_nowhere_else(name):
    secret, sealed = offer()
    assert len(sealed) == OFFER_BYTES
    assert opened(sealed) == secret
    with pytest.raises(EnvelopeRefused, match="does not open") as refused:
        opened(sealed, **STRANGERS[name])
    assert refused.value.fault == STRANGERS[name].get("sender", "ann")


@given(place=st.integers(0, OFFER_BYTES - 1), bit=st.integers(0, 7))
def test_one_flipped_bit_of_an_offer_is_refused(place, bit):
    sealed = bytearray(offer()[1])
    sealed[place] ^= 1 << bit
    with pytest.raises(EnvelopeRefused):
        opened(bytes(sealed))


@pytest.mark.parametrize("length", [0, 16, CIPHERTEXT_BYTES, OFFER_BYTES - 1, OFFER_BYTES + 1])
def test_an_offer_of_another_length_is_refused(length):
    sealed = offer()[1].ljust(length, b"\x00")[:length]
    with pytest.raises(EnvelopeRefused, match=f"{length} bytes") as refused:
        opened(sealed)
    assert refused.value.fault == "ann"


def test_an_offer_to_a_bad_key_is_refused():
    for bad in (b"", b"\xff" * 1184):
        with pytest.raises(KeyRefused) as refused:
            make_offer(ANN, bad, sender="ann", recipient="bob", header=HEADER, entropy=OS)
        assert refused.value.fault == "bob"


def test_offers_of_one_value_are_fresh():
    (one, sealed), (two, again) = offer(), offer()
    assert one == two
    assert sealed[:CIPHERTEXT_BYTES] != again[:CIPHERTEXT_BYTES]
    assert sealed[CIPHERTEXT_BYTES:] != again[CIPHERTEXT_BYTES:]


# ------------------------------------------------------------------------------------------ roots


def test_a_rebuilt_root_is_checked_by_its_public_keys():
    assert MaskRoot(ANN.to_bytes()).keys.public == ANN.keys.public
    for place in range(32):
        wrong = bytearray(ANN.to_bytes())
        wrong[place] ^= 1
        public = MaskRoot(bytes(wrong)).keys.public
        assert public.x25519 != ANN.keys.public.x25519
        assert public.mlkem != ANN.keys.public.mlkem


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_root_of_another_length(length):
    with pytest.raises(BadInput):
        MaskRoot(bytes(length))


def test_a_root_keeps_its_secret_to_itself():
    assert repr(ANN) == "MaskRoot(<redacted>)"
    for use in (lambda: ANN == BOB, lambda: hash(ANN), lambda: pickle.dumps(ANN)):
        with pytest.raises(TypeError):
            use()


# ----------------------------------------------------------------------------------------- labels


def test_every_label_stands_in_the_code_once_and_no_two_are_equal():
    assert len({label.value for label in Label}) == len(Label.__members__)
    uses = [
        node.attr
        for path in Path(fedcore.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "Label"
    ]
    assert sorted(uses) == sorted(Label.__members__)


def test_every_label_gives_another_key():
    assert len({derive(R, label, b"part", salt=HEADER) for label in Label}) == len(Label)


@given(st.lists(st.lists(st.binary(max_size=4), max_size=4), min_size=2, max_size=2))
def test_framing_never_makes_two_lists_equal(lists):
    one, two = lists
    assert (framed(*one) == framed(*two)) == (one == two)


def test_framing_tells_borders_and_empty_parts():
    assert len({framed(*parts) for parts in ((), (b"",), (b"", b""), (b"ab",), (b"a", b"b"))}) == 5
