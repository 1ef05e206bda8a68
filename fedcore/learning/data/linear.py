"""The linear model (logistic, softmax or least-squares regression) as a torch module.

Invariant: parameters start at zero. The losses it is used with are convex, so the start decides
nothing but time, and an input that is 0 in all training rows (a category without a row) keeps a
parameter of exactly 0 instead of a random one.
"""

import operator
from dataclasses import dataclass

import torch
from torch import nn

from fedcore.errors import BadInput


class ZeroLinear(nn.Linear):
    """`nn.Linear` whose parameters start at zero."""

    def reset_parameters(self) -> None:
        _zero(self)


class LazyZeroLinear(nn.LazyLinear):
    """The same, taking the number of inputs from the first batch."""

    cls_to_become = ZeroLinear

    def reset_parameters(self) -> None:
        """Zero, as soon as there are parameters."""
        if not self.has_uninitialized_params():
            _zero(self)


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


@dataclass(frozen=True)
class LinearModel:
    """What `linear` returns: a function to give as `Task(model=...)`; its repr enters the digest."""

    features: int | None
    classes: int

    def __call__(self) -> nn.Module:
        outputs = 1 if self.classes == 2 else self.classes
        if self.features is None:
            return LazyZeroLinear(outputs)
        return ZeroLinear(self.features, outputs)


def linear(features: int | None = None, classes: int = 2) -> LinearModel:
    """A function that makes a linear model from `features` inputs (None: from the first batch).

    Two classes give one logit, output (rows, 1), to use with `logit_loss`; more classes give one
    logit each, to use with cross-entropy; `classes=1` gives one number, for regression.
    Raises BadInput for counts below 1.
    """
    for name, count in (("features", 1 if features is None else features), ("classes", classes)):
        if operator.index(count) < 1:
            raise BadInput(
                f"linear({name}=...): found {count!r}, expected a whole number of at least 1"
            )
    return LinearModel(features, classes)


def logit_loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy of one logit per row: outputs (rows, 1) or (rows,), targets of 0 and 1.

    `torch.nn.BCEWithLogitsLoss` itself wants equal shapes and float targets.
    """
    logits = outputs.reshape(len(outputs))
    return nn.functional.binary_cross_entropy_with_logits(logits, targets.reshape(-1).to(logits))
