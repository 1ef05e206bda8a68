"""What every engine of `fedcore bench simulate` has in common: clients, models and the schedule.

Runs in the environment of each engine, so it needs numpy and torch only.

Invariant: clients, initial model, cohort of a round and order of a client's rows are equal for all engines.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CLIENTS, COHORT, BATCH = 1000, 100, 10

FEWEST, MOST, STEP = 30, 70, 5
"""Rows of a client, drawn uniformly: 50 on average, and for half of them the last batch is short. They are multiples of
5, because Fedcore rounds weights to 32 steps, here of 5: so its weighted mean is that of the others."""

CLASSES = 10


def logreg() -> nn.Module:
    """650 parameters."""
    return nn.Linear(64, CLASSES)


def mlp() -> nn.Module:
    """50,826 parameters."""
    return nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, CLASSES)
    )


def cnn() -> nn.Module:
    """147,146 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, CLASSES),
    )  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """model: makes the module; shape: of one row; lr: of the clients' SGD."""

    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    lr: float


WORKLOADS = {
    "logreg": Workload(logreg, (64,), 0.1),
    "mlp": Workload(mlp, (64,), 0.05),
    "cnn": Workload(cnn, (1, 28, 28), 0.02),
}

Client = tuple[Tensor, Tensor]
"""(rows, ...) float32 and (rows,) int64."""


def make_clients(workload: str, seed: int) -> list[Client]:
    """Rows of standard normal numbers, labelled by a random linear model."""
    random = np.random.default_rng(seed)
    shape = WORKLOADS[workload].shape
    truth = random.standard_normal((int(np.prod(shape)), CLASSES), dtype=np.float32)
    found = []
    for rows in random.integers(FEWEST // STEP, MOST // STEP + 1, CLIENTS) * STEP:
        x = random.standard_normal((rows, *shape), dtype=np.float32)
        y = (x.reshape(rows, -1) @ truth).argmax(axis=1)
        found.append((torch.from_numpy(x), torch.from_numpy(y)))
    return found


def parameters_of(module: nn.Module) -> list[Tensor]:
    """Its parameters, without their gradients."""
    return [parameter.data for parameter in module.parameters()]


def read_flat(module: nn.Module) -> np.ndarray:
    """(d,) float32 in the order of `parameters()`."""
    return torch.cat([each.reshape(-1) for each in parameters_of(module)]).numpy().copy()


def write_flat(module: nn.Module, flat: np.ndarray) -> None:
    """The inverse of `read_flat`."""
    parts = torch.split(torch.from_numpy(flat), [each.numel() for each in parameters_of(module)])
    for each, part in zip(parameters_of(module), parts, strict=True):
        each.copy_(part.view_as(each))


@dataclass(frozen=True)
class Work:
    """One engine's task, from the JSON in the first argument. folder: of the benchmark; rounds: the most that are
    asked for; options: of this engine."""

    workload: str
    seed: int
    rounds: int
    folder: Path
    options: dict[str, Any]

    @classmethod
    def given(cls, text: str) -> Work:
        found = json.loads(text)
        return cls(**found | {"folder": Path(found["folder"])})

    @property
    def of(self) -> Workload:
        return WORKLOADS[self.workload]

    @property
    def schedule_path(self) -> Path:
        return self.folder / f"{self.workload}-schedule.npz"

    def schedule(self) -> Schedule:
        with np.load(self.schedule_path) as found:
            return Schedule(found["initial"], found["cohorts"], found["orders"])


@dataclass(frozen=True)
class Schedule:
    """initial: (d,) float32. cohorts: (rounds, COHORT) clients. orders: (rounds, COHORT, MOST) the order in which each
    of them takes its rows, padded with -1."""

    initial: np.ndarray
    cohorts: np.ndarray
    orders: np.ndarray

    def of_round(self, round_: int) -> dict[int, Tensor]:
        """{client: the order of its rows} of a round, from 1."""
        pairs = zip(self.cohorts[round_ - 1], self.orders[round_ - 1], strict=True)
        return {int(client): torch.from_numpy(order[order >= 0]) for client, order in pairs}

    def clients(self, everybody: list[Client], round_: int) -> dict[int, Client]:
        """The cohort's rows in the order in which the round takes them."""
        return {
            client: (everybody[client][0][order], everybody[client][1][order])
            for client, order in self.of_round(round_).items()
        }
