"""Flower apps on this engine: what their authors rely on, and what is refused."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

pytest.importorskip("flwr")

from fedcore_clients.worker import Worker
from fedcore_server import operators
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Metadata, MetricRecord, RecordDict
from flwr.app.message import make_message
from flwr.serverapp import Grid
from flwr.serverapp import strategy as strategies
from safetensors.numpy import load_file
from support.flower_apps import (
    CLIENT,
    LEGACY_CLIENT,
    LEGACY_SERVER,
    MOMENTUM,
    POOLABLE,
    SERVER,
    flower_app,
)

import fedcore
from fedcore.cli.main import main
from fedcore.config import build_job, plan_of, read_job_file, wire_settings
from fedcore.errors import BadInput, TaskFailed, UnknownName
from fedcore.experiment.api import resume
from fedcore.learning.data.split import FoldSplit
from fedcore.learning.flower_apps.kept_state import KeptState, from_bytes, to_bytes
from fedcore.learning.guard import GuardMemory, GuardRules
from fedcore.learning.state import JobState
from fedcore.learning.task import load_task
from fedcore.results import is_column
from fedcore.types import ARMS

pytestmark = pytest.mark.usefixtures("no_drawings")

REPOSITORY = Path(__file__).parents[3]


def simulated(folder, out, **settings):
    return fedcore.simulate(
        f"flower:{folder}",
        out=out,
        **{"protection": "plain", "resamples": 0, "arms": ("federated",), **settings},
    )


def arrays_of(run):
    return load_file(run.directory / "model.safetensors")


class InProcessGrid(Grid):
    """Flower's side of the comparison: nodes that call the app's ClientApp with what a strategy sends them."""

    def __init__(self, client, config, nodes):
        self.client, self.nodes = client, nodes
        self.contexts = {
            k + 1: Context(
                1, k + 1, {"partition-id": k, "num-partitions": nodes}, RecordDict(), config
            )
            for k in range(nodes)
        }

    def set_run(self, run): ...
    @property
    def run(self): ...
    def create_message(self, *_): ...
    def push_messages(self, messages): ...
    def pull_messages(self, message_ids): ...
    def get_nodes(self): ...

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, *, timeout=None):
        return [self.client(msg, self.contexts[msg.metadata.dst_node_id]) for msg in messages]


def by_flower(folder, monkeypatch, nodes=3):
    """The arrays after the app's own ServerApp has run its strategy, with no engine of ours."""
    app = load_task(f"flower:{folder}").app

    def messages(self, record, node_ids, message_type):
        return [
            make_message(
                Metadata(1, "m", 1, n, "", "", __import__("time").time(), 60.0, message_type),
                record,
            )
            for n in node_ids
        ]

    kept = {}
    start = strategies.Strategy.start

    def keep(self, *args, **kwargs):
        kept["result"] = start(self, *args, **kwargs)
        return kept["result"]

    monkeypatch.setattr(strategies.FedAvg, "_construct_messages", messages)
    monkeypatch.setattr(strategies.Strategy, "start", keep)
    with pytest.raises(AssertionError, match="main goes no further"):
        app._server(
            InProcessGrid(app._client, dict(app.config), nodes),
            Context(1, 0, {}, RecordDict(), dict(app.config)),
        )
    monkeypatch.undo()
    return {name: array.numpy() for name, array in kept["result"].arrays.items()}


# --- Trains as under Flower -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("protection", ["plain", "layered"])
def test_app_reaches_the_arrays_that_flowers_own_strategy_reaches(
    tmp_path, monkeypatch, protection
):
    folder = flower_app(tmp_path / "app")
    run = simulated(
        folder, tmp_path / "run", sites={f"s{k}": node(k) for k in range(3)}, protection=protection
    )
    expected = by_flower(folder, monkeypatch)
    assert run.result.rounds == 3
    assert np.allclose(arrays_of(run)["w"], expected["w"], atol=1e-3)
    assert np.ptp(expected["w"]) == 0 and abs(expected["w"][0]) > 0.5  # it moved


def node(k, n=3):
    return {"partition-id": k, "num-partitions": n}


def strategy(line):
    return SERVER.replace("strategies.FedAvg()", line)


def test_fedavgm_takes_its_momentum_along(tmp_path, monkeypatch):
    server = strategy("strategies.FedAvgM(server_learning_rate=0.5, server_momentum=0.9)")
    folder = flower_app(tmp_path / "app", server=server)
    run = simulated(folder, tmp_path / "run", sites=3)
    assert np.allclose(arrays_of(run)["w"], by_flower(folder, monkeypatch)["w"], atol=1e-3)


@pytest.mark.parametrize(
    "made",
    [
        "FedAdam(eta=0.05)",
        "FedAdam(eta=0.05, beta_1=0.5, beta_2=0.6, tau=0.1)",
        "FedYogi(eta=0.05, tau=0.01)",
        "FedAdagrad(eta=0.05, tau=0.1)",
    ],
)
def test_adaptive_servers_take_flowers_own_steps(tmp_path, monkeypatch, made):
    server = strategy(f"strategies.{made}")
    expected = by_flower(flower_app(tmp_path / "theirs", server=server), monkeypatch)["w"]
    checked = CLIENT.replace(  # flwr's FedAdam sends float64 from round 2 on
        "w, count =", 'assert arrays["w"].dtype == "float32"\n    w, count ='
    ).replace("w, x = msg", 'assert msg.content["arrays"]["w"].dtype == "float32"\n    w, x = msg')
    folder = flower_app(tmp_path / "app", client=checked, server=server)
    found = arrays_of(simulated(folder, tmp_path / "run", sites=3))["w"]
    assert found.dtype == np.float32
    assert np.allclose(found, expected, atol=1e-4)
    assert np.abs(expected).min() > 0.05  # it moved by more than the comparison allows


def test_fedprox_sends_its_proximal_mu(tmp_path):
    client = CLIENT.replace(
        'learning-rate"] *', 'learning-rate"] * (msg.content["config"]["proximal-mu"] == 0.25) *'
    )
    folder = flower_app(
        tmp_path / "app", client=client, server=strategy("strategies.FedProx(proximal_mu=0.25)")
    )
    assert arrays_of(simulated(folder, tmp_path / "run", sites=2))["w"].min() > 0.4


def test_integer_arrays_keep_their_initial_values(tmp_path):
    run = simulated(flower_app(tmp_path / "app"), tmp_path / "run", sites=2)
    found = arrays_of(run)["count"]
    assert found == 5
    assert found.dtype == np.int64
    assert arrays_of(run)["w"].dtype == np.float32


def test_metrics_are_means_weighted_by_num_examples_and_know_their_round(tmp_path):
    run = simulated(flower_app(tmp_path / "app"), tmp_path / "run", sites=2)
    sites = run.result.per_site
    weights = [sites[name].test_rows for name in ("site-0", "site-1")]
    assert weights == [3, 4]
    mean = np.average([sites[s].arms["federated"]["error"] for s in sites], weights=weights)
    arm = run.result.arms["federated"].metrics
    assert arm["error"] == pytest.approx(mean)
    assert arm["at-round"] == 3
    assert run.result.protected.metrics["error"] == pytest.approx(mean, abs=1e-4)
    assert run.result.lower_is_better == ("error",)


def test_run_config_overrides_reach_both_components_and_the_number_of_rounds(tmp_path):
    folder = flower_app(tmp_path / "app")
    run = simulated(
        folder,
        tmp_path / "run",
        sites=2,
        task_settings={"num-server-rounds": 1, "learning-rate": 0.0},
    )
    assert run.result.rounds == 1
    assert not arrays_of(run)["w"].any()
    assert simulated(folder, tmp_path / "other", sites=2, rounds=2).result.rounds == 2


COUNTING = CLIENT.replace(
    "    arrays, x = msg",
    """    seen = context.state.config_records.get("seen") or ConfigRecord({"rounds": [0]})
    assert seen["rounds"][-1] < msg.content["config"]["server-round"], "asked again"
    seen["rounds"] = [*seen["rounds"], msg.content["config"]["server-round"]]
    context.state["seen"] = seen
    arrays, x = msg""",
).replace(
    "    error = float",
    """    context.state["forgotten"] = ConfigRecord({"a": 1})
    assert len(context.state) <= 2
    error = 0.0 if not context.state.config_records.get("seen") else len(context.state["seen"]["rounds"])
    other = float""",
)


def test_context_state_is_kept_from_round_to_round_and_not_by_evaluate(tmp_path):
    client = COUNTING.replace("assert len(context.state) <= 2", "")
    client = client.replace(
        '    context.state["forgotten"]',
        '    assert "forgotten" not in context.state\n    context.state["forgotten"]',
    )
    run = simulated(
        flower_app(tmp_path / "app", client=client), tmp_path / "run", sites=2, rounds=4
    )
    # The first 0, then one entry for each round, though round 1 is trained more than once to find the range.
    assert run.result.arms["federated"].metrics["error"] == 5


def test_an_interrupted_run_resumes_with_the_state_of_the_app(tmp_path):
    folder = flower_app(tmp_path / "app", client=COUNTING)
    whole = simulated(folder, tmp_path / "whole", sites=2, rounds=4)

    def stop(row):
        if row.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulated(folder, tmp_path / "run", sites=2, rounds=4, on_round=stop)
    resumed = resume(tmp_path / "run")
    assert resumed.result.model_sha256 == whole.result.model_sha256
    assert resumed.result.arms["federated"].metrics["error"] == 5


@pytest.mark.parametrize("name", ["loss", "round", "arm", "train_loss"])
def test_metric_with_the_name_of_a_column_gets_another(tmp_path, name):
    client = CLIENT.replace('"error": error', f'"{name}": error')
    run = simulated(flower_app(tmp_path / "app", client=client), tmp_path / "run", sites=2)
    assert run.result.arms["federated"].metrics[f"eval_{name}"] > 0
    assert run.rounds[-1][f"eval_{name}"] > 0
    assert run.rounds[-1].round == 3


def test_mods_of_the_app_act(tmp_path):
    client = CLIENT.replace(
        "app = ClientApp()",
        """
def doubled(msg, context, call_next):
    out = call_next(msg, context)
    out.content["metrics"]["from-mod"] = 7.0
    return out

app = ClientApp()""",
    ).replace("@app.evaluate()", "@app.evaluate(mods=[doubled])")
    run = simulated(flower_app(tmp_path / "app", client=client), tmp_path / "run", sites=2)
    assert run.result.arms["federated"].metrics["from-mod"] == 7


def test_app_hash_covers_its_package_and_its_run_config(tmp_path):
    folder = flower_app(tmp_path / "app")
    first = load_task(f"flower:{folder}")
    digest = first.digest()
    assert first.covers() == "tinyapp (3 files)"
    for file, old, new in [
        ("tinyapp/__init__.py", "", "x = 1"),
        ("tinyapp/server_app.py", "np.zeros", "np.ones"),
        ("pyproject.toml", "learning-rate = 0.5", "learning-rate = 0.25"),
    ]:
        path, before = folder / file, (folder / file).read_text()
        path.write_text(new if not old else before.replace(old, new))
        assert load_task(f"flower:{folder}").digest() != digest, file
        path.write_text(before)
    assert load_task(f"flower:{folder}").digest() == digest


def test_submitted_job_has_the_rounds_of_its_run_config_and_no_setting_without_effect(tmp_path):
    folder = flower_app(tmp_path / "app")
    path = tmp_path / "job.toml"
    path.write_text('task = "flower:app"\n[task_settings]\nnum-server-rounds = 7\n')
    request = operators.prepare(path, read_job_file(path), {})
    settings = json.loads(request.about)["settings"]
    assert settings["round"]["rounds"] == 7
    assert settings["task_settings"] == {"num-server-rounds": 7}
    assert request.task_sha256 == load_task(f"flower:{folder}").digest()
    with pytest.raises(
        BadInput, match=r"train\.lr: found 0\.5, which the app tinyapp does not read"
    ):
        operators.prepare(path, read_job_file(path), {"lr": 0.5})


def test_what_the_strategy_asks_for_and_does_not_get_is_a_warning(tmp_path):
    server = strategy("strategies.FedAvg(fraction_train=0.5)").replace(
        "grid=grid,", "grid=grid, evaluate_fn=print,"
    )
    run = simulated(flower_app(tmp_path / "app", server=server), tmp_path / "run", sites=2)
    text = " ".join(run.result.notes)
    assert "share of 0.5 of the nodes" in text
    assert "evaluate_fn is not called" in text


def test_fedcore_does_not_import_flwr_by_itself():
    code = "import sys, fedcore.cli.main, fedcore.config, fedcore.learning.task; print('flwr' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def legacy_app(folder, *, client=LEGACY_CLIENT, server=LEGACY_SERVER):
    return flower_app(folder, client=client, server=server)


@pytest.mark.parametrize(
    "server",
    [LEGACY_SERVER, LEGACY_SERVER.replace("(initial_parameters=start)", "()")],
    ids=["initial arrays of the server", "initial arrays of a client"],
)
def test_legacy_app_gives_the_model_of_the_same_app_in_the_message_api(tmp_path, server):
    new = simulated(flower_app(tmp_path / "new"), tmp_path / "a", sites=3)
    old = simulated(legacy_app(tmp_path / "old", server=server), tmp_path / "b", sites=3)
    assert old.result.model_sha256 == new.result.model_sha256
    metrics = old.result.arms["federated"].metrics
    assert metrics["eval_loss"] == pytest.approx(new.result.arms["federated"].metrics["error"])
    assert metrics["twice"] == pytest.approx(2 * metrics["eval_loss"])
    assert old.result.lower_is_better == ("eval_loss",)


def test_legacy_configs_of_a_round_reach_fit_and_evaluate(tmp_path):
    server = LEGACY_SERVER.replace(
        "FedAvg(",
        "FedProx(proximal_mu=0.5, on_fit_config_fn=lambda r: {'r': r}, on_evaluate_config_fn=lambda r: {'e': r}, ",
    )
    client = LEGACY_CLIENT.replace(
        "w, count = parameters",
        "w, count = parameters\n        assert config['r'] >= 1 and config['proximal_mu'] == 0.5",
    )
    client = client.replace('"twice": 2 * error', '"round": float(config["e"])')
    run = simulated(
        legacy_app(tmp_path / "app", client=client, server=server), tmp_path / "run", sites=2
    )
    assert run.result.arms["federated"].metrics["eval_round"] == 3


def test_adaptive_servers_of_the_older_api_have_their_settings(tmp_path):
    server = LEGACY_SERVER.replace("FedAvg(", "FedYogi(eta=0.2, beta_1=0.5, tau=0.25, ")
    task = load_task(f"flower:{legacy_app(tmp_path / 'app', server=server)}")
    expected = {
        "server": "fedyogi", "server_lr": 0.2, "server_beta1": 0.5, "server_beta2": 0.99, "server_tau": 0.25,
        "server_correction": "none",
    }  # fmt: skip
    assert task.defaults.items() >= expected.items()


@pytest.mark.parametrize(
    ("client", "server", "message"),
    [
        (LEGACY_CLIENT.replace("len(self.x), {}", "0, {}"), LEGACY_SERVER, "num_examples = 0"),
        (LEGACY_CLIENT.replace("2 * error", "'much'"), LEGACY_SERVER, "found a str in the metric 'twice'"),
        (LEGACY_CLIENT.replace("count + 1]", "count + 1][:1]"), LEGACY_SERVER, "found arrays without '1'"),
        (LEGACY_CLIENT.replace("def fit", "def other"), LEGACY_SERVER, "FIT_NOT_IMPLEMENTED"),
        (CLIENT, LEGACY_SERVER, "KeyError"),
    ],
)  # fmt: skip
def test_legacy_app_that_cannot_be_summed_is_refused(tmp_path, client, server, message):
    with pytest.raises((BadInput, TaskFailed), match=message):
        simulated(
            legacy_app(tmp_path / "app", client=client, server=server), tmp_path / "run", sites=2
        )


SKLEARN = """
import numpy as np
from flwr.client import ClientApp, NumPyClient
from sklearn.linear_model import LogisticRegression

class Client(NumPyClient):
    def __init__(self, part):
        draw = np.random.default_rng(part)
        self.x = draw.normal(size=(60, 3))
        self.y = (self.x @ [1.0, -2.0, 0.5] + 0.3 > 0).astype(int)
        self.model = LogisticRegression(max_iter=2, warm_start=True, solver="saga", random_state=0)
        self.model.classes_ = np.array([0, 1])

    def fit(self, parameters, config):
        self.model.coef_, self.model.intercept_ = parameters
        self.model.fit(self.x, self.y)
        return [self.model.coef_, self.model.intercept_], 60, {}

    def evaluate(self, parameters, config):
        self.model.coef_, self.model.intercept_ = parameters
        return 0.0, 60, {"accuracy": self.model.score(self.x, self.y)}

app = ClientApp(client_fn=lambda context: Client(context.node_config["partition-id"]).to_client())
"""


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_scikit_learn_app_learns_and_keeps_its_float64_arrays(tmp_path):
    server = LEGACY_SERVER.replace(
        "[np.zeros(4, np.float32), np.array(5)]", "[np.zeros((1, 3)), np.zeros(1)]"
    )
    app = legacy_app(tmp_path / "app", client=SKLEARN, server=server)
    run = simulated(app, tmp_path / "run", sites=3, protection="layered")
    assert run.result.arms["federated"].metrics["accuracy"] > 0.9
    assert arrays_of(run)["0"].shape == (1, 3)
    assert arrays_of(run)["0"].dtype == np.float64


class DeployedSite:
    """A deployed site's training process, in this one: it gets the model and what the site kept, and returns both."""

    def __init__(self, folder):
        task, self.worker = load_task(f"flower:{folder}"), Worker()
        given = {"task": "t", "protection": "masked", "max_examples": 16, "range": 4.0}
        job = build_job(task.defaults, given)
        load = {
            "do": "load", "job": "j", "task": f"flower:{folder}", "base": "/", "site": "a", "source": node(0),
            "digest": task.digest(), "settings": wire_settings(job), "split": FoldSplit(0, 0, 5).to_json(),
        }  # fmt: skip
        head, blobs = self.worker.answer(load, [])
        assert "failed" not in head, head
        self.plan = plan_of(job, self.worker.sites["j"].shape, ("a", "b", "c"), 16)
        self.state = JobState.initial(self.plan, np.frombuffer(blobs[0], "<f4")).to_bytes()

    def ask(self, purpose, round_, kept):
        """(its answer, what it keeps afterwards)."""
        asked = {
            "do": "contribute", "job": "j", "step": [purpose, round_], "plan": self.plan.to_json(),
            "rules": asdict(GuardRules()), "memory": GuardMemory().to_json(),
        }  # fmt: skip
        head, blobs = self.worker.answer(asked, [self.state, kept])
        return head, blobs[1] if blobs else None


def seen_rounds(kept):
    (found,) = from_bytes(kept).values()
    return list(found.after["seen"]["rounds"])


def test_deployed_app_without_state_keeps_nothing(tmp_path):
    head, kept = DeployedSite(flower_app(tmp_path / "app")).ask("range", 1, b"")
    assert sum(head["wides"]["exceeding"]) > 0
    assert kept == b""


def test_round_that_is_trained_again_finds_the_state_from_before_it(tmp_path):
    """For another range, after an abandoned round, or in a new process; a later round finds what it left."""
    folder = flower_app(tmp_path / "app", client=COUNTING)
    site = DeployedSite(folder)
    _, first = site.ask("range", 1, b"")
    assert seen_rounds(first) == [0, 1]
    for asked in (site, DeployedSite(folder)):
        head, again = asked.ask("update", 1, first)
        assert "failed" not in head, head
        assert again == first
    _, second = site.ask("update", 2, first)
    assert seen_rounds(second) == [0, 1, 2]
    for before in (first, second):  # trained and not journalled, or journalled
        assert DeployedSite(folder).ask("update", 2, before)[1] == second
    _, missed = site.ask("update", 4, first)
    assert seen_rounds(missed) == [0, 1, 4], "control: rounds 2 and 3 were given up before a vector"


def test_deployed_evaluation_sees_the_state_that_the_round_of_its_model_left(tmp_path):
    """The metrics that ride with the vector of round 2 are of the model of round 1."""
    site = DeployedSite(flower_app(tmp_path / "app", client=COUNTING))
    _, kept = site.ask("update", 1, b"")
    head, _ = site.ask("update", 2, kept)
    error = site.worker.sites["j"].transport.finish(head["wides"], 1, None)["error"]
    assert error == pytest.approx(2, abs=0.01)  # [0, 1]


def test_state_emptied_by_the_app_stays_empty(tmp_path):
    emptied = COUNTING.replace(
        '    context.state["seen"] = seen',
        '    context.state.clear()\n    if len(seen["rounds"]) < 3:\n        context.state["seen"] = seen',
    )
    site, kept, counts = DeployedSite(flower_app(tmp_path / "app", client=emptied)), b"", []
    for round_ in range(1, 5):
        _, kept = site.ask("update", round_, kept)
        (found,) = from_bytes(kept).values()
        counts.append(len(found.after))
    assert counts == [1, 0, 1, 0]


RECORDS = {
    "arrays": ArrayRecord(
        {"x": Array(np.arange(3.0)), "none": Array(np.empty((0, 2), np.float32))}
    ),
    "metrics": MetricRecord({"n": 2**40, "list": [1.5, -0.0]}),
    "config": ConfigRecord(
        {"b": b"", "bytes": [b"\x00", b"1"], "yes": True, "text": "\u00e9", "part": 7, "f": 2.0}
    ),
    "part": ConfigRecord(),
}


def test_kept_state_comes_back_with_every_type(tmp_path):
    state = RecordDict(RECORDS)
    (found,) = from_bytes(to_bytes({2**62: KeptState(3, RecordDict(), state)})).values()
    assert found.round == 3 and not found.before
    assert list(found.after) == list(state)
    for name, record in state.items():
        assert dict(found.after[name]) == dict(record)
        assert [type(v) for v in found.after[name].values()] == [type(v) for v in record.values()]
    assert from_bytes(to_bytes({})) == {}


@pytest.mark.parametrize("data", [b"x", b"\x80\x04.", safetensors.numpy.save({"a": np.zeros(1)})])
def test_other_bytes_are_no_kept_state(data):
    with pytest.raises(BadInput, match=r"Context\.state: found bytes that are no kept state"):
        from_bytes(data)


def test_state_beyond_the_limit_is_refused_simulated_and_deployed(tmp_path, monkeypatch):
    monkeypatch.setattr("fedcore.learning.flower_apps.kept_state.MOST_KEPT", 20)
    folder = flower_app(tmp_path / "app", client=COUNTING)
    text = r"found 2. bytes left in Context\.state, expected at most 20"
    with pytest.raises(BadInput, match=text) as refused:
        simulated(folder, tmp_path / "run", sites=2)
    assert "\n" not in str(refused.value)
    site, kept, head = DeployedSite(folder), b"", {}
    for round_ in (1, 2):
        if "failed" not in head:
            head, kept = site.ask("update", round_, kept)
    assert head["failed"] == "unable" and re.search(text, head["text"])


# --- The arms beside the federated one ------------------------------------------------------------------------------


ALL_NUMBERS = np.linspace(0, 3, 12) ** 2
HALVES = [ALL_NUMBERS[part::2] for part in range(2)]


def trained_alone(numbers, rate=0.5, rounds=3, momentum=0.0):
    """The parameter that the app's steps lead to on some numbers."""
    w = velocity = 0.0
    for _ in range(rounds):
        velocity = momentum * velocity + rate * (w - numbers.mean())
        w -= velocity
    return w


def error_on(w, parts):
    return np.mean([(w - x) ** 2 for x in np.concatenate(parts)])


def four_arms(app, out, **settings):
    return simulated(app, out, **{"sites": 2, "arms": ARMS, **settings})


def test_all_arms_and_the_gap_of_an_app_whose_data_can_be_one_partition(tmp_path):
    run = four_arms(flower_app(tmp_path / "app", client=POOLABLE), tmp_path / "run")
    arms = {name: arm.metrics["error"] for name, arm in run.result.arms.items()}
    assert list(arms) == list(ARMS)
    centralised = error_on(trained_alone(ALL_NUMBERS), HALVES)
    assert arms["centralised"] == pytest.approx(centralised, rel=1e-5)
    own = [((trained_alone(x) - x) ** 2).mean() for x in HALVES]
    assert arms["local_only"] == pytest.approx(np.mean(own), rel=1e-5)
    assert arms["federated_float"] == pytest.approx(arms["federated"], abs=1e-3)
    assert run.gap["error"].mean == pytest.approx(arms["federated"] - centralised, abs=1e-6)
    lost = arms["local_only"] - centralised
    assert run.gap["error"]["local_only"].mean == pytest.approx(lost, abs=1e-6)
    assert (
        run.result.arms["centralised"].examples_seen == run.result.arms["local_only"].examples_seen
    )
    assert "trained on partition 0 of 1 (12 rows, as at the sites together)" in " ".join(
        run.result.notes
    )


def test_legacy_app_has_all_arms_too(tmp_path):
    client = LEGACY_CLIENT.replace(
        "def __init__(self, part, rate):\n        self.x, self.rate = np.linspace(part, part + 1, 3 + part), rate",
        "def __init__(self, node, rate):\n        part, n = node['partition-id'], node['num-partitions']\n"
        "        self.x, self.rate = np.linspace(0, 3, 12)[part::n] ** 2, rate",
    ).replace('context.node_config["partition-id"]', "context.node_config")
    client = client.replace(
        "        return [(w - step)",
        "        step = step + config['proximal_mu']\n        return [(w - step)",
    )
    server = LEGACY_SERVER.replace("FedAvg(", "FedProx(proximal_mu=0.25, ")
    run = four_arms(legacy_app(tmp_path / "app", client=client, server=server), tmp_path / "run")
    centralised = error_on(trained_alone(ALL_NUMBERS), HALVES)
    assert run.result.arms["centralised"].metrics["eval_loss"] == pytest.approx(
        centralised, rel=1e-5
    )


@pytest.mark.parametrize(
    ("client", "sites", "reason"),
    [
        (CLIENT, 2, "as partition 0 of 1 the app trains on 3 rows, and at the sites together on 7"),
        (
            CLIENT.replace("    part =", """    assert context.node_config["num-partitions"] > 1, "one is none"
    part ="""),
            2, "train on partition 0 of 1 raised AssertionError: one is none",
        ),
        (CLIENT, {"a": node(0, 2), "b": node(0, 2)}, "are no partitions 0, 1, ... of one data set"),
        (CLIENT, {"a": {"partition-id": 0}, "b": {"partition-id": 1}}, "are no partitions 0, 1, ..."),
    ],
    ids=["other count", "app refuses one partition", "a partition twice", "no number of partitions"],
)  # fmt: skip
def test_without_all_data_as_one_partition_the_other_arms_run_and_a_sentence_says_why(
    tmp_path, client, sites, reason
):
    run = four_arms(flower_app(tmp_path / "app", client=client), tmp_path / "run", sites=sites)
    assert list(run.result.arms) == ["local_only", "federated_float", "federated"]
    (note,) = [note for note in run.result.notes if "No centralised arm" in note]
    assert "the gap to it is unknown" in note and reason in note
    assert run.gap["error"].mean is None
    assert run.gap["error"]["quantisation"].mean is not None
    page = (run.directory / "report.html").read_text()
    assert "the gap to it is unknown" in page


def test_each_arm_has_a_context_state_of_its_own(tmp_path):
    """A momentum: of the federation the same with and without arms beside it, and of a run the same in one process."""
    poolable = POOLABLE.index("def rows"), POOLABLE.index("@app.train()")
    rows_ = POOLABLE[slice(*poolable)]
    start, end = MOMENTUM.index("def rows"), MOMENTUM.index("@app.train()")
    folder = flower_app(tmp_path / "app", client=MOMENTUM[:start] + rows_ + MOMENTUM[end:])
    run = four_arms(folder, tmp_path / "run", rounds=4)
    alone = simulated(folder, tmp_path / "alone", sites=2, rounds=4)
    assert run.result.model_sha256 == alone.result.model_sha256
    w = trained_alone(ALL_NUMBERS, rounds=4, momentum=0.5)
    assert run.result.arms["centralised"].metrics["error"] == pytest.approx(
        error_on(w, HALVES), rel=1e-5
    )
    own = [((trained_alone(x, rounds=4, momentum=0.5) - x) ** 2).mean() for x in HALVES]
    assert run.result.arms["local_only"].metrics["error"] == pytest.approx(np.mean(own), rel=1e-5)

    def stop(row):
        if row.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        four_arms(folder, tmp_path / "again", rounds=4, on_round=stop)
    resumed = resume(tmp_path / "again").result
    assert resumed.model_sha256 == run.result.model_sha256
    assert {n: a.metrics for n, a in resumed.arms.items()} == {
        n: a.metrics for n, a in run.result.arms.items()
    }


def test_a_second_run_of_one_task_object_begins_without_kept_state(tmp_path):
    task = load_task(f"flower:{flower_app(tmp_path / 'app', client=MOMENTUM)}")
    about = {"protection": "plain", "resamples": 0, "sites": 2, "arms": ("federated",)}
    runs = [fedcore.simulate(task, out=tmp_path / name, **about) for name in ("one", "two")]
    assert runs[0].result.model_sha256 == runs[1].result.model_sha256


def test_parties_that_train_alone_have_no_proximal_term(tmp_path):
    client = POOLABLE.replace(
        "    out =", '    step = step + msg.content["config"]["proximal-mu"]\n    out ='
    )
    folder = flower_app(
        tmp_path / "app", client=client, server=strategy("strategies.FedProx(proximal_mu=0.25)")
    )
    found = {
        n: a.metrics["error"] for n, a in four_arms(folder, tmp_path / "run").result.arms.items()
    }
    assert found["centralised"] == pytest.approx(
        error_on(trained_alone(ALL_NUMBERS), HALVES), rel=1e-5
    )
    assert found["federated"] > found["centralised"] + 0.1, "control: the others have it"


def test_deployed_record_of_training_alone_leaves_the_kept_state_of_the_federation_alone(tmp_path):
    site = DeployedSite(flower_app(tmp_path / "app", client=MOMENTUM))
    _, kept = site.ask("update", 1, b"")
    _, twice = site.ask("update", 2, kept)
    asked = {
        "do": "track", "job": "j", "plan": site.plan.to_json(), "step": ["update", 1], "sites": 3,
        "wides": {wide.name: [0] * wide.count for wide in site.plan.metric_sums},
    }  # fmt: skip
    head, _ = site.worker.answer(asked, [site.state, kept])
    assert head["row"]["alone"]["error"] == pytest.approx(
        ((0.25 - np.linspace(0, 1, 3)) ** 2).mean(), abs=1e-4
    )
    assert site.ask("update", 2, kept)[1] == twice


# --- Refused, in one line with a hint -------------------------------------------------------------------------------


BY_HAND = SERVER.replace("arrays = {", "print(list(grid.get_node_ids()))\n    arrays = {")
NO_START = SERVER.replace("strategies.FedAvg().start", "dict")
OBJECTS = SERVER.replace("np.zeros(4, np.float32)", "np.array(['a', 'b'])")


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (BY_HAND, "uses the grid itself"),
        (NO_START.replace("raise AssertionError", "str"), "found no call of Strategy.start"),
        (OBJECTS, "'w' of dtype <U1, expected real numbers"),
        (SERVER.replace("np.float32", "np.int64"), "no array of floating-point numbers"),
    ],
)
def test_server_app_that_this_engine_cannot_run_is_refused(tmp_path, server, message):
    with pytest.raises((BadInput, TaskFailed), match=message):
        load_task(f"flower:{flower_app(tmp_path / 'app', server=server)}")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("(w - step)", "(w - step)[:round_]", r"'w' of shape \(1,\), expected \(4,\)"),
        ('"count": Array(np.asarray(count + 1))', '"n": Array(count)', "with 'n' besides"),
        (', "count": Array(np.asarray(count + 1))', "", "without 'count'"),
        ("(w - step).astype(np.float32)", "np.array(['a'] * 4)", "dtype <U1"),
        ('"num-examples": len(x), "train_loss"', '"train_loss"', "num-examples = None in the reply"),
        ('len(x), "train_loss"', '2 + round_, "train_loss"', "num-examples = 4, expected 3"),
        ('"arrays": out, ', "", "0 ArrayRecords in the reply, expected 1"),
        ('return Message(RecordDict({"arrays"', 'return (RecordDict({"arrays"', "expected a Message"),
        ('"error": error,', '"loss": 1.0, "eval_loss": 1.0,', "found metrics 'loss' and 'eval_loss'"),
        ('"error": error, "at-round": float(round_)', '"error": [error]', "a list in the metric 'error'"),
        (', "error": error, "at-round": float(round_)', "", "no metric beside 'num-examples'"),
    ],
)  # fmt: skip
def test_reply_that_cannot_be_summed_is_refused(tmp_path, old, new, message):
    client = CLIENT.replace(
        "    step =", "    round_ = msg.content['config']['server-round']\n    step ="
    )
    assert old in client
    client = client.replace(old, new)
    if new.startswith("return ("):
        client = client.replace(
            '"metrics": metrics}), reply_to=msg)\n\n@', '"metrics": metrics}))\n\n@'
        )
    with pytest.raises(BadInput, match=message) as refused:
        simulated(flower_app(tmp_path / "app", client=client), tmp_path / "run", sites=2)
    assert refused.value.remedy
    assert not (tmp_path / "run").exists() or not (tmp_path / "run" / "result.json").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('serverapp = "tinyapp.server_app:app"', "", "found none as tool.flwr.app.components.serverapp"),
        ("client_app:app", "client_app", "found 'tinyapp.client_app' as tool.flwr.app.components.clientapp"),
        ("client_app:app", "nowhere:app", "found no module 'tinyapp.nowhere'"),
        ("client_app:app", "client_app:other", "found no 'other' in tinyapp.client_app"),
        ("client_app:app", "server_app:app", "found ServerApp as clientapp, expected a ClientApp"),
        ("dependencies = []", 'dependencies = ["flwr[simulation]>=99"]', r"'flwr\[simulation\]>=99', and flwr"),
        ("learning-rate = 0.5", "learning-rate = [0.5]", "found list in tool.flwr.app.config.learning-rate"),
    ],
)  # fmt: skip
def test_project_that_is_no_app_for_this_flwr_is_refused(tmp_path, old, new, message):
    folder = flower_app(tmp_path / "app")
    file = folder / "pyproject.toml"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new))
    with pytest.raises(BadInput, match=message) as refused:
        load_task(f"flower:{folder}")
    assert refused.value.remedy


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('run_config["learning-rate"]', 'run_config["lr"]', "Flower app tinyapp: train raised KeyError: 'lr'"),
        ("error = float(", "error = none(", "Flower app tinyapp: evaluate raised NameError"),
        ("app = ClientApp()", "import no_such", r"tinyapp\.client_app raised ModuleNotFoundError while it was"),
    ],
)  # fmt: skip
def test_error_of_the_app_is_shown_from_its_own_line_on(tmp_path, old, new, message):
    folder = flower_app(tmp_path / "app", client=CLIENT.replace(old, new))
    with pytest.raises(TaskFailed, match=message) as failed:
        simulated(folder, tmp_path / "run", sites=2)
    lines = failed.value.user_traceback.splitlines()
    assert f"{folder}/tinyapp/client_app.py" in lines[1]


def test_folder_without_pyproject_is_no_app(tmp_path):
    with pytest.raises(BadInput, match=r"found no pyproject\.toml"):
        load_task(f"flower:{tmp_path}")


def test_package_of_an_app_does_not_hide_an_installed_one(tmp_path):
    with pytest.raises(BadInput, match="found no module 'json"):
        load_task(f"flower:{flower_app(tmp_path / 'app', name='json')}")


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"sites": 1}, BadInput, "sites.n: found 1, expected 2 or more"),
        (
            {"sites": {"a": "rows.csv", "b": "b"}},
            BadInput,
            "'rows.csv' as the data of a Flower app",
        ),
        ({"max_examples": 2, "sites": 2}, BadInput, "expected all rows of one site"),
        ({"validate": 0.5, "sites": 2}, BadInput, "expected all rows of one site"),
        ({"lr": 0.5}, BadInput, "train.lr: found 0.5, which the app tinyapp does not read"),
        ({"epochs": 3}, BadInput, "train.epochs: found 3"),
        ({"task_settings": {"lr": 1.0}}, UnknownName, "task.lr"),
        ({"task_settings": {"learning-rate": "fast"}}, BadInput, "expected a number"),
    ],
)
def test_job_that_an_app_cannot_have_is_refused(tmp_path, settings, error, message):
    with pytest.raises(error, match=message):
        simulated(flower_app(tmp_path / "app"), tmp_path / "run", **settings)


def test_two_apps_with_packages_of_one_name_do_not_mix(tmp_path):
    first = load_task(f"flower:{flower_app(tmp_path / 'a')}")
    second = load_task(
        f"flower:{flower_app(tmp_path / 'b', server=SERVER.replace('np.zeros', 'np.ones'))}"
    )
    assert first.app.course.arrays["w"].sum() == 0
    assert second.app.course.arrays["w"].sum() == 4


def test_example_app_runs_by_its_own_flag(tmp_path, capsys):
    app = REPOSITORY / "docs/examples/flower-digits"
    with pytest.raises(SystemExit) as ended:
        main(
            ["simulate", "--flower-app", str(app), "--sites", "3", "-c", "num-server-rounds=2 learning-rate=0.1",
             "--protection", "masked", "--set", "track.arms=federated", "--out", str(tmp_path / "run"), "--json"]
        )  # fmt: skip
    assert ended.value.code == 0
    result = json.loads(capsys.readouterr().out)
    assert result["rounds"] == 2
    assert result["arms"]["federated"]["eval_acc"] > 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-c", "a=1"], "-c: found a run config without --flower-app"),
        (["--flower-app", "x", "--task", "heart"], "found --task heart beside it"),
        (["--flower-app", "x", "-c", "rounds 3"], "expected key=value pairs"),
        (["--flower-app", "x", "-c", "a=1 b"], "expected key=value pairs"),
    ],
)
@pytest.mark.parametrize("command", ["simulate", "compare"])
def test_flag_that_makes_no_sense_is_refused(command, arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_comparison_of_an_app_has_all_arms_in_every_split(tmp_path, capsys):
    app = flower_app(tmp_path / "app", client=POOLABLE)
    with pytest.raises(SystemExit) as ended:
        main(
            ["compare", "--flower-app", str(app), "--sites", "2", "-c", "num-server-rounds=2", "--seeds", "2",
             "--workers", "1", "--protection", "plain", "--out", str(tmp_path / "run"), "--json"]
        )  # fmt: skip
    assert ended.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert [list(cell["arms"]) for cell in found["cells"]] == [list(ARMS)] * 2
    centralised = error_on(trained_alone(ALL_NUMBERS, rounds=2), HALVES)
    assert found["arms"]["centralised"]["error"]["mean"] == pytest.approx(centralised, rel=1e-5)
    assert found["gap"]["total"]["error"]["n"] == 2
    rows = [
        json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
    ]
    columns = {name for row in rows for name in row if not name.startswith("protected_")}
    assert {name for name in columns if not is_column(name)} == {"error", "at-round"}
    assert any(text.startswith("Every split gave the same scores") for text in found["warnings"])
