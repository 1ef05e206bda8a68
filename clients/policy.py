"""What a site's operator allows: policy.toml, or `[policy]` of site.toml, and the only checks that refuse a job by it.

Invariant: a job that asks for more than this table allows is refused before a row is read (`jobs_per_month`,
which counts by the rows, after that) and before anything leaves. The coordinator is told one word of a fixed list;
the key, what was found and what was expected are in the site's own log. The rules may be replaced while the process
runs (`policy_file.py`): each check is by those in force now.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import product
from operator import gt, lt, ne
from typing import Annotated, Any, Literal

from fedcore_clients.hours import Hours
from fedcore_clients.privacy_limits import PrivacyLimits, Spend, total_epsilon
from pydantic import Field, StrictBool, field_validator

from fedcore.config import TrainSection, build_job, read_settings
from fedcore.errors import BadInput, PolicyRefused, Refused
from fedcore.secagg.label import Terms
from fedcore.secagg.plan import RoundPlan, TrainPlan, default_threshold
from fedcore.secagg.privacy.privacy_plan import PrivacyPlan
from fedcore.secagg.protections import MAX_MASKED_SITES, Protection
from fedcore.secagg.protocol.job.site.participation import Release, RowsInSum
from fedcore.secagg.protocol.job_messages import JobOffer
from fedcore.secagg.purposes import PURPOSES

SITE_FILE = "site.toml"
POLICY, NOT_ALLOWED, OTHER_TASK = "policy", "task not allowed", "task differs"
VETOED = "vetoed"
"""What the coordinator is told, of REASONS in protocol/job_messages.py."""

Protections = Literal["encrypted", "masked", "layered"]
Ciphers = Literal["bfv", "keystream"]
Bound = Literal["one of", "at least", "at most", "wider"]


class PolicySection(PrivacyLimits):
    """policy.toml, or [policy]: what jobs may ask of this site. The defaults of its keys are the narrow side.

    least_threshold: t, in sites; None is the default for the roster, floor(2n/3) + 1. minimum_sites: of
    the roster and of every round's cohort. most_epochs: in one round. jobs_per_month: over the same rows,
    in any 30 days. least_batch: rows of a training step. statistics: whether tables may be scaled by sums
    over all sites. release: who may get the last model. task_settings: whether a job may set what a task
    declares as its settings; else these have the defaults that are in its hashed code. guard_*: when this
    site leaves a job whose model gets worse on its own rows (PROTOCOL G).
    fields: the vectors that may leave, by purpose; None: all that a job's plan has (`fed-site explain`).
    jobs: "ask" waits for `fed-site approve`; "listed" runs the tasks of [tasks.NAME] within the limits;
    "any" runs these tasks without most_rounds, most_epochs and jobs_per_month. No task runs unlisted.
    least_roster_change: a job over the same rows as one of the last 30 days has the same sites, or differs by so many.
    roster: "ask" takes jobs of a changed roster after `fed-site roster approve` only, "any" of every signed one.
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
    task_settings: StrictBool = False
    guard_loss_factor: float = Field(default=1.5, gt=1)
    guard_rounds: int = Field(default=2, ge=1)
    jobs: Literal["ask", "listed", "any"] = "listed"
    roster: Literal["ask", "any"] = "ask"
    least_roster_change: int = Field(default=1, ge=1)
    fields: tuple[str, ...] | None = None

    @field_validator("fields")
    @classmethod
    def _are_purposes(cls, found: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if found is not None and not set(found) <= PURPOSES.keys():
            raise ValueError(f"vectors of {', '.join(PURPOSES)}")
        return found


@dataclass(frozen=True)
class _Asked:
    """What a job, or its plan, asks of a site. train: its epochs in a round, and rows of a training step.
    task_settings: whether it sets any of the task's own settings; the plan has them in its digest only."""

    terms: Terms
    rounds: int
    train: TrainSection | TrainPlan
    task_settings: bool = False


@dataclass
class SitePolicy:
    """The policy of one site. rules: those in force; sites: how many the roster has; tasks: {name: SHA-256} that may
    run; file: the name of the file that has the rules, site.toml or one of their own."""

    rules: PolicySection
    sites: int
    tasks: Mapping[str, str]
    file: str = SITE_FILE
    vetoed: Collection[str] = ()
    """Jobs that the operator said no to."""

    def __post_init__(self) -> None:
        """Raise BadInput for a threshold that the roster cannot have."""
        least, half = self.rules.least_threshold, self.sites // 2 + 1
        if least is not None and not half <= least <= self.sites:
            raise BadInput(
                f"{self.file}: {self._key('least_threshold')}: found {least}, expected {half} to {self.sites}: more "
                f"than half of the {self.sites} sites in roster.toml",
                remedy=f"leave it out for {default_threshold(self.sites)}, or compare roster.toml with "
                "the other sites'",
            )

    @property
    def wider(self) -> list[str]:
        """The keys that allow more than the default does."""
        least = ["least_threshold"] if self.least_threshold < default_threshold(self.sites) else []
        rules = self.rules
        return least + [k for k, wider in _WIDER.items() if wider(getattr(rules, k), _DEFAULT[k])]

    @property
    def least_threshold(self) -> int:
        """The smallest t of a plan that this site takes part in."""
        return self.rules.least_threshold or default_threshold(self.sites)

    def on_offer(self, offer: JobOffer) -> PolicyRefused | None:
        """Why task or terms of a job are refused, before anything is read for it. Raises BadInput."""
        task, digest = offer.task, offer.task_digest
        if offer.job in self.vetoed:
            return PolicyRefused(
                f"job {offer.job}: found it vetoed by this site's operator",
                word=VETOED, remedy="`fed-site veto` is for good: the job may be submitted again",
            )  # fmt: skip
        settings = read_settings(offer.settings)
        try:
            job = build_job(settings)
        except Refused as refused:  # refused by every site, as public metrics under `encrypted`
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
            terms, own = Terms.of_job(job, self.sites, calibrated=False), bool(job.task_settings)
            asked = _Asked(terms, job.round.rounds, job.train, own)
        except Refused as refused:
            return PolicyRefused(str(refused), word=POLICY, remedy=refused.remedy)
        needed = [name for name, each in PURPOSES.items() if each.leaving(job, terms)]
        return self._refused(asked) or self._on_privacy(terms) or self._on_fields(needed)

    def on_plan(self, plan: RoundPlan) -> PolicyRefused | None:
        """Why a plan is refused, whatever the job's settings were."""
        terms = Terms.of_plan(plan)
        return self._refused(_Asked(terms, plan.rounds, plan.train)) or self._on_privacy(terms)

    def on_spend(
        self, privacy: PrivacyPlan, rounds: int, before: Sequence[Spend], measured: int = 0
    ) -> PolicyRefused | None:
        """Why so many rounds, and releases of metrics, may not be added to what was spent of the same rows. before:
        these spends."""
        most, delta = self.rules.lifetime_epsilon, self.rules.lifetime_delta
        if most is None:
            return None
        units = {each.unit for each in before} - {privacy.unit}
        if units:
            return self._refusal(
                "privacy.unit", privacy.unit, f"{units.pop()} as in earlier jobs over the same rows", "lifetime_epsilon"
            )  # fmt: skip
        total = total_epsilon(before, delta, privacy.rounds(rounds, measured))
        if total <= most:
            return None
        spent = total_epsilon(before, delta)
        return self._refusal(
            "privacy.epsilon",
            f"{total:.4g} for the same rows, {spent:.4g} of it spent, at delta {delta:g}",
            f"{most:g} or less", "lifetime_epsilon",
        )  # fmt: skip

    def _on_privacy(self, terms: Terms) -> PolicyRefused | None:
        """Refuse a job without privacy where the policy limits it, and one that asks for more than it allows."""
        rules, privacy = self.rules, terms.privacy
        for key in ("most_epsilon", "lifetime_epsilon"):
            most = getattr(rules, key)
            if most is not None and (privacy is None or privacy.epsilon > most):
                found = "none" if privacy is None else privacy.epsilon
                return self._refusal("privacy.epsilon", found, f"{most:g} or less", key)
        return None

    def on_release(self, what: Release) -> PolicyRefused | None:
        """Why something may not leave this site now: the policy may have changed since the job began."""
        if isinstance(what, RowsInSum):
            return self._on_rows(what.job, what.before)
        if what == "model" and self.rules.release != "coordinator":
            return self._refusal("protect.release", "coordinator", "sites", "release")
        if what == "metrics" and not self.rules.public_metrics:
            return self._refusal("track.public_metrics", True, False, "public_metrics")
        return None

    def on_roster(self, apart: int) -> PolicyRefused | None:
        """Why a job is refused whose sites differ by so few from those of an earlier job over the same rows: the two
        models differ by about what these few gave. apart: sites, 0 for the same ones."""
        least = self.rules.least_roster_change
        if apart == 0 or apart >= least:
            return None
        return self._refusal(
            "roster", f"{apart} other than in an earlier job over the same rows", f"none or {least}",
            "least_roster_change",
        )  # fmt: skip

    def _on_fields(self, needed: Sequence[str]) -> PolicyRefused | None:
        """Refuse a job with a vector that may not leave. needed: purposes of its vectors."""
        may = self.rules.fields
        missing = [name for name in needed if may is not None and name not in may]
        if not missing or may is None:
            return None
        return self._refusal(
            "vectors", " and ".join(missing), f"{' or '.join(may) or 'none'} only", "fields"
        )

    def closed_until(self, now: datetime) -> datetime | None:
        """When the site takes part in rounds again; None within its hours."""
        return Hours.of(self.rules.hours, self.rules.time_zone).closed_until(now)

    def _on_rows(self, job: str, before: Collection[str]) -> PolicyRefused | None:
        """Refuse a job beyond `jobs_per_month` over the same rows; a job that has begun continues."""
        others, most = set(before) - {job}, self.rules.jobs_per_month
        if self.rules.jobs == "any" or job in before or len(others) < most:
            return None
        return self._refusal(
            "job", f"{len(others)} others over the same rows in 30 days",
            f"{most} or fewer, this one included,", "jobs_per_month",
        )  # fmt: skip

    def _refused(self, asked: _Asked) -> PolicyRefused | None:
        return next(filter(None, (self._refused_by(key, asked) for key in _RULES)), None)

    def _refused_by(self, key: str, asked: _Asked) -> PolicyRefused | None:
        """Why policy.KEY does not take what is asked, if it does not."""
        setting, limit, value = _RULES[key]
        found, here = value(asked), getattr(self.rules, key)
        match limit:
            case "one of":
                allowed, expected = found is None or found in here, " or ".join(here)
            case "at least":
                of = ""
                if key == "least_threshold":
                    here, of = self.least_threshold, f" of {self.sites} sites"
                allowed, expected = found >= here, f"{here} or more{of}"
            case "at most":
                allowed = self.rules.jobs == "any" or found <= here
                expected = f"{here} or fewer"
            case "wider":
                allowed, expected = found in {_DEFAULT[key], here}, here
        return None if allowed else self._refusal(setting, found, expected, key)

    def _refusal(self, setting: str, found: Any, expected: Any, key: str) -> PolicyRefused:
        """One line: the job's setting, what it is, what the key allows."""
        where, then = f"under [policy] of {SITE_FILE}", " and start fed-site again"
        if self.file != SITE_FILE:
            where, then = f"in {self.file}", ": a running fed-site reads it again"
        return PolicyRefused(
            f"{setting}: found {_shown(found)}, expected {_shown(expected)} by {self._key(key)} of {self.file}",
            word=POLICY,
            remedy=f"if this site may take part in such jobs, change `{key}` {where}{then}",
        )

    def _key(self, key: str) -> str:
        """The path of a key in its file."""
        return f"policy.{key}" if self.file == SITE_FILE else key

    @property
    def forbids_all(self) -> str:
        """The key because of which no job at all can satisfy this policy; "" where one can.

        Tried with each protection and cipher that it allows, and otherwise with the least that a job can ask."""
        blocking = ""
        if self._on_fields(
            [each.name for each in PURPOSES.values() if each.measures]
        ):  # every job has these
            return "fields"
        for protection, cipher in product(self.rules.protections, self.rules.ciphers):
            if self.sites > MAX_MASKED_SITES and Protection.of(protection).masks:
                blocking = blocking or "protections"
                continue
            try:
                terms = Terms(protection, self.sites, self.least_threshold, cipher)
            except Refused:  # too few sites for any protection
                blocking = "minimum_sites"
                continue
            train = TrainSection(epochs=1, batch_size=max(self.rules.least_batch, 1))
            asked = _Asked(terms, 1, train)
            key = next((key for key in _RULES if self._refused_by(key, asked)), "")
            if not key:
                return ""
            blocking = key
        return blocking


def _shown(value: Any) -> str:
    """A setting as TOML has it."""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value) if isinstance(value, str) and " " not in value else str(value)


_RULES: Mapping[str, tuple[str, Bound, Callable[[_Asked], Any]]] = {
    "protections": ("protect.protection", "one of", lambda asked: asked.terms.protection),
    "ciphers": (
        "protect.cipher", "one of",
        lambda asked: asked.terms.cipher if asked.terms.layers.encrypts else None,
    ),
    "least_threshold": ("protect.threshold", "at least", lambda asked: asked.terms.threshold),
    "minimum_sites": ("sites", "at least", lambda asked: asked.terms.count),
    "most_rounds": ("round.rounds", "at most", lambda asked: asked.rounds),
    "most_epochs": ("train.epochs", "at most", lambda asked: asked.train.epochs),
    "least_batch": ("train.batch_size", "at least", lambda asked: asked.train.batch_size),
    "public_metrics": ("track.public_metrics", "wider", lambda asked: asked.terms.public_metrics),
    "single_site_features": (
        "protect.single_site_features", "wider", lambda asked: asked.terms.single_site_features,
    ),
    "statistics": ("train.standardise", "wider", lambda asked: asked.terms.statistics),
    "release": ("protect.release", "wider", lambda asked: asked.terms.release),
    "task_settings": ("task_settings", "wider", lambda asked: asked.task_settings),
}  # fmt: skip
"""{key of [policy]: the setting of a job that it limits, how, and its value (None: the job does not have it)}, in the
order in which they are checked. "wider": a value other than the default must be the policy's."""

_DEFAULT: dict[str, Any] = {key: field.default for key, field in PolicySection.model_fields.items()}
_WIDER: dict[str, Callable[[Any, Any], Any]] = {
    "protections": lambda here, default: set(here) - set(default),
    "most_rounds": gt, "most_epochs": gt, "jobs_per_month": gt, "least_batch": lt,
    "public_metrics": ne, "single_site_features": ne, "statistics": ne, "release": ne,
    "task_settings": ne,
    "guard_loss_factor": gt, "guard_rounds": gt, "jobs": lambda here, _: here == "any",
    "roster": ne,
}  # fmt: skip
"""{key: whether a value allows more than the default}. Of `minimum_sites` and `ciphers` the default is as wide as
it can be; `least_threshold` is compared with the default for the roster."""
