"""Which round to release: the best one on rows that no arm trains on and no score is of.

The rows are each site's validation part (`round.validate`), so that the number of rounds, and whatever else a person
changes to make it better, is chosen without the test rows. Every arm has a best round of its own.

The rule: the headline's metric (AUC where the task has it, else its first one) over the validation rows of all sites,
of equals the smaller loss there, of equals the earlier round. A round whose metric is undefined is never the best.
`patience` counts rounds of the federated arm, since its model is the one that is released: all arms stop together,
so that their budgets stay equal.

Invariant: everything here follows from the rows of rounds.jsonl, so a resumed run chooses as an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedcore.experiment.gap import lower_is_better
from fedcore.learning.metrics import site_mean
from fedcore.report.phrases import metric_name, plural
from fedcore.results import BestRound, RoundRow

if TYPE_CHECKING:
    from fedcore.experiment.prepare import Prepared

VALIDATION = "validation_"
"""What the columns of a round's row begin with that are of the validation rows."""


def chosen_by(metrics: Sequence[str]) -> str:
    """The metric by which rounds are judged."""
    return min(metrics, key=lambda name: name != "auc")


@dataclass
class Selection:
    """The best round of every arm so far.

    metrics: of the task; metric: the one to choose by, lower: less of it is better. best: {arm: row of its best
    round}.
    """

    metrics: Sequence[str]
    metric: str
    lower: bool
    patience: int | None = None
    best: dict[str, RoundRow] = field(default_factory=dict)

    @classmethod
    def of(cls, prepared: Prepared) -> Selection:
        metrics = prepared.task.scores
        metric = chosen_by(metrics)
        lower = metric in lower_is_better(prepared.task)
        return cls(metrics, metric, lower, prepared.job.round.patience)

    def seen(self, row: RoundRow) -> bool:
        """Take note of an arm's round; whether it is the arm's best so far."""
        before = self.best.get(row.arm)
        better = self._rank(row) > (self._rank(before) if before is not None else _NEVER)
        if better:
            self.best[row.arm] = row
        return better

    def _rank(self, row: RoundRow) -> tuple[float, float]:
        """Greater is better."""
        value, loss = row.number(VALIDATION + self.metric), row.number(f"{VALIDATION}loss")
        if value is None or math.isnan(value):
            return _NEVER
        return (-value if self.lower else value), (-math.inf if loss is None else -loss)

    def out_of_patience(self, round_: int) -> str:
        """Why the run ends after this round, empty where it goes on."""
        best = self.best.get("federated")
        since = round_ - (best.round if best is not None else 0)
        if self.patience is None or since < self.patience:
            return ""
        name, last = metric_name(self.metric), f"round {best.round}" if best is not None else "none"
        return f"no better validation {name} in {plural(since, 'round')} (best: {last})"

    def result(self) -> dict[str, BestRound]:
        """{arm: its best round}, without the arms that had none."""
        return {
            arm: BestRound(
                row.round,
                {metric: row.number(VALIDATION + metric) for metric in self.metrics},
                {metric: row.number(metric) for metric in self.metrics},
            )
            for arm, row in self.best.items()
        }


_NEVER = (-math.inf, -math.inf)


def mean_best(splits: Sequence[Mapping[str, BestRound]]) -> dict[str, BestRound] | None:
    """The means over the splits of a comparison, each over those in which it is defined; None without any."""
    found = {}
    for arm in dict.fromkeys(arm for split in splits for arm in split):
        known = [split[arm] for split in splits if arm in split]
        found[arm] = BestRound(
            sum(each.round for each in known) / len(known),
            site_mean([each.validation for each in known]),
            site_mean([each.metrics for each in known]),
        )
    return found or None
