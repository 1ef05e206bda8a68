"""The page of `fedcore attack`: what could be learnt, with originals beside reconstructions and ROC curves.

Invariant: as `page.py`, one file that loads nothing: pictures and curves are inside it, and nothing from a result
reaches it unescaped.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from base64 import b64encode
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from fedcore.files import write_atomic
from fedcore.report.attack_table import BEYOND, figure, interval, named, together, without_figure
from fedcore.report.phrases import plain
from fedcore.results import AttackResult, Reconstruction, RocCurve

PAGE, NUMBERS = "attack.html", "attack.json"

_SIDE, _LEAST = 240, -3.5
"""Of a ROC drawing: pixels of its axes, and log10 of the smallest rate on them."""

_SHOWN = 8
"""Pictures of one row of the table."""


def write_page(result: AttackResult, folder: Path) -> Path:
    """Write the page and every number of it into a folder, each file whole or not at all; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / NUMBERS, json.dumps(result.to_json(), indent=1).encode())
    write_atomic(folder / PAGE, render(result).encode())
    return folder / PAGE


def render(result: AttackResult) -> str:
    """The page."""
    environment = Environment(
        loader=PackageLoader("fedcore.report", "templates"), autoescape=True,
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    counted = [row for row in result.rows if row.refused is None]
    return environment.get_template("attack.html.j2").render(
        title=f"{plain(result.task)}: what an attacker could learn",
        facts=[f"{len(result.sites)} sites", result.protection, f"preset {result.preset}", f"seed {result.seed}"],
        label=[plain(line) for line in result.label.splitlines()],
        tables=[
            (measure, [_cells(row, measure) for row in rows])
            for measure, rows in together(counted, lambda row: row.measure).items()
        ],
        refused=without_figure(result),
        notes=list(dict.fromkeys(plain(row.not_shown) for row in counted if row.not_shown)),
        pictures=_pictures(result.reconstructions),
        curves=[_curve(each) for each in result.curves],
        side=_SIDE,
        ticks=[(10.0**e, _place(10.0**e)) for e in range(math.ceil(_LEAST), 1)],
        numbers=NUMBERS,
    )  # fmt: skip


def _cells(row: Any, measure: str) -> dict[str, str]:
    return {
        "attack": plain(named(row)), "party": row.party, "view": row.view,
        "protection": row.protection, "n": f"{row.samples:,}", "found": figure(row.value, measure),
        "interval": interval(row), "chance": figure(row.chance, measure), "beyond": BEYOND[row.beyond_chance],
        "shows": plain(row.shows),
    }  # fmt: skip


def _pictures(found: Sequence[Reconstruction]) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """[(what it is of, [(original, reconstruction, caption)])], pictures as data URIs."""

    def about(each: Reconstruction) -> str:
        return f"{each.task}, {each.attack}, {each.setting}, {each.protection}: {each.party}, from {each.view}"

    return [
        (
            plain(name),
            [
                (
                    picture_uri(e.original, e.shape),
                    picture_uri(e.reconstructed, e.shape),
                    f"{e.psnr:.1f} dB" + (f", SSIM {e.ssim:.2f}" if e.ssim is not None else ""),
                )
                for e in group[:_SHOWN]
            ],
        )
        for name, group in together(found, about).items()
    ]


def picture_uri(pixels: Sequence[int], shape: Sequence[int]) -> str:
    """A data URI of pixels 0 to 255: grey, or colours where there are three channels."""
    height, width = shape[-2:]
    image = np.array(pixels, dtype=np.uint8).reshape(-1, height, width)
    image = image if len(image) == 3 else image[:1]
    lines = image.transpose(1, 2, 0).reshape(height, -1)
    raw = np.concatenate([np.zeros((height, 1), dtype=np.uint8), lines], axis=1).tobytes()

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2 if len(image) == 3 else 0, 0, 0, 0)
    file = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )
    return f"data:image/png;base64,{b64encode(file).decode()}"


def _curve(curve: RocCurve) -> tuple[str, str]:
    """(what it is of, its points on logarithmic axes as an SVG path)."""
    points = [
        f"{_place(x):.1f} {_SIDE - _place(y):.1f}"
        for x, y in zip(curve.false_positives, curve.true_positives, strict=True)
    ]
    return plain(f"{curve.task}, {curve.attack}, {curve.protection}"), "M" + "L".join(points)


def _place(rate: float) -> float:
    """A rate on an axis of _SIDE pixels."""
    return _SIDE * (1 - max(math.log10(rate) if rate > 0 else _LEAST, _LEAST) / _LEAST)
