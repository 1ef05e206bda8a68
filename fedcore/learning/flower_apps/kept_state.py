"""What an app keeps at a site between rounds (Context.state) as plain values, for a checkpoint, and back."""

from __future__ import annotations

from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

Plain = dict[str, Any]
"""{record: [kind, its values]}: numbers, texts, bytes and lists of them."""

_OF_VALUES: dict[str, type[ConfigRecord | MetricRecord]] = {
    "config": ConfigRecord,
    "metric": MetricRecord,
}


def to_plain(state: RecordDict) -> Plain:
    """The records of a state, none left out."""
    found: Plain = {}
    for name, record in state.items():
        if isinstance(record, ArrayRecord):
            arrays = [[k, a.dtype, list(a.shape), a.stype, a.data] for k, a in record.items()]
            found[name] = ["array", arrays]
        else:
            kind = "config" if isinstance(record, ConfigRecord) else "metric"
            found[name] = [kind, [[key, value] for key, value in record.items()]]
    return found


def from_plain(plain: Plain) -> RecordDict:
    """The inverse of `to_plain`."""
    state = RecordDict()
    for name, (kind, values) in plain.items():
        if kind == "array":
            arrays = {
                k: Array(dtype, tuple(shape), stype, data)
                for k, dtype, shape, stype, data in values
            }
            state[name] = ArrayRecord(arrays)
        else:
            state[name] = _OF_VALUES[kind](dict(values))
    return state
