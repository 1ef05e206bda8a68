"""What `fedcore attack` does where no task is named: each attack on the built-in task that shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedcore.config import Job
from fedcore.errors import UnknownName
from fedcore.experiment.attacks.registry import ATTACKS, run_attacks
from fedcore.experiment.prepare import job_for
from fedcore.learning.data import fashion
from fedcore.learning.task import Task
from fedcore.results import AttackResult


@dataclass(frozen=True)
class AttackedTask:
    """attacks: by name. layer: settings of the job, below those of the command. change: of the task."""

    attacks: tuple[str, ...]
    layer: Mapping[str, Any]
    change: Callable[[Task], Task] | None = field(default=None)

    def of(self, *layers: Mapping[str, Any]) -> tuple[Task, Job]:
        """The task and its job, with these settings above its own."""
        task, job = job_for(None, self.layer, *layers)
        return (self.change(task) if self.change else task), job


def _of_linear_layers(task: Task) -> Task:
    """The same pictures for a model that is linear over them."""
    return replace(task.with_settings({"network": "dense"}), name="fashion-linear")


_FASHION = {"task": "fashion", "sites.rows": fashion.ROWS_HERE, "sites.n": 4}
_DIGITS = {"task": "digits", "folds": 2, "train.lr": 0.5}

ATTACKED_TASKS = (
    AttackedTask(("analytic",), _FASHION, _of_linear_layers),
    AttackedTask(("analytic", "inversion", "inversion-local"), _FASHION),
    # Passes enough that the model remembers some of its rows: a control that finds nothing says nothing.
    AttackedTask(
        ("membership-quantile", "membership-lira", "membership-rmia"),
        _DIGITS | {"train.epochs": 10},
    ),
    AttackedTask(("source",), _DIGITS | {"train.epochs": 20}),
    AttackedTask(
        ("audit-step", "audit-training"),
        {"task": "heart", "privacy.epsilon": 3, "protect.max_examples": 320},
    ),
    AttackedTask(("property",), {"task": "heart"}),
    AttackedTask(("lying-site",), {"task": "heart"}),
)


def run_suite(
    names: Sequence[str] = (), *layers: Mapping[str, Any], preset: str = "quick", rates: Sequence[float] = (),
    say: Callable[[str], None] = lambda _: None, parts: Sequence[AttackedTask] = ATTACKED_TASKS,
) -> AttackResult:  # fmt: skip
    """The rows of the named attacks, of all where none is named, each row with the task that it is about. layers:
    settings of the jobs, above those of the parts. Raises as `run_attacks`."""
    for name in names:
        if name not in ATTACKS:
            raise UnknownName("--attack", name, ATTACKS)
    found: list[AttackResult] = []
    for part in parts:
        chosen = [name for name in part.attacks if not names or name in names]
        if not chosen:
            continue
        task, job = part.of(*layers)
        say(f"task {task.name}")
        asked = rates if any(name.startswith("membership") for name in chosen) else ()
        found.append(run_attacks(task, job, chosen, preset=preset, rates=asked, say=say))
    return _joined(found)


def _joined(found: Sequence[AttackResult]) -> AttackResult:
    """One result of several: rows keep their tasks, and the first has the label."""
    return replace(
        found[0],
        task=", ".join(dict.fromkeys(each.task for each in found)),
        rows=tuple(row for each in found for row in each.rows),
        reconstructions=tuple(picture for each in found for picture in each.reconstructions),
        curves=tuple(curve for each in found for curve in each.curves),
        seconds=round(sum(each.seconds for each in found), 1),
    )
