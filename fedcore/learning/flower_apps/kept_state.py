"""What an app keeps at its sites between rounds (Context.state) as bytes, for a checkpoint or a journal, and back.

The form is safetensors: a text of JSON, and the content of each array and byte string. Nothing in it is code.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedcore.errors import BadInput

MOST_KEPT = 1 << 30
"""Bytes of one site's Context.state: every round writes them to the site's disk."""

_TEXT = "about"
_OF_VALUES: dict[str, type[ConfigRecord | MetricRecord]] = {
    "config": ConfigRecord,
    "metric": MetricRecord,
}


@dataclass
class KeptState:
    """One site's Context.state: before and after the last round that it trained; round 0: it has trained none."""

    round: int = 0
    before: RecordDict = field(default_factory=RecordDict)
    after: RecordDict = field(default_factory=RecordDict)


def to_bytes(nodes: Mapping[int, KeptState]) -> bytes:
    """The states by node id; b"" where no app has anything there."""
    if not any(each.before or each.after for each in nodes.values()):
        return b""
    parts: list[bytes] = []

    def place_of(value: bytes) -> dict[str, int]:
        parts.append(value)
        return {"part": len(parts) - 1}

    about = [[k, s.round, _plain(s.before), _plain(s.after)] for k, s in nodes.items()]
    text = json.dumps(about, default=place_of).encode()
    named = {_TEXT: text} | {str(place): part for place, part in enumerate(parts)}
    return save({name: np.frombuffer(part, np.uint8) for name, part in named.items()})


def from_bytes(data: bytes) -> dict[int, KeptState]:
    """The inverse of `to_bytes`. Raises BadInput for other bytes."""
    if not data:
        return {}
    try:
        parts = {name: part.tobytes() for name, part in load(data).items()}
        about = json.loads(parts[_TEXT], object_hook=lambda found: parts[str(found["part"])])
        return {
            int(node): KeptState(int(round_), _records(before), _records(after))
            for node, round_, before, after in about
        }
    except (SafetensorError, LookupError, TypeError, ValueError) as error:
        raise BadInput(
            "Context.state: found bytes that are no kept state of a Flower app"
        ) from error


def require_bounded(state: RecordDict, where: str) -> None:
    """Raise BadInput for a state that is too large to be kept."""
    size = sum(record.count_bytes() for record in state.values())
    if size > MOST_KEPT:
        raise BadInput(
            f"{where}: found {size:,} bytes left in Context.state, expected at most {MOST_KEPT:,}: a site writes them "
            "to its disk in every round",
            remedy="keep there what the next round needs, and data in files of the site",
        )


def _plain(state: RecordDict) -> list[Any]:
    """[name, kind, values] of each record, none left out."""
    found: list[Any] = []
    for name, record in state.items():
        if isinstance(record, ArrayRecord):
            arrays = [[k, a.dtype, list(a.shape), a.stype, a.data] for k, a in record.items()]
            found.append([name, "array", arrays])
        else:
            kind = "config" if isinstance(record, ConfigRecord) else "metric"
            found.append([name, kind, [[key, value] for key, value in record.items()]])
    return found


def _records(plain: list[Any]) -> RecordDict:
    state = RecordDict()
    for name, kind, values in plain:
        if kind == "array":
            arrays = {k: Array(d, tuple(shape), stype, data) for k, d, shape, stype, data in values}
            state[name] = ArrayRecord(arrays)
        else:
            state[name] = _OF_VALUES[kind](dict(values))
    return state
