"""The files of built-in tasks: those that come with Fedcore, and those of packages that it does not pass on.

Invariant: nothing is read from a file whose SHA-256 is not the one that the task states.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from fedcore.errors import BadInput

FOLDER = "FEDCORE_DATA"
"""The variable that names the folder of data sets which do not come with Fedcore."""

DEFAULT_FOLDER = Path("~/.cache/fedcore")
"""Where they are looked for without it, and where `scripts/fetch-data` puts them."""


def verified(path: Path, sha256: str, remedy: str) -> bytes:
    """The bytes of a file. Raises BadInput unless they have this SHA-256 (hex)."""
    raw = path.read_bytes()
    found = hashlib.sha256(raw).hexdigest()
    if found != sha256:
        raise BadInput(
            f"{path.name}: found SHA-256 {found[:12]}..., expected {sha256[:12]}...", remedy=remedy
        )
    return raw


def folder() -> Path:
    """The folder of data sets that do not come with Fedcore."""
    return Path(os.environ.get(FOLDER) or DEFAULT_FOLDER).expanduser()


def find(what: str, name: str, places: Iterable[Path], remedy: str) -> Path:
    """The file `name` in the first of these folders that has it.

    what: the task, for the message. Raises BadInput, which names the folders, where none has it.
    """
    looked = list(places)
    for place in looked:
        if (place / name).is_file():
            return place / name
    raise BadInput(f"task {what}: found no {name} in {', '.join(map(str, looked))}", remedy=remedy)
