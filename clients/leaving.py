"""Everything that may leave this site under a job's plan, and the check that lets nothing else out.

The list is made of the registries that the code itself runs by: the tables of records (`wire/records.py`), the frames
(`wire/frames.py`), the purposes of vectors with what each holds, and the label. `fed-site explain` prints it.
Invariant: each record and each upload of the site's session passes a `Gate`, which refuses what is not on the list, or
is longer.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any, Protocol, get_args, get_origin, get_type_hints

from fedcore.errors import PolicyRefused
from fedcore.secagg.label import Terms, readers_of, works_out
from fedcore.secagg.plan import RoundPlan, VectorSpec
from fedcore.secagg.protocol.job.coordinator.catch_up import most_state_bytes
from fedcore.secagg.protocol.messages import SEALED
from fedcore.secagg.purposes import purpose_of
from fedcore.secagg.scheme import vector_sizes
from fedcore.store import container
from fedcore.types import Json
from fedcore.wire import frames
from fedcore.wire.limits import Limit
from fedcore.wire.records import TO_COORDINATOR

CHECKPOINT, MODEL = "checkpoint", "model"
_COORDINATOR = "the coordinator"
_SITES = "the sites it is sealed for; the coordinator passes it on and cannot open it"
_HOLDERS = "the sites, which hold the key; the coordinator passes it on and cannot open it"
_CARRIERS = frames.Record, frames.SmallUpload
"""Frames whose content is on the list itself."""


@dataclass(frozen=True)
class OutgoingField:
    """One field. values: its range, in words."""

    name: str
    type: str
    values: str = ""
    read_by: str = ""


@dataclass(frozen=True)
class Outgoing:
    """One thing that may leave. kind: "vector", "file", "record" or "frame"; most: its bytes at most."""

    name: str
    kind: str
    what: str
    most: int
    read_by: str
    parts: tuple[OutgoingField, ...] = ()

    def to_json(self) -> Json:
        """For `--json`."""
        return asdict(self)


class OutgoingList:
    """What may leave under a plan, None before there is one. features: columns that are standardised; may: the fields
    that the policy lets out, None for all."""

    def __init__(
        self, plan: RoundPlan | None, features: int, sites: int, may: Collection[str] | None = None
    ) -> None:
        self.plan, self.features, self.sites, self.may = plan, features, sites, may
        sizes = vector_sizes(plan, features) if plan is not None else {}
        self.sizes = {name: size for name, size in sizes.items() if may is None or name in may}
        """Bytes of a vector, by purpose."""

    def most(self, name: str, kind: str) -> int:
        """Bytes that something of this name may have; 0 for what is not on the list."""
        plan = self.plan
        if kind == "record":
            entry = TO_COORDINATOR.get(name)
            fits = entry is not None and (
                entry.under is None or (plan is not None and entry.under(plan))
            )
            return entry.limit(self.sites) if entry is not None and fits else 0
        if plan is None:
            return 0
        if kind == "vector":
            size = self.sizes.get(name, 0)
            return size + container.overhead(1 + size // 1024) if size else 0
        if name == MODEL and plan.release != "coordinator":
            return 0
        return most_state_bytes(plan)

    def check(self, name: str, kind: str, size: int) -> None:
        """Raise PolicyRefused for what is not on the list, or longer than there."""
        most = self.most(name, kind)
        if size <= most:
            return
        expected = f"at most {most} bytes" if most else "nothing of this name to leave"
        raise PolicyRefused(
            f"{kind} {name}: found {size} bytes about to leave, expected {expected} under this job's plan",
            word="policy",
            remedy="nothing of it was sent: `fed-site explain` lists what may leave; this is a fault of the program, "
            "or of the job",
        )

    def items(self) -> Iterator[Outgoing]:
        """The whole list: vectors first, then files, records and frames."""
        plan = self.plan
        if plan is not None:
            yield from self._vectors(plan)
            what = "the state of the last release, for a site that missed it"
            yield Outgoing(CHECKPOINT, "file", what, most_state_bytes(plan), _HOLDERS)
            if plan.release == "coordinator":
                what = "the model and statistics of the last round"
                yield Outgoing(MODEL, "file", what, most_state_bytes(plan), _COORDINATOR)
        for name, entry in TO_COORDINATOR.items():
            if most := self.most(name, "record"):
                parts = tuple(_parts(entry.kind))
                yield Outgoing(name, "record", _first_line(entry.kind), most, _COORDINATOR, parts)
        for frame in get_args(frames.FromSite):
            if frame not in _CARRIERS:
                what, most = _first_line(frame), frames.most_bytes(frame)
                yield Outgoing(
                    frame.__name__, "frame", what, most, _COORDINATOR, tuple(_parts(frame))
                )

    def _vectors(self, plan: RoundPlan) -> Iterator[Outgoing]:
        terms = Terms.of_plan(plan)
        readers = f"{readers_of(terms)}; this site's alone: {works_out(terms)}"
        for name in self.sizes:
            purpose = purpose_of(name)
            rounds = len(purpose.rounds(plan, self.features))
            parts = tuple(_contents(plan, purpose.vector(plan, self.features)))
            what = f"{rounds} in the job, one a round" if rounds > 1 else "one in the job"
            yield Outgoing(name, "vector", what, self.most(name, "vector"), readers, parts)


def _contents(plan: RoundPlan, spec: VectorSpec) -> Iterator[OutgoingField]:
    """The fields of a vector, in its order."""
    if spec.coordinates:
        start = plan.range.start
        bound = "the range that the first round finds" if start is None else f"{start:g} at first"
        values = f"from -C to C, C = {bound}; what exceeds it is clipped"
        alone = len(plan.blocks) == 1
        for what, numbers in plan.blocks.items():
            name = "coordinates" if alone else f"coordinates of {what}"
            yield OutgoingField(name, f"{numbers} integers of {plan.packing.bits} bits", values)
    for wide in spec.wides:
        count = "1 integer" if wide.count == 1 else f"{wide.count} integers"
        yield OutgoingField(
            wide.name, f"{count} of {wide.bits} bits", f"0 to {(1 << wide.bits) - 1}"
        )
    for mark in spec.marks:
        yield OutgoingField(mark, "1 integer, in a place of this site's own", "0 or 1")


def _parts(
    kind: type[Any], prefix: str = "", read_by: str = _COORDINATOR
) -> Iterator[OutgoingField]:
    """The fields of a record or frame, those of records inside it with their path."""
    hints = get_type_hints(kind, include_extras=True)
    for each in fields(kind):
        hint, path = hints[each.name], prefix + each.name
        marks = getattr(hint, "__metadata__", ())
        plain, listed = _unlisted(get_args(hint)[0] if marks else hint)
        if is_dataclass(plain) and isinstance(plain, type):
            yield from _parts(plain, f"{path}.", read_by)
            continue
        limit = next((mark.expected for mark in marks if isinstance(mark, Limit)), "")
        words = getattr(plain, "__name__", str(plain))
        reader = _SITES if SEALED in marks else read_by
        yield OutgoingField(path, f"list of {words}" if listed else words, limit, reader)


def _unlisted(hint: Any) -> tuple[Any, bool]:
    """The type of the items of a tuple, and whether it is one; a field of pairs stays as it is."""
    args = get_args(hint)
    if get_origin(hint) is tuple and len(args) == 2 and args[1] is Ellipsis:
        return args[0], True
    return hint, False


def _first_line(kind: type[Any]) -> str:
    return " ".join((kind.__doc__ or "").split("\n\n")[0].split())


class Gate(Protocol):
    """What each record and upload of a session passes."""

    def record(self, job: str, message: object, size: int) -> None:
        """Raise PolicyRefused for a record that may not leave. size: its bytes."""
        ...

    def upload(self, job: str, header: bytes, size: int) -> bool:
        """Raise PolicyRefused for a file that may not leave; False for one whose round or release is over, which is not
        sent either. header: the 32 bytes it goes under."""
        ...

    def stopped(self, job: str, message: object, refused: PolicyRefused) -> None:
        """A record was kept here: tell whom it concerns."""
        ...
