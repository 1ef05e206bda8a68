"""What a site keeps from round to round under an algorithm, and never sends.

Invariant: what training made in a round is in use exactly where that round was released with this site in its sum.
The states of a job say in which round's sum each site was last (`JobState.summed`), so nothing is decided here, and a
site that was restarted, or missed the release, finds the same. The bytes are safetensors: nothing in them is code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedcore.errors import BadInput
from fedcore.learning.rules.parts import Values
from fedcore.types import FloatVector

_ROUND, _VALUE, _MADE = "round", "value.", "made."


@dataclass(frozen=True)
class KeptValues:
    """values: by name, as of the last released round that this site was in. made: what training in `round` made of
    them; 0 before the first."""

    values: Values = field(default_factory=dict)
    round: int = 0
    made: Values = field(default_factory=dict)

    def at(self, summed: int) -> Values:
        """The values where the last sum with this site is of the training round `summed`, 0 for none."""
        return self.made if 0 < self.round == summed else self.values

    def settled(self) -> KeptValues:
        """After a release with this site in the sum."""
        return KeptValues(self.made)

    def to_bytes(self) -> bytes:
        """b"" where nothing is kept."""
        if not (self.values or self.made):
            return b""
        parts = {_VALUE + name: value for name, value in self.values.items()}
        parts |= {_MADE + name: value for name, value in self.made.items()}
        return save({**parts, _ROUND: np.array([self.round], dtype=np.int64)})

    @classmethod
    def from_bytes(cls, data: bytes) -> KeptValues:
        """The inverse of `to_bytes`. Raises BadInput for anything else."""
        if not data:
            return cls()
        try:
            parts = load(data)
            return cls(_named(parts, _VALUE), int(parts[_ROUND][0]), _named(parts, _MADE))
        except (SafetensorError, LookupError, TypeError, ValueError) as error:
            raise BadInput("kept values of a site: found bytes that are none") from error


def _named(parts: Mapping[str, FloatVector], prefix: str) -> Values:
    return {
        name.removeprefix(prefix): value.astype(np.float32)
        for name, value in parts.items()
        if name.startswith(prefix)
    }
