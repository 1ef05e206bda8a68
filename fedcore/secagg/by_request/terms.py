"""What a run agrees on before it begins, what a site puts into a vector, and what follows from a sum.

Invariant: the numbers are those of a deployed job (`learning/site.py`, `learning/released.py`): the same weight,
rounding, range rule and float operations, so a run whose training is the same has the same bits.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import NoneType

import numpy as np

from fedcore.errors import BadInput, ImpossibleSum
from fedcore.learning.adaptive_range import exceedance_counts, exceeds
from fedcore.learning.optimisers import ServerState
from fedcore.learning.state import JobState, without_metrics
from fedcore.secagg import protections
from fedcore.secagg.encode.pack import Opened
from fedcore.secagg.encode.quantise import quantise
from fedcore.secagg.label import Terms, collusion
from fedcore.secagg.packing import solve_packing
from fedcore.secagg.plan import (
    EXCEEDS,
    METRIC,
    RangePlan,
    RoundHeader,
    RoundPlan,
    ServerPlan,
    TrainPlan,
    Wide,
    canonical,
)
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.secagg.purposes import trains
from fedcore.seeds import generator
from fedcore.store import container
from fedcore.types import Contribution, Json, SiteId, WideVector

METRIC_BITS = 20
"""Bits of the fixed-point form of a metric, between the two ends of its declared range."""


@dataclass(frozen=True)
class RunTerms:
    """What every site checks once and is bound to for the whole run; `plan` has the digest of the rest.

    metrics: {name: (low, high)} of the training metrics that are summed, clipped to their range. layout: hex
    SHA-256 of the names, types and shapes of the arrays. seed: of the rounding alone.
    """

    federation: str
    job: str
    plan: RoundPlan
    metrics: Mapping[str, tuple[float, float]]
    layout: str
    seed: int = 0

    @classmethod
    def make(
        cls,
        federation: str,
        job: str,
        sites: Sequence[SiteId],
        *,
        parameters: int,
        layout: str,
        rounds: int,
        max_examples: int,
        protection: str = "layered",
        cipher: str = "bfv",
        bits: int = 16,
        value_range: float | None = None,
        threshold: int = 0,
        metrics: Mapping[str, tuple[float, float]] | None = None,
        seed: int = 0,
    ) -> RunTerms:
        """Terms whose sums are proved exact. value_range: R of the quantiser, None to calibrate it before round 1.
        Raises PlanRefused, BadInput and UnknownName for what no run can have."""
        _require(
            int, rounds=rounds, max_examples=max_examples, bits=bits, threshold=threshold, seed=seed
        )
        _require(str, protection=protection, cipher=cipher, federation=federation)
        _require((int, float, NoneType), value_range=value_range)
        protections.refuse_unknown(protection)
        protections.refuse_plain(protection)
        try:
            declared = {
                str(name): (float(a), float(b)) for name, (a, b) in dict(metrics or {}).items()
            }
        except (TypeError, ValueError) as error:
            raise BadInput(
                f"metrics: found {metrics!r}, expected {{name: (low, high)}}", remedy=_ARGUMENTS
            ) from error
        _check_run(parameters, rounds, max_examples, declared)
        weight = max_examples.bit_length()
        sums = tuple(Wide(METRIC + name, 2, METRIC_BITS + weight) for name in declared)
        about = _settings(declared, layout, seed)
        plan = RoundPlan(
            task="flower", task_digest=layout, sites=tuple(sites), protection=protection,
            packing=solve_packing(bits, len(sites), protection, parameters, cipher=cipher),
            parameters=parameters, buffer_coordinates=0, max_examples=max_examples, rounds=rounds,
            train=TrainPlan(), server=ServerPlan(), range=RangePlan(value_range), metric_sums=sums,
            threshold=threshold, public_metrics=bool(sums), release="coordinator",
            settings=hashlib.sha256(canonical(about)).hexdigest(), cipher=cipher,
        )  # fmt: skip
        return cls(federation, job, plan, declared, layout, seed)

    def to_bytes(self) -> bytes:
        about = {"federation": self.federation, "job": self.job, "plan": self.plan.to_json()}
        return canonical(about | _settings(self.metrics, self.layout, self.seed))

    @classmethod
    def from_bytes(cls, data: bytes) -> RunTerms:
        """The inverse, with every proof made again. Raises BadInput and PlanRefused."""
        try:
            about = json.loads(data)
            metrics = {str(n): (float(low), float(high)) for n, (low, high) in about["metrics"]}
            plan = RoundPlan.from_json(about["plan"])
            protections.refuse_plain(plan.protection)
            found = cls(
                str(about["federation"]), str(about["job"]), plan, metrics, str(about["layout"]),
                int(about["seed"]),
            )  # fmt: skip
            settings = canonical(_settings(metrics, found.layout, found.seed))
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput("terms of the run: found bytes that are none") from error
        _check_run(plan.parameters, plan.rounds, plan.max_examples, metrics)
        sums = tuple(Wide(METRIC + n, 2, METRIC_BITS + plan.weight_bits) for n in metrics)
        same = plan.settings == hashlib.sha256(settings).hexdigest() and plan.metric_sums == sums
        if not same or plan.release != "coordinator" or plan.server != ServerPlan():
            raise BadInput("terms of the run: found a plan of other settings than those beside it")
        return found

    def contribution(
        self, state: RunState, header: RoundHeader, site: SiteId, trained: Trained
    ) -> Contribution:
        """The content of a site's vector for this round. Raises BadInput for NaN or infinity."""
        plan, update = self.plan, trained.update
        if len(update) != plan.parameters:
            raise BadInput(
                f"training: found {len(update)} values, expected {plan.parameters}",
                remedy="return the arrays that came, with their shapes",
            )
        weight = plan.weight_of(trained.examples)
        weighted = update * (weight / plan.max_examples)
        if not trains(header.purpose):
            counts = exceedance_counts(weighted.astype(np.float32))
            return np.zeros(0, dtype=np.uint64), {"exceeding": counts}
        rounding = generator(self.seed, header.training_round, site, "rounding")
        quantised = quantise(weighted, plan.packing.bits, state.bound, rounding)
        wides: Mapping[str, Sequence[int]] = {
            "weight": [weight],
            "over_range": [quantised.over],
            "over_half_range": [quantised.over_half],
            EXCEEDS: [int(exceeds(quantised.over, plan.coordinates))],
            **{METRIC + n: self._metric(n, weight, trained) for n in self.metrics},
        }
        # PROTOCOL H: metric sums of this cohort and of an earlier release would isolate few sites
        if state.job_state(plan).isolates(header.roster, 2 + collusion(Terms.of_plan(plan)).active):
            wides = without_metrics(plan, wides)
        return quantised.fields, wides

    def _metric(self, name: str, weight: int, trained: Trained) -> list[int]:
        """[weight times the fixed-point metric, weight]; zeros where this site has no such metric."""
        low, high = self.metrics[name]
        if name not in trained.metrics:
            return [0, 0]
        value = trained.metrics[name]
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise BadInput(
                f"training: metric {name!r}: found {value}, expected a finite number",
                remedy="one number a metric, over the site's rows; leave it out where it is undefined",
            )
        share = (min(max(value, low), high) - low) / (high - low)
        return [weight * round(share * ((1 << METRIC_BITS) - 1)), weight]

    def metric_means(self, opened: Opened) -> dict[str, float]:
        """The weighted means of the metrics in a sum; without those that no site has."""
        found = {}
        for name, (low, high) in self.metrics.items():
            total, weight = opened.wides[METRIC + name]
            if weight:
                found[name] = low + (high - low) * (total / (weight * ((1 << METRIC_BITS) - 1)))
        return found


def _settings(metrics: Mapping[str, tuple[float, float]], layout: str, seed: int) -> Json:
    return {
        "metrics": [[n, list(ends)] for n, ends in metrics.items()],
        "layout": layout,
        "seed": seed,
    }


_ARGUMENTS = "the arguments of SecureAggregation and of start: docs/flower.md"


def _require(kind: type | tuple[type, ...], **found: object) -> None:
    """Raise BadInput for a value of another type."""
    for what, value in found.items():
        if not isinstance(value, kind) or isinstance(value, bool):
            name = "a whole number" if kind is int else "a text" if kind is str else "a number"
            raise BadInput(f"{what}: found {value!r}, expected {name}", remedy=_ARGUMENTS)


def _check_run(
    parameters: int, rounds: int, examples: int, metrics: Mapping[str, tuple[float, float]]
) -> None:
    for what, found in (("parameters", parameters), ("rounds", rounds), ("max_examples", examples)):
        if not 1 <= found < 1 << 40:
            raise BadInput(f"{what}: found {found}, expected 1 to 2^40", remedy=_ARGUMENTS)
    for name, (low, high) in metrics.items():
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise BadInput(
                f"metrics: {name}: found {low} to {high}, expected a range", remedy=_ARGUMENTS
            )


@dataclass(frozen=True)
class Trained:
    """What training at a site gave. update: (d,) float64, local - global. examples: training rows."""

    update: WideVector
    examples: int
    metrics: Mapping[str, object]


@dataclass(frozen=True)
class RunState:
    """What follows from the releases so far, the same at every site: what state tags and certificates cover.

    mean: hex SHA-256 of the last released mean update. bound, first_bound: R and R_0. done: the last released step.
    shown: as in `JobState`.
    """

    bound: float
    first_bound: float
    mean: str = ""
    done: tuple[str, int] | None = None
    shown: tuple[tuple[SiteId, ...], ...] = ()

    @classmethod
    def initial(cls, plan: RoundPlan) -> RunState:
        start = plan.range.start or 0.0
        return cls(start, start)

    @property
    def step(self) -> PlannedRound | None:
        return None if self.done is None else PlannedRound(*self.done)

    def canonical(self) -> bytes:
        return canonical(
            {
                "bound": self.bound,
                "first_bound": self.first_bound,
                "mean": self.mean,
                "done": list(self.done) if self.done else None,
                "shown": [list(s) for s in self.shown],
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> RunState:
        """The inverse of `canonical`. Raises BadInput."""
        try:
            about = json.loads(data)
            done = about["done"]
            found = cls(
                float(about["bound"]), float(about["first_bound"]), str(about["mean"]),
                (str(done[0]), int(done[1])) if done else None,
                tuple(tuple(map(SiteId, each)) for each in about["shown"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput("state of the run: found bytes that are none") from error
        if found.canonical() != data:
            raise BadInput("state of the run: found another form than the canonical one")
        return found

    def job_state(self, plan: RoundPlan) -> JobState:
        """As the rules of a job take it: from a model of zeros a server step of FedAvg gives the mean update."""
        server = ServerState(np.zeros(plan.coordinates), {}, {}, self.bound, self.first_bound)
        return JobState(server, None, self.step, self.shown)

    def after(
        self, plan: RoundPlan, header: RoundHeader, opened: Opened, survivors: Sequence[SiteId]
    ) -> tuple[RunState, WideVector]:
        """The state that an opened sum leads to, and the (d,) float64 weighted mean update. Raises ImpossibleSum."""
        step = PlannedRound(header.purpose, header.training_round)
        found = self.job_state(plan).after(plan, step, opened, survivors)
        mean = found.server.parameters
        digest = hashlib.sha256(mean.astype("<f8").tobytes()).hexdigest()
        state = RunState(
            found.server.bound, found.server.first_bound, digest,
            (step.purpose, step.training_round), found.shown,
        )  # fmt: skip
        return state, mean


def sum_to_bytes(opened: Opened) -> bytes:
    """An opened sum as the sites give it to the coordinator: its integers, 4 bytes a coordinate."""
    wides = {name: list(values) for name, values in opened.wides.items()}
    return container.to_bytes([canonical(wides), opened.coordinates.astype("<u4").tobytes()])


def sum_from_bytes(data: bytes, plan: RoundPlan, purpose: str) -> Opened:
    """The inverse. Raises ImpossibleSum for anything else."""
    try:
        about, fields = container.from_bytes(data)
        wides = {str(name): list(map(int, values)) for name, values in json.loads(about).items()}
        coordinates = np.frombuffer(fields, dtype="<u4").astype(np.uint64)
    except (BadInput, TypeError, ValueError, AttributeError) as error:
        raise _no_sum("bytes that are none") from error
    if len(coordinates) != (plan.coordinates if trains(purpose) else 0):
        raise _no_sum(f"{len(coordinates)} coordinates")
    return Opened(coordinates, wides)


def _no_sum(found: str) -> ImpossibleSum:
    return ImpossibleSum("sum", found, "the integers of a released sum", "a site in the sum")
