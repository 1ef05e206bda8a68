"""Training on one site's rows, by our loop or the task's own.

Invariant: the result is a function of (model, rows, fit settings, seed, round, site): one torch thread, and
every random draw derives from these.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.optim.adam import adam
from torch.optim.sgd import sgd

from fedcore.errors import BadInput, UnknownName
from fedcore.learning.data.kinds import Indices
from fedcore.learning.data.rows import Rows, copied
from fedcore.learning.device import beside, rows_beside
from fedcore.learning.model import FlatModel, seeded
from fedcore.learning.module_state import ModuleState, is_plain
from fedcore.learning.rules.parts import GradientTerm
from fedcore.learning.schedules import learning_rate
from fedcore.learning.task import Task, user_code
from fedcore.secagg.plan import TrainPlan
from fedcore.seeds import generator
from fedcore.types import FloatVector


class Optimiser(Protocol):
    """What the loop needs of `torch.optim.Optimizer`."""

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Each with its step size, `lr`, which may be set between two steps."""
        ...

    def zero_grad(self, set_to_none: bool = True) -> None: ...
    def step(self) -> object: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class Functional(ABC):
    """A class of `torch.optim` by its functional form, with the same bits and the same saved state.

    The first object of a `torch.optim` class imports torch's compiler: 2 s of CPU and 800 modules in every
    process that trains.
    """

    def __init__(self, parameters: Sequence[Tensor], plan: TrainPlan) -> None:
        self._parameters, self._plan = list(parameters), plan
        self.param_groups: list[dict[str, Any]] = [{"lr": plan.lr}]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for parameter in self._parameters:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    @abstractmethod
    def step(self) -> None: ...

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...

    def first(self, count: int, gradients: Sequence[Tensor]) -> None:
        """Of parameters stacked along their first dimension: go on with the first so many, which have these
        gradients."""
        self._parameters = [p[:count] for p in self._parameters]
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient

    def _used(self) -> list[tuple[int, Tensor, Tensor]]:
        """Number, parameter and gradient of those that have one."""
        return [(i, p, p.grad) for i, p in enumerate(self._parameters) if p.grad is not None]


class Sgd(Functional):
    """`torch.optim.SGD`."""

    def __init__(self, parameters: Sequence[Tensor], plan: TrainPlan) -> None:
        super().__init__(parameters, plan)
        self._momenta: list[Tensor | None] = [None] * len(self._parameters)

    def first(self, count: int, gradients: Sequence[Tensor]) -> None:
        super().first(count, gradients)
        self._momenta = [None if m is None else m[:count] for m in self._momenta]

    @torch.no_grad()
    def step(self) -> None:
        used = self._used()
        parameters = [parameter for _, parameter, _ in used]
        gradients = [gradient for _, _, gradient in used]
        rate, plan = self.param_groups[0]["lr"], self._plan
        if used and not (plan.momentum or plan.weight_decay):
            # What `sgd` does to one after the other with these settings, by one call.
            torch._foreach_add_(parameters, gradients, alpha=-rate)
            return
        momenta = [self._momenta[i] for i, _, _ in used]
        sgd(
            parameters, gradients, momenta,
            has_sparse_grad=any(gradient.is_sparse for gradient in gradients),
            weight_decay=plan.weight_decay, momentum=plan.momentum, lr=rate,
            dampening=0.0, nesterov=False, maximize=False,
        )  # fmt: skip
        for (i, _, _), momentum in zip(used, momenta, strict=True):
            self._momenta[i] = momentum

    def state_dict(self) -> dict[str, Any]:
        return {"state": {i: {"momentum_buffer": m} for i, m in enumerate(self._momenta)}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for i, saved in state_dict["state"].items():
            momentum, device = saved["momentum_buffer"], self._parameters[i].device
            self._momenta[i] = None if momentum is None else momentum.to(device, copy=True)


class Adam(Functional):
    """`torch.optim.Adam`, and with `decoupled` weight decay `torch.optim.AdamW`."""

    def __init__(
        self, parameters: Sequence[Tensor], plan: TrainPlan, *, decoupled: bool = False
    ) -> None:
        super().__init__(parameters, plan)
        self._decoupled = decoupled
        self._moments: dict[int, dict[str, Tensor]] = {}

    def first(self, count: int, gradients: Sequence[Tensor]) -> None:
        super().first(count, gradients)
        self._moments = {
            i: {name: value if name == "step" else value[:count] for name, value in each.items()}
            for i, each in self._moments.items()
        }

    @torch.no_grad()
    def step(self) -> None:
        used = self._used()
        if any(gradient.is_sparse for _, _, gradient in used):
            raise RuntimeError(
                "Adam does not support sparse gradients, please consider SparseAdam instead"
            )
        for i, parameter, _ in used:
            if i not in self._moments:
                first, second = torch.zeros_like(parameter), torch.zeros_like(parameter)
                step = torch.tensor(0.0, dtype=torch.float32)
                self._moments[i] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        found = [self._moments[i] for i, _, _ in used]
        adam(
            [p for _, p, _ in used], [gradient for _, _, gradient in used],
            [each["exp_avg"] for each in found], [each["exp_avg_sq"] for each in found], [],
            [each["step"] for each in found],
            has_complex=any(torch.is_complex(p) for _, p, _ in used),
            decoupled_weight_decay=self._decoupled, weight_decay=self._plan.weight_decay,
            lr=self.param_groups[0]["lr"],
            amsgrad=False, beta1=0.9, beta2=0.999, eps=1e-8, maximize=False,
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {"state": {i: dict(each) for i, each in self._moments.items()}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._moments = {
            i: {
                name: value.clone()
                if name == "step"
                else value.to(self._parameters[i].device, copy=True)
                for name, value in saved.items()
            }
            for i, saved in state_dict["state"].items()
        }


OPTIMISERS: dict[str, Callable[[Any, TrainPlan], Functional]] = {
    "sgd": Sgd,
    "adam": Adam,
    "adamw": partial(Adam, decoupled=True),
}
"""adamw: weight decay apart from the gradient (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2)."""


LOOP_CODE = "model, task.predict or task.loss"
"""The functions of a task that one of our loops runs, for messages."""


@dataclass(frozen=True, kw_only=True)
class Fit(TrainPlan):
    """The argument `fit` of a task's own `train(model, rows, fit)`.

    lr: step size of this round, by the schedule; epochs: passes over the rows; batch_size: rows; seed: of the
    run; round: from 1, of `rounds`. What the settings ask for, the function does itself: `proximal_mu` (0 in
    an arm that trains alone) and `max_grad_norm` too.
    """

    seed: int
    round: int
    rounds: int
    site: str


class _WatchedFit(Fit):
    """A `Fit` that records which of its attributes are read."""

    def __getattribute__(self, name: str) -> Any:
        object.__getattribute__(self, "__dict__").setdefault("_read", set()).add(name)
        return object.__getattribute__(self, name)


def _own_train(task: Task, module: nn.Module, rows: Rows, fit: _WatchedFit) -> None:
    """The task's own `train`. Raises BadInput for a setting that it ignored, which would have no effect."""
    assert task.train is not None
    scheduled = fit.lr_schedule != "constant" or fit.warmup_rounds > 0
    asked = {
        "proximal_mu": ("proximal_mu", fit.proximal_mu > 0),
        "max_grad_norm": ("max_grad_norm", fit.max_grad_norm is not None),
        "lr_schedule" if fit.lr_schedule != "constant" else "warmup_rounds": ("lr", scheduled),
    }
    read: set[str] = object.__getattribute__(fit, "__dict__")["_read"]
    read.clear()
    task.train(module, rows, fit)
    for setting, (value, set_) in asked.items():
        if set_ and not read & {value, "__dict__"}:
            raise BadInput(
                f"train.{setting}: task {task.name!r} has a `train` of its own that did not read fit.{value}, "
                "so the setting has no effect",
                remedy=f"use fit.{value} in task.train, or leave {setting} out",
            )


@dataclass(frozen=True)
class TrainReport:
    """steps: optimiser steps; examples: rows seen, epochs counted.

    loss: mean of the batches' losses, each as it was before its step, a short batch counting as much
    as a full one, and without the proximal term; None for a task with its own `train`.
    """

    steps: int
    examples: int
    loss: float | None


def place(site: str, round_: int | None) -> str:
    """Where something happened, for messages; no site means the pooled rows of all of them."""
    name = f"site {site}" if site else "all sites pooled"
    return name + (f", round {round_}" if round_ else "")


def task_code(site: str, round_: int | None, part: str) -> AbstractContextManager[None]:
    """`user_code` for a function of the task, with site and round in the message."""
    return user_code(f"{place(site, round_)}: task.{part}")


def make_optimiser(module: nn.Module, plan: TrainPlan) -> Optimiser:
    """A fresh optimiser over the trainable parameters; raises UnknownName."""
    if plan.optimiser not in OPTIMISERS:
        raise UnknownName("train.optimiser", plan.optimiser, OPTIMISERS)
    return OPTIMISERS[plan.optimiser]([p for p in module.parameters() if p.requires_grad], plan)


def predict(task: Task, module: nn.Module, batch: Any) -> tuple[Any, Any]:
    """(outputs, targets) of one batch: the task's own `predict`, or `x, y = batch`."""
    batch = beside(module, batch)
    if task.predict is not None:
        return task.predict(module, batch)
    x, y = batch
    return module(x), y


def loss_of(task: Task, rows: Rows, outputs: Any, targets: Any) -> Any:
    """The task's loss of a batch of these rows: a regression's targets are scaled where the rows have a scale."""
    return task.loss(outputs, targets if rows.scale is None else rows.scale.to_model(targets))


def per_row(rows: Rows, loss: float, count: int) -> float:
    """The loss of a batch of so many of these rows, for each of them."""
    return loss / count if rows.adds_rows else loss


def local_train(
    task: Task,
    module: nn.Module,
    rows: Rows,
    plan: TrainPlan,
    *,
    seed: int,
    round_: int,
    rounds: int,
    site: str,
    optimiser: Optimiser | None = None,
    term: GradientTerm | None = None,
) -> TrainReport:
    """Train `module` in place for `plan.epochs` passes over `rows`, with the rate of the round.

    round_: from 1, of `rounds` in all. optimiser: one to continue with (for arms that never average); None
    makes a new one, as a site does each round.
    term: of an algorithm; None: the plan's proximal term. Raises TaskFailed if the task's code raises, BadInput for
    BatchNorm with a batch of one row and for settings that a `train` of the task's own ignores.
    """
    module.train()
    part = "train" if task.train is not None else LOOP_CODE
    with seeded(seed, round_, site, "train"), task_code(site, round_, part):
        if task.train is not None:
            of_round = asdict(plan) | {"lr": learning_rate(plan, round_, rounds)}
            fit = _WatchedFit(**of_round, seed=seed, round=round_, rounds=rounds, site=site)
            _own_train(task, module, rows_beside(module, copied(rows)), fit)
            return TrainReport(0, plan.epochs * len(rows), None)
        with batch_norm_needs_two(place(site, round_)):
            optimiser = optimiser or make_optimiser(module, plan)
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(plan, round_, rounds)
            term = term or GradientTerm(pull=plan.proximal_mu)
            return _own_loop(task, module, rows, plan, optimiser, (seed, round_, site), term)


def trained_norms(module: nn.Module) -> list[_NormBase]:
    """The normalisation layers whose statistics training changes: a module's own `train` may keep some of its
    layers in evaluation mode. The module is in evaluation mode afterwards."""
    module.train()
    found = [m for m in module.modules() if isinstance(m, _NormBase) and m.training]
    module.eval()
    return found


def lone_row_breaks(module: nn.Module, rows: int, batch_size: int) -> bool:
    """Whether the last batch of so many rows is one row, for which BatchNorm has no statistics: that row
    then sits this pass out."""
    return (
        rows > 1
        and rows % batch_size == 1
        and any(isinstance(m, _BatchNorm) for m in module.modules())
    )


@contextmanager
def batch_norm_needs_two(where: str) -> Iterator[None]:
    """Whether one row is too few depends on what reaches the layer (one image has many pixels per
    channel), so torch decides, and its sentence is put into ours."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise BadInput(
            f"{where}: found a batch of 1 row, expected at least 2 rows for BatchNorm",
            remedy="give every site 2 training rows or more and train.batch_size 2 or more, "
            "or use GroupNorm or LayerNorm, which need no batch",
        ) from error


def epoch_order(rows: int, seeds: tuple[int, int, str], epoch: int) -> Indices:
    """The order in which an epoch takes so many rows. seeds: (seed, round, site)."""
    return generator(*seeds, f"shuffle {epoch}").permutation(rows)


def _own_loop(
    task: Task,
    module: nn.Module,
    rows: Rows,
    plan: TrainPlan,
    optimiser: Optimiser,
    seeds: tuple[int, int, str],
    term: GradientTerm,
) -> TrainReport:
    """seeds: (seed, round, site), from which the order of each epoch follows. term: for every batch's gradient."""
    steps, seen, total = 0, 0, 0.0
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    add_term = _added_term(trained, term)
    batch_size = getattr(rows, "batch_size", None) or plan.batch_size
    for epoch in range(plan.epochs):
        order = epoch_order(len(rows), seeds, epoch)
        if lone_row_breaks(module, len(order), batch_size):
            order = order[:-1]
        if getattr(rows, "drop_last", False):
            order = order[: len(order) // batch_size * batch_size]
        for batch in rows.batches(plan.batch_size, order):
            optimiser.zero_grad(set_to_none=True)
            outputs, targets = predict(task, module, batch)
            loss = loss_of(task, rows, outputs, targets)
            loss.backward()
            add_term()
            if plan.max_grad_norm is not None:
                nn.utils.clip_grad_norm_(trained, plan.max_grad_norm)
            optimiser.step()
            steps += 1
            total += per_row(rows, float(loss.detach()), len(targets))
        seen += len(order)
    return TrainReport(steps, seen, total / steps if steps else None)


def _added_term(trained: Sequence[nn.Parameter], term: GradientTerm) -> Callable[[], None]:
    """What adds a term to the gradients of the trained parameters. The pull is the gradient of
    pull/2 |w - anchor|^2."""
    shift = None if term.shift is None else _like(trained, term.shift)
    anchor: list[Tensor] = []
    if term.pull:
        start = [parameter.detach().clone() for parameter in trained]
        anchor = start if term.anchor is None else _like(trained, term.anchor)

    def add(parameter: nn.Parameter, more: Tensor) -> None:
        parameter.grad = more if parameter.grad is None else parameter.grad + more

    @torch.no_grad()
    def add_term() -> None:
        for k, parameter in enumerate(trained):
            if shift is not None:
                add(parameter, shift[k])
            if term.pull:
                add(parameter, (parameter - anchor[k]) * term.pull)

    return add_term


def _like(parameters: Sequence[nn.Parameter], flat: FloatVector) -> list[Tensor]:
    """(parameters,) float32 in the shapes and types of parameters, one after the other."""
    parts = torch.split(torch.from_numpy(flat.copy()), [p.numel() for p in parameters])
    return [part.view(p.shape).to(p) for part, p in zip(parts, parameters, strict=True)]


class OwnModel:
    """A model that one party trains alone, with an optimiser that it keeps from round to round: a copy of the
    resident module, started from `initial`. It keeps its attributes too, as on one machine. Nothing is averaged,
    so there is no proximal term."""

    def __init__(
        self, task: Task, flat: FlatModel, initial: FloatVector, plan: TrainPlan, rounds: int
    ) -> None:
        flat.write(initial)
        self._task, self._plan, self._rounds = task, replace(plan, proximal_mu=0.0), rounds
        self.module = copy.deepcopy(flat.module)
        self._optimiser = make_optimiser(self.module, plan)
        self._state = ModuleState(self.module)

    def train(self, rows: Rows, *, seed: int, round_: int, site: str) -> TrainReport:
        """One round's epochs over `rows`, with the same optimiser as before. Raises TaskFailed, BadInput."""
        return local_train(
            self._task, self.module, rows, self._plan,
            seed=seed, round_=round_, rounds=self._rounds, site=site, optimiser=self._optimiser,
        )  # fmt: skip

    def save(self) -> Any:
        """Parameters, buffers, the optimiser's state, and what else changed on the module, or its names where
        a checkpoint cannot have it."""
        changes = self._state.changes()
        return {
            "module": self.module.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "attributes": [{n: v for n, v in of.items() if is_plain(v)} for of in changes],
            "not_saved": sorted({n for of in changes for n, v in of.items() if not is_plain(v)}),
        }

    def restore(self, saved: Any) -> None:
        """The inverse of `save`, also of a version that saved no attributes. Raises BadInput where not all
        could be saved."""
        if lost := saved.get("not_saved"):
            raise BadInput(
                f"--resume: the model keeps {', '.join(lost)} from round to round, expected "
                "numbers, text or tensors there",
                remedy="start a new run, or keep such a state in a buffer (register_buffer)",
            )
        self._state.change(saved.get("attributes", ()))
        self.module.load_state_dict(saved["module"])
        self._optimiser.load_state_dict(saved["optimiser"])
