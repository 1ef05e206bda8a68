"""The driver of a job: after a fault, reload the job from disk and continue, or end it.

A step persists before it sends (PROTOCOL D), so a step that failed halfway has sent nothing that is not on
disk: reloading everything, as a new process would, is always right.
"""

import asyncio
from collections.abc import Awaitable, Callable


async def keep_serving(
    serve: Callable[[], Awaitable[None]],
    *,
    tolerates: Callable[[Exception], bool],
    restore: Callable[[], None],
    retry_seconds: float,
) -> Exception | None:
    """Serve a job until it is over; returns None then, and otherwise the fault that ended it.

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
