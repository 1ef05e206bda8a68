"""A Flower app as a `Task`: its ClientApp trains and evaluates at each site, in this process, and its ServerApp says
which model the rounds begin with and how many there are (`strategies.py`).

What a site knows of its data is a node config (`partition-id`, `num-partitions`, or what a deployed site states), and
only the app makes rows of it. So a site's rows are a `Partition`: their number, as the app reports it (`num-examples`),
and nothing of their content.

Invariant: a round's reply is a function of the model, the node config, the run config, the round and what the app kept
in Context.state after the last earlier round that this site trained; asked again for the same round, the app finds
the same state. To evaluate the model of a round it finds what that round left. What evaluating leaves there is
forgotten: how often a model is evaluated, and in which process, differs between a simulation and a deployment.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
from flwr.app import ArrayRecord, Context, Message, Metadata, RecordDict
from flwr.app.message import make_message
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from torch import nn
from torch.utils.data import Dataset

from fedcore.errors import BadInput, TaskFailed
from fedcore.learning.data.rows import DatasetRows
from fedcore.learning.flower_apps.app_arrays import AppArrays, load, module_of, record_of
from fedcore.learning.flower_apps.kept_state import (
    KeptState,
    from_bytes,
    require_bounded,
    to_bytes,
)
from fedcore.learning.flower_apps.legacy_api import parameters_reply, parameters_request
from fedcore.learning.flower_apps.message_api import AppReply
from fedcore.learning.flower_apps.project import ConfigValue, Project, RunConfig, read_project
from fedcore.learning.flower_apps.strategies import Course, course_of
from fedcore.learning.model import seeded
from fedcore.learning.task import Task, user_code

NodeConfig = Mapping[str, bool | int | float | str]

Component = TypeVar("Component")

SITES = 4
"""Simulated sites of an app that names no number."""

RUN_ID, SERVER, TTL = 1, 1, 3600.0
"""Of every message: Flower's own are random, and an app that draws from them would not reproduce. TTL in seconds."""

ALONE = ("centralised", "local_only")
"""Arms in which nothing is averaged."""

ERRORS = ("loss", "error", "mae", "mse", "rmse", "perplexity")
"""Parts of a metric's name by which smaller is better."""


class Partition(Dataset[tuple[float, float]]):
    """So many rows of one site, of which only the app knows the content. kind: what it does with them, train or
    evaluate."""

    def __init__(self, node_config: NodeConfig, kind: str, rows: int) -> None:
        self.node_config, self.kind, self._rows = node_config, kind, rows

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> tuple[float, float]:
        return float(index), 0.5  # a row has a place and no class


class FlowerApp:
    """One app under one run config. Raises BadInput and TaskFailed where the app cannot run here."""

    def __init__(self, project: Project, origin: str, given: Mapping[str, object]) -> None:
        self.project, self.origin, self.given = project, origin, given
        config = {**project.config, **given}
        self.config: RunConfig = {k: v for k, v in config.items() if isinstance(v, ConfigValue)}
        self._client: ClientApp = self._component("clientapp", ClientApp)
        self._server: ServerApp = self._component("serverapp", ServerApp)
        with seeded(0, 0, "", "initial model"):
            self.course = self._run_main()
        self._arm, self._kept = "federated", defaultdict[str, dict[int, KeptState]](dict)
        self._home: NodeConfig = {}
        """The first site of this process, whose client is asked for initial arrays that the server has not."""

    def _component(self, name: str, kind: type[Component]) -> Component:
        found = self.project.load(name)
        if not isinstance(found, kind):
            raise BadInput(
                f"Flower app {self.project.name}: found {type(found).__name__} as {name}, expected a {kind.__name__}",
                remedy=f"tool.flwr.app.components.{name} names what `app = {kind.__name__}(...)` makes",
            )
        return found

    @property
    def _name(self) -> str:
        return f"Flower app {self.project.name}"

    def _run_main(self) -> Course:
        with self._code(f"{self._name}: the ServerApp's main"):
            return course_of(self._server, self.config, self.project.name)

    @property
    def notes(self) -> Sequence[tuple[str, str]]:
        """(warning, hint) of what the app asks for and does not get."""
        return self.course.notes

    @property
    def declared(self) -> str:
        """What the task's digest covers beside its code: the run config as pyproject.toml has it."""
        return json.dumps(dict(self.project.config), sort_keys=True)

    def with_settings(self, given: Mapping[str, object]) -> Task:
        """The task under another run config."""
        return FlowerApp(self.project, self.origin, given).task()

    def task(self) -> Task:
        """The app as a task, of which `at_source` has the names of the metrics."""
        task = Task(
            name=self.project.name, data=self.data, model=self.model, loss=self.loss, metrics=(),
            train=self.train, evaluate=self.evaluate, sites=self.sites,
            defaults=dict(self.course.settings), settings=dict(self.project.config),
            given=dict(self.given), app=self,
        )  # fmt: skip
        object.__setattr__(task, "origin", self.origin)
        object.__setattr__(task, "home", self.project.components["clientapp"].partition(":")[0])
        return task

    def at_source(self, task: Task, source: Any) -> Task:
        """The task with the metrics that the app's evaluate reports for a source, and no kept state of another run.
        Raises BadInput and TaskFailed."""
        node, where = _node_config(source), f"{self._name}: evaluate"
        self._home, self._kept = node, defaultdict(dict)
        names = tuple(self._ask("evaluate", node, self._initial_record(), 0, where).metrics)
        if not names:
            raise BadInput(
                f"{where}: found no metric beside {self.course.messages.weight_key!r}, expected at least one",
                remedy="a number in the reply's MetricRecord, such as accuracy or loss",
            )
        errors = tuple(n for n in names if any(word in n.lower() for word in ERRORS))
        return replace(task, metrics=names, lower_is_better=errors)

    def sites(self, n: int | None = None) -> dict[str, NodeConfig]:
        """The simulated sites: partitions 0 to n - 1. Raises BadInput where the strategy waits for more."""
        sites = n if n is not None else self.project.sites or SITES
        if sites < self.course.least:
            raise BadInput(
                f"sites.n: found {sites}, expected {self.course.least} or more, the least number of nodes that "
                f"{self.course.strategy} waits for in this app",
                remedy=f"--sites {self.course.least}, or a smaller min_available_nodes (min_train_nodes, "
                "min_evaluate_nodes) in the app",
            )
        return {f"site-{k}": {"partition-id": k, "num-partitions": sites} for k in range(sites)}

    def data(self, source: Any) -> tuple[Partition, Partition]:
        """The numbers of rows that the app trains and tests on at a site: it does both once, and what that leaves in
        Context.state is forgotten. Raises BadInput for a source that is no node config."""
        node, arrays = _node_config(source), self._initial_record()

        def part(kind: str) -> Partition:
            return Partition(
                node, kind, self._ask(kind, node, arrays, 1, f"{self._name}: {kind}").examples
            )

        return part("train"), part("evaluate")

    def pooled(self, parts: Sequence[Any]) -> DatasetRows:
        """All data as partition 0 of 1, on which the app trains once. Raises BadInput where its number of rows is not
        that of the sites together."""
        nodes = [_whole(part, "train").node_config for part in parts]
        found = [{k: node.get(k) for k in ("partition-id", "num-partitions")} for node in nodes]
        if found != [{"partition-id": k, "num-partitions": len(parts)} for k in range(len(parts))]:
            raise BadInput("the sites' node configs are no partitions 0, 1, ... of one data set")
        node = {**nodes[0], "partition-id": 0, "num-partitions": 1}
        where, together = f"{self._name}: train on partition 0 of 1", sum(map(len, parts))
        with self.of_arm("centralised"):
            rows = self._ask("train", node, self._initial_record(), 1, where).examples
        if rows != together:
            raise BadInput(
                f"as partition 0 of 1 the app trains on {rows} rows, and at the sites together on {together}"
            )
        return DatasetRows(Partition(node, "train", rows))

    @contextmanager
    def of_arm(self, arm: str) -> Iterator[None]:
        """Meanwhile Context.state is that of an arm; a party that trains alone has no proximal term."""
        before, self._arm = self._arm, arm
        try:
            yield
        finally:
            self._arm = before

    def model(self) -> nn.Module:
        """The initial arrays of the ServerApp, which the caller's seed decides."""
        return module_of(self._arrays(self._run_main()))

    def loss(self, *_: object) -> NoReturn:
        """Raises BadInput: the app has its own, inside train and evaluate."""
        raise BadInput("Flower app: found no loss of single rows, expected train and evaluate only")

    def train(self, model: nn.Module, rows: Any, fit: Any) -> None:
        """One round of the ClientApp's train."""
        partition, like = _whole(rows, "train"), self._like
        where = f"site {fit.site}, round {fit.round}: the app's train"
        node = self._node(partition.node_config)
        if node.round != fit.round:
            node.round, node.before = fit.round, node.after
        state = copy.deepcopy(node.before)
        reply = self._ask(
            "train", partition.node_config, record_of(model, like), fit.round, where, state
        )
        assert reply.arrays is not None
        if reply.examples != len(partition):
            key = self.course.messages.weight_key
            raise BadInput(
                f"{where}: found {key} = {reply.examples}, expected {len(partition)} as at the start",
                remedy="a site's weight is fixed before round 1: the app reports the same number in every round",
            )
        load(model, reply.arrays, like, where)
        require_bounded(state, where)
        node.after = state

    def evaluate(self, model: nn.Module, rows: Any, round: int) -> dict[str, tuple[float, float]]:  # noqa: A002
        """The metrics of the ClientApp's evaluate, each times its number of rows."""
        partition = _whole(rows, "evaluate")  # or a sample of training rows, before round 1
        config, arrays = partition.node_config, record_of(model, self._like)
        node = self._node(config)
        state = copy.deepcopy(node.before if node.round > round else node.after)
        where = f"{self._name}: evaluate, round {round} ({', '.join(f'{k} = {v}' for k, v in config.items())})"
        reply = self._ask("evaluate", config, arrays, round, where, state)
        for name, value in reply.metrics.items():
            if not math.isfinite(value):
                raise BadInput(
                    f"{where}: found {value} in the metric {name!r}, expected a finite number",
                    remedy="report 0 where it is undefined; a smaller learning rate where the model diverged",
                )
        return {n: (value * reply.examples, reply.examples) for n, value in reply.metrics.items()}

    def save(self, arm: str = "federated") -> bytes:
        """The Context.state of each site of this process, before and after the last round that it trained."""
        return to_bytes(self._kept[arm])

    def restore(self, saved: bytes, arm: str = "federated") -> None:
        """The inverse of `save`."""
        self._kept[arm] = from_bytes(saved)

    def _node(self, config: NodeConfig) -> KeptState:
        """Of a site in the present arm. With all rows at one party, that party's, whatever it is tested on."""
        node = 0 if self._arm == "centralised" else _node_id(config)
        return self._kept[self._arm].setdefault(node, KeptState())

    def _ask(
        self,
        kind: str,
        node: NodeConfig,
        arrays: ArrayRecord,
        round_: int,
        where: str,
        state: RecordDict | None = None,
    ) -> AppReply:
        """The ClientApp's reply to a round's message. state: of the Context, which the app may change."""
        messages = self.course.messages
        content = messages.content(kind, arrays, round_, alone=self._arm in ALONE)
        return messages.read(kind, self._call(kind, node, content, round_, where, state), where)

    @torch.enable_grad()
    def _call(
        self,
        kind: str,
        node: NodeConfig,
        content: RecordDict,
        round_: int,
        where: str,
        state: RecordDict | None = None,
    ) -> RecordDict:
        about = Metadata(
            run_id=RUN_ID, message_id=f"{kind}-{round_}", src_node_id=SERVER, dst_node_id=_node_id(node),
            reply_to_message_id="", group_id=str(round_), created_at=time.time(), ttl=TTL, message_type=kind,
        )  # fmt: skip
        kept = RecordDict() if state is None else state
        context = Context(RUN_ID, _node_id(node), dict(node), kept, dict(self.config))
        with self._code(where, node):
            reply: object = self._client(make_message(about, content), context)
        if not isinstance(reply, Message) or reply.has_error():
            error = isinstance(reply, Message) and f"the error {reply.error.reason!r}"
            what = error or type(reply).__name__
            raise BadInput(
                f"{where}: found {what} as its reply, expected a Message",
                remedy="return Message(content=RecordDict({...}), reply_to=msg)",
            )
        return reply.content

    @contextmanager
    def _code(self, where: str, node: NodeConfig | None = None) -> Iterator[None]:
        """Code of the app runs inside. Raises TaskFailed for its errors, and BadInput where it has no such function."""
        try:
            with user_code(where):
                yield
        except TaskFailed as failed:
            cause = failed.__cause__
            if isinstance(cause, ValueError) and "function registered" in str(cause):
                raise BadInput(
                    f"{where}: found no such function in its ClientApp, expected one",
                    remedy="@app.train() and @app.evaluate(): its metrics are those of the run",
                ) from cause
            if not isinstance(cause, KeyError) or "_config" not in failed.user_traceback:
                raise
            raise TaskFailed(
                str(failed), user_traceback=failed.user_traceback, remedy=self._declared_keys(node)
            ) from cause

    def _declared_keys(self, node: NodeConfig | None) -> str:
        """What the app finds in its configs."""
        has = f"[tool.flwr.app.config] in pyproject.toml declares {', '.join(self.config) or 'no key'}"
        return f"{has}; the node config has {', '.join(node)}" if node else has

    def _arrays(self, course: Course) -> AppArrays:
        """The initial arrays; where the server has none, those of a client's get_parameters."""
        if course.arrays is not None:
            return course.arrays
        where = f"{self._name}: get_parameters"
        found = self._call("get_parameters", self._home, parameters_request(), 0, where)
        return parameters_reply(found, where)

    @cached_property
    def _like(self) -> AppArrays:
        """Arrays with the names, shapes and dtypes of the model."""
        with seeded(0, 0, "", "initial model"):
            return self._arrays(self.course)

    def _initial_record(self) -> ArrayRecord:
        return record_of(module_of(self._like), self._like)


def app_task(path: Path, origin: str) -> Task:
    """The task of the Flower app in a folder, under the run config of its pyproject.toml."""
    return FlowerApp(read_project(path), origin, {}).task()


def _node_id(config: NodeConfig) -> int:
    """63 bits that follow from a node config, as Flower's random ones have."""
    text = json.dumps(dict(config), sort_keys=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) >> 1


def _node_config(source: Any) -> NodeConfig:
    if not isinstance(source, Mapping) or not source:
        raise BadInput(
            f"sites: found {source!r} as the data of a Flower app, expected its node config",
            remedy="{partition-id = 0, num-partitions = 4}, or what else the app reads of context.node_config",
        )
    for key, value in source.items():
        if not isinstance(value, ConfigValue):
            raise BadInput(
                f"sites: found {type(value).__name__} in {key} of a node config, expected a number, a text, true or "
                "false"
            )
    return dict(source)


def _whole(rows: Any, kind: str) -> Partition:
    """The partition of some rows. Raises BadInput where it is not all of them: only the app can choose among them."""
    partition = getattr(rows, "dataset", None)
    if not isinstance(partition, Partition) or (
        kind == partition.kind and len(rows) != len(partition)
    ):
        found = f"{len(rows)} of {len(partition)}" if isinstance(partition, Partition) else "pooled"
        raise BadInput(
            f"Flower app: found {found} rows, expected all rows of one site, which only the app can split",
            remedy="no round.validate, and a protect.max_examples (or none) that no site exceeds",
        )
    return partition
