"""Many sites trained at once on stacked parameters, where training them one by one is all overhead.

A step of k sites is one call of `vmap(grad(loss))` over parameters of shape (k, ...) and one step of the optimiser on
them: small models cost a few microseconds a site and step in place of a millisecond. Sites with many steps stand
first, so that those with a batch left are a prefix; a short batch is padded to the size of a full one and its padding
masked in the mean, which asks that the loss of a batch is the mean, or the sum, of the losses of its rows.

Invariant: a site's update is that of `training.local_train` up to rounding, whatever sites it is stacked with: the
same order of rows, the same batches, the same rules. `executor.py` compares the two before a run uses this.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.nn.modules.module import register_module_forward_pre_hook

from fedcore.learning.data.rows import ArrayRows
from fedcore.learning.device import device_of
from fedcore.learning.rules import rules_of
from fedcore.learning.rules.averaging import RULES as AVERAGING
from fedcore.learning.schedules import learning_rate
from fedcore.learning.training import (
    OPTIMISERS,
    TrainReport,
    epoch_order,
    loss_of,
    predict,
    trained_norms,
)

if TYPE_CHECKING:
    from fedcore.learning.site import SiteTrainer
    from fedcore.learning.state import JobState
    from fedcore.secagg.plan import RoundPlan, TrainPlan

Updates = NDArray[np.float32]
"""(k, d): the updates of k sites."""

CACHED_BYTES = 1 << 24
"""Parameters and gradients of a chunk together: beyond the caches a larger chunk is slower."""

MOST_SITES = 128
"""Sites of a chunk: what a call costs beside its arithmetic is spread over enough of them."""


def chunk_size(parameters: int) -> int:
    """How many sites are trained at once: a function of the model alone, so that every machine has the same."""
    return max(1, min(MOST_SITES, CACHED_BYTES // (8 * parameters)))


def obstacle(sites: Sequence[SiteTrainer], plan: RoundPlan, state: JobState) -> str:
    """Why these sites cannot be trained at once, as far as it is known without a step; "" where nothing is."""
    task, module = sites[0].task, sites[0].flat.module
    if task.train is not None:
        return "the task has a training loop of its own"
    if plan.privacy is not None:
        return "gradients are clipped for each record (privacy.epsilon)"
    if rules_of(plan.train) is not AVERAGING:
        return f"the algorithm {plan.train.algorithm!r} keeps values at each site"
    if norms := trained_norms(module):
        return f"{_named(module, norms[0])} has statistics of a batch, which padding would change"
    rows = [site.standard_rows(state).train for site in sites]
    kinds = {
        (each.x.shape[1:], each.x.dtype, each.y.shape[1:], each.y.dtype, each.scale)
        if isinstance(each, ArrayRows)
        else None
        for each in rows
    }
    if None in kinds:
        return "the rows are a dataset that is read item by item"
    return "" if len(kinds) == 1 else "the sites' rows have different shapes or types"


def _named(module: nn.Module, found: nn.Module) -> str:
    name = next((name for name, each in module.named_modules() if each is found), "")
    return f"the module {name or 'itself'} ({type(found).__name__})"


class LastModule:
    """Which module of a model ran last, to name the one in which an error was raised."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._last = module, module
        self._known = set(module.modules())
        # Of all modules: a model's own hooks are restored with its other attributes before it trains.
        self._hook = register_module_forward_pre_hook(self._enter)

    def _enter(self, module: nn.Module, _: Any) -> None:
        if module in self._known:
            self._last = module

    @property
    def name(self) -> str:
        return _named(self._module, self._last)

    def close(self) -> None:
        self._hook.remove()


class _Rows:
    """The training rows of many sites in one tensor each for x and y. first: where each site's begin; like: rows with
    what the loss makes of a batch."""

    def __init__(self, sites: Sequence[SiteTrainer], state: JobState, device: torch.device) -> None:
        rows = [site.standard_rows(state).train for site in sites]
        arrays = [each for each in rows if isinstance(each, ArrayRows)]
        assert len(arrays) == len(rows)
        self.like = arrays[0]
        self.x = torch.cat([each.x for each in arrays]).to(device)
        self.y = torch.cat([each.y for each in arrays]).to(device)
        self.sizes = [len(each) for each in arrays]
        self.first = np.concatenate([[0], np.cumsum(self.sizes)])


@dataclass
class _Batches:
    """Of one chunk. places: (k, steps, batch) indices into the rows of `_Rows`; padding repeats one of them.
    lengths: (k, steps), 0 after a site's last step. order: the sites of the chunk as they are stacked."""

    places: Tensor
    lengths: NDArray[np.int64]
    order: NDArray[np.intp]


def _batches(sites: Sequence[SiteTrainer], rows: _Rows, plan: TrainPlan, round_: int) -> _Batches:
    per_site: list[list[NDArray[np.int64]]] = []
    for site, size, first in zip(sites, rows.sizes, rows.first, strict=False):
        seeds = site.job.run.seed, round_, site.site.id
        found: list[NDArray[np.int64]] = []
        for epoch in range(plan.epochs):
            order = epoch_order(size, seeds, epoch) + first
            found += [order[at : at + plan.batch_size] for at in range(0, size, plan.batch_size)]
        per_site.append(found)
    counts = np.array([len(each) for each in per_site])
    order = np.argsort(-counts, kind="stable")
    places = np.zeros((len(sites), counts.max(initial=0), plan.batch_size), dtype=np.int64)
    lengths = np.zeros(places.shape[:2], dtype=np.int64)
    for row, index in enumerate(order):
        for step, batch in enumerate(per_site[index]):
            places[row, step, : len(batch)] = batch
            places[row, step, len(batch) :] = batch[0]
            lengths[row, step] = len(batch)
    return _Batches(torch.from_numpy(places), lengths, order)


class StackedModel:
    """One module's loss as a function of stacked parameters.

    Nothing of the module is changed: its own tensors stand in for what is not trained.
    """

    def __init__(self, site: SiteTrainer, rows: ArrayRows) -> None:
        self._task, self._rows = site.task, rows
        module = site.flat.module
        self._whole = _Whole(site.task, module)
        self.trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        names = {f"module.{name}" for name in self.trained}
        own = [*self._whole.named_parameters(), *self._whole.named_buffers()]
        self._rest = {name: tensor.detach() for name, tensor in own if name not in names}
        spread = 0, None, 0, 0
        self.full = vmap(grad_and_value(self._full), in_dims=spread)
        self.masked = vmap(grad_and_value(self._masked), in_dims=(*spread, 0))

    def _outputs(
        self, trained: dict[str, Tensor], rest: dict[str, Tensor], x: Tensor, y: Tensor
    ) -> Any:
        named = {f"module.{name}": tensor for name, tensor in trained.items()}
        return functional_call(self._whole, {**rest, **named}, (x, y))

    def _full(
        self, trained: dict[str, Tensor], rest: dict[str, Tensor], x: Tensor, y: Tensor
    ) -> Any:
        return loss_of(self._task, self._rows, *self._outputs(trained, rest, x, y))

    def _masked(
        self,
        trained: dict[str, Tensor],
        rest: dict[str, Tensor],
        x: Tensor,
        y: Tensor,
        mask: Tensor,
    ) -> Any:
        outputs, targets = self._outputs(trained, rest, x, y)

        def of_row(output: Tensor, target: Tensor) -> Any:
            return loss_of(self._task, self._rows, output[None], target[None])

        total = (vmap(of_row)(outputs, targets) * mask).sum()
        return total if self._rows.adds_rows else total / mask.sum()

    def step(
        self, trained: dict[str, Tensor], x: Tensor, y: Tensor, lengths: NDArray[np.int64]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """(gradients, (k,) losses) of one batch of each of k sites. lengths: (k,) rows of each that count."""
        if (lengths == x.shape[1]).all():
            gradients, losses = self.full(trained, self._rest, x, y)
        else:
            mask = torch.from_numpy(np.arange(x.shape[1]) < lengths[:, None]).to(x.device)
            gradients, losses = self.masked(trained, self._rest, x, y, mask)
        return gradients, losses


class _Whole(nn.Module):
    """A model with the task's `predict`, so that it can be called with other parameters."""

    def __init__(self, task: Any, module: nn.Module) -> None:
        super().__init__()
        self._task, self.module = task, module

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return predict(self._task, self.module, (x, y))


def train_many(
    sites: Sequence[SiteTrainer], plan: RoundPlan, state: JobState, round_: int
) -> tuple[Updates, list[TrainReport]]:
    """(k, d) float32 updates of one round from a state, and what was done, in the order of `sites`.

    Raises what the task's code raises, and torch for what cannot be stacked.
    """
    flat, train = sites[0].flat, plan.train
    flat.write(state.server.model)
    flat.module.train()
    device = device_of(flat.module)
    rows = _Rows(sites, state, device)
    model = StackedModel(sites[0], rows.like)
    batches = _batches(sites, rows, train, round_)
    count = len(sites)
    start = {name: tensor.detach().clone() for name, tensor in model.trained.items()}
    stacked = {name: tensor.expand(count, *tensor.shape).clone() for name, tensor in start.items()}
    optimiser = OPTIMISERS[train.optimiser](list(stacked.values()), train)
    optimiser.param_groups[0]["lr"] = learning_rate(train, round_, plan.rounds)
    add_terms = _terms(list(start.values()), train)
    losses = torch.zeros(count, dtype=torch.float64, device=device)
    for step in range(batches.lengths.shape[1]):
        lengths = batches.lengths[:, step]
        active = int(np.count_nonzero(lengths))
        width = int(lengths[:active].max())
        picked = batches.places[:active, step, :width]
        trained = {name: tensor[:active] for name, tensor in stacked.items()}
        gradients, found = model.step(trained, rows.x[picked], rows.y[picked], lengths[:active])
        add_terms(list(trained.values()), list(gradients.values()))
        optimiser.first(active, list(gradients.values()))
        optimiser.step()
        in_each = torch.from_numpy(lengths[:active]).to(device) if rows.like.adds_rows else 1
        losses[:active] += found.detach() / in_each
    moved = [
        (tensor - start[name]).reshape(count, -1).to(torch.float32)
        for name, tensor in stacked.items()
    ]
    updates = np.zeros((count, flat.coordinates), dtype=np.float32)
    updates[batches.order, : flat.parameters] = torch.cat(moved, dim=1).cpu().numpy()
    steps = np.count_nonzero(batches.lengths, axis=1)
    seen, means = batches.lengths.sum(axis=1), losses.cpu().numpy()
    reports = [TrainReport(0, 0, None)] * count
    for row, index in enumerate(batches.order):
        mean = float(means[row] / steps[row]) if steps[row] else None
        reports[index] = TrainReport(int(steps[row]), int(seen[row]), mean)
    return updates, reports


def _terms(
    start: Sequence[Tensor], plan: TrainPlan
) -> Callable[[Sequence[Tensor], Sequence[Tensor]], None]:
    """What is done to the gradients of a step, in place: the proximal pull, then clipping, as `local_train` does."""

    @torch.no_grad()
    def add(trained: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        if plan.proximal_mu:
            for parameter, gradient, anchor in zip(trained, gradients, start, strict=True):
                gradient.add_((parameter - anchor) * plan.proximal_mu)
        if plan.max_grad_norm is not None:
            norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
            factor = (plan.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
            for gradient in gradients:
                gradient.mul_(factor.view(-1, *[1] * (gradient.ndim - 1)))

    return add
