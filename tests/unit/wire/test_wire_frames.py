"""Frames: what .proto and dataclasses both say, one byte form, limits, versions, and arbitrary bytes."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fedcore.errors import MalformedMessage, VersionRefused
from fedcore.wire import calls, frames
from fedcore.wire._generated import federation_pb2 as pb
from fedcore.wire.codec import MOST_TOGETHER, TOGETHER, WIRE_VERSION, Form, in_messages
from fedcore.wire.frames import FROM_SITE, TO_SITE, UPLOAD, alone
from fedcore.wire.limits import INLINE, MAX_RECORD, MAX_ROSTER, PART, SMALL

ROOT = Path(__file__).resolve().parents[3]
CALLS = [each for each in vars(calls).values() if isinstance(each, calls.Call)]
CODECS = {each.envelope: each for call in CALLS for each in (call.takes, call.gives)}
HEX, H = "0f" * 32, b"h" * 32
START = frames.UploadStart("job", H, H, 3 << 20)
WANT = frames.DownloadStart("job", "sum", H)


# ------------------------------------------------------------------------------------ any frame

TEXTS = {
    "0a" * 32: st.from_regex("[0-9a-f]{64}", fullmatch=True),
    "a b": st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), max_size=64),
    "m.html": st.from_regex(r"[a-z][a-z.]{0,20}", fullmatch=True),
    "": st.just(""),
} | {
    word: st.just(word)
    for word in (*frames.DOING, *frames.GOODBYES, *frames.WHAT, *frames.ROSTER_WORDS)
}
NUMBERS = (0, 1, WIRE_VERSION, 50, 100, 127, 128, 1 << 20, 1 << 40, (1 << 53) - 1)
LENGTHS = (0, 1, 2, 16, 32, 127, 128, 1000)


def values(hint):
    """Values of one field, within its limit."""
    limit = None
    if get_origin(hint) is Annotated:
        hint, limit = get_args(hint)
    if hint is str:
        fitting = [each for sample, each in TEXTS.items() if limit.allows(sample)]
        return st.one_of(fitting).filter(limit.allows)
    if hint is int:
        return st.sampled_from([each for each in NUMBERS if limit.allows(each)])
    if hint is bytes:
        sizes = [each for each in LENGTHS if limit.allows(b"x" * each)]
        return st.sampled_from(sizes).flatmap(lambda size: st.binary(min_size=size, max_size=size))
    if get_origin(hint) is tuple:
        return st.lists(any_of(get_args(hint)[0]), max_size=3).map(tuple)
    return st.booleans() if hint is bool else any_of(hint)


def any_of(frame):
    """Frames of one type."""
    hints = get_type_hints(frame, include_extras=True)
    return st.builds(
        frame, **{each.name: values(hints[each.name]) for each in dataclasses.fields(frame)}
    )


def any_frame(codec):
    return st.one_of([any_of(form.frame) for form in codec.forms.values()])


@pytest.mark.parametrize("name", CODECS)
def test_a_frame_survives_its_bytes_and_they_are_protobufs_own(name):
    codec = CODECS[name]
    message = getattr(pb, codec.envelope)

    @given(any_frame(codec))
    @settings(max_examples=40)
    def check(frame):
        data = codec.pack(frame)
        assert codec.unpack(data, sender="va") == frame
        theirs = message.FromString(data)
        assert theirs.SerializeToString(deterministic=True) == data
        if message.DESCRIPTOR.oneofs:
            number = next(n for n, form in codec.forms.items() if form.frame is type(frame))
            chosen = message.DESCRIPTOR.fields_by_number[number].name
            assert theirs.WhichOneof("frame") == chosen

    check()


@pytest.mark.parametrize("name", CODECS)
def test_damaged_bytes_give_malformed_or_the_frame_of_exactly_these_bytes(name):
    """Truncated, cut out, repeated, flipped and lengthened; never another error, never a near miss."""
    codec = CODECS[name]
    seen = {"refused": 0, "taken": 0}

    @given(any_frame(codec), any_frame(codec), st.randoms(use_true_random=False))
    @settings(max_examples=40)
    def check(frame, other, rng):
        data = codec.pack(frame)
        for damaged in damages(data, codec.pack(other), rng):
            seen["taken" if judged(codec, damaged) else "refused"] += 1

    check()
    assert seen["refused"] > 100, seen
    if name != "JobsRequest":  # which is its version alone
        assert seen["taken"] > 10, seen  # a flipped bit inside a value gives another good frame


def damages(data, other, rng):
    at, to = sorted((rng.randint(0, len(data)), rng.randint(0, len(data))))
    yield data[:at]
    yield data[:at] + data[to:]
    yield data[:at] + data[at:to] * 2 + data[to:]
    yield data + data
    yield data + other
    yield data + rng.randbytes(rng.randint(1, 8))
    for _ in range(8 if data else 0):  # a frame of nothing but defaults has no bytes
        where = rng.randrange(len(data))
        flipped = bytearray(data)
        flipped[where] ^= 1 << rng.randrange(8)
        yield bytes(flipped)


def judged(codec, data) -> bool:
    """Whether the bytes are a frame; any error but MalformedMessage ends the test."""
    try:
        frame = codec.unpack(data, sender="va")
    except MalformedMessage as caught:
        error = caught
    else:
        error = None
    if error is not None:
        assert error.fault == "va" and len(str(error)) < 400
        return False
    assert codec.pack(frame) == data, "two byte forms of one frame"
    return True


@given(st.binary(max_size=300))
@example(b"")
@example(b"\x0a")
@example(b"\x0a\x00")
@example(b"\x12\xff\xff\xff\xff\x0f")
@example(b"\x12\x80\x80\x80\x80\x80\x80\x80\x80\x80\x01")
@settings(max_examples=300)
def test_random_bytes_give_malformed(data):
    for codec in CODECS.values():
        judged(codec, data)


def test_megabytes_of_rubbish_are_refused_unread():
    rng = random.Random(1)
    for codec in CODECS.values():
        for first in (b"", b"\x0a", b"\x12", b"\x22"):
            assert not judged(codec, first + rng.randbytes(5 << 20))


# ------------------------------------------------------------------------------------ one form


def wrapped(number, body):
    """A frame of a oneof, written out: number below 16, body below 128 bytes."""
    return bytes([number << 3 | 2, len(body)]) + body


DOING = frames.Doing("job", "training", 40)
BODY = pb.Doing(job="job", what="training", percent=40).SerializeToString()


def test_the_form_is_the_documented_one():
    assert FROM_SITE.pack(DOING) == wrapped(3, BODY)
    assert FROM_SITE.unpack(wrapped(3, BODY), sender="va") == DOING
    assert UPLOAD.pack(frames.Part(b"abc")) == b"\x12\x03abc"


@pytest.mark.parametrize(
    "data",
    [
        wrapped(3, BODY + b"\x20\x01"),  # an unknown field
        wrapped(3, BODY + BODY),  # every field twice
        wrapped(3, BODY[:-2] + b"\x18\xa8\x00"),  # 40 in two bytes
        wrapped(3, BODY[-2:] + BODY[:-2]),  # another order
        wrapped(3, BODY + b"\x18\x00"),  # a default written out
        wrapped(3, BODY) + b"\x20\x01",  # an unknown field beside the frame
        wrapped(4, b"\x08\x01") + wrapped(3, BODY),  # two frames: protobuf takes the last
        bytes([26, len(BODY) | 128, 0]) + BODY,  # a length in two bytes
        wrapped(7, BODY),  # a frame of no known number
        bytes([27]) + BODY,  # another wire type
        wrapped(3, BODY)[:-1],
        b"",
    ],
)
def test_what_protobuf_may_let_pass_is_refused(data):
    with pytest.raises(MalformedMessage, match="fault: va"):
        FROM_SITE.unpack(data, sender="va")


def test_frames_and_proto_have_the_same_fields():
    """The .proto is what others read: names, numbers and shapes agree with the dataclasses."""
    described = {message.name for message in pb.DESCRIPTOR.message_types_by_name.values()}
    ours = {"FromSite", "ToSite", "UploadPart", "DownloadPart"}
    for codec in CODECS.values():
        for form in codec.forms.values():
            ours |= same_fields(form)
    assert described == ours
    for codec in (c for c in CODECS.values() if 0 not in c.forms):
        by_number = getattr(pb, codec.envelope).DESCRIPTOR.fields_by_number
        assert set(by_number) == set(codec.forms) and max(by_number) < 16
        for number, form in codec.forms.items():
            theirs = by_number[number].message_type
            assert (theirs.name if theirs else "Part") == form.frame.__name__


def same_fields(form: Form) -> set[str]:
    if form.message is None:
        return set()
    names, pending = set(), [form.frame]
    while pending:
        cls = pending.pop()
        names.add(cls.__name__)
        theirs = getattr(pb, cls.__name__).DESCRIPTOR.fields
        assert {f.name for f in dataclasses.fields(cls)} == {f.name for f in theirs}
        pending += [globals_of(f.message_type.name) for f in theirs if f.message_type]
    return names


def globals_of(name):
    return getattr(frames, name)


def test_generating_again_gives_the_committed_bytes(tmp_path):
    pytest.importorskip("grpc_tools", reason="grpcio-tools makes the generated files")
    script = ROOT / "scripts" / "gen-proto"
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    committed = ROOT / "fedcore" / "wire" / "_generated"
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(made) == {"federation_pb2.py", "federation_pb2.pyi"}
    assert made == {name: (committed / name).read_bytes() for name in made}


# ------------------------------------------------------------------------------------ limits

TASK, HELD = frames.Task("heart", HEX), frames.Held("job", HEX, 1, 2)
HELLO = frames.Hello(HEX, (TASK,), (HELD,))
GOOD = {
    frames.FROM_SITE: [
        HELLO, frames.Record("job", b"x"), DOING, frames.Pong(1), frames.Goodbye("stopping"),
        frames.SmallUpload(START, b"x"), frames.RosterSeen(2, "approved"),
    ],
    frames.TO_SITE: [
        frames.Welcome("hospitals", 1_700_000_000_000), frames.UploadReceipt(H, 0),
        frames.SmallDownload(WANT, b"x"),
        frames.Waiting("job", (frames.Awaited("va"),), 4, 7, 3, 3, in_round=True),
        frames.Roster(b"x"), frames.JobRoster("job", 2, HEX),
    ],
    frames.UPLOAD: [START, frames.Part(b"x")],
    alone(frames.DownloadStart): [WANT],
    alone(frames.SubmitRequest): [frames.SubmitRequest(b"x", "heart", HEX)],
    alone(frames.WatchEvent): [frames.WatchEvent(b"{}")],
    alone(frames.FilePart): [frames.FilePart("model.safetensors", 0, b"x", last=True)],
}  # fmt: skip
BEYOND = [
    ("Hello", {"pins": HEX[1:]}),
    ("Hello", {"pins": HEX.upper()}),
    ("Hello", {"software": ""}),
    ("Hello", {"software": "x" * 65}),
    ("Hello", {"tasks": (TASK,) * 65}),
    ("Hello", {"held": (HELD,) * 65}),
    ("Hello", {"tasks": (frames.Task("a" * 65, HEX),)}),
    ("Hello", {"tasks": (frames.Task("heart", "not a hash"),)}),
    ("Hello", {"held": (frames.Held("job", "0f", 1, 2),)}),
    ("Hello", {"held": (frames.Held("job", "", 1 << 53, 2),)}),
    ("Record", {"job": ""}),
    ("Record", {"job": "j" * 65}),
    ("Record", {"job": "two\nlines"}),
    ("Record", {"job": " padded"}),
    ("Record", {"job": "turned \u202e round"}),
    ("Record", {"job": "\x1b[2J"}),
    ("Record", {"body": b""}),
    ("Record", {"body": b"x" * (MAX_RECORD + 1)}),
    ("Doing", {"what": "PATIENT-7419"}),
    ("Doing", {"what": ""}),
    ("Doing", {"percent": 101}),
    ("Goodbye", {"code": "because"}),
    ("Goodbye", {"text": "x" * 257}),
    ("Goodbye", {"text": "two\nlines"}),
    ("SmallUpload", {"data": b"x" * (INLINE + 1)}),
    ("SmallUpload", {"start": frames.UploadStart("job", H, b"short", 1)}),
    ("Welcome", {"federation": ""}),
    ("Welcome", {"time_ms": 1 << 53}),
    ("UploadReceipt", {"digest": b""}),
    ("SmallDownload", {"data": b""}),
    ("Waiting", {"sites": (frames.Awaited("va"),) * 65}),
    ("Roster", {"document": b""}),
    ("Roster", {"document": b"x" * (MAX_ROSTER + 1)}),
    ("JobRoster", {"digest": "0f"}),
    ("RosterSeen", {"word": "fine"}),
    ("UploadStart", {"header": b"h" * 33}),
    ("UploadStart", {"size": 0}),
    ("UploadStart", {"size": (1 << 40) + 1}),
    ("UploadStart", {"offset": (1 << 40) + 1}),
    ("Part", {"data": b""}),
    ("Part", {"data": b"x" * (PART + 1)}),
    ("DownloadStart", {"what": "model"}),
    ("SubmitRequest", {"toml": b""}),
    ("SubmitRequest", {"toml": b"x" * (256 * 1024 + 1)}),
    ("SubmitRequest", {"about": b"x" * ((1 << 20) + 1)}),
    ("WatchEvent", {"json": b"x" * ((1 << 20) + 1)}),
    ("FilePart", {"data": b"x" * (PART + 1)}),
    ("FilePart", {"name": ""}),
    ("FilePart", {"name": ".."}),
    ("FilePart", {"name": "../model"}),
    ("FilePart", {"name": "/etc/passwd"}),
    ("FilePart", {"name": "a\\b"}),
    ("FilePart", {"name": ".bashrc"}),
    ("FilePart", {"name": "modèl"}),
    ("FilePart", {"name": "model\n"}),
]


def good(name):
    return next((c, f) for c, fs in GOOD.items() for f in fs if type(f).__name__ == name)


def unchecked(codec, frame):
    """A frame's bytes as another program would make them: by protobuf, without our limits."""

    def fill(message, frame):
        for each in dataclasses.fields(frame):
            value = getattr(frame, each.name)
            if isinstance(value, tuple):
                for item in value:
                    fill(getattr(message, each.name).add(), item)
            elif dataclasses.is_dataclass(value):
                fill(getattr(message, each.name), value)
            else:
                setattr(message, each.name, value)

    envelope = getattr(pb, codec.envelope)()
    if 0 in codec.forms:
        fill(envelope, frame)
        return envelope.SerializeToString()
    number = next(n for n, form in codec.forms.items() if form.frame is type(frame))
    field = envelope.DESCRIPTOR.fields_by_number[number]
    if field.message_type is None:
        envelope.data = frame.data
    else:
        getattr(envelope, field.name).SetInParent()
        fill(getattr(envelope, field.name), frame)
    return envelope.SerializeToString()


@pytest.mark.parametrize(
    "frame", [f for fs in GOOD.values() for f in fs], ids=lambda f: type(f).__name__
)
def test_what_another_program_makes_within_the_limits_is_taken(frame):
    codec, frame = good(type(frame).__name__)
    assert codec.unpack(unchecked(codec, frame), sender="va") == frame


@pytest.mark.parametrize(
    ("name", "change"), BEYOND, ids=[f"{n}.{next(iter(c))}" for n, c in BEYOND]
)
def test_beyond_a_limit_is_neither_sent_nor_taken(name, change):
    codec, frame = good(name)
    frame = dataclasses.replace(frame, **change)
    with pytest.raises(MalformedMessage, match="fault: this site"):
        codec.pack(frame)
    with pytest.raises(MalformedMessage, match="fault: va") as caught:
        codec.unpack(unchecked(codec, frame), sender="va")
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()
    for value in change.values():
        if isinstance(value, str) and len(value) > 3:
            assert value not in str(caught.value), "a refusal repeats what a peer sent"


def test_the_largest_of_each_is_taken():
    """Nothing within the limits is stopped by the size of its frame."""
    job = "ж" * 64
    start = frames.UploadStart(job, H, H, 1 << 40, 1 << 40)
    task, held = frames.Task("ж" * 64, HEX), frames.Held(job, HEX, *[(1 << 53) - 1] * 2)
    largest = [
        (FROM_SITE, frames.Record(job, b"x" * MAX_RECORD)),
        (FROM_SITE, frames.Hello(HEX, (task,) * 64, (held,) * 64, "ж" * 64)),
        (FROM_SITE, frames.SmallUpload(start, b"x" * INLINE)),
        (TO_SITE, frames.SmallDownload(WANT, b"x" * INLINE)),
        (UPLOAD, frames.Part(b"x" * PART)),
        (
            alone(frames.SubmitRequest),
            frames.SubmitRequest(b"x" * (256 << 10), job, HEX, b"x" * (1 << 20)),
        ),
        (alone(frames.JobsReply), frames.JobsReply(b"x" * (1 << 20))),
        (alone(frames.FilePart), frames.FilePart("f" * 128, 1 << 40, b"x" * PART, last=True)),
    ]
    for codec, frame in largest:
        data = codec.pack(frame)
        assert codec.unpack(data, sender="va") == frame
        assert len(data) <= frames.MAX_FRAME
    assert dict(calls.LENGTHS)["grpc.max_receive_message_length"] == frames.MAX_FRAME


def test_only_a_record_may_be_large_in_a_session():
    """A hello of megabytes is refused by its length: nested frames cost far more than their bytes."""
    tasks = pb.FromSite()
    tasks.hello.version = WIRE_VERSION
    tasks.hello.tasks.extend([pb.Task()] * (2 * SMALL))
    with pytest.raises(MalformedMessage, match=f"at most {SMALL} bytes"):
        FROM_SITE.unpack(tasks.SerializeToString(), sender="va")


@pytest.mark.parametrize(
    "frame",
    [
        frames.Pong("7"), frames.Pong(True), frames.Goodbye(7), frames.Record("job", "text"),
        frames.Hello(HEX, [TASK]), frames.SmallUpload(None, b"x"), frames.Ping(1), "hello",
    ],
    ids=repr,
)  # fmt: skip
def test_a_value_of_another_type_is_not_sent(frame):
    with pytest.raises(MalformedMessage):
        FROM_SITE.pack(frame)


def test_bulk_is_not_shown():
    for frame in (
        frames.Record("job", b"BULK"),
        frames.Part(b"BULK"),
        frames.SmallUpload(START, b"BULK"),
    ):
        assert "BULK" not in repr(frame)


# ---------------------------------------------------------------------------- several in a message


@given(st.lists(st.sampled_from([1, 100, 200, 20_000, 70_000, TOGETHER]), max_size=40))
def test_frames_in_messages_come_back_in_order_and_within_the_limits(sizes):
    packed = [FROM_SITE.pack(frames.Record("job", bytes(size))) for size in sizes]
    messages = list(in_messages(packed))
    several = [data for data in messages if data not in packed]
    assert all(len(data) <= TOGETHER for data in several)
    found = [list(FROM_SITE.unpack_each(data, sender="va")) for data in messages]
    assert all(len(each) <= MOST_TOGETHER for each in found)
    assert [len(frame.body) for each in found for frame in each] == sizes


def test_a_frame_in_a_message_of_several_has_the_limits_that_it_has_alone():
    record = FROM_SITE.pack(frames.Record("job", b"x"))
    wide = wrapped(3, BODY + b"\x20\x01")
    long = bytes([8 << 3 | 2, 0x81, 0xA0, 0x04]) + bytes(SMALL + 1)
    for wrong, what in (
        (wide, "Doing"), (long, "TrailHead: found 69633 bytes"), (record[:-1], "another length"),
        (bytes([8 << 3 | 2, 0x80, 0x00]), "another length"), (b"\x7a\x00", "unknown frame"),
    ):  # fmt: skip
        coming = FROM_SITE.unpack_each(record + wrong + record, sender="va")
        assert isinstance(next(coming), frames.Record)
        with pytest.raises(MalformedMessage, match=what) as caught:
            list(coming)
        assert caught.value.fault == "va"
        with pytest.raises(MalformedMessage):
            FROM_SITE.unpack(record + wrong, sender="va")


def test_a_message_has_a_frame_and_not_too_many_or_too_much():
    ping = frames.TO_SITE.pack(frames.Ping(1))
    assert len(list(TO_SITE.unpack_each(ping * MOST_TOGETHER, sender="hub"))) == MOST_TOGETHER
    large = TO_SITE.pack(frames.Record("job", bytes(TOGETHER)))
    assert len(list(TO_SITE.unpack_each(large, sender="hub"))) == 1
    for data, allowed in ((b"", 0), (ping * (MOST_TOGETHER + 1), MOST_TOGETHER), (large + ping, 0)):
        with pytest.raises(MalformedMessage):
            list(TO_SITE.unpack_each(data, sender="hub"))
        coming = TO_SITE.unpack_each(data, sender="hub")
        assert [next(coming) for _ in range(allowed)] == [frames.Ping(1)] * allowed


# ------------------------------------------------------------------------------------ versions


def newer(**more):
    """A hello of the next version, with a field that this version does not know."""
    hello = pb.Hello(version=WIRE_VERSION + 1, **more).SerializeToString() + b"\x78\x01"
    return wrapped(1, hello)


def test_another_version_is_named_beside_ours():
    with pytest.raises(VersionRefused) as caught:
        FROM_SITE.unpack(newer(software="fedcore 9.1"), sender="va")
    told = str(caught.value)
    assert f"found {WIRE_VERSION + 1} (of fedcore 9.1)" in told
    assert f"expected {WIRE_VERSION} (of fedcore" in told
    assert caught.value.fault == "va" and "same version" in caught.value.remedy


@pytest.mark.parametrize("software", ["", "\x1b[2J evil", "x" * 65])
def test_what_another_version_calls_itself_is_not_repeated_blindly(software):
    with pytest.raises(VersionRefused, match=rf"found {WIRE_VERSION + 1} \(of another Fedcore\)"):
        FROM_SITE.unpack(newer(software=software), sender="va")


@pytest.mark.parametrize(
    "name", ["Welcome", "SubmitRequest", "JobsRequest", "WatchRequest", "JobRequest", "SiteRequest"]
)
def test_every_first_frame_has_its_version_in_field_1(name):
    assert getattr(pb, name).DESCRIPTOR.fields_by_name["version"].number == 1
    codec = next(
        c for c in CODECS.values() if any(f.frame.__name__ == name for f in c.forms.values())
    )
    body = getattr(pb, name)(version=WIRE_VERSION + 1).SerializeToString()
    with pytest.raises(VersionRefused):
        codec.unpack(body if 0 in codec.forms else wrapped(1, body), sender="va")


# ------------------------------------------------------------------------------------ JSON, goodbye


def test_json_of_a_frame():
    value = {"job": "j", "sites": ["va", "zürich"], "gap": 0.5}
    assert frames.json_value(frames.json_bytes(value), sender="coordinator") == value


@pytest.mark.parametrize(
    "data", [b"", b"[]", b"7", b'{"a":NaN}', b'{"a":', b"\xff", b"[" * 100_000, b'{"a":' * 100_000]
)
def test_json_that_is_no_object_is_malformed(data):
    with pytest.raises(MalformedMessage, match="fault: coordinator"):
        frames.json_value(data, sender="coordinator")


def test_json_frames_never_hold_what_json_cannot():
    with pytest.raises(ValueError, match="JSON compliant"):
        frames.json_bytes({"a": float("nan")})
    assert json.loads(frames.json_bytes({"a": "ü"})) == {"a": "ü"}


def test_a_goodbye_says_whether_to_come_back():
    assert frames.Goodbye("stopping").again and not frames.Goodbye("revoked").again
