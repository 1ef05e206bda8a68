"""Which site has a property: many rows of one class, or of one category of a column (Melis et al. 2019,
arXiv:1805.04049, section 4; Ganju et al. 2018).

Every round one of two sites, drawn by lot, trains on rows of which most have the property, all others on rows of which
few do; all rows are their own, and as many at each site. The adversary makes updates of both kinds from public rows,
with the job's own training from the same model, learns what sets them apart, and names the one of the two whose upload
has more of it. Where the upload is protected it reads what stands in its place.

The sum is asked another question, with all sites alike in a round: do most rows of the federation have the property?
That is for the sum to tell, under every protection, and it is of no single site.

Invariant: a lot decides which site has the property, and whether all have it, so an answer without information is right
one time in two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedcore.experiment.attacks.intervals import share_interval
from fedcore.experiment.attacks.scene import SUM, UPLOAD, Scene
from fedcore.experiment.exposure import COORDINATOR, SITE, held
from fedcore.experiment.prepare import prepare
from fedcore.experiment.simulation import Federation
from fedcore.learning.data.rows import Rows, TableRows, pool
from fedcore.learning.model import single_thread
from fedcore.learning.site import SiteTrainer
from fedcore.results import AttackRow
from fedcore.secagg.summing import RoundTrace
from fedcore.seeds import generator
from fedcore.types import WideVector

_NAME = "property"
_OF_SITE, _OF_ALL = "sites named that have the property", "answers about all rows that are right"

MANY, FEW = 0.6, 0.2
"""Shares of rows with the property."""

_TRIALS, _SHADOWS = 24, 40
"""Rounds for each row; made updates of each kind."""

_LEAST_ROWS = 10

_NOT_SHOWN = {
    UPLOAD: (
        "Shares are set far apart here, and of one round; those of a real site may lie closer, and many rounds tell "
        "more. Differential privacy of records does not bound what is told of a whole site."
    ),
    SUM: (
        "What the sum tells of all rows is what it is for, and no encryption changes it. Who colludes with all sites "
        "but one has that one's sum: see the label."
    ),
}


@dataclass(frozen=True)
class Property:
    """about: in words. of: (rows,) bool for each site's training rows. public: the same of the public rows. rows: that
    a site trains on in a round."""

    about: str
    of: tuple[NDArray[np.bool_], ...]
    public: NDArray[np.bool_]

    @property
    def rows(self) -> int:
        """The most that every site has enough rows for, with the property and without."""
        return min(int(min(each.sum() / MANY, (~each).sum() / (1 - FEW))) for each in self.of)


def property_of_sites(scene: Scene) -> Iterator[AttackRow]:
    """The site with most rows of a class, and of a category; and whether all sites together have many."""
    own = scene.job.protect.protection

    def refused(reason: str) -> AttackRow:
        return AttackRow(_NAME, COORDINATOR, UPLOAD, own, "", 0, _OF_SITE, refused=reason)

    train = scene.job.train
    if scene.task.app is not None or train.algorithm != "averaging" or train.local_parameters:
        yield refused(
            "sites keep something from round to round, so an update cannot be made from rows alone"
        )
        return
    if scene.job.round.cohort:
        yield refused("found rounds of some sites (round.cohort), expected all sites in each round")
        return
    with single_thread():
        chosen = told_apart(scene.prepared.federation)
        if not chosen:
            yield refused(
                f"found no class or category with rows enough at every site for {_LEAST_ROWS} of which {FEW:.0%} or "
                f"{MANY:.0%} have it"
            )
        for one in chosen:
            for protection in scene.protections:
                yield _which_site(scene, one, protection)
            yield _of_all_rows(scene, one, own)


def told_apart(federation: Federation) -> list[Property]:
    """The class and the category of a table that leave most rows, where they leave enough."""
    state = federation.state
    inside = [site.standard_rows(state) for site in federation.sites]
    raw = [(site.site.train, site.site.test) for site in federation.sites]
    kinds: list[list[Property]] = [[], []]
    labels = [(rows.train.labels(), rows.test.labels()) for rows in inside]
    known = [(a, b) for a, b in labels if a is not None and b is not None]
    if len(known) == len(labels):
        for label in np.unique(np.concatenate([a for a, _ in known])):
            kinds[0].append(
                Property(
                    f"class {label}",
                    tuple(a == label for a, _ in known),
                    np.concatenate([b == label for _, b in known]),
                )
            )
    tables = [(a, b) for a, b in raw if isinstance(a, TableRows) and isinstance(b, TableRows)]
    if len(tables) == len(raw):
        for column, name in enumerate(tables[0][0].layout.fixed):
            kinds[1].append(
                Property(
                    name,
                    tuple(a.fixed[:, column] > 0.5 for a, _ in tables),
                    np.concatenate([b.fixed[:, column] > 0.5 for _, b in tables]),
                )
            )
    found = [max(kind, key=lambda each: each.rows) for kind in kinds if kind]
    return [
        each
        for each in found
        if each.rows >= _LEAST_ROWS and min(each.public.sum(), (~each.public).sum()) >= _LEAST_ROWS
    ]


def _which_site(scene: Scene, wanted: Property, protection: str) -> AttackRow:
    rounds = _Rounds(scene, wanted, protection)
    sites, rng = len(wanted.of), generator(scene.seed, 0, "", f"property lots {wanted.about}")
    hits = 0
    for turn in range(_TRIALS):
        lot, other = rng.permutation(sites)[:2].tolist()
        has, not_ = (
            rounds.score(turn, np.arange(sites) == lot, each)[COORDINATOR] for each in (lot, other)
        )
        hits += int(has > not_)
    low, high, beyond, told = _beyond_chance(hits)
    return AttackRow(
        _NAME, COORDINATOR, UPLOAD, protection, f"{wanted.about}, {wanted.rows} rows", _TRIALS, _OF_SITE,
        hits / _TRIALS, low, high, 0.5, beyond, rounds.about,
        f"Of two sites, one with {MANY:.0%} rows of {wanted.about} and one with {FEW:.0%}, the first is named "
        f"in {hits} of {_TRIALS} rounds, {told}.",
        _NOT_SHOWN[UPLOAD],
    )  # fmt: skip


def _beyond_chance(hits: int) -> tuple[float, float, bool, str]:
    """The 95 % interval of the share of hits, and whether it is above one half, in words, too."""
    low, high = share_interval(hits, _TRIALS)
    beyond = share_interval(hits, _TRIALS, 0.998)[0] > 0.5
    return low, high, beyond, "better than by chance" if beyond else "no better than by chance"


def _of_all_rows(scene: Scene, wanted: Property, protection: str) -> AttackRow:
    rounds = _Rounds(scene, wanted, protection)
    rng = generator(scene.seed, 1, "", f"property lots {wanted.about}")
    coins = rng.random(_TRIALS) < 0.5
    hits = 0
    for turn, coin in enumerate(coins):
        score = rounds.score(turn, np.full(len(wanted.of), coin), 0)[SITE]
        hits += int((score > 0) == coin)
    low, high, beyond, told = _beyond_chance(hits)
    return AttackRow(
        _NAME, SITE, SUM, protection, f"{wanted.about}, all sites alike", _TRIALS, _OF_ALL,
        hits / _TRIALS, low, high, 0.5, beyond, rounds.about,
        f"Whether {MANY:.0%} or {FEW:.0%} of the rows of all sites have {wanted.about} is told in {hits} of {_TRIALS} "
        f"rounds, {told}. The sum is one vector for all other sites, so it names none of them.",
        _NOT_SHOWN[SUM],
    )  # fmt: skip


class _Rounds:
    """Recorded rounds that all begin with the job's first model, and what the adversary has learnt to look for."""

    def __init__(self, scene: Scene, wanted: Property, protection: str) -> None:
        self.wanted, self.seed = wanted, scene.seed
        job = scene.of(protection)
        calm = job.round.model_copy(update={"drop": (), "dropout": 0.0})
        if job.privacy.epsilon is None:
            calm = calm.model_copy(update={"rounds": 2 * _TRIALS})
        self.federation = prepare(scene.task, replace(job, round=calm)).federation
        federation = self.federation
        while federation.purpose is not None and not federation.purpose.trains:
            federation.advance()
        self.start, self.first = federation.state, federation.step
        self.honest = federation.sites
        self.public = pool([site.site.test for site in self.honest])
        self.direction, self.middle = self._learnt()

    @property
    def about(self) -> dict[str, float | None]:
        return {"sites": float(len(self.honest)), "rows_of_a_site": float(self.wanted.rows)}

    def score(self, turn: int, many: NDArray[np.bool_], target: int) -> dict[str, float]:
        """{party: how much its view of `target` in a round looks like many rows with the property, above 0 rather
        than below}. many: (sites,) bool, which sites have them; the same turn has the same rows."""
        federation, plan = self.federation, self.federation.plan
        # Rounds go on, as keys are used for one round each, but from the same model; with privacy, whose noise is of as
        # many rounds as the job has, they begin again.
        federation.state = replace(
            federation.state, server=self.start.server, judgement=self.start.judgement
        )
        if federation.purpose is None or not federation.purpose.trains:
            federation.state, federation.step = self.start, self.first
        federation.sites = [
            self._dealt(site, self.wanted.of[index], bool(many[index]), f"turn {turn}")
            for index, site in enumerate(self.honest)
        ]
        trace = RoundTrace(target, (target + 1) % len(plan.sites))
        federation.advance(trace)
        views = held(trace, plan, federation.engine.sealer)
        found = {}
        for party, values in ((COORDINATOR, views[COORDINATOR].upload), (SITE, views[SITE].mean)):
            if values is not None:
                found[party] = float(self._centred(values) @ self.direction - self.middle)
        return found

    def _centred(self, fields: NDArray[np.uint64] | NDArray[np.float64]) -> WideVector:
        plan = self.federation.plan
        return fields[: plan.parameters].astype(np.float64) - (1 << (plan.packing.bits - 1))

    def _dealt(
        self, trainer: SiteTrainer, has: NDArray[np.bool_], many: bool, salt: str
    ) -> SiteTrainer:
        rng = generator(self.seed, 0, trainer.site.id, f"property rows {self.wanted.about} {salt}")
        picked = _picked(has, self.wanted.rows, many, rng)
        return replace(trainer, site=replace(trainer.site, train=trainer.site.train.take(picked)))

    def _learnt(self) -> tuple[WideVector, float]:
        """What sets updates with many such rows apart from those with few: a ridge regression, and its middle."""
        federation, step = self.federation, self.first
        assert step is not None
        updates, kinds = [], np.repeat([True, False], _SHADOWS)
        for number, many in enumerate(kinds):
            rng = generator(self.seed, number, "", f"property shadows {self.wanted.about}")
            rows: Rows = self.public.take(
                _picked(self.wanted.public, self.wanted.rows, bool(many), rng)
            )
            site = self.honest[0]
            trainer = replace(site, site=replace(site.site, train=rows))
            fields, _ = trainer.update(federation.plan, step, self.start)
            updates.append(self._centred(fields))
        x = np.array(updates)
        mean, sign = x.mean(axis=0), np.where(kinds, 1.0, -1.0)
        centred = x - mean
        likeness = centred @ centred.T
        ridge = np.trace(likeness) / len(x) * 0.1 + 1e-12
        direction = centred.T @ np.linalg.solve(likeness + ridge * np.eye(len(x)), sign)
        return direction, float(mean @ direction)


def _picked(
    has: NDArray[np.bool_], rows: int, many: bool, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Indices of so many rows, of which `MANY` or `FEW` have the property; of too few some are taken again."""
    wanted = round(rows * (MANY if many else FEW))
    parts = []
    for which, count in ((np.flatnonzero(has), wanted), (np.flatnonzero(~has), rows - wanted)):
        parts.append(rng.choice(which, count, replace=count > len(which)))
    return rng.permutation(np.concatenate(parts)).astype(np.int64)
