"""Named arrays as one flat vector and back, and their digests: what an engine's model is to a round.

Floating arrays travel, in the order of their names' first appearance; arrays of integers and booleans stay as the
coordinator has them (counters of batches, for example), and everything else is refused.
"""

import hashlib
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import BadInput
from fedcore.secagg.plan import canonical
from fedcore.types import WideVector

Arrays = Mapping[str, NDArray[np.generic]]


def travels(array: NDArray[np.generic]) -> bool:
    """Whether an array is part of updates."""
    return array.dtype.kind == "f"


def layout_of_arrays(arrays: Arrays) -> str:
    """Hex SHA-256 of names, types and shapes. Raises BadInput for an array that is not of numbers, and where none
    has floats."""
    for name, array in arrays.items():
        if array.dtype.kind not in "fiub":
            raise BadInput(
                f"array {name!r}: found values of type {array.dtype}, expected numbers",
                remedy="send the model's numeric arrays only",
            )
    if not any(map(travels, arrays.values())):
        raise BadInput(f"arrays: found {len(arrays)} and none with floats, expected at least one")
    about = [[name, str(a.dtype), list(a.shape)] for name, a in arrays.items()]
    return hashlib.sha256(canonical({"arrays": about})).hexdigest()


def count(arrays: Arrays) -> int:
    """d: values that travel."""
    return sum(array.size for array in arrays.values() if travels(array))


def digest_of_arrays(arrays: Arrays, records: Mapping[str, Mapping[str, object]]) -> bytes:
    """32 bytes over every array and the records of settings that the training function gets, of plain values."""
    settings = {f"{n}.{key}": value for n, each in records.items() for key, value in each.items()}
    found = hashlib.sha256(b"fedcore/1 arrays")
    found.update(bytes.fromhex(layout_of_arrays(arrays)))
    found.update(canonical({name: [type(v).__name__, repr(v)] for name, v in settings.items()}))
    for array in arrays.values():
        whole = np.ascontiguousarray(array)
        found.update(whole.astype(whole.dtype.newbyteorder("<")).tobytes())
    return found.digest()


def difference(local: Arrays, start: Arrays) -> WideVector:
    """(d,) float64, local - start in the arrays' own type: an update. Raises BadInput for other names, shapes or kinds
    of numbers, and for NaN or infinity."""
    require_same(local, start, "training")
    parts = [
        np.asarray(local[name].astype(array.dtype) - array, dtype=np.float64).reshape(-1)  # type: ignore[operator]
        for name, array in start.items()
        if travels(array)
    ]
    update: WideVector = np.concatenate(parts)
    if not np.isfinite(update).all():
        raise BadInput(
            "training: found NaN or infinity in the update, expected finite numbers",
            remedy="lower the learning rate, or look for NaN in the data",
        )
    return update


def require_same(found: Arrays, expected: Arrays, where: str) -> None:
    """Raise BadInput where names or shapes are others, or values that travel are no floats any more."""
    for name in (*expected, *found):
        pair = [_about(arrays.get(name)) for arrays in (found, expected)]
        if name in found and name in expected and not travels(expected[name]):
            pair = [str(arrays[name].shape) for arrays in (found, expected)]
        if pair[0] != pair[1]:
            raise BadInput(
                f"{where}: array {name!r}: found {pair[0]}, expected {pair[1]}",
                remedy="the same names, shapes and types as came: the state dict of the model whose arrays came",
            )


def _about(array: NDArray[np.generic] | None) -> str:
    if array is None:
        return "none"
    return f"shape {array.shape} of {'floats' if travels(array) else array.dtype}"


def moved(start: Arrays, update: WideVector) -> dict[str, NDArray[np.generic]]:
    """The arrays with an update added in float64; what does not travel is unchanged."""
    found: dict[str, NDArray[np.generic]] = {}
    at = 0
    for name, array in start.items():
        if travels(array):
            part = update[at : at + array.size].reshape(array.shape)
            found[name] = np.asarray(array.astype(np.float64) + part)
            at += array.size
        else:
            found[name] = array
    return found


def cast_like(arrays: Arrays, kinds: Arrays) -> dict[str, NDArray[np.generic]]:
    """The arrays in the types that the run began with; what does not travel is as it was there."""
    return {
        name: arrays[name].astype(kind.dtype) if travels(kind) else kind
        for name, kind in kinds.items()
    }
