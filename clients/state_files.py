"""The files of a job's states at a site: `current.safetensors`, and candidates until one is certified.

A small state is in the journal, in the commit of the record that relies on it: its file is then only a copy for
operators, written without a flush, and rewritten from the journal at the next start.
"""

import hashlib
from pathlib import Path

from fedcore.files import write_atomic
from fedcore.files.disk import sync_folder
from fedcore.wire.limits import INLINE

_KEPT = "app-"


class StateFiles:
    """One job's folder of states."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def current(self) -> Path:
        """The state of the last release, or the first state."""
        return self.folder / "current.safetensors"

    def candidate(self, name: str) -> Path:
        """The state that the certificate of this hash would release."""
        return self.folder / f"candidate-{name[:32]}.safetensors"

    def write(self, path: Path, data: bytes) -> None:
        """Write the current state or a candidate; durable on return."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_atomic(path, data)
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
        self.candidate(name).replace(self.current)
        sync_folder(self.folder)

    def show(self, data: bytes) -> None:
        """Write a copy of a state that the journal has."""
        beside = self.current.with_name(f".{self.current.name}.part")
        beside.write_bytes(data)
        beside.replace(self.current)

    def keep(self, state: bytes) -> bytes:
        """What the journal is to have of what an algorithm or an app keeps here: a small state itself, of a large one
        the name of its file, durable on return."""
        if len(state) <= INLINE:
            return state
        name = f"{_KEPT}{hashlib.sha256(state).hexdigest()[:32]}"
        self.write(self.folder / name, state)
        return name.encode()

    def kept(self, kept: bytes) -> bytes:
        """The state of which the journal has this. A state never begins like the name of a file: its first eight
        bytes are a small number."""
        return (self.folder / kept.decode()).read_bytes() if _is_name(kept) else kept

    def forget(self, *, but: bytes = b"") -> None:
        """Remove the files of what was kept but one."""
        for left in self.folder.glob(f"{_KEPT}*"):
            if left.name.encode() != but:
                left.unlink()


def _is_name(kept: bytes) -> bool:
    return kept.startswith(_KEPT.encode())
