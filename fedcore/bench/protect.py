"""`fedcore bench protect`: what protecting one vector costs, beside float32 and CKKS, in one run.

Every scheme gets the same vectors. In each repeat all schemes take their turn, so a slow moment of
the machine hits all of them, and a number is the median over repeats. Times are of one process with
one thread and cover all that a role does: quantise, pack, tag, encrypt and serialise at a site
(protect); parse, check and add one vector at the coordinator (fold); serialise the sum, once a
round (release); parse, decrypt, check the tag, unpack and dequantise at a site again (unprotect).

Invariant: every repeat decodes the sum of CONTRIBUTORS vectors and compares it with the true mean,
so no fast wrong answer is reported. CKKS is no protection of a run: see `fedcore/protect/ckks.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.text import Text

from fedcore.bench import progress
from fedcore.encode.pack import Layout
from fedcore.encode.quantise import dequantise, quantise, step_size
from fedcore.environment import environment
from fedcore.errors import BadInput
from fedcore.plan import RoundHeader, VectorSpec, Wide, solve_packing
from fedcore.protect import ckks
from fedcore.protect.bfv import EncryptedFold, EncryptedSealer, PublicContext, SecretContext
from fedcore.protect.sumtag import SumTag
from fedcore.report.terminal import fitted, grid
from fedcore.seeds import generator
from fedcore.types import FloatVector, Json, SiteId, WideVector

CONTRIBUTORS = 3
"""Vectors in the decoded sum; the plan is solved for all sites. More only take time."""

DEFAULT_BITS = (8, 12, 16)

_SPREAD = 0.01
"""Standard deviation of the vectors' coordinates: the size of an update after a few local steps."""


@dataclass(frozen=True)
class Scheme:
    """One way to carry a vector, as functions; a running sum is whatever `start` returns.

    protect: `(vector, site) -> chunks` up. add: one site's chunks into the running sum.
    release: the chunks down. unprotect: `(chunks, contributors) -> (d,) float64`, the mean.
    step: the quantisation step, None where there is none.
    """

    name: str
    bits: int | None
    step: float | None
    protect: Callable[[FloatVector, int], list[bytes]]
    start: Callable[[], Any]
    add: Callable[[Any, list[bytes]], Any]
    release: Callable[[Any], list[bytes]]
    unprotect: Callable[[list[bytes], int], WideVector]


@dataclass
class _Measured:
    """Samples of one scheme, in seconds; bytes of one vector up and of one sum down."""

    protect: list[float] = field(default_factory=list)
    fold: list[float] = field(default_factory=list)
    release: list[float] = field(default_factory=list)
    unprotect: list[float] = field(default_factory=list)
    bytes_up: int = 0
    bytes_down: int = 0
    max_error: float = 0.0


def run(
    parameters: int,
    sites: int,
    bits: Sequence[int] = DEFAULT_BITS,
    repeats: int = 5,
    seed: int = 0,
) -> Json:
    """Measure float32, `encrypted` at each of `bits`, and CKKS on vectors of `parameters` floats.

    Returns the JSON of kind bench-protect: seconds are per million parameters and per vector, bytes
    per parameter, `max_error` the largest |decoded mean - true mean| of any repeat. Raises
    BadInput, PlanRefused where bits do not fit the sites, and Unavailable without tenseal.
    """
    if parameters < 1:
        raise BadInput(f"bench.parameters: found {parameters}, expected at least 1")
    if repeats < 1:
        raise BadInput(f"bench.repeats: found {repeats}, expected at least 1")
    if sites < CONTRIBUTORS:
        raise BadInput(f"bench.sites: found {sites}, expected at least {CONTRIBUTORS}")
    vectors = [
        generator(seed, 0, str(site), "bench vector").normal(0, _SPREAD, parameters).astype("f4")
        for site in range(CONTRIBUTORS)
    ]
    bound = _power_of_two_above(max(float(np.abs(vector).max()) for vector in vectors))
    schemes = [
        float32(),
        *(encrypted(parameters, sites, b, bound, seed) for b in dict.fromkeys(bits)),
        ckks_vectors("ckks", ckks.protect),
        ckks_vectors("ckks-blocks", ckks.protect_blocks),
    ]
    measured = [_Measured() for _ in schemes]
    for repeat in range(repeats):
        progress(f"bench protect: repeat {repeat + 1} of {repeats}, {parameters} parameters")
        for scheme, samples in zip(schemes, measured, strict=True):
            _measure(scheme, vectors, samples)
    rows = [_row(s, m, parameters) for s, m in zip(schemes, measured, strict=True)]
    return {
        "schema": 1,
        "kind": "bench-protect",
        "parameters": parameters,
        "sites": sites,
        "repeats": repeats,
        "seed": seed,
        "range": bound,
        "contributors": CONTRIBUTORS,
        "rows": rows,
        "ratios": _ratios(rows),
        "environment": environment(),
    }


def _power_of_two_above(value: float) -> float:
    """The range an adaptive run settles at: no coordinate is clipped."""
    return float(2.0 ** np.ceil(np.log2(value))) if value > 0 else 1.0


# ------------------------------------------------------------------ the schemes


def float32() -> Scheme:
    """No protection: the vector's own bytes."""

    def add(running: WideVector | None, chunks: list[bytes]) -> WideVector:
        vector = np.frombuffer(b"".join(chunks), "<f4")
        return vector.astype(np.float64) if running is None else running + vector

    return Scheme(
        name="float32",
        bits=32,
        step=None,
        protect=lambda vector, site: [vector.astype("<f4").tobytes()],
        start=lambda: None,
        add=add,
        release=lambda running: [running.astype("<f4").tobytes()],
        unprotect=lambda chunks, n: np.frombuffer(b"".join(chunks), "<f4") / np.float64(n),
    )


def encrypted(parameters: int, sites: int, bits: int, bound: float, seed: int) -> Scheme:
    """The protection `encrypted`: the vector of a training round with its wide integers and tag."""
    packing = solve_packing(bits, sites, "encrypted")
    count_bits = parameters.bit_length()
    wides = (
        Wide("weight", 1, 20),
        Wide("over_range", 1, count_bits),
        Wide("over_half_range", 1, count_bits),
    )
    layout = Layout(VectorSpec("update", parameters, wides), packing, sites)
    public = PublicContext.of(packing)
    secret = SecretContext(public)
    sealer = EncryptedSealer(secret)
    names = tuple(SiteId(f"site-{index}") for index in range(CONTRIBUTORS))
    header = RoundHeader("bench", 1, "update", names, "")
    tag = SumTag(secret.group, header, b"bench")

    def protect(vector: FloatVector, site: int) -> list[bytes]:
        rng = generator(seed, 1, names[site], "rounding")
        quantised = quantise(vector, bits, bound, rng)
        counts = {
            "weight": [1],
            "over_range": [quantised.over],
            "over_half_range": [quantised.over_half],
        }
        slots = layout.pack(quantised.fields, counts, site)
        layout.put_tag(slots, tag.tag(slots[: layout.tagged_slots], names[site]))
        return list(sealer.protect(slots))

    def add(running: EncryptedFold, chunks: list[bytes]) -> EncryptedFold:
        for index, chunk in enumerate(chunks):
            running.add(index, chunk)
        return running

    def unprotect(chunks: list[bytes], contributors: int) -> WideVector:
        total = sealer.open(chunks, layout.slots)
        tag.check(total[: layout.tagged_slots], layout.read_tag(total), names[:contributors])
        opened = layout.unpack(total, range(contributors))
        return dequantise(opened.coordinates, bits, bound, contributors) / contributors

    return Scheme(
        name="encrypted",
        bits=bits,
        step=step_size(bits, bound),
        protect=protect,
        start=lambda: EncryptedFold(public, layout.slots),
        add=add,
        release=lambda running: list(running.total()),
        unprotect=unprotect,
    )


def ckks_vectors(name: str, protect: Callable[[Any, FloatVector], list[bytes]]) -> Scheme:
    """What other frameworks do: approximate homomorphic encryption of the floats themselves.

    `ckks` is one CKKSVector, as they use it; `ckks-blocks` is the fastest use of it that we found.
    """
    context = ckks.new_context()
    return Scheme(
        name=name,
        bits=None,
        step=None,
        protect=lambda vector, site: protect(context, vector),
        start=list,
        add=lambda running, chunks: ckks.fold(context, running, chunks),
        release=ckks.serialise,
        unprotect=lambda chunks, n: ckks.unprotect(context, chunks) / n,
    )


# ------------------------------------------------------------------ measuring


def _timed(samples: list[float], function: Callable[..., Any], *arguments: Any) -> Any:
    started = time.perf_counter()
    result = function(*arguments)
    samples.append(time.perf_counter() - started)
    return result


def _measure(scheme: Scheme, vectors: Sequence[FloatVector], into: _Measured) -> None:
    running = scheme.start()
    for site, vector in enumerate(vectors):
        chunks = _timed(into.protect, scheme.protect, vector, site)
        into.bytes_up = sum(map(len, chunks))
        running = _timed(into.fold, scheme.add, running, chunks)
    released = _timed(into.release, scheme.release, running)
    into.bytes_down = sum(map(len, released))
    mean = _timed(into.unprotect, scheme.unprotect, released, len(vectors))
    true = np.mean(np.stack(vectors).astype(np.float64), axis=0)
    into.max_error = max(into.max_error, float(np.abs(mean - true).max()))


def _row(scheme: Scheme, measured: _Measured, parameters: int) -> Json:
    def per_million(samples: list[float]) -> float:
        return round(median(samples) * 1e6 / parameters, 6)

    return {
        "name": scheme.name,
        "bits": scheme.bits,
        "bytes_up_per_parameter": round(measured.bytes_up / parameters, 4),
        "bytes_down_per_parameter": round(measured.bytes_down / parameters, 4),
        "protect_seconds_per_million": per_million(measured.protect),
        "fold_seconds_per_million": per_million(measured.fold),
        "release_seconds_per_million": per_million(measured.release),
        "unprotect_seconds_per_million": per_million(measured.unprotect),
        "max_error": measured.max_error,
        "quantisation_step": scheme.step,
    }


def _ratios(rows: Sequence[Json]) -> Json:
    """How many times as much each other scheme of the same run costs as an `encrypted` row.

    {"encrypted-16": {"ckks": {"bytes_up": 16.9, "protect_seconds": 6.0, ...}, "float32": {...}}}
    """
    keys = {
        "bytes_up": "bytes_up_per_parameter",
        "bytes_down": "bytes_down_per_parameter",
        "protect_seconds": "protect_seconds_per_million",
        "fold_seconds": "fold_seconds_per_million",
        "unprotect_seconds": "unprotect_seconds_per_million",
    }
    others = [row for row in rows if row["name"] != "encrypted"]
    return {
        f"encrypted-{row['bits']}": {
            other["name"]: {
                short: round(other[long] / row[long], 3) if row[long] else None
                for short, long in keys.items()
            }
            for other in others
        }
        for row in rows
        if row["name"] == "encrypted"
    }


def page(found: Json) -> RenderableType:
    """The terminal's page of `fedcore bench protect`."""
    heads = ("bytes up", "down", "protect", "fold", "unprotect", "max error")
    table = grid("scheme", *heads)
    for row in found["rows"]:
        bits = f" {row['bits']} bits" if row["bits"] else ""
        seconds = (row[f"{s}_seconds_per_million"] for s in ("protect", "fold", "unprotect"))
        table.add_row(
            row["name"] + bits,
            f"{row['bytes_up_per_parameter']:.3f}",
            f"{row['bytes_down_per_parameter']:.3f}",
            *(f"{value:.4f}" for value in seconds),
            f"{row['max_error']:.2e}",
        )
    lines = [
        f"{name}: {ratio['ckks']['bytes_up']:.1f} times smaller up and "
        f"{ratio['ckks']['protect_seconds']:.1f} times faster to protect than ckks "
        f"({ratio['ckks-blocks']['protect_seconds']:.1f} times, ckks one ciphertext at a time)"
        for name, ratio in found["ratios"].items()
    ]
    note = (
        f"{found['parameters']:,} parameters, plan for {found['sites']} sites; bytes per parameter; "
        f"seconds per million parameters and vector, medians of {found['repeats']} interleaved repeats"
    )
    return Group(fitted(table), Text(), Text(note), *map(Text, lines))
