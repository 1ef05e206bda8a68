"""Words and conventions everything else relies on.

- A **model** is one flat vector: parameters first, then the floating buffers that travel with it.
- An **update** is `local - global`, `(d,) float32`: what to ADD to the global model.
- A **weight** is the training examples behind an update, in steps of the plan, an int >= 1.
- A **slot** is one uint64 below 2^60 holding k fields; a **chunk** is the bytes of one transport unit.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NewType

import numpy as np
from numpy.typing import NDArray

SiteId = NewType("SiteId", str)

FloatVector = NDArray[np.float32]
"""(d,) float32: a model or an update."""

WideVector = NDArray[np.float64]
"""(d,) float64: optimiser state and dequantised aggregates (PROTOCOL F)."""

Fields = NDArray[np.uint64]
"""(m,) uint64, each a field value below 2^bits (or below n * 2^bits in a sum)."""

Slots = NDArray[np.uint64]
"""(s,) uint64, each below 2^slot_bits: k fields side by side."""

Contribution = tuple[Fields, Mapping[str, Sequence[int]]]
"""(coordinate fields, wide integers by name) of one site: the content of its vector."""

Json = dict[str, Any]
"""A JSON object on its way to or from disk."""

ARMS = ("centralised", "local_only", "federated_float", "federated")
"""The runs that are compared, on equal seeds, splits and budgets."""
