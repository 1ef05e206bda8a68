"""The machine and the versions behind a number, as every published one needs them beside it."""

from __future__ import annotations

import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import fedcore
from fedcore.types import Json


def environment() -> Json:
    """Versions (None where not installed), system, CPU model, usable cores, commit of a checkout."""
    return {
        "fedcore": fedcore.__version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "numpy", "tenseal", "cryptography")},
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": _cores(),
        "threads": 1,
        "commit": _commit(),
    }


def peak_memory_mb() -> float:
    """Peak resident memory of this process in MB (2^20 bytes).

    Linux: VmHWM. `ru_maxrss` is for elsewhere, because a Linux child starts with its parent's peak.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        kilobytes = peak // 1024 if sys.platform == "darwin" else peak
    return round(kilobytes / 1024, 1)


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
    return names[0] if names else platform.processor() or platform.machine()


def _cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _commit() -> str | None:
    """The commit of the checkout this package runs from, if it is one."""
    git = Path(__file__).resolve().parents[2] / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        reference = head.removeprefix("ref: ")
        return head if reference == head else (git / reference).read_text().strip()
    except OSError:
        return None
