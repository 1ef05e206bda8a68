"""The settings that a comparison or a deployment does not have, each with the reason and what to do instead."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

from fedcore.errors import BadInput

Kind = Literal["comparison", "deployment"]
"""The kinds of run that lack some settings. A simulation has them all."""


class Unsupported(NamedTuple):
    """A setting that one kind of run does not have. reason: continues "in a deployment: ". usual: the value that
    asks for nothing, beside none and off. but_with: (another setting, its value) with which it is supported."""

    setting: str
    kind: Kind
    reason: str
    remedy: str
    usual: str | None = None
    but_with: tuple[str, str] | None = None


_FIND_ROUNDS = "`fedcore simulate` finds the number of rounds to deploy with (round.rounds)"
_JUDGE_RELEASED = f"--judge released goes by the metrics that each release opens; or {_FIND_ROUNDS}"
_BY_RELEASED = "round.judge", "released"
_STOP_A_SITE = "`fedcore simulate` has simulated absences; deployed, stop a site's process"
_SPLITS_OF_OPERATORS = "each site's operator decides which rows are kept apart"

UNSUPPORTED = (
    Unsupported(
        "initial", "deployment", "all its sites begin with the seed's model",
        "`fedcore simulate` begins with it; deployed, task.model can load weights that every site has",
    ),
    Unsupported(
        "device", "deployment", "its sites train on their CPUs, for the bits of a simulation",
        "`fedcore simulate` and `fedcore compare` use a GPU", "cpu",
    ),
    Unsupported(
        "sum", "deployment", "its sums are made by the whole protocol",
        "`fedcore simulate --sum exact` adds without cryptography, for the same model in less time", "full",
    ),
    Unsupported(
        "executor", "deployment", "each site trains by itself",
        "leave it out: `fedcore simulate` can train many sites at once", "sequential",
    ),
    Unsupported(
        "round.cohort", "deployment", "every site of the roster takes part in every round",
        "`fedcore simulate` draws cohorts; deployed, protect.threshold says how many sites a round needs",
    ),
    Unsupported("round.validate", "deployment", _SPLITS_OF_OPERATORS, _FIND_ROUNDS),
    Unsupported(
        "round.keep", "deployment", "no rows are kept apart", _JUDGE_RELEASED, "last", _BY_RELEASED
    ),
    Unsupported(
        "round.patience", "deployment", "no rows are kept apart", _JUDGE_RELEASED, None, _BY_RELEASED
    ),
    Unsupported(
        "round.checkpoint_every", "deployment", "it keeps the model of its last round only",
        "`fedcore simulate` keeps those of earlier rounds",
    ),
    Unsupported(
        "round.aggregate", "deployment", "a round of it has one sum, and nobody there could draw groups that all trust",
        "leave it out: the range bounds what a site adds, each site's guard and round.veto judge the model", "mean",
    ),
    Unsupported("round.drop", "deployment", "its sites are real processes", _STOP_A_SITE),
    Unsupported("round.dropout", "deployment", "its sites are real processes", _STOP_A_SITE),
    Unsupported(
        "track.to", "deployment", "nothing of it is sent elsewhere",
        "leave it out: `fed-coordinator watch --json` and rounds.jsonl have its rounds",
    ),
    Unsupported(
        "track.keep_scores", "deployment", "the scores of single rows leave no site",
        "leave it out; a simulation keeps them on its own machine",
    ),
    Unsupported(
        "round.checkpoint_every", "comparison", "it keeps no models",
        "`fedcore simulate` with the seed and fold of one of its splits keeps them",
    ),
    Unsupported(
        "track.to", "comparison", "its rounds are those of many runs",
        'leave it out: --to "" (rounds.jsonl has every split)',
    ),
    Unsupported(
        "track.keep_scores", "comparison", "it keeps the scores of no single rows",
        "`fedcore simulate --keep-scores` with the seed and fold of one of its splits keeps them",
    ),
)  # fmt: skip
"""Every setting that not all kinds of run have. What a job asks of `protect.protection` is in `secagg/protections.py`.

Deployed, no path leaves a machine, and which rows are kept apart is the operator's to say: two jobs that differ in it
would show single rows (docs/decisions/0016)."""


def refuse_unsupported(settings: Mapping[str, object], kind: Kind) -> None:
    """Raise BadInput where a job asks for what this kind of run does not have. settings: as `Job.to_json` has them,
    complete or not, also of another party."""

    def found(setting: str) -> object:
        section, _, key = setting.rpartition(".")
        table = settings.get(section, {}) if section else settings
        return table.get(key) if isinstance(table, Mapping) else None

    for each in UNSUPPORTED:
        value = found(each.setting)
        if each.but_with is not None and found(each.but_with[0]) == each.but_with[1]:
            continue
        if each.kind == kind and value and value != each.usual:
            usual = "false" if value is True else "none"
            expected = usual if each.usual is None else repr(each.usual)
            raise BadInput(
                f"{each.setting}: found {_shown(value)}, expected {expected} in a {kind}: {each.reason}",
                remedy=each.remedy,
            )


_SPLIT_HINTS = {
    "seed": "`--seeds 5` runs the seeds 0 to 4; one run of another seed is `fedcore simulate --seed {}`",
    "fold": "`--folds 5` is how many there are; one run of one of them is `fedcore simulate --fold {}`",
}


def refuse_split(given: Mapping[str, object]) -> None:
    """Raise BadInput where a comparison is asked for one seed or fold. given: flags or keywords; in a job file, which
    is for simulations too, both may stand."""
    for key, hint in _SPLIT_HINTS.items():
        if key in given:
            raise BadInput(
                f"{key}: found {_shown(given[key])}, expected none in a comparison: it runs several {key}s",
                remedy=hint.format(given[key]),
            )


def _shown(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "true" if value is True else repr(value)
