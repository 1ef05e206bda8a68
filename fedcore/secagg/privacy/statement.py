"""What a plan with privacy promises, before it runs: `fedcore privacy`, computed from the plan and never typed by hand.

Everything is public but the number of rows, which only the prediction of the noise takes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fedcore.secagg.privacy.accounting import renyi_epsilon
from fedcore.secagg.privacy.privacy_plan import COLUMN, IN_SUM, RECORD, SITE
from fedcore.types import Json

if TYPE_CHECKING:
    from fedcore.secagg.plan import RoundPlan
    from fedcore.secagg.privacy.privacy_plan import PrivacyPlan

WHOSE = {
    RECORD: "one row among the training rows of one site",
    COLUMN: "all training rows of one site with one id in the group column (one person)",
    SITE: "all training rows of one site",
}

FIELDS = {
    "update": ("noised", "the clipped sum, with noise from the budget"),
    "weight": ("public", "protect.max_examples at every site, whatever its rows are"),
    "over_range": ("absent", "0 at every site"),
    "over_half_range": ("absent", "0 at every site"),
    "exceeds": ("absent", "0 at every site"),
    "metrics": ("absent", "0 at every site; metrics of the model stay where the test rows are"),
    "statistics": (
        "refused",
        'train.standardise = "ranges" scales by declared ranges, which are public',
    ),
    "range": ("public", "fixed by privacy.clip and protect.max_examples; no calibration"),
    "quantiles": ("absent", "no vector has any"),
}
"""{what a vector has a place for: (noised, public, absent or refused, why)}."""


def fields_of(privacy: PrivacyPlan) -> dict[str, tuple[str, str]]:
    """FIELDS of such a plan."""
    if not privacy.metric_share:
        return FIELDS
    when = "after the last round"
    if privacy.measures(trains=True):
        when = "in every round, and after the last one"
    noised = ("noised", f"{when}, with noise from privacy.metric_share of the budget")
    return {name: noised if name == "metrics" else field for name, field in FIELDS.items()}


def statement(plan: RoundPlan, rows: int) -> Json:
    """What is promised, to whom, on what it relies, and how large the noise will be. rows: training rows of all sites,
    for the prediction only. The plan has privacy."""
    privacy, grid = plan.privacy, plan.noise_grid
    assert privacy is not None
    in_sum, sites = privacy.noise == IN_SUM, len(plan.sites)
    shares = privacy.shares(plan.threshold)
    where = "inside the protected sum" if in_sum else "in the vector of each site"
    against = "the coordinator, whoever gets the model"
    if in_sum and privacy.colluders:
        against += f", and up to {privacy.colluders} of the other sites together"
    elif not in_sum:
        against += ", and all other sites together"
    assumes = "nothing of the other sites"
    if in_sum:
        assumes = f"{shares} sites of every sum draw their noise and keep it to themselves"
    sampled = privacy.sample_rate < 1
    hidden = "its own site alone knows it, so it counts against all others" if sampled else ""
    clip_with_rounding = privacy.clip * (1 + grid.rounding)
    noise = privacy.noise_multiplier * clip_with_rounding * math.sqrt(sites / shares)
    units = sites if privacy.unit == SITE else min(rows, sites * plan.max_examples)
    signal = units * privacy.sample_rate * privacy.clip
    ratio = noise * math.sqrt(plan.coordinates) / signal if signal else None
    return {
        "unit": privacy.unit,
        "unit_is": WHOSE[privacy.unit] + (" or its test rows" if privacy.metric_share else ""),
        "adjacency": "add or remove one unit",
        "epsilon": privacy.epsilon,
        "delta": privacy.delta,
        "epsilon_spent": privacy.spent(plan.rounds),
        "epsilon_by_renyi": renyi_epsilon(privacy.rounds(plan.rounds), privacy.accounted_delta),
        "accountant": "privacy loss distribution" if sampled else "Gaussian mechanism in closed form",
        "rounds": plan.rounds,
        "mechanism": f"discrete Gaussian noise {where}",
        "noise": privacy.noise,
        "noise_multiplier": privacy.noise_multiplier,
        "metrics": None if not privacy.metric_share else {
            "share": privacy.metric_share, "noise_multiplier": privacy.metric_multiplier,
            "releases": privacy.metric_releases,
            "noise_in_a_sum": {
                name.partition(":")[2]: each.sigma / each.grain * math.sqrt(sites)
                for name, each in plan.metric_noise.items()
            },
        },
        "clip": privacy.clip,
        "sample_rate": privacy.sample_rate,
        "sample_hidden": hidden,
        "against": against,
        "assumes": assumes,
        "sees_without_noise": "each site its own rows; nobody a sum, a count or a score"
        if in_sum
        else "each site its own rows; nobody a vector, a sum, a count or a score",
        "fields": {name: {"is": kind, "because": why} for name, (kind, why) in fields_of(privacy).items()},
        "predicted": {
            "units": units,
            "noise_in_a_sum": noise,
            "noise_to_signal": ratio,
            "noise_to_signal_of_all_rounds": None if ratio is None else ratio / math.sqrt(plan.rounds),
            "rounding": grid.rounding,
        },
    }  # fmt: skip


def _metric_line(found: Json) -> str:
    noise = ", ".join(f"{name} {rows:.3g}" for name, rows in found["noise_in_a_sum"].items())
    return (
        f"metrics: {found['share']:g} of the budget for {found['releases']} releases, multiplier "
        f"{found['noise_multiplier']:g}; noise of a count of all sites' test rows, standard deviation: {noise}"
    )


def statement_lines(found: Json) -> list[str]:
    """The same in words, a line for each question."""
    predicted, ratio = found["predicted"], found["predicted"]["noise_to_signal"]
    sampled = found["sample_rate"] < 1
    sample = f"sample: a unit is in a round with probability {found['sample_rate']:g}; {found['sample_hidden']}"
    signal = "noise to signal: no training rows here"
    if ratio is not None:
        signal = (
            f"noise to signal: at least {ratio:.2g} in a round and {predicted['noise_to_signal_of_all_rounds']:.2g} "
            f"over all rounds (L2; {predicted['units']} units whose gradients all have the clip norm and one direction)"
        )
    kinds: dict[str, list[str]] = {}
    for name, field in found["fields"].items():
        kinds.setdefault(field["is"], []).append(name)
    return [
        f"unit: {found['unit']}, {found['unit_is']}; adjacency: {found['adjacency']}",
        f"epsilon {found['epsilon_spent']:.4g} at delta {found['delta']:g} for all {found['rounds']} rounds (budget "
        f"{found['epsilon']:g}; {found['accountant']}; {found['epsilon_by_renyi']:.4g} by Renyi divergences)",
        f"mechanism: {found['mechanism']}, multiplier {found['noise_multiplier']:g}, clip norm {found['clip']:g}",
        *([sample] if sampled else []),
        *([] if found["metrics"] is None else [_metric_line(found["metrics"])]),
        f"holds against: {found['against']}",
        f"if: {found['assumes']}",
        f"sees values without noise: {found['sees_without_noise']}",
        f"noise of a coordinate of a sum: {predicted['noise_in_a_sum']:.4g}, standard deviation; "
        f"{100 * predicted['rounding']:.1f} % of it pays for rounding",
        signal,
        *(f"{kind}: {', '.join(names)}" for kind, names in kinds.items()),
    ]  # fmt: skip
