"""What runs at the server."""

from flwr.common import Context, Metrics, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg

from numpy_app.task import initial_weights


def weighted_average(metrics: list[tuple[int, Metrics]]) -> Metrics:
    examples = sum(count for count, _ in metrics)
    return {"accuracy": sum(count * each["accuracy"] for count, each in metrics) / examples}


def server_fn(context: Context) -> ServerAppComponents:
    rate = context.run_config["learning-rate"]
    strategy = FedAvg(
        min_available_clients=2,
        initial_parameters=ndarrays_to_parameters(initial_weights()),
        on_fit_config_fn=lambda server_round: {"lr": rate, "round": server_round},
        evaluate_metrics_aggregation_fn=weighted_average,
    )
    config = ServerConfig(num_rounds=context.run_config["num-server-rounds"])
    return ServerAppComponents(strategy=strategy, config=config)


app = ServerApp(server_fn=server_fn)
