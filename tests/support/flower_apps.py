"""Small Flower apps in their conventions, written into a folder: a line fitted to three numbers a site, in NumPy."""

from pathlib import Path

PYPROJECT = """
[project]
name = "{name}"
version = "1.0.0"
dependencies = [{dependencies}]

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "{name}.server_app:app"
clientapp = "{name}.client_app:app"

[tool.flwr.app.config]
num-server-rounds = 3
learning-rate = 0.5
"""

CLIENT = """
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()

def rows(context):
    part = context.node_config["partition-id"]
    return np.linspace(part, part + 1, 3 + part)

@app.train()
def train(msg, context):
    arrays, x = msg.content["arrays"], rows(context)
    w, count = arrays["w"].numpy(), arrays["count"].numpy()
    step = context.run_config["learning-rate"] * (w - np.float32(x.mean()))
    out = ArrayRecord({"w": Array((w - step).astype(np.float32)), "count": Array(np.asarray(count + 1))})
    metrics = MetricRecord({"num-examples": len(x), "train_loss": 0.0})
    return Message(RecordDict({"arrays": out, "metrics": metrics}), reply_to=msg)

@app.evaluate()
def evaluate(msg, context):
    w, x = msg.content["arrays"]["w"].numpy(), rows(context)
    error = float(((w.mean() - x) ** 2).mean())
    round_ = msg.content["config"]["server-round"]
    metrics = MetricRecord({"num-examples": len(x), "error": error, "at-round": float(round_)})
    return Message(RecordDict({"metrics": metrics}), reply_to=msg)
"""

SERVER = """
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord
from flwr.serverapp import ServerApp
from flwr.serverapp import strategy as strategies

app = ServerApp()

@app.main()
def main(grid, context):
    arrays = {"w": Array(np.zeros(4, np.float32)), "count": Array(np.array(5, np.int64))}
    strategies.FedAvg().start(
        grid=grid, initial_arrays=ArrayRecord(arrays), num_rounds=context.run_config["num-server-rounds"]
    )
    raise AssertionError("main goes no further")
"""

MOMENTUM = CLIENT.replace(
    "    out = ArrayRecord",
    """    kept = context.state.get("momentum", ArrayRecord({"v": Array(np.zeros(4, np.float32))}))
    velocity = np.float32(0.5) * kept["v"].numpy() + step
    step = velocity
    kept["v"] = Array(velocity)
    kept["padding"] = Array(np.full(LENGTH, velocity[0]))
    context.state["momentum"] = kept
    context.state["about"] = ConfigRecord({"rounds": context.state.get("about", {"rounds": 0})["rounds"] + 1})
    out = ArrayRecord""",
).replace("app = ClientApp()", "app = ClientApp()\nLENGTH = 2")
"""A momentum that the client keeps in its Context.state, beside the number of rounds it trained."""

POOLABLE = """
    n = context.node_config["num-partitions"]
    return np.linspace(0, 3, 12)[part::n] ** 2
"""
POOLABLE = CLIENT.replace(
    "    return np.linspace(part, part + 1, 3 + part)\n", POOLABLE.lstrip("\n")
)
"""Twelve numbers that are dealt to the partitions, so that all of them can be one."""

LEGACY_CLIENT = """
import numpy as np
from flwr.client import ClientApp, NumPyClient

class Line(NumPyClient):
    def __init__(self, part, rate):
        self.x, self.rate = np.linspace(part, part + 1, 3 + part), rate

    def get_parameters(self, config):
        return [np.zeros(4, np.float32), np.array(5)]

    def fit(self, parameters, config):
        w, count = parameters
        step = self.rate * (w - np.float32(self.x.mean()))
        return [(w - step).astype(np.float32), count + 1], len(self.x), {}

    def evaluate(self, parameters, config):
        error = float(((parameters[0].mean() - self.x) ** 2).mean())
        return error, len(self.x), {"twice": 2 * error}

def client_fn(context):
    return Line(context.node_config["partition-id"], context.run_config["learning-rate"]).to_client()

app = ClientApp(client_fn=client_fn)
"""

LEGACY_SERVER = """
import numpy as np
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server import strategy as strategies

def server_fn(context):
    start = ndarrays_to_parameters([np.zeros(4, np.float32), np.array(5)])
    return ServerAppComponents(
        strategy=strategies.FedAvg(initial_parameters=start),
        config=ServerConfig(num_rounds=context.run_config["num-server-rounds"]),
    )

app = ServerApp(server_fn=server_fn)
"""
"""The same app in the older API."""


def flower_app(
    folder: Path,
    *,
    client: str = CLIENT,
    server: str = SERVER,
    name: str = "tinyapp",
    dependencies: str = "",
) -> Path:
    """Writes an app and returns its folder."""
    package = folder / name
    package.mkdir(parents=True)
    text = PYPROJECT.format(name=name, dependencies=dependencies)
    (folder / "pyproject.toml").write_text(text)
    (package / "__init__.py").write_text("")
    (package / "client_app.py").write_text(client)
    (package / "server_app.py").write_text(server)
    return folder
