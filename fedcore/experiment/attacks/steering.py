"""Sites that lie to steer the common model into a question about single rows, and read the answers.

With nearly all weight on one feature, and the bias so that the model's boundary lies at a threshold, the
rows beyond the threshold are the ones that the model gets wrong. Their gradients are what the others' sum
consists of, so the difference of two sums at two thresholds is the rows in between: where that is one row,
it is one patient. Everything but the lying sites is the real simulation with the real protocol. The question is about
the ages of the patients of the built-in task `heart`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from itertools import pairwise

import numpy as np

from fedcore.config import Job
from fedcore.errors import GuardTripped, PeerRefused
from fedcore.experiment.loop import Experiment
from fedcore.experiment.prepare import Prepared, prepare
from fedcore.learning.data.rows import ArrayRows, Rows
from fedcore.learning.guard import Guard
from fedcore.learning.optimisers import ServerState
from fedcore.learning.site import SiteTrainer
from fedcore.learning.state import JobState
from fedcore.learning.task import Task
from fedcore.secagg.encode.quantise import dequantise
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.secagg.summing import ProtectedTotal
from fedcore.types import Contribution, WideVector

OLDEST = 77
"""Years of the oldest patient of the four hospitals; every age from 28 on occurs."""

THRESHOLDS = (78.0, 76.5, 75.5, 74.5, 73.5)
"""Years. Between each two there is at most one patient outside the lying site."""

PER_YEAR = 6.4
"""Logits that a patient's age moves the steered model by."""

_CLOSE = 0.35
"""A row is read where every input is off by less: of 0 or 1 that is right, of a standardised number close."""


@dataclass
class Steering:
    """What the lying sites want and find.

    liars: roster indices. range_wanted: they say that they exceed the range as long as it is smaller.
    beyond: how far above the range their fields go, in ranges. per_year: how sharp the question is.
    at_calibration: they lie about how large updates are. What they find: used: rounds; tripped, refused: why it ended,
    if not for them; ranges: of each round; answers: {threshold: gradients of the others' rows}.
    """

    liars: tuple[int, ...] = (3,)
    range_wanted: float = 1e9
    beyond: float = 1.0
    per_year: float = PER_YEAR
    at_calibration: bool = False
    rounds: int = 80
    tripped: GuardTripped | None = None
    refused: PeerRefused | None = None
    used: int = 0
    ranges: list[float] = field(default_factory=list)
    answers: dict[float, list[WideVector]] = field(default_factory=dict)
    read: list[bool] = field(default_factory=list)
    """Of each patient that two answered thresholds isolate: whether all of its row was read."""
    others_like: list[float] = field(default_factory=list)
    """Of each such patient: the share of all other patients that what was read fits as well."""


def steer(task: Task, job: Job, asked: Steering, *, guarded: bool = True) -> Steering:
    """Run the federation with these liars in it; fills `asked`. guarded: the honest sites' guards judge."""
    prepared = prepare(task, job)
    experiment = Experiment(prepared)
    federation = experiment.federation
    federation.guards = tuple(
        _LiarsGuard.instead_of(guard) if index in asked.liars else guard
        for index, guard in enumerate(federation.guards if guarded else ())
    )
    attack = _Attack(asked, prepared)
    federation.sites = [
        _LyingSite(attack, site) if index in asked.liars else site
        for index, site in enumerate(federation.sites)
    ]
    while federation.purpose is not None and not federation.purpose.trains:
        federation.advance()
    for round_ in range(1, asked.rounds + 1):
        state = federation.state.server
        asked.used = round_
        asked.ranges.append(state.bound)
        attack.aim(state)
        try:
            total = federation.advance().total
        except GuardTripped as tripped:
            asked.tripped = tripped
            break
        except PeerRefused as refused:
            asked.refused = refused
            break
        attack.hear(state, total)
        if len(asked.answers) == len(THRESHOLDS) and attack.done:
            break
    attack.look_up()
    return asked


class _LiarsGuard(Guard):
    """A liar trusts what it steers."""

    @classmethod
    def instead_of(cls, guard: Guard) -> Guard:
        """A liar's guard in place of an honest site's."""
        return cls(**{each.name: getattr(guard, each.name) for each in fields(guard) if each.init})

    def judge(self, state: ServerState, round_: int) -> None:
        """Nothing is judged."""


class _Attack:
    """The liars' arithmetic, from nothing but what they hold: their own vectors, sums and states."""

    def __init__(self, asked: Steering, prepared: Prepared) -> None:
        self.asked, self.prepared, self.plan = asked, prepared, prepared.plan
        self.size = self.plan.parameters
        layout = prepared.federation.sites[0].layout
        assert layout is not None
        self.age = layout.columns.index("age")
        ages = np.unique(np.concatenate([_inputs(s.train)[:, self.age] for s in prepared.sites]))
        self.year = float(np.diff(ages.astype(np.float64)).min())
        self.oldest = float(ages.max())
        self.sharp = asked.per_year / self.year
        self.own = {liar: np.zeros(self.size) for liar in asked.liars}
        self.mine: dict[int, WideVector] = {}
        self.weight = sum(len(s.train) for s in prepared.sites)
        self.others: WideVector = np.zeros(self.size)
        self.at, self.done = 0, False

    def target(self, threshold: float) -> WideVector:
        """The parameters whose boundary is at an age in years."""
        found = np.zeros(self.size)
        found[self.age] = self.sharp
        found[-1] = -self.sharp * self._input(threshold)
        return found

    def _input(self, years: float) -> float:
        return self.oldest + (years - OLDEST) * self.year

    def aim(self, state: ServerState) -> None:
        """What the liars put into the next round's sum."""
        threshold = THRESHOLDS[min(self.at, len(THRESHOLDS) - 1)]
        plan, momentum = self.plan, self.plan.server.momentum
        going = momentum * state.moments["velocity"]
        needed = (
            (self.target(threshold) - state.parameters - going) * self.weight / plan.max_examples
        )
        share = (needed - self.others) / len(self.asked.liars)
        most = state.bound * self.asked.beyond
        for liar in self.asked.liars:
            self.own[liar] = np.clip(share, -most, most)

    def hear(self, state: ServerState, total: ProtectedTotal) -> None:
        """Subtract what the liars sent: the rest is the others' sum at the state it started from."""
        plan, start = self.plan, state.parameters
        opened = dequantise(
            total.opened.coordinates, plan.packing.bits, state.bound, len(total.survivors)
        )
        self.weight = total.opened.wides["weight"][0]
        self.others = opened - sum(self.mine.values())
        weight = self.weight - sum(
            len(self.prepared.sites[liar].train) for liar in self.asked.liars
        )
        gradient = (
            -self.others * plan.max_examples / plan.train.lr
            - plan.train.weight_decay * start * weight
        )
        if self.at == len(THRESHOLDS) or not self._there(start):
            return
        found = self.asked.answers.setdefault(THRESHOLDS[self.at], [])
        found.append(gradient)
        if len(found) >= 2:
            self.at += 1
            self.done = self.at == len(THRESHOLDS)

    def _there(self, start: WideVector) -> bool:
        """Whether the model asks the question that is next."""
        slope = start[self.age]
        if abs(slope - self.sharp) > 0.1 * self.sharp:
            return False
        boundary = -start[-1] / slope
        rest = np.delete(start, [self.age, self.size - 1])
        off = abs(boundary - self._input(THRESHOLDS[self.at])) / self.year
        return bool(off < 0.25 and np.abs(rest).max() < 2)

    def look_up(self) -> None:
        """Compare differences of answers with the rows that are there."""
        sites = [s for s in self.prepared.sites if s.index not in self.asked.liars]
        rows = np.concatenate([np.c_[_inputs(s.train), np.ones(len(s.train))] for s in sites])
        years = OLDEST + (rows[:, self.age] - self.oldest) / self.year
        answered = [t for t in THRESHOLDS if t in self.asked.answers]
        for above, below in pairwise(answered):
            inside = (years > below) & (years <= above)
            if inside.sum() != 1:
                continue
            seen = np.mean(self.asked.answers[below], 0) - np.mean(self.asked.answers[above], 0)
            like = np.abs(seen - rows).max(axis=1) < _CLOSE
            self.asked.read.append(bool(like[inside][0]))
            self.asked.others_like.append(float(like[~inside].mean()))


def _inputs(rows: Rows) -> np.ndarray:
    assert isinstance(rows, ArrayRows)
    return rows.x.numpy()


class _LyingSite(SiteTrainer):
    """Trains nothing and sends what steers; says that it exceeds the range as long as it wants more."""

    own_vectors = True

    def __init__(self, attack: _Attack, honest: SiteTrainer) -> None:
        self.__dict__.update(vars(honest))
        self.attack = attack

    def exceeding(self, plan: RoundPlan, state: JobState) -> Contribution:
        honest = super().exceeding(plan, state)
        if not self.attack.asked.at_calibration:
            return honest
        return honest[0], {"exceeding": [plan.coordinates] * len(honest[1]["exceeding"])}

    def update(self, plan: RoundPlan, step: PlannedRound, state: JobState) -> Contribution:
        self.train(plan, state, step.training_round)
        attack, bits, bound = self.attack, plan.packing.bits, state.server.bound
        levels, offset = (1 << (bits - 1)) - 1, 1 << (bits - 1)
        scaled = attack.own[self.site.index] / bound * levels
        sent = (np.round(scaled) + offset).clip(0, None).astype(np.uint64)
        attack.mine[self.site.index] = dequantise(sent, bits, bound, 1)
        more = bound < attack.asked.range_wanted
        return sent, {
            "weight": [len(self.site.train)],
            "over_range": [plan.coordinates if more else 0],
            "over_half_range": [plan.coordinates],
            "exceeds": [int(more)],
            **self.metric_sums(step, state),
        }
