"""One process that plays all parties computes once what several would compute alike, and sends what they would send."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.plans import round_plan

from fedcore.errors import EnvelopeRefused, SignatureRefused
from fedcore.learning.stopwatch import Stopwatch
from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.crypto.hybrid import HybridKey, open_envelope, seal_envelope
from fedcore.secagg.crypto.identity_key import IdentityKey, verify
from fedcore.secagg.crypto.pairwise import MaskRoot, make_offer, open_offer
from fedcore.secagg.crypto.shared_work import keep, once, shared, shared_work
from fedcore.secagg.in_process import InProcessFederation
from fedcore.secagg.protocol.wire_form import encode
from fedcore.secagg.summing import one_by_one

ROSTER = ("ann", "bob", "cat", "dan", "eve")
ABSENT = {"dan": "submit", "eve": "unmask"}
"""One whose masks are rebuilt, and one that catches up."""


class Tape(OsEntropy):
    """The system's entropy, written down; `again` gives the same once more, in the same order."""

    def __init__(self):
        self.given, self.replay = [], None

    def again(self):
        self.replay = iter(self.given)

    def _next(self, make):
        if self.replay is not None:
            return next(self.replay)
        self.given.append(make())
        return self.given[-1]

    def draw(self, length):
        return self._next(lambda: super(Tape, self).draw(length))

    def encapsulate(self, mlkem_public):
        return self._next(lambda: super(Tape, self).encapsulate(mlkem_public))


def one_round(parties):
    """(every message in order, as bytes; the sum) of one round with absences."""
    sent = []
    parties.tap = lambda to, message: sent.append((to, encode(message)))
    fields = np.arange(parties.plan.coordinates, dtype=np.uint64)

    def contribute(index):
        wides = {"weight": [1], "over_range": [0], "over_half_range": [0], "exceeds": [0]}
        return fields + np.uint64(index), wides

    total = parties.sum(
        parties.plan.update_vector, 1, one_by_one(contribute), b"model", Stopwatch(), absences=ABSENT
    )  # fmt: skip
    return sent, total.opened.coordinates.tolist()


@pytest.mark.parametrize(("protection", "cipher"), [("masked", "bfv"), ("layered", "keystream")])
def test_every_message_is_that_of_parties_that_share_nothing(protection, cipher):
    tape = Tape()
    plan = round_plan(ROSTER, protection, cipher=cipher, parameters=6)
    parties = InProcessFederation("job", plan, tape)
    tape.given.clear()  # the key epoch's: both rounds have the same one
    hub, shells = parties.hub, parties.shells.values()
    before = hub.stage, [shell.stage for shell in shells]
    together = one_round(parties)
    hub.stage, parties.certificate, parties.as_deployed = before[0], None, True
    for shell, stage in zip(shells, before[1], strict=True):
        shell.stage = stage
    parties.now = 0.0
    tape.again()
    apart = one_round(parties)
    assert apart == together
    assert len(together[0]) > 55 and next(tape.replay, None) is None


def test_a_computation_is_made_once_inside_the_block_and_each_time_outside():
    made = []

    @once
    def square(number):
        made.append(number)
        return number * number

    assert [square(3), square(3)] == [9, 9] and made == [3, 3]
    with shared_work():
        assert [square(3), square(3), square(4)] == [9, 9, 16] and made == [3, 3, 3, 4]
        with shared_work():
            assert square(4) == 16 and made == [3, 3, 3, 4]
        keep("key", 5)
        assert shared("key", lambda: 6) == 5
    keep("key", 5)
    assert shared("key", lambda: 6) == 6, "nothing is kept outside the block"
    assert square(3) == 9 and made == [3, 3, 3, 4, 3]


def test_a_refused_signature_is_refused_each_time():
    key = IdentityKey()
    good = key.sign(b"Keys", b"text")
    with shared_work():
        verify(key.public, b"Keys", b"text", good, signer="ann")
        for _ in range(2):
            for changed in ((b"Keys", b"other text"), (b"Submit", b"text")):
                with pytest.raises(SignatureRefused):
                    verify(key.public, *changed, good, signer="ann")
        verify(key.public, b"Keys", b"text", good, signer="ann")


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def test_what_another_party_changed_is_opened_and_refused():
    entropy = OsEntropy()
    ann, bob, eve = (HybridKey.draw(entropy) for _ in range(3))

    def opened(sealed, mine=bob, sender=ann.public, context=b"ann to bob"):
        return open_envelope(mine, sender, sealed, context=context, sender="ann")

    with shared_work():
        sealed = seal_envelope(
            ann, bob.public, b"share", context=b"ann to bob", recipient="bob", entropy=entropy
        )
        assert opened(sealed) == b"share"
        for wrong in (
            lambda: opened(flipped(sealed, 3)),
            lambda: opened(flipped(sealed, len(sealed) - 1)),
            lambda: opened(sealed, mine=eve),
            lambda: opened(sealed, sender=eve.public),
            lambda: opened(sealed, sender=replace(ann.public, x25519=eve.public.x25519)),
            lambda: opened(sealed, context=b"ann to eve"),
        ):
            for _ in range(2):
                with pytest.raises(EnvelopeRefused):
                    wrong()
    assert opened(sealed) == b"share"


def test_an_offer_to_another_or_a_changed_one_is_refused():
    ann, bob, eve = (MaskRoot(name.ljust(32, b"-")) for name in (b"ann", b"bob", b"eve"))
    names = {"sender": "ann", "recipient": "bob", "header": bytes(32)}
    with shared_work():
        secret, offer = make_offer(ann, bob.keys.public.mlkem, **names, entropy=OsEntropy())
        assert open_offer(bob, offer, **names) == secret
        for root, sealed, changed in (
            (eve, offer, {}), (bob, flipped(offer, 0), {}), (bob, offer, {"sender": "eve"}),
            (bob, offer, {"header": bytes(31) + b"1"}),
        ):  # fmt: skip
            with pytest.raises(EnvelopeRefused):
                open_offer(root, sealed, **names | changed)
    assert open_offer(bob, offer, **names) == secret
