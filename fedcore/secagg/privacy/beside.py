"""What a plan with privacy may not have: what would leave without noise, or would have no effect."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedcore.errors import PlanRefused
from fedcore.secagg import algorithms
from fedcore.secagg.privacy.privacy_plan import IN_SUM, SITE

if TYPE_CHECKING:
    from fedcore.secagg.plan import RoundPlan
    from fedcore.secagg.privacy.privacy_plan import PrivacyPlan


def refuse_beside_privacy(plan: RoundPlan, privacy: PrivacyPlan) -> None:
    """Raise PlanRefused, with the nearest setting that the plan may have. privacy: that it has or gets."""
    train, masks = plan.train, plan.layers.masks or privacy.noise != IN_SUM
    rules = algorithms.algorithm_of(train.algorithm)
    plain = not (rules.second_block or rules.keeps or rules.own_loop)
    judge = "validation" if plan.server.judge is None else "released"
    judged = judge == "released" and privacy.metric_share > 0
    leaves: list[tuple[str, object, object, str]] = [
        ("protect.protection", plan.protection, plan.protection if masks else "layered or masked",
         "only masks keep a vector with one site's share of the noise from being seen alone; noise = \"site\" has "
         "enough in each"),
        ("train.standardise", plan.standardise, "ranges", "exact sums of columns have no noise"),
        ("track.public_metrics", plan.public_metrics, False, "exact sums of metrics have no noise"),
        ("round.judge", judge, judge if judged else "validation",
         "privacy.metric_share = 0.2 gives the sums of metrics noise of their own"),
        ("privacy.sample_rate", privacy.sample_rate, 1.0 if judged else privacy.sample_rate,
         "a vector with metrics that are judged is accounted for as one release over all rows"),
        ("round.aggregate", "mean" if plan.server.groups is None else "trimmed", "mean",
         "the noise is sized for one sum over all sites"),
        ("train.algorithm", train.algorithm, train.algorithm if plain else "averaging",
         "its rules are of steps at the sites, and of vectors without noise"),
        ("train.local_parameters", train.local_parameters, (), "every parameter is in the clipped gradients"),
        ("model", f"{plan.buffer_coordinates} buffer coordinates", "0 buffer coordinates",
         "running statistics (BatchNorm) mix rows, so no row has a gradient of its own: use GroupNorm or "
         "LayerNorm"),
    ]  # fmt: skip
    of_steps: list[tuple[str, object, object, str]] = [
        ("train.epochs", train.epochs, 1, "a round is one step along the gradients of all rows"),
        ("train.optimiser", train.optimiser, "sgd", "a round is one step, by the server's optimiser"),
        ("train.momentum", train.momentum, 0.0, 'round.server = "fedavgm" has momentum'),
        ("train.proximal_mu", train.proximal_mu, 0.0, "one step leads nowhere to be pulled back from"),
        ("train.max_grad_norm", train.max_grad_norm, None, "privacy.clip is the norm of each row's gradient"),
        ("train.lr_schedule", train.lr_schedule, "constant", "the grid of the sum is fixed"),
        ("train.warmup_rounds", train.warmup_rounds, 0, "the grid of the sum is fixed"),
    ]  # fmt: skip
    for setting, found, expected, why in leaves + (of_steps if privacy.unit != SITE else []):
        if found != expected:
            raise PlanRefused(
                f"{setting}: found {found} with privacy.epsilon, expected {expected}",
                remedy=why,
            )
