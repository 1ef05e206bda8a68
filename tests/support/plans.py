"""A round plan for tests of something else."""

from __future__ import annotations

from fedcore.secagg.packing import solve_packing
from fedcore.secagg.plan import RangePlan, RoundPlan, ServerPlan, TrainPlan


def round_plan(
    sites,
    protection="masked",
    *,
    cipher="bfv",
    parameters=5,
    bits=16,
    most=0,
    fields=None,
    **changes,
):
    """A plan of 9 rounds without buffers. most: sites that the packing is solved for, their number without
    it; fields: as `solve_packing` takes them; changes: any other field of the plan."""
    values = {
        "task": "t", "task_digest": "0" * 64, "buffer_coordinates": 0, "max_examples": 1 << 19,
        "rounds": 9, "train": TrainPlan(), "server": ServerPlan(), "range": RangePlan(),
    }  # fmt: skip
    return RoundPlan(
        sites=tuple(sites), protection=protection, cipher=cipher, parameters=parameters,
        packing=solve_packing(bits, most or len(sites), protection, fields, cipher=cipher),
        **values | changes,
    )  # fmt: skip
