"""FedProx, gradient clipping, AdamW, learning-rate schedules: what each setting does to local training."""

from __future__ import annotations

import math
from dataclasses import asdict, fields
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from fedcore.config import (
    TrainSection,
    build_job,
    plan_of,
    read_settings,
    settings_digest,
    wire_settings,
)
from fedcore.errors import BadInput, UnknownName
from fedcore.experiment.arms import Alone
from fedcore.experiment.prepare import job_for, prepare
from fedcore.learning.data.rows import ArrayRows
from fedcore.learning.model import FlatModel, build_model
from fedcore.learning.schedules import learning_rate
from fedcore.learning.task import Task
from fedcore.learning.training import local_train, make_optimiser
from fedcore.secagg.plan import (
    LR_SCHEDULES,
    UNCHANGED_SERVER,
    UNCHANGED_TRAINING,
    ModelShape,
    RoundPlan,
    TrainPlan,
    canonical,
)
from fedcore.types import SiteId

DECAYS = {"exponential": {"lr_decay": 0.5}, "step": {"lr_decay": 0.1, "lr_step_rounds": 3}}


def rows(count=24, seed=0):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(count, 3)).astype("f4"))
    return ArrayRows(x, torch.from_numpy(rng.integers(0, 2, count)))


class TwoHeads(nn.Module):
    """Of its two heads only one is used, so the other never gets a gradient from the loss."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x):
        return self.used(x)


def task(**changes):
    given = {
        "name": "settings",
        "data": lambda source: (rows(seed=source).x, rows(seed=source).y),
        "model": TwoHeads,
        "loss": nn.functional.cross_entropy,
        "sites": {"a": 1, "b": 2, "c": 3},
    }
    return Task(**given | changes)


def trained(plan, *, round_=1, rounds=10, **changes):
    """(parameters before, parameters after, report) of one site's round."""
    module = build_model(TwoHeads, 0, lambda _: None)
    flat = FlatModel(module)
    before = flat.read()
    report = local_train(
        task(**changes), module, rows(), plan, seed=0, round_=round_, rounds=rounds, site="a"
    )
    return before, flat.read(), report


def test_each_schedule_has_the_rates_of_its_formula():
    def rates(**settings):
        return [learning_rate(TrainPlan(lr=0.8, **settings), r, 8) for r in range(1, 9)]

    assert rates() == [0.8] * 8
    assert rates(lr_schedule="linear") == pytest.approx([0.8 - 0.1 * k for k in range(8)])
    cosine = [0.4 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert rates(lr_schedule="cosine") == pytest.approx(cosine)
    halved = rates(lr_schedule="exponential", lr_decay=0.5)
    assert halved == pytest.approx([0.8 * 0.5**k for k in range(8)])
    stepped = rates(lr_schedule="step", lr_decay=0.1, lr_step_rounds=3)
    assert stepped == pytest.approx([0.8] * 3 + [0.08] * 3 + [0.008] * 2)
    warm = rates(lr_schedule="linear", warmup_rounds=3)
    assert warm == pytest.approx([0.2, 0.4, 0.6, 0.8, 0.64, 0.48, 0.32, 0.16])


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 1, 4, 30])
@pytest.mark.parametrize("rounds", [1, 5, 12])
def test_a_rate_is_above_0_at_most_lr_and_never_rises_after_the_warm_up(schedule, warmup, rounds):
    plan = TrainPlan(lr=0.3, lr_schedule=schedule, warmup_rounds=warmup, **DECAYS.get(schedule, {}))
    rates = [learning_rate(plan, r, rounds) for r in range(1, rounds + 1)]
    assert all(0 < rate <= 0.3 for rate in rates)
    assert all(a < b for a, b in pairwise(rates[: warmup + 1]))
    assert all(a >= b for a, b in pairwise(rates[warmup:]))
    assert warmup or rates[0] == 0.3


@pytest.mark.parametrize("optimiser", ["sgd", "adam", "adamw"])
def test_a_round_trains_with_the_rate_of_its_schedule(optimiser):
    plan = TrainPlan(optimiser, lr=0.4, lr_schedule="exponential", lr_decay=0.5)
    for round_, rate in ((1, 0.4), (3, 0.1)):
        expected = trained(TrainPlan(optimiser, lr=rate), round_=round_)[1]
        np.testing.assert_array_equal(trained(plan, round_=round_)[1], expected)


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_fedprox_minimises_the_loss_plus_the_proximal_term(optimiser, momentum):
    """A slow obvious reference: the term is part of the loss, over all trainable parameters."""
    mu = 0.7
    plan = TrainPlan(optimiser, lr=0.2, momentum=momentum, epochs=3, batch_size=8, proximal_mu=mu)
    _, got, report = trained(plan)
    module = build_model(TwoHeads, 0, lambda _: None)
    start = [p.detach().clone() for p in module.parameters()]
    without = TrainPlan(optimiser, lr=0.2, momentum=momentum, batch_size=8)
    steps = make_optimiser(module, without)
    from fedcore.seeds import generator

    data, losses = rows(), []
    for epoch in range(3):
        order = generator(0, 1, "a", f"shuffle {epoch}").permutation(24)
        for x, y in data.batches(8, order):
            loss = nn.functional.cross_entropy(module(x), y)
            losses.append(loss.item())
            apart = sum(
                (p - s).square().sum() for p, s in zip(module.parameters(), start, strict=True)
            )
            steps.zero_grad()
            (loss + mu / 2 * apart).backward()
            steps.step()
    np.testing.assert_allclose(got, FlatModel(module).read(), atol=1e-6)
    assert report.loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_larger_mu_keeps_a_site_closer_to_the_released_model():
    moved = []
    for mu in (0.0, 0.5, 5.0):
        before, after, _ = trained(TrainPlan(lr=0.1, epochs=20, proximal_mu=mu))
        moved.append(np.linalg.norm(after - before))
    assert moved[0] > 1.3 * moved[1] > 1.3 * moved[2] > 0


def test_the_gradient_of_a_batch_is_scaled_to_the_largest_norm():
    plan = TrainPlan(lr=1.0, batch_size=24)
    before, free, _ = trained(plan)
    norm = float(np.linalg.norm(free - before))
    _, clipped, _ = trained(TrainPlan(lr=1.0, batch_size=24, max_grad_norm=norm / 4))
    np.testing.assert_allclose(clipped - before, (free - before) / 4, atol=1e-5)
    _, untouched, _ = trained(TrainPlan(lr=1.0, batch_size=24, max_grad_norm=norm * 4))
    np.testing.assert_array_equal(untouched, free)


def test_clipping_covers_the_proximal_term():
    """One norm of the whole gradient, as with the term in the loss."""
    plan = {"lr": 1.0, "batch_size": 8, "epochs": 3, "proximal_mu": 50.0, "max_grad_norm": 1e-3}
    before, after, _ = trained(TrainPlan(**plan))
    assert np.linalg.norm(after - before) <= 9 * 1e-3 * 1.001


def test_adamw_decays_weights_apart_from_the_gradient():
    """The unused head has no gradient, so Adam and AdamW leave it; of the used one the first step differs."""
    adam, adamw = (
        trained(TrainPlan(name, lr=0.1, weight_decay=0.5, batch_size=24))
        for name in ("adam", "adamw")
    )
    start, plain = adam[0], trained(TrainPlan("adam", lr=0.1, batch_size=24))[1]
    used = slice(0, 8)
    np.testing.assert_allclose(adamw[1][used], plain[used] - 0.1 * 0.5 * start[used], atol=1e-5)
    assert (adam[1][used] != adamw[1][used]).all()
    np.testing.assert_array_equal(trained(TrainPlan("adamw", lr=0.1, batch_size=24))[1], plain)


@pytest.mark.parametrize(
    ("settings", "value"),
    [
        ({"proximal_mu": 0.1}, "proximal_mu"),
        ({"max_grad_norm": 1.0}, "max_grad_norm"),
        ({"lr_schedule": "cosine"}, "lr"),
        ({"warmup_rounds": 2}, "lr"),
    ],
)
def test_a_task_with_its_own_train_reads_each_setting_or_is_refused(settings, value):
    seen = []

    def ignores(model, data, fit):
        seen.append(fit.epochs)

    def reads(model, data, fit):
        seen.append(getattr(fit, value))

    plan = TrainPlan(lr=0.4, **settings)
    (setting,) = settings
    with pytest.raises(BadInput) as refused:
        trained(plan, train=ignores)
    assert str(refused.value) == (
        f"train.{setting}: task 'settings' has a `train` of its own that did not read fit.{value}, "
        "so the setting has no effect"
    )
    assert refused.value.remedy == f"use fit.{value} in task.train, or leave {setting} out"
    for way in (reads, lambda model, data, fit: asdict(fit), lambda model, data, fit: vars(fit)):
        trained(plan, train=way)
    trained(TrainPlan(lr=0.4), train=ignores)


def test_own_train_gets_the_rate_of_the_round_and_the_number_of_rounds():
    seen = []

    def own(model, data, fit):
        seen.append((fit.lr, fit.round, fit.rounds, fit.proximal_mu, fit.max_grad_norm))

    plan = TrainPlan(lr=0.4, lr_schedule="linear", proximal_mu=0.2, max_grad_norm=3.0)
    trained(plan, round_=3, rounds=4, train=own)
    assert seen == [(pytest.approx(0.2), 3, 4, 0.2, 3.0)]


def test_arms_that_train_alone_have_the_schedule_and_no_proximal_term():
    seen = []

    def own(model, data, fit):
        seen.append((fit.site, fit.round, fit.lr, fit.proximal_mu))

    settings = {
        "protection": "plain", "rounds": 4, "lr": 0.4, "lr_schedule": "linear", "proximal_mu": 0.2,
    }  # fmt: skip
    for pooled, parties in ((True, [""]), (False, ["a", "b", "c"])):
        for train in (own, None):
            prepared = prepare(*job_for(task(train=train), settings))
            seen.clear()
            arm = Alone(prepared, prepared.sites, prepared.pooled() if pooled else None)
            arm.step(1), arm.step(3)
            if train is not None:
                expected = [
                    (party, round_, pytest.approx(rate), 0.0)
                    for round_, rate in ((1, 0.4), (3, 0.2))
                    for party in parties
                ]
                assert seen == expected
            else:
                without = prepare(*job_for(task(), settings | {"proximal_mu": 0.0}))
                other = Alone(without, without.sites, without.pooled() if pooled else None)
                other.step(1), other.step(3)
                same = [a.module.state_dict() for a in arm._own]
                for a, b in zip(same, (o.module.state_dict() for o in other._own), strict=True):
                    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_range_is_calibrated_at_the_full_rate_of_a_warm_up():
    """The range may grow to 4 times its first value only; a warm-up of 9 rounds grows updates tenfold."""

    def exceeding(**settings):
        prepared = prepare(*job_for(task(), {"protection": "plain", "lr": 0.4} | settings))
        site, state = prepared.federation.sites[0], prepared.federation.state
        return site.exceeding(prepared.plan, state)[1]

    assert exceeding(warmup_rounds=9) == exceeding()
    assert exceeding(warmup_rounds=9) != exceeding(lr=0.04)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"proximal_mu": -0.1}, "train.proximal_mu: found -0.1, expected greater than or equal to 0"),
        ({"max_grad_norm": 0}, "train.max_grad_norm: found 0, expected greater than 0"),
        ({"lr_decay": 1.5, "lr_schedule": "step"}, "train.lr_decay: found 1.5, expected less than or equal to 1"),
        ({"lr_schedule": "step", "lr_decay": 0.1, "lr_step_rounds": 0},
         "train.lr_step_rounds: found 0, expected greater than or equal to 1"),
        ({"warmup_rounds": -1}, "train.warmup_rounds: found -1, expected greater than or equal to 0"),
        ({"lr_schedule": "exponential"},
         "train.lr_decay: found none, expected a factor below 1 for lr_schedule 'exponential'"),
        ({"lr_schedule": "step", "lr_decay": 0.1},
         "train.lr_step_rounds: found none, expected the rounds between two steps of the rate"),
        ({"lr_decay": 0.9},
         "train.lr_decay: found 0.9 with lr_schedule 'constant', which has no decay"),
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_in_one_line(settings, message):
    with pytest.raises(BadInput) as refused:
        build_job(settings)
    assert str(refused.value) == message
    assert refused.value.remedy


def test_an_unknown_schedule_or_setting_is_refused_by_name():
    with pytest.raises(BadInput, match=r"train\.lr_schedule: found 'cosin', expected 'constant'"):
        build_job({"lr_schedule": "cosin"})
    with pytest.raises(UnknownName, match="lr_schedule"):
        TrainPlan(lr_schedule="cosin")
    with pytest.raises(UnknownName, match="proximal_mu"):
        build_job({"proximal_um": 0.1})


def plan(**settings):
    shape = ModelShape("t", "0" * 64, 8, 0, 0, "", ())
    return plan_of(build_job(settings), shape, tuple(map(SiteId, "abc")), 64)


def test_every_setting_of_training_is_in_the_plan_that_sites_check():
    later = {
        "proximal_mu": 0.1, "max_grad_norm": 2.0, "lr_schedule": "step", "lr_decay": 0.5,
        "lr_step_rounds": 4, "warmup_rounds": 2,
    }  # fmt: skip
    algorithms = [
        {"algorithm": "feddyn", "feddyn_alpha": 0.5}, {"algorithm": "ditto", "ditto_lambda": 0.5},
        {"local_parameters": ("weight",)}, {"frozen_parameters": ("weight",)},
    ]  # fmt: skip
    of_algorithms = {name for each in algorithms for name in each}
    assert later.keys() | of_algorithms == UNCHANGED_TRAINING.keys() - {"initial", "privacy"}
    for each in (later, *algorithms):
        found = plan(**each)
        assert found.to_json()["train"].items() >= each.items()
        assert RoundPlan.from_json(found.to_json()) == found
    for setting in ("proximal_mu", "max_grad_norm", "warmup_rounds"):
        assert plan(**{setting: later[setting]}).digest != plan().digest
    names = {each.name for each in fields(TrainPlan)}
    assert names - {"initial", "privacy"} == set(TrainSection.model_fields) - {"standardise"}


def test_every_constant_of_the_server_is_in_the_plan_that_sites_check():
    later = {"beta1": 0.5, "beta2": 0.6, "tau": 0.1, "correction": "none"}
    assert later.keys() == UNCHANGED_SERVER.keys()
    settings = {f"server_{name}": value for name, value in later.items()}
    found = plan(server="fedadam", **settings)
    assert found.to_json()["server"].items() >= later.items()
    assert RoundPlan.from_json(found.to_json()) == found
    for name, value in settings.items():
        assert plan(**{name: value}).digest != plan().digest
        job = build_job({name: value})
        assert build_job(read_settings(canonical(wire_settings(job)))).round == job.round
    with pytest.raises(BadInput, match=r"round\.server_tau"):
        build_job({"server_tau": 0.0})


def test_a_deployed_site_reads_the_training_of_the_job_from_what_travels():
    job = build_job({
        "optimiser": "adamw", "proximal_mu": 0.1, "max_grad_norm": 2.0, "lr_schedule": "step", "lr_decay": 0.5,
        "lr_step_rounds": 4, "warmup_rounds": 2, "buffers": "local",
    })  # fmt: skip
    there = build_job(read_settings(canonical(wire_settings(job))))
    assert (there.train, there.round) == (job.train, job.round)


def test_a_job_without_the_later_settings_has_the_digests_it_always_had():
    """So old runs resume, and sites of an older version take the job."""
    job = build_job({"rounds": 3})
    old = "b847ef63ff1b67bca71d47a4cbfb74a41ae3b3bdf77b4b45b9a1c08f7d953b46"
    assert settings_digest(job, 64) == old
    assert UNCHANGED_TRAINING.keys().isdisjoint(wire_settings(job)["train"])
    assert UNCHANGED_TRAINING.keys().isdisjoint(plan().to_json()["train"])
    assert UNCHANGED_SERVER.keys().isdisjoint(plan().to_json()["server"])
