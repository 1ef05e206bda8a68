"""The attack of lying sites (`fedcore/experiment/attacks/steering.py`) with what only a changed program sends.

Fields above the range, and the mark of another site: the liars' own packing does not refuse them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedcore.experiment.attacks import steering
from fedcore.experiment.prepare import job_for
from fedcore.learning.data import heart
from fedcore.secagg.encode.pack import Layout


@dataclass
class Steering(steering.Steering):
    """mark_of: a site whose mark they put too. settings: of the job."""

    mark_of: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)


def steer(
    monkeypatch: Any, asked: Steering, *, protection: str = "masked", guarded: bool = True
) -> Steering:
    """Run the federation with these liars in it; fills `asked`."""
    task, job = job_for(
        heart.task,
        {"protect.protection": protection, "round.rounds": asked.rounds,
         "track.arms": ["federated"], **asked.settings},
    )  # fmt: skip
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
    steering.steer(task, job, asked, guarded=guarded)
    return asked
