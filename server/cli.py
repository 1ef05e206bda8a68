"""fed-coordinator: run a federation, and speak to one that runs."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

os.environ.setdefault(
    "GRPC_VERBOSITY", "NONE"
)  # its lines are ours to explain; before it is imported

import typer

from fedcore.errors import FedcoreError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

Config = Annotated[Path, typer.Option("--config", help="federation.toml")]


def _logging() -> None:
    """Text on a terminal, JSON otherwise."""
    if sys.stderr.isatty():
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    else:
        logging.basicConfig(
            level=logging.INFO,
            format='{"time": "%(asctime)s", "level": "%(levelname)s", "text": "%(message)s"}',
        )


@app.command()
def serve(config: Config = Path("federation.toml")) -> None:
    """Run the coordinator of a federation until it is told to stop."""
    from fedcore_server.config import read_config
    from fedcore_server.main import serve as run

    _logging()
    run(read_config(config), lambda line: print(line, flush=True))


@app.callback()
def _main() -> None:
    """The coordinator of a federation."""


def main() -> None:
    """Entry point: one line and a hint for every error of ours."""
    try:
        app(standalone_mode=False)
    except FedcoreError as error:
        print(f"error: {error}", file=sys.stderr)
        if error.remedy:
            print(f"hint: {error.remedy}", file=sys.stderr)
        sys.exit(error.exit_code)
    except typer.Abort:
        sys.exit(130)


if __name__ == "__main__":
    main()
