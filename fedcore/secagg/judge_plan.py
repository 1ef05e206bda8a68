"""By what a job judges the models that its rounds release: one metric of the sums that travel anyway.

A coordinator needs to know that there is a judgement, and never what it is: the sites judge
(`learning/judging.py`), each by the same integers, and say when training is over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from fedcore.errors import BadInput

if TYPE_CHECKING:
    from fedcore.secagg.plan import Wide

OWN_BITS = 64
"""Of the two sums of a metric that a task's own `evaluate` computes."""


@dataclass(frozen=True)
class JudgePlan:
    """metric: by which a released model is judged. best: whether the job ends with its best model, else with its last.

    patience: training is over when so many models in a row were no better than the best before; None: never. veto:
    training is over, and the best model is the job's, when a model is worse than that by more than this; None: never.
    """

    metric: str
    best: bool = False
    patience: int | None = None
    veto: float | None = None

    @property
    def ends(self) -> bool:
        """Whether training may end before its last round."""
        return self.patience is not None or self.veto is not None

    @property
    def goes_back(self) -> bool:
        """Whether the job may end with another model than its last one."""
        return self.best or self.veto is not None


class JudgeSettings(Protocol):
    """What [round] of a job has of it."""

    @property
    def judge(self) -> str: ...
    @property
    def keep(self) -> str | None: ...
    @property
    def patience(self) -> int | None: ...
    @property
    def veto(self) -> float | None: ...


def refuse_judge(settings: JudgeSettings, validate: float | None) -> None:
    """Raise BadInput for settings of [round] that say twice, or not at all, on which rows a round is judged."""
    if is_judged(settings):
        if validate is not None:
            raise BadInput(
                f"round.validate: found {validate:g} with round.judge 'released', expected one of them: the released "
                "metrics are of the sites' test rows",
                remedy="leave judge out: the rows kept apart then judge a simulation's rounds",
            )
        if settings.keep != "best" and settings.patience is None and settings.veto is None:
            raise BadInput(
                "round.judge: found 'released' without round.keep, round.patience and round.veto, expected one of them",
                remedy='keep = "best", patience = 10 or veto = 0.05',
            )
        return
    for key, value in (("keep", settings.keep), ("patience", settings.patience)):
        if value not in (None, "last") and validate is None:
            raise BadInput(
                f"round.{key}: found {value!r} without round.validate, expected rows to judge a round by",
                remedy="--validate 0.2 keeps a fifth of each site's training rows apart for it; or --judge released, "
                "which goes by the sums of metrics that travel anyway",
            )
    if settings.veto is not None:
        raise BadInput(
            f"round.veto: found {settings.veto:g} with round.judge 'validation', expected 'released': a veto is by the "
            "released metrics",
            remedy='judge = "released"',
        )


def is_judged(settings: JudgeSettings) -> bool:
    """Whether released models are judged, by the metrics that ride in every round."""
    return settings.judge == "released"


def ends_early(settings: JudgeSettings) -> bool:
    """Whether training of a job may end before its last round, by the released metrics."""
    asked = settings.patience is not None or settings.veto is not None
    return is_judged(settings) and asked


def judge_plan(settings: JudgeSettings, sums: Sequence[Wide]) -> JudgePlan | None:
    """What a plan states of it; None where nobody judges. sums: of the task's metrics. Raises BadInput where the task
    computes these itself."""
    if not is_judged(settings):
        return None
    metrics = [name for wide in sums if (name := wide.metric)]
    if not metrics or any(wide.count == 2 and wide.bits == OWN_BITS for wide in sums):
        raise BadInput(
            "round.judge: found 'released' for a task that computes its metrics itself (`evaluate`), expected one with "
            "a built-in metric: of others nobody knows whether more is better",
            remedy="name a built-in metric in the task (docs/tasks.md#metrics), or use `validate` in a simulation",
        )
    metric = min(metrics, key=lambda name: name != "auc")
    return JudgePlan(metric, settings.keep == "best", settings.patience, settings.veto)
