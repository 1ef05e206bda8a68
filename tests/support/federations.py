"""A federation's folder as `fed-coordinator init` makes it, and its port for joining, served in this process."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from fedcore_server.config import read_config
from fedcore_server.enrolment import Enrolments, listening
from fedcore_server.federation import FederationFiles
from fedcore_server.new_federation import create

from fedcore.audit.trail import NoTrail, Recorder
from fedcore.identity.authority import Authority
from fedcore.identity.authority_files import open_authority_files
from fedcore.identity.kit import Kit
from fedcore.local_deployment import free_port
from fedcore.secagg.crypto.secret import SecretBytes

PASSPHRASE = "correct horse battery staple"
HOST = "localhost"


def now() -> datetime:
    return datetime.now(UTC)


def new_federation(folder: Path, name: str = "heart", host: str = HOST) -> FederationFiles:
    """The files of a new federation whose ports are free now."""
    made = create(
        name, folder, [host], SecretBytes(PASSPHRASE.encode()), now(),
        port=free_port(), enrol_port=free_port(), approval="automatic",
    )  # fmt: skip
    return FederationFiles(read_config(made.folder / "federation.toml"))


@cache
def authority_of(files: FederationFiles) -> Authority:
    """The federation's authority, opened once."""
    folder = files.config.enrolment.authority
    assert folder is not None
    return open_authority_files(folder, lambda: SecretBytes(PASSPHRASE.encode()))[0]


@contextlib.contextmanager
def served(
    files: FederationFiles,
    *,
    manual: bool = False,
    clock: Callable[[], datetime] = now,
    audit: Recorder | None = None,
) -> Iterator[list[bytes]]:
    """The port for joining while inside; the lines that came in, as they were read."""
    received: list[bytes] = []

    class Recorded(Enrolments):
        def answer(self, data):
            received.append(data)
            return super().answer(data)

    enrolments = Recorded(files, authority_of(files), clock, not manual, audit or NoTrail())
    kit, port = Kit.load(files.config.kit), files.config.enrol_port
    assert port is not None
    begun, loop, over = threading.Event(), asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        async with listening(enrolments, kit, ["127.0.0.1"], port):
            begun.set()
            await over.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert begun.wait(10)
        yield received
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(10)
        loop.close()
