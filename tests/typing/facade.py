"""What a type checker sees of the public names; scripts/check reads this file and nothing runs it."""

from pathlib import Path
from typing import assert_type

import torch

import fedcore
from fedcore.results import RoundRow, RunResult

task = fedcore.Task(
    name="mine",
    data=lambda source: source,
    model=lambda: torch.nn.Linear(2, 1),
    loss=lambda outputs, targets: (outputs - targets).square().mean(),
)

run = fedcore.simulate(task, {"a": "a.csv", "b": "b.csv", "c": "c.csv"}, rounds=3, lr=0.1)
assert_type(run, fedcore.Run)
assert_type(run.result, RunResult)
assert_type(run.rounds, list[RoundRow])
assert_type(fedcore.compare("heart", seeds=2), fedcore.Comparison)
assert_type(fedcore.load(Path("runs/latest")), fedcore.Run | fedcore.Comparison)

fedcore.simulate("heart", rounds="three")  # pyright: ignore[reportArgumentType]
fedcore.simulate("heart", initial=Path("runs/latest"), proximal_mu=0.1, lr_schedule="cosine")
fedcore.simulate("heart", lr_schedule="cosin")  # pyright: ignore[reportArgumentType]
fedcore.simulate("heart", no_such_setting=1)  # pyright: ignore[reportCallIssue]
