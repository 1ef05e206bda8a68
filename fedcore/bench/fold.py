"""The memory of a folding coordinator: the same for 4 sites and for 64.

The fold runs in a process of its own. The parent plays the sites: it protects one vector after the
other and streams the chunks through a pipe, so the child's peak memory is that of a coordinator's
fold and of nothing else. Invariant: the parent decrypts the sum that comes back and compares it
with its own integer sum, slot by slot; a row is only reported when they are equal.

Pipe, parent to child: the public context (16 bytes), the number of slots (8), a frame per chunk.
Child to parent: a frame per chunk of the sum, then JSON to the end. A frame is an int32 (the
chunk's index; -1 ends the frames), a uint32 length, and that many bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from fedcore.bench import progress
from fedcore.encode.pack import Layout
from fedcore.environment import environment, peak_memory_mb
from fedcore.errors import Abandoned, BadInput
from fedcore.plan import VectorSpec, solve_packing
from fedcore.protect.bfv import EncryptedFold, EncryptedSealer, PublicContext, SecretContext
from fedcore.report.terminal import fitted, grid
from fedcore.types import Json, Slots

DEFAULT_SITES = (4, 64)
_HEAD = struct.Struct("<iI")
_END = -1
_PUBLIC_BYTES = 16
_CHILD = "fold-from-stdin"


def run(
    parameters: int = 1_000_000,
    sites: Sequence[int] = DEFAULT_SITES,
    bits: int = 12,
    seed: int = 0,
) -> Json:
    """Fold `parameters` coordinates from each number of sites in turn, under one packing for all.

    The packing is solved for the largest number, so every row moves the same slots; 12 bits are
    proved up to 64 sites and beyond. Returns the JSON of kind bench-fold: peak RSS in MB (2^20
    bytes) of the folding process, before and after, and the seconds it spent adding and writing the
    sum. Raises BadInput, PlanRefused, Unavailable, and Abandoned if the child dies or the sum is
    not exact.
    """
    if parameters < 1 or not sites or min(sites) < 1:
        raise BadInput(
            f"bench fold: found {parameters} parameters at {list(sites)} sites, "
            "expected at least 1 of each"
        )
    most = max(sites)
    packing = solve_packing(bits, most, "encrypted")
    layout = Layout(VectorSpec("update", parameters), packing, most)
    secret = SecretContext(PublicContext.of(packing))
    rows = []
    for number in sites:
        progress(f"bench fold: {number} sites, {parameters} parameters")
        rows.append(_measure(layout, secret, number, seed))
    peaks = [row["peak_rss_mb"] for row in rows]
    return {
        "schema": 1,
        "kind": "bench-fold",
        "bits": bits,
        "rows": rows,
        "peak_rss_ratio": round(max(peaks) / min(peaks), 3),
        "environment": environment(),
    }


def _measure(layout: Layout, secret: SecretContext, sites: int, seed: int) -> Json:
    sealer = EncryptedSealer(secret)
    expected = np.zeros(layout.slots, dtype=np.uint64)
    child = _start()
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(secret.public.to_bytes() + struct.pack("<Q", layout.slots))
        for site in range(sites):
            slots = _vector(layout, site, seed)
            expected += slots
            for index, chunk in enumerate(sealer.protect(slots)):
                _write(child.stdin, index, chunk)
        _write(child.stdin, _END, b"")
        child.stdin.close()
        total = sealer.open((chunk for _, chunk in _frames(child.stdout)), layout.slots)
        report = json.loads(child.stdout.read())
        code = child.wait()
    except (BrokenPipeError, EOFError) as error:
        raise Abandoned(
            f"bench fold: the folding process ended early, exit {child.wait()}"
        ) from error
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
        with contextlib.suppress(BrokenPipeError):  # what a dead child will never read
            child.stdin.close()
        child.stdout.close()
    if code != 0 or not np.array_equal(total, expected):
        raise Abandoned(
            f"bench fold: the sum of {sites} sites is not the integer sum of their slots"
        )
    return {
        "sites": sites,
        "parameters": layout.spec.coordinates,
        "peak_rss_mb": report["peak_rss_mb"],
        "start_rss_mb": report["start_rss_mb"],
        "fold_seconds": report["fold_seconds"],
        "exact": True,
    }


def _vector(layout: Layout, site: int, seed: int) -> Slots:
    """A site's packed slots: uniform fields, the largest possible among them."""
    rng = np.random.default_rng((seed, site))
    largest = 1 << layout.packing.bits
    fields = rng.integers(1, largest, layout.spec.coordinates, dtype=np.uint64)
    fields[0] = largest - 1
    return layout.pack(fields, {}, site)


def _start() -> subprocess.Popen[bytes]:
    """A bare interpreter on this module; `-P` keeps the current folder's modules out of it."""
    package_root = str(Path(__file__).resolve().parents[2])
    paths = [package_root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(  # noqa: S603  # this interpreter on this very module
        [sys.executable, "-P", "-m", "fedcore.bench.fold", _CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )


# ------------------------------------------------------------------ frames


def _write(stream: IO[bytes], index: int, data: bytes) -> None:
    stream.write(_HEAD.pack(index, len(data)))
    stream.write(data)


def _read(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) != size:
        raise EOFError(f"pipe: found {len(data)} bytes, expected {size}")
    return data


def _frames(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """(index, data) of each frame up to the end frame. Raises EOFError on a truncated stream."""
    while True:
        index, length = _HEAD.unpack(_read(stream, _HEAD.size))
        if index == _END:
            return
        yield index, _read(stream, length)


def page(found: Json) -> RenderableType:
    """The terminal's page of `fedcore bench fold`."""
    table = grid("sites", "parameters", "peak memory, MB", "fold, s")
    for row in found["rows"]:
        peak, seconds = f"{row['peak_rss_mb']:.1f}", f"{row['fold_seconds']:.2f}"
        table.add_row(str(row["sites"]), f"{row['parameters']:,}", peak, seconds)
    ratio = f"largest peak / smallest: {found['peak_rss_ratio']}; every sum exact"
    return Group(fitted(table), Text(), Text(ratio))


# ------------------------------------------------------------------ the child


def fold_from(source: IO[bytes], sink: IO[bytes]) -> None:
    """Fold the frames of `source` and write the sum and the measurements to `sink`."""
    public = PublicContext.from_bytes(_read(source, _PUBLIC_BYTES))
    (slots,) = struct.unpack("<Q", _read(source, 8))
    fold = EncryptedFold(public, slots)
    start_rss, seconds = peak_memory_mb(), 0.0
    for index, chunk in _frames(source):
        started = time.perf_counter()
        fold.add(index, chunk)
        seconds += time.perf_counter() - started
    started = time.perf_counter()
    for index, chunk in enumerate(fold.total()):
        seconds += time.perf_counter() - started
        _write(sink, index, chunk)
        started = time.perf_counter()
    _write(sink, _END, b"")
    report = {
        "peak_rss_mb": peak_memory_mb(),
        "start_rss_mb": start_rss,
        "fold_seconds": round(seconds, 4),
    }
    sink.write(json.dumps(report).encode())
    sink.flush()


if __name__ == "__main__":
    if sys.argv[1:] == [_CHILD]:
        fold_from(sys.stdin.buffer, sys.stdout.buffer)
    else:
        sys.stdout.write(json.dumps(run(), indent=2) + "\n")
