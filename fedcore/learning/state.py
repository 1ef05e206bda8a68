"""All that a site starts a round from, as one value: statistics, server state, and how far the job is.

Invariant: `canonical` covers all of it, so two sites whose state tags agree train from the same bits and
are at the same step. The byte form is safetensors with plain JSON beside it: nothing in it is code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedcore.errors import BadInput
from fedcore.learning.data.statistics import Column, Statistics
from fedcore.learning.judging import Judgement, judged, kept_model
from fedcore.learning.optimisers import ServerState, init_state
from fedcore.learning.private_scores import without_offset
from fedcore.learning.released import OpenedSum
from fedcore.learning.rules import rules_of
from fedcore.secagg.encode.pack import Opened
from fedcore.secagg.judge_plan import JudgePlan
from fedcore.secagg.plan import RoundPlan, canonical
from fedcore.secagg.protocol.schedule import PlannedRound, released_round
from fedcore.secagg.purposes import purpose_of
from fedcore.types import FloatVector, SiteId

_META, _BEST = "fedcore", "best"


def model_digest(vector: FloatVector) -> str:
    """SHA-256 of a flat model, little-endian float32: a run's and a site's `model_sha256`."""
    return hashlib.sha256(vector.astype("<f4").tobytes()).hexdigest()


def without_metrics(
    plan: RoundPlan, wides: Mapping[str, Sequence[int]]
) -> Mapping[str, Sequence[int]]:
    """A site's wide integers with zeros for its metric sums."""
    metrics = {wide.name for wide in plan.metric_sums}
    return {n: [0] * len(v) if n in metrics else v for n, v in wides.items()}


@dataclass(frozen=True)
class JobState:
    """statistics: None before they are released, or where no column is standardised.

    done: the last released step, None before the first. shown: the survivors of each release whose metric
    sums were not all zero, each set once, in the order of the releases. summed: {site: the last training round whose
    sum it is in}, of an algorithm under which sites keep something (`kept.KeptValues`). judgement: of the models so
    far, in a job that judges them.
    """

    server: ServerState
    statistics: Statistics | None = None
    done: PlannedRound | None = None
    shown: tuple[tuple[SiteId, ...], ...] = ()
    summed: Mapping[SiteId, int] = field(default_factory=dict)
    judgement: Judgement | None = None

    @property
    def over(self) -> str:
        """Why training is over before its last round; "" while it is not."""
        return "" if self.judgement is None else self.judgement.over

    @property
    def at_best(self) -> bool:
        """Whether the model is the best one by the released metrics."""
        best = None if self.judgement is None else self.judgement.parameters
        return best is not None and np.array_equal(self.server.parameters, best)

    @classmethod
    def initial(cls, plan: RoundPlan, model: FloatVector) -> JobState:
        """Before the first round: the model every site makes from the job's seed."""
        start = plan.range.start or 0.0
        server = init_state(model, plan.parameters, plan.server, start)
        own = rules_of(plan.train).init(plan)
        return cls(replace(server, moments={**server.moments, **own}))

    def canonical(self) -> bytes:
        """The bytes that state tag and certificate cover (PROTOCOL S)."""
        return self.server.canonical() + canonical(self._about())

    def _about(self) -> dict[str, object]:
        statistics = self.statistics.to_json() if self.statistics else None
        done = [self.done.purpose, self.done.training_round] if self.done else None
        shown = [list(survivors) for survivors in self.shown]
        summed = {"summed": dict(self.summed)} if self.summed else {}
        judgement = {} if self.judgement is None else {"judgement": self.judgement.about()}
        return {"statistics": statistics, "done": done, "shown": shown, **summed, **judgement}

    def isolates(self, cohort: Sequence[SiteId], least: int) -> bool:
        """Whether metric sums of a cohort, beside those of an earlier release, would be about fewer than
        `least` sites: those in one of the two and not in the other (PROTOCOL H).

        Class counts and other sums that hardly change from round to round would show these sites' share.
        """
        apart = (len(set(cohort) ^ set(survivors)) for survivors in self.shown)
        return any(0 < sites < least for sites in apart)

    def showing(self, plan: RoundPlan, opened: Opened, survivors: Sequence[SiteId]) -> JobState:
        """This state, after a sum with metric sums in it that these sites are in."""
        sums, these = (opened.wides[w.name] for w in plan.metric_sums), tuple(sorted(survivors))
        if these in self.shown or not any(map(any, sums)):
            return self
        return replace(self, shown=(*self.shown, these))

    def after(
        self,
        plan: RoundPlan,
        step: PlannedRound,
        opened: Opened,
        survivors: Sequence[SiteId],
        columns: Sequence[Column] = (),
        *,
        allow_few_sites: bool = False,
    ) -> JobState:
        """The state that the sum of a step's vectors leads to; the arguments are those of `OpenedSum`. Raises
        ImpossibleSum, and Refused for statistics of too few sites."""
        purpose = purpose_of(step.purpose)
        round_ = step.training_round
        opened_sum = OpenedSum(opened, survivors, columns, allow_few_sites, round_)
        moved = replace(purpose.apply(plan, self, opened_sum), done=step)
        if purpose.trains and plan.train.keeps:
            moved = replace(moved, summed={**self.summed, **dict.fromkeys(survivors, round_)})
        if purpose.measures and plan.server.judge is not None:
            sums = without_offset(plan, opened.wides, len(survivors))
            moved = self._judged(plan.server.judge, moved, sums, last=not purpose.trains)
        return moved.showing(plan, opened, survivors) if purpose.measures else moved

    def _judged(
        self, plan: JudgePlan, moved: JobState, sums: Mapping[str, Sequence[int]], *, last: bool
    ) -> JobState:
        """`moved`, with the judgement of this state's model, whose metric sums are in the sum."""
        before, round_ = self.judgement or Judgement(), released_round(self.done)
        found = judged(plan, before, self.server, round_, sums)
        server = kept_model(plan, found, moved.server, last=last)
        return replace(moved, server=server, judgement=found)

    def to_bytes(self) -> bytes:
        """Safetensors: parameters and moments, with the rest as metadata."""
        server = self.server
        tensors = {f"moment.{name}": value for name, value in server.moments.items()}
        best = None if self.judgement is None else self.judgement.parameters
        if best is not None:
            tensors[_BEST] = best
        about = self._about() | {
            "scalars": dict(server.scalars),
            "bound": server.bound,
            "first_bound": server.first_bound,
        }
        # Floats print as their shortest round-trip form, so nothing is lost.
        meta = {_META: json.dumps(about, sort_keys=True, allow_nan=False)}
        return save({"parameters": server.parameters, **tensors}, meta)

    @classmethod
    def from_bytes(cls, data: bytes) -> JobState:
        """The inverse of `to_bytes`. Raises BadInput for anything else."""
        try:
            tensors = load(data)
            length = int.from_bytes(data[:8], "little")
            about = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][_META])
            moments = {
                name.removeprefix("moment."): value.astype(np.float64)
                for name, value in tensors.items()
                if name.startswith("moment.")
            }
            scalars = {str(name): float(value) for name, value in about["scalars"].items()}
            server = ServerState(
                tensors["parameters"].astype(np.float64), moments, scalars,
                float(about["bound"]), float(about["first_bound"]),
            )  # fmt: skip
            statistics, done = about["statistics"], about["done"]
            judgement, best = about.get("judgement"), tensors.get(_BEST)
            return cls(
                server,
                Statistics.from_json(statistics) if statistics else None,
                PlannedRound(str(done[0]), int(done[1])) if done else None,
                tuple(tuple(map(SiteId, survivors)) for survivors in about["shown"]),
                {SiteId(name): int(round_) for name, round_ in about.get("summed", {}).items()},
                None if judgement is None else Judgement.from_about(judgement, best),
            )
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise BadInput("state: found bytes that are no saved state of a job") from error

    @cached_property
    def model_sha256(self) -> str:
        """SHA-256 of the state's model, hex."""
        return model_digest(self.server.model)
