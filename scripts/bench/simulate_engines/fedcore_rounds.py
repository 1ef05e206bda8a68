"""Rounds of Fedcore's simulation (`Federation.advance`).

A round has the guards of the cohort's sites, their training, quantising to 24 bits, the sum, the step of the server and
the score of the model before on the cohort's test rows, of which each client has one here (the fewest there may be).
It is without what `fedcore simulate` does after each round: scores at all sites, the row of the log, the checkpoint.
"""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Any

import numpy as np
import torch
from common import BATCH, COHORT, MOST, STEP, Work, make_clients
from driver import Driver

import fedcore
from fedcore.experiment.loop import Experiment
from fedcore.experiment.prepare import job_for, prepare
from fedcore.learning.device import repeatable
from fedcore.learning.model import single_thread
from fedcore.learning.training import epoch_order

BITS = 24
"""Quantised bits of a coordinate, the most there are, so that rounding is far below what is compared."""

RANGE = 0.5


def write_schedule(work: Work, federation: Any) -> None:
    """Cohorts and orders of rows as this run draws them, for the other engines."""
    cohorts = np.array([federation.cohort(k + 1) for k in range(work.rounds)])
    orders = np.full((work.rounds, COHORT, MOST), -1, dtype=np.int64)
    for k, cohort in enumerate(cohorts):
        for place, index in enumerate(cohort):
            site = federation.sites[index].site
            found = epoch_order(len(site.train), (work.seed, k + 1, site.id), 0)
            orders[k, place, : len(found)] = found
    initial = federation.state.server.model
    np.savez(work.schedule_path, initial=initial, cohorts=cohorts, orders=orders)


def main() -> None:
    """Run the rounds that the benchmark asks for."""
    work, driver = Work.given(sys.argv[1]), Driver()
    clients = make_clients(work.workload, work.seed)
    task = fedcore.Task(
        name=work.workload,
        data=lambda index: (clients[index], tuple(part[:1] for part in clients[index])),
        model=work.of.model,
        loss=torch.nn.CrossEntropyLoss(),
        sites={f"site-{k:04d}": k for k in range(len(clients))},
    )
    settings = {
        "seed": work.seed, "protection": "plain", "executor": work.options["executor"], "arms": ["federated"],
        "rounds": work.rounds, "cohort": COHORT, "epochs": 1, "batch_size": BATCH, "lr": work.of.lr,
        "optimiser": "sgd", "server": "fedavg", "bits": BITS, "range": RANGE, "max_examples": 32 * STEP,
    }  # fmt: skip
    with single_thread(), repeatable():
        prepared = prepare(*job_for(task, settings))
        federation = prepared.federation
        workers = work.options["processes"]
        if workers > 1:
            federation.use_workers(workers)
        with closing(federation):
            Experiment(prepared)  # which gives the sites their guards
            if work.options["writes_schedule"]:
                write_schedule(work, federation)
            driver.say(
                parameters=prepared.plan.parameters,
                versions={"fedcore": fedcore.__version__, "torch": torch.__version__},
                about=federation.about_executor or {"name": "sequential"},
            )
            for _ in driver.rounds(lambda: federation.state.server.model):
                purpose = federation.purpose
                while purpose is not None and not purpose.trains:  # of the first round
                    federation.advance()
                    purpose = federation.purpose
                federation.advance()


main()
