"""The state of an unfinished run as bytes, and back. It has values only; reading it executes no code."""

import io
from typing import Any

import numpy as np
import torch


def to_bytes(state: Any) -> bytes:
    """Nested dicts, lists, tuples and numbers with NumPy arrays or tensors in them, to bytes."""
    buffer = io.BytesIO()
    torch.save(_to_tensors(state), buffer)
    return buffer.getvalue()


def from_bytes(data: bytes) -> Any:
    """The inverse of `to_bytes`; arrays come back as tensors. Loads weights only, never pickled code."""
    return torch.load(io.BytesIO(data), weights_only=True)


def _to_tensors(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, dict):
        return {key: _to_tensors(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_to_tensors(part) for part in value)
    return value
