"""Federated rounds in one process: every site, the coordinator, and real encoding and protection.

Read `Federation.round` first: train, quantise, pack, tag, protect, fold, open, check, dequantise,
apply, evaluate; each is one function in one file, and its inverse stands beside it.

Invariant: the opened sum is compared with the plain integer sum of the same fields, slot for slot, in
every round (`RoundOutcome.twin`), so "protection costs no accuracy" is measured and never assumed.
Nothing here knows of the other arms; `comparison/` runs them beside this one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedcore.aggregate.adaptive_range import (
    calibrated_bound,
    exceedance_counts,
    next_bound,
)
from fedcore.aggregate.optimisers import ServerState, apply_update
from fedcore.data.rows import Rows
from fedcore.data.statistics import Statistics, finish_statistics, site_sums, statistics_vector
from fedcore.encode.pack import Layout, Opened
from fedcore.encode.quantise import dequantise, quantise
from fedcore.errors import BadInput
from fedcore.learn.flat import FlatModel
from fedcore.learn.train import TrainReport, local_train
from fedcore.plan import Packing, RoundHeader, RoundPlan, VectorSpec
from fedcore.protect import Fold, Sealer
from fedcore.protect.plain import PlainFold, PlainSealer
from fedcore.protect.sumtag import SumTag, state_tag
from fedcore.seeds import generator
from fedcore.task import Task
from fedcore.types import Fields, FloatVector, SiteId, WideVector

STAGES = ("train", "encode", "protect", "fold", "unprotect", "evaluate")


class Stopwatch:
    """Seconds spent per stage, summed over sites and rounds."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start


@dataclass(frozen=True)
class SiteRows:
    """One site's rows, split, ready to train on: `index` is its place in the roster."""

    id: SiteId
    index: int
    train: Rows
    test: Rows


@dataclass(frozen=True)
class ProtectedTotal:
    """One opened sum. twin is the plain integer sum of the same fields; bytes are per site."""

    opened: Opened
    twin: Opened
    bytes_up: int
    bytes_down: int


Contribution = tuple[int, Fields, Mapping[str, Sequence[int]]]
"""(site index, coordinate fields, wide integers by name)."""


class KeyEpoch:
    """The sites' secrets and the fold's public parameters of one job, held in one process.

    Under `encrypted` every site would hold the same secrets; here one sealer stands for all of them,
    with fresh randomness in every ciphertext.
    """

    def __init__(self, job: str, protection: str, packing: Packing, plan_digest: str) -> None:
        self.job, self.packing, self.plan_digest = job, packing, plan_digest
        self.sealer: Sealer
        if protection == "plain":
            self._group = None
            self.sealer = PlainSealer(packing)
            self._new_fold: Callable[[int], Fold] = lambda slots: PlainFold(packing, slots)
        else:
            from fedcore.protect.bfv import (
                EncryptedFold,
                EncryptedSealer,
                PublicContext,
                SecretContext,
            )

            public = PublicContext.of(packing)
            secret = SecretContext(public)
            self._group = secret.group
            self.sealer = EncryptedSealer(secret)
            self._new_fold = lambda slots: EncryptedFold(public, slots)

    def protected_sum(
        self,
        spec: VectorSpec,
        round_: int,
        roster: Sequence[SiteId],
        contributions: Iterator[Contribution],
        state: bytes,
        watch: Stopwatch,
    ) -> ProtectedTotal:
        """The sum of what the sites contribute, through packing, tag, protection and fold.

        state: canonical bytes of what the vectors started from; it is bound into the tag.
        Raises TagRefused or ChunkRefused, with nothing of the sum used.
        """
        layout = Layout(spec, self.packing, len(roster))
        header = RoundHeader(self.job, round_, spec.stage, tuple(roster), self.plan_digest)
        tag = self._tag(header, round_, state)
        fold = self._new_fold(layout.slots)
        twin = np.zeros(layout.slots, dtype=np.uint64)
        survivors: list[int] = []
        bytes_up = 0
        for index, coordinates, wides in contributions:
            with watch("encode"):
                slots = layout.pack(coordinates, wides, index)
                twin += slots
            with watch("protect"):
                if tag is not None:
                    layout.put_tag(slots, tag.tag(slots[: layout.tagged_slots], roster[index]))
                chunks = list(self.sealer.protect(slots))
            with watch("fold"):
                for place, chunk in enumerate(chunks):
                    fold.add(place, chunk)
            bytes_up = sum(map(len, chunks))
            survivors.append(index)
        with watch("fold"):
            released = list(fold.total())
        with watch("unprotect"):
            total = self.sealer.open(released, layout.slots)
            if tag is not None:
                tagged = total[: layout.tagged_slots]
                tag.check(tagged, layout.read_tag(total), [roster[i] for i in survivors])
            opened = layout.unpack(total, survivors)
        same = np.array_equal(total[: layout.tagged_slots], twin[: layout.tagged_slots])
        plain = opened if same else layout.unpack(twin, survivors)
        return ProtectedTotal(opened, plain, bytes_up, sum(map(len, released)))

    def _tag(self, header: RoundHeader, round_: int, state: bytes) -> SumTag | None:
        if self._group is None:
            return None
        return SumTag(self._group, header, state_tag(self._group, self.job, round_, state))


def federated_statistics(
    epoch: KeyEpoch,
    sites: Sequence[SiteRows],
    max_examples: int,
    watch: Stopwatch,
    *,
    allow_few_sites: bool,
) -> tuple[Statistics, ProtectedTotal]:
    """Means and spreads of the table's features over all sites' training rows (PROTOCOL W)."""
    first: Any = sites[0].train
    names, ranges = first.names, first.ranges

    def contributions() -> Iterator[Contribution]:
        for site in sites:
            with watch("encode"):
                features = site.train.features
                assert features is not None
                sums = site_sums(features, ranges)
            yield site.index, np.empty(0, dtype=np.uint64), sums

    total = epoch.protected_sum(
        statistics_vector(len(names), max_examples),
        0,
        [s.id for s in sites],
        contributions(),
        b"",
        watch,
    )
    found = finish_statistics(names, ranges, total.opened.wides, allow_few_sites=allow_few_sites)
    return found, total


@dataclass(frozen=True)
class RoundOutcome:
    """What a round leaves: the new state, its twin from the plain integer sum, and the measurements."""

    state: ServerState
    twin: ServerState
    reports: tuple[TrainReport, ...]
    clipped: int
    bytes_up: int
    bytes_down: int
    metric_sums: Mapping[str, list[int]]


@dataclass
class Federation:
    """The sites and the coordinator of one federated run.

    metric_sums: `metric_sums(site, state)`, the wide integers of a site's metrics of the model the
    round starts from (they ride in the round's vector). statistics: canonical bytes of the federated
    statistics, which the state tag covers with the rest of what a site starts from.
    """

    task: Task
    plan: RoundPlan
    epoch: KeyEpoch
    sites: Sequence[SiteRows]
    flat: FlatModel
    seed: int
    metric_sums: Callable[[SiteRows, ServerState], Mapping[str, Sequence[int]]]
    statistics: bytes = b""
    watch: Stopwatch = field(default_factory=Stopwatch)

    def update_of(
        self, site: SiteRows, model: FloatVector, round_: int
    ) -> tuple[FloatVector, TrainReport]:
        """Train at one site: update = local - global, (d,) float32. Raises BadInput on NaN or infinity."""
        with self.watch("train"):
            self.flat.write(model)
            report = local_train(
                self.task, self.flat.module, site.train, self.plan.train,
                seed=self.seed, round_=round_, site=site.id,
            )  # fmt: skip
            update = self.flat.read() - model
        if not np.isfinite(update).all():
            bad = int(np.count_nonzero(~np.isfinite(update)))
            raise BadInput(
                f"site {site.id}, round {round_}: found NaN or infinity in {bad} of {len(update)} "
                "coordinates of the update, expected finite numbers",
                remedy="lower train.lr, or look for unscaled or missing values in the site's data",
            )
        return update, report

    def weighted(self, update: FloatVector, site: SiteRows) -> WideVector:
        """The update times examples / max_examples, so that a weighted mean is one sum (float64)."""
        return update.astype(np.float64) * (len(site.train) / self.plan.max_examples)

    def calibrate(self, state: ServerState) -> float:
        """R_0 from protected counts over 24 powers of two; sites train round 1 again afterwards."""

        def contributions() -> Iterator[Contribution]:
            for site in self.sites:
                update, _ = self.update_of(site, state.model, 1)
                counts = exceedance_counts(self.weighted(update, site).astype(np.float32))
                yield site.index, np.empty(0, dtype=np.uint64), {"exceeding": counts}

        total = self._sum(self.plan.range_vector, 0, contributions(), state)
        values = len(self.sites) * self.plan.coordinates
        return calibrated_bound(total.opened.wides["exceeding"], values, self.plan.range)

    def round(self, state: ServerState, round_: int) -> RoundOutcome:
        """One round from `state`: every arrow of the way of one update, in order."""
        plan, reports = self.plan, []

        def contributions() -> Iterator[Contribution]:
            for site in self.sites:
                update, report = self.update_of(site, state.model, round_)
                reports.append(report)
                with self.watch("encode"):
                    rounding = generator(self.seed, round_, site.id, "rounding")
                    quantised = quantise(
                        self.weighted(update, site), plan.packing.bits, state.bound, rounding
                    )
                wides = {
                    "weight": [len(site.train)],
                    "over_range": [quantised.over],
                    "over_half_range": [quantised.over_half],
                    **self.metric_sums(site, state),
                }
                yield site.index, quantised.fields, wides

        total = self._sum(plan.update_vector, round_, contributions(), state)
        with self.watch("unprotect"):
            released = self.apply(state, total.opened)
            twin = released if total.twin is total.opened else self.apply(state, total.twin)
        wides = total.opened.wides
        names = [wide.name for wide in plan.metric_sums]
        return RoundOutcome(
            released, twin, tuple(reports), wides["over_range"][0], total.bytes_up, total.bytes_down,
            {name: wides[name] for name in names},
        )  # fmt: skip

    def apply(self, state: ServerState, opened: Opened) -> ServerState:
        """From the released integers to the next state: dequantise, weighted mean, server step, range."""
        contributors = len(self.sites)
        sums = dequantise(opened.coordinates, self.plan.packing.bits, state.bound, contributors)
        mean = sums * (self.plan.max_examples / opened.wides["weight"][0])
        moved = apply_update(state, mean, self.plan.parameters, self.plan.server)
        bound = next_bound(
            state.bound,
            opened.wides["over_range"][0],
            opened.wides["over_half_range"][0],
            contributors * self.plan.coordinates,
            self.plan.range,
        )
        return ServerState(moved.parameters, moved.moments, moved.scalars, bound)

    def final_metrics(self, state: ServerState, round_: int) -> Mapping[str, list[int]]:
        """The protected metrics-only round after the last one: the metric sums of the final model."""

        def contributions() -> Iterator[Contribution]:
            for site in self.sites:
                yield site.index, np.empty(0, dtype=np.uint64), self.metric_sums(site, state)

        return self._sum(self.plan.metrics_vector, round_, contributions(), state).opened.wides

    def _sum(
        self,
        spec: VectorSpec,
        round_: int,
        contributions: Iterator[Contribution],
        state: ServerState,
    ) -> ProtectedTotal:
        roster = [site.id for site in self.sites]
        return self.epoch.protected_sum(
            spec, round_, roster, contributions, state.canonical() + self.statistics, self.watch
        )
