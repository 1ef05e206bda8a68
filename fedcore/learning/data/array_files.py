"""Arrays in files: the new rows of a task whose `data` gives arrays."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import BadInput
from fedcore.learning.data.columns import read_columns

ENDINGS = (".npy", ".npz", ".parquet", ".pq")


def read_array(path: Path) -> NDArray[Any]:
    """The array in a .npy file, in a .npz file (the only one, or the one called x), or of all columns of a
    .parquet file in their order: (rows, ...). Raises BadInput; pickled objects are not read."""
    if not path.is_file():
        raise BadInput(f"predict: found no file {path}")
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise BadInput(
            f"predict: found {path.name}, expected a path ending in .npy, .npz or .parquet: the model takes arrays",
            remedy="np.save('rows.npy', rows) writes one",
        )
    if ending in (".parquet", ".pq"):
        return np.stack([np.asarray(values) for values in read_columns(path).values()], axis=1)
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            return found
        names = list(found.files)
        chosen = [name for name in names if len(names) == 1 or name.lower() == "x"]
        if len(chosen) == 1:
            return np.asarray(found[chosen[0]])
    except (OSError, ValueError, EOFError) as error:
        raise BadInput(
            f"{path.name}: found no readable array ({type(error).__name__})",
            remedy="np.save('rows.npy', rows) writes one; objects are not read",
        ) from error
    raise BadInput(
        f"{path.name}: found the arrays {', '.join(names)}, expected one, or one called x"
    )
