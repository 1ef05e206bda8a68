"""The files of a job's states at a site: `current.safetensors`, and candidates until one is certified.

A small state is in the journal, in the commit of the record that relies on it: its file is then only a copy for
operators, written without a flush, and rewritten from the journal at the next start.
Invariant: with a sealer every file is encrypted for its own place: its job, and its name here. A candidate does not
become the current state by another name: it is sealed anew.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from fedcore.errors import StoreProblem
from fedcore.files import write_atomic
from fedcore.files.disk import sync_folder
from fedcore.store.sealed_files import FileSealer, in_clear, is_sealed_file, sealed
from fedcore.wire.limits import INLINE

STATES = "states"
_KEPT, _STATE = "app-", ".safetensors"


def state_folder(folder: Path, job: str) -> Path:
    """Where the states of a job are, below the site's folder."""
    return folder / STATES / job


def all_states(folder: Path) -> Iterator[Path]:
    """Every file of a state below the site's folder, those that a killed process began among them."""
    for path in sorted((folder / STATES).glob("*/*")):
        if path.name.lstrip(".").startswith(_KEPT) or _STATE in path.name:
            yield path


def require_sealed(folder: Path, sealer: FileSealer | None) -> None:
    """Raise StoreProblem for a state in clear where there is a sealer, or an encrypted one where there is none."""
    for path in all_states(folder):
        if path.name.startswith("."):
            path.unlink()  # of a process that was killed: unused, and perhaps in clear
        elif is_sealed_file(path) != (sealer is not None):
            raise in_clear(path) if sealer is not None else sealed(path)


def seal_states(folder: Path, sealer: FileSealer) -> int:
    """Encrypt the states that are in clear: their number. Each is replaced whole. Raises OSError."""
    found = 0
    for path in all_states(folder):
        if path.name.startswith("."):
            path.unlink()
        elif not is_sealed_file(path):
            StateFiles(path.parent, sealer).write(path, path.read_bytes())
            found += 1
    return found


class StateFiles:
    """One job's folder of states. sealer: what its files are encrypted with; None: they are in clear."""

    def __init__(self, folder: Path, sealer: FileSealer | None = None) -> None:
        self.folder, self._sealer = folder, sealer

    @property
    def current(self) -> Path:
        """The state of the last release, or the first state."""
        return self.folder / f"current{_STATE}"

    def candidate(self, name: str) -> Path:
        """The state that the certificate of this hash would release."""
        return self.folder / f"candidate-{name[:32]}{_STATE}"

    def read(self, path: Path) -> bytes:
        """A state. Raises StoreProblem for a file that was not written for this place, OSError."""
        if self._sealer is not None:
            return self._sealer.open(path, STATES, self.folder.name, path.name)
        return path.read_bytes()

    def read_candidate(self, name: str) -> bytes:
        """A candidate's state; otherwise as `read`."""
        return self.read(self.candidate(name))

    def _content(self, path: Path, data: bytes) -> Iterable[bytes]:
        """What is written into a file."""
        if self._sealer is None:
            return (data,)
        return self._sealer.seal((data,), STATES, self.folder.name, path.name)

    def write(self, path: Path, data: bytes) -> None:
        """Write the current state or a candidate; durable on return."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(path, self._content(path, data))
        sync_folder(self.folder)

    def adopt(self, name: str, data: bytes) -> None:
        """Make a candidate the current state, and remove the others. data: its bytes, if it has no file."""
        if data:
            self.show(data)
        else:
            self.promote(name)
        for left in self.folder.glob("candidate-*"):
            left.unlink()

    def promote(self, name: str) -> None:
        """Make a candidate's file the current state's; durable on return."""
        if self._sealer is None:
            self.candidate(name).replace(self.current)
            sync_folder(self.folder)
            return
        self.write(self.current, self.read_candidate(name))
        self.candidate(name).unlink()

    def shows(self, data: bytes) -> bool:
        """Whether the current state's file has this content."""
        try:
            return self.read(self.current) == data
        except (FileNotFoundError, StoreProblem):  # it was not flushed, and may be anything
            return False

    def show(self, data: bytes) -> None:
        """Write a copy of a state that the journal has."""
        beside = self.current.with_name(f".{self.current.name}.part")
        with beside.open("wb") as file:
            file.writelines(self._content(self.current, data))
        beside.replace(self.current)

    @property
    def personal(self) -> Path:
        """What the site's own model has beside the common one, for `fed-site model`; it stays after the job."""
        return self.folder / "personal.safetensors"

    def keep(self, state: bytes) -> bytes:
        """What the journal is to have of what an algorithm or an app keeps here: a small state itself, of a large one
        the name of its file, durable on return."""
        if len(state) <= INLINE:
            return state
        # A digest of an encrypted content would tell whoever can guess it.
        known = hashlib.sha256(state).hexdigest()[:32] if self._sealer is None else ""
        name = f"{_KEPT}{known or os.urandom(16).hex()}"
        self.write(self.folder / name, state)
        return name.encode()

    def kept(self, kept: bytes) -> bytes:
        """The state of which the journal has this. A state never begins like the name of a file: its first eight
        bytes are a small number."""
        return self.read(self.folder / kept.decode()) if _is_name(kept) else kept

    def forget(self, *, but: bytes = b"") -> None:
        """Remove the files of what was kept but one."""
        for left in self.folder.glob(f"{_KEPT}*"):
            if left.name.encode() != but:
                left.unlink()


def _is_name(kept: bytes) -> bool:
    return kept.startswith(_KEPT.encode())
