"""The attacks by name, and a run of some of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from fedcore.config import Job
from fedcore.errors import UnknownName, require_extra
from fedcore.experiment.attacks import (
    lying_site,
    membership,
    one_run_audit,
    properties,
    reconstruction,
    reference_models,
    source,
)
from fedcore.experiment.attacks.scene import PRESETS, Scene
from fedcore.learning.task import Task
from fedcore.results import AttackResult, AttackRow, Reconstruction, RocCurve

Found = AttackRow | Reconstruction | RocCurve


@dataclass(frozen=True)
class Attack:
    """about: one line. run: its rows, and pictures, on a scene."""

    about: str
    run: Callable[[Scene], Iterable[Found]]


ATTACKS: dict[str, Attack] = {
    "analytic": Attack("rows from the first linear layer's gradient", reconstruction.analytic),
    "inversion": Attack("rows by a search for the same gradient", reconstruction.inversion),
    "inversion-local": Attack(
        "rows of several local steps, by the same search", reconstruction.after_local_steps
    ),
    "membership-quantile": Attack(
        "training rows told by a surer model than expected of them", membership.quantile
    ),
    "membership-lira": Attack(
        "training rows told by models with and without them", reference_models.lira
    ),
    "membership-rmia": Attack(
        "training rows told by two models, beside other rows", reference_models.rmia
    ),
    "source": Attack("whose rows they are, from the updates of all sites", source.source),
    "property": Attack(
        "which site has many rows of a class or category", properties.property_of_sites
    ),
    "audit-step": Attack("the noise of one protected round, by canaries", one_run_audit.step),
    "audit-training": Attack(
        "the noise of all rounds, by rows of one site", one_run_audit.training
    ),
    "lying-site": Attack(
        "two sites steer the model to read rows of the others", lying_site.lying_site
    ),
}
"""A new attack is a function in a file of this folder and a line here."""


def run_attacks(
    task: Task, job: Job, names: Sequence[str] = (), *, preset: str = "quick", rates: Sequence[float] = (),
    say: Callable[[str], None] = lambda _: None,
) -> AttackResult:  # fmt: skip
    """The rows of the named attacks, of all where none is named. Raises UnknownName for another name or preset,
    BadInput for a job that cannot run, rows that are no arrays, and where the test rows are too few for one of the
    false positive rates `rates`, which membership is reported at beside its own."""
    require_extra("attack", "report", "scipy")
    for name in names:
        if name not in ATTACKS:
            raise UnknownName("--attack", name, ATTACKS)
    if preset not in PRESETS:
        raise UnknownName("--preset", preset, PRESETS)
    started = time.perf_counter()
    scene = Scene(task, job, PRESETS[preset], tuple(rates))
    membership.refuse_rates(scene)
    found = list(_found(scene, [n for n in ATTACKS if n in names] or list(ATTACKS), say))
    plan = scene.prepared.plan
    return AttackResult(
        task.name, plan.task_digest, plan.protection, scene.prepared.label,
        tuple(plan.sites), job.run.seed, preset,
        tuple(each for each in found if isinstance(each, AttackRow)),
        tuple(each for each in found if isinstance(each, Reconstruction)),
        tuple(each for each in found if isinstance(each, RocCurve)),
        round(time.perf_counter() - started, 1),
    )  # fmt: skip


def _found(scene: Scene, names: Sequence[str], say: Callable[[str], None]) -> Iterator[Found]:
    for name in names:
        say(f"{name}: {ATTACKS[name].about}")
        for found in ATTACKS[name].run(scene):
            yield replace(found, task=found.task or scene.task.name)
