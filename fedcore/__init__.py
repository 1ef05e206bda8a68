"""Fedcore: federated learning in which nobody has to be trusted with anybody's update.

The public names are below; everything is loaded when it is first used, so `import fedcore` and
`fedcore --help` stay fast. A module of ours never has the name of a public function.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fedcore.comparison.api import compare as compare
    from fedcore.comparison.api import simulate as simulate
    from fedcore.comparison.experiment import STOP as STOP
    from fedcore.data.linear import linear as linear
    from fedcore.data.partition import group as group
    from fedcore.data.partition import split as split
    from fedcore.data.tabular import category as category
    from fedcore.data.tabular import number as number
    from fedcore.data.tabular import table as table
    from fedcore.errors import FedcoreError as FedcoreError
    from fedcore.run import Comparison as Comparison
    from fedcore.run import Run as Run
    from fedcore.run import load as load
    from fedcore.task import Task as Task
    from fedcore.task import load_task as load_task

_HOMES = {
    "STOP": "fedcore.comparison.experiment",
    "Comparison": "fedcore.run",
    "FedcoreError": "fedcore.errors",
    "Run": "fedcore.run",
    "Task": "fedcore.task",
    "category": "fedcore.data.tabular",
    "compare": "fedcore.comparison.api",
    "group": "fedcore.data.partition",
    "linear": "fedcore.data.linear",
    "load": "fedcore.run",
    "load_task": "fedcore.task",
    "number": "fedcore.data.tabular",
    "simulate": "fedcore.comparison.api",
    "split": "fedcore.data.partition",
    "table": "fedcore.data.tabular",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedcore' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
