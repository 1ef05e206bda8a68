"""The ServerApp: Flower's own strategy, wrapped."""

import hashlib
import logging

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam, FedAvg

from fedcore.flower import SecureAggregation
from secagg_app.task import accuracy, build_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    log = logging.getLogger("fedcore")  # a line for each round
    log.addHandler(logging.StreamHandler())
    log.setLevel(logging.INFO)
    config = context.run_config
    if config["strategy"] == "FedAdam":
        strategy = FedAdam(fraction_evaluate=0.0, eta=0.01)
    else:
        strategy = FedAvg(fraction_evaluate=0.0)
    if config["protection"] == "none":  # as it was before, to compare with: its ClientApp has no secure_mod
        runner = strategy
    else:
        runner = SecureAggregation(
            strategy,
            sites=str(config["sites"]) or None,  # a simulation has identities of its own
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

    result = runner.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=int(config["num-server-rounds"]),
        timeout=float(config["stage-seconds"]),
        train_config=ConfigRecord({"lr": float(config["lr"])}),
        evaluate_fn=evaluate,
    )
    if config["model-file"]:
        torch.save(result.arrays.to_torch_state_dict(), str(config["model-file"]))
    for report in getattr(runner, "history", []):
        print(
            f"round {report.round}: {len(report.survivors)} sites, {report.upload_bytes} bytes from each, "
            f"{report.clipped} values clipped"
        )
    for number, metrics in result.evaluate_metrics_serverapp.items():
        print(f"accuracy after round {number}: {metrics['accuracy']:.4f}")
    arrays = b"".join(array.numpy().tobytes() for array in result.arrays.values())
    print(f"model {hashlib.sha256(arrays).hexdigest()}")
