"""The commands of `fedcore bench`: flags, and the first line; the benchmarks are in `fedcore/bench/`."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Annotated, Any

import typer

from fedcore.cli.console import emit_or_show, say
from fedcore.cli.flags import AsJson, Command
from fedcore.errors import BadInput

app = typer.Typer(help="Run a benchmark, with a baseline in the same run.", no_args_is_help=True)

SitesListed = Annotated[str, typer.Option(help="Numbers of sites, comma-separated.")]
Parameters = Annotated[int, typer.Option(min=1, help="Length of the vector.")]
Bits = Annotated[int, typer.Option(help="Quantised bits per coordinate.")]
Cipher = Annotated[str, typer.Option("--cipher", help="What encrypts: bfv or keystream.")]


def _bench(module: str, headline: str) -> Callable[[Command], Command]:
    """Register a function that has only the flags of a benchmark: they become the arguments of its `run`.

    A flag with commas in its default takes a list of numbers. headline: the first line, from the flags.
    """

    def register(has_flags: Command) -> Command:
        @wraps(has_flags)
        def command(*, as_json: bool, **given: Any) -> None:
            examples = {n: str(flag.default) for n, flag in signature(has_flags).parameters.items()}
            listed = [name for name in given if "," in examples[name]]
            numbers = {name: _numbers(f"--{name}", given[name], examples[name]) for name in listed}
            say(f"fedcore bench {has_flags.__name__}: {headline.format(**given)}")
            bench = import_module(f"fedcore.bench.{module}")
            emit_or_show(bench.run(**given | numbers), bench.page, as_json)

        return app.command()(command)

    return register


def _numbers(flag: str, text: str, example: str) -> list[int]:
    """`4,16,64` to a list of integers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise BadInput(f"{flag}: found {text!r}, expected numbers such as {example}") from error


@_bench("protect", "{parameters:,} parameters, {sites} sites")
def protect(
    parameters: Parameters = 1_000_000,
    sites: Annotated[int, typer.Option(min=3, help="Sites the plan is solved for.")] = 16,
    bits: Annotated[str, typer.Option(help="Quantised bits, comma-separated.")] = "8,12,16",
    repeats: Annotated[
        int, typer.Option(min=1, help="Interleaved repeats; medians are reported.")
    ] = 5,
    as_json: AsJson = False,
) -> None:
    """Measure bytes and seconds of protecting one vector. Compared with float32 and TenSEAL's CKKS in the same run."""


@_bench("secagg_rounds", "{sites} sites x {parameters:,} parameters, {protection}")
def secagg(
    sites: SitesListed = "4,16,64",
    parameters: Parameters = 1_000_000,
    drop: Annotated[int, typer.Option(min=0, help="Sites that leave after the shares.")] = 1,
    bits: Bits = 16,
    protection: Annotated[str, typer.Option(help="layered or masked.")] = "layered",
    cipher: Cipher = "bfv",
    as_json: AsJson = False,
) -> None:
    """Measure one whole protected round with a dropout. Bytes and CPU seconds of a site, and the coordinator's."""


@_bench("fold", "{sites} sites x {parameters:,} parameters")
def fold(
    sites: SitesListed = "4,64",
    parameters: Parameters = 1_000_000,
    as_json: AsJson = False,
) -> None:
    """Measure the peak memory of the folding process. The same whatever the number of sites."""


@_bench("engine", "{sites} sites x {parameters:,} parameters, {protection}")
def engine(
    sites: Annotated[int, typer.Option(help="Number of sites.")] = 4,
    parameters: Parameters = 10,
    rounds: Annotated[int, typer.Option(help="Rounds; the first is not timed.")] = 50,
    protection: Annotated[str, typer.Option(help="layered, masked or encrypted.")] = "layered",
    cipher: Cipher = "bfv",
    bits: Bits = 16,
    per_process: Annotated[int, typer.Option(help="Sites that share one process.")] = 1,
    wan: Annotated[
        bool, typer.Option("--wan", help="Over an emulated link for every site; as root.")
    ] = False,
    delay: Annotated[
        float, typer.Option(help="Of a link: milliseconds there and back, with --wan.")
    ] = 150.0,
    mbit: Annotated[float, typer.Option(help="Of a link: Mbit/s each way, with --wan.")] = 20.0,
    as_json: AsJson = False,
) -> None:
    """Measure rounds of a deployment without training. Real processes, TLS, journals, masks, keys."""


@_bench("two_engines", "{sites} sites, on Flower's deployment and on ours")
def flower(
    apps: Annotated[list[Path], typer.Argument(help="Flower apps: folders that `flwr run` takes.")],
    rounds: Annotated[int, typer.Option(help="Rounds; the first is not timed.")] = 3,
    sites: Annotated[int, typer.Option(help="Number of sites.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Measure rounds of Flower apps on Flower's deployment and on ours. The same accuracy, side by side."""


@_bench("simulate", "{workloads}, {rounds} rounds")
def simulate(
    workloads: Annotated[
        str, typer.Option(help="What is trained, comma-separated: logreg, mlp, cnn.")
    ] = "logreg",
    peers: Annotated[
        Path | None, typer.Option(help="Environments made by scripts/bench/simulate-peers.")
    ] = None,
    rounds: Annotated[int, typer.Option(help="Timed rounds of each engine.")] = 9,
    seed: Annotated[int, typer.Option(help="Of clients, model and cohorts.")] = 0,
    engines: Annotated[
        str,
        typer.Option(help="Comma-separated: batched, batched-2, sequential, sequential-2, pfl."),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Measure rounds of a simulation, beside pfl-research's. The same models, compared first."""
