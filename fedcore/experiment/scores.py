"""The scores of every test row and the rows of every part, for analyses of one's own: `scores.npz`, on request.

An archive of NumPy arrays, read by `numpy.load(path)["SITE/federated"]`. For each site:

- `SITE/train`, `SITE/test` and, where the job keeps one apart, `SITE/validation`: (rows,) int64, places in what
  `task.data(source)` returned; of a task that brings a test part, `test` counts in that part;
- `SITE/targets`: (n,) float64 or int64, of the test rows in the order of `SITE/test`; absent without test rows;
- `SITE/ARM`: (n,) or (n, C) float64, the outputs of that arm's model as its metrics get them.

Invariant: the arrays are those that the run's metrics were computed from. They say something of single rows, so the
file stays where the simulation ran; nothing of a deployed job is kept like this.
"""

import io
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fedcore.errors import BadInput
from fedcore.experiment.arms import Scoring
from fedcore.experiment.prepare import Prepared
from fedcore.learning.data.kinds import Indices
from fedcore.learning.data.places import places
from fedcore.learning.data.split import FoldSplit, ValidationPart
from fedcore.learning.site import LoadedSite
from fedcore.learning.task import Task

FILE = "scores.npz"


def refuse_unscored(task: Task) -> None:
    """Raise BadInput for a task that evaluates itself: no output of a single row is known."""
    if task.evaluate is not None:
        raise BadInput(
            f"track.keep_scores: found a task with its own evaluate ({task.name}), expected outputs of each row",
            remedy="leave it out, or let the task name built-in metrics in place of its evaluate",
        )


def scores_file(prepared: Prepared, scorings: Mapping[str, Scoring]) -> bytes:
    """The bytes of `scores.npz`. scorings: of each arm, one for each site."""
    found: dict[str, NDArray[np.generic]] = {}
    for loaded in prepared.loaded:
        site = loaded.rows
        found |= {f"{site.id}/{part}": rows for part, rows in _places(prepared, loaded).items()}
        for arm, scoring in scorings.items():
            if (scored := scoring[site.index]) is not None:
                found[f"{site.id}/targets"] = scored.targets
                found[f"{site.id}/{arm}"] = scored.outputs
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **found)
    return buffer.getvalue()


def _places(prepared: Prepared, loaded: LoadedSite) -> dict[str, Indices]:
    run, share, cap = (
        prepared.job.run,
        prepared.job.round.validate,
        prepared.job.protect.max_examples,
    )
    apart = None if share is None else ValidationPart(share, run.seed, run.fold)
    split, site = FoldSplit(run.seed, run.fold, run.folds), loaded.rows
    found = places(loaded.whole, split, site.id, cap, apart)
    parts = {"train": site.train, "test": site.test, "validation": site.validation}
    assert {name: len(part) for name, part in parts.items() if part is not None} == {
        name: len(indices) for name, indices in found.items()
    }
    return found
