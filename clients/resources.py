"""What the training process may use of its machine: threads and memory, by the policy.

The process sets its own limits before the task's code is imported, and cannot raise them again: the CPUs that any of
its threads may run on, sched_setaffinity(2), and RLIMIT_DATA, setrlimit(2): private writable memory, without what
libraries map of their files. What the process starts inherits both.
"""

import os
import resource
from pathlib import Path
from typing import Self

from fedcore_clients.hours import Hours, zone_of
from pydantic import Field, field_validator, model_validator

from fedcore.files.toml import Section

_TORCH_REFUSED = "can't allocate memory"
"""In the RuntimeError of torch's allocator, which is no MemoryError."""


class MachineSection(Section):
    """The keys of a policy that are about time, machine and line. hours, time_zone: when the site takes part
    (`hours.py`); None: always. cpu_threads: CPUs of the training process; memory_mb: its memory in MiB; max_mbit: its
    transfers each way, in Mbit/s, within max_mbit_hours (None: always); None: no limit."""

    hours: str | None = None
    time_zone: str = "UTC"
    cpu_threads: int | None = Field(default=None, ge=1)
    memory_mb: int | None = Field(default=None, ge=256)
    max_mbit: float | None = Field(default=None, ge=0.1)
    max_mbit_hours: str | None = None

    @field_validator("time_zone")
    @classmethod
    def _is_zone(cls, found: str) -> str:
        zone_of(found)
        return found

    @field_validator("hours", "max_mbit_hours")
    @classmethod
    def _are_hours(cls, found: str | None) -> str | None:
        Hours.of(found, "UTC")
        return found

    @model_validator(mode="after")
    def _limits_something(self) -> Self:
        if self.max_mbit is None and self.max_mbit_hours is not None:
            raise ValueError("max_mbit beside max_mbit_hours")
        return self


def limit(threads: int | None, memory_mb: int | None) -> None:
    """Limit this process and all of its threads, for good. A limit above the present one changes nothing."""
    if threads is not None:
        cpus = sorted(os.sched_getaffinity(0))[:threads]
        for each in Path("/proc/self/task").iterdir():  # libraries start threads when imported
            os.sched_setaffinity(int(each.name), cpus)
    if memory_mb is not None:
        most, now = memory_mb << 20, resource.getrlimit(resource.RLIMIT_DATA)[1]
        if now in (resource.RLIM_INFINITY, -1) or most < now:
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def ran_out(error: BaseException | None) -> bool:
    """Whether an error, or what led to it, is memory that was refused."""
    while error is not None:
        if isinstance(error, MemoryError) or _TORCH_REFUSED in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def too_much(memory_mb: int) -> str:
    """The line for the site's log."""
    return (
        f"memory: found the task asking for more than memory_mb = {memory_mb} of this site's policy, expected less "
        "(hint: raise memory_mb, or give the task fewer rows or a smaller batch; a wider limit is for the next start "
        "of fed-site)"
    )
