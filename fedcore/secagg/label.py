"""The label of a run: who can see what, computed from its terms and never typed by hand (PROTOCOL L); and
what a job takes from a site (`leaving_of`).

The same text is on the screen, in the report, in `plan.json` and in `fedcore plan`. The terms follow from
a job's settings and its roster alone, so a site has the label before it reads a row.

With n sites and threshold t, an opened sum is of at least t of them. A coordinator that breaks every rule
opens two different sums if it gets two lists signed by t sites each; two such lists share 2 t - n sites, and
an honest one among these signs only one. A coordinator that keeps to the rules can compute one update once it
has all the others of the smallest sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedcore.secagg.algorithms import LEAST_THRESHOLD, algorithm_of, keeps_of, refuse_threshold
from fedcore.secagg.judge_plan import ends_early, is_judged
from fedcore.secagg.plan import RoundPlan, check_threshold, default_threshold
from fedcore.secagg.privacy.privacy_plan import COLUMN, IN_SUM, RECORD, SITE, PrivacyPlan
from fedcore.secagg.protections import MIN_SITES, Protection, refuse_roster
from fedcore.secagg.purposes import leaving
from fedcore.secagg.site_groups import smallest_group
from fedcore.types import SiteId

if TYPE_CHECKING:
    from fedcore.config import Job

_PROTECTS, _PROTECTS_NOT = "Protects against: ", "Does not protect against: "
_PUBLIC = "It learns the metrics of each release over all its sites: the plan makes them public."
_ENDS = "It learns after which round the sites end training, which follows from their metrics."
_JUDGED = (
    "The sites judge released models by the metrics of their test rows (round.judge), so the scores of the model on "
    "these rows are too good."
)
_GROUPS = (
    "The {sites} sites are in groups of {group} or more, and the updates of each group are opened as a sum of their "
    "own (round.aggregate): whoever sees sums sees these, so an update hides among those of its group alone, and the "
    "figures of this label are those of one group."
)
_GIVEN = "of the models only the last one, which the plan gives it"
_STREAMS = "What travels is encrypted by AES-256 streams of a secret that all sites share."
_TWO_BLOCKS = (
    "The algorithm sends two blocks that are made of one update, so a sum is two equations about the same updates: an "
    "update is hidden among one site fewer than by another algorithm, which is counted above."
)
_TWO_SITES = "of two sites in a sum, each can work out the other's update"


@dataclass(frozen=True)
class Terms:
    """What decides who can see what: every line of a label follows from these.

    sites: the roster, as names or as their number. threshold: t; 0 becomes the default for the roster.
    cipher: of `encrypted` and `layered`. release: who gets the last model, "sites" or "coordinator".
    statistics: how tables are scaled: by their declared ranges ("ranges", nothing travels), or by sums
    over all sites ("federated"). single_site_features: whether a feature that fewer than 3 sites have is
    taken. second_block: whether a vector holds another combination of what the update was made of, so that a sum is two
    equations about the same updates. ends: whether the sites may end training before its last round. group: sites of
    the smallest group whose updates are a sum of their own; 0 for one sum over all. privacy: of a
    job with noise in its sums.

    Raises PlanRefused for a threshold outside (n/2, n], or a roster the protection does not take, and as
    `algorithms.refuse_threshold`.
    """

    protection: str
    sites: int | tuple[SiteId, ...]
    threshold: int = 0
    cipher: str = "bfv"
    public_metrics: bool = False
    release: str = "sites"
    statistics: str = "ranges"
    single_site_features: bool = False
    second_block: bool = False
    judged: bool = False
    ends: bool = False
    group: int = 0
    privacy: PrivacyPlan | None = None

    def __post_init__(self) -> None:
        refuse_roster(self.count, self.protection)
        if not self.threshold:
            object.__setattr__(self, "threshold", default_threshold(self.count))
        check_threshold(self.threshold, self.count)
        if self.second_block and self.layers.protects:
            refuse_threshold(self.threshold, self.count)

    @property
    def layers(self) -> Protection:
        return Protection.of(self.protection)

    @property
    def count(self) -> int:
        """n: sites on the roster."""
        return self.sites if isinstance(self.sites, int) else len(self.sites)

    @classmethod
    def of_plan(cls, plan: RoundPlan) -> Terms:
        """Those of a plan. It does not say whether a feature of few sites is taken: the job does."""
        return cls(
            protection=plan.protection, sites=plan.server.cohort or plan.sites, threshold=plan.threshold,
            cipher=plan.cipher, public_metrics=plan.public_metrics, release=plan.release,
            statistics=plan.standardise, second_block=len(plan.blocks) > 1,
            judged=plan.server.judge is not None,
            ends=plan.server.judge is not None and plan.server.judge.ends,
            group=0 if plan.server.groups is None else plan.server.groups.smallest, privacy=plan.privacy,
        )  # fmt: skip

    @classmethod
    def of_job(cls, job: Job, sites: int | tuple[SiteId, ...], *, calibrated: bool = True) -> Terms:
        """Those of a job on a roster, known without rows and without the model. A job does not say whether
        its task has a table; the terms are those of one that has. calibrated: whether the noise of a job with
        privacy is computed, seconds for some settings; else its multiplier is 1, for checks that do not use it."""
        protect, privacy = job.protect, None
        if job.privacy.epsilon is not None:
            privacy = PrivacyPlan.asked(job.privacy)
            if calibrated:
                privacy = privacy.calibrated(job.round.rounds, judged=is_judged(job.round))
        return cls(
            protection=protect.protection, sites=sites, threshold=protect.threshold or 0,
            cipher=protect.cipher,
            public_metrics=job.track.public_metrics, release=protect.release,
            statistics=job.train.standardise, single_site_features=protect.single_site_features,
            second_block=bool(algorithm_of(job.train.algorithm).second_block),
            judged=is_judged(job.round), ends=ends_early(job.round), group=smallest_group(job.round, sites),
            privacy=privacy,
        )  # fmt: skip


@dataclass(frozen=True)
class Collusion:
    """What a plan withstands. active, curious: how many sites may collude with a coordinator that
    breaks every rule it can, or that keeps to the rules, before some honest site's update is open.

    absences: sites that may be missing from a round. hidden_among: the fewest honest updates, its own
    included, in the sum an update is opened in, with `active` sites colluding; 1 where it is seen alone.
    """

    active: int
    curious: int
    absences: int
    hidden_among: int


def collusion(terms: Terms) -> Collusion:
    """The figures of a plan's terms: for the smallest sum they permit, of `threshold` survivors."""
    sites, threshold = terms.count, terms.threshold
    absences, more = sites - threshold, int(terms.second_block)
    if not terms.layers.protects:
        return Collusion(0, 0, absences, 1)
    if not terms.layers.masks:
        return Collusion(0, 0, absences, threshold - more)
    curious = threshold - 2 - more
    active = min(2 * threshold - sites - 1, curious)
    return Collusion(active, curious, absences, threshold - active - more)


def label_of(terms: Terms, few_sites: Sequence[str] | None = None) -> str:
    """At most eight lines; the first states what the run protects against, the second what not.

    few_sites: the features that fewer than 3 sites were found to have; None before the statistics.
    """
    if terms.group and terms.layers.protects:
        one = label_of(_of_group(terms), few_sites).splitlines()
        one[1] += " " + _GROUPS.format(sites=terms.count, group=terms.group)
        return "\n".join(one)
    layers = terms.layers
    lines = _masked(terms) if layers.masks else [*(_ENCRYPTED if layers.encrypts else _PLAIN)]
    if layers.encrypts and terms.cipher == "keystream":
        lines[-1] += f" {_STREAMS}"
    if terms.public_metrics:
        lines[0] += f" {_PUBLIC}"
    if terms.ends and layers.protects:
        lines[0] += f" {_ENDS}"
    if terms.second_block and layers.protects:
        lines[-1] += f" {_TWO_BLOCKS}"
    lines += _of_rows(terms, few_sites)
    if terms.privacy is not None:
        return "\n".join([*lines, _bounded(terms.privacy, terms.threshold)])
    lines.append(
        "Not bounded by any of this: what the released model itself reveals about training rows; what a "
        "row that changes between two jobs, or a site that is absent from one of two rounds, shows in the "
        "difference of their sums and models; only differential privacy bounds that."
    )
    return "\n".join(lines)


def _of_group(terms: Terms) -> Terms:
    """The terms of one group's sums: a roster of its own, with the default threshold for so many sites."""
    sites = terms.group
    return replace(terms, sites=sites, threshold=default_threshold(sites), group=0)


def _bounded(privacy: PrivacyPlan, threshold: int) -> str:
    """What differential privacy bounds, for whom, and what it does not."""
    whose = {
        RECORD: f"one record among the training {'or test rows' if privacy.metric_share else 'rows'}",
        COLUMN: "one group of rows (one person) at one site among the training rows",
        SITE: "all training rows of one site",
    }[privacy.unit]
    if privacy.noise == IN_SUM:
        alone = "any other site" if privacy.colluders else "anyone outside the federation"
        against = f"the coordinator, {alone} and whoever gets the model"
        holds = f"it holds if {threshold - privacy.colluders} sites of a sum add their noise and keep it to themselves"
        where = "in every sum"
    else:
        against, where = (
            "everybody but the site itself, all others together",
            "in every site's vector",
        )
        holds = "it holds whatever other sites do"
    sampled = ""
    if privacy.sample_rate < 1:
        sampled = (
            f"; each round takes a unit with probability {privacy.sample_rate:g}, of which nobody but its site knows, "
            "and epsilon counts on that"
        )
    if privacy.metric_share:
        sampled += (
            f"; sums of metrics have noise of multiplier {privacy.metric_multiplier:g} in each of "
            f"{privacy.metric_releases} releases, of the same budget"
        )
    return (
        f"Bounded by differential privacy, against {against}: what all sums "
        f"and models of this job together tell of {whose}: epsilon {privacy.epsilon:g} at "
        f"delta {privacy.delta:g}, adding or removing {'them' if privacy.unit == SITE else 'one'} (Gaussian noise, "
        f"multiplier {privacy.noise_multiplier:g}, {where}; clip norm {privacy.clip:g}{sampled}; {holds}). "
        "Not bounded: that a site takes part, and what other jobs over the same rows tell besides."
    )


def _of_rows(terms: Terms, few_sites: Sequence[str] | None) -> list[str]:
    """What sums over the sites' columns reveal, where there are any, and whether test rows choose the model."""
    said = [_JUDGED] if terms.judged else []
    if terms.statistics == "federated":
        said.append(
            "Exact sums of every column over all sites are opened before the first round, to whoever sees "
            "a sum."
        )
    if few_sites:
        names = ", ".join(few_sites)
        said.append(
            f"Statistics of {names} come from fewer than 3 sites: their sums show those sites' rows."
        )
    elif few_sites is None and terms.single_site_features:
        said.append(
            "Statistics of a feature may come from fewer than 3 sites: their sums then show those "
            "sites' rows."
        )
    return [" ".join(said)] if said else []


def label_warnings(terms: Terms) -> list[str]:
    """Warnings about the roster and the threshold, each with an alternative."""
    sites, threshold = terms.count, terms.threshold
    found = []
    if sites >= MIN_SITES and threshold == sites:
        found.append(
            f"Absences survived: 0 of {sites}. One absent site abandons the round. "
            + _alternative(terms)
        )
    if threshold == 2 and terms.layers.protects:
        found.append(
            f"A threshold of 2 tolerates no colluding site: {_TWO_SITES}. The default for {sites} sites "
            f"is {default_threshold(sites)}."
        )
    return found


_PLAIN = (
    _PROTECTS + "nobody. The coordinator sees every site's update and the model.",
    _PROTECTS_NOT + "anyone who can read the coordinator's memory or traffic. "
    "For simulation and tests only.",
)
_ENCRYPTED = (
    _PROTECTS + "the coordinator alone. It sees no site's update, not their sum and not the model.",
    _PROTECTS_NOT + "one site together with the coordinator. All sites share one key, "
    "which opens every site's update.",
    "A sum is accepted only with a tag that proves it is of exactly the listed sites, this round, "
    "each once; the result is right if no site lies.",
)


def _masked(terms: Terms) -> list[str]:
    sites, threshold, found = terms.count, terms.threshold, collusion(terms)
    with_sites = (
        f", alone or with {_up_to(found.active, 'colluding site')}," if found.active else " alone,"
    )
    if not terms.layers.encrypts:
        sight = "It sees no single site's update; it does see their sum and the model."
    elif terms.release == "coordinator":
        alone = "; alone, not their sum, and " if found.active else ", not their sum, and "
        sight = f"It sees no site's update{alone}{_GIVEN}."
    elif found.active:
        sight = "It sees no site's update; alone, neither their sum nor the model."
    else:
        sight = "It sees no site's update, not their sum and not the model."
    too_many = f"{found.active + 1} or more colluding sites" if found.active else "1 colluding site"
    models = "every model" if terms.release == "coordinator" else "the model"
    then = f" With 1 colluding site it also sees the sum and {models}."
    curious = _up_to(found.curious, "site") if found.curious else "no site"
    hidden = f"Sums of only 2 sites may be opened: {_TWO_SITES}."
    if threshold > 2:
        among = (
            f"with {_sites(found.active, 'colluding site')} among them, " if found.active else ""
        )
        hidden = (
            f"Only sums of at least {threshold} sites are opened; {among}each honest update is hidden "
            f"among at least {found.hidden_among} honest ones, its own included."
        )
    return [
        f"{_PROTECTS}the coordinator{with_sites} even if it breaks the rules. {sight}",
        f"{_PROTECTS_NOT}the coordinator and {too_many} together: they open other sites' updates."
        + (then if terms.layers.encrypts else ""),
        "A colluding site is one that hands over all it holds; the coordinator's own identities on the "
        "roster count as colluding sites. If the coordinator keeps to the rules and only looks on, "
        f"{curious} may collude with it.",
        hidden,
        f"Absences survived: {found.absences} of {sites}. A round with fewer than {threshold} sites is "
        "abandoned, and no site's update is opened.",
        "A sum is accepted only with a tag that proves it is of exactly the listed sites, this round, "
        "each once; the result is right if no colluding site lies.",
    ]


def _alternative(terms: Terms) -> str:
    """Settings that survive an absence: the next lower threshold, and for three sites a fourth."""
    lower, masks = terms.threshold - 1, terms.layers.masks
    if terms.second_block and lower < LEAST_THRESHOLD:
        return (
            f"{LEAST_THRESHOLD + 1} sites with a threshold of {LEAST_THRESHOLD} survive 1 absence."
        )
    said = f"A threshold of {lower} (`protect.threshold`) survives 1 absence"
    if masks:
        tolerated = collusion(replace(terms, threshold=lower)).active
        said += (
            f" and tolerates {_sites(tolerated, 'colluding site')}"
            if tolerated
            else ", but tolerates no colluding site"
        )
    elif lower == 2 and terms.layers.protects:
        said += f", but {_TWO_SITES}"
    if terms.count == MIN_SITES:
        said += "; four sites with a threshold of 3 survive 1 absence"
        said += " and tolerate 1 colluding site" if masks else ""
    return said + "."


def _sites(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("s" if count != 1 else "")


def _up_to(count: int, noun: str) -> str:
    return ("" if count == 1 else "up to ") + _sites(count, noun)


def leaving_of(job: Job, terms: Terms) -> list[str]:
    """What a job takes from a site: a line for each purpose of a round, then who can open the vectors, and what
    goes to the coordinator. PROTOCOL W and Q describe the vectors' content."""
    shown = [
        terms.public_metrics and "the metrics of each release over all its sites",
        terms.release == "coordinator" and "the model and statistics of the last round",
        terms.ends
        and "after which round training ends, which follows from the metrics over all sites",
    ]
    kept = keeps_of(job.train)
    return [
        *leaving(job, terms),
        f"opened: by {readers_of(terms)}",
        *(f"to the coordinator and its operators: {each}" for each in shown if each),
        *([f"kept here from round to round, and never sent: {kept}"] if kept else []),
        "nothing else but the shape of the model: rows, file names and errors stay here",
    ]


def readers_of(terms: Terms) -> str:
    """The parties that can read a vector, or a sum, by the protection."""
    least = f"a sum of at least {terms.threshold} sites"
    if not terms.layers.protects:
        return "the coordinator, the vector of this site"
    if not terms.layers.encrypts:
        return f"the coordinator and the sites, as {least}"
    by_sites = f"the sites only, as {least}"
    if terms.layers.masks:
        return by_sites
    return f"{by_sites}; with any one of them the coordinator opens the vector of this site"


def works_out(terms: Terms) -> str:
    """Who can work out the vector of one site, by who hands over all that they hold."""
    found = collusion(terms)
    if not terms.layers.protects:
        return "the coordinator"
    return (
        f"nobody, unless the coordinator and {_sites(found.active + 1, 'other site')} work together"
    )
