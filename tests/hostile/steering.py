"""A site that lies to steer the common model into a question about single rows, and reads the answers.

With nearly all weight on one feature, and the bias so that the model's boundary lies at a threshold, the
rows beyond the threshold are the ones that the model gets wrong. Their gradients are what the others' sum
consists of, so the difference of two sums at two thresholds is the rows in between: where that is one row,
it is one patient. Everything but the lying sites is the real simulation with the real protocol.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np

from fedcore.errors import GuardTripped, PeerRefused
from fedcore.experiment.loop import Experiment
from fedcore.experiment.prepare import job_for, prepare
from fedcore.learning.data import heart
from fedcore.learning.site import SiteTrainer
from fedcore.secagg.encode.pack import Layout
from fedcore.secagg.encode.quantise import dequantise
from fedcore.secagg.purposes import PURPOSES

OLDEST = 77
"""Years of the oldest patient of the four hospitals; every age from 28 on occurs."""

THRESHOLDS = (78.0, 76.5, 75.5, 74.5, 73.5)
"""Years. Between each two there is at most one patient outside the lying site."""

PER_YEAR = 6.4
"""Logits that a patient's age moves the steered model by."""


@dataclass
class Steering:
    """What the lying sites want and find.

    liars: roster indices. range_wanted: they say that they exceed the range as long as it is smaller.
    beyond: how far above the range their fields go, in ranges. per_year: how sharp the question is.
    mark_of: a site whose mark they put too. at_calibration: they lie about how large updates are.
    """

    liars: tuple[int, ...] = (3,)
    range_wanted: float = 1e9
    beyond: float = 1.0
    per_year: float = PER_YEAR
    mark_of: int | None = None
    at_calibration: bool = False
    rounds: int = 80
    settings: dict[str, Any] = field(default_factory=dict)
    tripped: GuardTripped | None = None
    refused: PeerRefused | None = None
    used: int = 0
    ranges: list[float] = field(default_factory=list)
    answers: dict[float, list[Any]] = field(default_factory=dict)
    read: list[bool] = field(default_factory=list)
    """Of each patient that two answered thresholds isolate: whether all of its row was read."""


def steer(
    monkeypatch: Any, asked: Steering, *, protection: str = "masked", guarded: bool = True
) -> Steering:
    """Run the federation with these liars in it; fills `asked`."""
    task, job = job_for(
        heart.task,
        {"protect.protection": protection, "round.rounds": asked.rounds,
         "track.arms": ["federated"], **asked.settings},
    )  # fmt: skip
    prepared = prepare(task, job)
    experiment = Experiment(prepared)
    federation, plan = experiment.federation, prepared.plan
    # A liar trusts what it steers.
    federation.guards = tuple(
        guard
        for index, guard in enumerate(federation.guards)
        if guarded and index not in asked.liars
    )
    attack = _Attack(asked, prepared)
    federation.sites = [
        _LyingSite(attack, site) if index in asked.liars else site
        for index, site in enumerate(federation.sites)
    ]
    update = PURPOSES["update"]

    def applied(plan_: Any, state: Any, found: Any) -> Any:
        opened, bound = found.opened, state.server.bound
        attack.total = dequantise(
            opened.coordinates, plan.packing.bits, bound, len(found.survivors)
        )
        attack.weight = opened.wides["weight"][0]
        return update.apply(plan_, state, found)

    real_join = Layout._join

    def join(self: Layout, coordinates: Any, wides: Any, place: int) -> Any:
        """A liar's own program does not refuse fields that are too wide, nor others' marks."""
        within = np.minimum(coordinates, (1 << self.packing.bits) - 1)
        data = real_join(self, within, wides, place)
        if place in asked.liars and self.spec.purpose == "update":
            data[: len(coordinates)] = coordinates
            marks = len(data) - 2 * self.sites
            if asked.mark_of is not None:
                data[marks + asked.mark_of] += np.uint64(1)
        return data

    monkeypatch.setattr(Layout, "_join", join)
    monkeypatch.setitem(PURPOSES, "update", replace(update, apply=applied))
    while not federation.purpose.trains:
        federation.advance()
    for round_ in range(1, asked.rounds + 1):
        state = federation.state.server
        asked.used = round_
        asked.ranges.append(state.bound)
        attack.aim(state)
        try:
            federation.advance()
        except GuardTripped as tripped:
            asked.tripped = tripped
            break
        except PeerRefused as refused:
            asked.refused = refused
            break
        attack.hear(state)
        if len(asked.answers) == len(THRESHOLDS) and attack.done:
            break
    attack.look_up()
    return asked


class _Attack:
    """The liars' arithmetic, from nothing but what they hold: their own vectors, sums and states."""

    def __init__(self, asked: Steering, prepared: Any) -> None:
        self.asked, self.prepared, self.plan = asked, prepared, prepared.plan
        self.size = self.plan.parameters
        names = list(prepared.federation.sites[0].layout.columns)
        self.age = names.index("age")
        ages = np.unique(np.concatenate([s.train.x[:, self.age].numpy() for s in prepared.sites]))
        self.year = float(np.diff(ages.astype(np.float64)).min())
        self.oldest = float(ages.max())
        self.sharp = asked.per_year / self.year
        self.own = {liar: np.zeros(self.size) for liar in asked.liars}
        self.mine: dict[int, Any] = {}
        self.total: Any = np.zeros(self.size)
        self.weight = sum(len(s.train) for s in prepared.sites)
        self.others = np.zeros(self.size)
        self.at, self.done = 0, False

    def target(self, threshold: float) -> Any:
        """The parameters whose boundary is at an age in years."""
        found = np.zeros(self.size)
        found[self.age] = self.sharp
        found[-1] = -self.sharp * self._input(threshold)
        return found

    def _input(self, years: float) -> float:
        return self.oldest + (years - OLDEST) * self.year

    def aim(self, state: Any) -> None:
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

    def hear(self, state: Any) -> None:
        """Subtract what the liars sent: the rest is the others' sum at the state it started from."""
        plan, start = self.plan, state.parameters
        self.others = self.total - sum(self.mine.values())
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

    def _there(self, start: Any) -> bool:
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
        rows = np.concatenate([np.c_[s.train.x.numpy(), np.ones(len(s.train))] for s in sites])
        years = OLDEST + (rows[:, self.age] - self.oldest) / self.year
        answered = [t for t in THRESHOLDS if t in self.asked.answers]
        for above, below in pairwise(answered):
            inside = (years > below) & (years <= above)
            if inside.sum() != 1:
                continue
            seen = np.mean(self.asked.answers[below], 0) - np.mean(self.asked.answers[above], 0)
            self.asked.read.append(bool(np.abs(seen - rows[inside][0]).max() < 0.35))


class _LyingSite(SiteTrainer):
    """Trains nothing and sends what steers; says that it exceeds the range as long as it wants more."""

    def __init__(self, attack: _Attack, honest: SiteTrainer) -> None:
        self.__dict__.update(vars(honest))
        self.attack = attack

    def exceeding(self, plan: Any, state: Any) -> Any:
        honest = super().exceeding(plan, state)
        if not self.attack.asked.at_calibration:
            return honest
        return honest[0], {"exceeding": [plan.coordinates] * len(honest[1]["exceeding"])}

    def update(self, plan: Any, step: Any, state: Any) -> Any:
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
