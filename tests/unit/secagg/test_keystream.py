"""The cipher `keystream` by itself: what a stream key is made of, fresh salts, exact sums, no lattice."""

from __future__ import annotations

import hmac
import os
import struct
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from support.plans import round_plan

from fedcore.errors import TagRefused
from fedcore.learning.stopwatch import Stopwatch
from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.crypto.masking import draw_salt, mask_sum, stream_key
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.crypto.sumtag import GroupSecret
from fedcore.secagg.encode.pack import Layout
from fedcore.secagg.in_process import InProcessFederation
from fedcore.secagg.packing import solve_packing
from fedcore.secagg.plan import RoundHeader, VectorSpec, Wide
from fedcore.secagg.protocol import effects, messages
from fedcore.secagg.scheme import Scheme
from fedcore.secagg.summing import one_by_one

ROSTER = ("ann", "bob", "cat", "dan")
SPEC = VectorSpec("update", 9000, (Wide("weight", 1, 20),))
STATE_TAG = b"\x07" * 32


class Fixed:
    """Entropy that always draws the same: the control of everything that must be fresh."""

    def draw(self, length):
        return b"\x05" * length


class Party:
    """The sites of one plan: their secrets of one key epoch, a header, and what they are asked."""

    def __init__(self, protection="encrypted", sites=ROSTER, spec=SPEC):
        self.plan = round_plan(sites, protection, cipher="keystream", parameters=spec.coordinates)
        self.scheme = Scheme(self.plan)
        self.secrets = self.scheme.open_payload(self.scheme.make_payload(), sites[0])
        self.layout = Layout(spec, self.plan.packing, len(sites))
        self.header = RoundHeader(
            "f", "job", 1, 1, 1, "update", sites, "pins", self.plan.threshold, protection,
            self.plan.digest,
        )  # fmt: skip

    def asked(self, masks=()):
        sealed = tuple((SecretBytes(seed), sign) for seed, sign in masks)
        return effects.MakeVector(self.header, STATE_TAG, sealed)

    def slots(self, site, seed=0):
        values = np.random.default_rng([seed, self.plan.sites.index(site)])
        fields = values.integers(0, 1 << 16, self.layout.spec.coordinates, dtype=np.uint64)
        slots = self.layout.pack(fields, {"weight": [7]}, self.plan.sites.index(site))
        self.secrets.put_tag(slots, self.layout, self.asked(), site)
        return slots

    def vector(self, site, entropy=None, slots=None, masks=()):
        """(chunks, salt) of one site."""
        slots = self.slots(site) if slots is None else slots.copy()
        return self.secrets.protect(
            slots, self.layout, self.asked(masks), site, entropy or OsEntropy()
        )

    def fold(self, vectors):
        fold = self.scheme.fold(self.layout.slots)
        for chunks in vectors:
            for index, chunk in enumerate(chunks):
                fold.add(index, chunk)
        return fold

    def open(self, chunks, salts):
        """salts: {site: salt} of the survivors."""
        asked = effects.OpenSum(self.header, tuple(salts), tuple(salts.values()), STATE_TAG, b"", 0)
        return self.secrets.open(chunks, self.layout, asked)

    def words(self, chunks):
        return self.secrets.sealer.open(chunks, self.layout.slots)


def by_hand(group, header, state_tag, site, salt, count, bits):
    """The stream from RFC 5869's HMACs and one AES-256-CTR call, in plain Python."""
    parts = [b"fedcore/1", b"keystream", site.encode(), state_tag, salt]
    info = b"".join(struct.pack("<I", len(part)) + part for part in parts)
    prk = hmac.digest(header, group, "sha256")
    key = hmac.digest(prk, info + b"\x01", "sha256")
    made = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor().update(bytes(8 * count))
    return [word & ((1 << bits) - 1) for word in struct.unpack(f"<{count}Q", made)]


def test_a_vector_is_its_slots_plus_the_stream_of_its_salt():
    party = Party()
    slots = party.slots("bob")
    chunks, salt = party.vector("bob", slots=slots)
    bits = party.plan.packing.slot_bits
    group = party.secrets.group.to_bytes()
    stream = by_hand(group, party.header.digest, STATE_TAG, "bob", salt, len(slots), bits)
    expected = [(int(v) + s) % (1 << bits) for v, s in zip(slots, stream, strict=True)]
    assert party.words(chunks).tolist() == expected


@pytest.mark.parametrize("survivors", [ROSTER, ROSTER[:3], ROSTER[1:]])
@pytest.mark.parametrize("protection", ["encrypted", "layered"])
def test_the_opened_sum_is_the_plain_sum_of_the_survivors(protection, survivors):
    party = Party(protection)
    mask = os.urandom(32)  # what the coordinator takes off the sum in a round of `layered`
    laid = {survivors[0]: ((mask, 1),)} if protection == "layered" else {}
    vectors = {site: party.vector(site, masks=laid.get(site, ())) for site in survivors}
    fold = party.fold(chunks for chunks, _ in vectors.values())
    if laid:
        fold.remove(mask_sum([(mask, 1)], party.layout.slots, party.plan.packing.slot_bits))
    total, opened = party.open(fold.total(), {site: salt for site, (_, salt) in vectors.items()})
    assert np.array_equal(total, sum(party.slots(site) for site in survivors))
    assert opened.wides == {"weight": [7 * len(survivors)]}


def test_the_coordinator_s_sum_is_uniform_without_the_streams():
    party = Party()
    total = party.words(party.fold(party.vector(site)[0] for site in ROSTER).total())
    share = [(total >> np.uint64(b) & np.uint64(1)).mean() for b in range(54)]
    assert all(0.45 < s < 0.55 for s in share)


# ------------------------------------------------------------------------------------ the key


@pytest.mark.parametrize("what", ["group", "header", "state_tag", "site", "salt"])
def test_every_part_of_a_stream_key_counts(what):
    parts = {
        "group": GroupSecret(bytes(32)), "header": bytes(32), "state_tag": bytes(32), "site": "ann",
        "salt": bytes(32),
    }  # fmt: skip
    other = GroupSecret(b"\x01" + bytes(31)) if what == "group" else (
        "bob" if what == "site" else b"\x01" + bytes(31)
    )  # fmt: skip
    assert stream_key(**parts) == stream_key(**parts)
    assert stream_key(**parts) != stream_key(**parts | {what: other})
    assert len(stream_key(**parts)) == 32


def test_no_other_key_of_the_group_secret_is_a_stream_key():
    """`GroupSecret.derive` takes words as info, `derive_labelled` framed parts: even with the same bytes
    behind the prefix they differ."""
    group, salt = GroupSecret(bytes(32)), bytes(32)
    key = stream_key(group, bytes(32), bytes(32), "ann", salt)
    framed = b"\x09\0\0\0fedcore/1\x09\0\0\0keystream\x03\0\0\0ann\x20\0\0\0" + bytes(32)
    for info in (framed, framed + b"\x20\0\0\0" + salt, b"keystream", b"keystream ann"):
        assert group.derive(bytes(32), info, 32) != key


# ---------------------------------------------------------------------------------- fresh salts


def difference(party, one, other):
    bits = np.uint64((1 << party.plan.packing.slot_bits) - 1)
    return (party.words(one) - party.words(other)) & bits


def test_two_vectors_under_one_header_have_unrelated_streams():
    """A site that makes a vector of the same round again gives nothing away. The control: under a fixed
    salt the difference of the two vectors is that of their slots, without any key."""
    party = Party()
    first, second = party.slots("ann", 1), party.slots("ann", 2)
    plain = (first - second) & np.uint64((1 << party.plan.packing.slot_bits) - 1)
    (one, salt), (other, again) = (party.vector("ann", slots=s) for s in (first, second))
    assert salt != again and len(salt) == len(again) == 32
    assert np.mean(difference(party, one, other) == plain) < 0.01

    (one, _), (other, _) = (party.vector("ann", Fixed(), s) for s in (first, second))
    assert np.array_equal(difference(party, one, other), plain), "control: a reused salt"


def test_the_same_slots_twice_are_two_vectors():
    party = Party()
    (one, _), (other, _) = party.vector("ann"), party.vector("ann")
    assert np.mean(difference(party, one, other) == 0) < 0.01


def test_a_salt_is_drawn_for_every_vector_and_comes_from_entropy_alone():
    class Counted:
        drawn = 0

        def draw(self, length):
            self.drawn += length
            return OsEntropy().draw(length)

    party, entropy = Party(), Counted()
    salts = [party.vector("ann", entropy)[1] for _ in range(5)]
    assert entropy.drawn == 5 * 32 and len(set(salts)) == 5
    assert draw_salt(Fixed()) == b"\x05" * 32


def test_the_same_job_twice_sends_other_salts_each_round():
    """Seeds of a run never reach `protect/` (PROTOCOL Z): every vector of two equal jobs has its own."""
    salts = []

    def keep(_, message):
        if isinstance(message, messages.Submit):
            salts.append(message.salt)

    for _ in range(2):
        party = Party()
        epoch = InProcessFederation("job", party.plan)
        epoch.tap, fields = keep, np.zeros(SPEC.coordinates, dtype=np.uint64)
        for round_ in (1, 1, 2):  # one of training twice
            epoch.sum(
                SPEC,
                round_,
                one_by_one(lambda _, fields=fields: (fields, {"weight": [1]})),
                b"model",
                Stopwatch(),
            )
    assert len(salts) == len(set(salts)) == 2 * 3 * len(ROSTER)
    assert {len(salt) for salt in salts} == {32}


# --------------------------------------------------------------------------------- refused sums


def test_a_wrong_or_swapped_salt_does_not_open():
    party = Party()
    vectors = {site: party.vector(site) for site in ROSTER}
    salts = {site: salt for site, (_, salt) in vectors.items()}
    released = list(party.fold(chunks for chunks, _ in vectors.values()).total())
    swapped = salts | {"ann": salts["bob"], "bob": salts["ann"]}
    for wrong in (swapped, salts | {"ann": bytes(32)}, {s: salts[s] for s in ROSTER[:3]}):
        with pytest.raises(TagRefused):
            party.open(iter(released), wrong)
    party.open(iter(released), salts)


def test_a_salt_too_few_is_no_sum():
    party = Party()
    asked = effects.OpenSum(party.header, ROSTER, (bytes(32),) * 3, STATE_TAG, b"", 0)
    released = party.fold(party.vector(site)[0] for site in ROSTER).total()
    with pytest.raises(ValueError, match="zip"):
        party.secrets.open(released, party.layout, asked)


# --------------------------------------------------------------------------------------- size


def test_opening_needs_one_vector_of_memory_however_many_sites():
    """Streams are expanded blockwise: no vector for each survivor."""

    def peak(sites):
        party = Party(
            sites=tuple(f"s{i:02d}" for i in range(sites)), spec=VectorSpec("update", 400_000)
        )
        salts = dict.fromkeys(party.plan.sites, bytes(32))
        asked = effects.OpenSum(
            party.header, tuple(salts), tuple(salts.values()), STATE_TAG, b"", 0
        )
        total = np.zeros(party.layout.slots, dtype=np.uint64)
        party.secrets.take_off_streams(total, party.layout, asked)  # imports and caches
        tracemalloc.start()
        party.secrets.take_off_streams(total, party.layout, asked)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    few, many = peak(4), peak(64)
    assert many < few + 200_000 < 1_500_000


def test_a_million_parameters_take_two_and_a_half_bytes_each_way():
    packing = solve_packing(16, 16, "layered", 1_000_000, cipher="keystream")
    layout = Layout(VectorSpec("update", 1_000_000), packing, 16)
    assert packing.ring is None and packing.fields_per_slot == 3
    assert layout.slots * packing.slot_bits / 8 / 1e6 < 2.51


# ---------------------------------------------------------------------------------- no lattice


def test_a_key_epoch_of_a_keystream_is_the_group_secret():
    party = Party("layered")
    assert len(party.scheme.make_payload()) == 32


def test_a_bfv_vector_has_no_salt():
    pytest.importorskip("tenseal.sealapi")
    party = Party()
    plan = replace(party.plan, cipher="bfv", packing=solve_packing(16, len(ROSTER), "encrypted"))
    assert (plan.salt_bytes, party.plan.salt_bytes) == (0, 32)
    for protection in ("masked", "plain"):
        assert replace(party.plan, protection=protection, cipher="bfv").salt_bytes == 0
    scheme = Scheme(plan)
    secrets = scheme.open_payload(scheme.make_payload(), "ann")
    layout = Layout(SPEC, plan.packing, len(ROSTER))
    _, salt = secrets.protect(
        np.zeros(layout.slots, dtype=np.uint64), layout, party.asked(), "ann", OsEntropy()
    )
    assert salt == b"" and not secrets.streams
