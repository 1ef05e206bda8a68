"""The client of operators: calls to a coordinator, and their results as text.

Invariant: every failure is an error of `fedcore.errors`: the coordinator's, or, where there is no connection, what
a TLS handshake of our own finds. Every wait has a timeout: a call ends after `CALL_SECONDS`, and `watch` gives up
when the coordinator could not be reached for `AWAY_SECONDS`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import grpc
from fedcore_server.config import METRICS_FILE, OperatorConfig

from fedcore.cli.console import ago, waiting_text
from fedcore.config import build_job, wire_settings
from fedcore.config.unsupported import refuse_unsupported
from fedcore.errors import AlreadyExists, BadInput, FedcoreError, Refused
from fedcore.files import RESULT_FILE, ROUNDS_FILE, read_json, write_atomic
from fedcore.files.units import in_bytes
from fedcore.identity.addresses import authority_of
from fedcore.identity.peer import require_role
from fedcore.identity.preflight import channel_target, preflight
from fedcore.learning.app_jobs import refuse_of_app
from fedcore.learning.task import load_task
from fedcore.results import JobEvent, JobRow, JobSite, JobSummary, MetricsRow, ReferenceGap
from fedcore.secagg.purposes import trains
from fedcore.types import Json
from fedcore.wire import calls, chunks, frames
from fedcore.wire.refusals import told

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

CALL_SECONDS = 30.0
AWAY_SECONDS = 60.0

Q = TypeVar("Q")
R = TypeVar("R")
Row = TypeVar("Row", JobRow, MetricsRow)


class Operator:
    """Calls with an operator's or observer's certificate."""

    def __init__(self, place: OperatorConfig) -> None:
        """Raises BadInput and CertificateRefused for the kit."""
        self._place, self._kit = place, place.read_kit()
        require_role(self._kit.peer, [calls.OPERATOR, calls.OBSERVER])
        self.where = authority_of(place.host, place.port)

    @contextmanager
    def _channel(self, call: calls.Call[Any, Any]) -> Iterator[grpc.Channel]:
        """A channel for one call. Raises FedcoreError for what grpc raises inside."""
        place, kit = self._place, self._kit
        ours = (*calls.LENGTHS, ("grpc.use_local_subchannel_pool", 1))
        credentials = grpc.ssl_channel_credentials(
            kit.authority_pem, kit.key_pem.reveal(), kit.certificate_pem
        )
        with (
            channel_target(place.host, place.port, place.through, ours) as (target, options),
            grpc.secure_channel(target, credentials, options=options) as channel,
        ):
            try:
                yield channel
            except grpc.RpcError as error:
                raise self._error(call, error) from None

    def ask(self, call: calls.Call[Q, R], request: Q) -> R:
        """The answer to a call. Raises FedcoreError."""
        with self._channel(call) as channel:
            begin: Any = channel.unary_unary(call.path)
            data = begin(call.takes.pack(request), timeout=CALL_SECONDS)
        return call.gives.unpack(data, sender="coordinator")

    def stream(
        self, call: calls.Call[Q, R], request: Q, seconds: float | None = None
    ) -> Iterator[R]:
        """The answers to a call, in order. seconds: timeout. Raises FedcoreError."""
        with self._channel(call) as channel:
            begin: Any = channel.unary_stream(call.path)
            stream = begin(call.takes.pack(request), timeout=seconds)
            try:
                for data in stream:
                    yield call.gives.unpack(data, sender="coordinator")
            finally:
                stream.cancel()

    def watch(self, job: str, lost: Callable[[str], None]) -> Iterator[Json]:
        """A job's events to its end, across restarts of the coordinator. lost: called once for each outage."""
        since: float | None = None
        shown = dict.fromkeys(("new_rounds", "new_metrics"), 0)
        while True:
            try:
                asked, repeated = frames.WatchRequest(job), dict(shown)
                for event in self.stream(calls.WATCH, asked):
                    found = frames.json_value(event.json, sender="coordinator")
                    job, since = str(found["job"]), None
                    for name, again in repeated.items():
                        rows = found[name]  # a new call begins with all of them
                        found[name] = rows[again:]
                        repeated[name] = max(0, again - len(rows))
                        shown[name] += len(found[name])
                    yield found
                return
            except _Away as error:
                if not job or (since and time.monotonic() - since > AWAY_SECONDS):
                    raise
                if since is None:
                    since = time.monotonic()
                    lost(f"{error}; trying again for {ago(AWAY_SECONDS)}")
            time.sleep(1.0)

    def _error(self, call: calls.Call[Any, Any], error: Any) -> FedcoreError:
        code, details = error.code(), error.details() or ""
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return _Away(f"coordinator {self.where}: found no answer to {call.name} in time")
        if code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}:
            return self._unreached()
        found = told(code.name, details)
        if found is not None:
            return found
        name = code.name.lower().replace("_", " ")
        return Refused(f"coordinator {self.where}: {call.name}: found {name}, expected an answer")

    def _unreached(self) -> FedcoreError:
        """Why there is no connection, which gRPC does not report."""
        place = self._place
        try:
            preflight(self._kit, place.host, place.port, now=datetime.now(UTC), proxy=place.through)
        except BadInput as error:
            return _Away(str(error), remedy=error.remedy)
        except FedcoreError as error:
            return error
        return _Away(f"coordinator {self.where}: found the connection lost, expected an answer")


class _Away(BadInput):
    """The coordinator cannot be reached now."""


def prepare(path: Path, tables: Json, settings: Mapping[str, Any]) -> frames.SubmitRequest:
    """A job file with its complete settings, without those of this machine. Raises FedcoreError.

    The task is loaded for its hash and its defaults; no data is read.
    """
    toml = (path / "job.toml" if path.is_dir() else path).read_bytes()
    named = build_job(tables, settings)
    refuse_unsupported(named.to_json(), "deployment")
    task = load_task(named.run.task, named.base).with_settings(named.task_settings)
    job = build_job(task.defaults, tables, settings)
    refuse_unsupported(job.to_json(), "deployment")
    refuse_of_app(task, job)
    complete = wire_settings(replace(job, task_settings=task.given))
    about = frames.json_bytes({"settings": complete})
    return frames.SubmitRequest(toml, task.name, task.digest(), about)


def save_result(parts: Iterator[frames.FilePart], folder: Path) -> list[Path]:
    """Write the files of a result into a new folder; their paths. Raises AlreadyExists, MalformedMessage for parts
    out of order, and BadInput for an incomplete file."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AlreadyExists(f"--out: found {folder} in use, expected a new folder")
    written, data = [], bytearray()
    for part in chunks.in_order(parts, sender="coordinator"):
        data += part.data
        if part.last:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomic(folder / part.name, bytes(data))
            written.append(folder / part.name)
            data.clear()
    if data:
        raise BadInput("result: found its end inside a file", remedy="ask for it again")
    return written


def write_report(folder: Path) -> Path:
    """A page in Markdown beside the files of a result. Raises BadInput where they are not a result's."""
    found = read_json(folder / RESULT_FILE)
    event, rows = JobEvent.from_json(found), _rows(folder / ROUNDS_FILE, JobRow)
    lines = [
        f"# {event.job}", "",
        f"Task {event.task} (sha256 {found['task_sha256']}), {event.protection}, "
        f"{event.rounds_done} of {event.rounds} rounds: {state_text(event)}.", "",
        "The model is `model.safetensors`: the plan gives it to the coordinator. The sites have it, too."
        if event.model
        else "The model is at the sites: `fed-site model`.", "",
        *(f"- {round_text(row, event.rounds)}" for row in rows), "",
        *(f"- {metrics_text(row)}" for row in _rows(folder / METRICS_FILE, MetricsRow)),
        *([METRICS_AT_HOME] if event.public_metrics is False else []),
    ]  # fmt: skip
    write_atomic(folder / "report.md", ("\n".join(lines) + "\n").encode())
    return folder / "report.md"


def _rows(path: Path, kind: type[Row]) -> list[Row]:
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [kind.from_json(json.loads(line)) for line in lines]


def round_text(row: JobRow, rounds: int) -> str:
    """One line for a round that ended."""
    what = f"round {row.round}/{rounds}"
    if not trains(row.purpose):
        what = row.purpose + (f" after round {row.round - 1}" if row.round > 1 else "")
    if (why := row.abandoned) is not None:
        return f"{what}  abandoned at {why.stage}: {why.left} sites left, {why.needed} needed"
    sizes = (("up", row.bytes_up), ("down", row.bytes_down))
    moved = [f"{arrow} {in_bytes(count)}" for arrow, count in sizes if count is not None]
    there = f"{len(row.survivors)} of {len(row.roster)} sites"
    return "  ".join([what, there, f"{row.seconds:.2f} s", *moved])


METRICS_AT_HOME = "metrics: known to the sites only"
"""For a job whose plan does not make them public."""


def metrics_text(row: MetricsRow) -> str:
    """One line for the sites' metrics of a model; a gap is positive where the model is below."""
    values = "  ".join(f"{name} {value_text(value)}" for name, value in row.metrics.items())
    gap = f"  ({gap_text(row.reference)})" if row.reference is not None else ""
    return f"metrics after round {row.round}: {values}{gap}"


def gap_text(to: ReferenceGap) -> str:
    """`gap of auc to 0.9 (our registry): 0.0877`."""
    text = f"gap of {to.metric} to {value_text(to.value)} ({to.source})"
    return f"{''.join(c if c.isprintable() else '?' for c in text)}: {value_text(to.gap)}"


def value_text(value: float | None) -> str:
    """A metric with four decimals, in scientific form where these would lose it."""
    if value is None:
        return "undefined"
    return f"{value:.4f}" if not value or 1e-3 <= abs(value) < 1e4 else f"{value:.3e}"


def head_text(event: JobEvent) -> str:
    """`heart-1a2b3c4d (heart, layered): round 3 of 20, collecting`."""
    roster = f", roster {event.roster}" if event.roster else ""
    about = f"{event.job} ({event.task}, {event.protection}{roster}): "
    if event.state not in {"running", "waiting"}:
        return about + state_text(event)
    if event.state == "waiting":
        return about + "queued"
    if event.step is None:
        return about + ("ending" if event.rounds_done else "beginning")
    purpose, round_ = event.step
    what = f"round {round_} of {event.rounds}" if trains(str(purpose)) else purpose
    return f"{about}{what}, {event.stage}"


def state_text(event: JobSummary) -> str:
    """A job's state with its reason."""
    return f"{event.state}: {event.text}" if event.text else event.state


def site_text(site: JobSite, now: float) -> str:
    """The state of one site in a few words."""
    if site.evicted:
        return "evicted"
    if site.unable:
        return f"takes no part: {site.unable}"
    if site.connected:
        doing = site.doing or "connected"
        return f"{doing}; roster {site.roster}" if site.roster else doing
    seen = site.last_seen
    return "away" if not seen else f"away, last seen {ago(now - seen)} ago"


def event_lines(event: JobEvent, before: JobEvent | None) -> Iterator[str]:
    """What is new in an event, for a log or a pipe: rounds that ended, waits, states."""
    for row in event.new_rounds:
        yield round_text(row, event.rounds)
    for each in event.new_metrics:
        yield metrics_text(each)
    if event.public_metrics is False and (before is None or before.public_metrics is None):
        yield METRICS_AT_HOME
    now = time.time()
    old = before.sites if before is not None else {}
    for name, site in event.sites.items():
        was = old.get(name)
        if was is None or _shown(was) != _shown(site):
            yield f"{name}: {site_text(replace(site, doing=''), now)}"
    if event.waiting and (before is None or _awaited(before) != _awaited(event)):
        yield waiting_text(event.waiting.to_json(), now)
    if before is None or event.state != before.state:
        yield head_text(event)


def _shown(site: JobSite) -> tuple[bool, str, str]:
    return site.connected, site.unable, site.roster


def _awaited(event: JobEvent) -> list[str]:
    return sorted(event.waiting.sites) if event.waiting is not None else []


def event_table(
    event: JobEvent, rows: Sequence[JobRow], metrics: Sequence[MetricsRow]
) -> RenderableType:
    """The live picture of a job. rows: rounds that ended, metrics: of the models so far; oldest first."""
    from rich.console import Group
    from rich.text import Text

    now = time.time()
    sites = _table("site", "", "last seen")
    for name, site in event.sites.items():
        seen = f"{ago(now - site.last_seen)} ago" if site.last_seen else ""
        sites.add_row(Text(name), Text(site_text(site, now)), seen)
    lines: list[RenderableType] = [Text(head_text(event)), sites]
    if event.waiting is not None:
        lines.append(Text(waiting_text(event.waiting.to_json(), now)))
    lines += [Text(round_text(row, event.rounds)) for row in rows[-5:]]
    if metrics:
        lines.append(_metrics_table(sorted(metrics, key=lambda row: row.number)[-5:]))
    elif event.public_metrics is not None:
        lines.append(Text("metrics: none yet" if event.public_metrics else METRICS_AT_HOME))
    up = sum((row.bytes_up or 0) * len(row.survivors) for row in rows)
    down = sum((row.bytes_down or 0) * len(row.roster) for row in rows)
    if rows:
        lines.append(Text(f"in all: up {in_bytes(up)}, down {in_bytes(down)}"))
    return Group(*lines)


def _table(*headings: str, justify: Literal["left", "right"] = "left") -> Table:
    """An empty table without lines; long cells are folded."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(Text(heading), justify=justify, overflow="fold")
    return table


def _metrics_table(metrics: Sequence[MetricsRow]) -> RenderableType:
    """The first metric of the last few models, and the gap to the registered value if there is one."""
    first, to = next(iter(metrics[-1].metrics)), metrics[-1].reference
    gap = [f"gap of {to.metric} to {value_text(to.value)}"] if to is not None else []
    table = _table("after round", first, *gap, justify="right")
    for row in metrics:
        cells = [str(row.round), value_text(row.metrics[first])]
        table.add_row(*cells, *([value_text(row.reference.gap)] if row.reference else []))
    return table


def jobs_table(answer: Json) -> RenderableType:
    """All jobs, then all sites."""
    from rich.console import Group
    from rich.text import Text

    jobs = _table("job", "task", "protection", "rounds", "metric", "state")
    for job in map(JobSummary.from_json, answer["jobs"]):
        done = f"{job.rounds_done}/{job.rounds}"
        state = "queued" if job.state == "waiting" else state_text(job)
        jobs.add_row(*map(Text, (job.job, job.task, job.protection, done, _metric(job), state)))
    sites = _table("site", "")
    for name, site in answer["sites"].items():
        sites.add_row(Text(name), Text(site_text(JobSite.from_json(site), time.time())))
    none = Text("no jobs yet; `fed-coordinator submit JOB.toml` begins one")
    earlier = f"{answer.get('earlier')} earlier jobs are not shown; `watch JOB` finds them"
    parts = [Text(earlier)] if answer.get("earlier") else []
    return Group(*parts, jobs if answer["jobs"] else none, Text(), sites)


def _metric(job: JobSummary) -> str:
    """The first metric of the newest model that has one, or that it stays at the sites."""
    if job.metrics is None:
        return "at the sites" if job.public_metrics is False else ""
    name, value = next(iter(job.metrics.metrics.items()))
    return f"{name} {value_text(value)}"
