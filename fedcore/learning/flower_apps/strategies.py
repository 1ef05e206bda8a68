"""What a Flower app's server would do, without its server: the strategy that `main` starts, and its initial arrays.

The ServerApp's own `main` runs until it calls `Strategy.start`; there it ends, and what was given to `start` is kept.
Fedcore takes the rounds from there: the coordinator sees no model, so no code of the app can run on one. What needs
the update of one site, or a server that holds the model, is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.server import ServerConfig
from flwr.server import strategy as legacy_strategies
from flwr.serverapp import Grid, ServerApp, server_app
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, Strategy

from fedcore.errors import BadInput, PlanRefused
from fedcore.learning.flower_apps.app_arrays import AppArrays, arrays_in
from fedcore.learning.flower_apps.legacy_api import Config, LegacyApi, named
from fedcore.learning.flower_apps.message_api import MessageApi, Messages
from fedcore.learning.flower_apps.project import RunConfig
from fedcore.learning.flower_apps.refused import of_flwr, refuse_single_updates

_TAKEN = (FedAvg, FedAvgM, FedProx, FedAdam, FedYogi, FedAdagrad)
_TAKEN_LEGACY = (
    legacy_strategies.FedAvg, legacy_strategies.FedAvgM, legacy_strategies.FedProx, legacy_strategies.FedAdam,
    legacy_strategies.FedYogi, legacy_strategies.FedAdagrad,
)  # fmt: skip
_ADAPTIVE = {"FedAdam": "flower", "FedYogi": "none", "FedAdagrad": "none"}
"""{strategy: how it corrects its moments' bias, as a `server_correction`}."""
_OTHERS = {
    "FaultTolerantFedAvg": "FedAvg; `protect.threshold` says how many sites a round needs",
    "FedOpt": "FedAdam, FedYogi or FedAdagrad: FedOpt itself has no step of its own",
    "FedAvgAndroid": "FedAvg, whose arrays have shapes",
}
"""{a strategy of flwr's older API that is none of the taken ones: what to use here}."""


@dataclass(frozen=True)
class Course:
    """What the app's server would begin with.

    strategy: its name. arrays: the model that the rounds begin with; None where a client of the older API is asked
    for it. messages: what the server says to the app. settings: of a Fedcore job, as the strategy has them.
    least: SuperNodes that it waits for. notes: (warning, hint) of what it asks for and does not get.
    """

    strategy: str
    arrays: AppArrays | None
    messages: Messages
    settings: Mapping[str, object]
    least: int
    notes: tuple[tuple[str, str], ...] = field(default=())


def course_of(app: ServerApp, run_config: RunConfig, name: str) -> Course:
    """Run the app's `main` up to `Strategy.start`. Raises BadInput for what this engine cannot do, and whatever the
    app raises."""
    context = Context(0, 0, {}, RecordDict(), dict(run_config))
    try:
        with _start_ends_main():
            app(_NoGrid(), context)
    except _Started as started:
        return _course(started, name)
    except _StartedLegacy as started:
        return _legacy_course(started, name)
    raise BadInput(
        f"Flower app {name}: found no call of Strategy.start in the ServerApp's main, expected one",
        remedy="strategy.start(grid=grid, initial_arrays=..., num_rounds=...) is what Fedcore takes over",
    )


class _Started(BaseException):
    """Ends the app's main at `Strategy.start`; no Exception, so that the app does not catch it."""

    def __init__(
        self, strategy: Strategy, initial_arrays: ArrayRecord, num_rounds: int,
        train_config: ConfigRecord | None, evaluate_config: ConfigRecord | None, evaluate_fn: object,
    ) -> None:  # fmt: skip
        self.strategy, self.arrays, self.rounds = strategy, initial_arrays, num_rounds
        self.train, self.evaluate = dict(train_config or {}), dict(evaluate_config or {})
        self.evaluate_fn = evaluate_fn


@contextmanager
def _start_ends_main() -> Iterator[None]:
    original = Strategy.start

    def start(
        self: Strategy, grid: Grid, initial_arrays: ArrayRecord, num_rounds: int = 3, timeout: float = 3600,  # noqa: ARG001
        train_config: ConfigRecord | None = None, evaluate_config: ConfigRecord | None = None,
        evaluate_fn: object = None,
    ) -> NoReturn:  # fmt: skip
        raise _Started(self, initial_arrays, num_rounds, train_config, evaluate_config, evaluate_fn)

    def start_grid(
        *, config: ServerConfig | None, strategy: legacy_strategies.Strategy | None, **_: object
    ) -> NoReturn:
        raise _StartedLegacy(strategy, config or ServerConfig())

    before = getattr(server_app, "start_grid")  # noqa: B009 - a name that it imports
    setattr(Strategy, "start", start)  # noqa: B010 - a method of theirs, for the time of one call
    setattr(server_app, "start_grid", start_grid)  # noqa: B010
    try:
        yield
    finally:
        setattr(Strategy, "start", original)  # noqa: B010
        setattr(server_app, "start_grid", before)  # noqa: B010


class _StartedLegacy(BaseException):
    """The same of a server_fn, where its ServerAppComponents are to be run."""

    def __init__(self, strategy: legacy_strategies.Strategy | None, config: ServerConfig) -> None:
        self.strategy = legacy_strategies.FedAvg() if strategy is None else strategy
        self.config = config


class _NoGrid(Grid):
    """A grid without nodes: an app that sends messages itself is refused."""

    def set_run(self, run: Any) -> None:
        pass

    @property
    def run(self) -> NoReturn:
        _refuse_own_messages()

    def create_message(self, *_: Any, **__: Any) -> Message:
        _refuse_own_messages()

    def get_node_ids(self) -> Iterable[int]:
        _refuse_own_messages()

    def get_nodes(self) -> Iterable[Any]:
        _refuse_own_messages()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:  # noqa: ARG002
        _refuse_own_messages()

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:  # noqa: ARG002
        _refuse_own_messages()

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None  # noqa: ARG002
    ) -> Iterable[Message]:  # fmt: skip
        _refuse_own_messages()


def _refuse_own_messages() -> NoReturn:
    raise BadInput(
        "Flower app: found a ServerApp that uses the grid itself, expected one that calls Strategy.start and "
        "leaves the messages to it",
        remedy="FedAvg's start(grid=..., initial_arrays=..., num_rounds=...) does the rounds; under a protected sum "
        "no server sees a reply",
    )


def _course(started: _Started, name: str) -> Course:
    strategy = started.strategy
    _refuse_strategy(strategy, _TAKEN, name)
    averaging = cast("FedAvg", strategy)
    if isinstance(strategy, FedProx):
        started.train["proximal-mu"] = strategy.proximal_mu
    custom = averaging.evaluate_metrics_aggr_fn.__module__.partition(".")[0] != "flwr"
    return Course(
        type(strategy).__name__,
        arrays_in(started.arrays, f"Flower app {name}: initial_arrays"),
        MessageApi(
            averaging.weighted_by_key, averaging.arrayrecord_key, averaging.configrecord_key,
            {"train": started.train, "evaluate": started.evaluate},
        ),
        _settings(strategy, started.rounds),
        max(averaging.min_available_nodes, averaging.min_train_nodes, averaging.min_evaluate_nodes),
        tuple(_notes(averaging.fraction_train, started.evaluate_fn, custom=custom)),
    )  # fmt: skip


def _legacy_course(started: _StartedLegacy, name: str) -> Course:
    strategy = started.strategy
    _refuse_strategy(strategy, _TAKEN_LEGACY, name)
    averaging = cast("legacy_strategies.FedAvg", strategy)
    fit, evaluate = averaging.on_fit_config_fn, averaging.on_evaluate_config_fn
    proximal = (
        {"proximal_mu": strategy.proximal_mu}
        if isinstance(strategy, legacy_strategies.FedProx)
        else {}
    )
    configs: Mapping[str, Config] = {
        "train": lambda round_: {**(fit(round_) if fit else {}), **proximal},
        "evaluate": lambda round_: evaluate(round_) if evaluate else {},
    }
    found, where = averaging.initial_parameters, f"Flower app {name}: initial_parameters"
    return Course(
        type(strategy).__name__,
        None if found is None else named(found, where),
        LegacyApi(configs),
        _settings(strategy, started.config.num_rounds),
        max(averaging.min_available_clients, averaging.min_fit_clients, averaging.min_evaluate_clients),
        tuple(
            _notes(
                averaging.fraction_fit, averaging.evaluate_fn,
                custom=averaging.evaluate_metrics_aggregation_fn is not None,
            )
        ),
    )  # fmt: skip


def _settings(strategy: object, rounds: int) -> dict[str, object]:
    """A strategy's number of rounds and its server step, as settings of a job."""
    settings: dict[str, object] = {"rounds": rounds, "server": "fedavg", "server_lr": 1.0}
    if isinstance(strategy, FedAvgM | legacy_strategies.FedAvgM):
        settings["server_lr"] = strategy.server_learning_rate
        if strategy.server_momentum:
            settings |= {"server": "fedavgm", "server_momentum": strategy.server_momentum}
    kind = type(strategy).__name__
    if isinstance(strategy, FedAdam | FedYogi | FedAdagrad | legacy_strategies.FedOpt):
        settings |= {
            "server": kind.lower(), "server_lr": strategy.eta, "server_tau": strategy.tau,
            "server_beta1": strategy.beta_1, "server_beta2": strategy.beta_2,
            "server_correction": _ADAPTIVE[kind],
        }  # fmt: skip
    return settings


def _refuse_strategy(strategy: object, taken: tuple[type, ...], name: str) -> None:
    """Raise PlanRefused for all but the taken ones, with the reason where flwr ships the strategy."""
    kind = type(strategy)
    if kind in taken:
        return
    refuse_single_updates(strategy, f"Flower app {name}")
    expected = f"expected one of flwr: {', '.join(each.__name__ for each in taken)}"
    if of_flwr(kind):
        raise PlanRefused(
            f"strategy {kind.__name__}: found it in Flower app {name}, {expected}",
            remedy=_OTHERS.get(kind.__name__, "FedAvg"),
        )
    parents = [each.__name__ for each in kind.__mro__[1:-2]]
    of = f" (a {parents[0]})" if parents else ""
    raise PlanRefused(
        f"strategy {kind.__name__}{of}: found a strategy of Flower app {name}'s own, {expected}",
        remedy="its code would run on a server, and here none has the model: use the class as flwr has it",
    )


def _notes(share: float, evaluate_fn: object, *, custom: bool) -> Iterator[tuple[str, str]]:
    """share: of the nodes that train in a round. custom: whether it averages metrics by a function of its own."""
    if share < 1.0:
        yield (
            f"the strategy trains a share of {share:g} of the nodes a round; here every site takes part in every round",
            "--dropout simulates absent sites",
        )
    if evaluate_fn is not None:
        yield (
            "the app's evaluate_fn is not called: no server has the model before the end",
            "its ClientApp's evaluate gives the metrics, as a protected sum over the sites",
        )
    if custom:
        yield (
            "the strategy's function that aggregates metrics is not called: it takes the replies of single sites",
            "metrics are means weighted by the number of examples",
        )
