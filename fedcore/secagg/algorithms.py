"""What a federated algorithm sends and keeps, and what it requires of a plan: the one module with their names.

An algorithm is an entry here and a file with its rules in `learning/rules/`. Everything that both roles must know
of it is here, so a coordinator needs no torch. All other code asks for what an algorithm does and never which it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from fedcore.errors import BadInput, PlanRefused, UnknownName

if TYPE_CHECKING:
    from fedcore.secagg.plan import ServerPlan, TrainPlan


@dataclass(frozen=True)
class Algorithm:
    """How sites train and what becomes of their sum.

    source: where it is defined. second_block: what travels beside the update, in words, one coordinate for each
    parameter; "" for nothing. keeps: what a site keeps from round to round and never sends, in words; "" for nothing.
    settings: those of `TrainPlan` that only it reads. requires: {setting of `TrainPlan`: the one value that its rules
    hold for}; because: why. own_loop: whether its rules need Fedcore's
    local loop, whose gradients they change. personal: whether
    a site uses a model of its own. plain_mean: whether it needs the server optimiser fedavg with a rate of 1.
    calmer: what to change where training diverges, in words.
    """

    name: str
    source: str
    second_block: str = ""
    keeps: str = ""
    settings: tuple[str, ...] = ()
    requires: Mapping[str, object] = field(default_factory=dict)
    because: str = ""
    own_loop: bool = False
    plain_mean: bool = False
    personal: bool = False
    calmer: str = "lower train.lr or round.server_lr"


ALGORITHMS = {
    each.name: each
    for each in (
        Algorithm("averaging", "McMahan et al. 2017 (arXiv:1602.05629), algorithm 1"),
        Algorithm(
            "scaffold",
            "Karimireddy et al. 2020 (arXiv:1910.06378), algorithm 1, option II",
            second_block="the change of this site's control variate",
            keeps="this site's control variate",
            requires={
                "optimiser": "sgd",
                "momentum": 0.0,
                "max_grad_norm": None,
                "proximal_mu": 0.0,
            },
            because="it computes a site's mean gradient from how far plain SGD moved",
            own_loop=True,
        ),
        Algorithm(
            "feddyn",
            "Acar et al. 2021 (arXiv:2111.04263), algorithm 1",
            keeps="the gradient that this site's training ended at",
            settings=("feddyn_alpha",),
            requires={"proximal_mu": 0.0},
            because="it has a proximal term of its own, feddyn_alpha",
            own_loop=True,
            plain_mean=True,
            # What a site keeps is alpha times the sum of all its moves, and the server adds it back divided by alpha.
            calmer="raise train.feddyn_alpha tenfold, or lower train.lr or train.epochs; "
            'algorithm = "scaffold" removes drift without such swings',
        ),
        Algorithm(
            "ditto",
            "Li et al. 2021 (arXiv:2012.04221), algorithm 1",
            keeps="a model of this site's own",
            settings=("ditto_lambda",),
            own_loop=True,
            personal=True,
        ),
    )
}
"""{name: algorithm}; the first one is the default."""

SINGLE_UPDATES = {
    "krum": "it compares the sites' updates with each other",
    "multi_krum": "it compares the sites' updates with each other",
    "bulyan": "it compares the sites' updates with each other",
    "median": "it sorts the sites' values of every coordinate",
    "trimmed_mean": "it sorts the sites' values of every coordinate",
    "geometric_median": "it weighs each update by its distance to the others",
    "qfedavg": "it weighs each update by that site's own loss",
    "fednova": "it divides each update by that site's own number of steps",
}
"""{name: why}: algorithms that need the update of a single site, which nobody has here."""

_BOUNDED = (
    "leave it out: every coordinate is bounded by the range, weights by max_examples, and each site's guard judges the "
    'model; in a simulation of 15 sites or more round.aggregate = "trimmed" compares sums of groups '
    "(docs/algorithms.md)"
)
_NEAREST = {
    "qfedavg": "ditto or local_parameters serve sites that the common model fits badly; `per_site` in rounds.jsonl "
    "shows which they are",
    "fednova": "scaffold corrects for sites that drift apart, as far as they take different numbers of steps too",
}


def algorithm_of(name: str) -> Algorithm:
    """By its name. Raises UnknownName, and PlanRefused for one that needs single updates."""
    if name in ALGORITHMS:
        return ALGORITHMS[name]
    plain = name.lower().replace("-", "_")
    if (plain := plain if plain in SINGLE_UPDATES else plain.replace("_", "")) in SINGLE_UPDATES:
        raise PlanRefused(
            f"train.algorithm: found {name!r}, expected one of {', '.join(ALGORITHMS)}: {SINGLE_UPDATES[plain]}, and "
            "under protection only sums exist",
            remedy=_NEAREST.get(plain, _BOUNDED),
        )
    raise UnknownName("train.algorithm", name, ALGORITHMS)


class TrainSettings(Protocol):
    """What a job or a plan has of local training."""

    @property
    def algorithm(self) -> str: ...
    @property
    def local_parameters(self) -> Sequence[str]: ...


def keeps_of(training: TrainSettings) -> str:
    """What a site keeps from round to round and never sends, in words; "" for nothing."""
    if training.local_parameters:
        return f"the parameters and buffers {', '.join(training.local_parameters)}"
    return algorithm_of(training.algorithm).keeps


def is_personal(training: TrainSettings) -> bool:
    """Whether a site uses a model of its own, in which something has never left it."""
    return algorithm_of(training.algorithm).personal or bool(training.local_parameters)


def refuse_training(plan: TrainPlan, unchanged: Mapping[str, object]) -> None:
    """Raise for an unknown algorithm, for local training that its rules do not hold for, and for a setting that it
    does not read. unchanged: values of settings that ask for nothing."""
    algorithm = algorithm_of(plan.algorithm)
    for each in ALGORITHMS.values():
        for setting in set(each.settings) - set(algorithm.settings):
            if (found := getattr(plan, setting)) != unchanged[setting]:
                raise BadInput(
                    f"train.{setting}: found {found} with the algorithm {algorithm.name!r}, which does not read it",
                    remedy=f'algorithm = "{each.name}" reads it; else leave it out',
                )
    if plan.local_parameters and (algorithm.keeps or plan.proximal_mu):
        found = "proximal_mu" if plan.proximal_mu else f"the algorithm {algorithm.name!r}"
        raise BadInput(
            f"train.local_parameters: found {', '.join(plan.local_parameters)} with {found}, expected one of them: the "
            "rules are of parameters that are averaged",
            remedy="leave one of them out (docs/algorithms.md)",
        )
    for setting, expected in algorithm.requires.items():
        if (found := getattr(plan, setting)) != expected:
            raise BadInput(
                f"train.{setting}: found {found!r} with the algorithm {algorithm.name!r}, expected "
                f"{'none' if expected is None else repr(expected)}: {algorithm.because}",
                remedy=f"leave {setting} out, or use another algorithm (docs/algorithms.md)",
            )


LEAST_THRESHOLD = 4
"""Of two blocks made of one update: a site of a sum of 4 knows its own, and two equations about three others."""


def refuse_threshold(threshold: int, sites: int) -> None:
    """Raise PlanRefused for a threshold at which two blocks let one site work out the updates of the others."""
    if threshold < LEAST_THRESHOLD:
        more = "more sites" if sites < LEAST_THRESHOLD else f"`--threshold {LEAST_THRESHOLD}`"
        raise PlanRefused(
            f"protect.threshold: found {threshold} of {sites} sites with an algorithm that sends two blocks, expected "
            f"at least {LEAST_THRESHOLD}: a sum of {threshold} is two equations about the updates of {threshold - 1} "
            "others",
            remedy=f"{more}, or an algorithm that sends the update alone: feddyn (docs/algorithms.md)",
        )


def refuse_own_train(name: str, task: str) -> None:
    """Raise BadInput for a task that trains by itself under an algorithm, by its name, that changes gradients."""
    if algorithm_of(name).own_loop:
        raise BadInput(
            f"train.algorithm: found {name!r} for the task {task!r}, which has a `train` of its own, expected a task "
            "that Fedcore's loop trains: the algorithm changes the gradient of every batch",
            remedy='algorithm = "averaging", which takes any training; or leave `train` out of the task',
        )


def refuse_server(train: TrainPlan, server: ServerPlan) -> None:
    """Raise BadInput for a server optimiser that does not go with the algorithm."""
    algorithm = algorithm_of(train.algorithm)
    if algorithm.plain_mean and (server.optimiser, server.lr) != ("fedavg", 1.0):
        raise BadInput(
            f"round.server: found {server.optimiser!r} with server_lr {server.lr:g} and the algorithm "
            f"{algorithm.name!r}, expected 'fedavg' with 1: the algorithm has a server step of its own",
            remedy="leave server and server_lr out, or use another algorithm (docs/algorithms.md)",
        )
