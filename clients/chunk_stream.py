"""A sum that is opened while it comes: its chunks are put in the event loop and read in a thread."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")

EachChunk = Callable[[int, bytes], None]
"""Takes the place of a chunk, and the chunk."""


class ChunkStream:
    """The chunks of one container, in order. Whoever puts them calls `end`, whatever happens: the reader waits."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[bytes | BaseException | None] = SimpleQueue()
        self._next = 0

    def put(self, place: int, chunk: bytes) -> None:
        """The chunk at this place; one that is here already, from a download that broke off, is not taken again."""
        if place == self._next:
            self._next += 1
            self._queue.put(chunk)

    def end(self, error: BaseException | None = None) -> None:
        """There are no more. error: raised in the reader."""
        self._queue.put(error)

    def __iter__(self) -> Iterator[bytes]:
        while (found := self._queue.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            yield found


async def read_on_the_way(
    download: Callable[[EachChunk], Awaitable[None]], read: Callable[[Iterable[bytes]], T]
) -> T:
    """What `read` makes of the chunks, in a thread, while `download` passes them on. Raises what either raises; the
    thread has ended then."""
    coming = ChunkStream()
    reading = asyncio.create_task(asyncio.to_thread(read, coming))
    try:
        await download(coming.put)
    except BaseException as error:
        coming.end(error)
        await asyncio.gather(reading, return_exceptions=True)
        raise
    coming.end()
    return await reading
