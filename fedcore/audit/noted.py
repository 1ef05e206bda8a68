"""What was commanded while a party's process did not look: notes in a file, which the process moves into its trail.

Only that process has the trail open and the key that signs it, so a command that needs neither leaves a note with who
gave it and when. Invariant: a note leaves the file when it is in the trail; a process that is killed meanwhile records
it again at its next start. Until then it is not signed: whoever may write to the folder can remove it.
"""

from __future__ import annotations

import json
import os
import pwd
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path

from fedcore.audit.lines import Fact, checked_facts
from fedcore.errors import printable
from fedcore.files import append_row
from fedcore.files.disk import make_folder
from fedcore.files.lock import one_at_a_time

COMMANDS_FILE = "commands.jsonl"


def user_name() -> str:
    """The user of this machine who runs this command; its number, where it has no name."""
    number = os.getuid()
    with suppress(KeyError):
        return pwd.getpwuid(number).pw_name
    return str(number)


def leave_note(folder: Path, call: str, now: datetime, **facts: Fact) -> None:
    """Append a note about a command. Raises BadInput, OSError."""
    at = now.astimezone(UTC).isoformat(timespec="seconds")
    about = {"call": call, "user": user_name(), "at": at, **facts}
    make_folder(folder)  # a folder put together from backups may lack it
    with _alone(folder):
        append_row(folder, about, COMMANDS_FILE)


def take_notes(folder: Path, record: Callable[..., None]) -> None:
    """Record the commands of the notes, in their order. Costs one stat where there are none. Raises StoreProblem,
    BadInput and OSError; then they stay."""
    path = folder / COMMANDS_FILE
    if not path.exists():
        return
    with _alone(folder):
        for line in path.read_text().splitlines():
            try:
                facts = checked_facts("operator", json.loads(line))
            except (ValueError, TypeError, AttributeError):
                facts = {"call": "unknown", "text": printable(line, 200)}
            record("operator", **facts)
        path.unlink()


def _alone(folder: Path) -> AbstractContextManager[None]:
    return one_at_a_time(folder / f".{COMMANDS_FILE}.lock", COMMANDS_FILE, remove=True)


def waiting_notes(folder: Path) -> int:
    """How many notes are not in the trail yet."""
    with suppress(OSError):
        return len((folder / COMMANDS_FILE).read_bytes().splitlines())
    return 0
