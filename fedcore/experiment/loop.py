"""All rounds of a run: its arms, advanced a round at a time, and its files as it goes.

Invariant: every arm sees the same split, the same initial model and the same number of rows per round. After
every whole round a checkpoint is on disk, from which the run goes on to the same bits.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from fedcore.errors import Abandoned, BadInput, GuardTripped
from fedcore.experiment.arms import Alone, Federated, FederatedFloat, Scoring, loss_of
from fedcore.experiment.destinations import Destinations
from fedcore.experiment.environment import peak_memory_mb
from fedcore.experiment.outcome import build_result
from fedcore.experiment.prepare import Prepared, job_json
from fedcore.experiment.private_arms import Steps
from fedcore.experiment.scores import FILE as SCORES_FILE
from fedcore.experiment.scores import refuse_unscored, scores_file
from fedcore.experiment.selection import VALIDATION, Selection
from fedcore.files import (
    CHECKPOINTS,
    RESULT_FILE,
    ROUNDS_FILE,
    append_row,
    read_rounds,
    write_atomic,
    write_json,
)
from fedcore.learning.app_jobs import of_arm
from fedcore.learning.device import repeatable
from fedcore.learning.judging import OVER
from fedcore.learning.model import single_thread
from fedcore.learning.private_scores import without_offset
from fedcore.learning.saved import FILE as MODEL_FILE
from fedcore.learning.saved import checkpoint_bytes, read_checkpoint
from fedcore.results import Columns, RoundRow, RunResult
from fedcore.secagg.privacy.privacy_plan import SITE
from fedcore.types import Json

STOP = object()
"""Return it from `on_round` to end the run after the present round."""

Arm = Alone | Federated | FederatedFloat | Steps

OnRound = Callable[[RoundRow], object]


class ArmStep(NamedTuple):
    """What a run does next. arm: whose round; empty: the final metrics and intervals, after the last round.

    seconds: of the rounds before it, in this process; protecting: how many of them went into masks, encryption
    and sums, which are hardly any under `plain`.
    """

    round: int
    arm: str
    seconds: float
    protecting: float


OnStep = Callable[[ArmStep], object]

_PROTECTING = ("protect", "fold", "unprotect")

MOST_SITES_IN_A_ROW = 64
"""With more sites a row of rounds.jsonl does not hold the metrics of each: the file would grow with sites x rounds."""

_COMPARED_AT_SITES = ("local_only", "federated")

CHECKPOINT_FORM = 3
"""Of `save`: 1 had no form in it, and the federated arm's state without the step that comes next; 2 nothing that
sites keep under an algorithm."""


def inputs_of(prepared: Prepared) -> Json:
    """What a resumed run or comparison must find unchanged, by the name a person knows it under."""
    sizes = {
        s.id: [len(part) for part in (s.train, s.test, s.validation) if part is not None]
        for s in prepared.sites
    }
    statistics = prepared.statistics.to_json() if prepared.statistics else None
    return {
        "task": prepared.plan.task_digest,
        "columns of the tables": prepared.plan.model.inputs,
        "rows of the sites": json.dumps([sizes, statistics]),
        "plan": prepared.plan.digest,
    }


def refuse_changed(saved: Json, now: Json) -> None:
    """Raise BadInput where what a run began with is no longer what it was."""
    for name, value in now.items():
        if saved[name] != value:
            raise BadInput(
                f"--resume: the {name} changed since the run was interrupted",
                remedy="start a new run, or restore what it was",
            )


class Experiment:
    """The arms of one run, advanced round by round."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared, self.federation = prepared, prepared.federation
        plan, trainers, start = prepared.plan, self.federation.sites, self.federation.state
        if plan.privacy is None:  # else no site judges: see `SiteTrainer.contribute`
            self.federation.guards = tuple(trainer.guard(plan, start) for trainer in trainers)
        self.federated = Federated(prepared)
        makers: dict[str, Callable[[], Arm]] = {
            "centralised": lambda: Alone(prepared, prepared.sites, prepared.pooled()),
            "local_only": lambda: Alone(prepared, [t.rows_alone() for t in trainers]),
            "federated_float": lambda: FederatedFloat(prepared, self.federated),
            "federated": lambda: self.federated,
        }
        if plan.privacy is not None and plan.privacy.unit != SITE:
            everybody = range(len(trainers))
            makers |= {
                "centralised": lambda: Steps(prepared, [everybody]),
                "local_only": lambda: Steps(prepared, [[place] for place in everybody]),
                "federated_float": lambda: Steps.of_sum(prepared, self.federated),
            }
        self.arms: dict[str, Arm] = {name: makers[name]() for name in prepared.arms}
        self.round = 0
        self.stopped: str | None = None
        self.history: list[RoundRow] = []
        self.selection = Selection.of(prepared) if prepared.job.round.validate is not None else None
        self.kept: dict[str, tuple[bytes, ...]] = {}
        """The models of each arm's best round, where the job keeps it."""
        self._beside: tuple[bytes, ...] = ()
        """The float arm's models of the round that is the best by the released metrics."""

    def rounds(self, on_step: OnStep | None = None) -> Iterator[RoundRow]:
        """Advance every arm one round at a time; yields each arm's row. on_step: called before each of an arm."""
        began, before = time.perf_counter(), self._protecting()

        def announce(round_: int, arm: str) -> None:
            if on_step is not None:
                protecting = self._protecting() - before
                on_step(ArmStep(round_, arm, time.perf_counter() - began, protecting))

        if self.round == 0:
            announce(1, "federated")
        while self.round == 0 and (purpose := self.federation.purpose) and not purpose.trains:
            self.federation.advance()
        # The federated arm steps first, so that what is wrong with a site's update is said of it and
        # not of an arm beside it, and its survivors are known to the float arm; the rows still come
        # in the order of ARMS.
        order = sorted(self.arms, key=lambda name: name != "federated")
        while self.round < self.prepared.plan.rounds and self.stopped is None:
            if self.selection is not None and (
                reason := self.selection.out_of_patience(self.round)
            ):
                self.stopped = reason
                break
            if over := self.federation.state.over:
                self.stopped = f"{OVER[over]} (released metrics)"
                break
            current = self.round + 1
            columns = {}
            for name in order:
                announce(current, name)
                if name == "federated_float":
                    self._keep_beside()
                with of_arm(self.prepared.task, name):
                    columns[name] = self.arms[name].step(current)
                self.round = current
            for name, arm in self.arms.items():
                with of_arm(self.prepared.task, name):
                    row = self._row(name, arm, current, columns[name])
                self.history.append(row)
                yield row
        announce(self.round + 1, "")

    def _protecting(self) -> float:
        return sum(self.federation.watch.seconds[stage] for stage in _PROTECTING)

    def _row(self, name: str, arm: Arm, round_: int, columns: Columns) -> RoundRow:
        scoring, transport = arm.evaluate(round_), self.prepared.transport
        row: Columns = {"arm": name, "round": round_, **transport.values(scoring)}
        row |= {"loss": loss_of(scoring), **columns}
        release = self.federated.release
        if name == "federated" and release is not None:
            total = release.total
            contributors = len(total.survivors)
            sums = without_offset(self.prepared.plan, total.opened.wides, contributors)
            before = transport.finish(sums, contributors, self.federated.target_scale)
            row |= {f"protected_{metric}_before": value for metric, value in before.items()}
        row |= {"gradient_steps": arm.budget.steps, "examples_seen": arm.budget.examples}
        if name in _COMPARED_AT_SITES and len(scoring) <= MOST_SITES_IN_A_ROW:
            sites = self.prepared.plan.sites
            row["per_site"] = {
                site: transport.values([of_site])
                for site, of_site in zip(sites, scoring, strict=True)
            }
        if self.selection is None:
            return RoundRow(row | {"peak_memory_mb": peak_memory_mb()})
        apart = arm.validate(round_)
        row[f"{VALIDATION}loss"] = loss_of(apart)
        row |= {VALIDATION + metric: value for metric, value in transport.values(apart).items()}
        found = RoundRow(row | {"peak_memory_mb": peak_memory_mb()})
        if self.selection.seen(found) and self.prepared.job.round.keep == "best":
            self.kept[name] = arm.models()
        return found

    def evaluated(self) -> dict[str, Scoring]:
        """Every arm's scores at its best round, where the job keeps it, else at the last."""
        found, at = {}, self.go_back()
        for name, arm in self.arms.items():
            with of_arm(self.prepared.task, name):
                found[name] = arm.evaluate(at[name])
        return found

    def go_back(self) -> dict[str, int]:
        """Every arm to its best round, where the job keeps it; {arm: the round that it is at}."""
        at = dict.fromkeys(self.arms, self.round)
        for name, models in self.kept.items():
            self.arms[name].go_back(models)
            at[name] = self.selection.best[name].round if self.selection is not None else self.round
        return at

    def _keep_beside(self) -> None:
        """Keep the float arm's models, where the last judgement found those of their round the best so far."""
        found, arm = self.federation.state.judgement, self.arms.get("federated_float")
        if found is None or found.parameters is None or arm is None:
            return
        if found.round == found.latest:
            self._beside = arm.models()

    def settle(self) -> None:
        """After the metrics-only round: where the federation went back to its best model, the float arm goes back to
        the same round, so that what is between them is rounding."""
        self._keep_beside()
        state, arm = self.federation.state, self.arms.get("federated_float")
        if arm is not None and self._beside and state.at_best:
            arm.go_back(self._beside)

    def require_a_release(self) -> None:
        """Raise Abandoned for a run of which no round was released: its model never learnt anything."""
        plan, abandoned = self.prepared.plan, self.federated.abandoned
        if len(abandoned) < self.round:
            return
        sites = len(plan.sites)
        lower = f", or a smaller --threshold ({sites // 2 + 1} or more)"
        raise Abandoned(
            f"run: found all {self.round} rounds abandoned, expected at least one with {plan.threshold} "
            f"of {sites} sites at every stage",
            remedy=f"fewer absences (--drop, --dropout){lower if plan.threshold > sites // 2 + 1 else ''}",
        )

    def save(self) -> Any:
        """All that a resumed run needs."""
        return {
            "form": CHECKPOINT_FORM,
            "round": self.round,
            "arms": {name: arm.save() for name, arm in self.arms.items()},
            "budgets": {name: (a.budget.steps, a.budget.examples) for name, a in self.arms.items()},
            "inputs": inputs_of(self.prepared),
            "kept": dict(self.kept),
            "beside": self._beside,
            "app": None
            if (app := self.prepared.task.app) is None
            else {a: app.save(a) for a in self.arms},
        }

    def restore(self, saved: Any) -> None:
        """Continue after the saved round. Raises BadInput if the task or its data have changed, and for a
        checkpoint of another version of Fedcore."""
        if saved.get("form") != CHECKPOINT_FORM:
            raise BadInput(
                f"--resume: found a checkpoint of form {saved.get('form', 1)}, expected {CHECKPOINT_FORM}",
                remedy="start a new run, or resume with the version of Fedcore that began it",
            )
        refuse_changed(saved["inputs"], inputs_of(self.prepared))
        self.round = saved["round"]
        for name, arm in self.arms.items():
            arm.restore(saved["arms"][name])
            arm.budget.steps, arm.budget.examples = saved["budgets"][name]
        self.kept = {name: tuple(models) for name, models in saved.get("kept", {}).items()}
        self._beside = tuple(saved.get("beside", ()))
        if (app := self.prepared.task.app) is not None:
            for arm, kept in saved["app"].items():
                app.restore(kept, arm)


class RunWriter:
    """Writes a run's files as it goes: rows as they come, a checkpoint after each round."""

    def __init__(self, directory: Path, prepared: Prepared) -> None:
        self.directory = directory
        self._prepared = prepared
        self._destinations = Destinations(directory, job_json(prepared.task, prepared.job))

    def start(self) -> None:
        """plan.json and job.json, before anything is trained. Raises BadInput where scores are to be kept and the
        task has none."""
        if self._prepared.job.track.keep_scores:
            refuse_unscored(self._prepared.task)
        write_json(self.directory / "plan.json", self._prepared.plan_json())
        write_json(self.directory / "job.json", job_json(self._prepared.task, self._prepared.job))
        (self.directory / ROUNDS_FILE).touch()

    def row(self, row: RoundRow) -> None:
        append_row(self.directory, row)
        self._destinations.row(row)

    def close(self) -> None:
        self._destinations.close()

    def checkpoint(self, experiment: Experiment) -> None:
        """The state after a whole round, replacing the one before; every so many rounds, where the job asks for it,
        the model as well, which stays."""
        every = self._prepared.job.round.checkpoint_every
        if every is not None and experiment.round % every == 0:
            path = self.directory / CHECKPOINTS / f"round-{experiment.round:04d}.safetensors"
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, self._model(experiment))
        write_atomic(self.directory / "checkpoint.pt", checkpoint_bytes(experiment.save()))

    def forget(self) -> None:
        """There is nothing to go on from: the rows stay, the checkpoint goes."""
        (self.directory / "checkpoint.pt").unlink(missing_ok=True)

    def resume(self, experiment: Experiment) -> None:
        """Back to the last checkpoint: state restored, rows after it dropped."""
        path = self.directory / "checkpoint.pt"
        if path.is_file():
            experiment.restore(read_checkpoint(path.read_bytes()))
        rows = [r for r in read_rounds(self.directory) if r.round <= experiment.round]
        experiment.history = rows
        if (selection := experiment.selection) is not None:
            for row in rows:
                selection.seen(row)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomic(self.directory / ROUNDS_FILE, text.encode())

    def _model(self, experiment: Experiment) -> bytes:
        """The file of the federated model. What is each site's own, it has the mean of."""
        sites, state = experiment.federation.sites, experiment.federated.state
        if self._prepared.of_sites:
            return sites[0].exported_average(state, sites)
        return sites[0].exported(state)

    def finish(self, experiment: Experiment, result: RunResult) -> None:
        """The model, the scores of single rows if the job keeps them, and the result; the checkpoint goes. Where
        something of it is each site's own, a model of every site is beside it."""
        sites, state = experiment.federation.sites, experiment.federated.state
        with single_thread():
            models = {MODEL_FILE: self._model(experiment)}
            if self._prepared.of_sites:
                for site in sites:
                    name = f"model-{quote(site.site.id, safe='')}.safetensors"
                    models[name] = site.exported(state)
            if self._prepared.job.track.keep_scores:
                models[SCORES_FILE] = scores_file(self._prepared, experiment.evaluated())
        for name, model in models.items():
            write_atomic(self.directory / name, model)
        write_json(self.directory / RESULT_FILE, result.to_json())
        self.forget()


def run_experiment(
    prepared: Prepared,
    writer: RunWriter | None,
    on_round: OnRound | None = None,
    *,
    on_step: OnStep | None = None,
    resume: bool = False,
) -> tuple[Experiment, RunResult]:
    """All rounds of all arms, then the result. Interrupts leave a checkpoint of the last whole round.

    Raises Abandoned where no round was released, GuardTripped where a site leaves the job; then there is
    nothing to go on from.
    """
    started, clock = datetime.now(UTC), time.perf_counter()
    try:
        with single_thread(), repeatable(), closing(writer) if writer else nullcontext():
            experiment = Experiment(prepared)
            if writer is not None and resume:
                writer.resume(experiment)
            last = list(experiment.arms)[-1]
            for row in experiment.rounds(on_step):
                if writer is not None:
                    writer.row(row)
                if on_round is not None and on_round(row) is STOP:
                    experiment.stopped = f"on_round returned STOP in round {row.round}"
                if row.arm == last and writer is not None:
                    writer.checkpoint(experiment)
        experiment.require_a_release()
        result = build_result(experiment, started, time.perf_counter() - clock)
    except (Abandoned, GuardTripped):
        if writer is not None:
            writer.forget()
        raise
    return experiment, result
