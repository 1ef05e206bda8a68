"""Fedcore: federated learning in which no party has to be trusted with another's update.

The public names are below; everything is loaded when it is first used, so `import fedcore` and
`fedcore --help` stay fast. A module of ours never has the name of a public function.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fedcore.errors import FedcoreError as FedcoreError
    from fedcore.experiment.api import compare as compare
    from fedcore.experiment.api import simulate as simulate
    from fedcore.experiment.loop import STOP as STOP
    from fedcore.experiment.run import Comparison as Comparison
    from fedcore.experiment.run import Run as Run
    from fedcore.experiment.run import load as load
    from fedcore.learning.data.groups import grouped as grouped
    from fedcore.learning.data.linear import linear as linear
    from fedcore.learning.data.partition import group as group
    from fedcore.learning.data.partition import split as split
    from fedcore.learning.data.tabular import category as category
    from fedcore.learning.data.tabular import number as number
    from fedcore.learning.data.tabular import table as table
    from fedcore.learning.task import Task as Task
    from fedcore.learning.task import load_task as load_task

_NAMES = {
    "errors": ("FedcoreError",),
    "experiment.api": ("compare", "simulate"),
    "experiment.loop": ("STOP",),
    "experiment.run": ("Comparison", "Run", "load"),
    "learning.data.groups": ("grouped",),
    "learning.data.linear": ("linear",),
    "learning.data.partition": ("group", "split"),
    "learning.data.tabular": ("category", "number", "table"),
    "learning.task": ("Task", "load_task"),
}
_HOMES = {name: f"fedcore.{module}" for module, names in _NAMES.items() for name in names}

__all__ = ["__version__", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedcore' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
