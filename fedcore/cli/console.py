"""Command-line support: exit codes, error output, logging.

Invariant: a command ends with one exit code of `errors.py`: 0 done, 1 the user's task failed, 2 bad input,
3 refused by plan or policy, 4 abandoned, 130 interrupted. Results go to stdout, progress and errors to
stderr. A log record is one line whatever it quotes: text on a terminal, JSON otherwise.
"""

from __future__ import annotations

import difflib
import errno
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ParamSpec, TextIO, TypeVar

import click
import typer
import typer.core
import typer.main
from rich.console import Console, RenderableType
from rich.text import Text

from fedcore import __version__, errors

if TYPE_CHECKING:
    from fedcore.types import Json  # it loads NumPy, which `--help` does not need

stderr = Console(stderr=True, highlight=False)


# With rich, typer escapes the brackets of `[default: 4]` for a renderer that these commands do not use.
typer.core.HAS_RICH = False

Given = ParamSpec("Given")
Found = TypeVar("Found")


def _documented(
    make: Callable[Given, typer.core.TyperArgument],
) -> Callable[Given, typer.core.TyperArgument]:
    """Make positional arguments that keep the help they were declared with: click 8.5, whose arguments have a help
    of their own, resets what typer before 0.21 sets."""

    def made(*arguments: Given.args, **named: Given.kwargs) -> typer.core.TyperArgument:
        found, text = make(*arguments, **named), named.get("help")
        found.help = text if isinstance(text, str) else None
        return found

    return made


typer.main.TyperArgument = _documented(typer.core.TyperArgument)  # type: ignore[attr-defined, assignment]


_results: TextIO | None = None
"""Where results go while a command runs."""


@contextmanager
def results_apart() -> Iterator[None]:
    """Inside, stdout is for results only, by `echo`, `emit` and `page_console`: what a task, a library or a process
    that they start prints to stdout goes to stderr. So `--json` is one document, whatever the task does."""
    global _results
    stdout, stream = sys.stdout, sys.stdout
    stdout.flush()
    kept = _kept_stdout(stdout)
    if kept is not None:
        stream = os.fdopen(kept, "w", encoding=stdout.encoding, errors=stdout.errors)
    before, _results, sys.stdout = _results, stream, sys.stderr
    try:
        yield
        stream.flush()
    finally:
        _results, sys.stdout = before, stdout
        if kept is not None:
            os.dup2(kept, 1)
            with suppress(OSError):  # the reader of a pipe left; the block has raised that already
                stream.close()


def _kept_stdout(stdout: TextIO) -> int | None:
    """Point the file descriptor 1 to stderr, for libraries and processes; returns a duplicate of what it was. None
    where stdout is something else: a notebook's, a test's, closed."""
    with suppress(OSError, ValueError):
        if stdout.fileno() == 1:
            kept = os.dup(1)
            os.dup2(2, 1)
            return kept
    return None


class ResultCommand(typer.core.TyperCommand):
    """A command whose stdout has its results only."""

    def format_arguments(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write no section of click's (from 8.5 on): typer writes one, in `format_options`."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command's function."""
        try:
            with results_apart():
                return super().invoke(ctx)
        except BrokenPipeError:  # `fedcore runs | head`, which click would end with code 1
            raise typer.Exit(errors.EXIT_DONE) from None


def _set_results_apart(app: typer.Typer) -> None:
    """Have every command of the program keep its stdout for its results."""
    for command in app.registered_commands:
        if command.cls is typer.core.TyperCommand:
            command.cls = ResultCommand
    for group in app.registered_groups:
        if group.typer_instance is not None:
            _set_results_apart(group.typer_instance)


def command_of(app: typer.Typer) -> click.Command:
    """The commands of a program, as they run and as their help is shown."""
    _set_results_apart(app)
    return typer.main.get_command(app)


def application(name: str, text: str) -> typer.Typer:
    """The commands of one program, before any of them imports grpc. text: its help."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # the commands explain its errors themselves
    app = typer.Typer(
        help=text, add_completion=False, no_args_is_help=True, rich_markup_mode=None,
        pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]},
    )  # fmt: skip

    def show(wanted: bool) -> None:
        if wanted:
            typer.echo(f"{name} {__version__}")
            raise typer.Exit

    help_ = "Print the version."
    version = typer.Option(False, "--version", callback=show, is_eager=True, help=help_)

    @app.callback()
    def program(_version: bool = version) -> None:
        pass

    return app


def say(text: str) -> None:
    """Print one line to stderr, without wrapping or markup."""
    stderr.print(Text(text), soft_wrap=True)


def emit(value: Any) -> None:
    """Print a result as JSON on stdout."""
    echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def echo(text: object, *, nl: bool = True) -> None:
    """Print a result on stdout."""
    typer.echo(text, file=_results, nl=nl)


def page_console() -> Console:
    """A console on stdout, for results that are pages."""
    return Console(highlight=False, file=_results)


def emit_or_show(found: Found, page: Callable[[Found], RenderableType], as_json: bool) -> None:
    """Print what a command found on stdout: as JSON, or as a page for a person."""
    from fedcore.report.terminal import show

    emit(found) if as_json else show(page_console(), page(found))


class JobCommand(ResultCommand):
    """A command that accepts every key of a job as a flag: `--batch-size 64` is `--set batch_size=64`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Rewrite flags that are not the command's own before click parses them."""
        own = {option for parameter in self.params for option in parameter.opts} | {"--help", "-h"}
        return super().parse_args(ctx, _as_settings(args, own))


def _as_settings(args: Sequence[str], own: set[str]) -> list[str]:
    found, rest = [], list(args)
    while rest:
        flag = rest.pop(0)
        name, equals, value = flag.partition("=")
        if not name.startswith("--") or name in own:
            found.append(flag)
            continue
        if not equals:
            alone = not rest or rest[0].startswith("--")
            value = _alone(flag) if alone else rest.pop(0)
        found += ["--set", f"{name[2:].replace('-', '_')}={value}"]
    return found


def _alone(flag: str) -> str:
    """The value of a flag that stands without one: a switch is on. Raises BadInput for any other setting."""
    from fedcore.config import SWITCHES

    if flag[2:].replace("-", "_").rpartition(".")[2] not in SWITCHES:
        raise errors.BadInput(f"{flag}: found no value, expected one", remedy=f"{flag} VALUE")
    return "true"


def run(app: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> None:
    """Entry point of a command; always ends in SystemExit."""
    _set_results_apart(app)
    with exit_codes():
        given = list(arguments) if arguments is not None else None
        code = app(args=given, prog_name=name, standalone_mode=False)
        if code == errors.EXIT_INTERRUPTED:  # typer has caught the KeyboardInterrupt itself
            say("interrupted")
        sys.exit(code if isinstance(code, int) else errors.EXIT_DONE)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn every exception into one exit code and at most two lines (after a task's own traceback)."""
    try:
        yield
    except errors.FedcoreError as error:
        if isinstance(error, errors.TaskFailed) and error.user_traceback:
            stderr.print(Text(error.user_traceback.rstrip()), soft_wrap=True)
        say(f"error: {error}")
        if error.remedy:
            say(f"hint: {error.remedy}")
        sys.exit(error.exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        typer.echo(error.format_message())
        sys.exit(error.exit_code)
    except click.exceptions.Exit as error:
        sys.exit(error.exit_code)
    except click.ClickException as error:
        say(f"error: {error.format_message().partition(' Did you mean')[0]}")
        if isinstance(error, click.UsageError) and error.ctx is not None:
            say(f"hint: {_usage_hint(error.ctx, error)}")
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.exceptions.Abort):
        say("interrupted")
        sys.exit(errors.EXIT_INTERRUPTED)
    except OSError as error:
        where = error.filename or "a file"
        say(f"error: {where}: {error.strerror or error}")
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            say(
                "hint: free some space there, or use another folder; every file is written whole or not at all"
            )
        else:
            say("hint: look at the path, its permissions and the space left there")
        sys.exit(errors.EXIT_BAD_INPUT)


def _usage_hint(context: click.Context, error: click.UsageError) -> str:
    """The nearest command for a mistyped one, else the command that lists the options."""
    commands = getattr(context.command, "commands", None)
    if commands and "'" in error.message:
        typed = error.message.split("'")[1]
        near = difflib.get_close_matches(typed, commands, n=1)
        if near:
            return f"did you mean {context.command_path} {near[0]}?"
    return f"{context.command_path} --help"


def waiting_text(waiting: Json, now: float) -> str:
    """`waiting for 1 of 4 sites: va (last seen 2 min ago); at 14:05 goes on with 3`.

    waiting: "for" {site: {"doing", "last_seen": seconds since 1970 or None}, or None}, "of", "until" (seconds
    since 1970, or None), "then" (sites to continue with; 0: it cannot), "least", "in_round". now: seconds
    since 1970.
    """
    names = [
        name if seen is None else f"{name} ({_seen_text(seen, now)})"
        for name, seen in waiting["for"].items()
    ]
    text = f"waiting for {len(names)} of {waiting['of']} sites: {', '.join(names)}"
    if waiting["until"] is None:
        return text
    moment = datetime.fromtimestamp(waiting["until"]).astimezone()
    left = waiting["until"] - now
    form = "%H:%M:%S" if left < 120 else "%H:%M" if left < 12 * 3600 else "%d %b %H:%M"
    shown = moment.strftime(form)
    if waiting["then"]:
        return f"{text}; at {shown} goes on with {waiting['then']}"
    what = "this round" if waiting["in_round"] else "the job"
    return f"{text}; at {shown} gives up {what}: it needs {waiting['least']}"


def _seen_text(seen: Json, now: float) -> str:
    if seen["doing"]:
        return str(seen["doing"])
    when = seen["last_seen"]
    return "not seen yet" if when is None else f"last seen {ago(now - when)} ago"


def ago(seconds: float) -> str:
    """A duration in the largest fitting unit: 5 s, 2 min, 3 h, 4 days."""
    whole = max(0, round(seconds))
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if whole >= 2 * size or (whole >= size and name != "days"):
            return f"{whole // size} {name}"
    return f"{whole} s"


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, from, text, and traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(), "from": record.name, "text": record.getMessage(),
        }  # fmt: skip
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False)


class TextLines(logging.Formatter):
    """Time, level and text for a terminal, without control characters but line breaks."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return "".join(c if c.isprintable() or c == "\n" else " " for c in text)


def worth_a_line(record: logging.LogRecord) -> bool:
    """Filter out grpc's record for a peer that disconnected while its last answer was sent: the session or call
    logs it itself, in one line and without a traceback."""
    kind = record.exc_info[0] if record.exc_info else None
    gone = kind is not None and kind.__name__ == "ExecuteBatchError"
    return not (gone and record.name.startswith("grpc."))


class Repeated(logging.Filter):
    """Lets a warning or error through once, and again after pauses that double, with how often it came meanwhile.

    clock: in seconds. A message counts as the same by its logger, level and text, as they are written; one with a
    traceback is always logged.
    """

    FIRST_PAUSE, LONGEST_PAUSE = 60.0, 3600.0
    MOST = 1000
    """Different messages that are remembered; the oldest ones are forgotten first."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._known: dict[tuple[str, int, str], tuple[float, float, int]] = {}
        """{message: (due again, the pause after that, times left out)}"""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING or record.exc_info:
            return True
        text, now = record.getMessage(), self._clock()
        key = record.name, record.levelno, text
        due, pause, left_out = self._known.pop(key, (now, self.FIRST_PAUSE, 0))
        if now < due:
            self._known[key] = due, pause, left_out + 1
            return False
        if now - due > self.LONGEST_PAUSE:  # it had stopped
            pause = self.FIRST_PAUSE
        self._known[key] = now + pause, min(2 * pause, self.LONGEST_PAUSE), 0
        if len(self._known) > self.MOST:
            del self._known[next(iter(self._known))]
        if left_out:
            record.msg, record.args = f"{text} ({left_out} times more since it was last logged)", ()
        return True


def start_logging() -> None:
    """Log records from INFO on to stderr: text on a terminal, JSON lines otherwise."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(worth_a_line)
    handler.addFilter(Repeated())
    handler.setFormatter(TextLines() if sys.stderr.isatty() else JsonLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
