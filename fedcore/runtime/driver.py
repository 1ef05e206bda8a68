"""What becomes of a job when something fails: it is read from disk again and served on, or it ends.

A step records before it sends (PROTOCOL D), so a step that failed halfway has sent nothing that the disk does
not know: reading everything again, as a new process would, is always right.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


async def keep_serving(
    serve: Callable[[], Awaitable[None]],
    *,
    tolerates: Callable[[Exception], bool],
    restore: Callable[[], None],
    retry_seconds: float,
) -> Exception | None:
    """Serve a job until it is over: None then, and otherwise the fault that ended it.

    serve: handles events, ends its background work, and returns when the job is over. tolerates: asked about
    each Exception of `serve` and `restore`; where it allows that, `restore` reads everything from disk after
    retry_seconds and the job is served again.
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
