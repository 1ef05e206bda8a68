"""Benchmarks of the cost of protection: size and seconds compared with CKKS, and the memory of a fold.

Each returns raw JSON with its configuration and machine, and checks no threshold.
"""

from __future__ import annotations

import sys


def progress(line: str) -> None:
    """Print one line of progress to stderr; stdout is for the JSON."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
