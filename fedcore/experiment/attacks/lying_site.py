"""Two sites that lie, with and without the guard of the others (PROTOCOL G, docs/decisions/0018-the-guard.md)."""

from __future__ import annotations

from collections.abc import Iterator

from fedcore.experiment.attacks.intervals import share_interval
from fedcore.experiment.attacks.scene import Scene
from fedcore.experiment.attacks.steering import Steering, steer
from fedcore.experiment.prepare import job_for
from fedcore.results import AttackRow

NAME, _MEASURE = "lying-site", "isolated patients read whole"

_LIARS = (2, 3)
"""With the rule of the range one liar cannot steer at all (`tests/hostile/test_lying_site_steers.py`)."""

_NOT_SHOWN = (
    "Which softer questions pass the guard is in docs/decisions/0018-the-guard.md; the sums are the same bits under "
    "every protection, so no encryption stops it."
)


def lying_site(scene: Scene) -> Iterator[AttackRow]:
    """Two lying sites ask for the ages of the patients of another hospital."""
    if scene.task.origin != "heart":
        reason = f"carried out on the ages of the patients of task 'heart', found task {scene.task.name!r}"
        yield AttackRow(NAME, "two sites", "the sum", "any", "", 0, _MEASURE, refused=reason)
        return
    # The sums are those of the other protections, bit for bit, and 80 rounds take seconds.
    layer = {"task": "heart", "protect.protection": "plain", "round.rounds": 80,
             "track.arms": ["federated"], "seed": scene.seed}  # fmt: skip
    for guarded in (False, True):
        task, job = job_for(None, layer)
        found = steer(task, job, Steering(liars=_LIARS), guarded=guarded)
        yield row_of(found, guarded=guarded)


def row_of(found: Steering, *, guarded: bool) -> AttackRow:
    """What liars found, as a row."""
    hits, isolated = sum(found.read), len(found.read)
    low, high = share_interval(hits, isolated)
    shows = (
        f"{hits} of {isolated} patients whom two answered questions set apart are read in all inputs, after "
        f"{found.used} rounds."
    )
    if found.tripped is not None:
        answered = f"{len(found.answers)} questions answered"
        shows = f"The job ends after {found.used} rounds, with {answered}: {found.tripped}."
    return AttackRow(
        NAME, "two sites", "the sum", "any", f"guard {'on' if guarded else 'off'}", isolated, _MEASURE,
        hits / isolated if isolated else 0.0, low, high,
        found.others_like[0] if isolated else None, None,
        {"rounds": float(found.used), "questions_answered": float(len(found.answers))}, shows, _NOT_SHOWN,
    )  # fmt: skip
