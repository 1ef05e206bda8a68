"""`fedcore bench protect`: the cost of protecting one vector, compared with float32 and CKKS, in one run.

Every scheme gets the same vectors. In each repeat all schemes are measured in turn, so that a temporary load
of the machine affects all of them; a number is the median over repeats. Times are of one process with
one thread and cover all that a role does: quantise, pack, tag, mask, encrypt and serialise at a site
(protect); parse, check and add one vector at the coordinator (fold); expand the self masks of all
sites and subtract them from the sum, once a round (unmask); serialise it, once a round (release); parse,
decrypt, check the tag, unpack and dequantise at a site (unprotect). The agreement on the seeds of masks is
not included.

Of the plan's n sites only CONTRIBUTORS make a vector, each with the n - 1 pairwise masks and the self
mask of a site of n. The pairwise masks that they share with the others remain in the sum. These are
subtracted with the self masks, but expanded before the timing starts: it includes n self masks, as in a round
without absences. The same holds for keystreams, which a site subtracts when it opens the sum (unprotect): it
expands n of them, and those of sites without a vector are added before the timing starts.

Invariant: every repeat decodes the sum of CONTRIBUTORS vectors and compares it with the true mean,
so that no wrong result is reported. CKKS is not a protection of a run: see `fedcore/secagg/crypto/ckks.py`.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import numpy as np
from rich.console import RenderableType

from fedcore.bench import document, plan_of, progress, require_at_least, table_page
from fedcore.learning.adaptive_range import exceeds
from fedcore.secagg.crypto import Fold, UnmaskableFold, ckks
from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.crypto.masking import add_masks, draw_salt, mask_sum
from fedcore.secagg.crypto.sumtag import SumTag
from fedcore.secagg.encode.pack import Layout
from fedcore.secagg.encode.quantise import dequantise, quantise, step_size
from fedcore.secagg.plan import EXCEEDS, RoundHeader
from fedcore.secagg.protections import MAX_MASKED_SITES, SCHEMES, Protection, masking
from fedcore.secagg.scheme import EpochSecrets, Scheme
from fedcore.seeds import generator
from fedcore.types import FloatVector, Json, Slots, WideVector

CONTRIBUTORS = 3
"""Vectors in the decoded sum; the plan is solved for all sites. More would only take longer."""

_SPREAD = 0.01
"""Standard deviation of the vectors' coordinates: the size of an update after a few local steps."""


@dataclass(frozen=True)
class TimedScheme:
    """One way to protect a vector, as functions; a running sum is what `start` returns.

    protect: `(vector, site) -> chunks` up. add: one site's chunks into the running sum.
    release: the chunks down. unprotect: `(chunks, contributors) -> (d,) float64`, the mean.
    step: the quantisation step, or None. unmask: subtracts the masks from the running sum, or None.
    """

    name: str
    bits: int | None
    step: float | None
    protect: Callable[[FloatVector, int], list[bytes]]
    start: Callable[[], Any]
    add: Callable[[Any, list[bytes]], Any]
    release: Callable[[Any], list[bytes]]
    unprotect: Callable[[list[bytes], int], WideVector]
    unmask: Callable[[Any], None] | None = None


STAGES = ("protect", "fold", "unmask", "release", "unprotect")


@dataclass
class _Measured:
    """Samples of one scheme, in seconds by stage; bytes of one vector up and of one sum down."""

    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in STAGES})
    bytes_up: int = 0
    bytes_down: int = 0
    max_error: float = 0.0


def run(
    parameters: int, sites: int, bits: Sequence[int] = (8,), repeats: int = 5, seed: int = 0
) -> Json:
    """Measure float32, every protection at each of `bits`, and CKKS on vectors of `parameters` floats.

    Protections with masks are left out for more sites than a plan with masks may have. Returns the JSON of
    kind bench-protect: seconds are per million parameters and per vector, bytes per parameter,
    `max_error` the largest |decoded mean - true mean| of any repeat. Raises BadInput, PlanRefused
    where bits do not fit the sites, and Unavailable without tenseal.
    """
    require_at_least("--parameters", parameters, 1)
    require_at_least("bench.repeats", repeats, 1)
    require_at_least("--sites", sites, CONTRIBUTORS)
    vectors = [
        generator(seed, 0, str(site), "bench vector").normal(0, _SPREAD, parameters).astype("f4")
        for site in range(CONTRIBUTORS)
    ]
    # The range to which an adaptive run converges: no coordinate is clipped.
    bound = float(2.0 ** np.ceil(np.log2(max(np.abs(vector).max() for vector in vectors))))
    schemes = [
        float32(),
        *(
            protected(name, parameters, sites, b, bound, seed)
            for b in dict.fromkeys(bits)
            for name, (protection, _) in SCHEMES.items()
            if (layers := Protection.of(protection)).protects
            and (not layers.masks or sites <= MAX_MASKED_SITES)
        ),
        ckks_vectors("ckks", ckks.protect),
        ckks_vectors("ckks-blocks", ckks.protect_blocks),
    ]
    measured = [_Measured() for _ in schemes]
    for repeat in range(repeats):
        progress(f"bench protect: repeat {repeat + 1} of {repeats}, {parameters} parameters")
        for scheme, samples in zip(schemes, measured, strict=True):
            _measure(scheme, vectors, samples)
    rows = [_row(s, m, parameters) for s, m in zip(schemes, measured, strict=True)]
    return document(
        "protect", parameters=parameters, sites=sites, repeats=repeats, seed=seed, range=bound,
        contributors=CONTRIBUTORS, rows=rows, ratios=_ratios(rows),
    )  # fmt: skip


def float32() -> TimedScheme:
    """No protection: the vector's own bytes."""

    def add(running: WideVector | None, chunks: list[bytes]) -> WideVector:
        vector = np.frombuffer(b"".join(chunks), "<f4")
        return vector.astype(np.float64) if running is None else running + vector

    return TimedScheme(
        name="float32",
        bits=32,
        step=None,
        protect=lambda vector, site: [vector.astype("<f4").tobytes()],
        start=lambda: None,
        add=add,
        release=lambda running: [running.astype("<f4").tobytes()],
        unprotect=lambda chunks, n: np.frombuffer(b"".join(chunks), "<f4") / np.float64(n),
    )


def protected(
    name: str, parameters: int, sites: int, bits: int, bound: float, seed: int
) -> TimedScheme:
    """A protection with its cipher: the vector of a training round with its wide integers, its tag, its
    masks and its keystream. name: one of SCHEMES."""
    protection, cipher = SCHEMES[name]
    plan = plan_of(parameters, sites, bits, protection, cipher, fields=parameters)
    scheme, layout, roster = (
        Scheme(plan),
        Layout(plan.update_vector, plan.packing, sites),
        plan.sites,
    )
    secrets = scheme.open_payload(scheme.make_payload(), roster[0])
    header = RoundHeader(
        "bench", "bench", 1, 1, 1, "update", roster, "", plan.threshold, protection, ""
    )
    tag = SumTag(secrets.group, header, b"bench")
    masks = _Masks(layout, sites) if plan.layers.masks else None
    streams = _Streams(secrets, header, layout) if secrets.streams else None

    def protect(vector: FloatVector, site: int) -> list[bytes]:
        rng = generator(seed, 1, roster[site], "rounding")
        quantised = quantise(vector, bits, bound, rng)
        counts = {
            "weight": [1],
            "over_range": [quantised.over],
            "over_half_range": [quantised.over_half],
            EXCEEDS: [int(exceeds(quantised.over, parameters))],
        }
        slots = layout.pack(quantised.fields, counts, site)
        layout.put_tag(slots, tag.tag(slots[: layout.tagged_slots], roster[site]))
        laid = [
            *(masks.of_site[site] if masks else ()),
            *([streams.fresh(site)] if streams else ()),
        ]
        if laid:
            add_masks(slots, laid, plan.packing.slot_bits)
        return list(secrets.sealer.protect(slots))

    def add(running: Fold, chunks: list[bytes]) -> Fold:
        for index, chunk in enumerate(chunks):
            running.add(index, chunk)
        return running

    def unprotect(chunks: list[bytes], contributors: int) -> WideVector:
        total = secrets.sealer.open(chunks, layout.slots)
        if streams is not None:
            streams.take_off(total)
        tag.check(total[: layout.tagged_slots], layout.read_tag(total), roster[:contributors])
        opened = layout.unpack(total, range(contributors))
        return dequantise(opened.coordinates, bits, bound, contributors) / contributors

    return TimedScheme(
        name=name,
        bits=bits,
        step=step_size(bits, bound),
        protect=protect,
        start=partial(scheme.fold, layout.slots),
        add=add,
        release=lambda running: list(running.total()),
        unprotect=unprotect,
        unmask=None if masks is None else masks.take_off,
    )


class _Masks:
    """The masks of one vector: seeds with their signs for each contributor, and the remaining masks.

    own: the self masks of all sites of the plan. rest: (S,) uint64, the pairwise masks of contributors
    with the others, less the self masks of those, so that own and rest are what the sum carries.
    """

    def __init__(self, layout: Layout, sites: int) -> None:
        self.own = [(os.urandom(32), 1) for _ in range(sites)]
        self.of_site = [[mask] for mask in self.own[:CONTRIBUTORS]]
        rest = [(seed, -1) for seed, _ in self.own[CONTRIBUTORS:]]
        for first in range(CONTRIBUTORS):
            for second in range(first + 1, sites):
                seed = os.urandom(32)
                self.of_site[first].append((seed, 1))
                if second < CONTRIBUTORS:
                    self.of_site[second].append((seed, -1))
                else:
                    rest.append((seed, 1))
        self._bits = layout.packing.slot_bits
        self.rest = mask_sum(rest, layout.slots, self._bits)

    def take_off(self, running: UnmaskableFold) -> None:
        """The coordinator's work between the last answer and the sum, without rebuilding secrets."""
        mask = self.rest.copy()
        add_masks(mask, self.own, self._bits)
        running.remove(mask)


class _Streams:
    """The keystreams of one plan's sites: fresh ones for the contributors, the others' added up before
    the timing starts, so that opening a sum expands the streams of all sites of the plan."""

    def __init__(self, secrets: EpochSecrets, header: RoundHeader, layout: Layout) -> None:
        self._secrets, self._header, self._bits = secrets, header, layout.packing.slot_bits
        self._laid: dict[int, tuple[bytes, int]] = {}
        others = [self.fresh(place) for place in range(len(header.roster))][CONTRIBUTORS:]
        self._rest = mask_sum(others, layout.slots, self._bits)

    def fresh(self, site: int) -> tuple[bytes, int]:
        """The stream of a new vector of a site."""
        salt, name = draw_salt(OsEntropy()), self._header.roster[site]
        self._laid[site] = self._secrets.stream(self._header, b"bench", name, salt)
        return self._laid[site]

    def take_off(self, total: Slots) -> None:
        """A site's work between unpacking the words of a sum and checking its tag."""
        total += self._rest
        add_masks(total, [(key, -sign) for key, sign in self._laid.values()], self._bits)


def ckks_vectors(name: str, protect: Callable[[Any, FloatVector], list[bytes]]) -> TimedScheme:
    """The method of other frameworks: approximate homomorphic encryption of the floats themselves.

    `ckks` is one CKKSVector, as they use it; `ckks-blocks` is the fastest use of it that we found.
    """
    context = ckks.new_context()
    return TimedScheme(
        name=name,
        bits=None,
        step=None,
        protect=lambda vector, site: protect(context, vector),
        start=list,
        add=lambda running, chunks: ckks.fold(context, running, chunks),
        release=ckks.serialise,
        unprotect=lambda chunks, n: ckks.unprotect(context, chunks) / n,
    )


def _measure(scheme: TimedScheme, vectors: Sequence[FloatVector], into: _Measured) -> None:
    def timed(stage: str, function: Callable[..., Any], *arguments: Any) -> Any:
        started = time.perf_counter()
        result = function(*arguments)
        into.seconds[stage].append(time.perf_counter() - started)
        return result

    running = scheme.start()
    for site, vector in enumerate(vectors):
        chunks = timed("protect", scheme.protect, vector, site)
        into.bytes_up = sum(map(len, chunks))
        running = timed("fold", scheme.add, running, chunks)
    if scheme.unmask is not None:
        timed("unmask", scheme.unmask, running)
    released = timed("release", scheme.release, running)
    into.bytes_down = sum(map(len, released))
    mean = timed("unprotect", scheme.unprotect, released, len(vectors))
    true = np.mean(np.stack(vectors).astype(np.float64), axis=0)
    into.max_error = max(into.max_error, float(np.abs(mean - true).max()))


def _row(scheme: TimedScheme, measured: _Measured, parameters: int) -> Json:
    per_million = {
        f"{stage}_seconds_per_million": round(median(each) * 1e6 / parameters, 6) if each else None
        for stage, each in measured.seconds.items()
    }
    return {
        "name": scheme.name,
        "bits": scheme.bits,
        "bytes_up_per_parameter": round(measured.bytes_up / parameters, 4),
        "bytes_down_per_parameter": round(measured.bytes_down / parameters, 4),
        **per_million,
        "max_error": measured.max_error,
        "quantisation_step": scheme.step,
    }


def _ratios(rows: Sequence[Json]) -> Json:
    """How many times as much each other scheme of the same run costs as a row of a protection.

    {"layered-16": {"ckks": {"bytes_up": 16.9, "protect_seconds": 6.0, ...}, "float32": {...}, ...}}
    Protections are compared at the same number of bits.
    """
    keys = {f"bytes_{way}": f"bytes_{way}_per_parameter" for way in ("up", "down")}
    for stage in ("protect", "fold", "unprotect"):
        keys[f"{stage}_seconds"] = f"{stage}_seconds_per_million"
    return {
        f"{row['name']}-{row['bits']}": {
            other["name"]: {
                short: round(other[long] / row[long], 3) if row[long] else None
                for short, long in keys.items()
            }
            for other in rows
            if other is not row and (other["name"] not in SCHEMES or other["bits"] == row["bits"])
        }
        for row in rows
        if row["name"] in SCHEMES
    }


def page(found: Json) -> RenderableType:
    """The output of `fedcore bench protect` for a terminal."""
    shown = ("protect", "fold", "unmask", "unprotect")
    rows = []
    for row in found["rows"]:
        seconds = (row[f"{stage}_seconds_per_million"] for stage in shown)
        rows.append((
            _shown(row), f"{row['bytes_up_per_parameter']:.3f}", f"{row['bytes_down_per_parameter']:.3f}",
            *("-" if value is None else f"{value:.4f}" for value in seconds), f"{row['max_error']:.2e}",
        ))  # fmt: skip
    note = (
        f"{found['parameters']:,} parameters, plan for {found['sites']} sites; bytes per parameter; "
        f"seconds per million parameters and vector, medians of {found['repeats']} interleaved repeats"
    )
    if found["sites"] > MAX_MASKED_SITES:
        note += f"; a plan with masks has at most {MAX_MASKED_SITES} sites"
    head = ("scheme", "up", "down", *shown, "max error")
    return table_page(head, rows, note, *_comparisons(found["ratios"]))


def _shown(row: Json) -> str:
    """A row's name and bits; a keystream is indented below its protection, to fit 80 columns."""
    _, cipher = SCHEMES.get(row["name"], ("", ""))
    if cipher == "keystream":
        return f"  {cipher} {row['bits']}"
    return f"{row['name']} {row['bits']} bits" if row["bits"] else str(row["name"])


def _comparisons(ratios: Json) -> list[str]:
    """Sentences about the ratios: each number of bits against CKKS, with masks against without, and each
    keystream against CKKS and against BFV."""
    lines = []
    for name, ratio in ratios.items():
        scheme, _, bits = name.rpartition("-")
        protection, cipher = SCHEMES[scheme]
        unmasked, streams = Protection.of(protection).one_key_opens, cipher == "keystream"
        if unmasked or streams:
            lines.append(
                f"{name}: {ratio['ckks']['bytes_up']:.1f} times smaller up and "
                f"{ratio['ckks']['protect_seconds']:.1f} times faster to protect than ckks "
                f"({ratio['ckks-blocks']['protect_seconds']:.1f} times, ckks one ciphertext at a time)"
            )
        if unmasked and not streams:
            lines += [
                f"{other}-{bits}: {ratio[other]['bytes_up']:.2f} times the bytes up and "
                f"{ratio[other]['protect_seconds']:.2f} times the seconds to protect of {name}"
                for other in masking()
                if other in ratio
            ]
        if streams:
            bfv = ratio[protection]
            lines.append(
                f"{name}: {bfv['bytes_up']:.2f} times smaller up, {bfv['bytes_down']:.2f} times down, and "
                f"{bfv['protect_seconds']:.1f} times faster to protect than {protection}-{bits} (bfv)"
            )
    return lines
