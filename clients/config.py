"""site.toml: one site, its data and what its operator allows. Paths in it count from its folder.

site = "va"               coordinator = "hub.example.org:7443"        proxy = "none"
kit = "kit"               identity = "identity.pem"                   roster = "roster.toml"
folder = "state"          minimum_sites = 3

[tasks.heart]             # a task this site takes part in, by the name jobs call it
task = "heart"            # where it is: as for `fedcore simulate --task`
sha256 = "..."            # `fed-site check` prints it
source = "va.csv"         # given to the task's `data` as it is
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcore.errors import BadInput, UnknownName


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TaskSection(_Section):
    """[tasks.NAME]: what is installed, what it must hash to, and this site's data for it."""

    task: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    source: Any = None


class SiteConfig(_Section):
    """A site as its operator runs it; paths are absolute. base: the file's folder."""

    site: str
    coordinator: str
    kit: Path
    identity: Path
    roster: Path
    folder: Path
    base: Path
    proxy: str = "none"
    minimum_sites: int = Field(3, ge=3)
    patience_seconds: float = Field(1800.0, gt=0)
    spool_bytes: int | None = Field(None, ge=1 << 20)
    tasks: dict[str, TaskSection] = {}

    @property
    def host(self) -> str:
        """Name or address of the coordinator."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """Its port. Raises BadInput."""
        text = self.coordinator.rpartition(":")[2]
        if not self.host or not text.isdecimal() or not 0 < int(text) < 65536:
            raise BadInput(
                f"coordinator: found {self.coordinator!r}, expected host:port, as hub.example.org:7443"
            )
        return int(text)


_PATHS = ("kit", "identity", "roster", "folder")


def read_config(path: Path) -> SiteConfig:
    """The configuration of a file. Raises BadInput with the key's path, and UnknownName."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(
            f"{path}: found no such file", remedy="`fedcore up` writes one to start from"
        ) from error
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not readable as TOML: {error}") from error
    here = path.resolve().parent
    for key in _PATHS:
        if isinstance(tables.get(key), str):
            tables[key] = str(here / tables[key])
    try:
        found = SiteConfig.model_validate({**tables, "base": str(here)})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise UnknownName(f"{path.name}: key", place, list(SiteConfig.model_fields)) from error
        what = "nothing" if first["type"] == "missing" else repr(first["input"])
        words = str(first["msg"]).removeprefix("Input should be ").lower()
        raise BadInput(
            f"{path.name}: {place}: found {what}, expected "
            f"{'a value' if first['type'] == 'missing' else words}"
        ) from error
    _ = found.port
    return found
