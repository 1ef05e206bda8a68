"""The schedule of a job: which vectors its rounds carry, in which order, from its purposes.

Both roles follow it: the coordinator to announce the next round, a site to refuse one that is out of
order, repeats a purpose that was released, or goes back. Invariant: no two released rounds of a job
stand for the same step, so a site's rows enter each kind of sum once.
"""

from collections.abc import Sequence

from fedcore.errors import HeaderRefused
from fedcore.secagg.plan import RoundHeader, RoundPlan
from fedcore.secagg.protocol.messages import COORDINATOR
from fedcore.secagg.protocol.wire_form import record
from fedcore.secagg.purposes import PURPOSES, Purpose, purpose_of, trains


@record("Step")
class PlannedRound:
    """One round to come. training_round: 0 before the first, rounds + 1 for the metrics-only one."""

    purpose: str
    training_round: int


def first_step(plan: RoundPlan, columns: int) -> PlannedRound:
    """The job's first round. columns: how many are standardised by federated statistics."""
    found = _first_of(plan, columns, list(PURPOSES.values()))
    assert found is not None
    return found


def _first_of(plan: RoundPlan, columns: int, purposes: Sequence[Purpose]) -> PlannedRound | None:
    for purpose in purposes:
        for number in purpose.rounds(plan, columns):
            return PlannedRound(purpose.name, number)
    return None


def step_after(
    plan: RoundPlan, columns: int, step: PlannedRound, *, released: bool
) -> PlannedRound | None:
    """The next step, or None at the end.

    Without statistics or a range nothing can follow, so these are tried again; a round of training that
    was abandoned has used its number up, as in `simulate`; the metrics-only round is tried once.
    """
    purpose = purpose_of(step.purpose)
    if purpose.needed and not released:
        return step
    if step.training_round + 1 in purpose.rounds(plan, columns):
        return PlannedRound(purpose.name, step.training_round + 1)
    later = list(PURPOSES.values())
    return _first_of(plan, columns, later[later.index(purpose) + 1 :])


def released_round(done: PlannedRound | None) -> int:
    """The round of training behind a state: 0 before the first, the last one under the last metrics."""
    return max(0, done.training_round - (not trains(done.purpose))) if done is not None else 0


def is_last_model(plan: RoundPlan, done: PlannedRound, *, over: bool = False) -> bool:
    """Whether the model that this step's release leads to, or measures, is the job's last one. over: training ended
    with it."""
    if over:
        return True
    purpose = purpose_of(done.purpose)
    return purpose.measures and done.training_round == plan.rounds + (not purpose.trains)


def check_step(
    plan: RoundPlan,
    columns: int,
    done: PlannedRound | None,
    header: RoundHeader,
    *,
    over: bool = False,
) -> None:
    """A site's view: the announced step comes after the last one released here. Raises HeaderRefused.

    done: None before the first release. over: no step comes after it. Rounds that are not needed may have been
    abandoned without this site.
    """
    found = PlannedRound(header.purpose, header.training_round)
    expected = step_after(plan, columns, done, released=True) if done else first_step(plan, columns)
    if expected is None or over:
        raise HeaderRefused("step", _name(found), "none: the job is done", COORDINATOR)
    step: PlannedRound | None = expected
    while step is not None and step != found:
        needed = purpose_of(step.purpose).needed
        step = None if needed else step_after(plan, columns, step, released=False)
    if step is None:
        raise HeaderRefused("step", _name(found), _name(expected), COORDINATOR)


def _name(step: PlannedRound) -> str:
    return f"{step.purpose} (round {step.training_round})"
