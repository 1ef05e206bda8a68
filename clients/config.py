"""site.toml: one site, its data and what its operator allows. Paths in it count from its folder.

site = "va"               coordinator = "hub.example.org:7443"        proxy = "none"
kit = "kit"               identity = "identity.pem"                   roster = "roster.toml"
folder = "state"          minimum_sites = 3                   release = "sites"

[tasks.heart]             # a task this site takes part in, by the name jobs call it
task = "heart"            # where it is: as for `fedcore simulate --task`
sha256 = "..."            # `fed-site check` prints it
source = "va.csv"         # given to the task's `data`; written like a path, it counts from here
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from fedcore.config import beside
from fedcore.provision.reach import endpoint
from fedcore.tables import Section, read_toml


class TaskSection(Section):
    """[tasks.NAME]: what is installed, what it must hash to, and this site's data for it."""

    task: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    source: Any = None


class SiteConfig(Section):
    """A site as its operator runs it; paths are absolute. base: the file's folder. release: whether jobs
    may give the coordinator their last model."""

    site: str
    coordinator: str
    kit: Path
    identity: Path
    roster: Path
    folder: Path
    base: Path
    proxy: str = "none"
    minimum_sites: int = Field(3, ge=3)
    release: Literal["sites", "coordinator"] = "sites"
    patience_seconds: float = Field(1800.0, gt=0)
    spool_bytes: int | None = Field(None, ge=1 << 20)
    tasks: dict[str, TaskSection] = Field(default_factory=dict)

    @property
    def host(self) -> str:
        """Name or address of the coordinator."""
        return endpoint(self.coordinator)[0]

    @property
    def port(self) -> int:
        """Its port."""
        return endpoint(self.coordinator)[1]

    @property
    def through(self) -> str:
        """The proxy's URL, or "" for none."""
        return "" if self.proxy == "none" else self.proxy


def read_config(path: Path) -> SiteConfig:
    """The configuration of a file. Raises BadInput with the key's path, and UnknownName."""
    found = read_toml(
        SiteConfig,
        path,
        paths=("kit", "identity", "roster", "folder"),
        base=str(path.resolve().parent),
    )
    endpoint(found.coordinator, f"{path.name}: coordinator")
    tasks = {
        name: task.model_copy(update={"source": beside(task.source, found.base)})
        for name, task in found.tasks.items()
    }
    return found.model_copy(update={"tasks": tasks})
