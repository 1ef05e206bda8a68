"""The coordinator's process: opens what is on disk, starts the fold workers, then listens.

Order matters: fold workers are started before grpc (a process started under grpc's threads may hang), and
the journal is read before the port is bound, so no call meets a coordinator without its jobs.
"""

import asyncio
import contextlib
import logging
import resource
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from functools import partial

import grpc.aio
from fedcore_server.authority_key import find_authority
from fedcore_server.config import JOURNAL_FILE, FederationConfig, LimitsSection
from fedcore_server.context import CoordinatorContext
from fedcore_server.coordinator import Coordinator
from fedcore_server.enrolment import Enrolments, enrolling, open_enrolments
from fedcore_server.federation import FederationFiles
from fedcore_server.folding import FoldPool
from fedcore_server.grpc_service import handlers
from fedcore_server.probes import ADDRESS, Probes, serve_metrics
from fedcore_server.receipts import Receipts
from fedcore_server.sealed_models import require_sealed_models
from fedcore_server.tls import SERVER_OPTIONS, Gate, bind, server_credentials

from fedcore.audit.keys import CoordinatorSigner
from fedcore.audit.lines import Fact
from fedcore.audit.trail import OWN_FILES as AUDIT_FILES
from fedcore.audit.trail import AuditTrail
from fedcore.errors import BadInput, FedcoreError, LeaseLost, StoreProblem
from fedcore.files.disk import close_to_others, make_folder, refusals
from fedcore.files.lock import FileLock
from fedcore.identity.kit import Kit
from fedcore.identity.revocation import Revocations
from fedcore.identity.roster import PinnedRoster, RosterFile
from fedcore.identity.verify import fingerprint
from fedcore.secagg.protocol.job.coordinator.facts import Limits
from fedcore.store.journal import Journal
from fedcore.store.spool import Spool
from fedcore.wire import calls
from fedcore.wire.frames import SOFTWARE

LOG = logging.getLogger("fedcore.coordinator")

GRACE_SECONDS = 5.0
"""Timeout of open calls after a signal."""

COMMANDS_SECONDS = 1.0
"""How often the commands of operators are looked for: one stat."""

OWN_FILES = ("journal.sqlite*", "coordinator.lock", "spool", "jobs", AUDIT_FILES)
"""Files of this process in its folder, readable for its user only."""

KEEPALIVE = (
    ("grpc.server_handshake_timeout_ms", 10_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),  # a site may ping as often as its network needs
)


RESERVED = 256
"""Descriptors kept for the journal, the spool, fold workers and transfers: connections get the rest."""

LEAST_CONNECTIONS = 64


def raise_descriptors() -> int:
    """Raise the limit of open files to the system's hard limit; returns the limit.

    The usual soft limit of 1024 is used up by as many idle connections.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(ValueError, OSError):  # the system may refuse its own hard limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 1 << 20 if soft == resource.RLIM_INFINITY else soft


def connection_limit(descriptors: int, addresses: int) -> tuple[tuple[str, int], ...]:
    """gRPC's limit of connections to one address: more are closed at once, so that files can still be opened.

    descriptors: open files that this process may have.
    """
    room = max(LEAST_CONNECTIONS, descriptors - RESERVED) // max(1, addresses)
    return (("grpc.max_allowed_incoming_connections", room),)


def serve(config: FederationConfig, show: Callable[[str], None]) -> None:
    """Run until SIGTERM or SIGINT. show: called with one line once it listens. Raises FedcoreError."""
    kit = config.read_kit()
    if kit.peer.federation != config.name:
        raise BadInput(
            f"kit: found a certificate of federation {kit.peer.federation!r}, expected {config.name!r}"
        )
    kit.check("coordinator", datetime.now(UTC))
    rosters = RosterFile(PinnedRoster({}), config.roster, kit.authority_pem, config.name)
    rosters.refresh()
    revoked = Revocations(config.revoked)
    limits = config.limits
    close_to_others(config.folder, OWN_FILES)
    sealer = config.file_sealer()
    require_sealed_models(config.folder, sealer)
    signer = CoordinatorSigner(kit)
    # Before the fold processes: they must not inherit the passphrase in the environment.
    authority = find_authority(config) if config.enrol_port is not None else None
    with (
        _folder_lock(config),
        open_journal(config, kit, show) as journal,
        AuditTrail.open(config.folder, signer, audit_facts(config, kit, rosters.current)) as audit,
        FoldPool(limits.fold_workers, config.folder / "spool" / ".sums") as pool,
    ):
        enrolments = open_enrolments(config, authority, audit)
        context = CoordinatorContext(
            config.name, rosters, journal, Spool(config.folder / "spool", limits.spool_bytes), pool,
            config.folder,
            Limits(
                limits.stage_seconds, limits.gather_seconds, limits.minimum_sites,
                limits.grace_seconds, limits.enough_seconds, _vectors(limits, len(rosters)),
            ),
            limits, audit, Receipts(audit, signer, config.name),
            enrolments.renew if enrolments is not None else None, sealer=sealer,
        )  # fmt: skip
        gate = Gate(
            config.name, rosters, revoked, lambda: datetime.now(UTC),
            lambda error: LOG.error("%s", error),
        )  # fmt: skip
        hub = Coordinator(context, gate)
        gate.unknown = hub.refresh_roster
        asyncio.run(_serve(config, kit, hub, enrolments, show))


def audit_facts(config: FederationConfig, kit: Kit, roster: PinnedRoster) -> dict[str, Fact]:
    """What the first line of every start states: who, under which certificate, with which files."""
    return {
        "party": config.party, "certificate": kit.certificate_pem.decode(),
        "software": SOFTWARE, "roster": roster.digest, "sites": tuple(roster.sites),
    }  # fmt: skip


def open_journal(config: FederationConfig, kit: Kit, show: Callable[[str], None]) -> Journal:
    """The coordinator's journal: in its folder, or where `database` is. On a server it may belong to another
    coordinator of this federation: then this one waits as a standby, and `show` says so. Raises FedcoreError."""
    party = config.party
    if config.database is None:
        return Journal.open(config.folder / JOURNAL_FILE, party=party, sealer=config.row_sealer())
    from fedcore.store.postgresql import PostgresqlDatabase

    authority = fingerprint(kit.authority_pem)
    sealer = config.row_sealer()
    database = PostgresqlDatabase.open(
        config.database, party=party, authority=authority, wait=show,
        sealed=sealer.name if sealer is not None else "",
    )  # fmt: skip
    return Journal(database, party, sealer)


@contextlib.contextmanager
def _folder_lock(config: FederationConfig) -> Iterator[None]:
    """Keep other processes from this folder where its journal, which has a lock, is elsewhere. Raises
    StoreProblem."""

    def refusal(holder: str) -> StoreProblem:
        return StoreProblem(
            f"folder {config.folder}: found process {holder} using it, expected no other process",
            remedy="give every coordinator, also a standby, a folder of its own",
        )

    if config.database is None:
        yield
        return
    with refusals("folder", config.folder):
        make_folder(config.folder)
        lock = FileLock(config.folder / "coordinator.lock", refusal)
    try:
        yield
    finally:
        lock.release()


def _vectors(limits: LimitsSection, sites: int) -> int:
    """The number of vectors that ends the wait for more, 0 for none. Raises BadInput outside its range."""
    found = limits.enough_vectors
    if found is not None and not limits.minimum_sites <= found <= sites:
        raise BadInput(
            f"limits.enough_vectors: found {found}, expected {limits.minimum_sites} (minimum_sites) to "
            f"{sites} (the sites of the roster)",
            remedy="leave it out to wait for every site of a round",
        )
    return found or 0


async def _serve(
    config: FederationConfig,
    kit: Kit,
    hub: Coordinator,
    enrolments: Enrolments | None,
    show: Callable[[str], None],
) -> None:
    probes = Probes(hub.sessions.gate)
    most = connection_limit(raise_descriptors(), len(config.listen))
    pings = calls.keepalive(config.keepalive_seconds)
    server = grpc.aio.server(options=(*SERVER_OPTIONS, *calls.LENGTHS, *KEEPALIVE, *pings, *most))
    server.add_generic_rpc_handlers([*handlers(hub), *probes.handlers()])
    port, addresses = bind(
        server, partial(server_credentials, kit), hosts=config.listen, port=config.port
    )
    with contextlib.ExitStack() as opened:
        if config.metrics_port is not None:
            metrics, end = serve_metrics(hub.sessions.counts, hub.seen, config.metrics_port)
            opened.callback(end)
            LOG.info("metrics on http://%s:%d/metrics", ADDRESS, metrics)
        await server.start()
        await probes.begin()
        async with enrolling(config, kit, enrolments), recording_commands(config, hub):
            show(f"coordinator of {config.name}: listening on {', '.join(addresses)} (port {port})")
            await _until_signal(hub, probes, server)


@contextlib.asynccontextmanager
async def recording_commands(config: FederationConfig, hub: Coordinator) -> AsyncIterator[None]:
    """Record, while inside, what operators' commands do to the federation's files, at the start and within a second."""
    files = FederationFiles(config)

    async def follow() -> None:
        while True:
            try:
                await asyncio.to_thread(files.take_notes, hub.context.audit.record)
            except (FedcoreError, OSError) as error:
                LOG.warning("commands of operators: not recorded: %s", error)
            await asyncio.sleep(COMMANDS_SECONDS)

    following = asyncio.get_running_loop().create_task(follow())
    try:
        yield
    finally:
        following.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await following


async def _lease_lost(journal: Journal) -> None:
    """Wait until another coordinator took the journal over. Raises LeaseLost."""
    loop = asyncio.get_running_loop()
    known: asyncio.Future[None] = loop.create_future()

    def tell(error: LeaseLost) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the work with it
            loop.call_soon_threadsafe(known.set_exception, error)

    journal.on_loss(tell)
    await known


async def _until_signal(hub: Coordinator, probes: Probes, server: grpc.aio.Server) -> None:
    """Run the jobs until SIGTERM or SIGINT, then end every call in an orderly way. Raises LeaseLost."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, stop.set)
    work = loop.create_task(hub.run())
    waiting = loop.create_task(stop.wait())
    lost = loop.create_task(_lease_lost(hub.context.journal))
    try:
        await asyncio.wait({work, waiting, lost}, return_when=asyncio.FIRST_COMPLETED)
        for ended in (lost, work):
            if ended.done():
                ended.result()
    finally:
        waiting.cancel()
        lost.cancel()
        await probes.end()
        hub.sessions.close()
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError, LeaseLost):
            await work
        await server.stop(GRACE_SECONDS)
