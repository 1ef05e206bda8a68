"""What `fedcore attack` found: a row for each attack, party and view, and the pictures beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedcore.results.json_record import JsonRecord

__all__ = ["AttackResult", "AttackRow", "Reconstruction", "RocCurve"]


@dataclass(frozen=True)
class AttackRow(JsonRecord):
    """One adversary against one view.

    attack: its name in the registry. party: who looks; view: what it holds. protection: under which the round was
    recorded. setting: what else the row is about, such as "batch 4". samples: how many images, rows or canaries were
    counted. measure: what `value` is; low, high: its 95 % interval; chance: what the same measure gives without a
    leak. beyond_chance: whether the attack did better than 999 of 999 draws without a leak; None where no draw was
    made. more: further figures by name. shows, not_shown: a sentence each. refused: why there is no figure. task: its
    name.
    """

    attack: str
    party: str
    view: str
    protection: str
    setting: str
    samples: int
    measure: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    beyond_chance: bool | None = None
    more: Mapping[str, float | None] = field(default_factory=dict)
    shows: str = ""
    not_shown: str = ""
    refused: str | None = None
    task: str = ""


@dataclass(frozen=True)
class Reconstruction(JsonRecord):
    """One original beside what an attack made of it: pixels 0 to 255, row by row, (height, width) or
    (channels, height, width) as `shape` says."""

    attack: str
    party: str
    view: str
    protection: str
    setting: str
    shape: tuple[int, ...]
    original: tuple[int, ...]
    reconstructed: tuple[int, ...]
    psnr: float
    ssim: float | None = None
    task: str = ""


@dataclass(frozen=True)
class RocCurve(JsonRecord):
    """Shares of others and of training rows that are accepted, over all thresholds, both rising from 0 to 1."""

    attack: str
    protection: str
    false_positives: tuple[float, ...]
    true_positives: tuple[float, ...]
    task: str = ""


@dataclass(frozen=True)
class AttackResult(JsonRecord):
    """All rows of one `fedcore attack`. task, task_digest, label, sites: of the run that is attacked; where every
    attack has a task of its own `task` has their names, and the others are of the first. seconds: it took."""

    task: str
    task_digest: str
    protection: str
    label: str
    sites: tuple[str, ...]
    seed: int
    preset: str
    rows: tuple[AttackRow, ...]
    reconstructions: tuple[Reconstruction, ...] = ()
    curves: tuple[RocCurve, ...] = ()
    seconds: float = 0.0
    kind: str = "attack"
