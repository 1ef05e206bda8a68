"""Each site's own statistics of normalisation layers (`buffers = "local"`).

Where inputs are shifted between sites, the average of their running means and variances fits none of them. Then
these statistics stay at the sites, as in FedBN (Li et al. 2021, arXiv:2102.07623, section 3); the layers' weights
are averaged, which FedBN leaves at the sites too. Training goes by the statistics of each batch, so they matter
for evaluation only.

Invariant: they are a function of the model and of the site's training rows, made anew for each released model
(AdaBN, Li et al. 2016, arXiv:1603.04779). So nothing has to be kept between rounds, and a simulation and a
deployed site have the same bits, also after a restart.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from fedcore.learning.data.rows import Rows
from fedcore.learning.model import seeded
from fedcore.learning.scoring import EVALUATION_BATCH, MOST_ROWS, probe
from fedcore.learning.task import Task
from fedcore.learning.training import (
    LOOP_CODE,
    batch_norm_needs_two,
    lone_row_breaks,
    place,
    predict,
    task_code,
    trained_norms,
)
from fedcore.seeds import generator

WORSE = 1.25
"""How many times the loss with each site's own statistics the loss with the model's is where that is a warning."""


@torch.no_grad()
def use_own_statistics(task: Task, module: nn.Module, rows: Rows, *, seed: int, site: str) -> None:
    """Give the normalisation layers of `module` the mean and variance of their inputs over training rows.

    rows: of one site, as inputs; of more than MOST_ROWS a fixed choice, in batches of at most EVALUATION_BATCH, of
    which every layer takes the mean of means and of variances. Layers that the module keeps in evaluation mode
    stay as they are, as do all other buffers. Raises TaskFailed, and BadInput for BatchNorm with one row.
    """
    layers = trained_norms(module)
    order = generator(seed, 0, site, "own statistics").permutation(len(rows))[:MOST_ROWS]
    if lone_row_breaks(module, len(order), getattr(rows, "batch_size", None) or EVALUATION_BATCH):
        order = order[:-1]
    if not layers or not len(order):
        return
    kept = [(layer, layer.momentum, layer.num_batches_tracked) for layer in layers]
    for layer, _, counted in kept:
        layer.training = True
        if counted is not None:
            layer.num_batches_tracked = counted.clone()
    try:
        with (
            seeded(seed, 0, site, "own statistics"),
            task_code(site, None, LOOP_CODE),
            batch_norm_needs_two(place(site, None)),
        ):
            for number, batch in enumerate(rows.batches(EVALUATION_BATCH, order), start=1):
                for layer in layers:
                    layer.momentum = 1 / number  # the mean over the batches so far
                predict(task, module, batch)
    finally:
        module.eval()
        for layer, momentum, counted in kept:
            layer.momentum, layer.num_batches_tracked = momentum, counted


@torch.no_grad()
def average_own(
    module: nn.Module,
    of_sites: Sequence[tuple[dict[str, torch.Tensor], int]],
    names: Sequence[str],
) -> None:
    """Give parameters and buffers the mean of the sites' own, as averaging in rounds would have it.

    of_sites: (state dict with a site's own values, its training rows).
    """
    rows, whole = sum(count for _, count in of_sites), module.state_dict()
    for name in names:
        mean = sum(state[name].double() * (count / rows) for state, count in of_sites)
        assert isinstance(mean, torch.Tensor)
        whole[name].copy_(mean)


def losses_by_statistics(
    task: Task, module: nn.Module, rows: Rows, *, seed: int, site: str
) -> tuple[float, float] | None:
    """(mean loss with the statistics that the model has, with the site's own) over training rows, of which more than
    MOST_ROWS are evenly spaced; None for fewer than two rows, which have no variance, and for a task that evaluates
    itself, whose batches may be for nothing else. The module has the site's own afterwards."""
    if task.evaluate is not None or len(rows) < 2:
        return None
    picked = np.linspace(0, len(rows) - 1, min(len(rows), MOST_ROWS)).astype(np.int64)
    some = rows.take(picked)
    before = probe(task, module, some, seed=seed, round_=0, site=site).loss
    use_own_statistics(task, module, rows, seed=seed, site=site)
    after = probe(task, module, some, seed=seed, round_=0, site=site).loss
    return None if before is None or after is None else (before, after)
