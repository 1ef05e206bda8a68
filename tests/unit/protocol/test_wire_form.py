"""The byte form of messages: one form for one value, and nothing but MalformedMessage for the rest."""

from __future__ import annotations

import struct
import sys
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.parties import Parties, secrets_in
from support.records import forgetful

from fedcore.errors import MalformedMessage
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.protocol import effects, messages
from fedcore.secagg.protocol.round import coordinator, site
from fedcore.secagg.protocol.wire_form import MAX_DEPTH, decode, digest, encode, unsigned


def said():
    """One message of every type, from a round with a dropout, a refusal and an abandonment."""
    parties = Parties(4, ahead=True)
    parties.play(s03="submit")
    parties.refusers = {"s00"}
    parties.catch_up()
    parties.play(s01="release")
    sent = [m for step in parties.log for m in step.sent]
    return {type(m): m for m in [*sent, *parties.passed_on()]}, parties


SAID, PARTIES = said()
JOURNALLED = {
    type(entry): entry for who in PARTIES.journals for entry in PARTIES.records(who)
}  # from both journals
LEAVE = messages.Leave(b"h" * 32, "ann", "left")


def text(value):
    return b"S" + struct.pack(">I", len(value)) + value


def test_every_message_of_a_round_was_said():
    kinds = {*messages.SiteMessage.__args__, *messages.CoordinatorMessage.__args__}
    assert set(SAID) == kinds


@pytest.mark.parametrize("value", (SAID | JOURNALLED).values(), ids=lambda v: type(v).__name__)
def test_a_record_survives_its_bytes_with_its_secrets(value):
    data = encode(value)
    back = decode(data, type(value), sender="ann")
    assert encode(forgetful(back)) == data == encode(back) and digest(back) == digest(value)
    assert secrets_in(back) == secrets_in(value)
    assert secrets_in(value) or back == value  # secrets are not compared


def test_the_form_is_the_documented_one():
    fields = (
        text(b"Leave") + b"B" + struct.pack(">I", 32) + b"h" * 32 + text(b"ann") + text(b"left")
        + b"B" + bytes(4)
    )  # fmt: skip
    assert encode(LEAVE) == b"R" + fields
    assert encode((1, -1, None)) == b"L\0\0\0\3I" + bytes(7) + b"\1I" + b"\xff" * 8 + b"N"
    assert encode((1 << 63) - 1)[1:] == b"\x7f" + b"\xff" * 7
    for beyond in (1 << 63, -(1 << 63) - 1):
        with pytest.raises(TypeError, match="beyond 64 bits"):
            encode(beyond)
    assert encode(SecretBytes(b"ab")) == b"X\0\0\0\2ab"


@pytest.mark.parametrize("kind", SAID, ids=lambda kind: kind.__name__)
def test_every_truncation_and_every_tail_is_refused(kind):
    data = encode(SAID[kind])
    for cut in range(0, len(data), max(1, len(data) // 400)):
        with pytest.raises(MalformedMessage):
            decode(data[:cut], kind)
    for tail in (b"\0", b"N", data):
        with pytest.raises(MalformedMessage, match="behind the message"):
            decode(data + tail, kind)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"Z",
        b"R" + text(b"NoSuchRecord"),
        b"R" + text(b"object"),
        b"R" + text(b"leave") + encode(LEAVE)[11:],
        b"RI" + bytes(8),
        b"RN",
        b"RL\0\0\0\0",
        text(b"\xff"),
        text(b"\xed\xa0\x80"),  # a lone surrogate
        b"R" + text(b"Leave") + b"NNN",
        b"R" + text(b"Leave") + b"X" + encode(LEAVE)[12:],
    ],
)
def test_what_is_no_message_is_refused(data):
    with pytest.raises(MalformedMessage) as found:
        decode(data, messages.Leave, sender="ann")
    assert found.value.fault == "ann"


@pytest.mark.parametrize("expected", [messages.Keys, messages.SharesHead, int, bytes])
def test_a_message_of_another_type_is_refused(expected):
    with pytest.raises(MalformedMessage, match="found Leave"):
        decode(encode(LEAVE), expected)


def test_fields_are_of_their_types_all_the_way_down():
    head = SAID[messages.Shares].head
    good = encode(head)
    bad = [
        replace(head, site=b"ann"),
        replace(head, header="h"),
        replace(head, header=None),
        replace(head, parcels=((b"ann", b"d"),)),
        replace(head, parcels=(("ann", b"d", b"d"),)),
        replace(head, parcels=(head,)),
        replace(head, signature=1),
        replace(head, signature=SecretBytes(b"s")),
    ]
    assert decode(good, messages.SharesHead) == head
    for wrong in bad:
        with pytest.raises(MalformedMessage):
            decode(encode(wrong), messages.SharesHead)


@pytest.mark.parametrize(
    "value",
    [
        True,
        False,
        1.0,
        [1],
        {"a": 1},
        bytearray(b"a"),
        object(),
        set(),
        effects.MakeVector(
            PARTIES.header(), b"t", ()
        ),  # may hold secrets, and stays in the process
    ],
    ids=lambda value: type(value).__name__,
)
def test_nothing_else_has_a_byte_form(value):
    for wrapped in (value, (value,), replace(LEAVE, site=value)):
        with pytest.raises(TypeError, match=f"{type(value).__name__} has no byte form"):
            encode(wrapped)


def test_deep_nesting_ends_before_the_interpreter_does():
    fine = b"L\0\0\0\1" * MAX_DEPTH + b"N"
    assert encode(decode(fine, tuple)) == fine
    for kind in (b"L\0\0\0\1", b"R", b"R" + text(b"Announce")):
        for depth in (MAX_DEPTH + 1, 10 * sys.getrecursionlimit()):
            with pytest.raises(MalformedMessage):
                decode(kind * depth + b"N", tuple)


def test_a_real_message_is_far_from_the_limit():
    def depth(value):
        if isinstance(value, tuple):
            return 1 + max(map(depth, value), default=0)
        parts = fields(value) if hasattr(value, "__dataclass_fields__") else ()
        return 1 + max((depth(getattr(value, f.name)) for f in parts), default=0)

    stages = [step.after for step in PARTIES.log]
    assert max(map(depth, [*SAID.values(), *JOURNALLED.values(), *stages])) <= 8 < MAX_DEPTH


@pytest.mark.parametrize("kind", [b"B", b"S", b"L", b"X"])
@pytest.mark.parametrize("size", [2, 2**31, 2**32 - 1])
def test_a_length_beyond_the_input_is_refused_at_once(kind, size):
    with pytest.raises(MalformedMessage):
        decode(kind + struct.pack(">I", size) + b"N", object)


def test_only_journal_records_take_a_secret():
    """No message has a field that could carry one; the control: the journal does."""
    for message in SAID.values():
        assert not secrets_in(message)
        assert not {SecretBytes, "SecretBytes"} & set(type(message).__annotations__.values())
    assert secrets_in(JOURNALLED[site.Joined]) and secrets_in(JOURNALLED[coordinator.MasksRebuilt])
    keys = SAID[messages.Keys]
    with pytest.raises(MalformedMessage, match=r"SecretBytes in Keys\.state_tag"):
        decode(encode(replace(keys, state_tag=SecretBytes(b"s" * 32))), messages.Keys)


def within(value):
    """A value and all that is in it, the records too."""
    yield value
    if hasattr(value, "__dataclass_fields__"):
        value = [getattr(value, each.name) for each in fields(value)]
    for each in value if isinstance(value, list | tuple) else ():
        yield from within(each)


@pytest.mark.parametrize("value", (SAID | JOURNALLED).values(), ids=lambda v: type(v).__name__)
def test_what_a_record_keeps_of_its_bytes_is_what_they_are(value):
    """As it was said, and as it was read; of a secret nothing is kept."""
    for each in (*within(value), *within(decode(encode(value), type(value)))):
        kept = getattr(each, "__dict__", {})
        if "_bytes" in kept:
            assert kept["_bytes"] == encode(forgetful(each)) and not secrets_in(each)
        if "_unsigned" in kept:
            assert kept["_unsigned"] == encode(replace(forgetful(each), signature=b""))


def test_bytes_are_kept_of_what_is_signed_and_not_of_a_changed_copy():
    keys = SAID[messages.Keys]
    assert "_bytes" in vars(keys) and "_bytes" in vars(decode(encode(keys), messages.Keys))
    assert "_bytes" not in vars(decode(encode(JOURNALLED[site.Joined]), site.Joined))
    other = replace(keys, site="bob")
    assert encode(other) != encode(keys) and unsigned(other) != unsigned(keys)
    with pytest.raises(TypeError, match="Abandon does not end with a signature"):
        unsigned(SAID[messages.Abandon])


def checked(data):
    """Whatever decodes has exactly these bytes; everything else is refused by name."""
    try:
        value = decode(data, object)
    except MalformedMessage:
        return
    assert encode(forgetful(value)) == data


@settings(max_examples=400)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_canonical(data):
    checked(data)
    checked(b"R" + text(b"Leave") + data)


@settings(max_examples=400)
@given(
    kind=st.sampled_from(sorted(SAID, key=lambda kind: kind.__name__)),
    place=st.floats(0, 1), data=st.binary(min_size=1, max_size=6), cut=st.integers(0, 6),
)  # fmt: skip
def test_changed_messages_are_refused_or_canonical(kind, place, data, cut):
    whole = encode(SAID[kind])
    at = int(place * len(whole))
    checked(whole[:at] + data + whole[at + cut :])


LEAVES = st.one_of(
    st.none(), st.integers(-(2**63), 2**63 - 1), st.binary(max_size=20), st.text(max_size=20)
)


@given(st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=9))
def test_values_come_back_and_differ_in_bytes_where_they_differ(value):
    try:
        assert decode(encode(value), object) == value
    except MalformedMessage:
        assert encode(value).count(b"L") > MAX_DEPTH
