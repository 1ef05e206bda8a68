"""Protected rounds of a Flower app: SecureAggregation and secure_mod over Flower's messages, in one process."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as strategies
from support.flower_grid import NAMES, grid_of

from fedcore.errors import Abandoned, BadInput, PlanRefused, Refused
from fedcore.flower import SecureAggregation, secure_mod, write_identities

pytestmark = pytest.mark.usefixtures("flower_task")


MODEL = {
    "weight": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
    "bias": np.zeros(2, dtype=np.float32),
    "batches": np.array(3, dtype=np.int64),
}


def moves(name):
    """How training at a site moves every value."""
    return np.float32(0.01 * (1 + NAMES.index(name)))


def app_of(name, examples=40, seen=None, move=None):
    """A ClientApp in Flower's conventions whose training adds a constant."""
    app = ClientApp(mods=[secure_mod])

    @app.train()
    def train(message, context):
        arrays = {n: a.numpy() for n, a in message.content["arrays"].items()}
        if seen is not None:
            seen.append(
                (
                    name,
                    sorted(message.content),
                    dict(message.content["config"]),
                    sorted(context.state),
                )
            )
        add = moves(name) if move is None else move
        local = {n: a + (add if a.dtype.kind == "f" else 1) for n, a in arrays.items()}
        metrics = {"num-examples": examples, "train_loss": 0.25, "rows_of_patient_7": 3.0}
        content = {
            "arrays": ArrayRecord(
                {n: Array(np.asarray(a, arrays[n].dtype)) for n, a in local.items()}
            ),
            "metrics": MetricRecord(metrics),
        }
        return Message(RecordDict(content), reply_to=message)

    return app


def record(arrays=MODEL):
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def secure(sites, strategy=None, **changes):
    values = {"value_range": 0.0625, "max_examples": 64, "protection": "masked"} | changes
    strategy = strategy or strategies.FedAvg(fraction_evaluate=0.0)
    return SecureAggregation(strategy, sites=sites, federation="hospitals", **values)


def run(tmp_path, strategy=None, *, rounds=1, silent=(), app=app_of, **changes):
    grid, sites = grid_of(tmp_path, app)
    grid.silent = set(silent)
    made = secure(sites, strategy, **changes)
    return made, made.start(grid, record(), num_rounds=rounds, timeout=0.2), grid


def test_fedavg_gets_the_mean_of_all_sites_and_float32_stays(tmp_path):
    made, result, _ = run(tmp_path, rounds=2, metrics={"train_loss": (0.0, 1.0)})
    mean = np.mean([moves(name) for name in NAMES])
    found = {name: array.numpy() for name, array in result.arrays.items()}
    assert {name: array.dtype for name, array in found.items()} == {
        name: array.dtype for name, array in MODEL.items()
    }
    assert np.abs(found["weight"] - (MODEL["weight"] + 2 * mean)).max() < 1e-5
    assert found["batches"] == 3
    assert [report.survivors for report in made.history] == [NAMES, NAMES]
    metrics = dict(result.train_metrics_clientapp[1])
    assert metrics == {"train_loss": pytest.approx(0.25, abs=1e-5)}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("FedAdam", {"eta": 0.1}), ("FedYogi", {"eta": 0.1}), ("FedAdagrad", {"eta": 0.1}),
        ("FedAvgM", {"server_momentum": 0.9}), ("FedProx", {"proximal_mu": 0.1}),
    ],
)  # fmt: skip
def test_a_server_optimiser_steps_from_the_one_aggregate_as_from_single_replies(
    tmp_path, kind, settings
):
    build = getattr(strategies, kind)
    _, result, _ = run(tmp_path, build(fraction_evaluate=0.0, **settings), rounds=2)
    alone, model = build(fraction_evaluate=0.0, **settings), record()
    nodes = type("Nodes", (), {"get_node_ids": lambda self: range(4)})()
    for number in (1, 2):
        sent = list(alone.configure_train(number, model, ConfigRecord(), nodes))
        replies = []
        for name, message in zip(NAMES, sent, strict=True):
            arrays = {n: a.numpy() for n, a in model.items()}
            local = {n: a + (moves(name) if a.dtype.kind == "f" else 0) for n, a in arrays.items()}
            content = {"arrays": record(local), "metrics": MetricRecord({"num-examples": 40})}
            replies.append(Message(RecordDict(content), reply_to=message))
        stepped, _ = alone.aggregate_train(number, replies)
        model = record({n: a.numpy().astype(MODEL[n].dtype) for n, a in stepped.items()})
    for name in ("weight", "bias"):
        assert np.abs(result.arrays[name].numpy() - model[name].numpy()).max() < 1e-3


def test_the_training_function_sees_what_the_strategy_sends_and_nothing_of_ours(tmp_path):
    seen = []
    strategy = strategies.FedProx(fraction_evaluate=0.0, proximal_mu=0.25)
    run(tmp_path, strategy, app=lambda name: app_of(name, seen=seen))
    assert sorted(name for name, *_ in seen) == sorted(NAMES)
    for _, records, config, state in seen:
        assert records == ["arrays", "config"]
        assert config == {"server-round": 1, "proximal-mu": 0.25}
        assert state == []


def test_no_reply_has_an_update_a_number_of_rows_or_another_metric_in_it(tmp_path):
    _, _, grid = run(tmp_path, app=lambda name: app_of(name, examples=37))
    assert all(set(reply.content) <= {"fedcore", "fedcore.body"} for reply in grid.replies)
    assert not any(reply.content.metric_records for reply in grid.replies)


def test_a_site_that_does_not_answer_is_survived(tmp_path):
    made, result, _ = run(tmp_path, silent={102})
    assert made.history[0].survivors == ("va", "oslo", "bern")
    mean = np.mean([moves(name) for name in ("va", "oslo", "bern")])
    assert np.abs(result.arrays["bias"].numpy() - mean).max() < 1e-5


def test_values_beyond_the_range_are_counted(tmp_path):
    made, _, _ = run(tmp_path, app=lambda name: app_of(name, move=np.float32(0.5)))
    assert made.history[0].clipped == 4 * 8


def test_too_few_sites_end_the_run_with_one_line(tmp_path):
    with pytest.raises(Refused, match="expected at least 3 of 4 sites to take part"):
        run(tmp_path, silent={101, 102})


def test_a_run_without_a_released_round_is_abandoned(tmp_path):
    def broken(name):
        app = ClientApp(mods=[secure_mod])

        @app.train()
        def train(message, context):
            raise ValueError(name)

        return app

    with pytest.raises(Abandoned, match="all 1 rounds abandoned"):
        run(tmp_path, app=broken)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({}, "fraction_evaluate=1, expected 0"),
        ({"fraction_evaluate": 0.0, "fraction_train": 0.5}, "fraction_train=0.5"),
    ],
)
def test_settings_of_a_strategy_that_have_no_protected_form_are_refused(settings, text):
    with pytest.raises(PlanRefused, match=text):
        secure({"a": "00"}, strategies.FedAvg(**settings))


def test_arrays_that_are_not_numbers_are_refused(tmp_path):
    grid, sites = grid_of(tmp_path, app_of)
    with pytest.raises(BadInput, match="array 'names': found values of type <U2, expected numbers"):
        secure(sites).start(grid, record({"names": np.array(["a", "bc"])}), timeout=0.2)


def test_a_message_without_protection_is_refused_before_the_training_function(tmp_path):
    seen = []
    grid, _ = grid_of(tmp_path, lambda name: app_of(name, seen=seen))
    content = RecordDict({"arrays": record(), "config": ConfigRecord({"server-round": 1})})
    (reply,) = grid.send_and_receive([Message(content, 100, "train")])
    assert "found a train message without protection" in reply.error.reason
    assert "hint: wrap the strategy" in reply.error.reason
    assert not seen


def test_a_node_without_an_identity_is_refused_with_a_hint(tmp_path):
    grid, sites = grid_of(tmp_path, app_of)
    for context in grid.contexts.values():
        context.node_config = {}
    with pytest.raises(Refused, match="expected at least 3 of 4"):
        secure(sites).start(grid, record(), timeout=0.2)
    assert "node config 'fedcore': found none" in grid.replies[0].error.reason


def test_a_key_that_is_not_the_one_of_the_site_is_refused(tmp_path):
    grid, sites = grid_of(tmp_path, app_of)
    (sites.parent / "va" / "site.key").write_text("11" * 32)
    made = secure(sites)
    made.start(grid, record(), num_rounds=1, timeout=0.2)
    assert made.history[0].survivors == ("oslo", "rome", "bern")
    assert "expected the one of [sites] whose public key belongs to" in grid.replies[0].error.reason


def test_a_supernode_that_lost_its_context_takes_no_further_part(tmp_path):
    grid, sites = grid_of(tmp_path, app_of)

    def forget(node, content):
        if node == 103 and "arrays" in content:
            grid.contexts[node].state.clear()
        return content

    grid.change = forget
    made = secure(sites)
    made.start(grid, record(), num_rounds=2, timeout=0.2)
    assert [report.survivors for report in made.history] == [NAMES[:3], NAMES[:3]]


def test_a_serverapp_that_sends_one_site_another_model_gets_no_update_of_it(tmp_path):
    grid, sites = grid_of(tmp_path, app_of)

    def change(node, content):
        if node == 100 and "arrays" in content:
            content["arrays"] = record({n: np.zeros_like(a) for n, a in MODEL.items()})
        return content

    grid.change = change
    made = secure(sites)
    made.start(grid, record(), num_rounds=1, timeout=0.2)
    assert made.history[0].survivors == NAMES[1:]


def test_a_serverapp_that_sends_one_site_other_settings_gets_no_update_of_it(tmp_path):
    grid, sites = grid_of(tmp_path, app_of)

    def change(node, content):
        if node == 100 and "config" in content:
            content["config"]["server-round"] = 2
        return content

    grid.change = change
    made = secure(sites)
    made.start(grid, record(), num_rounds=1, timeout=0.2)
    assert made.history[0].survivors == NAMES[1:]


def test_identities_are_written_once_and_keys_are_private(tmp_path):
    sites = write_identities(tmp_path / "made", "hospitals", NAMES)
    assert sites.read_text().count('"') == 2 * len(NAMES)
    assert (tmp_path / "made" / "va" / "site.key").stat().st_mode & 0o077 == 0
    with pytest.raises(BadInput, match="exists already"):
        write_identities(tmp_path / "made", "hospitals", NAMES)
    with pytest.raises(BadInput, match="at least 3 distinct names"):
        write_identities(tmp_path / "few", "hospitals", NAMES[:2])
