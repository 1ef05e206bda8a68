"""Plans with noise in their sums: the proof of room, what is refused, and the noise in the sum itself."""

import math
from dataclasses import replace

import numpy as np
import pytest

from fedcore.config import PrivacySection, build_job, plan_of
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
    privacy = PrivacyPlan.asked(PrivacySection(epsilon=epsilon, delta=1e-6)).calibrated(20)
    try:
        grid = solve_grid(privacy, coordinates=parameters, threshold=3, units=max_examples, bits=20)
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
        ({"epsilon": 60}, "privacy.epsilon"),
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
        ({"noise": "none"}, "privacy.noise"),
        ({"noise": "site", "colluders": 2}, "privacy.colluders: found 2 with privacy.noise 'site'"),
        ({"sample_rate": 0}, "privacy.sample_rate"),
        ({"sample_rate": 1.1}, "privacy.sample_rate"),
        ({"validate": 0.2, "keep": "best"}, "round.keep: found 'best' with privacy.epsilon"),
        ({"validate": 0.2, "patience": 3}, "round.patience: found 3 with privacy.epsilon"),
        ({"metric_share": 1}, "privacy.metric_share: found 1"),
        ({"epsilon": None, "metric_share": 0.2}, "privacy.metric_share: found it without privacy"),
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
    assert "with this site's share of the noise in it, and zeros in the place of counts" in leaves
    other = build_job({"epsilon": 3, "noise": "site", "sample_rate": 0.5})
    leaves = "\n".join(leaving_of(other, Terms.of_job(other, 4)))
    assert "each taken with probability 0.5, with noise that is enough alone in it" in leaves
    whole = build_job({"epsilon": 3, "noise": "site", "unit": "site", "protection": "encrypted"})
    assert "the clipped update of this site's training" in "\n".join(
        leaving_of(whole, Terms.of_job(whole, 100))
    )


def test_sum_of_fields_is_the_sum_of_gradients_and_of_all_shares():
    """The noise in the opened sum has the standard deviation that was accounted for, and no bias."""
    plan = plan_for(parameters=4000, lr=0.5)
    grid, privacy = plan.noise_grid, plan.privacy
    totals = [np.full(plan.coordinates, 3.0 * k) for k in range(3)]  # minus sums of gradients
    fields = [
        with_noise(total, plan, generator(0, 1, site, "rounding"), OsEntropy())
        for site, total in zip(SITES, totals, strict=False)
    ]
    opened = dequantise(sum(fields), plan.packing.bits, plan.range.start, 3)
    scale = privacy.scale(plan.train.lr, plan.max_examples)
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


# ---------------------------------------------------------------- noise of each site, samples, sites as units


def test_noise_of_each_site_is_enough_alone_and_needs_no_masks():
    in_sum, each = plan_for(), plan_for(noise="site", protection="plain")
    assert each.privacy.noise_multiplier == in_sum.privacy.noise_multiplier
    z, grid = each.privacy.noise_multiplier, each.noise_grid
    assert grid.sigma == pytest.approx(z * grid.sensitivity)
    share = in_sum.noise_grid
    assert share.sigma / share.sensitivity == pytest.approx(z / math.sqrt(2))
    said = label_of(Terms.of_plan(plan_for(noise="site")))
    assert "in every site's vector" in said and "whatever other sites do" in said
    assert "everybody but the site itself" in said


def test_sample_needs_less_noise_and_the_label_says_from_whom_it_is_hidden():
    whole, sampled = plan_for(), plan_for(sample_rate=0.2)
    assert sampled.privacy.noise_multiplier < 0.6 * whole.privacy.noise_multiplier
    assert sampled.privacy.spent(20) <= 3
    said = label_of(Terms.of_plan(sampled))
    assert (
        "with probability 0.2, of which nobody but its site knows, and epsilon counts on that"
        in said
    )
    assert "probability" not in label_of(Terms.of_plan(whole))
    # The mean over the sites is the same step: a fifth of the rows, each five times as long.
    assert sampled.privacy.scale(1.0, 320) == pytest.approx(5 * whole.privacy.scale(1.0, 320))


HUNDRED = tuple(f"s{k:03}" for k in range(100))


def test_site_as_the_unit_takes_a_hundred_sites_and_local_training():
    plan = plan_for(
        sites=HUNDRED,
        unit="site",
        noise="site",
        protection="plain",
        epochs=3,
        momentum=0.5,
        max_sites=100,
    )
    grid = plan.noise_grid
    assert grid.clip_units + 1 + grid.reach <= (1 << 19) - 1
    assert plan.range.start == pytest.approx(((1 << 19) - 1) / grid.clip_units)
    assert "all training rows of one site" in label_of(Terms.of_plan(plan))
    with pytest.raises(
        PlanRefused, match=r"^privacy.unit: found 'site' for 99 sites, expected 100"
    ):
        plan_for(sites=HUNDRED[:99], unit="site", noise="site", protection="plain", max_sites=100)
    with pytest.raises(
        BadInput, match=r"privacy.sample_rate: found 0.5, expected .* 1 with the unit 'site'"
    ):
        plan_for(
            sites=HUNDRED,
            unit="site",
            noise="site",
            protection="plain",
            sample_rate=0.5,
            max_sites=100,
        )
    with pytest.raises(PlanRefused, match=r"^privacy.delta: found 0.01 for up to 100 units"):
        plan_for(
            sites=HUNDRED, unit="site", noise="site", protection="plain", delta=0.01, max_sites=100
        )
