"""The ClientApp: Flower's own conventions, and one mod."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedcore.flower import secure_mod
from secagg_app.task import accuracy, build_model, load_rows, train

app = ClientApp(mods=[secure_mod])


@app.train()
def train_on_rows(message: Message, context: Context) -> Message:
    model = build_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    place, places = context.node_config["partition-id"], context.node_config["num-partitions"]
    rows = load_rows(int(place), int(places))
    config = context.run_config
    loss = train(model, rows, int(config["local-epochs"]), float(message.content["config"]["lr"]))
    metrics = {"train_loss": loss, "num-examples": len(rows[1])}
    content = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}
    return Message(RecordDict(content), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Not asked in a protected run: the ServerApp evaluates."""
    model = build_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    metrics = MetricRecord({"accuracy": accuracy(model), "num-examples": 1})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
