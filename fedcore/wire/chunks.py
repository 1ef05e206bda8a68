"""A long byte string as parts, resumable from any offset and checked on arrival.

It is a vector's file as the spool has it (the chunk container) or a file of a result; here it is opaque
bytes, sent from disk and received to disk one part at a time. Parts are PART bytes, the last may be shorter.
After a lost connection a site asks `UploadOffset` and begins a new call there. A coordinator that gets a
start at another offset than its spool's ends the call at once, with a receipt that has its own offset.

Invariant: memory use is one part, however long the vector.
"""

from collections.abc import Iterable, Iterator
from typing import BinaryIO

from fedcore.errors import MalformedMessage, VectorRefused
from fedcore.wire import frames
from fedcore.wire.limits import PART


def upload(start: frames.UploadStart, source: BinaryIO) -> Iterator[bytes]:
    """The packed frames of an upload, from `start.offset` of the source on."""
    yield frames.UPLOAD.pack(start)
    yield from map(frames.UPLOAD.pack, _parts(source, start.offset, start.size))


def download(head: frames.DownloadHead, source: BinaryIO) -> Iterator[bytes]:
    """The packed frames of a download, from `head.offset` of the source on."""
    yield frames.DOWNLOAD.pack(head)
    yield from map(frames.DOWNLOAD.pack, _parts(source, head.offset, head.size))


def _parts(source: BinaryIO, offset: int, size: int) -> Iterator[frames.Part]:
    """Bytes [offset, size) of the source. Raises VectorRefused where it ends early."""
    source.seek(offset)
    while offset < size:
        data = source.read(min(PART, size - offset))
        if not data:
            raise VectorRefused("file", f"{offset} bytes", f"{size}", "this site")
        yield frames.Part(data)
        offset += len(data)


MAX_FILES = 256
"""Files of one result."""


class Incoming:
    """The receiver of one upload or download: `take` returns each frame's bytes, in order.

    size: bytes in all. offset: of the next part; after a lost connection the transfer resumes there.
    """

    def __init__(self, start: frames.UploadStart | frames.DownloadHead, *, sender: str) -> None:
        self.size, self.offset, self.sender = start.size, start.offset, sender
        if self.offset > self.size:
            raise MalformedMessage("offset", f"{self.offset}", f"at most {self.size}", sender)

    def take(self, frame: frames.UploadPart | frames.DownloadPart) -> bytes:
        """The bytes of the next part. Raises MalformedMessage, and VectorRefused beyond the size."""
        if not isinstance(frame, frames.Part):
            raise MalformedMessage(
                "frame", f"a second {type(frame).__name__}", "a part", self.sender
            )
        end = self.offset + len(frame.data)
        if end > self.size:
            raise VectorRefused("vector", f"{end} bytes or more", f"{self.size}", self.sender)
        if end < self.size and len(frame.data) != PART:  # else tiny parts could keep a thread busy
            raise MalformedMessage("part", f"{len(frame.data)} bytes", f"{PART}", self.sender)
        self.offset = end
        return frame.data


def file_parts(name: str, source: BinaryIO) -> Iterator[frames.FilePart]:
    """All parts of one file of a result; an empty file is one empty part."""
    offset, data = 0, source.read(PART)
    while True:
        following = source.read(PART)
        yield frames.FilePart(name, offset, data, not following)
        if not following:
            return
        offset, data = offset + len(data), following


def in_order(parts: Iterable[frames.FilePart], *, sender: str) -> Iterator[frames.FilePart]:
    """The parts of a result, if files come one after the other and none twice. Raises MalformedMessage."""
    done: set[str] = set()
    name, offset = "", 0
    for part in parts:
        if not name and part.name not in done:
            name, offset = part.name, 0
            if len(done) == MAX_FILES:
                raise MalformedMessage("files", "one more", f"at most {MAX_FILES}", sender)
        if part.name != name or part.offset != offset:
            raise MalformedMessage("file", "a part out of order", "the next one", sender)
        offset += len(part.data)
        if part.last:
            done.add(name)
            name = ""
        yield part
