"""The gRPC calls: path, request and reply frames, and the certificate roles that may make them.

There are no generated stubs: a server registers a handler per call and a client uses
`channel.stream_stream(call.path)`, both with bytes, which `call.takes` and `call.gives` pack and
unpack. Invariant: the list is that of `federation.proto` (a test compares them).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from fedcore.wire import frames
from fedcore.wire.codec import Codec

Q = TypeVar("Q")
A = TypeVar("A")

SITE, OPERATOR, OBSERVER = "site", "operator", "observer"
_SITES = frozenset({SITE})
_OPERATORS = frozenset({OPERATOR})
_READERS = frozenset({OPERATOR, OBSERVER})


@dataclass(frozen=True)
class Call(Generic[Q, A]):
    """One call. takes, gives: codecs of request and reply; takes_stream, gives_stream: whether they are streams.

    roles: of the certificates that may make the call; the server checks them before it reads a frame.
    """

    service: str
    name: str
    takes: Codec[Q]
    gives: Codec[A]
    roles: frozenset[str]
    takes_stream: bool = False
    gives_stream: bool = False

    @property
    def path(self) -> str:
        """The path of the call in HTTP/2."""
        return f"/{self.service}/{self.name}"


COORDINATOR = "fedcore.v1.Coordinator"
OPERATORS = "fedcore.v1.Operator"

SESSION = Call(
    COORDINATOR,
    "Session",
    frames.FROM_SITE,
    frames.TO_SITE,
    _SITES,
    takes_stream=True,
    gives_stream=True,
)
CHECK = Call(COORDINATOR, "Check", frames.HELLO, frames.WELCOME, _SITES)
UPLOAD = Call(
    COORDINATOR, "Upload", frames.UPLOAD, frames.UPLOAD_RECEIPT, _SITES, takes_stream=True
)
UPLOAD_OFFSET = Call(
    COORDINATOR, "UploadOffset", frames.UPLOAD_START, frames.UPLOAD_RECEIPT, _SITES
)
DOWNLOAD = Call(
    COORDINATOR, "Download", frames.DOWNLOAD_START, frames.DOWNLOAD, _SITES, gives_stream=True
)

SUBMIT = Call(OPERATORS, "Submit", frames.SUBMIT_REQUEST, frames.SUBMIT_REPLY, _OPERATORS)
JOBS = Call(OPERATORS, "Jobs", frames.JOBS_REQUEST, frames.JOBS_REPLY, _READERS)
WATCH = Call(
    OPERATORS, "Watch", frames.WATCH_REQUEST, frames.WATCH_EVENT, _READERS, gives_stream=True
)
STOP = Call(OPERATORS, "Stop", frames.JOB_REQUEST, frames.REPLY, _OPERATORS)
EVICT = Call(OPERATORS, "Evict", frames.SITE_REQUEST, frames.REPLY, _OPERATORS)
RESULT = Call(
    OPERATORS, "Result", frames.JOB_REQUEST, frames.FILE_PART, _READERS, gives_stream=True
)

_ALL: tuple[Call[Any, Any], ...] = (
    SESSION, CHECK, UPLOAD, UPLOAD_OFFSET, DOWNLOAD,
    SUBMIT, JOBS, WATCH, STOP, EVICT, RESULT,
)  # fmt: skip
CALLS: Mapping[str, Call[Any, Any]] = MappingProxyType({call.path: call for call in _ALL})
"""{path: call}, as an interceptor looks them up."""

LENGTHS = (
    ("grpc.max_receive_message_length", frames.MAX_FRAME),
    ("grpc.max_send_message_length", frames.MAX_FRAME),
)
"""Options for servers and channels: grpc refuses longer messages before they are in memory."""
