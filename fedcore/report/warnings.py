"""The warnings of a run and of a comparison, which a report shows above all numbers."""

from collections.abc import Iterable, Mapping, Sequence

from fedcore.report.phrases import arm_name, listed, metric_name, score
from fedcore.results import AbandonedRound, ComparisonResult, Result, RunResult

CLIPPED_WORTH_SAYING = 1e-3
"""Clipped coordinates above this share are a warning."""

_SHOWN = 5
"""Abandoned rounds that are named; of more there is only their number."""


def of_run(result: RunResult) -> tuple[str, ...]:
    """The warnings of one run, its notes the last of them."""
    found = _abandoned(result.absences.abandoned, result.rounds)
    if (last := result.protected.abandoned) is not None:
        found.append(
            f"The metrics-only round was abandoned at {last.stage}: the sites do not know the final "
            "model's metrics. The scores here are the simulation's own."
        )
    found.append(
        "One seed and one split: differences of this size move with the seed. "
        "`fedcore compare` repeats the run over seeds and folds."
    )
    return (*found, *_shared(result), *result.notes)


def of_comparison(
    result: ComparisonResult, rounds: int, notes: Sequence[str], *, own_test_rows: bool
) -> tuple[str, ...]:
    """The warnings of a comparison. rounds: of all its splits together. notes: those of its first split."""
    found = [*_shared(result), *_abandoned(result.absences.abandoned, rounds), *notes]
    if own_test_rows:
        found.append(
            "Every site brings its own test rows, so only the seed varies: the interval does not say "
            "what other test rows would have shown."
        )
    others = [{a: m for a, m in cell.arms.items() if a != "federated"} for cell in result.cells]
    if len(others) > 1 and others[0] and all(each == others[0] for each in others):
        found.append(
            "Every split gave the same scores, but for the rounding of protected updates, so the interval tells "
            "nothing (hint: a task or an app that seeds its own generators has the same draws in each split)."
        )
    return tuple(found)


def notes_on_rows(result: RunResult, unknown: Mapping[str, int]) -> list[str]:
    """What the sites' rows give reason to say. unknown: {column: values that were not declared}."""
    found = []
    if "auc" in result.metrics:
        single = (name for name, s in result.per_site.items() if len(s.class_counts or {}) == 1)
        found += _of_sites(single, "rows of one class only, so no AUC of {} own")
    empty = (name for name, site in result.per_site.items() if not site.test_rows)
    found += _of_sites(empty, "no test rows, so no score of {} own")
    for column, count in unknown.items():
        found.append(f"{count} values of column {column} were not declared and count as `other`.")
    scale = result.statistics or {"names": (), "clipped": ()}
    for name, count in zip(scale["names"], scale["clipped"], strict=True):
        if count:
            found.append(f"{count} values of {name} lie outside its public range.")
    for metric, count in (result.protected.clipped or {}).items():
        if count:
            found.append(
                f"{count} rows' errors were clipped in the protected sums of {metric_name(metric)}, so "
                "its protected value is too small."
            )
    return found


def _shared(result: Result) -> list[str]:
    """What a run and a comparison warn of alike."""
    found = _no_better_than_guessing(result)
    for metric, gap in result.gap.get("total", {}).items():
        low, high = gap.ends or (0.0, 0.0)
        if gap.mean is not None and high - low > abs(gap.mean):
            found.append(f"The interval of the {metric_name(metric)} gap is wider than the gap.")
    clipped = result.sums.clipped_fraction or 0.0
    if clipped > CLIPPED_WORTH_SAYING:
        found.append(
            f"{100 * clipped:.2f} % of the coordinates were clipped to the range; "
            "a larger protect.range loses less."
        )
    if result.sums.unequal_rounds:
        found.append(
            f"In {result.sums.unequal_rounds} rounds the opened sum was NOT the plain integer sum. "
            "This must never happen: please report it with plan.json."
        )
    return found


def _no_better_than_guessing(result: Result) -> list[str]:
    """Arms whose scores say that nothing was learnt, with the likely causes."""
    causes = (
        "Likely causes: inputs that are not scaled (declare ranges, or `statistics` for arrays), a learning rate "
        "that does not fit, outputs that are not the logits which the metric expects."
    )
    scores = {arm: result.score(arm, "auc") for arm in ("centralised", "federated")}
    low = [
        arm_name(arm) for arm, reached in scores.items() if reached is not None and reached < 0.5
    ]
    if low:
        return [f"AUC below 0.5 ({listed(low)}): worse than guessing. {causes}"]
    constant = result.constant
    answer = {"mean": "the mean of the training targets"}.get(
        constant.predicts if constant is not None else "", "the most frequent class"
    )
    for metric, without in (constant.metrics if constant is not None else {}).items():
        better = [
            result.better_by(metric, result.score(arm, metric), without) for arm in result.arm_names
        ]
        known = [by for by in better if by is not None]
        if metric != "auc" and known and max(known) <= 0:
            return [
                f"No arm is better than always answering {answer} ({metric_name(metric)} {score(without)}). "
                f"{causes}"
            ]
    return []


def _abandoned(abandoned: Sequence[AbandonedRound], rounds: int) -> list[str]:
    """What abandoned rounds cost. rounds: all that were run."""
    if not abandoned:
        return []
    verb = "was" if len(abandoned) == 1 else "were"
    names = list(dict.fromkeys(f"{each.round} at {each.stage}" for each in abandoned))
    more = ", ..." if len(names) > _SHOWN else ""
    places = f"round{'s' if len(names) > 1 else ''} {', '.join(names[:_SHOWN])}{more}"
    return [
        f"{len(abandoned)} of {rounds} rounds {verb} abandoned for want of sites ({places}): "
        "the model did not change in them."
    ]


def _of_sites(sites: Iterable[str], what: str) -> list[str]:
    """One line however many sites it is about."""
    names = list(sites)
    if not names:
        return []
    if len(names) == 1:
        return [f"Site {names[0]} has {what.format('its')}."]
    shown = ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")
    return [f"{len(names)} sites ({shown}) have {what.format('their')}."]
