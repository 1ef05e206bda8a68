"""The machine and the versions that a result was computed with."""

import os
import platform
import resource
import sys
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import fedcore
from fedcore.seeds import hash_seed
from fedcore.types import Json


def random_causes(*hash_seeds: str) -> str:
    """A hint for runs that gave different bits: what of a task is not seeded. hash_seeds: of these runs."""
    drawn = (
        "what a task draws from np.random.default_rng() or torch.Generator() without a seed, os.urandom, the clock or "
        "the number of its process is new in every process, and so is what it keeps in globals"
    )
    if "random" not in hash_seeds:
        return drawn
    return f"the order of a set of text is new in every process: set PYTHONHASHSEED=0; and {drawn}"


def environment() -> Json:
    """Versions (None where not installed), system, CPU model, usable cores, commit of a checkout."""
    return {
        "fedcore": fedcore.__version__,
        "python": platform.python_version(),
        **_versions(),
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": usable_cores(),
        "threads": 1,
        "hash_seed": hash_seed(),
        "commit": _commit(),
    }


@cache  # they are read from files, which takes a tenth of a small run
def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = dict.fromkeys(("torch", "numpy", "tenseal", "cryptography"))
    for name in versions:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def usable_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def peak_memory_mb() -> float:
    """Peak resident memory of this process in MB (2^20 bytes).

    Linux: VmHWM. `ru_maxrss` is for elsewhere, because a Linux child starts with its parent's peak.
    """
    found = peak_memory_of("self")
    if found is not None:
        return found
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)


def peak_memory_of(pid: int | str) -> float | None:
    """VmHWM of a process in MB (2^20 bytes); None if the system does not report it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return round(found[0] / 1024, 1) if found else None


def _cpu_model() -> str:
    lines: list[str] = []
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the checkout this package runs from, if it is one."""
    git = Path(__file__).resolve().parents[2] / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        reference = head.removeprefix("ref: ")
        return head if reference == head else (git / reference).read_text().strip()
    except OSError:
        return None
