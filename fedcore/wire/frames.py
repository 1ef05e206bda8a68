"""Every frame of the wire with the limits of its fields; `federation.proto` documents their use.

`FROM_SITE.pack(Doing("job", "training", 40))` gives bytes, `FROM_SITE.unpack(data, sender="va")` the
frame. The shells exchange bytes with grpc, so that every received frame is checked here.

Invariant: a frame beyond its limits is neither sent nor accepted. No field carries free text of a site to
the coordinator: an activity is one of `DOING`, and `Goodbye.text` is a fixed sentence of this program.
"""

import json
from dataclasses import dataclass, field
from typing import Annotated, TypeVar, cast

from fedcore import __version__
from fedcore.errors import MalformedMessage
from fedcore.types import Json
from fedcore.wire._generated import federation_pb2
from fedcore.wire.codec import WIRE_VERSION, Codec, Form
from fedcore.wire.limits import (
    INLINE,
    KIB,
    MAX_JSON,
    MAX_RECORD,
    MAX_TOML,
    PART,
    SMALL,
    Digest,
    FileName,
    Hex,
    HexOrNone,
    Id,
    Line,
    Number,
    Offset,
    Size,
    length,
    one_of,
    text,
    within,
)

DOING = (
    "idle", "loading", "training", "evaluating", "protecting", "uploading", "downloading", "opening",
    "waiting",
)  # fmt: skip
"""The activities that a site reports."""

GOODBYES = {
    "stopping": True,  # this process ends; it may be restarted
    "busy": True,  # too many connections or calls
    "malformed": True,  # a frame violated a limit of this file
    "replaced": False,  # a newer session of the same site replaced this one
    "version": False,  # the two sides have different wire versions
    "roster": False,  # the identity keys pinned on both sides differ, or the site is not among them
    "revoked": False,  # the certificate was revoked
    "evicted": False,  # an operator evicted the site
}
"""{why a session ends: whether a later reconnect can succeed}."""

WHAT = ("sum", "checkpoint")
"""What a site may download."""

Version = Annotated[int, within(WIRE_VERSION, WIRE_VERSION)]
Software = Annotated[str, text(1, 64)]
SOFTWARE = f"fedcore {__version__}"


# ------------------------------------------------------------------------------------ session


@dataclass(frozen=True)
class Task:
    """A task that a site allows, by name and by the hash of its code."""

    name: Id
    sha256: Hex


@dataclass(frozen=True)
class Held:
    """A site's position in one job: hash of its last release certificate, key epoch, last round."""

    job: Id
    certificate: HexOrNone
    epoch: Number
    round: Number


@dataclass(frozen=True)
class Hello:
    """The first frame of a site. pins: `roster_digest` of the identity keys it has pinned, hex."""

    pins: Hex
    tasks: Annotated[tuple[Task, ...], length(0, 64)] = ()
    held: Annotated[tuple[Held, ...], length(0, 64)] = ()
    software: Software = SOFTWARE
    version: Version = WIRE_VERSION


@dataclass(frozen=True)
class Welcome:
    """The coordinator's answer. time_ms: its clock, milliseconds since 1970 UTC."""

    federation: Id
    time_ms: Number
    software: Software = SOFTWARE
    version: Version = WIRE_VERSION


@dataclass(frozen=True)
class Record:
    """A message of the protocol in its canonical bytes; `records.py` makes and reads it."""

    job: Id
    body: Annotated[bytes, length(1, MAX_RECORD)] = field(repr=False)


@dataclass(frozen=True)
class Doing:
    """The site's activity. percent: of this piece of work, 0 where unknown; never a count of rows."""

    job: Id
    what: Annotated[str, one_of(DOING)]
    percent: Annotated[int, within(0, 100)] = 0


@dataclass(frozen=True)
class Ping:
    """A heartbeat: the session answers at once with a Pong of the same number, also while training runs."""

    number: Number


@dataclass(frozen=True)
class Pong:
    """The answer to a Ping."""

    number: Number


@dataclass(frozen=True)
class Awaited:
    """One site that a job waits for."""

    site: Id


@dataclass(frozen=True)
class Waiting:
    """The sites that a job waits for, shown to the operators of sites. sites: empty when the wait is over.

    of: how many sites there could be; until_ms: end of the wait, milliseconds since 1970 UTC, 0 if unknown;
    then: with how many sites the job continues, 0 if it cannot; least: how many it needs.
    """

    job: Id
    sites: Annotated[tuple[Awaited, ...], length(0, 64)] = ()
    of: Annotated[int, within(0, 1 << 20)] = 0
    until_ms: Number = 0
    then: Annotated[int, within(0, 1 << 20)] = 0
    least: Annotated[int, within(0, 1 << 20)] = 0
    in_round: bool = False


@dataclass(frozen=True)
class Goodbye:
    """The last frame of either side. text: one line for the operator, of this program's own."""

    code: Annotated[str, one_of(GOODBYES)]
    text: Line = ""

    @property
    def again(self) -> bool:
        """Whether a later reconnect can succeed."""
        return GOODBYES[self.code]


# ------------------------------------------------------------------------------------ vectors


@dataclass(frozen=True)
class UploadStart:
    """The first frame of an upload. header: h of the round; digest: of the vector, as the site signed it.

    size: bytes of the whole container; offset: of the first part, from an UploadReceipt.
    """

    job: Id
    header: Digest
    digest: Digest
    size: Size
    offset: Offset = 0


@dataclass(frozen=True)
class Part:
    """The next bytes of a vector: PART of them, fewer only in the last."""

    data: Annotated[bytes, length(1, PART)] = field(repr=False)


@dataclass(frozen=True)
class UploadReceipt:
    """How much of the upload with this digest is on the coordinator's disk.

    complete: all of it, with this digest. A receipt before all parts were sent asks the site to resume from
    `offset` in a new call.
    """

    digest: Digest
    offset: Offset
    complete: bool = False


@dataclass(frozen=True)
class DownloadStart:
    """A site asks for the sum or checkpoint with this digest, from `offset` on."""

    job: Id
    what: Annotated[str, one_of(WHAT)]
    digest: Digest
    offset: Offset = 0


@dataclass(frozen=True)
class DownloadHead:
    """The first frame of a download. size: bytes in all; offset: of the first part."""

    digest: Digest
    size: Size
    offset: Offset


@dataclass(frozen=True)
class SmallUpload:
    """A whole vector in one frame; answered with an UploadReceipt in the session."""

    start: UploadStart
    data: Annotated[bytes, length(1, INLINE)] = field(repr=False)


@dataclass(frozen=True)
class SmallDownload:
    """A whole sum or checkpoint in one frame, sent with the record that announces it, without a request."""

    start: DownloadStart
    data: Annotated[bytes, length(1, INLINE)] = field(repr=False)


# ------------------------------------------------------------------------------------ operators


@dataclass(frozen=True)
class SubmitRequest:
    """A job: its file unchanged, and the task's name and hash on the operator's machine.

    about: JSON with that machine's findings about the task, empty if none are needed.
    """

    toml: Annotated[bytes, length(1, MAX_TOML)]
    task: Id
    task_sha256: Hex
    about: Annotated[bytes, length(0, MAX_JSON)] = b""
    version: Version = WIRE_VERSION


@dataclass(frozen=True)
class SubmitReply:
    """The job's id."""

    job: Id


@dataclass(frozen=True)
class JobsRequest:
    """Asks for all jobs."""

    version: Version = WIRE_VERSION


@dataclass(frozen=True)
class JobsReply:
    """A JSON object; `json_value` reads it."""

    json: Annotated[bytes, length(2, MAX_JSON)]


@dataclass(frozen=True)
class WatchRequest:
    """Asks for the events of a job; "" is the running one, or else the last."""

    job: Annotated[str, text(0, 64)] = ""
    version: Version = WIRE_VERSION


@dataclass(frozen=True)
class WatchEvent:
    """A JSON object; `json_value` reads it."""

    json: Annotated[bytes, length(2, MAX_JSON)]


@dataclass(frozen=True)
class JobRequest:
    """Names the job of `Stop` and `Result`."""

    job: Id
    version: Version = WIRE_VERSION


@dataclass(frozen=True)
class SiteRequest:
    """Names the site of `Evict`. undo: revokes an earlier eviction."""

    site: Id
    undo: bool = False
    version: Version = WIRE_VERSION


@dataclass(frozen=True)
class Reply:
    """The answer of a finished request, one line for the operator."""

    text: Line = ""


@dataclass(frozen=True)
class FilePart:
    """The next bytes of a file of a result; a file ends with `last`, an empty one is one empty part."""

    name: FileName
    offset: Offset
    data: Annotated[bytes, length(0, PART)] = field(repr=False)
    last: bool


def json_bytes(value: Json) -> bytes:
    """An object as the JSON of a frame."""
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()


def json_value(data: bytes, *, sender: str) -> Json:
    """The JSON object of a frame. Raises MalformedMessage."""
    try:
        value = json.loads(data, parse_constant=_no_such_number)
    except (ValueError, RecursionError):  # bytes that are not UTF-8 are a ValueError too
        value = None
    if not isinstance(value, dict):
        raise MalformedMessage("JSON", "something else", "an object", sender)
    return cast("Json", value)


def _no_such_number(name: str) -> None:
    raise ValueError(name)


# ------------------------------------------------------------------------------------ codecs

F = TypeVar("F")

FromSite = Hello | Record | Doing | Pong | SmallUpload | Goodbye
ToSite = Welcome | Record | Ping | UploadReceipt | SmallDownload | Goodbye | Waiting
UploadPart = UploadStart | Part
DownloadPart = DownloadHead | Part


def _form(frame: type[F], number: int = 0, most: int = SMALL) -> Form[F]:
    """The wire form of a frame; its protobuf class has the same name, and a Part is bare bytes."""
    message = None if frame is Part else getattr(federation_pb2, frame.__name__)
    return Form(frame, message, most, number)


def _oneof(name: str, *frames: type[F]) -> Codec[F]:
    """The frames of a `oneof`, numbered from 1."""
    most: dict[type[object], int] = {Record: MAX_RECORD + KIB, Part: PART}
    forms = (_form(each, at, most.get(each, SMALL)) for at, each in enumerate(frames, start=1))
    return Codec(name, *forms)


def _alone(frame: type[F], most: int = SMALL) -> Codec[F]:
    return Codec(frame.__name__, _form(frame, most=most))


FROM_SITE: Codec[FromSite] = _oneof("FromSite", Hello, Record, Doing, Pong, SmallUpload, Goodbye)
TO_SITE: Codec[ToSite] = _oneof(
    "ToSite", Welcome, Record, Ping, UploadReceipt, SmallDownload, Goodbye, Waiting
)
UPLOAD: Codec[UploadPart] = _oneof("UploadPart", UploadStart, Part)
DOWNLOAD: Codec[DownloadPart] = _oneof("DownloadPart", DownloadHead, Part)

HELLO = _alone(Hello)
WELCOME = _alone(Welcome)
UPLOAD_START = _alone(UploadStart)
UPLOAD_RECEIPT = _alone(UploadReceipt)
DOWNLOAD_START = _alone(DownloadStart)
SUBMIT_REQUEST = _alone(SubmitRequest, MAX_TOML + MAX_JSON + KIB)
SUBMIT_REPLY = _alone(SubmitReply)
JOBS_REQUEST = _alone(JobsRequest)
JOBS_REPLY = _alone(JobsReply, MAX_JSON + KIB)
WATCH_REQUEST = _alone(WatchRequest)
WATCH_EVENT = _alone(WatchEvent, MAX_JSON + KIB)
JOB_REQUEST = _alone(JobRequest)
SITE_REQUEST = _alone(SiteRequest)
REPLY = _alone(Reply)
FILE_PART = _alone(FilePart, PART + KIB)

MAX_FRAME = MAX_RECORD + 2 * KIB
"""Bytes that grpc must accept (its default is 4 MiB): above the limit of every form."""
