"""Which released model a job ends with, and whether training is over: judged by every site from the same integers.

The metric sums that ride in a round are of the model that the round starts from, so a model is judged by the release
after its own; the last one by the metrics-only round. Early stopping (Prechelt 1998, doi:10.1007/3-540-49430-8_3)
and going back to the best model are functions of the state and of these sums. So no site decides: the state that all
sign has the decision in it, and a simulation decides alike.

Invariant: values are compared as whole millionths, so that the last bit of a division decides nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fedcore.learning.metrics import METRICS
from fedcore.learning.optimisers import ServerState
from fedcore.secagg.judge_plan import JudgePlan
from fedcore.secagg.plan import METRIC
from fedcore.types import Json, WideVector

MILLIONTHS = 10**6

PATIENCE, VETO = "patience", "veto"
OVER = {
    PATIENCE: "the model did not become better for as many rounds as round.patience",
    VETO: "a model was worse than the best one by more than round.veto, and was not adopted",
}
"""Why training is over, in words."""


@dataclass(frozen=True)
class Judgement:
    """What a job's state has of it.

    round: of the best model so far, 0 for the one that the job begins with; value: its metric in millionths, greater
    being better; None before the first. parameters: its coordinates, (d,) float64; None where the job never goes back.
    latest: the round of the last model that was judged, -1 before. over: why training is over, "" while it is not.
    """

    round: int = 0
    value: int | None = None
    parameters: WideVector | None = None
    latest: int = -1
    over: str = ""

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the best model's coordinates, hex; "" for none."""
        if self.parameters is None:
            return ""
        return hashlib.sha256(self.parameters.astype("<f8").tobytes()).hexdigest()

    def about(self) -> Json:
        """All of it but the coordinates, of which the digest stands there."""
        return {
            "round": self.round, "value": self.value, "latest": self.latest, "over": self.over,
            "parameters": self.digest,
        }  # fmt: skip

    @classmethod
    def from_about(cls, about: Json, parameters: WideVector | None) -> Judgement:
        """The inverse of `about`. Raises KeyError, TypeError and ValueError, also for other coordinates."""
        value = about["value"]
        found = cls(
            int(about["round"]), None if value is None else int(value), parameters,
            int(about["latest"]), str(about["over"]),
        )  # fmt: skip
        if found.digest != about["parameters"]:
            raise ValueError("coordinates of another model")
        return found


def value_of(plan: JudgePlan, wides: Mapping[str, Sequence[int]]) -> int | None:
    """A sum's value of the plan's metric in millionths, greater being better; None where it is undefined, as in a round
    without metrics."""
    metric = METRICS[plan.metric]
    found = metric.finish(np.asarray(wides[METRIC + plan.metric], dtype=np.int64))
    if found is None:
        return None
    return round((found if metric.higher_is_better else -found) * MILLIONTHS)


def judged(
    plan: JudgePlan,
    before: Judgement,
    model: ServerState,
    round_: int,
    wides: Mapping[str, Sequence[int]],
) -> Judgement:
    """The judgement after a release with the metric sums of `model`, which the training round `round_` led to."""
    value = value_of(plan, wides)
    best, now = before.value, replace(before, latest=round_)
    if value is not None and (best is None or value > best):
        parameters = model.parameters if plan.goes_back else None
        return replace(now, round=round_, value=value, parameters=parameters)
    worse = None if value is None or best is None else best - value
    if plan.veto is not None and worse is not None and worse > round(plan.veto * MILLIONTHS):
        return replace(now, over=VETO)
    if plan.patience is not None and round_ - before.round >= plan.patience:
        return replace(now, over=PATIENCE)
    return now


def kept_model(plan: JudgePlan, found: Judgement, after: ServerState, *, last: bool) -> ServerState:
    """The server state that a release leads to: `after`, or at the end the best model. last: there is no further
    round."""
    back = found.over == VETO or (plan.best and (last or bool(found.over)))
    if not back or found.parameters is None:
        return after
    return replace(after, parameters=found.parameters)
