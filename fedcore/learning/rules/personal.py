"""What each site has for itself beside the common model: layers that stay, or a whole model.

`LAYERS`: the parameters and buffers that `local_parameters` names are trained with the rest and are neither sent nor
averaged: the head of a network in FedPer (Arivazhagan et al. 2019, arXiv:1912.00818, algorithms 1 and 2), the
normalisation layers in FedBN (Li et al. 2021, arXiv:2102.07623, section 3).

`DITTO`: Li et al. 2021 (arXiv:2012.04221), algorithm 1. The common model is trained as by averaging; beside it a site
trains a model v of its own, from the one it had, along g + lambda (v - w), with w the released model of the round.
"""

from __future__ import annotations

from fedcore.learning.rules.parts import (
    GradientTerm,
    LocalRound,
    Rules,
    Used,
    Values,
    optimised,
    plain_train,
)
from fedcore.types import FloatVector

_LOCAL, _MODEL = "local", "model"


def _train_layers(round_: LocalRound, kept: Values) -> tuple[FloatVector, Values]:
    update = round_.train(local=kept.get(_LOCAL)) - round_.start
    return update, {_LOCAL: round_.local}


def _train_ditto(round_: LocalRound, kept: Values) -> tuple[FloatVector, Values]:
    update, _ = plain_train(round_, {})
    anchor = round_.start[: round_.plan.parameters]
    term = GradientTerm(pull=round_.plan.train.ditto_lambda, anchor=anchor)
    return update, {_MODEL: round_.train(term, start=kept.get(_MODEL))}


def _own_model(model: FloatVector, kept: Values) -> Used:
    return kept.get(_MODEL, model), None


LAYERS = Rules(
    train=_train_layers,
    init=lambda plan: {},
    apply=lambda plan, state, mean, summed: optimised(plan, state, mean),
    largest_step=lambda plan, step, mean: step,
    uses=lambda model, kept: (model, kept.get(_LOCAL)),
)
DITTO = Rules(
    train=_train_ditto,
    init=lambda plan: {},
    apply=lambda plan, state, mean, summed: optimised(plan, state, mean),
    largest_step=lambda plan, step, mean: step,
    uses=_own_model,
)
