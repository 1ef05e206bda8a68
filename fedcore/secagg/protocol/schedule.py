"""The course of a job: which vectors its rounds carry, in which order.

Both roles follow it: the coordinator to announce the next round, a site to refuse one that is out of
order, repeats a purpose that was released, or goes back. Invariant: no two released rounds of a job
stand for the same step, so a site's rows enter each kind of sum once.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedcore.errors import HeaderRefused
from fedcore.secagg.plan import RoundHeader, RoundPlan
from fedcore.secagg.protocol.messages import COORDINATOR
from fedcore.secagg.protocol.wire_form import record

PURPOSES = ("statistics", "range", "update", "metrics")
"""What a round's vector may hold, in the order in which a job comes to it."""


@record("Step")
@dataclass(frozen=True)
class PlannedRound:
    """One round to come. training_round: 0 before the first, rounds + 1 for the metrics-only one."""

    purpose: str
    training_round: int


def first_step(plan: RoundPlan, features: int) -> PlannedRound:
    """Statistics where columns are standardised, then the range unless the plan states it."""
    if features:
        return PlannedRound("statistics", 0)
    return _after_statistics(plan)


def _after_statistics(plan: RoundPlan) -> PlannedRound:
    return PlannedRound("range", 0) if plan.range.start is None else PlannedRound("update", 1)


def step_after(plan: RoundPlan, step: PlannedRound, *, released: bool) -> PlannedRound | None:
    """The next step, or None at the end.

    Without statistics or a range nothing can follow, so these are tried again; a round of training that
    was abandoned has used its number up, as in `simulate`; the metrics-only round is tried once.
    """
    match step.purpose:
        case "statistics":
            return _after_statistics(plan) if released else step
        case "range":
            return PlannedRound("update", 1) if released else step
        case "update":
            last = step.training_round == plan.rounds
            number = step.training_round + 1
            return PlannedRound("metrics", number) if last else PlannedRound("update", number)
    return None


def is_last_model(plan: RoundPlan, done: PlannedRound) -> bool:
    """Whether the model that this step's release leads to, or measures, is the job's last one."""
    return done in (PlannedRound("update", plan.rounds), PlannedRound("metrics", plan.rounds + 1))


def check_step(
    plan: RoundPlan, features: int, done: PlannedRound | None, header: RoundHeader
) -> None:
    """A site's view: the announced step comes after the last one released here. Raises HeaderRefused.

    done: None before the first release. Rounds of training may have been abandoned without this site.
    """
    found = PlannedRound(header.purpose, header.training_round)
    expected = first_step(plan, features)
    if done is not None:
        after = step_after(plan, done, released=True)
        if after is None:
            raise HeaderRefused(
                "step", found=_name(found), expected="none: the job is done", fault=COORDINATOR
            )
        expected = after
    trained = 0 if done is None or done.purpose != "update" else done.training_round
    later = expected.purpose in {"update", "metrics"} and (
        (found.purpose == "update" and trained < found.training_round <= plan.rounds)
        or found == PlannedRound("metrics", plan.rounds + 1)
    )
    if found != expected and not later:
        raise HeaderRefused("step", found=_name(found), expected=_name(expected), fault=COORDINATOR)


def _name(step: PlannedRound) -> str:
    return f"{step.purpose} (round {step.training_round})"
