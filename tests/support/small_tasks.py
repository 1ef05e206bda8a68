"""Tasks of a few rows, which train in no time, and a dataset of given items."""

import numpy as np
import torch
from torch.utils.data import Dataset

import fedcore


def tiny(rows=30, **more):
    """Three sites, three columns, two classes."""

    def data(source):
        rng = np.random.default_rng(source)
        x = rng.normal(size=(rows, 3)).astype("f4")
        return x, (x[:, 0] > 0).astype(int)

    return fedcore.Task(
        "tiny", data, lambda: torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy,
        sites={"a": 1, "b": 2, "c": 3}, **more,
    )  # fmt: skip


class Items(Dataset):
    """The given items, one by one."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]
