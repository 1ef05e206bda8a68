"""The same of an app of the older API: `client_fn` and NumPyClient, `server_fn` and the strategies of flwr.server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common import (
    Code,
    EvaluateIns,
    FitIns,
    GetParametersIns,
    Parameters,
    ndarrays_to_parameters,
    parameters_to_ndarrays,
)
from flwr.compat.common import recorddict_compat as compat

from fedcore.errors import BadInput
from fedcore.learning.flower_apps.app_arrays import AppArrays, arrays_in
from fedcore.learning.flower_apps.message_api import (
    AppReply,
    numbers_in,
    weight_in,
    without_proximal,
)

Config = Callable[[int], Mapping[str, Any]]
"""What a client gets for a round, by the round."""


@dataclass(frozen=True)
class LegacyApi:
    """configs: of fit (train) and evaluate."""

    configs: Mapping[str, Config]
    weight_key: str = "num_examples"

    def content(self, kind: str, arrays: ArrayRecord, round_: int, *, alone: bool) -> RecordDict:
        """FitIns or EvaluateIns: the arrays as a list, in their order."""
        parameters = ndarrays_to_parameters([array.numpy() for array in arrays.values()])
        config = dict(self.configs[kind](round_))
        if alone:
            config = without_proximal(config)
        if kind == "train":
            return compat.fitins_to_recorddict(FitIns(parameters, config), keep_input=True)
        return compat.evaluateins_to_recorddict(EvaluateIns(parameters, config), keep_input=True)

    def read(self, kind: str, content: RecordDict, where: str) -> AppReply:
        """FitRes or EvaluateRes, whose loss is the first metric."""
        if kind == "train":
            fit = compat.recorddict_to_fitres(content, keep_input=True)
            _require_ok(fit.status.code, fit.status.message, where)
            examples = weight_in(fit.num_examples, self.weight_key, where)
            return AppReply(named(fit.parameters, where), {}, examples)
        found = compat.recorddict_to_evaluateres(content)
        _require_ok(found.status.code, found.status.message, where)
        metrics = numbers_in({"loss": found.loss, **found.metrics}, where)
        return AppReply(None, metrics, weight_in(found.num_examples, self.weight_key, where))


def parameters_request() -> RecordDict:
    """The content of the message get_parameters, for the initial arrays that a strategy has not."""
    return compat.getparametersins_to_recorddict(GetParametersIns({}))


def parameters_reply(content: RecordDict, where: str) -> AppArrays:
    """The arrays of its reply."""
    found = compat.recorddict_to_getparametersres(content, keep_input=True)
    _require_ok(found.status.code, found.status.message, where)
    return named(found.parameters, where)


def named(parameters: Parameters, where: str) -> AppArrays:
    """The list under the names 0, 1, 2, ... Raises BadInput as `arrays_in`."""
    listed = enumerate(parameters_to_ndarrays(parameters))
    return arrays_in(
        ArrayRecord({str(place): Array(np.asarray(values)) for place, values in listed}), where
    )


def _require_ok(code: Code, message: str, where: str) -> None:
    if code is not Code.OK:
        raise BadInput(
            f"{where}: found the status {code.name} in the reply ({message}), expected OK",
            remedy="the client has get_parameters, fit and evaluate",
        )
