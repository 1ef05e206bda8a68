"""Attacks on the cipher `keystream` (PROTOCOL X): salts swapped, replayed, of another site or of another
length, vectors altered on the way. Whole rounds of both machines with real streams; the coordinator
changes what it passes on. What a signature refuses is tried again without it: then the tag refuses."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from support.machines import patch_machine
from support.plans import round_plan

from fedcore.errors import (
    HeaderRefused,
    ListRefused,
    PeerRefused,
    SignatureRefused,
    TagRefused,
    VectorRefused,
)
from fedcore.learning.stopwatch import Stopwatch
from fedcore.secagg import in_process
from fedcore.secagg.crypto import words
from fedcore.secagg.crypto.masked import MaskedFold
from fedcore.secagg.crypto.masking import mask_sum
from fedcore.secagg.crypto.sumtag import SumTag
from fedcore.secagg.encode.pack import Layout
from fedcore.secagg.in_process import InProcessFederation
from fedcore.secagg.plan import (
    VectorSpec,
    Wide,
)
from fedcore.secagg.protocol import checks, effects, messages
from fedcore.secagg.protocol.messages import Aggregate, Submit, SurvivorList
from fedcore.secagg.protocol.round import coordinator, site
from fedcore.secagg.protocol.round.coordinator import MOVES, Collecting, Confirming, taking
from fedcore.secagg.protocol.round.site import releasing
from fedcore.secagg.summing import RoundTrace, one_by_one

ROSTER = ("ann", "bob", "cat", "dan")
SPEC = VectorSpec("update", 5000, (Wide("weight", 1, 20),))
STATE = b"the model everybody starts from"
BOTH = pytest.mark.parametrize("protection", ["encrypted", "layered"])


def epoch_of(protection, cipher="keystream"):
    plan = round_plan(ROSTER, protection, cipher=cipher, parameters=SPEC.coordinates)
    return InProcessFederation("job", plan)


def contribute(index):
    """Coordinates that differ from site to site."""
    values = np.arange(SPEC.coordinates, dtype=np.uint64) * np.uint64(index + 3) % np.uint64(60000)
    return values, {"weight": [100 + index]}


EXACT = sum(contribute(i)[0] for i in range(len(ROSTER)))


def play(epoch, witness=None):
    return epoch.sum(SPEC, 1, one_by_one(contribute), STATE, Stopwatch(), witness=witness)


def passes_on(stand_in, change):
    """The coordinator changes the submissions it lists: change({site: Submit}) -> {site: Submit}."""
    honest = in_process._Exchange._post_to

    def post(exchange, to, message):
        if isinstance(message, SurvivorList | Aggregate):
            found = change({each.site: each for each in message.submissions})
            message = replace(message, submissions=tuple(found[name] for name in ROSTER))
        honest(exchange, to, message)

    stand_in(in_process._Exchange, _post_to=post)


def without_signatures(monkeypatch):
    """The control: the sites believe submissions, whatever was signed."""
    patch_machine(monkeypatch, checks, "submission", lambda *_: None)
    patch_machine(monkeypatch, site, "_check_own_submission", lambda *_: None)
    believing(monkeypatch)


def believing(monkeypatch):
    """The attacker's own machine checks nothing of what it takes."""

    def take(kind, message, record):
        def taken(move, _, found):
            move.record(record(getattr(found, "submit", found)))
            if kind is Collecting:
                move.do(effects.FoldUpload(found.submit))

        monkeypatch.setitem(MOVES[kind], message, (taken, MOVES[kind][message][1]))

    take(Collecting, coordinator.Uploaded, coordinator.SubmissionTaken)
    take(Confirming, messages.Confirm, coordinator.ConfirmTaken)


def without_tag(stand_in):
    """The control: nothing is checked in an opened sum."""
    stand_in(SumTag, check=lambda *_: None)
    stand_in(Layout, unpack=lambda layout, total, _: layout.fields_of(total)[:5000])


def certificates(epoch):
    return {shell.stage.standing.certificate for shell in epoch.shells.values()}


# ------------------------------------------------------------------------------ salts of others


def swapped(found):
    """ann's and bob's salts changed places."""
    ann, bob = found["ann"], found["bob"]
    return found | {"ann": replace(ann, salt=bob.salt), "bob": replace(bob, salt=ann.salt)}


SALTS = {
    "swapped": swapped,
    "another site's": lambda found: found | {"bob": replace(found["bob"], salt=found["cat"].salt)},
    "one bit": lambda found: found | {"bob": replace(found["bob"], salt=b"\x01" * 32)},
}


@BOTH
@pytest.mark.parametrize("which", SALTS)
def test_a_salt_that_its_site_did_not_sign(protection, which, monkeypatch, stand_in):
    """Refused by the signature; the control is that without signatures the list is taken by every site,
    and then no tag holds, so that even so nothing is released."""
    passes_on(stand_in, SALTS[which])
    epoch = epoch_of(protection)
    with pytest.raises(PeerRefused) as refusal:
        play(epoch)
    assert type(refusal.value) in {SignatureRefused, VectorRefused}
    assert certificates(epoch) == {""}

    without_signatures(monkeypatch)
    believed = epoch_of(protection)
    with pytest.raises(TagRefused):
        play(believed)
    assert certificates(believed) == {""}
    without_tag(stand_in)
    opened = play(epoch_of(protection)).opened
    assert np.mean(opened == EXACT) < 0.01, "control: it releases what is no sum of anything"


def test_the_site_is_named_whose_submission_was_changed(stand_in):
    passes_on(stand_in, SALTS["one bit"])
    with pytest.raises(SignatureRefused) as refusal:
        play(epoch_of("layered"))
    assert refusal.value.fault == "bob"


@BOTH
def test_a_submission_of_an_earlier_round_with_its_salt_and_vector(
    protection, monkeypatch, stand_in
):
    """The coordinator folds bob's vector of the first round into the second, and lists the submission
    that bob signed for it. The control: where headers, state tags and signatures are not checked, the
    second round's h gives another stream and other pads, so the tag refuses it."""
    kept = {}
    uploaded = in_process._Exchange._uploaded

    def keep(exchange, name):
        if name == "bob":
            kept.setdefault("chunks", exchange.hub.arrived["bob"])
            exchange.hub.arrived["bob"] = kept["chunks"]
        uploaded(exchange, name)

    def replayed(found):
        old = kept.setdefault("submit", found["bob"])
        if kept.get("state tag too"):
            old = replace(old, state_tag=found["bob"].state_tag)
        return found | {"bob": old}

    believing(monkeypatch)
    stand_in(in_process._Exchange, _uploaded=keep)
    passes_on(stand_in, replayed)
    epoch = epoch_of(protection)
    play(epoch)
    first = certificates(epoch)
    with pytest.raises(HeaderRefused):
        play(epoch)
    assert certificates(epoch) == first

    kept.clear()
    believed = epoch_of(protection)
    play(believed)
    without_signatures(monkeypatch)
    kept["state tag too"] = True
    with pytest.raises(TagRefused):
        play(believed)


# ------------------------------------------------------------------------------ altered vectors


@BOTH
def test_a_vector_altered_on_the_way_adds_to_the_sum_and_is_refused_by_the_tag(
    protection, stand_in, without
):
    """A stream cipher hides and does not authenticate: whoever adds to a ciphertext adds to the sum. The
    control, without the tag, shows the attacker's number in the released model."""
    honest = MaskedFold.total

    def total(fold):
        fold._total[7] += np.uint64(1000)
        return honest(fold)

    stand_in(MaskedFold, total=total)
    epoch = epoch_of(protection)
    told = []
    epoch.tap = lambda to, message: told.append(message)
    with pytest.raises(TagRefused):
        play(epoch)
    leaves = [m for m in told if isinstance(m, messages.Leave)]
    assert [m.code for m in leaves] == [messages.RELEASE_REFUSED] * len(ROSTER)
    assert all(isinstance(shell.stage, site.Halted) for shell in epoch.shells.values())

    without(SumTag, "check")
    opened = play(epoch_of(protection)).opened.coordinates
    assert opened[6] == EXACT[6] + 1000 and np.array_equal(
        np.delete(opened, 6), np.delete(EXACT, 6)
    )


@BOTH
def test_every_refusal_is_alike_whatever_was_altered(protection, stand_in):
    """No oracle: which bit of the sum was changed does not show in what the sites say."""
    honest, spoken = MaskedFold.total, set()
    for slot, bit in ((0, 0), (7, 3), (-5, 53), (-1, 20)):

        def total(fold, slot=slot, bit=bit):
            fold._total[slot] ^= np.uint64(1 << bit)
            return honest(fold)

        stand_in(MaskedFold, total=total)
        epoch, told = epoch_of(protection), []
        epoch.tap = lambda to, message, told=told: told.append(message)
        with pytest.raises(TagRefused):
            play(epoch)
        leaves = [m for m in told if isinstance(m, messages.Leave)]
        spoken.add(tuple((m.site, m.code, len(m.sealed)) for m in leaves))
    assert len(spoken) == 1


# ------------------------------------------------------------------- salts that do not fit the plan


def salted(monkeypatch, change):
    """bob lies: it signs a submission whose salt is change(its salt)."""
    honest = messages.sign

    def sign(message, identity):
        if isinstance(message, Submit) and message.site == "bob":
            message = replace(message, salt=change(message.salt))
        return honest(message, identity)

    patch_machine(monkeypatch, site, "sign", sign)


@pytest.mark.parametrize(
    ("protection", "cipher", "change"),
    [
        ("layered", "keystream", lambda salt: b""),
        ("layered", "keystream", lambda salt: salt[:31]),
        ("encrypted", "keystream", lambda salt: salt + b"\0"),
        ("masked", "bfv", lambda salt: bytes(32)),
    ],
    ids=["none", "short", "long", "under masked"],
)
def test_a_lying_site_s_salt_of_another_length(protection, cipher, change, monkeypatch):
    """The coordinator refuses it and names the site; in league with the site it passes it on, and the
    other sites refuse it. The controls: the same round ends where the lengths are not looked at."""
    salted(monkeypatch, change)
    epoch = epoch_of(protection, cipher)
    with pytest.raises(TagRefused):  # of the plain sum beside it, which counts bob's vector as well
        play(epoch)
    assert epoch.hub.stage.certificate.survivors == ("ann", "cat", "dan"), "it goes on without bob"

    def unchecked(submit, header, pins, salt_bytes):
        return checks.submission(submit, header, pins, len(submit.salt))

    lenient = SimpleNamespace(**{**vars(checks), "submission": unchecked})
    with monkeypatch.context() as league:
        league.setattr(taking, "checks", lenient)
        epoch = epoch_of(protection, cipher)
        with pytest.raises(VectorRefused, match=r"found a salt of \d+ bytes") as refusal:
            play(epoch)
        assert refusal.value.fault == "bob" and certificates(epoch) == {""}

        league.setattr(releasing, "checks", lenient)
        epoch = epoch_of(protection, cipher)
        if cipher == "keystream":  # the others do not find bob's stream
            with pytest.raises(TagRefused):
                play(epoch)
        else:
            assert play(epoch).survivors == (0, 1, 2, 3)


def test_two_signed_salts_of_one_vector_are_found_before_anybody_unmasks(monkeypatch, stand_in):
    """bob and the coordinator show two salts of bob's vector to different sites. The confirmations are
    over all that a submission says, so they differ. The control: over vectors alone they agree, the sites
    unmask, and ann is left with a sum that it must refuse."""
    lies = {}
    honest, post = messages.sign, in_process._Exchange._post_to

    def sign(message, identity):
        if isinstance(message, Submit) and message.site == "bob":
            lies["bob"] = honest(replace(message, salt=bytes(32)), identity)
        return honest(message, identity)

    def split(exchange, to, message):
        if isinstance(message, SurvivorList | Aggregate) and to.member.id == "ann":
            found = tuple(lies.get(each.site, each) for each in message.submissions)
            message = replace(message, submissions=found)
        post(exchange, to, message)

    patch_machine(monkeypatch, site, "sign", sign)
    stand_in(in_process._Exchange, _post_to=split)
    believing(monkeypatch)
    epoch, told = epoch_of("layered"), []
    epoch.tap = lambda to, message: told.append(message)
    with pytest.raises(ListRefused, match="another survivors signed by"):
        play(epoch)
    assert not any(isinstance(m, messages.Unmask) for m in told)

    def vectors_alone(submissions):
        return tuple((submit.site, submit.digest) for submit in submissions)

    patch_machine(monkeypatch, site, "listed", vectors_alone)
    epoch = epoch_of("layered")
    epoch.tap = lambda to, message: told.append(message)
    play(epoch)
    assert any(isinstance(m, messages.Unmask) for m in told), "control"
    refused = [m.site for m in told if getattr(m, "code", "") == messages.RELEASE_REFUSED]
    assert refused == ["ann"], "control: too late, and its key epoch is over"


# ----------------------------------------------------------------- who reads what, and who does not


def without(epoch, slots, masks):
    bits = epoch.plan.packing.slot_bits
    return (slots - mask_sum(masks, len(slots), bits)) & np.uint64((1 << bits) - 1)


@BOTH
def test_the_coordinator_alone_reads_neither_an_upload_nor_the_sum(protection):
    """All it holds of ann's vector is uniform, and so is the sum, with every mask off that it took off."""
    released = []
    epoch, witness = epoch_of(protection), RoundTrace(0, 1)
    epoch.tap = lambda to, message: None
    honest = MaskedFold.total
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            MaskedFold, "total", lambda fold: released.extend(honest(fold)) or iter(released)
        )
        play(epoch, witness)
    bits, slots = epoch.plan.packing.slot_bits, len(witness.slots)
    for chunks in (witness.upload, released):
        seen = without(epoch, words.read(chunks, slots, bits), witness.rebuilt_masks)
        share = [(seen >> np.uint64(b) & np.uint64(1)).mean() for b in range(bits)]
        assert all(0.45 < s < 0.55 for s in share)


@BOTH
def test_the_coordinator_with_one_colluding_site(protection):
    """The colluder has G and with it every stream: under `encrypted` ann's upload lies open, under
    `layered` it stays behind the masks that ann shares with honest sites. As with the cipher `bfv`."""
    epoch, witness = epoch_of(protection), RoundTrace(ROSTER.index("ann"), ROSTER.index("bob"))
    salts = {}

    def keep(to, message):
        if isinstance(message, Submit):
            salts[message.site] = message.salt, message.state_tag

    epoch.tap = keep
    play(epoch, witness)
    salt, tag = salts["ann"]
    header = epoch.hub.stage.header
    stream = epoch.shells["bob"].secrets.stream(header, tag, "ann", salt)
    assert stream == witness.stream[0]
    upload = words.read(witness.upload, len(witness.slots), epoch.plan.packing.slot_bits)
    known = (stream, *witness.masks_among(witness.other_masks, witness.rebuilt_masks))
    left = without(epoch, upload, known)
    if protection == "encrypted":
        assert np.array_equal(left, witness.slots)
        return
    assert np.mean(left == witness.slots) < 0.01
    # What is missing is masks and nothing else.
    assert np.array_equal(without(epoch, upload, (stream, *witness.masks)), witness.slots)
