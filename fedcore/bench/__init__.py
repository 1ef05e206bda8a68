"""What protection costs, measured: size and seconds beside CKKS, and the memory of a fold.

Benchmarks are not tests: each returns raw JSON with its configuration and machine; thresholds are
checked elsewhere.
"""

from __future__ import annotations

import sys


def progress(line: str) -> None:
    """One line for a waiting person; stdout stays free for the JSON."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
