"""A small network on digits of scikit-learn: each site has a share of the rows."""

import torch
from sklearn.datasets import load_digits
from torch import nn


def build_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def load_rows(partition: int, partitions: int) -> tuple[torch.Tensor, torch.Tensor]:
    digits = load_digits()
    inputs = torch.tensor(digits.data / 16.0, dtype=torch.float32)
    targets = torch.tensor(digits.target)
    train = torch.arange(len(targets)) % 5 != 0
    inputs, targets = inputs[train], targets[train]
    mine = slice(partition, len(targets) // partitions * partitions, partitions)  # as many rows at each site
    return inputs[mine], targets[mine]


def load_test_rows() -> tuple[torch.Tensor, torch.Tensor]:
    digits = load_digits()
    inputs = torch.tensor(digits.data / 16.0, dtype=torch.float32)
    targets = torch.tensor(digits.target)
    return inputs[::5], targets[::5]


def train(model: nn.Module, rows: tuple[torch.Tensor, torch.Tensor], epochs: int, lr: float) -> float:
    inputs, targets = rows
    torch.manual_seed(0)
    optimiser = torch.optim.SGD(model.parameters(), lr=lr)
    loss = torch.tensor(0.0)
    for _ in range(epochs):
        for batch in torch.randperm(len(targets)).split(32):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(inputs[batch]), targets[batch])
            loss.backward()
            optimiser.step()
    return loss.item()


def accuracy(model: nn.Module) -> float:
    inputs, targets = load_test_rows()
    with torch.no_grad():
        return float((model(inputs).argmax(1) == targets).float().mean())
