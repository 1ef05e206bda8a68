"""What all machines are built from: common events, a step in the making, and the table of legal moves."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fedcore.errors import OutOfOrder
from fedcore.secagg.protocol.effects import Persist
from fedcore.secagg.protocol.wire_form import records, type_name

M = TypeVar("M")
Stage = TypeVar("Stage")
Entry = TypeVar("Entry")
Effect = TypeVar("Effect")
Event = TypeVar("Event")

Kind = type[object]
Handler = Callable[[M, object, object], None]
Table = dict[Kind, dict[Kind, tuple[Handler[M], tuple[Kind, ...]]]]
"""{stage: {event or received message: (handler, stages it may lead to; none: it stays)}}."""


@dataclass(frozen=True)
class Restarted:
    """The process is new, and the stage comes from the journal."""


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class Timed:
    """A stage with a timeout. until: seconds of the machine's clock; 0 in a journal, which has no clock."""

    until: float = field(default=0.0, compare=False, kw_only=True, metadata={"byte_form": False})


@dataclass
class Move(Generic[Stage, Entry, Effect]):
    """One step of a machine in the making: records move the stage, effects follow in order."""

    stage: Stage
    evolve: Callable[[Stage, Entry], Stage]
    effects: list[Persist[Entry] | Effect] = field(default_factory=list)

    def record(self, entry: Entry) -> None:
        """What happened: the stage after it, and the entry on disk."""
        self.stage = self.evolve(self.stage, entry)
        self.effects.append(Persist(entry))

    def do(self, *found: Effect) -> None:
        """Ask for these after what was asked for before."""
        self.effects += found


def ignore(move: object, stage: object, event: object) -> None:
    """Nothing is due."""


def on(
    stages: type[Stage] | tuple[type[Stage], ...],
    event: type[Event],
    handle: Callable[[M, Stage, Event], None],
    *leads_to: Kind,
) -> tuple[tuple[Kind, ...], Kind, tuple[Handler[M], tuple[Kind, ...]]]:
    """A row of a table: at these stages `handle(move, stage, event)` makes the move."""

    def run(move: M, stage: object, found: object) -> None:
        assert isinstance(stage, stages)
        assert isinstance(found, event)
        handle(move, stage, found)

    return stages if isinstance(stages, tuple) else (stages,), event, (run, leads_to)


def table(*rows: tuple[tuple[Kind, ...], Kind, tuple[Handler[M], tuple[Kind, ...]]]) -> Table[M]:
    """The rows by stage and event."""
    found: Table[M] = {}
    for stages, event, move in rows:
        for stage in stages:
            found.setdefault(stage, {})[event] = move
    return found


def not_legal(
    found: type[object], legal: Iterable[type[object]], *, message: bool, fault: str
) -> OutOfOrder:
    """The refusal of a message, or of an event, that a stage does not take; it lists those it takes."""
    kinds = set(records().values())
    names = sorted(type_name(each) for each in legal if (each in kinds) is message)
    what = "message" if message else "event"
    return OutOfOrder(what, type_name(found), " or ".join(names) or "none", fault)
