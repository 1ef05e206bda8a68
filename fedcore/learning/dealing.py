"""Other partitions of a task whose sites are given: the rows of all of them, dealt again.

Invariant: a partition is a function of the sites' rows, their order and (by, n, alpha, seed); every row is at one site.
"""

from collections.abc import Mapping
from typing import Any

from fedcore.errors import BadInput
from fedcore.learning.data.loading import load_rows
from fedcore.learning.data.partition import split
from fedcore.learning.data.rows import Rows, pool
from fedcore.learning.model import seeded
from fedcore.learning.task import Task
from fedcore.types import SiteId

NATURAL = "natural"
"""The partition that leaves the sites as they are."""


def dealt(
    task: Task,
    sites: Mapping[str, Any],
    *,
    by: str = "iid",
    n: int | None = None,
    alpha: float | None = None,
    seed: int = 0,
) -> Mapping[str, Any]:
    """{site id: its rows}: those of all `sites` together, dealt to `n` sites by one of the ways of `split`; n: by
    default as many as there are. `natural` gives `sites` back.

    Raises BadInput where rows must stay together or the task brings its own test rows, and as `split`.
    """
    if by == NATURAL:
        given = {"n": n, "alpha": alpha, "seed": seed or None}
        if wrong := next((key for key, value in given.items() if value is not None), None):
            raise BadInput(
                f"sites.{wrong}: found {given[wrong]} beside by = 'natural', expected none",
                remedy="the task's own sites are no choice; by = 'iid' deals their rows anew",
            )
        return sites
    parts: list[Rows] = []
    for name, source in sites.items():
        with seeded(0, 0, SiteId(name), "data"):  # as where the site itself is loaded
            rows, test = load_rows(task, source, name)
        if test is not None or rows.groups is not None:
            why = "a test part of its own" if test is not None else "rows that belong together"
            raise BadInput(
                f"sites.by: found {by!r} and {why} at site {name}, expected rows that can be dealt one by one",
                remedy="leave out [sites], or give the task a `sites` function that deals them",
            )
        parts.append(rows)
    found: dict[str, Any] = split(
        pool(parts), len(parts) if n is None else n, by, alpha=alpha, seed=seed
    )
    return found
