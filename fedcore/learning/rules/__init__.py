"""The rules of each algorithm: what a site computes in a round, what it keeps, and the server step.

Read `parts.py` first. What both roles must know of an algorithm without its rules is in `secagg/algorithms.py`.
"""

from __future__ import annotations

from fedcore.learning.rules import averaging, control_variates, feddyn, personal
from fedcore.learning.rules.parts import Rules
from fedcore.secagg.algorithms import algorithm_of
from fedcore.secagg.plan import TrainPlan

RULES: dict[str, Rules] = {
    "averaging": averaging.RULES,
    "scaffold": control_variates.RULES,
    "feddyn": feddyn.RULES,
    "ditto": personal.DITTO,
}
"""{name: rules}, for every name of `secagg/algorithms.py`."""


def rules_of(plan: TrainPlan) -> Rules:
    """Those of a plan's algorithm. Raises UnknownName and PlanRefused as `algorithm_of`."""
    return personal.LAYERS if plan.local_parameters else RULES[algorithm_of(plan.algorithm).name]
