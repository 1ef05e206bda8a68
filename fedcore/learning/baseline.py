"""A model that one party trains alone, with an optimiser that is kept from round to round."""

import copy
from typing import Any

from fedcore.learning.data.rows import Rows
from fedcore.learning.model import FlatModel
from fedcore.learning.task import Task
from fedcore.learning.training import TrainReport, local_train, make_optimiser
from fedcore.secagg.plan import TrainPlan
from fedcore.types import FloatVector


class OwnModel:
    """A copy of the resident module, started from `initial`."""

    def __init__(self, task: Task, flat: FlatModel, initial: FloatVector, plan: TrainPlan) -> None:
        flat.write(initial)
        self._task, self._plan = task, plan
        self.module = copy.deepcopy(flat.module)
        self._optimiser = make_optimiser(self.module, plan)

    def train(self, rows: Rows, *, seed: int, round_: int, site: str) -> TrainReport:
        """One round's epochs over `rows`, with the same optimiser as before. Raises TaskFailed, BadInput."""
        return local_train(
            self._task,
            self.module,
            rows,
            self._plan,
            seed=seed,
            round_=round_,
            site=site,
            optimiser=self._optimiser,
        )

    def save(self) -> Any:
        """Parameters, buffers and the optimiser's state."""
        return {"module": self.module.state_dict(), "optimiser": self._optimiser.state_dict()}

    def restore(self, saved: Any) -> None:
        """The inverse of `save`."""
        self.module.load_state_dict(saved["module"])
        self._optimiser.load_state_dict(saved["optimiser"])
