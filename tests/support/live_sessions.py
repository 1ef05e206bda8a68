"""A coordinator and sites in this process, over real gRPC and TLS: sessions without any job."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime
from pathlib import Path

import grpc.aio
import pytest
from fedcore_clients import joining
from fedcore_clients.app import Site, opened, read_papers
from fedcore_clients.config import read_config
from fedcore_server.context import CoordinatorContext
from fedcore_server.coordinator import Coordinator
from fedcore_server.enrolment import Enrolments
from fedcore_server.federation import FederationFiles
from fedcore_server.grpc_service import handlers
from fedcore_server.tls import SERVER_OPTIONS, Gate, bind, server_credentials
from support.federations import authority_of, now

from fedcore.audit.lines import Line
from fedcore.audit.trail import TRAIL_FILE, NoTrail, Recorder
from fedcore.identity.kit import Kit
from fedcore.identity.revocation import Revocations
from fedcore.identity.roster import RosterFile, read_file
from fedcore.secagg.protocol.job.coordinator.facts import Limits
from fedcore.store.journal import Journal
from fedcore.store.spool import Spool


def joined(files: FederationFiles, folder: Path, name: str = "va") -> Path:
    """The folder of a site that has joined."""
    files.ask(joining.begin(files.invite(name, 7, now())[0], folder), now())
    answer = files.answer(files.approve(name, authority_of(files), now()))
    joining.finish(folder, answer, now(), tasks=[])
    return folder


@contextlib.asynccontextmanager
async def coordinator(
    files: FederationFiles,
    clock: Callable[[], datetime],
    folder: Path,
    *,
    open_here: bool = True,
    audit: Recorder | None = None,
    kit: Kit | None = None,
    options: Sequence[tuple[str, int]] = (),
) -> AsyncIterator[Coordinator]:
    """A coordinator with no job, at the port of its settings. open_here: whether it can open the authority's key; kit:
    another one than the federation's; options: further ones of gRPC."""
    config, authority = files.config, files.authority_pem
    kit = kit or Kit.load(config.kit)
    enrolments = Enrolments(files, authority_of(files) if open_here else None, clock)
    with Journal.open(folder / "journal.sqlite", party="hub") as journal:
        roster = read_file(config.roster, authority, config.name)
        context = CoordinatorContext(
            config.name, RosterFile(roster, config.roster, authority, config.name), journal,
            Spool(folder / "spool"), None, folder, Limits(), certify=enrolments.renew,
            audit=audit or NoTrail(),
        )  # fmt: skip
        gate = Gate(config.name, context.rosters, Revocations(config.revoked), clock, pytest.fail)
        server = grpc.aio.server(options=(*SERVER_OPTIONS, *options))
        hub = Coordinator(context, gate)
        server.add_generic_rpc_handlers(handlers(hub))
        bind(server, lambda: server_credentials(kit), hosts=["127.0.0.1"], port=config.port)
        await server.start()
        try:
            yield hub
        finally:
            await server.stop(0)


@contextlib.asynccontextmanager
async def site_process(folder: Path) -> AsyncIterator[tuple[Site, asyncio.Task[None]]]:
    """What `fed-site run` runs in a folder, but for the training process; and its task, which ends where the site is
    refused."""
    config = read_config(folder / "site.toml")
    papers, stop = read_papers(config), asyncio.Event()
    with opened(config, papers) as context:
        site = Site(config, papers.kit, context, None)
        running = asyncio.get_running_loop().create_task(site.run(stop))
        try:
            yield site, running
        finally:
            stop.set()
            await asyncio.gather(running, return_exceptions=True)


async def until(holds: Callable[[], object]) -> None:
    """Wait for a condition, at most 20 s."""
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - the other end sets no event
            await asyncio.sleep(0.01)


def recorded(folder: Path, event: str) -> list[dict]:
    """The facts of every line of this event in the trail of a folder, the oldest first."""
    lines = map(Line.parse, (folder / TRAIL_FILE).read_bytes().splitlines())
    return [dict(line.facts) for line in lines if line.event == event]
