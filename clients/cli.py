"""fed-site: one institution's process."""

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

Config = Annotated[Path, typer.Option("--config", help="site.toml")]


@app.command()
def run(config: Config = Path("site.toml")) -> None:
    """Take part in the federation until told to stop."""
    from fedcore_clients.config import read_config
    from fedcore_clients.main import run as run_site

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    run_site(read_config(config), lambda line: print(line, flush=True))


@app.callback()
def _main() -> None:
    """A site of a federation."""


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
