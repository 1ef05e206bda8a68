"""Rounds of pfl-research's `FederatedAveraging` on its `SimulatedBackend`, in one process.

As its documentation shows it: `PyTorchModel` with SGD at the clients and an SGD step of 1 at the server, updates
weighted by data points, users' rows as tensors in memory. No evaluation after the first round, and no metrics.
"""

from __future__ import annotations

import sys
from importlib.metadata import version

import torch
from common import BATCH, COHORT, Work, make_clients, read_flat, write_flat
from driver import Driver
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel


class Learner(torch.nn.Module):
    """A model with the two functions that `PyTorchModel` asks for."""

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__()
        self.module, self._loss = module, torch.nn.CrossEntropyLoss()

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self._loss(self.module(x), y)

    @torch.no_grad()
    def metrics(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, Weighted]:
        return {"loss": Weighted(float(self.loss(x, y)) * len(y), len(y))}


def main() -> None:
    """Run the rounds that the benchmark asks for."""
    work, driver = Work.given(sys.argv[1]), Driver()
    torch.set_num_threads(1)
    everybody, schedule = make_clients(work.workload, work.seed), work.schedule()
    module = work.of.model()
    write_flat(module, schedule.initial)
    learner = Learner(module)
    rounds = driver.rounds(lambda: read_flat(module))
    # Before the clock starts: whose turn it is, and their rows in the order of that round.
    turns = iter(
        [
            (f"{number}/{client}", rows)
            for number in range(1, work.rounds + 1)
            for client, rows in schedule.clients(everybody, number).items()
        ]
    )

    def rows_of(user: tuple[str, tuple[torch.Tensor, torch.Tensor]]) -> PyTorchTensorDataset:
        return PyTorchTensorDataset(user[1], user_id=user[0])

    class Turns(TrainingProcessCallback):
        """Waits for the next round between two of them."""

        def after_central_iteration(
            self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
        ) -> tuple[bool, Metrics]:
            del aggregate_metrics, model, central_iteration
            return next(rounds, "end") == "end", Metrics()

    def sample() -> tuple[str, tuple[torch.Tensor, torch.Tensor]]:
        return next(turns)

    backend = SimulatedBackend(
        FederatedDataset(rows_of, sample),
        FederatedDataset(rows_of, sample),
        postprocessors=[WeightByDatapoints()],
    )
    driver.say(
        parameters=len(schedule.initial),
        versions={"pfl": version("pfl"), "torch": torch.__version__},
        about={"backend": "SimulatedBackend"},
    )
    next(rounds)
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=work.rounds, evaluation_frequency=1 << 30,
            train_cohort_size=COHORT, val_cohort_size=0,
        ),
        backend,
        PyTorchModel(learner, torch.optim.SGD, torch.optim.SGD(learner.parameters(), lr=1.0)),
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=work.of.lr, local_batch_size=BATCH),
        callbacks=[Turns()],
    )  # fmt: skip


main()
