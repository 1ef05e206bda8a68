"""Every frame of the wire with the limits of its fields; `federation.proto` documents their use.

`FROM_SITE.pack(Doing("job", "training", 40))` gives bytes, `FROM_SITE.unpack(data, sender="va")` the
frame. The shells exchange bytes with grpc, so that every received frame is checked here.

Invariant: a frame beyond its limits is neither sent nor accepted. No field carries free text of a site to
the coordinator: an activity is one of `DOING`, and `Goodbye.text` is a fixed sentence of this program.
"""

import itertools
import json
import secrets
from dataclasses import dataclass, field
from typing import Annotated, TypeVar, cast

from fedcore import __version__
from fedcore.errors import MalformedMessage
from fedcore.types import Json
from fedcore.wire import limits
from fedcore.wire._generated import federation_pb2
from fedcore.wire.codec import WIRE_VERSION, Codec, Form
from fedcore.wire.limits import INLINE, KIB, MAX_JSON, MAX_RECORD, MAX_ROSTER, MAX_TOML, PART, SMALL

DOING = (
    "idle", "loading", "training", "evaluating", "protecting", "uploading", "downloading", "opening",
    "waiting",
)  # fmt: skip
"""The activities that a site reports."""

GOODBYES = {
    "stopping": True,  # this process ends; it may be restarted
    "busy": True,  # too many connections or calls
    "malformed": True,  # a frame violated a limit of this file
    "replaced": False,  # another process of the same site connected, and this one did not answer
    "cloned": False,  # another process of the same site is connected, and answers
    "version": False,  # the two sides have different wire versions
    "roster": False,  # the identity keys pinned on both sides differ, or the site is not among them
    "revoked": False,  # the certificate was revoked
    "expired": False,  # the certificate's time is over
    "evicted": False,  # an operator evicted the site
    "paused": True,  # the operator of the site paused it
    "left": True,  # the operator of the site left the federation, until further notice
    "hours": True,  # outside the hours in which the site takes part
}
"""{why a session ends: whether a later reconnect can succeed}."""

AWAY = ("paused", "left", "hours")
"""Of these, those by which a site is away because its operator says so."""

ROSTER_WORDS = {
    "approved": "approved",
    "waiting": "waits for its operator's approval",
    "signature": "refused: not signed by the federation's authority",
    "older": "refused: older than one that the site has seen",
    "differs": "refused: other sites than in the roster of this number that the site has seen",
    "malformed": "refused: it cannot be read",
    "unknown": "refused: a job of a roster that the site was not given",
}
"""{what a site makes of a roster: in words for operators}."""

ROSTER_TAKEN = ("approved", "waiting")
"""Those of `ROSTER_WORDS` that are no refusal."""

SUM, CHECKPOINT, SUM_OF_ROUND = "sum", "checkpoint", "sum of round"
WHAT = (SUM, CHECKPOINT, SUM_OF_ROUND)
"""What a site may download."""

Version = Annotated[int, limits.within(WIRE_VERSION, WIRE_VERSION)]
Software = Annotated[str, limits.text(1, 64)]
SOFTWARE = f"fedcore {__version__}"


@dataclass(frozen=True)
class Task:
    """A task that a site allows, by name and by the hash of its code."""

    name: limits.Id
    sha256: limits.Hex


@dataclass(frozen=True)
class Held:
    """A site's position in one job: hash of its last release certificate, key epoch, last round."""

    job: limits.Id
    certificate: limits.HexOrNone
    epoch: limits.Number
    round: limits.Number


def new_instance() -> bytes:
    """What a process of a site is told apart from another one by."""
    return secrets.token_bytes(16)


@dataclass(frozen=True)
class Hello:
    """The first frame of a site. pins: `roster_digest` of the identity keys it has pinned, hex.

    instance: 16 random bytes, of the process: a session with others is that of another process.
    """

    pins: limits.Hex
    tasks: Annotated[tuple[Task, ...], limits.length(0, 64)] = ()
    held: Annotated[tuple[Held, ...], limits.length(0, 64)] = ()
    software: Software = SOFTWARE
    version: Version = WIRE_VERSION
    instance: Annotated[bytes, limits.length(16, 16)] = field(
        default_factory=new_instance, repr=False
    )


@dataclass(frozen=True)
class Welcome:
    """The coordinator's answer. time_ms: its clock, milliseconds since 1970 UTC; roster: number of its newest one, 0
    without a number."""

    federation: limits.Id
    time_ms: limits.Number
    roster: limits.Number = 0
    software: Software = SOFTWARE
    version: Version = WIRE_VERSION


@dataclass(frozen=True)
class Record:
    """A message of the protocol in its canonical bytes; `records.py` makes and reads it."""

    job: limits.Id
    body: Annotated[bytes, limits.length(1, MAX_RECORD)] = field(repr=False)


@dataclass(frozen=True)
class Doing:
    """The site's activity. percent: of this piece of work, 0 where unknown; never a count of rows."""

    job: limits.Id
    what: Annotated[str, limits.one_of(DOING)]
    percent: Annotated[int, limits.within(0, 100)] = 0


@dataclass(frozen=True)
class Ping:
    """A heartbeat: the session answers at once with a Pong of the same number, also while training runs."""

    number: limits.Number


@dataclass(frozen=True)
class Pong:
    """The answer to a Ping."""

    number: limits.Number


@dataclass(frozen=True)
class Awaited:
    """One site that a job waits for."""

    site: limits.Id


@dataclass(frozen=True)
class Waiting:
    """The sites that a job waits for, shown to the operators of sites. sites: empty when the wait is over.

    of: how many sites there could be; until_ms: end of the wait, milliseconds since 1970 UTC, 0 if unknown;
    then: with how many sites the job continues, 0 if it cannot; least: how many it needs.
    """

    job: limits.Id
    sites: Annotated[tuple[Awaited, ...], limits.length(0, 64)] = ()
    of: Annotated[int, limits.within(0, 1 << 20)] = 0
    until_ms: limits.Number = 0
    then: Annotated[int, limits.within(0, 1 << 20)] = 0
    least: Annotated[int, limits.within(0, 1 << 20)] = 0
    in_round: bool = False


@dataclass(frozen=True)
class Roster:
    """The newest roster, as the authority signed it: the bytes of roster.toml (`identity/signed_roster.py`)."""

    document: Annotated[bytes, limits.length(1, MAX_ROSTER)] = field(repr=False)


@dataclass(frozen=True)
class JobRoster:
    """The roster of a job that is about to be offered: number (0: not numbered) and `roster_digest`."""

    job: limits.Id
    number: limits.Number
    digest: limits.Hex


@dataclass(frozen=True)
class RosterSeen:
    """What a site made of a roster. number: of the newest that it approved; word: one of `ROSTER_WORDS`."""

    number: limits.Number
    word: Annotated[str, limits.one_of(ROSTER_WORDS)]


@dataclass(frozen=True)
class Goodbye:
    """The last frame of either side. text: one line for the operator, of this program's own."""

    code: Annotated[str, limits.one_of(GOODBYES)]
    text: limits.Line = ""

    @property
    def again(self) -> bool:
        """Whether a later reconnect can succeed."""
        return GOODBYES[self.code]


@dataclass(frozen=True)
class TrailHead:
    """The last line of a site's audit trail: its number and SHA-256."""

    number: limits.Number
    hash: limits.Digest


@dataclass(frozen=True)
class TrailReceipt:
    """The coordinator confirms a TrailHead, and its own last line (`fedcore/audit/receipt.py`).

    certificate: of the coordinator, PEM; signature: under its key.
    """

    number: limits.Number
    hash: limits.Digest
    time_ms: limits.Number
    own_number: limits.Number
    own_hash: limits.Digest
    certificate: Annotated[bytes, limits.length(1, 8 * KIB)]
    signature: Annotated[bytes, limits.length(1, 128)] = field(repr=False)


@dataclass(frozen=True)
class SecondProcess:
    """To the running process of a site: another one came with its certificate, and was refused.

    address: where it came from, as the coordinator saw it; time_ms: milliseconds since 1970 UTC.
    """

    address: limits.Line
    time_ms: limits.Number


@dataclass(frozen=True)
class UploadStart:
    """The first frame of an upload. header: h of the round; digest: of the vector, as the site signed it.

    size: bytes of the whole container; offset: of the first part, from an UploadReceipt.
    """

    job: limits.Id
    header: limits.Digest
    digest: limits.Digest
    size: limits.Size
    offset: limits.Offset = 0


@dataclass(frozen=True)
class Part:
    """The next bytes of a vector: PART of them, fewer only in the last."""

    data: Annotated[bytes, limits.length(1, PART)] = field(repr=False)


@dataclass(frozen=True)
class UploadReceipt:
    """How much of the upload with this digest is on the coordinator's disk.

    complete: all of it, with this digest. A receipt before all parts were sent asks the site to resume from
    `offset` in a new call.
    """

    digest: limits.Digest
    offset: limits.Offset
    complete: bool = False


@dataclass(frozen=True)
class DownloadStart:
    """A site asks for the sum or checkpoint with this digest, from `offset` on.

    what: with "sum of round" the digest is h, of the round under way: the answer begins with the announcement of its
    sum, and is empty where the round ends without one.
    """

    job: limits.Id
    what: Annotated[str, limits.one_of(WHAT)]
    digest: limits.Digest
    offset: limits.Offset = 0


@dataclass(frozen=True)
class DownloadHead:
    """The first frame of a download. size: bytes in all; offset: of the first part."""

    digest: limits.Digest
    size: limits.Size
    offset: limits.Offset


@dataclass(frozen=True)
class RenewRequest:
    """A site asks for a new certificate. csr: PKCS10, DER, for the key that it has or for a new one."""

    csr: Annotated[bytes, limits.length(1, 4 * KIB)]


@dataclass(frozen=True)
class RenewReply:
    """The certificate, PEM."""

    certificate: Annotated[bytes, limits.length(1, 8 * KIB)]


@dataclass(frozen=True)
class SmallUpload:
    """A whole vector in one frame; answered with an UploadReceipt in the session."""

    start: UploadStart
    data: Annotated[bytes, limits.length(1, INLINE)] = field(repr=False)


@dataclass(frozen=True)
class SmallDownload:
    """A whole sum or checkpoint in one frame, sent with the record that announces it, without a request."""

    start: DownloadStart
    data: Annotated[bytes, limits.length(1, INLINE)] = field(repr=False)


@dataclass(frozen=True)
class SubmitRequest:
    """A job: its file unchanged, and the task's name and hash on the operator's machine.

    about: JSON with that machine's findings about the task, empty if none are needed.
    """

    toml: Annotated[bytes, limits.length(1, MAX_TOML)]
    task: limits.Id
    task_sha256: limits.Hex
    about: Annotated[bytes, limits.length(0, MAX_JSON)] = b""
    version: Version = WIRE_VERSION


@dataclass(frozen=True)
class SubmitReply:
    """The job's id."""

    job: limits.Id


@dataclass(frozen=True)
class JobsRequest:
    """Asks for all jobs."""

    version: Version = WIRE_VERSION


@dataclass(frozen=True)
class JobsReply:
    """A JSON object; `json_value` reads it."""

    json: Annotated[bytes, limits.length(2, MAX_JSON)]


@dataclass(frozen=True)
class WatchRequest:
    """Asks for the events of a job; "" is the running one, or else the last."""

    job: Annotated[str, limits.text(0, 64)] = ""
    version: Version = WIRE_VERSION


@dataclass(frozen=True)
class WatchEvent:
    """A JSON object; `json_value` reads it."""

    json: Annotated[bytes, limits.length(2, MAX_JSON)]


@dataclass(frozen=True)
class JobRequest:
    """Names the job of `Stop` and `Result`."""

    job: limits.Id
    version: Version = WIRE_VERSION


@dataclass(frozen=True)
class SiteRequest:
    """Names the site of `Evict`. undo: revokes an earlier eviction."""

    site: limits.Id
    undo: bool = False
    version: Version = WIRE_VERSION


@dataclass(frozen=True)
class Reply:
    """The answer of a finished request, one line for the operator."""

    text: limits.Line = ""


@dataclass(frozen=True)
class FilePart:
    """The next bytes of a file of a result; a file ends with `last`, an empty one is one empty part."""

    name: limits.FileName
    offset: limits.Offset
    data: Annotated[bytes, limits.length(0, PART)] = field(repr=False)
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


F = TypeVar("F")

FromSite = Hello | Record | Doing | Pong | SmallUpload | Goodbye | RosterSeen | TrailHead
ToSite = (
    Welcome | Record | Ping | UploadReceipt | SmallDownload | Goodbye | Waiting | Roster | JobRoster |
    TrailReceipt | SecondProcess
)  # fmt: skip
UploadPart = UploadStart | Part
DownloadPart = DownloadHead | Part


_MOST: dict[type[object], int] = {
    Record: MAX_RECORD + KIB, Part: PART, FilePart: PART + KIB, JobsReply: MAX_JSON + KIB,
    WatchEvent: MAX_JSON + KIB, Roster: MAX_ROSTER + KIB, SubmitRequest: MAX_TOML + MAX_JSON + KIB,
}  # fmt: skip
"""{frame: bytes of its largest form}; SMALL for all others."""


def most_bytes(frame: type[object]) -> int:
    """Bytes of the largest form of a frame."""
    return _MOST.get(frame, SMALL)


def _form(frame: type[F], number: int = 0) -> Form[F]:
    """The wire form of a frame; its protobuf class has the same name, and a Part is bare bytes."""
    message = None if frame is Part else getattr(federation_pb2, frame.__name__)
    return Form(frame, message, most_bytes(frame), number)


def _oneof(name: str, *frames: type[F]) -> Codec[F]:
    """The frames of a `oneof`, numbered from 1."""
    return Codec(name, *map(_form, frames, itertools.count(1)))


def alone(frame: type[F]) -> Codec[F]:
    """The codec of a call that carries one type of frame."""
    return Codec(frame.__name__, _form(frame))


FROM_SITE: Codec[FromSite] = _oneof(
    "FromSite", Hello, Record, Doing, Pong, SmallUpload, Goodbye, RosterSeen, TrailHead
)
TO_SITE: Codec[ToSite] = _oneof(
    "ToSite",
    Welcome,
    Record,
    Ping,
    UploadReceipt,
    SmallDownload,
    Goodbye,
    Waiting,
    Roster,
    JobRoster,
    TrailReceipt,
    SecondProcess,
)
UPLOAD: Codec[UploadPart] = _oneof("UploadPart", UploadStart, Part)
DOWNLOAD: Codec[DownloadPart] = _oneof("DownloadPart", DownloadHead, Part)

MAX_FRAME = MAX_RECORD + 2 * KIB
"""Bytes that grpc must accept (its default is 4 MiB): above the limit of every form."""
