"""federation.toml: WHO runs a federation, and how long it waits. Paths in it count from its folder.

name = "hospitals"          roster = "roster.toml"        kit = "kit"         folder = "state"
listen = ["::"]             port = 7443                   revoked = "revoked.txt"
[limits]                    stage_seconds, gather_seconds, minimum_sites, spool_bytes, fold_workers
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedcore.errors import BadInput, UnknownName


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LimitsSection(_Section):
    """[limits]: seconds a stage waits, seconds to gather sites, the smallest cohort, room and hands."""

    stage_seconds: float = Field(600.0, gt=0)
    gather_seconds: float = Field(60.0, ge=0)
    minimum_sites: int = Field(3, ge=3)
    spool_bytes: int | None = Field(None, ge=1 << 20)
    fold_workers: int = Field(1, ge=1, le=64)


class FederationConfig(_Section):
    """A federation as its coordinator runs it; paths are absolute."""

    name: str
    roster: Path
    kit: Path
    folder: Path
    listen: tuple[str, ...] = ("::",)
    port: int = Field(7443, ge=0, lt=65536)
    revoked: Path | None = None
    limits: LimitsSection = LimitsSection()


def read_config(path: Path) -> FederationConfig:
    """The configuration of a file. Raises BadInput with the key's path, and UnknownName."""
    found: FederationConfig = parse(FederationConfig, path, ("roster", "kit", "folder", "revoked"))
    return found


def parse(model: type[Any], path: Path, paths: tuple[str, ...]) -> Any:
    """A TOML file as a model of pydantic; the named keys are paths that count from the file's folder."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise BadInput(
            f"{path}: found no such file", remedy="`fedcore up` writes one to start from"
        ) from error
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not readable as TOML: {error}") from error
    here = path.resolve().parent
    for key in paths:
        if isinstance(tables.get(key), str):
            tables[key] = str(here / tables[key])
    try:
        return model.model_validate(tables)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise UnknownName(f"{path.name}: key", place, list(model.model_fields)) from error
        found = "nothing" if first["type"] == "missing" else repr(first["input"])
        words = str(first["msg"]).removeprefix("Input should be ").lower()
        raise BadInput(
            f"{path.name}: {place}: found {found}, expected "
            f"{'a value' if first['type'] == 'missing' else words}"
        ) from error
