"""At which site a training row is, from the updates of single sites (Hu et al. 2021, arXiv:2109.05659).

The adversary has the row with its class and each site's model after a round, and names the site whose model is surest
of the row. Where the upload is protected the "model" of a site is what the adversary reads in its place.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from fedcore.experiment.attacks.intervals import share_interval
from fedcore.experiment.attacks.scene import UPLOAD, Scene
from fedcore.experiment.exposure import COORDINATOR, held
from fedcore.experiment.prepare import prepare
from fedcore.learning.confidence import confidences
from fedcore.learning.data.rows import ArrayRows
from fedcore.learning.model import single_thread
from fedcore.results import AttackRow
from fedcore.secagg.encode.quantise import step_size
from fedcore.secagg.summing import RoundTrace
from fedcore.seeds import generator

_NAME, _MEASURE = "source", "named at their site"

_ROUND = 2
"""The round whose uploads are read: of the first, models are closer to the start than to the rows."""

_MOST_SITES = 16

_NOT_SHOWN = (
    "Of one round; over many a site's rows may stand out more. The released model and the sums say nothing of single "
    "sites to this adversary, and a sum less all sites but one is that one's: see the label for who can collude."
)


def source(scene: Scene) -> Iterator[AttackRow]:
    """The site whose upload is surest of a row."""
    own = scene.job.protect.protection
    if scene.inputs.labels() is None:
        yield AttackRow(
            _NAME, COORDINATOR, UPLOAD, own, "", 0, _MEASURE,
            refused="the targets are no classes, and the confidence is that of a row's class",
        )  # fmt: skip
        return
    if len(scene.prepared.sites) > _MOST_SITES:
        yield AttackRow(
            _NAME, COORDINATOR, UPLOAD, own, "", 0, _MEASURE,
            refused=f"found {len(scene.prepared.sites)} sites, expected at most {_MOST_SITES}: each has its round",
        )  # fmt: skip
        return
    for protection in scene.protections:
        with single_thread():
            yield _of(scene, protection)


def _of(scene: Scene, protection: str) -> AttackRow:
    sure, sizes = _as_read(scene, protection)
    sites = len(sizes)
    truth = np.repeat(np.arange(sites), sizes)
    # A model that is surer of all rows is no sign: each is measured by its mean over all of them.
    named = (sure - sure.mean(axis=1, keepdims=True)).argmax(axis=0)
    counted = _balanced(scene, truth, sites)
    if not len(counted):
        return AttackRow(
            _NAME, COORDINATOR, UPLOAD, protection, "", 0, _MEASURE,
            refused="found no class that every site has, expected rows of one class at all sites",
        )  # fmt: skip
    hits, rows = int((named[counted] == truth[counted]).sum()), len(counted)
    low, high = share_interval(hits, rows)
    beyond = share_interval(hits, rows, 0.998)[0] > 1 / sites
    told = "better than by chance" if beyond else "no better than by chance"
    return AttackRow(
        _NAME, COORDINATOR, UPLOAD, protection, f"round {_ROUND}", rows, _MEASURE,
        hits / rows, low, high, 1 / sites, beyond, {"sites": float(sites)},
        f"{hits} of {rows:,} training rows are named at their site, {told}, among {sites} sites that have as many rows "
        "of each class.",
        _NOT_SHOWN,
    )  # fmt: skip


def _balanced(scene: Scene, truth: NDArray[np.int64], sites: int) -> NDArray[np.int64]:
    """Rows of each class, as many of each site: a guess by a row's class alone, and a model of random numbers, are
    then right as often as chance is, and the interval holds."""
    labels, rng = scene.inputs.labels(), generator(scene.seed, 0, "", "source rows")
    assert labels is not None
    picked = []
    for label in np.unique(labels):
        of_site = [np.flatnonzero((labels == label) & (truth == site)) for site in range(sites)]
        least = min(len(each) for each in of_site)
        picked += [rng.permutation(each)[:least] for each in of_site]
    return np.concatenate(picked)


def _as_read(scene: Scene, protection: str) -> tuple[NDArray[np.float64], list[int]]:
    """((sites, rows) how sure the model that the coordinator reads of each site is, rows of each site)."""
    sure, sizes = [], []
    rows: ArrayRows | None = None
    prepared = prepare(scene.task, scene.of(protection))
    federation, plan = prepared.federation, prepared.plan
    # What sites keep from round to round is as it was only in a federation that has not been in the round yet.
    fresh = plan.train.algorithm != "averaging" or plan.train.personal
    start, step = federation.state, federation.step
    for target in range(len(scene.prepared.sites)):
        if fresh and target:
            prepared = prepare(scene.task, scene.of(protection))
            federation = prepared.federation
        if fresh or not target:
            while federation.step is None or federation.step.training_round < min(
                _ROUND, plan.rounds
            ):
                federation.advance()
            start, step = federation.state, federation.step
        federation.state, federation.step = start, step  # the same round for each target
        trace = RoundTrace(target, (target + 1) % len(plan.sites))
        federation.advance(trace)
        bound, bits = start.server.bound, plan.packing.bits
        read = held(trace, plan, federation.engine.sealer)[COORDINATOR].upload
        assert read is not None
        size, mine = plan.parameters, prepared.sites[target].train
        centred = read[:size].astype(np.float64) - (1 << (bits - 1))
        weight = plan.max_examples / plan.weight_of(len(mine))
        update = centred * step_size(bits, bound) * weight
        prepared.flat.write((start.server.model.astype(np.float64) + update).astype(np.float32))
        rows = rows or scene.inputs
        sure.append(confidences(scene.task, prepared.flat.module, rows))
        sizes.append(len(mine))
    return np.nan_to_num(np.array(sure)), sizes
