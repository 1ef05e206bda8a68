"""What is summed in one process, whatever the engine: a round's vectors, their plain twin, and plain adding.

Invariant: the opened sum is compared with the plain integer sum of the survivors' slots, slot for slot,
in every round (`ProtectedTotal.twin`), so "protection costs no accuracy" is measured and never assumed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import starmap

import numpy as np

from fedcore.learning.stopwatch import Stopwatch
from fedcore.secagg.crypto import Sealer
from fedcore.secagg.crypto.plain import PlainFold, PlainSealer
from fedcore.secagg.encode.pack import Layout, Opened
from fedcore.secagg.encode.partial import PartialSum, RunningSum
from fedcore.secagg.plan import RoundPlan, VectorSpec
from fedcore.secagg.protocol.absences import Absences, outcome
from fedcore.secagg.scheme import Masks, vector_bytes
from fedcore.types import Contribution, SiteId, Slots

Contribute = Callable[[Sequence[int]], Iterable[tuple[int, Contribution]]]
"""What the sites with these roster indices put into their vectors, in any order; asked once for each site that
submits."""


Lead = Callable[[Opened, Sequence[SiteId]], bytes]
"""The canonical bytes of the state that an opened sum of these sites leads to."""


AddUp = Callable[[Sequence[int]], Iterable[PartialSum]]
"""The sums of what the sites with these roster indices contribute, some sites each, in any order."""


def one_by_one(contribute: Callable[[int], Contribution]) -> Contribute:
    """`Contribute` of a function of one roster index."""
    return lambda indices: ((index, contribute(index)) for index in indices)


@dataclass
class RoundTrace:
    """What somebody who looks at one round holds of ONE site: filled while the round runs.

    target, other: roster indices of the named site and of the site that looks on.
    slots, other_slots: their packed vectors before any protection. upload: the target's chunks as the
    coordinator gets them. total: the opened sum. masks, other_masks: of their vectors; rebuilt_masks:
    those the coordinator took off the sum; all empty without masks. stream: the target's keystream,
    which every site can make; empty under another cipher.
    """

    target: int
    other: int
    layout: Layout | None = None
    slots: Slots | None = None
    other_slots: Slots | None = None
    upload: list[bytes] = field(default_factory=list)
    total: Slots | None = None
    survivors: tuple[int, ...] = ()
    masks: Masks = ()
    other_masks: Masks = ()
    rebuilt_masks: Masks = ()
    stream: Masks = ()

    def masks_among(self, *known: Masks) -> Masks:
        """The target's masks whose seeds are among these, with the sign they have in its vector."""
        seeds = {seed for masks in known for seed, _ in masks}
        return tuple((seed, sign) for seed, sign in self.masks if seed in seeds)


@dataclass(frozen=True)
class ProtectedTotal:
    """One opened sum. twin is the plain integer sum of the same fields; bytes are per site.

    survivors: roster indices of the sites in the sum, ascending.
    """

    opened: Opened
    twin: Opened
    survivors: tuple[int, ...]
    bytes_up: int
    bytes_down: int


@dataclass
class RoundSum:
    """What one round needs besides the machines: the vectors' layout and content, and what they gave.

    roster: roster indices in the job of the sites that the round is of, ascending: their places in the layout.
    """

    layout: Layout
    contribute: Contribute
    state: bytes
    lead: Lead | None
    watch: Stopwatch
    absences: Absences
    witness: RoundTrace | None
    roster: Sequence[int]
    twin: Slots = field(init=False)
    tag: bytes = b""
    opened: Opened | None = None
    total: Slots | None = None
    led_to: bytes = b""
    bytes_up: int = 0
    bytes_down: int = 0
    failure: Exception | None = None
    marks: dict[int, dict[str, int]] = field(default_factory=dict)
    """{place: {mark: value}} of what each site put into its own places."""

    def __post_init__(self) -> None:
        self.twin = np.zeros(self.layout.slots, dtype=np.uint64)
        self._places = {index: place for place, index in enumerate(self.roster)}

    def place(self, index: int) -> int:
        """The place in the layout of a site, by its roster index."""
        return self._places[index]

    def open(self, total: Slots, opened: Opened, survivors: Sequence[SiteId]) -> None:
        """Keep an opened sum, once `lead` has taken it: where that raises, the next site finds it out too."""
        self.led_to = self.state if self.lead is None else self.lead(opened, survivors)
        self.total, self.opened = total, opened

    def pack(
        self, index: int, content: Contribution, put_tag: Callable[[Slots], None] | None
    ) -> Slots:
        """One site's slots with their tag; its plain slots go into the twin."""
        coordinates, wides = content
        self.marks[index] = self.layout.own_marks(wides)
        with self.watch("encode"):
            slots = self.layout.pack(coordinates, wides, self.place(index))
            self.twin += slots
        if put_tag is not None:
            with self.watch("protect"):
                put_tag(slots)
        if self.witness is not None:
            if index == self.witness.target:
                self.witness.layout, self.witness.slots = self.layout, slots.copy()
            if index == self.witness.other:
                self.witness.other_slots = slots.copy()
        return slots

    def show(self, index: int, chunks: list[bytes], masks: Masks = (), stream: Masks = ()) -> None:
        """Count the bytes of one site's upload; keep chunks and masks of the two sites for a witness."""
        self.bytes_up, trace = sum(map(len, chunks)), self.witness
        if trace is not None and index == trace.target:
            trace.upload, trace.masks, trace.stream = chunks, masks, stream
        if trace is not None and index == trace.other:
            trace.other_masks = masks

    def finish(self, survivors: tuple[int, ...]) -> ProtectedTotal:
        assert self.opened is not None
        assert self.total is not None
        if self.witness is not None:
            self.witness.total, self.witness.survivors = self.total, survivors
        tagged = self.layout.tagged_slots
        same = np.array_equal(self.total[:tagged], self.twin[:tagged])
        places = [*map(self.place, survivors)]
        twin = self.opened if same else self.layout.unpack(self.twin, places)
        return ProtectedTotal(self.opened, twin, survivors, self.bytes_up, self.bytes_down)


class SumEngine(ABC):
    """How the vectors of one step are summed.

    as_planned: whether vectors are protected as the plan has it, so that what each party holds can be measured.
    """

    plan: RoundPlan
    as_planned = True

    @property
    @abstractmethod
    def sealer(self) -> Sealer:
        """A site's sealer, to see what it can open."""

    @abstractmethod
    def sum(
        self,
        spec: VectorSpec,
        training_round: int,
        contribute: Contribute,
        state: bytes,
        watch: Stopwatch,
        *,
        lead: Lead | None = None,
        absences: Absences | None = None,
        witness: RoundTrace | None = None,
        roster: Sequence[int] | None = None,
        add_up: AddUp | None = None,
    ) -> ProtectedTotal:
        """The sum of what the surviving sites contribute, through packing, tag, protection and fold.

        state: canonical bytes of what the vectors started from; it is bound into tag and masks.
        lead: the state that the sum leads to (None: the same one).
        absences: {site: stage} of sites that leave this round; from `unmask` on the round waits for as
        many as it needs, and they come back. roster: roster indices of the round's sites, ascending, where it is not
        of all. add_up: gives the same contributions in sums, for an engine that needs no single vector. Raises
        RoundAbandoned below the threshold, TagRefused or
        ChunkRefused otherwise, and what `lead` raises, with nothing of the sum used.
        """


class VectorEngine(SumEngine):
    """An engine that adds packed vectors, one of each site."""

    def sum(
        self,
        spec: VectorSpec,
        training_round: int,
        contribute: Contribute,
        state: bytes,
        watch: Stopwatch,
        *,
        lead: Lead | None = None,
        absences: Absences | None = None,
        witness: RoundTrace | None = None,
        roster: Sequence[int] | None = None,
        add_up: AddUp | None = None,
    ) -> ProtectedTotal:
        """As `SumEngine.sum`."""
        del add_up
        these = range(len(self.plan.sites)) if roster is None else roster
        layout = Layout(spec, self.plan.packing, len(these))
        current = RoundSum(layout, contribute, state, lead, watch, absences or {}, witness, these)
        return self._total(current, training_round)

    @abstractmethod
    def _total(self, current: RoundSum, training_round: int) -> ProtectedTotal:
        """`sum`, of a round that is laid out."""


class PlainSum(VectorEngine):
    """Ring sums without cryptography, which is all that there is of `plain`: nothing to agree on, nothing to hide; the
    same thresholds by counting."""

    def __init__(self, plan: RoundPlan) -> None:
        self.plan = plan

    @property
    def sealer(self) -> Sealer:
        return PlainSealer(self.plan.packing)

    def _total(self, current: RoundSum, training_round: int) -> ProtectedTotal:  # noqa: ARG002 - no header
        plan, sealer, watch, layout = self.plan, self.sealer, current.watch, current.layout
        left, survivors = _who_stays(plan, current.roster, current.absences)
        fold = PlainFold(plan.packing, layout.slots)
        for index, content in current.contribute(survivors):
            slots = current.pack(index, content, None)
            with watch("protect"):
                chunks = list(sealer.protect(slots))
            with watch("fold"):
                for place, chunk in enumerate(chunks):
                    fold.add(place, chunk)
            current.show(index, chunks)
        with watch("fold"):
            released = list(fold.total())
        current.bytes_up, current.bytes_down = vector_bytes(layout, len(survivors))
        with watch("unprotect"):
            total = sealer.open(released, layout.slots)
            places = [*map(current.place, survivors)]
            current.open(total, layout.unpack(total, places), left)
        return current.finish(survivors)


class ExactSum(SumEngine):
    """The setting `sum = "exact"` of a simulation: the integers of the survivors are added, and neither packed nor
    protected. The sums and the survivors are those of the plan's protocol, bit for bit, and bytes are those of its
    vectors."""

    def __init__(self, plan: RoundPlan) -> None:
        self.plan, self.as_planned = plan, not plan.layers.protects

    @property
    def sealer(self) -> Sealer:
        return PlainSealer(self.plan.packing)

    def sum(
        self,
        spec: VectorSpec,
        training_round: int,
        contribute: Contribute,
        state: bytes,
        watch: Stopwatch,
        *,
        lead: Lead | None = None,
        absences: Absences | None = None,
        witness: RoundTrace | None = None,
        roster: Sequence[int] | None = None,
        add_up: AddUp | None = None,
    ) -> ProtectedTotal:
        """As `SumEngine.sum`. witness: there is nothing to see."""
        del training_round, state, witness
        these = range(len(self.plan.sites)) if roster is None else roster
        layout = Layout(spec, self.plan.packing, len(these))
        places = {index: place for place, index in enumerate(these)}
        left, survivors = _who_stays(self.plan, these, absences or {})
        total = RunningSum(layout)
        parts = (
            add_up(survivors)
            if add_up is not None
            else starmap(PartialSum.of, contribute(survivors))
        )
        for part in parts:
            with watch("fold"):
                total.add(part, [places[index] for index in part.indices])
        opened = total.opened()
        if lead is not None:
            lead(opened, left)
        return ProtectedTotal(opened, opened, survivors, *vector_bytes(layout, len(survivors)))


def _who_stays(
    plan: RoundPlan, roster: Sequence[int], absences: Absences
) -> tuple[Sequence[SiteId], tuple[int, ...]]:
    """Names and roster indices of the sites in a round's sum. Raises RoundAbandoned."""
    of_round = {plan.sites[index]: index for index in roster}
    left = outcome(tuple(of_round), plan.threshold, absences)
    return left, tuple(of_round[site] for site in left)


def sites_of(roster: Sequence[SiteId], survivors: Sequence[int]) -> list[SiteId]:
    """Roster indices to site ids."""
    return [roster[index] for index in survivors]
