"""What runs at each institution."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from sklearn.metrics import log_loss

from sklearn_app.task import fit, get_weights, load_data, new_model, set_weights

app = ClientApp()


def model_and_rows(msg: Message, context: Context):
    model = new_model(context.run_config["penalty"], context.run_config["local-iterations"])
    set_weights(model, msg.content["arrays"].to_numpy_ndarrays())
    node = context.node_config
    return model, load_data(node["partition-id"], node["num-partitions"])


@app.train()
def train(msg: Message, context: Context):
    model, (x, _, y, _) = model_and_rows(msg, context)
    fit(model, x, y)
    metrics = MetricRecord({"num-examples": len(x), "train_acc": model.score(x, y)})
    content = RecordDict({"arrays": ArrayRecord(get_weights(model)), "metrics": metrics})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    model, (_, x, _, y) = model_and_rows(msg, context)
    loss = log_loss(y, model.predict_proba(x), labels=model.classes_)
    metrics = MetricRecord(
        {"num-examples": len(x), "test_logloss": loss, "accuracy": model.score(x, y)}
    )
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)
