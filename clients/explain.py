"""`fed-site explain`: everything that will be sent under a job, before its first run.

The list is the one that the sender enforces (`leaving.py`), for the plan that this site would agree to: task and rows
are loaded here, as the job would, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from dataclasses import fields as fields_of
from pathlib import Path

from fedcore_clients.app import RECIPE_FILE, job_folder, read_papers, require_job
from fedcore_clients.config import SiteConfig
from fedcore_clients.leaving import Outgoing, OutgoingList

from fedcore.config import Job, build_job, plan_of, read_job_file
from fedcore.errors import BadInput, Refused
from fedcore.files import read_json
from fedcore.learning.data.split import split_from_json
from fedcore.learning.model import single_thread
from fedcore.learning.site import SiteTrainer
from fedcore.learning.task import Task, load_task
from fedcore.secagg.label import Terms, label_of
from fedcore.secagg.plan import RoundPlan
from fedcore.types import Json, SiteId


@dataclass(frozen=True)
class Explained:
    """A job's plan, its label, and the list."""

    plan: RoundPlan
    items: tuple[Outgoing, ...]

    @property
    def label(self) -> list[str]:
        """Who is protected against whom."""
        return label_of(Terms.of_plan(self.plan)).splitlines()

    def to_json(self) -> Json:
        """For `--json`."""
        return {
            "task": self.plan.task, "plan": self.plan.digest, "label": self.label,
            "sends": [each.to_json() for each in self.items], "keeps": self.plan.train.keeps,
            "frozen": list(self.plan.train.frozen_parameters),
        }  # fmt: skip


def explain(config: SiteConfig, what: str) -> Explained:
    """The list for a job of this site by its id, for a job file, or for the plan.json of a run.

    Raises BadInput, UnknownName, Refused for a task that this site does not allow, TaskFailed.
    """
    path = Path(what)
    if path.suffix == ".json" and path.is_file():
        plan, features = _plan_of_file(path)
    elif path.exists():
        tables = {**read_job_file(path)}
        task = load_task(str(tables.pop("task", "")), path.parent)
        job = build_job(task.defaults, {k: v for k, v in tables.items() if k != "base"})
        plan, features = _plan_of_job(config, task.name, job, _sites(config))
    else:
        known = [
            each.parent.name for each in job_folder(config.folder, "").glob(f"*/{RECIPE_FILE}")
        ]
        require_job(what, known, "name a job of `fed-site jobs`, a job.toml or a plan.json")
        recipe = read_json(job_folder(config.folder, what) / RECIPE_FILE)
        sites = tuple(map(SiteId, recipe.get("sites") or _sites(config)))
        plan, features = _plan_of_job(config, recipe["task"], build_job(recipe["settings"]), sites)
    leaving = OutgoingList(plan, features, len(plan.sites), config.policy.fields)
    return Explained(plan, tuple(leaving.items()))


def _sites(config: SiteConfig) -> tuple[SiteId, ...]:
    return tuple(read_papers(config).roster.sites)


def _plan_of_job(
    config: SiteConfig, name: str, job: Job, sites: tuple[SiteId, ...]
) -> tuple[RoundPlan, int]:
    """The plan that this site makes of a job, and the columns that it standardises."""
    allowed = config.tasks.get(name)
    if allowed is None:
        raise Refused(
            f"task {name!r}: found no [tasks.{name}] in site.toml, expected one: the plan follows from its model",
            remedy="`fed-site check` prints what to write if it may run here",
        )
    task: Task = load_task(allowed.task, config.base).with_settings(job.task_settings)
    cap = job.protect.max_examples
    if cap is None:
        raise BadInput(
            "protect.max_examples: found none, expected the public cap on the rows of a site",
            remedy="write it in the job file: a submitted job always has it",
        )
    split = split_from_json(config.split.of(config.read_identity()))
    with single_thread():
        site = SiteTrainer.load(task, job, SiteId(config.site), allowed.source, cap, split)
    return plan_of(job, site.shape, sites, cap), site.shape.features


def _plan_of_file(path: Path) -> tuple[RoundPlan, int]:
    """A plan as `fedcore plan --json` prints it; what it adds for people is left out."""
    found = read_json(path)
    names = {each.name for each in fields_of(RoundPlan)} | {"version", "inputs", "initial_parts"}
    plan = RoundPlan.from_json({key: value for key, value in found.items() if key in names})
    if plan.standardise == "federated":
        raise BadInput(
            f"{path}: found a plan with sums of columns, whose number it does not state",
            remedy="name the job itself, or its job.toml",
        )
    return plan, 0


def explained_lines(found: Explained) -> Iterator[str]:
    """The list in words and as a table: first what a vector holds, then everything by name."""
    plan = found.plan
    yield f"task {plan.task}, {plan.protection}, {len(plan.sites)} sites, {plan.rounds} rounds, plan {plan.digest[:16]}"
    yield from (f"  {line}" for line in found.label)
    vectors = [item for item in found.items if item.kind == "vector"]
    yield "What is made of this site's rows leaves in these vectors only:"
    for item in vectors:
        yield f"  {item.name}: {item.what}, {item.most:,} bytes; read by {item.read_by}"
        yield from (f"    {part.name}: {part.type}, {part.values}" for part in item.parts)
    if plan.train.keeps:
        yield f"Kept here from round to round, and never sent: {plan.train.keeps}"
    if plan.train.frozen_parameters:
        names = ", ".join(plan.train.frozen_parameters)
        yield f"Neither trained nor sent, the same at every site from the start: the parameters and buffers {names}"
    yield "Everything that may leave, and nothing else does:"
    rows = [("name", "kind", "bytes at most", "fields", "read by")]
    for item in found.items:
        read_by = "as above" if item in vectors else item.read_by
        sealed = [part.name for part in item.parts if part.read_by not in ("", item.read_by)]
        if sealed:
            read_by += f", which cannot open {', '.join(sealed)}: sealed for sites"
        names = ", ".join(part.name for part in item.parts) or item.what
        rows.append((item.name, item.kind, f"{item.most:,}", names, read_by))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    for row in rows:
        head = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        yield f"  {head}  {row[4]}"
        if row[3] != "fields":
            yield f"      {row[3]}"
