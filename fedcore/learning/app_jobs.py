"""Which settings of a job a task that is an app of another framework cannot follow (`learning/flower_apps`)."""

from contextlib import AbstractContextManager, nullcontext

from fedcore.config import Job, TrainSection
from fedcore.errors import BadInput
from fedcore.learning.task import Task


def refuse_of_app(task: Task, job: Job) -> None:
    """Raise BadInput for settings that an app cannot follow; nothing for a task that is no app."""
    if task.app is None:
        return
    unchanged = TrainSection()
    for key in TrainSection.model_fields:
        if (found := getattr(job.train, key)) != getattr(unchanged, key):
            raise BadInput(
                f"train.{key}: found {found!r}, which the app {task.name} does not read: it trains by its run config",
                remedy='-c "key=value" overrides a key of [tool.flwr.app.config]',
            )


def of_arm(task: Task, arm: str) -> AbstractContextManager[None]:
    """Meanwhile what an app keeps at a site from round to round is that of an arm of a run."""
    return nullcontext() if task.app is None else task.app.of_arm(arm)
