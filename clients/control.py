"""What a site's operator tells its process: pause, resume, leave, and the jobs that it says no to.

`control.json` in the site's folder has it. A command replaces the file, and the process looks for a change several
times a second, so it holds for a process that starts later, and after a restart. Invariant: the file is replaced
whole, for this user only, and two commands at once do not lose what one of them wrote. Each command leaves a note
first, which the process signs in its audit trail: also of a pause that ended before the process was started again.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from fedcore.audit import noted
from fedcore.errors import BadInput, Refused
from fedcore.files import WatchedFile, read_json, write_json
from fedcore.files.disk import close_to_others, make_folder, refusals, sync_folder
from fedcore.files.lock import FileLock

CONTROL_FILE, LOCK_FILE = "control.json", "control.lock"

Word = Literal["", "paused", "left"]


@dataclass(frozen=True)
class Control:
    """away: why the site takes part in nothing, "" where it does; since: seconds since 1970. vetoed: the jobs that it
    takes no part in."""

    away: Word = ""
    since: float = 0.0
    vetoed: tuple[str, ...] = field(default=())

    @property
    def text(self) -> str:
        """In words, for log and status; "" where the site takes part."""
        if not self.away:
            return ""
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(self.since))
        how = "paused by its operator" if self.away == "paused" else "left the federation"
        return f"{how} since {when}: `fed-site resume` takes part again"


def read_control(folder: Path) -> Control:
    """What the operator said last. Raises BadInput for a damaged file."""
    path = folder / CONTROL_FILE
    if not path.exists():
        return Control()
    found = read_json(path)
    try:
        away, since, vetoed = found["away"], float(found["since"]), tuple(map(str, found["vetoed"]))
        if away not in ("", "paused", "left"):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise BadInput(
            f"{path}: found a file in another form, expected what `fed-site pause` wrote",
            remedy="remove it, then pause, veto or leave again",
        ) from None
    return Control(away, since, vetoed)


def _change(
    folder: Path, call: str, to: Callable[[Control], Control], jobs: Iterable[str] = ()
) -> Control:
    """Replace the file, after a note about this call on these jobs; durable on return. Raises StoreProblem, BadInput,
    and Refused while another command does."""
    path = folder / CONTROL_FILE
    with refusals("folder", folder):
        make_folder(folder)
        close_to_others(folder, ())  # and what is written from now on
        lock = FileLock(folder / LOCK_FILE, _busy)
        try:
            found = to(read_control(folder))
            about = {"jobs": tuple(jobs)} if jobs else {}
            noted.leave_note(folder, call, datetime.now(UTC), **about)
            write_json(path, asdict(found))
            sync_folder(folder)
        finally:
            lock.release()
    return found


def _busy(process: str) -> Refused:
    return Refused(
        f"control: found process {process} changing it, expected nobody", remedy="try again"
    )


def pause(folder: Path) -> Control:
    """Take part in nothing until `resume`."""
    return _change(folder, "pause", lambda now: replace(now, away="paused", since=time.time()))


def leave(folder: Path, jobs: Iterable[str]) -> Control:
    """The same, and take no further part in these jobs, also after `resume`."""
    jobs = tuple(jobs)
    return _change(
        folder, "leave",
        lambda now: Control("left", time.time(), tuple(dict.fromkeys((*now.vetoed, *jobs)))), jobs,
    )  # fmt: skip


def resume(folder: Path) -> Control:
    """Take part again, in what was not vetoed."""
    return _change(folder, "resume", lambda now: replace(now, away="", since=time.time()))


def veto(folder: Path, job: str) -> Control:
    """Take no further part in this job."""
    return _change(
        folder, "veto",
        lambda now: replace(now, vetoed=tuple(dict.fromkeys((*now.vetoed, job)))), (job,),
    )  # fmt: skip


class ControlFile:
    """The file as the site's process reads it."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, WatchedFile(folder / CONTROL_FILE)
        self.now = Control()
        self.problem = ""
        """Why the file as it is now does not count, in one line: then the site pauses."""

    def refresh(self) -> bool:
        """Read the file if it changed; True if it did. Costs one stat. A file that cannot be read pauses the site: it
        may have said so."""
        if not self._file.changed():
            return False
        try:
            self.now, self.problem = read_control(self._folder), ""
        except BadInput as error:
            self.now = replace(self.now, away=self.now.away or "paused", since=time.time())
            self.problem = f"{error} (hint: {error.remedy})" if error.remedy else str(error)
        return True
