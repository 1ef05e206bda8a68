"""`fedcore bench fold`: the memory of a folding coordinator is the same for 4 sites and for 64.

The fold runs in a child process. The parent simulates the sites: it protects one vector after the other and
streams the chunks through a pipe, so that the child's peak memory is that of a coordinator's fold alone.
Invariant: the parent decrypts the returned sum and compares it with its own integer sum, slot by slot; a row
is reported only if they are equal.

Frames to the child: the public context and the number of slots, one per chunk with its index, and an
empty one. Frames from it: one per chunk of the sum, then the measurements.
"""

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from rich.console import RenderableType

from fedcore.bench import document, progress, table_page
from fedcore.errors import Abandoned, BadInput
from fedcore.experiment.environment import peak_memory_mb
from fedcore.runtime.pipes import Child, ChildEnded, Frame, Parent, python
from fedcore.secagg.crypto.bfv import EncryptedFold, EncryptedSealer, PublicContext, SecretContext
from fedcore.secagg.encode.pack import Layout
from fedcore.secagg.packing import solve_packing
from fedcore.secagg.plan import VectorSpec
from fedcore.types import Json, Slots


def run(parameters: int, sites: Sequence[int], bits: int = 12, seed: int = 0) -> Json:
    """Fold `parameters` coordinates from each number of sites in turn, under one packing for all.

    The packing is solved for the largest number, so every row has the same slots; 12 bits are
    proved for 64 sites and more. Returns the JSON of kind bench-fold: peak RSS in MB (2^20
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
    return document("fold", bits=bits, rows=rows, peak_rss_ratio=round(max(peaks) / min(peaks), 3))


def _measure(layout: Layout, secret: SecretContext, sites: int, seed: int) -> Json:
    sealer = EncryptedSealer(secret)
    expected = np.zeros(layout.slots, dtype=np.uint64)
    child = Child("bench fold: the folding process", python("fedcore.bench.fold"))
    try:
        child.start()
        child.send({"slots": layout.slots}, [secret.public.to_bytes()])
        for site in range(sites):
            slots = _vector(layout, site, seed)
            expected += slots
            for index, chunk in enumerate(sealer.protect(slots)):
                child.send({"index": index}, [chunk])
        child.send({})
        total = sealer.open((chunk for _, chunk in _chunks(child.receive)), layout.slots)
        report, _ = child.receive()
    except ChildEnded as error:
        raise Abandoned(str(error)) from error
    finally:
        child.close()
    if not np.array_equal(total, expected):
        raise Abandoned(
            f"bench fold: the sum of {sites} sites is not the integer sum of their slots"
        )
    return {"sites": sites, "parameters": layout.spec.coordinates, **report, "exact": True}


def _vector(layout: Layout, site: int, seed: int) -> Slots:
    """A site's packed slots: uniform fields, the largest possible among them."""
    rng = np.random.default_rng((seed, site))
    largest = 1 << layout.packing.bits
    fields = rng.integers(1, largest, layout.spec.coordinates, dtype=np.uint64)
    fields[0] = largest - 1
    return layout.pack(fields, {}, site)


def _chunks(receive: Callable[[], Frame]) -> Iterator[tuple[Json, bytes]]:
    """Head and blob of each frame up to one without a blob."""
    while (frame := receive())[1]:
        yield frame[0], frame[1][0]


def page(found: Json) -> RenderableType:
    """The output of `fedcore bench fold` for a terminal."""
    rows = (
        (r["sites"], f"{r['parameters']:,}", f"{r['peak_rss_mb']:.1f}", f"{r['fold_seconds']:.2f}")
        for r in found["rows"]
    )
    ratio = f"largest peak / smallest: {found['peak_rss_ratio']}; every sum exact"
    return table_page(("sites", "parameters", "peak memory, MB", "fold, s"), rows, ratio)


def fold_for(parent: Parent) -> None:
    """Fold the vectors of the parent and send it the sum and the measurements."""
    about, blobs = parent.receive()
    fold = EncryptedFold(PublicContext.from_bytes(blobs[0]), about["slots"])
    start_rss, seconds = peak_memory_mb(), 0.0
    for head, chunk in _chunks(parent.receive):
        started = time.perf_counter()
        fold.add(head["index"], chunk)
        seconds += time.perf_counter() - started
    started = time.perf_counter()
    for chunk in fold.total():
        seconds += time.perf_counter() - started
        parent.send({}, [chunk])
        started = time.perf_counter()
    parent.send({})
    used = {"peak_rss_mb": peak_memory_mb(), "start_rss_mb": start_rss}
    parent.send({**used, "fold_seconds": round(seconds, 4)})


if __name__ == "__main__":
    fold_for(Parent.of_this_process())
