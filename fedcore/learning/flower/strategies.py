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
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp import strategy as strategies
from flwr.serverapp.strategy import FedAvg, FedAvgM, FedProx, Strategy

from fedcore.errors import BadInput
from fedcore.learning.flower.app_arrays import AppArrays, arrays_in
from fedcore.learning.flower.project import RunConfig

_ROBUST = (
    "compares the updates of single sites, which nobody sees under a protected sum",
    "FedAvg in the app; here protect.range bounds what one site can add to the sum",
)
_OPTIMISER = (
    "makes the server's step in Flower's own arithmetic, which differs from Fedcore's optimiser of that name",
    "FedAvg in the app and --server {here} --server-lr {eta} here, which is bias-corrected as Adam is",
)
_SERVER_NOISE = (
    "clips or adds noise at the server, which has no single update and no model here",
    "FedAvg in the app with LocalDpMod among its ClientApp's mods, which acts at the site",
)
_TREES = (
    "adds trees, and a protected sum is of arrays of one shape",
    "a model of arrays: PyTorch, or a linear model of scikit-learn",
)
REFUSED: Mapping[str, tuple[str, str]] = {
    "Krum": _ROBUST,
    "MultiKrum": _ROBUST,
    "Bulyan": _ROBUST,
    "FedMedian": _ROBUST,
    "FedTrimmedAvg": _ROBUST,
    "QFedAvg": (
        "weights each update by the loss of its site, which nobody sees under a protected sum",
        "FedAvg in the app; `fedcore simulate` reports every site's own metrics in result.json",
    ),
    "FedXgbBagging": _TREES,
    "FedXgbCyclic": _TREES,
    "DifferentialPrivacyServerSideFixedClipping": _SERVER_NOISE,
    "DifferentialPrivacyServerSideAdaptiveClipping": _SERVER_NOISE,
    "DifferentialPrivacyClientSideFixedClipping": _SERVER_NOISE,
    "DifferentialPrivacyClientSideAdaptiveClipping": _SERVER_NOISE,
    "FedAdam": _OPTIMISER,
    "FedYogi": _OPTIMISER,
    "FedAdagrad": (_OPTIMISER[0], "FedAvg in the app and --server fedadam here"),
}
"""{strategy: (why not, what to use here)}."""


@dataclass(frozen=True)
class Course:
    """What `main` gives to `Strategy.start`.

    arrays: the model that the rounds begin with. settings: of a Fedcore job, as the strategy has them.
    train, evaluate: what a message's ConfigRecord holds beside `server-round`. least: SuperNodes that the strategy
    waits for. notes: (warning, hint) of what the strategy asks for and does not get.
    """

    strategy: FedAvg
    arrays: AppArrays
    settings: Mapping[str, object]
    train: Mapping[str, Any]
    evaluate: Mapping[str, Any]
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

    setattr(Strategy, "start", start)  # noqa: B010 - a method of theirs, for the time of one call
    try:
        yield
    finally:
        setattr(Strategy, "start", original)  # noqa: B010


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
    kind = type(strategy).__name__
    shipped = getattr(strategies, kind, None) is type(strategy)
    if shipped and kind in REFUSED:
        why, instead = REFUSED[kind]
        here, eta = kind.lower(), getattr(strategy, "eta", 1.0)
        raise BadInput(
            f"strategy {kind}: found it in Flower app {name}; it {why}",
            remedy=instead.format(here=here, eta=eta),
        )
    if type(strategy) not in {FedAvg, FedAvgM, FedProx}:
        parents = [each.__name__ for each in type(strategy).__mro__[1:-2]]
        of = f" (a {parents[0]})" if parents else ""
        raise BadInput(
            f"strategy {kind}{of}: found a strategy of Flower app {name}'s own, expected FedAvg, FedProx or FedAvgM "
            "itself",
            remedy="its code would run on a server, and here none has the model: use the class as flwr has it",
        )
    averaging = cast("FedAvg", strategy)
    settings: dict[str, object] = {"rounds": started.rounds, "server": "fedavg", "server_lr": 1.0}
    if isinstance(strategy, FedAvgM):
        settings["server_lr"] = strategy.server_learning_rate
        if strategy.server_momentum:
            settings |= {"server": "fedavgm", "server_momentum": strategy.server_momentum}
    if isinstance(strategy, FedProx):
        started.train["proximal-mu"] = strategy.proximal_mu
    return Course(
        averaging,
        arrays_in(started.arrays, f"Flower app {name}: initial_arrays"),
        settings,
        started.train,
        started.evaluate,
        max(averaging.min_available_nodes, averaging.min_train_nodes, averaging.min_evaluate_nodes),
        tuple(_notes(averaging, started.evaluate_fn)),
    )


def _notes(strategy: FedAvg, evaluate_fn: object) -> Iterator[tuple[str, str]]:
    if strategy.fraction_train < 1.0:
        yield (
            f"the strategy trains a share of {strategy.fraction_train:g} of the nodes a round; here every site takes "
            "part in every round",
            "--dropout simulates absent sites",
        )
    if evaluate_fn is not None:
        yield (
            "the app's evaluate_fn is not called: no server has the model before the end",
            "its ClientApp's evaluate gives the metrics, as a protected sum over the sites",
        )
    custom = strategy.evaluate_metrics_aggr_fn.__module__.partition(".")[0] != "flwr"
    if custom:
        yield (
            "the strategy's evaluate_metrics_aggr_fn is not called: it takes the replies of single sites",
            f"metrics are means weighted by {strategy.weighted_by_key}",
        )
