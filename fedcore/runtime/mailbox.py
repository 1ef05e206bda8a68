"""The event queue of one job, its timer, the work that runs in the background for it, and its retry after a fault.

Invariants: events are handled one at a time, each to its end, in the order they came. The timer runs
even if the queue never empties. Background work ends in exactly one of three ways: with its result as an
event, with its exception as an event, or cancelled on request; no fault is lost, so no job waits for work
that has ended.

The meaning of events and the reaction to faults belong to the caller.
"""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Generic, TypeVar

Event = TypeVar("Event")

_SLACK = 0.001
"""Seconds: a timer of the event loop may fire before the clock has reached its time."""


class Mailbox(Generic[Event]):
    """A queue of events with a timer and background work.

    tick: the event that is handled whenever the timer is due.
    """

    def __init__(self, tick: Event) -> None:
        self._tick = tick
        self._queue: asyncio.Queue[Event] = asyncio.Queue()
        self._background: set[asyncio.Task[Event | None]] = set()

    def put(self, event: Event) -> None:
        """Queue an event; it is handled after all that came before it."""
        self._queue.put_nowait(event)

    @property
    def backlog(self) -> int:
        """Number of events in the queue."""
        return self._queue.qsize()

    async def turn(
        self, handle: Callable[[Event], Awaitable[None]], wait: Callable[[], float | None]
    ) -> None:
        """Handle the next event, or the tick if none comes in time, and then the events already queued.

        Events that arrive during this call are left for the next one, so it ends even if the queue never
        empties. What `handle` raises is raised at once; the events behind stay in the queue.
        wait: seconds until the tick is due, asked before and after each event; 0 or less is now, None is
        never. An event that waits goes before a tick that is due, and the tick before the next event.
        """
        seconds = wait()
        try:
            # Not wait_for: before Python 3.12 it may lose a cancellation.
            async with asyncio.timeout(None if seconds is None else max(0.0, seconds) + _SLACK):
                event = await self._queue.get()
        except TimeoutError:
            await handle(self._tick)
            return
        await self._handle(event, handle, wait)
        await asyncio.sleep(0)  # lets tasks that are about to queue an event do so first
        for _ in range(self.backlog):
            await self._handle(self._queue.get_nowait(), handle, wait)

    async def _handle(
        self,
        event: Event,
        handle: Callable[[Event], Awaitable[None]],
        wait: Callable[[], float | None],
    ) -> None:
        await handle(event)
        seconds = wait()
        if seconds is not None and seconds <= 0:
            await handle(self._tick)

    def background(
        self, work: Coroutine[object, object, Event | None], fault: Callable[[Exception], Event]
    ) -> asyncio.Task[Event | None]:
        """Run work in the background; what it returns is queued as an event, unless it is None.

        fault: the event for any Exception it raises, also for a cancellation that was not requested; it must
        not raise. Work that ends because its task was cancelled queues nothing.
        """
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(partial(self._ended, fault))
        return task

    def _ended(self, fault: Callable[[Exception], Event], task: asyncio.Task[Event | None]) -> None:
        self._background.discard(task)
        if task.cancelled():
            if not task.cancelling():  # something inside was cancelled, not this work
                self.put(fault(RuntimeError("background work: found it cancelled from inside")))
        elif isinstance(error := task.exception(), Exception):
            self.put(fault(error))
        elif error is None and (event := task.result()) is not None:
            self.put(event)

    async def close(self) -> None:
        """Cancel all background work and wait for its end. The queue stays, and may be used again."""
        while self._background:
            for task in self._background:
                task.cancel()
            await asyncio.wait(self._background)


async def keep_serving(
    serve: Callable[[], Awaitable[None]],
    *,
    tolerates: Callable[[Exception], bool],
    restore: Callable[[], None],
    retry_seconds: float,
) -> Exception | None:
    """Serve a job until it is over; returns None then, and otherwise the fault that ended it.

    A step persists before it sends (PROTOCOL D), so a step that failed halfway has sent nothing that is not on
    disk: reloading everything, as a new process would, is always right.

    serve: handles events, ends its background work, and returns when the job is over. tolerates: whether to
    retry after an Exception of `serve` or `restore`. restore: reloads everything from disk, retry_seconds
    after the fault and before the job is served again.
    """
    fault: Exception | None = None
    while True:
        try:
            if fault is not None:
                await asyncio.sleep(retry_seconds)
                restore()
            await serve()
            return None
        except Exception as error:  # noqa: BLE001 - `tolerates` decides about all of them
            fault = error
        if not tolerates(fault):
            return fault
