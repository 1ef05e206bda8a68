"""The processes of one run under torchrun, on one machine or several: `torch.distributed` over TCP (gloo).

Invariant: all ranks make the same calls of a `Ranks` in the same order, and each call ends only with the others' part
in it. Where a process is gone, the calls of the others raise `RankLost`, which nothing but a new start repairs.
Nothing here is encrypted or authenticated, and objects are pickled: the network between the ranks is a private one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from fedcore.errors import BadInput, RankLost
from fedcore.learning.data.rows import ArrayRows
from fedcore.learning.site import SiteRows
from fedcore.types import Fields

T = TypeVar("T")

JOIN = timedelta(minutes=10)
"""How long a rank waits for all others to start."""

LONGEST = timedelta(hours=24)
"""The longest wait inside a call, while rank 0 trains the arms that only it has. A process that ends is noticed at
once, and a machine that falls silent by torchrun."""


class Ranks:
    """One process's part: its rank, 0 the one that leads, and how many there are."""

    def __init__(self, *, wait: timedelta = JOIN) -> None:
        """Meet the others, by the environment that torchrun makes. Raises BadInput where they do not come."""
        try:
            found = rendezvous("env://", timeout=wait)
            store, self.rank, self.count = next(found)
            # torchrun keeps its store over a restart, and in it the addresses of the processes that ended.
            start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            store = PrefixStore(f"fedcore, start {start}", store)
            dist.init_process_group(
                "gloo", store=store, rank=self.rank, world_size=self.count, timeout=wait
            )
            self._group = dist.new_group(timeout=LONGEST)
        except (RuntimeError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise BadInput(
                f"torchrun: found ranks that do not meet within {wait.total_seconds():.0f} s ({first}), expected all",
                remedy="the same --nnodes, --nproc-per-node and --rdzv-endpoint on every machine, and open ports "
                "between them; GLOO_SOCKET_IFNAME names the network interface",
            ) from error

    def broadcast(self, value: T | None = None) -> T:
        """What rank 0 gives."""
        held = [value]
        with _linked():
            dist.broadcast_object_list(held, src=0, group=self._group)
        return cast("T", held[0])

    def gather(self, value: T) -> list[T]:
        """What every rank gives, in their order; empty but at rank 0."""
        found = cast("list[T]", [None] * self.count) if self.rank == 0 else None
        with _linked():
            dist.gather_object(value, found, dst=0, group=self._group)
        return found or []

    def exchange(self, value: T) -> list[T]:
        """What every rank gives, in their order, for all of them."""
        found = cast("list[T]", [None] * self.count)
        with _linked():
            dist.all_gather_object(found, value, group=self._group)
        return found

    def add(self, fields: Fields) -> Fields:
        """The sum of every rank's (d,) uint64, modulo 2^64, at rank 0; elsewhere nothing that has a meaning."""
        total = torch.from_numpy(fields.view(np.int64).copy())
        with _linked():
            dist.reduce(total, dst=0, group=self._group)
        return total.numpy().view(np.uint64)

    def close(self) -> None:
        """Leave; what the others still wait for raises at them."""
        dist.destroy_process_group()


@contextmanager
def _linked() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankLost(
            f"torchrun: another rank of this run has ended ({str(error).splitlines()[0]})",
            remedy="torchrun --max-restarts 3 starts all of them again; the same command goes on from the last whole "
            "round in --out",
        ) from error


def rows_digest(sites: Sequence[SiteRows]) -> str:
    """SHA-256 of the rows of all sites that are in memory; of others, which are read one by one, of their number."""
    found = hashlib.sha256()
    for site in sites:
        for part in (site.train, site.test, site.validation):
            found.update(f"{0 if part is None else len(part)},".encode())
            if isinstance(part, ArrayRows) and len(part):
                for tensor in (part.x, part.y):
                    found.update(tensor.detach().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()
