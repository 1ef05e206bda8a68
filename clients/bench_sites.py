"""Sites for `fedcore bench engine`: the real site with a stand-in for training, one or many in a process.

Journal, spool, session and protection are those of `fed-site run`; only the content of a vector is not.
Invariant: torch is not imported here, so memory and seconds of such a process are the engine's.
"""

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # before it is imported

import numpy as np
from fedcore_clients.app import Papers, Site, opened
from fedcore_clients.config import SiteConfig, read_config
from fedcore_clients.trainer import Loaded

from fedcore.errors import FedcoreError
from fedcore.identity.identities import read_roster
from fedcore.identity.roster import PinnedRoster
from fedcore.learning.state import JobState
from fedcore.secagg.plan import EXCEEDS, ModelShape, RoundPlan, Wide
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.secagg.purposes import purpose_of
from fedcore.seeds import generator
from fedcore.types import Contribution, Fields, Json, SiteId

NO_COORDINATES = np.empty(0, dtype=np.uint64)
ROWS = Wide("bench rows", 1, 16)
"""What its metrics-only round carries: a vector must hold something."""


class Drawn:
    """A contributor whose update is drawn once and sent in every round."""

    def __init__(self, site: SiteId, parameters: int) -> None:
        self._site, self._parameters = site, parameters
        self._fields: Fields | None = None

    async def load(self, _job: str, _settings: Json, task: str, digest: str) -> Loaded:
        """A model of so many parameters, all 0, without columns."""
        shape = ModelShape(task, digest, self._parameters, 0, 0, "bench", (ROWS,))
        return Loaded(shape, (), np.zeros(self._parameters, dtype=np.float32), "0" * 64)

    async def contribute(
        self, _job: str, plan: RoundPlan, step: PlannedRound, *_: object
    ) -> Contribution:
        """The drawn fields, or the metrics of no model."""
        if not purpose_of(step.purpose).vector(plan, 0).coordinates:
            return NO_COORDINATES, {ROWS.name: [1]}
        if self._fields is None:
            rng = generator(0, 1, self._site, "bench fields")
            self._fields = rng.integers(
                1, 1 << plan.packing.bits, self._parameters, dtype=np.uint64
            )
        counts = {"weight": [1], "over_range": [0], "over_half_range": [0], EXCEEDS: [0]}
        return self._fields, {**counts, ROWS.name: [1]}

    async def track(self, *_: object) -> None:
        """There is no accuracy to measure."""

    async def export(self, _job: str, state: JobState) -> bytes:
        """There is no module: the bare state."""
        return state.to_bytes()

    async def forget(self, job: str) -> None:
        """Nothing is held of a job."""


async def _run(configs: Sequence[SiteConfig], parameters: int) -> None:
    stop = asyncio.Event()
    for each in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(each, stop.set)
    with contextlib.ExitStack() as stack:
        sites = [_site(config, parameters, stack) for config in configs]
        await asyncio.gather(*(site.run(stop) for site in sites))


def _site(config: SiteConfig, parameters: int, stack: contextlib.ExitStack) -> Site:
    kit = config.read_kit()
    papers = Papers(kit, PinnedRoster(read_roster(config.roster)), config.read_identity())
    context = stack.enter_context(opened(config, papers))
    return Site(config, kit, context, Drawn(context.id, parameters))


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -P -m fedcore_clients.bench_sites --config site.toml [--config ...] --parameters N`."""
    parser = argparse.ArgumentParser(prog="fedcore_clients.bench_sites")
    parser.add_argument("--config", type=Path, action="append", required=True)
    parser.add_argument("--parameters", type=int, required=True)
    asked = parser.parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    try:
        asyncio.run(_run([read_config(path) for path in asked.config], asked.parameters))
    except FedcoreError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    if "torch" in sys.modules:
        sys.stderr.write("error: found torch imported, expected a site without it\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
