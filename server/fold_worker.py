"""A fold worker: a process that keeps running sums of ranges of chunks. `folding.py` starts and asks it.

A request names an operation and a job; the seeds of masks are its blob. A FedcoreError is an answer, which the
coordinator raises again; any other exception ends the process, and the sums with it.
Between requests it works ahead on the sums of the uploads that were committed: while others come, and while the sites
confirm their list and are asked for the masks.
"""

import signal
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol, Self

from fedcore import errors
from fedcore.errors import ChunkRefused, FedcoreError
from fedcore.files.disk import refusals
from fedcore.runtime.pipes import Parent
from fedcore.secagg.crypto import UnmaskableFold, words
from fedcore.secagg.crypto.masking import mask_sum
from fedcore.secagg.packing import Packing, Ring
from fedcore.store import container
from fedcore.types import Json

_SEED_BYTES = 32

QUIET_SECONDS = 0.1
"""Time without a request after which no other upload is expected soon, and the sum is made ready to be written."""

ERRORS = {
    kind.__name__: kind
    for kind in (
        errors.BadInput, ChunkRefused, errors.PlanRefused, errors.StoreFull, errors.StoreProblem,
        errors.Unavailable,
    )
}  # fmt: skip
"""Errors of a worker that the coordinator raises again, by name."""


def chunk_slots(packing: Packing) -> int:
    """Slots of a whole chunk."""
    if packing.ring is None:
        return words.SLOTS_PER_CHUNK
    from fedcore.secagg.crypto.bfv_chunks import BLOCKS_PER_CHUNK

    return BLOCKS_PER_CHUNK * packing.ring.degree


def packing_form(packing: Packing) -> list[int]:
    """A packing as a request has it."""
    form = [packing.bits, packing.max_sites, packing.fields_per_slot]
    return form if packing.ring is None else [*form, packing.ring.degree, packing.ring.modulus]


class _Mergeable(UnmaskableFold, Protocol):
    """Both folds, which can also add another one's sum to their own."""

    def merge(self, other: Self) -> None: ...

    def expand_ahead(self) -> bool: ...

    def read_ahead(self) -> bool: ...


class _Part:
    """A worker's range of one job: the running sum, and one upload beside it that may still be refused."""

    def __init__(self, request: Json) -> None:
        bits, sites, fields, *ring = request["packing"]
        self._packing = Packing(bits, sites, fields, Ring(*ring) if ring else None)
        self._slots, self._of = request["slots"], request["of"]
        self._first, self._chunks = request["first"], request["chunks"]
        self._make = _maker(self._packing, self._slots, self._first, whole=self._of == 1)
        self._sum = self._make()
        self._beside: _Mergeable | None = None

    def prepare(self, path: Path) -> None:
        """Read this range of an upload. Raises ChunkRefused, StoreProblem."""
        self._beside = None
        fold = self._make()
        with refusals("fold", path):
            found = container.count(path)
            if found != self._of:
                raise ChunkRefused(f"vector: found {found} chunks, expected {self._of}")
            for place, chunk in enumerate(container.read(path, self._first, self._chunks)):
                fold.add(self._first + place, chunk)
        self._beside = fold

    def commit(self) -> None:
        """Add what was read to the sum."""
        assert self._beside is not None
        self._sum.merge(self._beside)
        self._beside = None

    def work_ahead(self, *, quiet: bool) -> bool:
        """A short piece of what `write` needs; whether there was any. quiet: whether no upload is expected soon."""
        return self._sum.expand_ahead() or (quiet and self._sum.read_ahead())

    def write(self, path: Path, masks: bytes) -> None:
        """Take the masks off and write the chunks of the sum. Raises StoreProblem."""
        laid = [
            (masks[at : at + _SEED_BYTES], 1 if masks[at + _SEED_BYTES] == ord("+") else -1)
            for at in range(0, len(masks), _SEED_BYTES + 1)
        ]
        if laid:
            start = self._first * chunk_slots(self._packing)
            bits = self._packing.slot_bits
            self._sum.remove(mask_sum(laid, self._slots, bits, first=start))
        with refusals("fold", path), path.open("wb") as file:
            container.write(file, self._sum.total())


def _maker(
    packing: Packing, slots: int, first_chunk: int, *, whole: bool
) -> Callable[[], _Mergeable]:
    """How an empty fold of this range is made: ciphertexts, or words where nothing encrypts them. whole: whether this
    one chunk is the whole vector."""
    if packing.ring is None:
        from fedcore.secagg.crypto.masked import MaskedFold

        return lambda: MaskedFold(packing, slots, first_chunk=first_chunk)
    from fedcore.secagg.crypto.bfv import Courier, EncryptedFold, PublicContext

    public, courier = PublicContext.of(packing), Courier()
    return lambda: EncryptedFold(public, slots, courier, first_chunk=first_chunk, seeds=whole)


def _handle(parts: dict[str, _Part], request: Json, payload: bytes) -> None:
    job = request["job"]
    match request["op"]:
        case "begin":
            parts[job] = _Part(request)
        case "prepare":
            parts[job].prepare(Path(request["path"]))
        case "commit":
            parts[job].commit()
        case "add":
            parts[job].prepare(Path(request["path"]))
            parts[job].commit()
        case "sum":  # once: what is left of the masks' seeds and the sum goes with it
            parts.pop(job).write(Path(request["path"]), payload)
        case "end":
            parts.pop(job, None)


def _work_ahead(parts: Mapping[str, _Part], seconds: float) -> float | None:
    """A short piece of work on the sums, so long after the last request; after how many seconds to go on, if at all."""
    quiet = seconds >= QUIET_SECONDS
    if any(part.work_ahead(quiet=quiet) for part in parts.values()):
        return 0.0
    return QUIET_SECONDS - seconds if parts and not quiet else None


def main() -> None:
    """Answer requests until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the coordinator ends it
    parts: dict[str, _Part] = {}

    def answer(request: Json, blobs: list[bytes]) -> tuple[Json, Sequence[bytes]]:
        try:
            _handle(parts, request, blobs[0])
        except FedcoreError as error:
            kind = next(c.__name__ for c in type(error).__mro__ if c.__name__ in ERRORS)
            return {"error": kind, "text": str(error), "remedy": error.remedy}, []
        return {}, []

    Parent.of_this_process().serve(answer, partial(_work_ahead, parts))


if __name__ == "__main__":
    main()
