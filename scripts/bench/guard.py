"""What honest training looks like to the guard: 25 splits each of heart, digits, and digits that Dirichlet(0.1)
deals to ten sites. Prints, for each, the largest loss over the best so far at any site, the strikes, and the
runs that a guard ended. `scripts/bench/guard [SEEDS [FOLDS]]`; about five minutes for 5 and 5.
"""

from __future__ import annotations

import os
import sys
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
from numpy.typing import NDArray

from fedcore.errors import GuardTripped
from fedcore.experiment.loop import Experiment
from fedcore.experiment.prepare import job_for, prepare
from fedcore.learning.guard import GuardMemory, GuardRules
from fedcore.learning.scoring import training_loss

CASES = {
    "heart": {"task": "heart"},
    "digits": {"task": "digits"},
    "digits, Dirichlet(0.1), 10 sites": {
        "task": "digits", "sites": {"n": 10, "by": "dirichlet", "alpha": 0.1},
    },
}  # fmt: skip


def losses(settings: dict[str, Any]) -> tuple[NDArray[np.float64], bool]:
    """(rounds + 1, sites): the loss of each released model on each site's training rows; and whether the
    run's own guards ended it."""
    found = prepare(*job_for(None, settings))
    experiment, flat, rows = Experiment(found), found.flat, []

    def look() -> None:
        flat.write(experiment.federated.state.server.model)
        rows.append(
            [
                training_loss(found.task, flat.module, s.train, seed=0, round_=0, site=s.id)
                for s in found.sites
            ]
        )

    look()
    try:
        for _ in experiment.rounds():
            look()
        experiment.federation.judge()
    except GuardTripped:
        return np.array(rows), True
    return np.array(rows), False


def judged(found: NDArray[np.float64]) -> tuple[float, float, int]:
    """Largest loss / best so far, largest in two rounds in a row, and strikes, over all sites."""
    best = np.minimum.accumulate(found, axis=0)[:-1]
    ratio = found[1:] / best
    strikes = sum(
        loss > GuardMemory(first, least).most(GuardRules())
        for first, column, leasts in zip(found[0], found[1:].T, best.T, strict=True)
        for loss, least in zip(column, leasts, strict=True)
    )
    return ratio.max(), np.minimum(ratio[1:], ratio[:-1]).max(), strikes


def main(seeds: int = 5, folds: int = 5) -> None:
    """Every case."""
    torch.set_num_threads(1)
    for name, settings in CASES.items():
        largest, twice, strikes, trips = 0.0, 0.0, 0, 0
        for seed in range(seeds):
            for fold in range(folds):
                sites = (
                    {"sites": {**settings["sites"], "seed": seed}} if "sites" in settings else {}
                )
                found, tripped = losses(
                    {
                        **settings, **sites, "seed": seed, "fold": fold,
                        "protect.protection": "plain", "track.arms": ["federated"],
                    }
                )  # fmt: skip
                once, two, struck = judged(found)
                largest, twice = max(largest, once), max(twice, two)
                strikes, trips = strikes + struck, trips + tripped
        print(
            f"{name}: {seeds * folds} splits; largest loss / best so far {largest:.3f}, two rounds in a row "
            f"{twice:.3f}; strikes {strikes}, trips {trips}",
            flush=True,
        )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
