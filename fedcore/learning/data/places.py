"""Which of a site's rows came into which part: the site's own split again, over the numbers of the rows.

Invariant: a split goes by the labels and groups of rows and by their number, so rows that hold their place in place of
inputs are divided alike. A keyed split of a deployed site goes by the rows themselves and has no places here.
"""

import torch

from fedcore.learning.data.kinds import Indices
from fedcore.learning.data.rows import ArrayRows, Rows
from fedcore.learning.data.split import FoldSplit, ValidationPart, capped, divided


def places(
    whole: tuple[Rows, Rows | None],
    split: FoldSplit,
    site: str,
    cap: int | None,
    validation: ValidationPart | None,
) -> dict[str, Indices]:
    """{part: (rows,) int64} of `train`, `test` and, where one is kept apart, `validation`.

    whole: what the task returned, with the test part that it brought or None; places in `test` then count there.
    """
    rows, test = _numbered(whole[0]), None if whole[1] is None else _numbered(whole[1])
    taken, own = capped(split, rows, test, site, cap)
    parts = zip(
        ("train", "test", "validation"), divided(split, taken, own, site, validation), strict=True
    )
    return {name: part.x.numpy() for name, part in parts if isinstance(part, ArrayRows)}


def _numbered(rows: Rows) -> ArrayRows:
    """As many rows with the same labels and groups, each with its place as input."""
    labels = rows.labels()
    unknown = torch.full((len(rows),), 0.5)  # no class
    targets = unknown if labels is None else torch.from_numpy(labels)
    return ArrayRows(torch.arange(len(rows)), targets, None, rows.groups)
