"""`fed-site check`: a dry run of everything a site needs, one line each, with a hint where it fails.

Invariant: nothing is changed, here or at the coordinator: the Check call opens no session, no journal is created,
and a running site is not disturbed. What the checks find out about rows is printed here only.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import grpc
import grpc.aio
from fedcore_clients import app
from fedcore_clients.app import Papers
from fedcore_clients.channel import call_unary, open_channel
from fedcore_clients.config import JOURNAL_FILE, SiteConfig, TaskSection, read_config
from fedcore_clients.policy import SitePolicy
from fedcore_clients.rate import limit_text
from fedcore_clients.rosters import newest_roster, sites_text
from fedcore_clients.sandbox import NONE_HINT, choose

from fedcore.cli.console import ago
from fedcore.errors import EXIT_DONE, BadInput, FedcoreError, Refused, StoreProblem, TaskFailed
from fedcore.files.disk import open_to_others
from fedcore.identity.addresses import authority_of
from fedcore.identity.preflight import preflight
from fedcore.identity.proxies import NONE, Proxy, variable_set
from fedcore.identity.signed_roster import changes_of
from fedcore.store.journal import Journal
from fedcore.store.sqlite import JournalInUse
from fedcore.types import Json, SiteId
from fedcore.wire import calls, frames
from fedcore.wire.refusals import told

if TYPE_CHECKING:
    from fedcore.learning.task import Task

T = TypeVar("T")
SECONDS = 10.0
LEAST_FREE = 1 << 30
"""Bytes free on the disk of the site's folder below which the check fails."""

CAP = 1 << 24
"""Cap on rows in place of a job's, for trying the data."""


@dataclass(frozen=True)
class Check:
    """One line. exit_code: what the command ends with if this is the first that failed."""

    name: str
    ok: bool
    found: str
    remedy: str = ""
    exit_code: int = EXIT_DONE
    traceback: str = ""

    def to_json(self) -> Json:
        """For `--json`."""
        return {key: value for key, value in asdict(self).items() if value or key == "ok"}


def _try(name: str, do: Callable[[], tuple[str, T]]) -> tuple[Check, T | None]:
    """The line of one check, and what it found for those after it; None where it failed."""
    try:
        text, found = do()
        return Check(name, True, text), found
    except FedcoreError as error:
        trace = error.user_traceback if isinstance(error, TaskFailed) else ""
        return Check(name, False, str(error), error.remedy, error.exit_code, trace), None


def _line(name: str, do: Callable[[], str]) -> Check:
    return _try(name, lambda: (do(), None))[0]


def examine(path: Path) -> Iterator[Check]:
    """Every check, each after those that it needs; what depends on a failed one is left out."""
    check, config = _try("config", lambda: _config(path))
    yield check
    if config is None:
        return
    check, papers = _try("keys", lambda: _papers(config))
    yield check
    if papers is not None and papers.roster.number:
        yield _line("roster", partial(_roster, config, papers))
    if papers is not None:
        yield _line("policy", lambda: _policy(app.policy_of(config, papers)))
    yield _line("folder", lambda: _folder(config))
    yield _line("sandbox", lambda: _sandbox(config))
    if not config.tasks:
        yield Check(
            "tasks", False, f"{path}: found no [tasks.NAME], expected one for each task that may run",
            "write [tasks.heart] with task, sha256 and source", BadInput.exit_code,
        )  # fmt: skip
    for name, section in config.tasks.items():
        check, task = _try(f"task {name}", partial(_task, config, section))
        if task is None:
            yield check
        else:  # a wrong hash does not hide whether the rows load
            yield _line(f"task {name}", partial(_allowed, task, name, section))
            yield _line(f"data {name}", partial(_data, config, task, section))
    if papers is not None:
        yield from _network(config, papers)


def _config(path: Path) -> tuple[str, SiteConfig]:
    found = read_config(path)
    return f"{path}: site {found.site!r}, tasks {', '.join(found.tasks) or 'none'}", found


def _papers(config: SiteConfig) -> tuple[str, Papers]:
    found = app.read_papers(config)
    left = ago((found.kit.peer.ends - datetime.now(UTC)).total_seconds())
    at_rest = "encrypted" if config.keystore is not None else "in clear"
    where = f"on a roster of {sites_text(found.roster.sites)}"
    text = f"{found.kit.peer}, valid for {left} more; {where}"
    return f"{text}; private keys {at_rest} at rest", found


def _roster(config: SiteConfig, papers: Papers) -> str:
    """The signed roster in force, and a warning where a newer one waits for the operator."""
    current, newest = papers.roster, newest_roster(config, papers.kit, papers.roster)
    text = f"number {current.number}, signed by the federation's authority: {sites_text(current.sites)}"
    if newest.number == current.number:
        return text
    changes = "; ".join(changes_of(newest.sites, current.sites))
    return f"{text}; warning: number {newest.number} waits for `fed-site roster approve`: {changes}"


def _policy(policy: SitePolicy) -> str:
    """What jobs may ask of this site, and a warning where that is more than by default."""
    rules, wider = policy.rules, policy.wider
    text = (
        f"{', '.join(rules.protections)}; threshold {policy.least_threshold} or more of {policy.sites}; "
        f"jobs: {rules.jobs}, {rules.jobs_per_month} a month over the same rows"
    )
    if key := policy.forbids_all:
        text += f"; warning: no job can satisfy this policy, because of {key}"
        if key == "minimum_sites":
            text += f": too few sites so far on the roster here, {policy.sites}"
    return text + (f"; warning: wider than the default: {', '.join(wider)}" if wider else "")


def _folder(config: SiteConfig) -> str:
    folder = there = config.folder
    while not there.exists():
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise StoreProblem(
            f"folder: found {there} that cannot be written, expected one that can",
            remedy=f"give this user the right to write to {there}, or name another `folder`",
        )
    free = shutil.disk_usage(there).free
    if free < LEAST_FREE:
        raise StoreProblem(
            f"folder: found {free >> 20} MiB free at {there}, expected {LEAST_FREE >> 20} MiB",
            remedy="free some space, or name a `folder` on another disk",
        )
    return f"{folder}: {free >> 30} GiB free{_journal(config)}{_modes(config)}"


def _modes(config: SiteConfig) -> str:
    """Whether other users of this machine can read what the site keeps."""
    found = open_to_others(config.folder, app.OWN_FILES)
    if not found:
        return "; closed to other users"
    return f"; {len(found)} files and folders open to other users: `fed-site run` closes them when it starts"


def _sandbox(config: SiteConfig) -> str:
    """What keeps the task's code from the keys, with a hint where nothing does."""
    found = choose(config)
    return f"{found.text}; {NONE_HINT}" if found.method == "none" else found.text


def _journal(config: SiteConfig) -> str:
    """Whether the journal can be opened, unless it does not exist or the running process holds it."""
    path = config.folder / JOURNAL_FILE
    if not path.exists():
        return ""
    try:
        with Journal.open(path, party=config.party, sealer=config.row_sealer()) as journal:
            return f"; {journal.verify()} records"
    except JournalInUse:
        return "; its process runs"


def _task(config: SiteConfig, section: TaskSection) -> tuple[str, Task]:
    from fedcore.learning.task import load_task

    return "", load_task(section.task, config.base)


def _allowed(task: Task, name: str, section: TaskSection) -> str:
    digest = task.digest()
    if task.name != name:
        raise BadInput(
            f"tasks.{name}: found a task that is called {task.name!r}, expected {name!r}",
            remedy=f"write [tasks.{task.name}]: jobs go by the task's own name",
        )
    if digest != section.sha256:
        raise Refused(
            f"tasks.{name}: found {section.task} with another hash than site.toml allows, expected "
            f"{section.sha256}",
            remedy=f'read the task again; if it is meant, write sha256 = "{digest}"',
        )
    return f"{name}, from {section.task}: sha256 {digest} over {task.covers()}"


def _data(config: SiteConfig, task: Task, section: TaskSection) -> str:
    from fedcore.config import build_job
    from fedcore.learning.data.split import split_from_json
    from fedcore.learning.model import single_thread
    from fedcore.learning.site import SiteTrainer

    job = build_job(task.defaults)
    split = split_from_json(config.split.of(config.read_identity()))
    with single_thread():
        site = SiteTrainer.load(task, job, SiteId(config.site), section.source, CAP, split)
    train, test = len(site.site.train), len(site.site.test)
    columns = f", {len(site.columns)} columns" if site.columns else ""
    return (
        f"{train + test} rows ({train} to train on, {test} to test){columns}; "
        f"model of {site.flat.parameters} parameters" + (f"; {site.note}" if site.note else "")
    )


def _network(config: SiteConfig, papers: Papers) -> Iterator[Check]:
    check, through = _try("proxy", lambda: _proxy(config))
    yield check
    if not check.ok:
        return
    yield Check("line", True, _line_text(config))
    config = config if through else _serving(config)
    host, port = (through.host, through.port) if through else (config.host, config.port)
    whose = "proxy" if through else "coordinator"
    steps = (
        ("dns", _addresses), ("tcp", _connects), ("tls", lambda *_: _handshake(config, papers))
    )  # fmt: skip
    for name, step in steps:
        check = _line(name, partial(step, host, port, whose))
        yield check
        if not check.ok:
            return
    check, welcome = _try("admitted", lambda: _admitted(config, papers))
    yield check
    if welcome is not None:
        yield _line("clock", lambda: clock_text(*welcome))
        yield _line("version", lambda: version_text(welcome[0].software))


def _proxy(config: SiteConfig) -> tuple[str, Proxy | None]:
    """The proxy on the way to the coordinator, None where there is none."""
    found = config.through
    if found is None or not found.serves(config.host, config.port):
        unused = variable_set(os.environ)
        ignored = config.proxy.url == NONE and unused is not None
        more = f'; {unused} is set and not used: proxy = "environment" in site.toml would'
        return f"none{more if ignored else ''}", None
    return f"{found.text}; it resolves the coordinator's name, and sees ciphertext only", found


def _line_text(config: SiteConfig) -> str:
    """Keep-alive, and the limit of transfers."""
    limit = limit_text(config.policy, datetime.now(UTC)) or "no limit (max_mbit)"
    return f"a ping after {config.keepalive_seconds:g} s of quiet; transfers: {limit}"


def _serving(config: SiteConfig) -> SiteConfig:
    """With the first of its addresses that accepts connections as the coordinator: a standby's port is not bound."""
    for host, port in config.addresses if config.standbys else ():
        with contextlib.suppress(OSError), socket.create_connection((host, port), SECONDS):
            return config.model_copy(update={"coordinator": authority_of(host, port)})
    return config


def _addresses(host: str, port: int, whose: str) -> str:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise BadInput(
            f"{whose} {host}: found no address under this name ({error.strerror})",
            remedy="check the name in site.toml, and that this machine's DNS knows it",
        ) from error
    return f"{host}: {', '.join(dict.fromkeys(str(each[4][0]) for each in found))}"


def _connects(host: str, port: int, whose: str) -> str:
    where = authority_of(host, port)
    try:
        with socket.create_connection((host, port), SECONDS):
            return f"{where} accepts connections"
    except OSError as error:
        raise BadInput(
            f"{whose} {where}: found no connection ({error.strerror or 'timed out'}), expected a listening port",
            remedy="check that it runs, and that no firewall is between",
        ) from error


def _handshake(config: SiteConfig, papers: Papers) -> str:
    coordinator, version, cipher = preflight(
        papers.kit, config.host, config.port, now=datetime.now(UTC), proxy=config.through
    )
    return f"{version}, {cipher}; {coordinator}"


def _admitted(config: SiteConfig, papers: Papers) -> tuple[str, tuple[frames.Welcome, float]]:
    """With the coordinator's welcome, and when it was sent by the clock here."""
    before = time.time()
    found = asyncio.run(_ask(config, papers, app.hello_of(config, papers.roster)))
    sent = (before + time.time()) / 2
    if found.federation != papers.kit.peer.federation:
        raise Refused(f"coordinator: found federation {found.federation!r}")
    text = f"site {config.site!r} of {found.federation!r}"
    if papers.roster.number:  # one is sent in the session
        newest = newest_roster(config, papers.kit, papers.roster).number
        numbers = papers.roster.number, newest, found.roster
        text += f": {rosters_text(*numbers, approves=config.policy.roster == 'ask')}"
    else:
        text += ": same roster at both ends"
    return text, (found, sent)


def rosters_text(current: int, newest: int, theirs: int, *, approves: bool) -> str:
    """The numbers of the roster in force here, of the newest seen here, and of the coordinator's. approves: whether the
    operator of this site approves each roster."""
    if theirs < newest:
        return (
            f"warning: roster {theirs} at the coordinator is older than {newest}, which this site has seen, and is "
            "refused: ask the federation's operator"
        )
    if theirs == current:
        return f"roster {theirs} at both ends"
    if not approves:
        return f"roster {theirs} at the coordinator: `fed-site run` takes it"
    first = "" if theirs == newest else "`fed-site run` fetches it, then "
    return f"warning: roster {theirs} waits: {first}`fed-site roster approve {theirs}`"


async def _ask(config: SiteConfig, papers: Papers, hello: frames.Hello) -> frames.Welcome:
    try:
        async with open_channel(
            papers.kit, config.host, config.port, proxy=config.through, options=calls.LENGTHS
        ) as channel:
            return await call_unary(channel, calls.CHECK, hello, SECONDS)
    except grpc.aio.AioRpcError as error:
        found = told(error.code().name, error.details() or "")
        raise found or Refused(
            f"coordinator {config.coordinator}: found {error.code().name.lower()}, expected an answer"
        ) from None


def clock_text(welcome: frames.Welcome, here: float) -> str:
    """How far the two clocks are apart. here: seconds since 1970. Raises Refused beyond a minute."""
    apart = here - welcome.time_ms / 1000
    if abs(apart) > app.CLOCKS_APART:
        raise Refused(
            f"clock: found this one {ago(abs(apart))} {'ahead of' if apart > 0 else 'behind'} the "
            f"coordinator's, expected less than {ago(app.CLOCKS_APART)}",
            remedy="set both by NTP: certificates begin and end by the clock",
        )
    return f"{abs(apart):.1f} s from the coordinator's"


def version_text(theirs: str) -> str:
    """The version at both ends. Raises Refused where they differ."""
    if theirs != frames.SOFTWARE:
        raise Refused(
            f"version: found {frames.SOFTWARE} here and {theirs} at the coordinator, expected the same",
            remedy="install the same version: plans and models are compared bit by bit",
        )
    return f"{theirs} at both ends"
