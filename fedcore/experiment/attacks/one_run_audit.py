"""The audit of differential privacy in one run: an empirical epsilon that the accounted one must not be below.

Each of m canaries is put in or left out by a fair coin. Whoever sees the noisy sums guesses which, for the canaries
that it is surest of; more right guesses than randomised response of some epsilon allows prove that the mechanism's is
larger (Steinke, Nasr, Jagielski 2023, arXiv:2305.08846, theorem 5.2 with delta). Held against Gaussian noise, which is
what is accounted for, they prove more: that bound, in `gaussian_bound.py`, is the figure, and the other one beside it.

`step`: the noise and the protected round alone, with the worst canaries there are, gradients of the clip norm along
coordinates of their own, and another site as the adversary, which takes its own vector off. `training`: rows of one
site, and an adversary who knows every other row, over all rounds of the job.
"""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedcore.config import plan_of
from fedcore.experiment.attacks.gaussian_bound import epsilon_of, mu_bound
from fedcore.experiment.attacks.scene import Scene
from fedcore.experiment.prepare import job_for, prepare
from fedcore.learning.model import single_thread
from fedcore.learning.private_gradients import clipped_rows, clipped_sum
from fedcore.learning.stopwatch import Stopwatch
from fedcore.results import AttackRow
from fedcore.secagg.crypto.entropy import Entropy, OsEntropy
from fedcore.secagg.encode.quantise import dequantise
from fedcore.secagg.in_process import sum_engine
from fedcore.secagg.plan import EXCEEDS, ModelShape, RoundPlan
from fedcore.secagg.privacy.mechanism import with_noise
from fedcore.secagg.summing import one_by_one
from fedcore.seeds import generator
from fedcore.types import Contribution, Fields, SiteId, WideVector

Mechanism = Callable[[WideVector, RoundPlan, np.random.Generator, Entropy], Fields]
"""As `with_noise`."""

CONFIDENCE = 0.95

_MEASURE = "empirical epsilon, lower bound"

EPSILON, DELTA = 4.0, 1e-5
"""Of the step, where the job has none of its own."""

_ROSTER = tuple(SiteId(name) for name in ("a", "b", "c", "d"))

_CANARIES = 3000
"""Of one site in `step`; three sites have them."""

_ROWS = 200
"""Canaries in `training`, at most."""

_NOT_SHOWN = (
    "A lower bound: the true epsilon may be larger, up to the accounted one, and one run gives less than many would. "
    "Above the accounted epsilon it would prove a fault. It takes the noise for Gaussian, as its account does; "
    "`epsilon_of_any_noise` does not, and is lower."
)


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The largest probability of so many right guesses under any mechanism with this epsilon and delta."""
    from scipy.special import gammaln

    q = 1 / (1 + math.exp(-epsilon))
    k = np.arange(guesses + 1)
    logs = gammaln(guesses + 1) - gammaln(k + 1) - gammaln(guesses - k + 1)
    mass = np.exp(logs + k * math.log(q) + (guesses - k) * (math.log1p(-q) if q < 1 else -math.inf))
    beta = float(mass[right:].sum())
    just_below = np.cumsum(mass[:right][::-1])  # P(right - i <= guessed < right), i = 1, 2, ...
    alpha = float((just_below / np.arange(1, right + 1)).max(initial=0.0))
    return min(1.0, beta + 2 * canaries * delta * alpha)


def epsilon_bound(canaries: int, guesses: int, right: int, delta: float) -> float:
    """The largest epsilon that is refuted at a confidence of 95 %; 0 where none is."""

    def refuted(epsilon: float) -> bool:
        return p_value(canaries, guesses, right, epsilon, delta) < 1 - CONFIDENCE

    if not refuted(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while refuted(high) and high < 64:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if refuted(middle) else (low, middle)
    return low


def guessed(scores: WideVector, inside: NDArray[np.bool_], each: int) -> int:
    """How many are right where the `each` highest scores are guessed in and the lowest out."""
    order = np.argsort(scores, kind="stable")
    return int(inside[order[-each:]].sum() + (~inside[order[:each]]).sum())


def guesses_for(canaries: int, mu: float, rng: np.random.Generator) -> int:
    """How many of each side to guess, chosen on rehearsals with a Gaussian of this mu, before the audit."""
    sizes = np.unique(np.geomspace(5, canaries // 2, 16).astype(int))
    found = np.zeros(len(sizes))
    for _ in range(5):
        inside = rng.random(canaries) < 0.5
        scores = rng.normal(size=canaries) + mu * inside
        found += [
            mu_bound(canaries, 2 * size, guessed(scores, inside, size)) for size in sizes.tolist()
        ]
    return int(sizes[found.argmax()])


def step(scene: Scene) -> Iterator[AttackRow]:
    """One round of the mechanism, calibrated for one round."""
    own = scene.job.privacy
    yield audited_step(own.epsilon or EPSILON, own.delta if own.epsilon else DELTA, scene.seed)


def audited_step(
    epsilon: float, delta: float, seed: int, *,
    mechanism: Mechanism = with_noise, entropy: Entropy | None = None,
) -> AttackRow:  # fmt: skip
    """The audit of one protected round with noise. mechanism: what is audited. entropy: of the noise, by default the
    operating system's."""
    plan = _plan_of_step(epsilon, delta)
    privacy, size = plan.privacy, plan.parameters
    assert privacy is not None
    inside = generator(seed, 1, "", "audit coins").random(size) < 0.5
    sent: dict[int, Fields] = {}

    def contribute(index: int) -> Contribution:
        total = np.zeros(size)
        if index:  # the first site looks on
            mine = slice((index - 1) * _CANARIES, index * _CANARIES)
            total[mine] = -privacy.clip * inside[mine]
        rounding = generator(seed, 1, plan.sites[index], "rounding")
        sent[index] = mechanism(total, plan, rounding, entropy or OsEntropy())
        return sent[index], {
            "weight": [plan.max_examples], "over_range": [0], "over_half_range": [0], EXCEEDS: [0],
        }  # fmt: skip

    engine = sum_engine(uuid.uuid4().hex, plan)
    total = engine.sum(plan.update_vector, 1, one_by_one(contribute), b"audit", Stopwatch())
    bound = plan.range.start
    assert bound is not None
    opened = dequantise(
        total.opened.coordinates - sent[0], plan.packing.bits, bound, len(total.survivors) - 1
    )
    scores = -opened / privacy.scale(plan.train.lr, plan.max_examples)
    mu = 1 / privacy.noise_multiplier
    each = guesses_for(size, mu, generator(seed, 0, "", "audit rehearsal"))
    return _row("audit-step", plan, f"epsilon {epsilon:g}, one round", scores, inside, each)


def _plan_of_step(epsilon: float, delta: float) -> RoundPlan:
    """Four sites of which all have to take part, and one may collude: the sum less its share has exactly the noise
    that is accounted."""
    layer = {
        "protect.protection": "masked", "round.rounds": 1, "privacy.epsilon": epsilon, "privacy.delta": delta,
        "protect.bits": 24, "train.lr": 1.0, "protect.threshold": len(_ROSTER),
    }  # fmt: skip
    _, job = job_for(None, layer)
    size = _CANARIES * (len(_ROSTER) - 1)
    shape = ModelShape("audit", "0" * 64, size, 0, 0, "", ())
    return plan_of(job, shape, _ROSTER, _CANARIES)


def training(scene: Scene) -> Iterator[AttackRow]:
    """All rounds of the job, on rows of its first site."""
    if scene.job.privacy.epsilon is None:
        yield AttackRow(
            "audit-training", "another site", "all sums", scene.job.protect.protection, "", 0, _MEASURE,
            refused="the job has no differential privacy, so there is no epsilon to audit (--epsilon 3)",
        )  # fmt: skip
        return
    if scene.job.privacy.unit != "record" or scene.job.privacy.sample_rate != 1:
        yield AttackRow(
            "audit-training", "another site", "all sums", scene.job.protect.protection, "", 0, _MEASURE,
            refused="canaries are single rows of every round, expected privacy.unit = 'record' and no samples",
        )  # fmt: skip
        return
    with single_thread():
        yield _audited_training(scene)


def _audited_training(scene: Scene) -> AttackRow:
    prepared = prepare(scene.task, scene.job)
    federation, plan = prepared.federation, prepared.plan
    privacy = plan.privacy
    assert privacy is not None
    honest = list(federation.sites)
    site = honest[0].site
    rng = generator(scene.seed, 0, site.id, "audit coins")
    picked = rng.permutation(len(site.train))[:_ROWS]
    inside = rng.random(len(picked)) < 0.5
    kept = np.setdiff1d(np.arange(len(site.train)), picked[~inside])
    federation.sites = [
        replace(honest[0], site=replace(site, train=site.train.take(kept))),
        *honest[1:],
    ]
    known = np.setdiff1d(np.arange(len(site.train)), picked)
    canaries = honest[0].standard_rows(federation.state).train.take(picked)
    sure = honest[0].standard_rows(federation.state).train.take(known)
    bound, likeness, seen = plan.range.start, np.zeros((len(picked),) * 2), np.zeros(len(picked))
    assert bound is not None

    def gradients(rows: object, name: str, round_: int) -> WideVector:
        total, _ = clipped_sum(
            scene.task, prepared.flat.module, rows,  # type: ignore[arg-type]
            clip=privacy.clip, unit="record", seed=scene.seed, round_=round_, site=name,
        )  # fmt: skip
        return total

    for round_ in range(1, plan.rounds + 1):
        start = federation.state
        opened = federation.advance().total
        total = dequantise(
            opened.opened.coordinates, plan.packing.bits, bound, len(opened.survivors)
        )
        rest = -total / privacy.scale(plan.train.lr, plan.max_examples)
        prepared.flat.write(start.server.model)
        for other in opened.survivors[1:]:
            trainer = honest[other]
            rest -= gradients(trainer.standard_rows(start).train, trainer.site.id, round_)
        rest -= gradients(sure, site.id, round_)
        each = clipped_rows(
            scene.task, prepared.flat.module, canaries,
            clip=privacy.clip, seed=scene.seed, round_=round_, site=site.id,
        )  # fmt: skip
        likeness += each @ each.T
        seen += each @ (rest - each.sum(axis=0) / 2)
    # The mean of what is in, given the sums: canaries whose gradients are alike are weighed together.
    shares = len(plan.sites) / (plan.threshold - privacy.colluders)
    noise = shares * (privacy.noise_multiplier * privacy.clip) ** 2
    covariance = likeness / 4 + noise * np.eye(len(picked))
    scores = np.asarray(np.linalg.solve(covariance, seen), dtype=np.float64)
    guesses = guesses_for(
        len(picked), math.sqrt(plan.rounds) / privacy.noise_multiplier,
        generator(scene.seed, 0, "", "audit rehearsal"),
    )  # fmt: skip
    return _row("audit-training", plan, f"{plan.rounds} rounds", scores, inside, guesses)


def _row(
    name: str,
    plan: RoundPlan,
    setting: str,
    scores: WideVector,
    inside: NDArray[np.bool_],
    each: int,
) -> AttackRow:
    privacy = plan.privacy
    assert privacy is not None
    right, accounted = guessed(scores, inside, each), privacy.spent(plan.rounds)
    mu = mu_bound(len(inside), 2 * each, right)
    found = epsilon_of(mu, privacy.delta)
    shape_free = epsilon_bound(len(inside), 2 * each, right, privacy.delta)
    shows = (
        f"{right} of {2 * each} guesses about {len(inside):,} canaries are right: of Gaussian noise epsilon is at "
        f"least {found:.2f} with a confidence of 95 %; {accounted:.2f} is accounted for."
    )
    if found > accounted:
        shows += " The noise is too small, or its account is wrong."
    return AttackRow(
        name, "another site", "all sums", plan.protection, setting, len(inside), _MEASURE,
        found, found, None, 0.0, found > 0,
        {
            "accounted_epsilon": accounted, "delta": privacy.delta, "share_of_accounted": found / accounted,
            "guesses": 2.0 * each, "right": float(right), "mu": mu, "epsilon_of_any_noise": shape_free,
        },
        shows,
        _NOT_SHOWN,
    )  # fmt: skip
