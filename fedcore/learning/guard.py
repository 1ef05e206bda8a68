"""A site's guard against a model that no honest federation would have released (PROTOCOL G).

One dishonest site can steer the common model so that the sums reveal single rows of the others. Such a model
is far from what was learnt, so every site judges each released model before it contributes again: by its
loss on the site's own training rows, by whether it is finite, and by how far it moved. A site whose guard
trips leaves the job.

Invariant: what is judged is a function of the site's rows, the plan and the released states; a state is
judged once, so an abandoned round is no second strike. Nothing here changes a model or draws from a
random stream that training uses. The bounds it keeps and what it does not stop:
docs/decisions/0018-the-guard.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from fedcore.errors import GuardTripped
from fedcore.learning.optimisers import ServerState
from fedcore.learning.released import largest_move
from fedcore.results.json_record import JsonRecord
from fedcore.secagg.algorithms import algorithm_of
from fedcore.secagg.plan import RoundPlan
from fedcore.types import FloatVector, SiteId, WideVector

if TYPE_CHECKING:  # a site's session reads the rules and the memory here, and never needs torch
    from fedcore.learning.data.rows import Rows
    from fedcore.learning.model import FlatModel
    from fedcore.learning.task import Task

_LOSS = "the loss on its own training rows"

FLOOR = 0.5
"""Share of the untrained model's loss below which no loss is a strike, times the factor. Without it the
factor asks more of a model the better it is: digits dealt out by Dirichlet(0.1), trained with a rate ten
times the default, swing by 3 times a loss that is a tenth of the first one."""

AT_ONCE = 4.0
"""How many times as far above the best loss as a first strike is ends the job without a second one. A model
that asks for one row is far above that (docs/decisions/0018-the-guard.md), and one answer may be enough."""


@dataclass(frozen=True)
class GuardRules:
    """A site's own thresholds (`[policy]` of site.toml): it leaves after `rounds` releases in a row whose
    loss exceeds `loss_factor` times the best so far."""

    loss_factor: float = 1.5
    rounds: int = 2


@dataclass(frozen=True)
class GuardMemory(JsonRecord):
    """What a site remembers of the models it judged; it outlasts the process.

    first, best: losses of the untrained model and the smallest so far; None before the first judgement,
    or of a task without a loss. strikes: releases in a row above the threshold. judged: training round of
    the last release judged, -1 before.
    """

    first: float | None = None
    best: float | None = None
    strikes: int = 0
    judged: int = -1

    def most(self, rules: GuardRules) -> float:
        """The largest loss that is no strike: factor times the best one, or what FLOOR allows. A best loss
        below 0, as a density's may be, allows as much above it as its size would."""
        if self.best is None or self.first is None:
            return math.inf
        above_best = self.best + (rules.loss_factor - 1.0) * abs(self.best)
        if self.best == 0.0 >= self.first:
            return math.inf  # nothing to measure a rise by
        floor = rules.loss_factor * FLOOR * self.first if self.first > 0 else -math.inf
        return max(above_best, floor)


@dataclass
class GuardRecord:
    """A site's thresholds and memory in one job, passed to the process that computes its vectors, which replaces
    the memory. kept: what the site keeps from round to round, replaced likewise: of an algorithm
    (`kept.KeptValues`), or of a task that is an app."""

    rules: GuardRules = field(default_factory=GuardRules)
    memory: GuardMemory = field(default_factory=GuardMemory)
    kept: bytes = b""


@dataclass
class Guard:
    """One site's guard in one job.

    rows: the site's training rows as inputs. initial: (d,) float32, the model that the job begins with; where it
    was trained before, its loss is held against that of `flat.untrained`, as the losses after it are.
    anchor: (training round, parameters) of the last state judged in this process. local: of the model here, what
    stays at the site; None for the seed's.
    """

    task: Task
    plan: RoundPlan
    site: SiteId
    rows: Rows
    flat: FlatModel
    initial: FloatVector
    seed: int
    rules: GuardRules = field(default_factory=GuardRules)
    memory: GuardMemory = field(default_factory=GuardMemory)
    anchor: tuple[int, WideVector] | None = None
    local: FloatVector | None = None
    _found: str = field(default="", init=False, repr=False)

    def judge(self, state: ServerState, round_: int) -> None:
        """Judge the state that the release of a training round led to; 0: the one the job begins with. Raises
        GuardTripped, and again on every later call, by the memory."""
        if round_ <= self.memory.judged:
            if self.memory.strikes >= self.rules.rounds:
                raise self._tripped(round_, self._too_high(), "")
            return
        from fedcore.learning.scoring import has_loss

        self._check_moved(state, round_)
        if has_loss(self.task):
            self._check_loss(state, round_)
        self.memory = replace(self.memory, judged=round_)
        if self.memory.strikes >= self.rules.rounds:
            raise self._tripped(round_, self._too_high(), self._found)

    def _too_high(self) -> str:
        times = f"for {self.rules.rounds} rounds in a row" if self.rules.rounds > 1 else "once"
        return f"{_LOSS} exceeded {self.rules.loss_factor:g} times the best so far {times}"

    def _check_loss(self, state: ServerState, round_: int) -> None:
        memory = self.memory
        if memory.first is None:
            first = self._loss(self.initial, 0)
            memory = replace(memory, first=first, best=first)
            if self.flat.untrained is not None:
                memory = replace(memory, first=max(first, self._loss(self.flat.untrained, 0)))
        loss = memory.best if round_ == 0 else self._loss(state.model, round_)
        assert loss is not None
        assert memory.best is not None
        if not (math.isfinite(loss) and math.isfinite(memory.best)):
            raise self._tripped(round_, f"{_LOSS} is not finite", "")
        most = memory.most(self.rules)
        strikes = memory.strikes + 1 if loss > most else 0
        self._found = f"{loss:.4g}, above {most:.4g}; best {memory.best:.4g}"
        if loss > memory.best + AT_ONCE * (most - memory.best):
            self.memory = replace(memory, strikes=self.rules.rounds, judged=round_)
            raise self._tripped(round_, f"{_LOSS} rose far above the best so far", self._found)
        self.memory = replace(memory, best=min(memory.best, loss), strikes=strikes)

    def _loss(self, model: FloatVector, round_: int) -> float:
        """Mean loss of a model on this site's training rows."""
        from fedcore.learning.scoring import training_loss

        self.flat.write(model, self.local)
        return training_loss(
            self.task, self.flat.module, self.rows, seed=self.seed, round_=round_, site=self.site
        )

    def _check_moved(self, state: ServerState, round_: int) -> None:
        """No coordinate moved further than the steps since the last judged state allow."""
        if not np.isfinite(state.parameters).all():
            raise self._tripped(round_, "the model is not finite", "")
        before, start = self.anchor or (0, self.initial.astype(np.float64))
        steps, moved = round_ - before, np.abs(state.parameters - start)
        for part, most, name in zip(
            (moved[: self.plan.parameters], moved[self.plan.parameters :]),
            largest_move(self.plan, state.first_bound),
            ("parameter", "buffer"),
            strict=True,
        ):
            # Rounding of so many sums of float64 is far below one part in a thousand million.
            allowed, largest = steps * most * (1 + 1e-9), float(part.max(initial=0.0))
            if largest > allowed:
                raise self._tripped(
                    round_, f"a {name} moved further than {steps} steps of the plan's range allow",
                    f"{largest:.4g}, above {allowed:.4g}",
                )  # fmt: skip
        self.anchor = round_, state.parameters

    def _tripped(self, round_: int, cause: str, found: str) -> GuardTripped:
        calmer = algorithm_of(self.plan.train.algorithm).calmer
        return GuardTripped((self.site,), round_, cause, found=found, calmer=calmer)


def judge_all(guards: Sequence[Guard], state: ServerState, round_: int) -> None:
    """Every site of a simulation judges a state. Raises one GuardTripped that names all that leave."""
    tripped = []
    for guard in guards:
        try:
            guard.judge(state, round_)
        except GuardTripped as error:
            tripped.append(error)
    if tripped:
        sites, first = tuple(site for error in tripped for site in error.sites), tripped[0]
        raise GuardTripped(sites, round_, first.cause, found=first.found, calmer=first.calmer)
