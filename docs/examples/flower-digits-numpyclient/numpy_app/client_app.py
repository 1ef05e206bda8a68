"""What runs at each institution."""

from flwr.client import ClientApp, NumPyClient
from flwr.common import Context

from numpy_app.task import initial_weights, load_data, test, train


class DigitsClient(NumPyClient):
    def __init__(self, rows, test_rows, config):
        self.rows, self.test_rows, self.config = rows, test_rows, config

    def get_parameters(self, config):
        return initial_weights()

    def fit(self, parameters, config):
        weights = train(
            parameters,
            self.rows,
            self.config["local-epochs"],
            config["lr"],
            self.config["batch-size"],
            self.config["seed"] + config["round"],
        )
        return weights, len(self.rows[1]), {}

    def evaluate(self, parameters, config):
        loss, accuracy = test(parameters, self.test_rows)
        return loss, len(self.test_rows[1]), {"accuracy": accuracy}


def client_fn(context: Context):
    rows, test_rows = load_data(
        context.node_config["partition-id"], context.node_config["num-partitions"]
    )
    return DigitsClient(rows, test_rows, context.run_config).to_client()


app = ClientApp(client_fn=client_fn)
