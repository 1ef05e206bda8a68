"""Plans with noise in their sums: the proof of room, what is refused, and the noise in the sum itself."""

import math
from dataclasses import replace

import numpy as np
import pytest

from fedcore.config import build_job, plan_of
from fedcore.errors import BadInput, PlanRefused
from fedcore.secagg import plan as plans
from fedcore.secagg.crypto.entropy import OsEntropy
from fedcore.secagg.encode.quantise import dequantise
from fedcore.secagg.label import Terms, label_of, leaving_of
from fedcore.secagg.privacy.mechanism import with_noise
from fedcore.secagg.privacy.privacy_plan import PrivacyPlan, solve_grid
from fedcore.seeds import generator

SITES = ("a", "b", "c", "d")


def plan_for(parameters=30, buffers=0, sites=SITES, max_examples=320, **settings):
    job = build_job({"epsilon": 3, "rounds": 20, **settings})
    shape = plans.ModelShape("t", "0" * 64, parameters, buffers, 0, "", ())
    return plan_of(job, shape, sites, max_examples)


@pytest.mark.parametrize("parameters", [1, 30, 1000, 20_000])
@pytest.mark.parametrize("max_examples", [10, 320, 5000])
@pytest.mark.parametrize("epsilon", [0.5, 3, 20])
def test_every_field_of_an_accepted_plan_has_room_for_rows_and_noise(
    parameters, max_examples, epsilon
):
    privacy = PrivacyPlan.calibrated(epsilon, 1e-6, 20, clip=1.0, unit="record", colluders=1)
    try:
        grid = solve_grid(privacy, coordinates=parameters, shares=3, units=max_examples, bits=20)
    except PlanRefused:
        assert (
            max_examples * parameters > 10_000
        )  # a plan of few rows or coordinates always has room
        return
    assert max_examples * grid.clip_units + 1 + grid.reach <= (1 << 19) - 1
    assert grid.sigma >= 4
    assert grid.sensitivity >= grid.clip_units + math.sqrt(parameters)
    assert grid.rounding <= 1 / 8
    # t - c shares together are the noise that the accounting assumes.
    assert grid.sigma * math.sqrt(2) == pytest.approx(privacy.noise_multiplier * grid.sensitivity)


def test_plan_with_privacy_survives_json_and_is_proved_again():
    plan = plan_for()
    assert plans.RoundPlan.from_json(plan.to_json()) == plan
    for change in ({"noise_multiplier": 1.0}, {"colluders": 3}, {"epsilon": -1.0}):
        found = plan.to_json()
        found["train"]["privacy"] = found["train"]["privacy"] | change
        with pytest.raises((PlanRefused, BadInput)):
            plans.RoundPlan.from_json(found)
    with pytest.raises(PlanRefused, match="range: found"):
        replace(plan, range=replace(plan.range, start=plan.range.start * 1.01))


def test_plan_without_privacy_says_nothing_of_it():
    plan = plan_for(epsilon=None)
    assert "privacy" not in str(plan.to_json())
    assert "privacy" not in build_job({}).to_json()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"protection": "plain"}, "protect.protection"),
        ({"protection": "encrypted"}, "protect.protection"),
        ({"standardise": "federated"}, "train.standardise"),
        ({"public_metrics": True, "protection": "masked"}, "track.public_metrics"),
        ({"epochs": 2}, "train.epochs"),
        ({"algorithm": "scaffold", "threshold": 4}, "train.algorithm"),
        ({"algorithm": "feddyn"}, "train.algorithm"),
        ({"optimiser": "adam"}, "train.optimiser"),
        ({"momentum": 0.9}, "train.momentum"),
        ({"proximal_mu": 0.1}, "train.proximal_mu"),
        ({"max_grad_norm": 1.0}, "train.max_grad_norm"),
        ({"lr_schedule": "cosine"}, "train.lr_schedule"),
        ({"warmup_rounds": 2}, "train.warmup_rounds"),
        ({"buffers": 2}, "model"),
        ({"colluders": 3}, "privacy.colluders"),
        ({"delta": 1 / 1280}, "privacy.delta"),
        ({"unit": "site"}, "privacy.unit"),
        ({"bits": 12}, "protect.bits"),
    ],
)  # fmt: skip
def test_what_would_leave_without_noise_or_have_no_effect_is_refused_by_name(settings, named):
    with pytest.raises(PlanRefused, match=f"^{named}: found") as refused:
        plan_for(**settings)
    assert refused.value.remedy


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"epsilon": 0}, "privacy.epsilon"),
        ({"epsilon": -1}, "privacy.epsilon"),
        ({"epsilon": 101}, "privacy.epsilon"),
        ({"delta": 0}, "privacy.delta"),
        ({"clip": 0}, "privacy.clip"),
        ({"colluders": -1}, "privacy.colluders"),
        ({"unit": "person"}, "privacy.unit"),
        ({"range": 0.5}, "protect.range"),
        ({"epsilon": None, "clip": 2.0}, "privacy.clip: found it without privacy.epsilon"),
    ],
)
def test_bad_settings_are_refused_with_their_path(settings, found):
    with pytest.raises(BadInput, match=found):
        build_job({"epsilon": 3, **settings})


def test_site_level_refusal_predicts_the_noise():
    with pytest.raises(PlanRefused, match=r"expected 100 sites or more: with noise multiplier \d"):
        plan_for(unit="site")


def test_label_and_leaving_lines_state_the_bound():
    job = build_job({"epsilon": 3})
    terms = Terms.of_job(job, 4)
    said = label_of(terms)
    assert len(said.splitlines()) <= 8
    assert "epsilon 3 at delta 1e-05, adding or removing one" in said
    assert "only differential privacy bounds that" not in said
    assert "any other site" in said
    alone = label_of(replace(terms, privacy=replace(terms.privacy, colluders=0)))
    assert "any other site" not in alone  # a site knows its own share of the noise
    leaves = "\n".join(leaving_of(job, terms))
    assert "clipped gradients" in leaves
    assert "range" not in leaves and "metrics (" not in leaves


def test_sum_of_fields_is_the_sum_of_gradients_and_of_all_shares():
    """The noise in the opened sum has the standard deviation that was accounted for, and no bias."""
    plan = plan_for(parameters=4000, lr=0.5)
    grid, privacy = plan.noise_grid, plan.privacy
    totals = [np.full(plan.coordinates, 3.0 * k) for k in range(3)]
    fields = [
        with_noise(total, plan, generator(0, 1, site, "rounding"), OsEntropy())
        for site, total in zip(SITES, totals, strict=False)
    ]
    opened = dequantise(sum(fields), plan.packing.bits, plan.range.start, 3)
    scale = -plan.train.lr / plan.max_examples
    noise = opened / scale - sum(totals)
    sigma = privacy.noise_multiplier * privacy.clip * grid.sensitivity / grid.clip_units
    assert noise.std() == pytest.approx(sigma * math.sqrt(3 / 2), rel=0.06)
    assert abs(noise.mean()) < 5 * noise.std() / math.sqrt(len(noise))


def test_noise_is_another_one_in_a_second_vector_of_the_same_round():
    plan = plan_for()
    total = np.zeros(plan.coordinates)
    one, other = (
        with_noise(total, plan, generator(0, 1, "a", "rounding"), OsEntropy()) for _ in range(2)
    )
    assert (one != other).any()
