"""The commands `audit verify|show|export` of both programs. Everything is read from files, offline."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedcore.cli.console import echo, emit, say
from fedcore.errors import EXIT_REFUSED, BadInput, Refused

if TYPE_CHECKING:
    from fedcore.audit.evidence import TrustedParties
    from fedcore.audit.lines import Line
    from fedcore.audit.verification import Verdict
    from fedcore.types import Json

Config = Annotated[Path, typer.Option("--config", help="The party's file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
_MOST = 20
"""Findings that are listed; the number of all is in the error."""


@dataclass(frozen=True)
class TrailPlace:
    """A party's trail. trusted: from its bytes, the keys that may have signed it; federation: for other files; notes:
    the folder of commands that are not in the trail yet."""

    folder: Path
    party: str
    trusted: Callable[[bytes], set[str]]
    federation: TrustedParties
    notes: Path

    def waiting(self) -> list[str]:
        """That commands are not signed yet, in words."""
        from fedcore.audit.noted import COMMANDS_FILE, waiting_notes

        number = waiting_notes(self.notes)
        if not number:
            return []
        are = "1 command is" if number == 1 else f"{number} commands are"
        return [
            f"{are} not in the trail and not signed until the process starts: {self.notes / COMMANDS_FILE}"
        ]

    def read(self) -> bytes:
        """The bytes of the trail. Raises BadInput."""
        from fedcore.audit.trail import TRAIL_FILE

        path = self.folder / TRAIL_FILE
        try:
            return path.read_bytes()
        except OSError as error:
            raise BadInput(
                f"audit: {path} cannot be read ({error.strerror})",
                remedy="it is made when the process starts for the first time; restore it from a backup",
            ) from error


def audit_commands(place: Callable[[Path], TrailPlace], default: Path) -> typer.Typer:
    """The commands of one program. place: from the path of its configuration, which is `default` if not given."""
    app = typer.Typer(help="Check, read and export the audit trail, offline.", no_args_is_help=True)

    @app.command()
    def verify(
        config: Config = default,
        receipts: Annotated[
            list[Path] | None,
            typer.Option(
                "--receipts",
                help="Receipts, or the trail of another party, that confirm this one; repeatable.",
            ),
        ] = None,
        key: Annotated[
            list[str] | None,
            typer.Option(
                "--key", help="An earlier key of this party, as its lines name it: ed25519:HEX."
            ),
        ] = None,
        as_json: AsJson = False,
    ) -> None:
        """Check every line. Names the line where one was changed, deleted, moved, inserted or cut off."""
        found = place(config)
        verdict, notes = _verdict(found, receipts or [], set(key or []))
        _told(found, verdict, notes, as_json)

    @app.command()
    def show(
        config: Config = default,
        job: Annotated[str, typer.Option("--job", help="Lines of this job only.")] = "",
        since: Annotated[
            str, typer.Option("--since", help="From a time in UTC: 2026-11-30, 2026-11-30T09:15.")
        ] = "",
        as_json: AsJson = False,
    ) -> None:
        """Print the trail in words, the oldest line first."""
        lines = _wanted(place(config), job, since)
        if as_json:
            emit({"lines": [_json(line) for line in lines]})
            return
        for text in _table(lines):
            echo(text)
        for note in place(config).waiting():
            say(f"note: {note}")

    @app.command()
    def export(
        form: Annotated[str, typer.Option("--format", help="jsonl, cef, or syslog (RFC 5424).")],
        config: Config = default,
        job: Annotated[str, typer.Option("--job", help="Lines of this job only.")] = "",
        since: Annotated[str, typer.Option("--since", help="From a time in UTC.")] = "",
    ) -> None:
        """Print the trail for a log collector. One line an event, on stdout."""
        from fedcore import __version__
        from fedcore.audit.siem import FORMATS, exported
        from fedcore.errors import UnknownName

        if form not in FORMATS:
            raise UnknownName("--format", form, FORMATS)
        found = place(config)
        lines, host = _wanted(found, job, since), socket.gethostname()
        for text in exported(lines, form, found.party, host, __version__):
            echo(text)

    return app


def _verdict(
    found: TrailPlace, receipts: Sequence[Path], keys: set[str]
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict, and what of the evidence does not count."""
    from fedcore.audit.evidence import Evidence
    from fedcore.audit.receipt import RECEIPTS_FILE
    from fedcore.audit.verification import verify

    own, federation = found.folder / RECEIPTS_FILE, found.federation
    data, evidence = found.read(), Evidence()
    for path in [*([own] if own.is_file() else []), *receipts]:
        evidence += federation.read(path)
    verdict = verify(data, found.trusted(data) | keys, evidence.anchors, evidence.witnesses)
    return verdict, (*evidence.notes, *found.waiting())


def _told(found: TrailPlace, verdict: Verdict, notes: tuple[str, ...], as_json: bool) -> None:
    """Print a verdict. Raises Refused where something is wrong."""
    number, digest = verdict.head
    if as_json:
        emit(
            {
                "party": found.party, "whole": not verdict.findings, "lines": len(verdict.lines),
                "last": number, "hash": digest, "confirmed": verdict.proven,
                "findings": [{"line": each.line, "what": each.what} for each in verdict.findings],
                "notes": list(notes),
            }
        )  # fmt: skip
        if verdict.findings:
            raise typer.Exit(EXIT_REFUSED)
        return
    findings = verdict.findings
    for note in notes:
        echo(f"note: {note}")
    if not findings:
        last = verdict.lines[-1].time if verdict.lines else "never"
        echo(
            f"audit trail of {found.party}: {len(verdict.lines)} lines, none changed; the last at {last}"
        )
        if verdict.proven:
            echo(
                f"confirmed up to number {verdict.proven}: lines missing behind it would not be noticed"
            )
        else:
            echo("not confirmed: lines missing at the end would not be noticed without --receipts")
        for line in verdict.lines:
            if line.event == "torn":
                echo(
                    f"note: line {line.sequence}: a crash damaged the end before it; kept in {line.facts.get('file')}"
                )
        return
    first, *more = findings
    for each in findings[:_MOST] if more else ():
        echo(each)
    raise Refused(
        f"audit trail of {found.party}: {first}" + (f" (and {len(more)} more)" if more else ""),
        remedy="keep the file as it is and compare it with a backup or with what a log collector has; "
        "to go on, move it away: the next start begins a new one",
    )


def _wanted(found: TrailPlace, job: str, since: str) -> list[Line]:
    """The lines that can be read, of one job and from one time on. Raises BadInput for a malformed time."""
    from contextlib import suppress
    from datetime import datetime

    from fedcore.audit.lines import Line

    try:
        start = datetime.fromisoformat(since).isoformat() if since else ""
    except ValueError:
        raise BadInput(
            f"--since: found {since!r}, expected a time in UTC", remedy="--since 2026-11-30T09:15"
        ) from None
    lines = []
    for raw in found.read().splitlines():
        with suppress(BadInput):
            lines.append(Line.parse(raw))
    return [
        line for line in lines
        if line.time >= start and (not job or line.facts.get("job") == job)
    ]  # fmt: skip


def _table(lines: Sequence[Line]) -> list[str]:
    from fedcore.audit.siem import in_words

    if not lines:
        return ["no such lines"]
    width = len(str(lines[-1].sequence))
    return [
        f"{line.sequence:>{width}}  {line.time[:19].replace('T', ' ')}  {in_words(line)}"
        for line in lines
    ]


def _json(line: Line) -> Json:
    return {
        "number": line.sequence, "time": line.time, "event": line.event, "facts": dict(line.facts),
    }  # fmt: skip
