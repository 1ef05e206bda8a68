"""The `fedcore` command."""

import sys

from fedcore.seeds import TRAINING_COMMANDS, fix_hash_order


def program() -> None:
    """Entry point of the installed program; always ends in SystemExit."""
    if sys.argv[1:2] and sys.argv[1] in TRAINING_COMMANDS:
        fix_hash_order()  # before anything is imported
    from fedcore.cli.main import main

    main()
