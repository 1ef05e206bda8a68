"""The gRPC calls: path, request and reply frames, and the certificate roles that may make them.

There are no generated stubs: a server registers a handler per call and a client uses
`channel.stream_stream(call.path)`, both with bytes, which `call.takes` and `call.gives` pack and
unpack. Invariant: the list is that of `federation.proto` (a test compares them).
"""

from dataclasses import dataclass
from typing import Generic, TypeVar

from fedcore.wire import frames
from fedcore.wire.codec import Codec
from fedcore.wire.frames import alone

Q = TypeVar("Q")
A = TypeVar("A")

SITE, OPERATOR, OBSERVER = "site", "operator", "observer"
_SITES = frozenset({SITE})
_OPERATORS = frozenset({OPERATOR})
_READERS = frozenset({OPERATOR, OBSERVER})


@dataclass(frozen=True)
class Call(Generic[Q, A]):
    """One call. takes, gives: codecs of request and reply; takes_stream, gives_stream: whether they are streams.

    roles: of the certificates that may make the call; the server checks them before it reads a frame. beside_session:
    from a site that has a session it must come on the connection of that session.
    """

    service: str
    name: str
    takes: Codec[Q]
    gives: Codec[A]
    roles: frozenset[str]
    takes_stream: bool = False
    gives_stream: bool = False
    beside_session: bool = False

    @property
    def path(self) -> str:
        """The path of the call in HTTP/2."""
        return f"/{self.service}/{self.name}"


COORDINATOR = "fedcore.v1.Coordinator"
OPERATORS = "fedcore.v1.Operator"

SESSION = Call(
    COORDINATOR, "Session", frames.FROM_SITE, frames.TO_SITE, _SITES,
    takes_stream=True, gives_stream=True,
)  # fmt: skip
CHECK = Call(COORDINATOR, "Check", alone(frames.Hello), alone(frames.Welcome), _SITES)
UPLOAD = Call(
    COORDINATOR, "Upload", frames.UPLOAD, alone(frames.UploadReceipt), _SITES,
    takes_stream=True, beside_session=True,
)  # fmt: skip
UPLOAD_OFFSET = Call(
    COORDINATOR, "UploadOffset", alone(frames.UploadStart), alone(frames.UploadReceipt), _SITES,
    beside_session=True,
)  # fmt: skip
DOWNLOAD = Call(
    COORDINATOR, "Download", alone(frames.DownloadStart), frames.DOWNLOAD, _SITES,
    gives_stream=True, beside_session=True,
)  # fmt: skip
RENEW = Call(
    COORDINATOR, "Renew", alone(frames.RenewRequest), alone(frames.RenewReply), _SITES,
    beside_session=True,
)  # fmt: skip

SUBMIT = Call(
    OPERATORS, "Submit", alone(frames.SubmitRequest), alone(frames.SubmitReply), _OPERATORS
)
JOBS = Call(OPERATORS, "Jobs", alone(frames.JobsRequest), alone(frames.JobsReply), _READERS)
WATCH = Call(
    OPERATORS, "Watch", alone(frames.WatchRequest), alone(frames.WatchEvent), _READERS,
    gives_stream=True,
)  # fmt: skip
STOP = Call(OPERATORS, "Stop", alone(frames.JobRequest), alone(frames.Reply), _OPERATORS)
EVICT = Call(OPERATORS, "Evict", alone(frames.SiteRequest), alone(frames.Reply), _OPERATORS)
RESULT = Call(
    OPERATORS, "Result", alone(frames.JobRequest), alone(frames.FilePart), _READERS,
    gives_stream=True,
)  # fmt: skip

LENGTHS = (
    ("grpc.max_receive_message_length", frames.MAX_FRAME),
    ("grpc.max_send_message_length", frames.MAX_FRAME),
)
"""Options for servers and channels: grpc refuses longer messages before they are in memory."""

KEEPALIVE_SECONDS, MOST_KEEPALIVE = 20.0, 60.0
"""Default and most. The shortest times after which middleboxes forget an idle connection are about a minute; Azure's
balancer takes 4 minutes, that of AWS 350 s."""


def keepalive(seconds: float) -> tuple[tuple[str, int], ...]:
    """Options for servers and channels: a ping after so many seconds without a byte from the other end, also between
    calls. Where half of that passes without an answer, the connection is over; where a ping of gRPC's own was under way
    before, after twice that time."""
    whole = round(1000 * seconds)
    return (
        ("grpc.keepalive_time_ms", whole),
        ("grpc.keepalive_timeout_ms", whole // 2),
        # Of the pings that measure the link. While one is under way no other is sent; and the answer to it may be
        # behind seconds of an upload on a slow line, so it has longer.
        ("grpc.http2.ping_timeout_ms", min(2 * whole, 60_000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    )
