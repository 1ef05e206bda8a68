"""The rows of one site's step, from what each party reads as its gradient: analytically, and by a search."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from fedcore.experiment.attacks.intervals import share_interval
from fedcore.experiment.attacks.likeness import CANDIDATES, Likeness
from fedcore.experiment.attacks.scene import UPLOAD, GradientView, Scene, StepRound
from fedcore.learning.gradient_matching import (
    Inputs,
    LocalSteps,
    first_linear,
    inputs_behind,
    labels,
    linear_inputs,
    match,
)  # fmt: skip
from fedcore.learning.model import FlatModel, single_thread
from fedcore.results import AttackRow, Reconstruction
from fedcore.seeds import derive_seed, generator

Attempt = Callable[[FlatModel, GradientView, StepRound], Inputs]
"""The rows that an adversary finds in a view of a round; the module holds the model that the round began with."""

_NOT_SHOWN = (
    "A failed attack is no proof: another adversary may do better. What the sum and the model tell is not changed by "
    "encryption; differential privacy bounds it."
)

_MOST_ROWS = 8
"""Rows that a search looks for at once, of a sum of more."""


def analytic(scene: Scene) -> Iterator[AttackRow | Reconstruction]:
    """Lines of the gradient of the first linear layer, divided by that of its bias, and inputs behind these where other
    layers come before."""
    module = scene.prepared.flat.module
    size = int(np.prod(scene.inputs.x.shape[1:]))
    of_rows, reason = first_linear(module, size), scene.why_no_step()
    if of_rows is None and reason is None:
        reason = (
            "found no linear layer with a bias in the model: gradients of other layers are no rows"
        )
    if reason is not None:
        yield _refused("analytic", scene, reason)
        return

    def attempt(flat: FlatModel, view: GradientView, _: StepRound) -> Inputs:
        if of_rows:
            rows = min(view.rows, 4 * _MOST_ROWS)
            return linear_inputs(flat.module, view.gradient, view.exact, rows, scene.span)
        rows = min(view.rows, _MOST_ROWS)
        features = linear_inputs(flat.module, view.gradient, view.exact, rows, None)
        shape = tuple(scene.inputs.x.shape[1:])
        return inputs_behind(
            flat.module, features, shape, scene.prior, scene.effort.behind, seed=scene.seed
        )

    for batch in scene.effort.batches:
        rows = scene.effort.analytic_rows if of_rows else scene.effort.searched_rows
        yield from _attacked("analytic", scene, batch, attempt, rows)


def inversion(scene: Scene) -> Iterator[AttackRow | Reconstruction]:
    """Inputs are searched whose gradient points where the view points."""
    reason = _why_no_search(scene)
    if reason is not None:
        yield _refused("inversion", scene, reason)
        return
    for batch in scene.effort.batches:
        attempt = partial(_matched, scene, 1, 1)
        yield from _attacked("inversion", scene, batch, attempt, scene.effort.searched_rows)


def after_local_steps(scene: Scene) -> Iterator[AttackRow | Reconstruction]:
    """The same where each site takes several steps on its rows: once as if it were one step, once with the steps
    simulated for each candidate."""
    name, reason = "inversion-local", _why_no_search(scene)
    if reason is None and scene.job.privacy.epsilon:
        reason = "under differential privacy a site takes one step a round"
    if reason is not None:
        yield _refused(name, scene, reason)
        return
    batch = scene.effort.batches[-1]
    for count in scene.effort.local_steps:
        for simulated, said in ((1, "as one"), (count, "simulated")):
            attempt = partial(_matched, scene, count, simulated)
            yield from _attacked(
                name,
                scene,
                batch,
                attempt,
                scene.effort.searched_rows,
                (count, f"{count} steps {said}"),
            )


def _why_no_search(scene: Scene) -> str | None:
    like, module = scene.inputs, scene.prepared.flat.module
    if (reason := scene.why_no_step()) is not None:
        return reason
    nothing, shape = np.zeros(scene.prepared.plan.parameters), tuple(like.x.shape[1:])
    if like.labels() is None or labels(module, nothing, 1, shape, scene.span, seed=0) is None:
        return (
            "labels are read off the bias of a last linear layer of a classifier, and there is none"
        )
    return None


def _matched(
    scene: Scene, count: int, simulated: int, flat: FlatModel, view: GradientView, step: StepRound
) -> Inputs:
    """Rows by a search for the same gradient, or for the same update of steps of which some are simulated."""
    like, rows, train = scene.inputs, min(view.rows, _MOST_ROWS), scene.prepared.plan.train
    local = LocalSteps(count, step.rate, train.momentum, train.weight_decay if count > 1 else 0.0)
    seed = derive_seed(scene.seed, view.rows, "", "inversion")
    shape = tuple(like.x.shape[1:])
    mean = view.gradient / local.gradients
    classes = labels(flat.module, mean, rows, shape, scene.span, seed=seed)
    assert classes is not None
    return match(
        scene.task, flat.module, view.gradient, view.exact, classes, like, scene.picture, scene.prior,
        scene.effort.search, seed=seed, local=local if simulated > 1 else None,
    )[0]  # fmt: skip


def _attacked(
    name: str, scene: Scene, batch: int, attempt: Attempt, wanted: int, local: tuple[int, str] = (1, ""),
) -> Iterator[AttackRow | Reconstruction]:  # fmt: skip
    """A row for each view of a step on `batch` rows, under each protection; with a picture of each first row. local:
    steps, and what is said of them; of several only uploads are attacked, since a sum is harder still."""
    rounds, width = max(1, wanted // batch), scene.span[1] - scene.span[0]
    everything = _flat(scene.inputs.x.numpy())
    flat, setting = scene.prepared.flat, f"batch {batch}" + (f", {local[1]}" if local[1] else "")
    made: dict[
        bytes, np.ndarray
    ] = {}  # two parties, or two protections, may give the same gradient
    for protection in scene.protections:
        scores: dict[tuple[str, str], Likeness] = defaultdict(Likeness)
        pictures: list[Reconstruction] = []
        for number, step in enumerate(scene.steps(protection, batch, rounds, local[0])):
            truth = _flat(step.rows.x.numpy())
            known = {row.tobytes() for row in truth}
            others = everything[[row.tobytes() not in known for row in everything]]
            for view in (v for v in step.views if local[0] == 1 or v.source == UPLOAD):
                if (key := view.gradient.tobytes()) not in made:
                    flat.write(step.start)
                    with single_thread():
                        made[key] = _flat(attempt(flat, view, step))
                guesses = made[key]
                rng = generator(scene.seed, number, view.party, f"likeness {view.source}")
                score = scores[view.party, view.source]
                before = len(score.psnr)
                pairs = score.add(guesses, truth, others, scene.picture, width, rng)
                if scene.picture is not None and number < 2:
                    for place, (row, guess) in enumerate(pairs):
                        pictures.append(
                            Reconstruction(
                                name, view.party, view.source, protection, setting, scene.picture,
                                scene.pixels(truth[row]), scene.pixels(guesses[guess]),
                                round(score.psnr[before + place], 2), round(score.ssim[before + place], 3),
                            )
                        )  # fmt: skip
        for (party, source), score in scores.items():
            yield _row(name, party, source, protection, setting, score)
        yield from pictures


def _row(
    name: str, party: str, source: str, protection: str, setting: str, score: Likeness
) -> AttackRow:
    rows, hits = len(score.psnr), sum(score.identified)
    mean, chance = float(np.mean(score.psnr)), score.chance
    beyond = bool(mean > chance.max())
    what = "one site's upload" if source == UPLOAD else "a sum of sites"
    alike = f" and a similarity of {np.mean(score.ssim):.2f}" if score.ssim else ""
    shows = (
        f"{hits} of {rows} rows can be told from {CANDIDATES - 1} others by what {_who(party)} can make of {what}: "
        f"{mean:.1f} dB{alike}, {chance.mean():.1f} dB against other rows."
        if beyond
        else f"What {_who(party)} can make of {what} is no closer to the rows than to other rows of the task."
    )
    low, high = share_interval(hits, rows)
    return AttackRow(
        name, party, source, protection, setting, rows, f"identified among {CANDIDATES}",
        hits / rows, low, high, float(np.mean(score.null_identified)), beyond,
        {
            "psnr_db": mean,
            "psnr_lowest_db": min(score.psnr),
            "psnr_highest_db": max(score.psnr),
            "chance_psnr_db": float(chance.mean()),
            "chance_psnr_highest_db": float(chance.max()),
            "ssim": float(np.mean(score.ssim)) if score.ssim else None,
        },
        shows, _NOT_SHOWN,
    )  # fmt: skip


def _who(party: str) -> str:
    return "the coordinator" if party == "coordinator" else party


def _refused(name: str, scene: Scene, reason: str) -> AttackRow:
    own = scene.job.protect.protection
    return AttackRow(name, "coordinator", UPLOAD, own, "", 0, "identified", refused=reason)


def _flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), math.prod(x.shape[1:])).astype(np.float64)
