"""Which settings of a job a task that is an app of another framework cannot follow (`learning/flower_apps`)."""

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
    others = [arm for arm in job.track.arms if arm != "federated"]
    if others:
        raise BadInput(
            f"track.arms: found {others[0]!r}, expected 'federated' alone: only the app {task.name} can read its rows, "
            "a site at a time, so they cannot be pooled or trained on twice",
            remedy="leave arms out, or give the model and the data as a task (docs/tasks.md) to measure the gap",
        )
