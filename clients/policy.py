"""What a site's operator allows: `[policy]` of site.toml, and the one place that says no to a job.

Invariant: no coordinator can ask for more than this table; what it forbids is refused before a row is
read (but for `jobs_per_month`, which counts by the rows) and before anything leaves. The coordinator gets
one word for it; the key, what was found and what was expected are in the site's own log.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool

from fedcore.config import Job, build_job, read_settings
from fedcore.errors import BadInput, PolicyRefused, Refused
from fedcore.learning.guard import GuardRules
from fedcore.secagg.label import Terms
from fedcore.secagg.plan import RoundPlan, default_threshold
from fedcore.secagg.protocol.job.site.participation import Release, RowsInSum
from fedcore.secagg.protocol.job_messages import JobOffer
from fedcore.toml import Section

POLICY, NOT_ALLOWED, OTHER_TASK = "policy", "task not allowed", "task differs"
"""The words that the coordinator gets, of protocol/job.py REASONS."""

Protections = Literal["encrypted", "masked", "layered"]
Ciphers = Literal["bfv", "keystream"]


class PolicySection(Section):
    """[policy]: what jobs may ask of this site. Every key has a default; the defaults are the narrow side.

    least_threshold: t, in sites; None is the default for the roster, floor(2n/3) + 1. minimum_sites: of
    the roster and of every round's cohort. most_epochs: in one round. jobs_per_month: over the same rows,
    in any 30 days. least_batch: rows of a training step. statistics: whether tables may be scaled by sums
    over all sites. release: who may get the last model. guard_*: when this site leaves a job whose model
    gets worse on its own rows (PROTOCOL G).
    jobs: "ask" waits for `fed-site approve`; "listed" runs the tasks of [tasks.NAME] within the limits;
    "any" runs these tasks without most_rounds, most_epochs and jobs_per_month. No task runs unlisted.
    """

    protections: Annotated[tuple[Protections, ...], Field(min_length=1)] = ("layered",)
    ciphers: Annotated[tuple[Ciphers, ...], Field(min_length=1)] = ("bfv", "keystream")
    least_threshold: int | None = Field(default=None, ge=2)
    minimum_sites: int = Field(default=3, ge=3)
    most_rounds: int = Field(default=1000, ge=1)
    most_epochs: int = Field(default=100, ge=1)
    jobs_per_month: int = Field(default=31, ge=1)
    least_batch: int = Field(default=8, ge=1)
    public_metrics: StrictBool = False
    single_site_features: StrictBool = False
    statistics: Literal["ranges", "federated"] = "ranges"
    release: Literal["sites", "coordinator"] = "sites"
    guard_loss_factor: float = Field(default=1.5, gt=1)
    guard_rounds: int = Field(default=2, ge=1)
    jobs: Literal["ask", "listed", "any"] = "listed"


@dataclass(frozen=True)
class _Asked:
    """What a job, or its plan, asks of a site."""

    terms: Terms
    rounds: int
    epochs: int
    batch: int

    @classmethod
    def of_job(cls, job: Job, sites: int) -> _Asked:
        """Raises PlanRefused where no plan can follow from it."""
        return cls(
            Terms.of_job(job, sites), job.round.rounds, job.train.epochs, job.train.batch_size,
        )  # fmt: skip

    @classmethod
    def of_plan(cls, plan: RoundPlan) -> _Asked:
        return cls(
            Terms.of_plan(plan), plan.rounds, plan.train.epochs, plan.train.batch_size,
        )  # fmt: skip


@dataclass(frozen=True)
class SitePolicy:
    """The policy of one site. sites: how many the roster has; tasks: {name: SHA-256} that may run."""

    rules: PolicySection
    sites: int
    tasks: Mapping[str, str]

    def __post_init__(self) -> None:
        """Raise BadInput for a threshold that the roster cannot have."""
        least, half = self.rules.least_threshold, self.sites // 2 + 1
        if least is not None and not half <= least <= self.sites:
            raise BadInput(
                f"site.toml: policy.least_threshold: found {least}, expected {half} to {self.sites}: more "
                f"than half of the {self.sites} sites in roster.toml",
                remedy=f"leave it out for {default_threshold(self.sites)}, or compare roster.toml with "
                "the other sites'",
            )

    @property
    def wider(self) -> list[str]:
        """The keys that allow more than the default does."""
        return [key for key, is_wider in _WIDER.items() if is_wider(self)]

    @property
    def least_threshold(self) -> int:
        """The smallest t of a plan that this site takes part in."""
        return self.rules.least_threshold or default_threshold(self.sites)

    @property
    def guard(self) -> GuardRules:
        """When this site leaves a job whose model gets worse on its own rows (PROTOCOL G)."""
        return GuardRules(self.rules.guard_loss_factor, self.rules.guard_rounds)

    @property
    def asks(self) -> bool:
        """Whether every job waits for `fed-site approve`."""
        return self.rules.jobs == "ask"

    def on_offer(self, offer: JobOffer) -> PolicyRefused | None:
        """Task and terms of a job, before anything is read for it. Raises BadInput."""
        task, digest = offer.task, offer.task_digest
        settings = read_settings(offer.settings)
        try:
            job = build_job(settings)
        except Refused as refused:  # what no site runs, such as public metrics under `encrypted`
            return PolicyRefused(str(refused), word=POLICY, remedy=refused.remedy)
        allowed = self.tasks.get(task)
        if allowed is None:
            listed = ", ".join(self.tasks) or "none"
            return PolicyRefused(
                f"task {task!r}: found no [tasks.{task}] in site.toml, expected one of: {listed}",
                word=NOT_ALLOWED,
                remedy="read the task; `fed-site check` prints what to write if it may run here",
            )
        if allowed != digest:
            return PolicyRefused(
                f"task {task!r}: found hash {digest}, expected tasks.{task}.sha256 = {allowed}",
                word=OTHER_TASK,
                remedy="read the task again: `fed-site check` prints the hash of the one installed here",
            )
        try:
            asked = _Asked.of_job(job, self.sites)
        except Refused as refused:
            return PolicyRefused(str(refused), word=POLICY, remedy=refused.remedy)
        return next(self._refusals(asked), None)

    def on_plan(self, plan: RoundPlan) -> PolicyRefused | None:
        """The same of a plan, whatever the job said."""
        return next(self._refusals(_Asked.of_plan(plan)), None)

    def on_release(self, what: Release) -> PolicyRefused | None:
        """What may leave this site now: the operator may have thought better of it."""
        if isinstance(what, RowsInSum):
            return self._on_rows(what.job, what.before)
        if what == "model" and self.rules.release != "coordinator":
            return _refusal("protect.release", "coordinator", "sites", "release")
        if what == "metrics" and not self.rules.public_metrics:
            return _refusal("track.public_metrics", True, False, "public_metrics")
        return None

    def _on_rows(self, job: str, before: Collection[str]) -> PolicyRefused | None:
        """How many jobs these rows take part in; one that has begun goes on."""
        others, most = set(before) - {job}, self.rules.jobs_per_month
        if self.rules.jobs == "any" or job in before or len(others) < most:
            return None
        return _refusal(
            "job", f"{len(others)} others over the same rows in 30 days",
            f"{most} or fewer, this one included,", "jobs_per_month",
        )  # fmt: skip

    def _refusals(self, asked: _Asked) -> Iterator[PolicyRefused]:
        for rule in _RULES:
            if (found := rule(self, asked)) is not None:
                yield found


def _refusal(setting: str, found: Any, expected: Any, key: str) -> PolicyRefused:
    """One line: the job's setting, what it is, what policy.KEY allows."""
    return PolicyRefused(
        f"{setting}: found {_shown(found)}, expected {_shown(expected)} by policy.{key} of site.toml",
        word=POLICY,
        remedy=f"if this site may take part in such jobs, change `{key}` under [policy] of site.toml and "
        "start fed-site again",
    )


def _shown(value: Any) -> str:
    """A setting as TOML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) and " " not in value else str(value)


Rule = Callable[[SitePolicy, _Asked], PolicyRefused | None]


def _protection(policy: SitePolicy, asked: _Asked) -> PolicyRefused | None:
    found, allowed = asked.terms.protection, policy.rules.protections
    if found in allowed:
        return None
    return _refusal("protect.protection", found, " or ".join(allowed), "protections")


def _cipher(policy: SitePolicy, asked: _Asked) -> PolicyRefused | None:
    found, allowed = asked.terms.cipher, policy.rules.ciphers
    if found in allowed or not asked.terms.layers.encrypts:
        return None
    return _refusal("protect.cipher", found, " or ".join(allowed), "ciphers")


def _threshold(policy: SitePolicy, asked: _Asked) -> PolicyRefused | None:
    found, least = asked.terms.threshold, policy.least_threshold
    if found >= least:
        return None
    expected = f"{least} or more of {policy.sites} sites"
    return _refusal("protect.threshold", found, expected, "least_threshold")


def _sites(policy: SitePolicy, asked: _Asked) -> PolicyRefused | None:
    found, least = asked.terms.count, policy.rules.minimum_sites
    if found >= least:
        return None
    return _refusal("sites", found, f"{least} or more", "minimum_sites")


def _at_most(setting: str, key: str, found: Callable[[_Asked], int]) -> Rule:
    def rule(policy: SitePolicy, asked: _Asked) -> PolicyRefused | None:
        most: int = getattr(policy.rules, key)
        if policy.rules.jobs == "any" or found(asked) <= most:
            return None
        return _refusal(setting, found(asked), f"{most} or fewer", key)

    return rule


def _batch(policy: SitePolicy, asked: _Asked) -> PolicyRefused | None:
    least = policy.rules.least_batch
    if asked.batch >= least:
        return None
    return _refusal("train.batch_size", asked.batch, f"{least} or more", "least_batch")


def _only_if_allowed(setting: str, key: str, found: Callable[[_Asked], Any], wide: Any) -> Rule:
    """`wide` is the value that needs the operator's word."""

    def rule(policy: SitePolicy, asked: _Asked) -> PolicyRefused | None:
        allowed = getattr(policy.rules, key)
        if found(asked) != wide or allowed == wide:
            return None
        return _refusal(setting, wide, allowed, key)

    return rule


_single_site_features = _only_if_allowed(
    "protect.single_site_features", "single_site_features",
    lambda asked: asked.terms.single_site_features, True,
)  # fmt: skip

_RULES: tuple[Rule, ...] = (
    _protection,
    _cipher,
    _threshold,
    _sites,
    _at_most("round.rounds", "most_rounds", lambda asked: asked.rounds),
    _at_most("train.epochs", "most_epochs", lambda asked: asked.epochs),
    _batch,
    _only_if_allowed(
        "track.public_metrics", "public_metrics", lambda asked: asked.terms.public_metrics, True
    ),
    _single_site_features,
    _only_if_allowed("train.standardise", "statistics", lambda asked: asked.terms.statistics, "federated"),
    _only_if_allowed(
        "protect.release", "release", lambda asked: asked.terms.release, "coordinator"
    ),
)  # fmt: skip


def _above(key: str) -> Callable[[SitePolicy], bool]:
    return lambda policy: getattr(policy.rules, key) > _DEFAULT[key]


def _below(key: str) -> Callable[[SitePolicy], bool]:
    return lambda policy: getattr(policy.rules, key) < _DEFAULT[key]


def _other(key: str) -> Callable[[SitePolicy], bool]:
    return lambda policy: getattr(policy.rules, key) != _DEFAULT[key]


_DEFAULT: dict[str, Any] = {key: field.default for key, field in PolicySection.model_fields.items()}
_WIDER: dict[str, Callable[[SitePolicy], bool]] = {
    "protections": lambda policy: bool(
        set(policy.rules.protections) - set(_DEFAULT["protections"])
    ),
    "least_threshold": lambda policy: policy.least_threshold < default_threshold(policy.sites),
    **{key: _above(key) for key in ("most_rounds", "most_epochs", "jobs_per_month")},
    "least_batch": _below("least_batch"),
    **{
        key: _other(key)
        for key in ("public_metrics", "single_site_features", "statistics", "release")
    },
    **{key: _above(key) for key in ("guard_loss_factor", "guard_rounds")},
    "jobs": lambda policy: policy.rules.jobs == "any",
}
"""Of `minimum_sites` and `ciphers` the default is as wide as it can be."""
