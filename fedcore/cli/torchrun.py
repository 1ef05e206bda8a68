"""`fedcore simulate` as one of several processes that torchrun starts.

Invariant: only rank 0 prints and writes. The others say nothing of what rank 0 says: an error in their part is raised
by it, by name.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedcore.errors import EXIT_INTERRUPTED, BadInput, FedcoreError

if TYPE_CHECKING:
    from fedcore.cli.flags import Settings
    from fedcore.experiment.api import OnReady
    from fedcore.experiment.loop import OnRound, OnStep
    from fedcore.experiment.run import Run

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def started() -> bool:
    """Whether torchrun, or what sets the same environment, started this process."""
    return all(os.environ.get(name) for name in _ENVIRONMENT)


def follows() -> bool:
    """Whether this is another rank than 0."""
    return started() and os.environ["RANK"] != "0"


@dataclass(frozen=True)
class Asked:
    """A run's settings, and the flags that mean something else for several processes."""

    layers: Callable[[], list[Settings]]
    out: Path | None
    force: bool
    workers: int | None
    resume: Path | None

    def settings(self) -> list[Settings]:
        """Raises BadInput where a flag has no meaning here."""
        again = "the same command goes on with the run in --out from its last whole round"
        if self.resume is not None:
            raise BadInput("--resume: found it under torchrun, expected --out", remedy=again)
        if self.workers is not None:
            raise BadInput(
                f"--workers: found {self.workers} under torchrun, whose processes are the workers, expected none",
                remedy=f"torchrun --nproc-per-node {self.workers}",
            )
        if self.force:
            raise BadInput(
                "--force: found it under torchrun, where a restart would replace what was done, expected none",
                remedy=f"remove the former run yourself; {again}",
            )
        if self.out is None:
            raise BadInput("--out: found none under torchrun, expected a folder", remedy=again)
        return self.layers()


def lead(
    asked: Asked, say: Callable[[str], None], on_round: OnRound, on_step: OnStep, on_ready: OnReady
) -> Run:
    """Rank 0's part."""
    from fedcore.experiment.ranked_run import agreed
    from fedcore.experiment.ranked_run import lead as led
    from fedcore.learning.ranks import Ranks

    ranks = Ranks()
    prepared = agreed(ranks, asked.settings, say)
    assert asked.out is not None
    return led(ranks, prepared, asked.out, on_round=on_round, on_step=on_step, on_ready=on_ready)


def follow(asked: Asked) -> None:
    """The part of every other rank, until rank 0 has the result. Exits with the code of what ended it before."""
    from fedcore.experiment.leader import follow as followed
    from fedcore.experiment.ranked_run import agreed
    from fedcore.learning.ranks import Ranks

    ranks = Ranks()
    try:
        prepared = agreed(ranks, asked.settings, lambda _: None)
        federation = prepared.federation
        followed(ranks, federation.executor, federation.sites, prepared.plan)
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except FedcoreError as error:
        with suppress(FedcoreError, KeyboardInterrupt):
            ranks.broadcast(None)  # ends with rank 0: torchrun stops all as soon as one has failed
        sys.exit(error.exit_code)
