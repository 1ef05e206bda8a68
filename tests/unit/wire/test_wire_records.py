"""Protocol messages as frames: each travels one way, in its canonical bytes, and nothing else does."""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass, replace

import pytest
from support.parties import HUB, JOB, Epochs, Parties

from fedcore.errors import MalformedMessage
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.protocol import effects, epoch, wire_form
from fedcore.secagg.protocol.messages import Announce, Keys, Leave
from fedcore.secagg.protocol.round import coordinator, site
from fedcore.secagg.protocol.round.site import SiteProgress
from fedcore.secagg.protocol.wire_form import encode
from fedcore.wire.frames import FROM_SITE, TO_SITE, Record
from fedcore.wire.limits import GRANT, MAX_RECORD, MOST_ITEMS, SITE_RECORD, SITE_WORDS
from fedcore.wire.records import (
    FROM_COORDINATOR,
    FROM_SITES,
    pack_record,
    travelling,
    unpack_record,
)

LEAVE = Leave(b"h" * 32, "va", "left")


class Told(Epochs):
    """An epoch whose every message is kept with its sender."""

    def __init__(self):
        super().__init__(4)
        self.told = []

    def step(self, who, event):
        found = super().step(who, event)
        self.told += [(who, e.message) for e in found if isinstance(e, effects.Send)]
        return found


def said():
    """(sender, message) of a round with a dropout, a refusal and an abandonment, and of an epoch with a late joiner."""
    parties = Parties(4, ahead=True)
    parties.play(s03="submit")
    parties.refusers = {"s00"}
    parties.catch_up()
    parties.play(s01="release")
    epochs = Told()
    epochs.silent = {"s03"}
    epochs.begin().pump()
    epochs.now = 100.0
    epochs.step(HUB, coordinator.Tick())
    epochs.pump()
    epochs.silent = set()
    epochs.step("s03", epoch.FromCoordinator(epoch.EpochCall(epochs.header())))
    epochs.pump()
    sent = [(step.who, m) for step in parties.log for m in step.sent]
    return [*sent, *((HUB, m) for m in parties.passed_on()), *epochs.told]


SAID = said()


def test_everything_the_machines_say_travels_its_way_and_not_the_other():
    seen = set()
    for sender, message in SAID:
        hub = sender == HUB
        there, back = (FROM_COORDINATOR, FROM_SITES) if hub else (FROM_SITES, FROM_COORDINATOR)
        codec = TO_SITE if hub else FROM_SITE
        frame = codec.unpack(codec.pack(pack_record(JOB, message, there)), sender=sender)
        assert frame == Record(JOB, encode(message)), "what is signed is what travels"
        assert unpack_record(frame, there, sender=sender) == message
        with pytest.raises(TypeError, match="does not travel this way"):
            pack_record(JOB, message, back)
        with pytest.raises(MalformedMessage, match=f"fault: {sender}"):
            unpack_record(frame, back, sender=sender)
        seen.add(type(message).__name__)
    assert seen == {*FROM_SITES, *FROM_COORDINATOR}


def test_there_is_room_for_the_largest_federations():
    """Scaled from what four sites said: 64 under masks, 500 for a key epoch."""
    tables = {**FROM_SITES, **FROM_COORDINATOR}
    largest = {}
    for _, message in SAID:
        name, size = type(message).__name__, len(encode(message))
        largest[name] = max(size, largest.get(name, 0))
    grown = {name: size * 16 for name, size in largest.items()}
    grown["Delivery"] = largest["Delivery"] * 16 * 16  # 64 heads of 64 parcels each
    (grant,) = {len(encode(m)) for _, m in SAID if isinstance(m, epoch.Grant)}
    payload = 16_416  # of ring degree 2048
    grown["Grant"], grown["Grants"] = grant + payload, 500 * (grant + payload)
    grown["EpochKeys"] = largest["EpochKeys"] * 125
    for name, size in grown.items():
        assert size <= tables[name].most, f"{name}: {size} bytes"
    assert grown["Grants"] > 8 << 20 > grown["Delivery"], "or MAX_RECORD may be smaller"


@pytest.fixture
def read(monkeypatch):
    """What was given to the decoder, which does nothing."""
    found = []
    monkeypatch.setattr("fedcore.wire.records.decode", lambda *a, **k: found.append(a))
    return found


def test_a_message_that_is_too_long_is_refused_before_it_is_read(read):
    long = replace(LEAVE, sealed=b"x" * SITE_RECORD)
    for act in (
        lambda: unpack_record(Record(JOB, encode(long)), FROM_SITES, sender="va"),
        lambda: pack_record(JOB, long, FROM_SITES),
    ):
        with pytest.raises(MalformedMessage, match=f"at most {SITE_RECORD} bytes"):
            act()
    assert not read


@dataclass(frozen=True)
class Hidden:
    parts: tuple[tuple[int, SecretBytes | None], ...]


@pytest.mark.parametrize(
    "kind", [site.Joined, site.Secrets, effects.RemoveMasks, Hidden, effects.Persist]
)
def test_no_table_takes_a_type_that_can_hold_a_secret(kind):
    with pytest.raises(TypeError, match="may hold a secret"):
        travelling(Keys, kind, most=9)


def test_a_journal_record_is_refused_by_its_name_before_it_is_read(read):
    """Its type is a record too, so only the table keeps it off the wire."""
    for stored in (SiteProgress(1, b"k"), epoch.NoKey()):
        with pytest.raises(MalformedMessage, match="found another one"):
            unpack_record(Record(JOB, encode(stored)), FROM_SITES, sender="va")
    assert not read
    unpack_record(Record(JOB, encode(LEAVE)), FROM_SITES, sender="va")
    assert read, "the patch is where decoding happens"


def test_a_name_of_a_table_with_another_type_is_not_packed():
    @dataclass(frozen=True)
    class Leave:
        header: bytes

    with pytest.raises(TypeError):
        pack_record(JOB, Leave(b"h"), FROM_SITES)


def test_damaged_records_are_malformed_or_another_message():
    """Every message of a round, truncated, flipped and cut: whatever decodes has exactly its bytes."""
    rng = random.Random(7)
    refused = 0
    for sender, message in {type(m).__name__: (s, m) for s, m in SAID}.values():
        table = FROM_COORDINATOR if sender == HUB else FROM_SITES
        body = encode(message)
        for _ in range(60):
            at, to = sorted((rng.randrange(len(body)), rng.randrange(1, len(body))))
            flipped = bytearray(body)
            flipped[at] ^= 1 << rng.randrange(8)
            for damaged in (body[:at] or b"R", body[:at] + body[to:] + b"N", bytes(flipped)):
                refused += not taken(damaged, table)
    assert refused > 1000


def taken(body, table) -> bool:
    try:
        message = unpack_record(Record(JOB, body), table, sender="va")
    except MalformedMessage:
        return False
    return encode(message) == body or pytest.fail("two byte forms of one message")


@pytest.mark.parametrize(
    "body",
    [
        b"RS", b"RS\xff\xff\xff\xff", b"RS\0\0\0\xffLeave", b"RS\0\0\0\x05\xff\xff\xff\xff\xff",
        b"RS\0\0\0\x05Leave", b"I" + bytes(8), b"N", b"L\xff\xff\xff\xff" + b"N" * 1000,
        b"RS\0\0\0\x05Leave" + b"L\0\0\0\x01" * 100_000,
    ],
    ids=range(9),
)  # fmt: skip
def test_bytes_that_begin_like_a_record(body):
    with pytest.raises(MalformedMessage, match="fault: va"):
        unpack_record(Record(JOB, body), FROM_SITES, sender="va")


def test_a_coordinators_message_from_a_site_is_refused():
    announce = next(m for _, m in SAID if isinstance(m, Announce))
    with pytest.raises(MalformedMessage, match="expected a message that travels this way"):
        unpack_record(Record(JOB, encode(announce)), FROM_SITES, sender="va")


# ------------------------------------------------------------- what a site's long records may cost


def part(kind, data=b""):
    return kind + struct.pack(">I", len(data)) + data


EMPTY_GRANT = b"R" + part(b"S", b"Grant") + part(b"B") + part(b"S") * 2 + part(b"B") * 4


def grants_of(item, count):
    """A record that says it has so many grants."""
    head = b"R" + part(b"S", b"Grants") + part(b"B", bytes(32)) + part(b"S", b"va")
    return Record(JOB, head + b"L" + struct.pack(">I", count) + item * count)


@pytest.mark.parametrize("item", [b"N", part(b"B"), part(b"L"), EMPTY_GRANT], ids="NBLR")
def test_grants_that_a_roster_has_no_use_for_cost_nothing(item, read):
    """16 MiB of tiny items held the coordinator for 11 s: it is the length that refuses them now."""
    count = (MAX_RECORD - 200) // len(item)
    with pytest.raises(MalformedMessage, match=f"at most {SITE_WORDS + 4 * GRANT} bytes"):
        unpack_record(grants_of(item, count), FROM_SITES, sender="va", sites=4)
    assert not read


def test_decoding_stops_at_a_list_that_is_too_long_and_at_the_first_item_of_another_kind(
    monkeypatch,
):
    """Within the length of 500 sites: counted by what is read, not by time."""
    read, real = [], wire_form._read_each
    counted = lambda places: (read.append(place) or place for place in places)  # noqa: E731
    each = lambda *args: real(*args[:3], counted(args[3]))  # noqa: E731
    monkeypatch.setattr(wire_form, "_read_each", each)
    with pytest.raises(MalformedMessage, match=f"at most {MOST_ITEMS} items"):
        unpack_record(grants_of(EMPTY_GRANT, 100_000), FROM_SITES, sender="va", sites=500)
    with pytest.raises(MalformedMessage, match="found NoneType in a list, expected Grant"):
        unpack_record(grants_of(b"N", 1000), FROM_SITES, sender="va", sites=500)
    list_of = lambda item: b"L" + struct.pack(">I", 1000) + item * 1000  # noqa: E731
    with pytest.raises(MalformedMessage, match="found tuple in a list, expected Grant"):
        unpack_record(grants_of(list_of(list_of(b"N")), 1), FROM_SITES, sender="va", sites=500)
    assert len(read) < 30
    many = b"R" + part(b"S", b"Leave") + b"L" + struct.pack(">I", 9) + b"N" * 9
    with pytest.raises(MalformedMessage, match=r"found tuple in Leave\.header, expected bytes"):
        unpack_record(Record(JOB, many), FROM_SITES, sender="va", sites=4)
    read.clear()  # control: without a bound all of them are read
    unpack_record(grants_of(EMPTY_GRANT, 5000), FROM_SITES, sender="va")
    assert len(read) == 5000 * 8 + 3


def test_every_honest_record_fits_a_roster_of_its_size():
    for sender, message in SAID:
        if sender != HUB:
            frame = Record(JOB, encode(message))
            assert unpack_record(frame, FROM_SITES, sender=sender, sites=4) == message
    largest = 16_416 * 2 + 512  # a payload of ring degree 4096, its envelope and signature
    assert largest <= GRANT
