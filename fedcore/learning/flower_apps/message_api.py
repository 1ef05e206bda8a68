"""What a ClientApp of the Message API is sent and answers, as the strategies of flwr.serverapp have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedcore.errors import BadInput
from fedcore.learning.flower_apps.app_arrays import AppArrays, arrays_in
from fedcore.results import is_column

MOST_ROWS = (1 << 31) - 1
"""Of a site: indices of its rows are in memory."""


@dataclass(frozen=True)
class AppReply:
    """arrays: None of an evaluation. metrics: all but the weight; those of an evaluation only."""

    arrays: AppArrays | None
    metrics: Mapping[str, float]
    examples: int


class Messages(Protocol):
    """How a server of one of Flower's two APIs speaks with the app. weight_key: the name of the number of rows."""

    @property
    def weight_key(self) -> str: ...

    def content(self, kind: str, arrays: ArrayRecord, round_: int, *, alone: bool) -> RecordDict:
        """Of a message of a kind, train or evaluate. alone: to a party whose model is averaged with no other's."""
        ...

    def read(self, kind: str, content: RecordDict, where: str) -> AppReply:
        """A reply to it. Raises BadInput for one that no protected sum can hold."""
        ...


@dataclass(frozen=True)
class MessageApi:
    """The keys that a strategy uses, and what its messages' ConfigRecord holds beside `server-round`."""

    weight_key: str
    arrays_key: str
    config_key: str
    configs: Mapping[str, Mapping[str, Any]]

    def content(self, kind: str, arrays: ArrayRecord, round_: int, *, alone: bool) -> RecordDict:
        """The arrays and the config under the strategy's keys."""
        given = without_proximal(self.configs[kind]) if alone else self.configs[kind]
        config = ConfigRecord({**given, "server-round": round_})
        return RecordDict({self.arrays_key: arrays, self.config_key: config})

    def read(self, kind: str, content: RecordDict, where: str) -> AppReply:
        """One ArrayRecord after training, and one MetricRecord with the weight in it."""
        arrays = None
        if kind == "train":
            records = list(content.array_records.values())
            if len(records) != 1:
                raise BadInput(
                    f"{where}: found {len(records)} ArrayRecords in the reply, expected 1",
                    remedy='RecordDict({"arrays": ArrayRecord(...), "metrics": MetricRecord(...)})',
                )
            arrays = arrays_in(records[0], where)
        metrics = list(content.metric_records.values())
        found = dict(metrics[0]) if len(metrics) == 1 else {}
        shown = f"{len(metrics)} MetricRecords" if len(metrics) != 1 else ""
        examples = weight_in(found.pop(self.weight_key, None), self.weight_key, where, shown)
        return AppReply(arrays, {} if kind == "train" else numbers_in(found, where), examples)


def without_proximal(config: Mapping[str, Any]) -> dict[str, Any]:
    """FedProx's config for a party that trains alone: there is no model of others to stay near."""
    return {k: 0.0 if k in {"proximal-mu", "proximal_mu"} else v for k, v in config.items()}


def weight_in(found: object, key: str, where: str, shown: str = "") -> int:
    """The weight of a reply. Raises BadInput where it is no whole number of at least 1."""
    if not isinstance(found, int | float) or not 1 <= found <= MOST_ROWS or found != int(found):
        raise BadInput(
            f"{where}: found {shown or f'{key} = {found}'} in the reply, expected one MetricRecord with a whole number "
            f"{key!r} from 1 to {MOST_ROWS}",
            remedy=f'MetricRecord({{"{key}": len(dataset), ...}}): the weight of the site',
        )
    return int(found)


def numbers_in(metrics: Mapping[str, object], where: str) -> dict[str, float]:
    """The metrics of an evaluation, `loss` as `eval_loss`. Raises BadInput for one that is no single number."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if not isinstance(value, int | float):
            raise BadInput(
                f"{where}: found a {type(value).__name__} in the metric {name!r}, expected a number",
                remedy="one number a metric: a mean over the site's rows, whose sum over sites is protected",
            )
        column = f"eval_{name}" if is_column(name) else name
        if column in found or (column != name and column in metrics):
            raise BadInput(
                f"{where}: found metrics {name!r} and {column!r}, of which the first is called as the second here",
                remedy="report one of them under another name",
            )
        found[column] = float(value)
    return found
