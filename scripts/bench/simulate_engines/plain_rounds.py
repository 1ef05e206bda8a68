"""The reference: each client trained by a plain loop of torch, the weighted mean in float64. It is not timed."""

from __future__ import annotations

import sys

import numpy as np
import torch
from common import BATCH, Work, make_clients, read_flat, write_flat
from driver import Driver


def main() -> None:
    """Run the rounds that the benchmark asks for."""
    work, driver = Work.given(sys.argv[1]), Driver()
    torch.set_num_threads(1)
    everybody, schedule = make_clients(work.workload, work.seed), work.schedule()
    module, loss_of = work.of.model(), torch.nn.CrossEntropyLoss()
    model = schedule.initial.copy()
    driver.say(parameters=len(model), versions={"torch": torch.__version__}, about={})
    for number, _ in enumerate(driver.rounds(lambda: model), start=1):
        total, rows = np.zeros(len(model)), 0
        for x, y in schedule.clients(everybody, number).values():
            write_flat(module, model)
            for at in range(0, len(x), BATCH):
                module.zero_grad()
                loss_of(module(x[at : at + BATCH]), y[at : at + BATCH]).backward()
                with torch.no_grad():
                    for parameter in module.parameters():
                        assert parameter.grad is not None
                        parameter.sub_(work.of.lr * parameter.grad)
            total += len(x) * (read_flat(module).astype(np.float64) - model)
            rows += len(x)
        model[:] = model + total / rows


main()
