"""The machine and the versions behind a benchmark's numbers."""

from __future__ import annotations

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fedcore.types import Json


def environment() -> Json:
    """Versions (None where not installed), system, CPU model and cores this process may use."""
    return {
        "fedcore": _version("fedcore-fl"),
        "python": platform.python_version(),
        "numpy": _version("numpy"),
        "tenseal": _version("tenseal"),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": _cores(),
    }


def progress(line: str) -> None:
    """One line for a waiting person; stdout stays free for the JSON."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
