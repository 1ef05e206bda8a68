"""A Flower app whose rounds are protected, simulated: the app of docs/examples/flower-secagg beside the same without
protection, and beside Fedcore's own engine."""

from __future__ import annotations

import logging
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest
from fedcore_clients import flower_mod
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from support.flower_grid import SimulatedGrid
from support.flower_grid import grid_of as deployed

from fedcore.errors import BadInput, Refused
from fedcore.experiment.prepare import job_for, prepare
from fedcore.flower import SecureAggregation, secure_mod, write_identities
from fedcore.learning.state import model_digest

EXAMPLE = Path(__file__).resolve().parents[3] / "docs/examples/flower-secagg"

PLACES = 4


pytestmark = pytest.mark.usefixtures("flower_task")


@pytest.fixture
def simulated(monkeypatch):
    """This process stands for the workers of Ray, which is no package of the tests; with Ray see the last test."""
    monkeypatch.setattr(flower_mod, "_is_simulated", lambda: True)


@pytest.fixture
def example(monkeypatch):
    """(client_app, server_app, run config) of the example."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from secagg_app import client_app, server_app

    config = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["tool"]["flwr"]["app"][
        "config"
    ]
    yield client_app, server_app, {**config, "stage-seconds": 5.0}
    logging.getLogger("fedcore").handlers.clear()


def grid_of(app, config):
    grid = SimulatedGrid(app, PLACES)
    for context in grid.contexts.values():
        context.run_config = config
    return grid


def without_protection(folder):
    """The example without the mod, as its author had it before, under another name: both are in this process."""
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "secagg_app").rename(folder / "bare_app")
    for path in folder.rglob("*.*"):
        text = path.read_text().replace("secagg_app", "bare_app")
        text = text.replace("mods=[secure_mod]", "")
        path.write_text(text.replace('protection = "layered"', 'protection = "none"'))
    return folder


def simulated_model(folder, **changes):
    """The model_sha256 that Fedcore's own engine ends with, with what the example gives `SecureAggregation`."""
    settings = {"protection": "plain", "range": 0.5, "max_examples": 512, "bits": 16} | changes
    task = f"flower:{without_protection(folder / 'bare')}"
    federation = prepare(*job_for(None, {"task": task, **settings})).federation
    for _ in range(3):
        federation.advance()
    return model_digest(federation.state.server.model)


def run_example(example, capsys, **changes):
    """What its ServerApp prints."""
    client_app, server_app, config = example
    config = config | changes
    context = Context(7, 0, {}, RecordDict(), config)
    server_app.app(grid=grid_of(client_app.app, config), context=context)
    return capsys.readouterr().out


@pytest.mark.usefixtures("simulated")
def test_the_model_is_that_of_fedcore_simulate_of_the_app_without_the_mod(
    tmp_path, example, capsys
):
    printed = run_example(example, capsys, protection="masked")
    assert f"model {simulated_model(tmp_path)}" in printed
    assert "round 3: 4 sites" in printed


def test_a_site_that_dies_in_a_round_leaves_the_model_of_fedcore_simulate_without_it(
    tmp_path, example, capsys
):
    client_app, server_app, config = example
    grid, sites = deployed(tmp_path, lambda _: client_app.app, [f"site-{k}" for k in range(PLACES)])
    for place, context in enumerate(grid.contexts.values()):
        context.node_config |= {"partition-id": place, "num-partitions": PLACES}
        context.run_config = config

    def die(node, content):
        if "config" in content and content["config"]["server-round"] == 2:
            grid.silent.add(103)
        return content

    grid.change = die
    config = config | {"sites": str(sites), "protection": "masked"}
    server_app.app(grid=grid, context=Context(7, 0, {}, RecordDict(), config))
    printed = capsys.readouterr().out
    absences = ["2:submit:site-3", "3:submit:site-3"]
    assert f"model {simulated_model(tmp_path, drop=absences)}" in printed
    assert "round 1: 4 sites" in printed
    assert "round 2: 3 sites" in printed


def whole(record):
    return np.concatenate([array.numpy().reshape(-1) for array in record.values()])


@pytest.mark.usefixtures("simulated")
def test_each_round_is_within_its_rounding_of_the_round_without_protection(example):
    client_app, server_app, config = example
    models = []
    secure = SecureAggregation(
        FedAvg(fraction_evaluate=0.0), max_examples=512, protection="masked", value_range=0.5
    )
    asked = {
        "num_rounds": 2,
        "timeout": 5.0,
        "train_config": ConfigRecord({"lr": config["lr"]}),
    }
    secure.start(
        grid_of(client_app.app, config), ArrayRecord(server_app.build_model().state_dict()),
        evaluate_fn=lambda _, arrays: models.append(arrays), **asked,
    )  # fmt: skip
    bare = ClientApp()
    bare.train()(client_app.train_on_rows)
    for report, start, end in zip(secure.history, models, models[1:], strict=False):
        alone = FedAvg(fraction_evaluate=0.0).start(
            grid_of(bare, config), start, **asked | {"num_rounds": 1}
        )
        difference = np.abs(whole(alone.arrays) - whole(end)).max()
        moved = np.abs(whole(end) - whole(start)).max()
        assert report.clipped == 0
        assert 0 < difference < report.rounding + 1e-7 < 0.01 * moved
    assert len(models) == 3


def tiny_app(seen=None):
    app = ClientApp(mods=[secure_mod])

    @app.train()
    def train(message, context):
        if seen is not None:
            seen.append(context.node_config)
        local = {
            n: Array(a.numpy() + np.float32(0.25)) for n, a in message.content["arrays"].items()
        }
        content = {"arrays": ArrayRecord(local), "metrics": MetricRecord({"num-examples": 4})}
        return Message(RecordDict(content), reply_to=message)

    return app


def start(grid, timeout=0.2, **changes):
    made = SecureAggregation(
        FedAvg(fraction_evaluate=0.0),
        max_examples=4,
        protection="masked",
        value_range=0.5,
        **changes,
    )
    arrays = ArrayRecord({"w": Array(np.zeros(3, dtype=np.float32))})
    return made, made.start(grid, arrays, num_rounds=2, timeout=timeout)


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize("changes", [{}, {"sites": {"va": "11" * 32}, "federation": "hospitals"}])
def test_a_simulation_needs_no_identities_and_uses_none_of_a_deployment(changes):
    made, result = start(SimulatedGrid(tiny_app(), 3), **changes)
    assert [report.survivors for report in made.history] == [("site-0", "site-1", "site-2")] * 2
    assert np.allclose(result.arrays["w"].numpy(), 0.5, atol=1e-4)


@pytest.mark.usefixtures("simulated")
def test_a_simulation_of_two_nodes_is_refused_with_the_option_that_makes_more():
    with pytest.raises(BadInput, match="simulation: found 2 nodes, expected at least 3") as found:
        start(SimulatedGrid(tiny_app(), 2))
    assert "num-supernodes" in found.value.remedy


@pytest.mark.usefixtures("simulated")
@pytest.mark.parametrize(
    "config", [{}, {"partition-id": 3, "num-partitions": 3}, {"partition-id": "0"}]
)
def test_a_simulated_node_without_a_place_is_refused(config):
    grid = SimulatedGrid(tiny_app(), 3)
    grid.contexts[100].node_config = config
    with pytest.raises(Refused, match="expected at least 3 of 3"):
        start(grid)
    assert "expected those of a simulated node" in grid.replies[0].error.reason


@pytest.mark.parametrize("key", ["fedcore", "identities", "sites", "federation"])
def test_a_deployed_node_without_a_file_cannot_be_made_a_simulated_one(tmp_path, key):
    seen = []
    grid = SimulatedGrid(tiny_app(seen), 3)
    write_identities(tmp_path / "ids", "simulation", ("site-0", "site-1", "site-2"))
    for context in grid.contexts.values():
        context.run_config = {key: str(tmp_path / "ids"), "simulation": True}
    with pytest.raises(Refused, match="expected at least 3 of 3"):
        start(grid)
    assert all("node config 'fedcore': found none" in reply.error.reason for reply in grid.replies)
    assert not seen


def test_a_run_on_a_superlink_without_public_keys_is_refused(tmp_path):
    grid, _ = deployed(tmp_path, lambda name: tiny_app())
    with pytest.raises(BadInput, match="sites: found none, expected the public key of every site"):
        start(grid)
    assert grid.sent == 0


@pytest.mark.parametrize(
    ("error", "ends"),
    [
        (BadInput("sites: found none"), "ServerApp raised an exception\nerror: sites: found none"),
        (BadInput("a: found b", remedy="c"), "exception\nerror: a: found b\nhint: c"),
        (ValueError("of the app"), "ValueError: of the app"),
    ],
)
def test_flower_logs_the_line_of_a_refusal_and_the_traceback_of_anything_else(caplog, error, ends):
    SecureAggregation(FedAvg(fraction_evaluate=0.0), max_examples=4)
    try:
        raise error
    except (BadInput, ValueError) as found:
        with caplog.at_level(logging.ERROR, "flwr"):
            logging.getLogger("flwr").propagate = True
            logging.getLogger("flwr").log(
                logging.ERROR, "%s raised an exception", "ServerApp", exc_info=found
            )
    assert caplog.text.strip().endswith(ends)
    assert ("Traceback" in caplog.text) == isinstance(error, ValueError)


@pytest.mark.slow
def test_workers_of_ray_are_simulated_nodes_and_the_process_that_starts_them_is_none():
    """Needs the extra flower-simulation."""
    pytest.importorskip("ray")
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    found = {}
    server = ServerApp()

    @server.main()
    def main(grid, context):
        found["made"], found["result"] = start(grid, timeout=60.0)
        node = Context(7, 1, {"partition-id": 0, "num-partitions": 3}, RecordDict(), {})
        message = Message(RecordDict({"fedcore": ConfigRecord()}), 1, "train")
        found["beside"] = tiny_app()(message, node)

    run_simulation(server, tiny_app(), 3, backend_config={"client_resources": {"num_cpus": 1}})
    assert [report.survivors for report in found["made"].history] == [
        ("site-0", "site-1", "site-2")
    ] * 2
    assert np.allclose(found["result"].arrays["w"].numpy(), 0.5, atol=1e-4)
    assert "node config 'fedcore': found none" in found["beside"].error.reason
