"""The ServerApp: Flower's own strategy, wrapped."""

import hashlib
import logging

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam, FedAvg

from fedcore.flower import SecureAggregation
from secagg_app.task import accuracy, build_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    logging.basicConfig(format="%(name)s: %(message)s")
    logging.getLogger("fedcore").setLevel(logging.INFO)  # a line for each round
    config = context.run_config
    if config["strategy"] == "FedAdam":
        strategy = FedAdam(fraction_evaluate=0.0, eta=0.01)
    else:
        strategy = FedAvg(fraction_evaluate=0.0)
    secure = SecureAggregation(
        strategy,
        sites=str(config["sites"]),
        federation=str(config["federation"]),
        protection=str(config["protection"]),
        max_examples=512,                    # a public cap on the rows of a site
        value_range=0.5,                     # the largest weighted update that is not clipped
        metrics={"train_loss": (0.0, 10.0)}, # nothing else of the replies' metrics leaves a site
    )
    model = build_model()

    def evaluate(number: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord({"accuracy": accuracy(model)})

    result = secure.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=int(config["num-server-rounds"]),
        timeout=float(config["stage-seconds"]),
        train_config=ConfigRecord({"lr": float(config["lr"])}),
        evaluate_fn=evaluate,
    )
    for report in secure.history:
        print(
            f"round {report.round}: {len(report.survivors)} sites, {report.upload_bytes} bytes from each, "
            f"{report.clipped} values clipped"
        )
    for number, metrics in result.evaluate_metrics_serverapp.items():
        print(f"accuracy after round {number}: {metrics['accuracy']:.4f}")
    arrays = b"".join(array.numpy().tobytes() for array in result.arrays.values())
    print(f"model {hashlib.sha256(arrays).hexdigest()[:12]}")
