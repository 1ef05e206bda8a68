"""Bad input of a protected run on Flower's engine: one line with what, where and what to do, at the side it is of."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest
from fedcore_clients.flower_mod import _Training
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Error,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from support.flower_grid import NAMES, grid_of

from fedcore.errors import BadInput, FedcoreError, PlanRefused, Refused
from fedcore.flower import SecureAggregation, secure_mod

pytestmark = pytest.mark.usefixtures("flower_task")


MODEL = {"w": np.zeros((2, 2), np.float32), "b": np.zeros(2, np.float32), "count": np.array(3)}


def record(arrays):
    return ArrayRecord({name: Array(np.asarray(array)) for name, array in arrays.items()})


def trained(reply):
    """What the mod makes of a training function's reply. reply: its records, or a function of the message."""
    content = RecordDict({"arrays": record(MODEL), "config": ConfigRecord({"server-round": 1})})
    message = Message(content, 100, "train")

    def call_next(message, context):
        return (
            reply(message)
            if callable(reply)
            else Message(RecordDict(dict(reply)), reply_to=message)
        )

    return _Training(message, Context(7, 100, {}, RecordDict(), {}), call_next)()


OBJECTS = ArrayRecord({"w": Array("object", (1,), "numpy.ndarray", b"x")})
MOVED = {"w": MODEL["w"] + np.float32(1), "b": MODEL["b"], "count": MODEL["count"]}


def replied(arrays=MOVED, **metrics):
    return {"a": record(arrays), "m": MetricRecord({"num-examples": 40, **metrics})}


@pytest.mark.parametrize(
    "arrays",
    [MOVED, dict(reversed(MOVED.items())), {**MOVED, "w": MOVED["w"].astype(np.float64)}],
    ids=["as it came", "in another order", "in float64"],
)
def test_reply_with_the_arrays_that_came_is_taken(arrays):
    found = trained(replied(arrays, loss=0.5))
    assert found.update.tolist() == [1, 1, 1, 1, 0, 0]
    assert (found.examples, found.metrics["loss"]) == (40, 0.5)


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        (replied({**MOVED, "w": np.zeros(3, np.float32)}), "array 'w': found shape (3,) of floats, expected"),
        (replied({**MOVED, "count": np.zeros(2, int)}), "array 'count': found (2,), expected ()"),
        (replied({**MOVED, "w": MOVED["w"].astype(int)}), "array 'w': found shape (2, 2) of int64, expected"),
        (replied({**MOVED, "w": MOVED["w"].astype(complex)}), "of complex128, expected shape (2, 2) of floats"),
        (replied({**MOVED, "w": MOVED["w"].astype(str)}), "of <U32, expected shape (2, 2) of floats"),
        (replied({"w": MOVED["w"], "count": MOVED["count"]}), "array 'b': found none, expected shape (2,) of floats"),
        (replied({**MOVED, "new": MOVED["b"]}), "array 'new': found shape (2,) of floats, expected none"),
        (replied({}), "array 'w': found none"),
        (replied({**MOVED, "b": np.full(2, np.nan, np.float32)}), "training: found NaN or infinity in the update"),
        (replied({**MOVED, "b": np.full(2, np.inf, np.float32)}), "training: found NaN or infinity in the update"),
        ({**replied(), "more": record(MOVED)}, "found 2 array records, expected one"),
        ({"m": MetricRecord({"num-examples": 4})}, "found 0 array records, expected one"),
        ({"a": OBJECTS, "m": MetricRecord({"num-examples": 4})},
         "arrays: found some that NumPy cannot read"),
        ({"a": record(MOVED)}, "found 'num-examples' = None, expected a whole number of rows"),
        (lambda message: None, "training: found NoneType, expected a Message with arrays"),
        (lambda message: Message(Error(1, "no rows"), reply_to=message), "training: found the error 'no rows'"),
        *[
            (replied(**{"num-examples": value}), f"found 'num-examples' = {value}, expected")
            for value in (-3, 0, 0.5, 2.5, float("nan"), float("inf"), [3], 1 << 60)
        ],
    ],
)  # fmt: skip
def test_reply_of_the_training_function_that_is_no_update_is_refused(reply, line):
    with pytest.raises(BadInput, match=re.escape(line)) as refused:
        trained(reply)
    assert "\n" not in str(refused.value)


def secure(sites, strategy=None, **changes):
    values = {
        "value_range": 0.0625,
        "max_examples": 64,
        "protection": "masked",
        "federation": "hospitals",
    }
    return SecureAggregation(strategy or FedAvg(fraction_evaluate=0.0), sites=sites, **values | changes)  # fmt: skip


def app_of(name, train=None):
    app = ClientApp(mods=[secure_mod])

    @app.train()
    def step(message, context):
        if train is not None and name == "va":
            return train(message)
        arrays = {n: a.numpy() for n, a in message.content["arrays"].items()}
        moved = {n: a + np.float32(0.01) if a.dtype.kind == "f" else a for n, a in arrays.items()}
        metrics = MetricRecord({"num-examples": 40, "loss": 0.5})
        return Message(RecordDict({"a": record(moved), "m": metrics}), reply_to=message)

    return app


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        (
            {"loss": [0.5, 0.25]},
            "training: metric 'loss': found [0.5, 0.25], expected a finite number",
        ),
        ({"loss": float("nan")}, "training: metric 'loss': found nan, expected a finite number"),
        (None, "ValueError: a text about rows"),
    ],
)
def test_site_whose_training_gives_nothing_to_sum_leaves_the_round_and_says_why_in_its_own_log(
    tmp_path, caplog, reply, line
):
    def train(message):
        if reply is None:
            raise ValueError("a text about rows")
        return Message(RecordDict(replied(**reply)), reply_to=message)

    grid, sites = grid_of(tmp_path, lambda name: app_of(name, train))
    made = secure(sites, metrics={"loss": (0.0, 1.0)})
    with caplog.at_level(logging.WARNING, "fedcore"):
        made.start(grid, record(MODEL), num_rounds=1, timeout=0.2)
    assert made.history[0].survivors == NAMES[1:]
    (said,) = [each for each in caplog.records if line in each.getMessage()]
    assert said.name == "fedcore.site"
    if reply is None:  # the user's own traceback begins at the user's first frame
        assert said.exc_info[2].tb_frame.f_code.co_filename == __file__
    told = [str(reply.content) for reply in grid.replies if not reply.has_error()]
    assert not any(line in each for each in told)


def changed(old, new):
    def edit(folder):
        path = folder / "site.toml"
        text = path.read_text()
        assert re.search(old, text)
        path.write_text(re.sub(old, new, text))

    return edit


def key(data):
    return lambda folder: (folder / "site.key").write_bytes(data)


SITE_FILES = [
    (lambda folder: (folder / "site.toml").unlink(), "site.toml: found no such file, expected that of this site"),
    (lambda folder: (folder / "site.toml").write_text("a = ["), "site.toml: it cannot be read as TOML"),
    (changed("site = ", "sit = "), "site.toml: key: found 'sit', which is not known"),
    (changed('federation = ".*"\n', ""), "site.toml: federation: found nothing"),
    (lambda folder: (folder / "site.key").unlink(), "site.key: it cannot be read (No such file or directory)"),
    (lambda folder: (folder / "site.key").chmod(0o644), "site.key: found mode 0644, expected 0600"),
    (key(b"hello"), "site.key: found no hex, expected 64 hex digits"),
    (key(b"\xff\xfe" * 32), "site.key: found no hex, expected 64 hex digits"),
    (key(b"11" * 30), "site.key: found 30 bytes, expected 32"),
    (key(b"11" * 32), "site: found 'va', expected the one of [sites] whose public key belongs to"),
    (changed('site = "va"', 'site = "oslo"'), "site: found 'oslo', expected the one of [sites] whose public key"),
    (changed('site = "va"', 'site = "paris"'), "site: found 'paris', expected the one of [sites] whose public key"),
    (changed('rome = "..', 'rome = "'), "sites.rome: found 31 bytes, expected 32"),
    (changed('rome = "..', 'rome = "zz'), "sites.rome: found no hex"),
    (changed(r'va = (".*")(?s:.*)rome = ".*"', r"va = \1\nrome = \1"), "identity key of rome: found the key of va"),
    (changed(r'(rome = ".*")', r"\1\n\1"), "it cannot be read as TOML (Cannot overwrite a value"),
    (changed("^", "minimum_sites = 2\n"), "minimum_sites: found 2, expected greater than or equal to 3"),
    (changed("^", 'protections = ["msked"]\n'), "protection: found 'msked', which is not known"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "line"), SITE_FILES)
def test_supernode_without_a_good_identity_answers_with_one_line(tmp_path, edit, line):
    grid, sites = grid_of(tmp_path, app_of)
    edit(sites.parent / "va")
    (reply,) = grid.send_and_receive(
        [Message(RecordDict({"fedcore": ConfigRecord()}), 100, "train")]
    )
    assert line in reply.error.reason
    assert "\n" not in reply.error.reason
    assert not (sites.parent / "va" / "runs").exists()


def test_the_serverapp_is_told_what_every_supernode_lacks(tmp_path, caplog):
    grid, sites = grid_of(tmp_path, app_of)
    for name in NAMES[:2]:
        (sites.parent / name / "site.key").chmod(0o644)
    with caplog.at_level(logging.WARNING, "fedcore.coordinator"), pytest.raises(Refused) as refused:
        secure(sites).start(grid, record(MODEL), timeout=0.2)
    assert "node 100: " in str(refused.value)
    assert "node 101: " in str(refused.value)
    assert str(refused.value).count("found mode 0644, expected 0600") == 2
    assert refused.value.remedy and refused.value.exit_code == 3


def test_one_supernode_that_takes_no_part_is_named_in_the_log_of_the_serverapp(tmp_path, caplog):
    grid, sites = grid_of(tmp_path, app_of)
    changed('federation = ".*"', 'federation = "clinics"')(sites.parent / "va")
    made = secure(sites)
    with caplog.at_level(logging.WARNING, "fedcore.coordinator"):
        made.start(grid, record(MODEL), num_rounds=1, timeout=0.2)
    assert made.history[0].survivors == NAMES[1:]
    assert "site va: federation: found hospitals, expected clinics" in caplog.text


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"max_examples": 0}, "max_examples: found 0, expected 1 to 2^40"),
        ({"max_examples": 2.5}, "max_examples: found 2.5, expected a whole number"),
        ({"max_examples": "64"}, "max_examples: found '64', expected a whole number"),
        ({"bits": "16"}, "bits: found '16', expected a whole number"),
        ({"seed": None}, "seed: found None, expected a whole number"),
        ({"threshold": True}, "threshold: found True, expected a whole number"),
        ({"threshold": 2}, "protect.threshold: found 2 for 4 sites, expected 3 to 4"),
        ({"value_range": "wide"}, "value_range: found 'wide', expected a number"),
        ({"value_range": float("nan")}, "protect.range: found nan"),
        ({"protection": None}, "protection: found None, expected a text"),
        ({"protection": "maskd"}, "protect.protection: found 'maskd', which is not known"),
        ({"protection": "plain"}, "protect.protection: found 'plain', expected layered"),
        ({"metrics": {"loss": 1}}, "metrics: found {'loss': 1}, expected {name: (low, high)}"),
        ({"metrics": {"loss": (1, 0)}}, "metrics: loss: found 1.0 to 0.0, expected a range"),
        ({"metrics": ["loss"]}, "metrics: found ['loss'], expected {name: (low, high)}"),
        ({"metrics": {"num-examples": (0, 1)}}, "metrics: found 'num-examples', which is the weight"),
        ({"strategy": FedAvg(fraction_evaluate=0.0, weighted_by_key="rows")}, "found weighted_by_key='rows'"),
        ({"num_rounds": 0}, "rounds: found 0, expected 1 to 2^40"),
        ({"num_rounds": 2.5}, "rounds: found 2.5, expected a whole number"),
        ({"timeout": 0}, "timeout: found 0, expected seconds above 0"),
        ({"arrays": None}, "arrays: found NoneType, expected an ArrayRecord"),
        ({"arrays": MODEL}, "arrays: found dict, expected an ArrayRecord"),
        ({"arrays": ArrayRecord()}, "arrays: found 0 and none with floats"),
        ({"arrays": record({"w": np.array([1.0, np.nan])})}, "array 'w': found NaN or infinity"),
        ({"arrays": record({"w": np.zeros(2, complex)})}, "array 'w': found values of type complex128"),
        ({"arrays": OBJECTS}, "found some that NumPy cannot read"),
        ({"sites": "/nowhere/sites.toml"}, "/nowhere/sites.toml: it cannot be read"),
        ({"sites": {}}, "sites: found no table [sites]"),
        ({"sites": dict.fromkeys(NAMES, "zz")}, "sites: found a key that is no hex"),
        ({"sites": dict.fromkeys(NAMES, "11" * 32)}, "identity key of oslo: found the key of va"),
        ({"sites": dict.fromkeys(NAMES, "11" * 30)}, "identity key of va: found 30 bytes"),
    ],
)  # fmt: skip
def test_argument_that_no_run_can_have_is_refused_before_a_message_is_sent(tmp_path, changes, line):
    grid, sites = grid_of(tmp_path, app_of)
    given = {"sites": sites, "arrays": record(MODEL), "num_rounds": 1, "timeout": 0.2} | changes
    start = {name: given.pop(name) for name in ("arrays", "num_rounds", "timeout")}
    with pytest.raises(FedcoreError, match=re.escape(line)) as refused:
        secure(**given).start(grid, start.pop("arrays"), **start)
    assert refused.value.exit_code in {2, 3}
    assert grid.sent == 0


class NoMessages(FedAvg):
    def configure_train(self, *given):
        return []


class OthersForEach(FedAvg):
    def configure_train(self, number, arrays, config, grid):
        for place, message in enumerate(super().configure_train(number, arrays, config, grid)):
            each = ConfigRecord({"place": place})
            message.content = RecordDict({"arrays": arrays, "config": each})
            yield message


def stepping(change):
    """A strategy whose server step does this to the arrays that FedAvg has."""

    class Changed(FedAvg):
        def aggregate_train(self, number, replies):
            arrays, metrics = super().aggregate_train(number, replies)
            return change({name: array.numpy() for name, array in arrays.items()}), metrics

    return Changed


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (NoMessages, "strategy: found no message of configure_train for round 1"),
        (OthersForEach, "strategy: found different messages to nodes in round 1"),
        (stepping(lambda arrays: None), "strategy: found no arrays after round 1"),
        (stepping(lambda arrays: record({"z": arrays["w"]})), "strategy, round 1: array 'w': found none"),
        (stepping(lambda arrays: record({**arrays, "w": arrays["w"][:1]})), "array 'w': found shape (1, 2) of floats"),
        (stepping(lambda arrays: record({**arrays, "w": arrays["w"] * np.nan})), "array 'w': found NaN or infinity"),
        (stepping(lambda arrays: record({**arrays, "w": arrays["w"].astype(int)})), "found shape (2, 2) of int64"),
    ],
)  # fmt: skip
def test_strategy_that_changes_the_model_into_another_is_refused(tmp_path, kind, line):
    grid, sites = grid_of(tmp_path, app_of)
    with pytest.raises((BadInput, PlanRefused), match=re.escape(line)):
        secure(sites, kind(fraction_evaluate=0.0)).start(
            grid, record(MODEL), num_rounds=2, timeout=0.2
        )


def test_metric_that_no_site_has_is_a_warning_in_the_log_of_the_serverapp(tmp_path, caplog):
    grid, sites = grid_of(tmp_path, app_of)
    made = secure(sites, metrics={"loss": (0.0, 1.0), "los": (0.0, 1.0)})
    with caplog.at_level(logging.WARNING, "fedcore.coordinator"):
        result = made.start(grid, record(MODEL), num_rounds=1, timeout=0.2)
    assert list(result.train_metrics_clientapp[1]) == ["loss"]
    said = [each.getMessage() for each in caplog.records if "no metric" in each.getMessage()]
    assert len(said) == 1
    assert said[0].startswith("round 1: no metric 'los' in the sum: no site has it")
