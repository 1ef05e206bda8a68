"""Attacks on a whole round with a real BFV layer: the coordinator with one colluding site, and a forged sum.

Both machines of every party, real keys, real ciphertexts; the coordinator reads whatever goes through it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.chunks import tampered
from support.plans import round_plan

from fedcore.errors import OutOfOrder, SecondSum, TagRefused
from fedcore.learning.stopwatch import Stopwatch
from fedcore.secagg.crypto.masking import mask_sum
from fedcore.secagg.crypto.sumtag import SumTag
from fedcore.secagg.in_process import InProcessFederation
from fedcore.secagg.packing import solve_packing
from fedcore.secagg.plan import VectorSpec, Wide
from fedcore.secagg.protocol import messages
from fedcore.secagg.protocol.round import coordinator, site
from fedcore.secagg.summing import RoundTrace, one_by_one

pytest.importorskip("tenseal.sealapi")

from fedcore.secagg.crypto import bfv
from fedcore.secagg.crypto.bfv import EncryptedFold

ROSTER = ("ann", "bob", "cat", "dan")
SPEC = VectorSpec("update", 5000, (Wide("weight", 1, 20),))
STATE = b"the model everybody starts from"
SLOT_BITS = solve_packing(16, len(ROSTER), "layered").slot_bits


def epoch_of(protection):
    plan = round_plan(ROSTER, protection, parameters=SPEC.coordinates)
    return InProcessFederation("job", plan)


def contribute(index):
    """Coordinates that differ from site to site."""
    values = np.arange(SPEC.coordinates, dtype=np.uint64) * np.uint64(index + 3) % np.uint64(60000)
    return values, {"weight": [100 + index]}


def play(epoch, witness=None, absences=None):
    return epoch.sum(
        SPEC, 1, one_by_one(contribute), STATE, Stopwatch(), witness=witness, absences=absences
    )


# ------------------------------------------------------------------ the coordinator and one site


def decrypted(epoch, witness, by):
    """ann's upload, folded alone by the coordinator and opened with the key that `by` holds."""
    shell = epoch.shells[by]
    slots = witness.layout.slots
    fold = EncryptedFold(bfv.PublicContext.of(epoch.plan.packing), slots)
    for index, chunk in enumerate(witness.upload):
        fold.add(index, chunk)
    return shell.secrets.sealer.open(fold.total(), slots)


def without(slots, masks):
    return (slots - mask_sum(masks, len(slots), SLOT_BITS)) & np.uint64((1 << SLOT_BITS) - 1)


@pytest.mark.parametrize("absences", [{}, {"cat": "submit"}], ids=["all stay", "one drops"])
def test_the_coordinator_with_one_colluding_site(absences):
    """They have the key, the ciphertext, the colluder's masks and every mask taken off: ann's update stays
    behind the masks it shares with honest sites. The control: under `encrypted` it lies open."""
    epoch, witness = epoch_of("layered"), RoundTrace(ROSTER.index("ann"), ROSTER.index("bob"))
    play(epoch, witness, absences)
    opened = decrypted(epoch, witness, "bob")
    assert np.mean(opened == witness.slots) < 0.01
    known = witness.masks_among(witness.other_masks, witness.rebuilt_masks)
    assert len(known) == 2 + len(absences), "its self mask, bob's, and what the dropout left"
    left = without(opened, known)
    assert np.mean(left == witness.slots) < 0.01
    share = [(left >> np.uint64(b) & np.uint64(1)).mean() for b in range(SLOT_BITS)]
    assert all(0.45 < s < 0.55 for s in share), "uniform, every bit of it"
    # What is missing is masks and nothing else: with all of them the slots are exact.
    assert np.array_equal(without(opened, witness.masks), witness.slots)

    control, seen = epoch_of("encrypted"), RoundTrace(ROSTER.index("ann"), ROSTER.index("bob"))
    play(control, seen, absences)
    assert np.array_equal(decrypted(control, seen, "bob"), seen.slots), "bit for bit"


# ---------------------------------------------------------------------------------- a forged sum


def tampering(monkeypatch, coefficient):
    """The coordinator adds floor(q/t) to one coefficient of c1 of the last ciphertext it releases."""
    honest = EncryptedFold.total

    def total(fold):
        fold._keeps_seeds = False  # the form of a sum in which any coefficient can be chosen
        (chunk,) = honest(fold)
        public, slots = fold._public, fold._slots
        delta = public.ring.modulus >> SLOT_BITS
        return iter([tampered(public, chunk, slots, -1, coefficient, delta)])

    monkeypatch.setattr(EncryptedFold, "total", total)


def unprotected(monkeypatch, coefficient):
    """The control: (epoch, its round) with the forged sum and no tag check."""
    epoch = epoch_of("layered")
    with monkeypatch.context() as attack:
        tampering(attack, coefficient)
        attack.setattr(SumTag, "check", lambda *_: None)
        witness = RoundTrace(0, 1)
        return epoch, play(epoch, witness), witness


def forgetful(epoch):
    """The coordinator begins the next round although the sum of the last one may be known."""
    epoch.hub.stage = replace(epoch.hub.stage, exposed=())


def test_a_tampered_ciphertext_gets_the_uniform_refusal(monkeypatch, without):
    """Attack 2 in a whole round: every site refuses in the same words, the key epoch is over, and no other
    sum of this state is opened under the next one."""
    for coefficient in range(40):
        try:
            epoch, _, witness = unprotected(monkeypatch, coefficient)
            break
        except TagRefused:
            continue  # this coefficient happened to hit the canary; the attacker tries another
    else:
        pytest.fail("no coefficient left the canary alone in 40 attempts")
    assert isinstance(epoch.hub.stage, coordinator.Released), "control: released and applied"
    exact = sum(contribute(i)[0] for i in range(len(ROSTER)))
    assert not np.array_equal(witness.layout.unpack(witness.total, range(4)).coordinates, exact)

    told = []
    epoch.tap = lambda to, message: told.append((to, message))
    before = {name: shell.stage.standing.certificate for name, shell in epoch.shells.items()}
    tampering(monkeypatch, coefficient)
    with pytest.raises(TagRefused):
        play(epoch)
    leaves = [m for to, m in told if to == messages.COORDINATOR and isinstance(m, messages.Leave)]
    assert [m.site for m in leaves] == [*ROSTER]
    assert {m.code for m in leaves} == {messages.RELEASE_REFUSED}
    assert len({len(m.sealed) for m in leaves}) == 1, "one length whatever the cause"
    assert not any(isinstance(m, messages.Statement | messages.Certificate) for _, m in told)
    for name, shell in epoch.shells.items():
        assert isinstance(shell.stage, site.Halted)
        assert shell.stage.standing.certificate == before[name], "nothing was applied"
    monkeypatch.undo()
    with pytest.raises(SecondSum, match="whose sum may be known"):
        play(epoch)  # not even an honest sum: an honest coordinator begins no round after this one
    forgetful(epoch)
    with pytest.raises(OutOfOrder, match=r"found Invited, expected .*NewEpoch"):
        play(epoch)  # and under this key epoch no site takes part in one
    epoch.start_epoch()
    forgetful(epoch)
    with pytest.raises(SecondSum, match="expected the release of the round whose sum may be known"):
        play(epoch)  # under a new one neither: the forged sum was one of this state
    without(site, "_check_one_sum")
    forgetful(epoch)
    assert np.array_equal(play(epoch).opened.coordinates, exact), "control"
