"""Whether a site takes part in a job: its operator's policy, what it told the coordinator, and why it left."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from fedcore.errors import OtherSites, PolicyRefused
from fedcore.learning.state import JobState
from fedcore.secagg.crypto.entropy import Entropy
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol import job_messages as job
from fedcore.secagg.protocol.job import effects
from fedcore.secagg.protocol.job.effects import SiteEffects
from fedcore.secagg.protocol.job.site import events
from fedcore.secagg.protocol.messages import COORDINATOR
from fedcore.types import SiteId

if TYPE_CHECKING:
    from fedcore.secagg.scheme import EpochSecrets, Scheme


@dataclass(frozen=True)
class RowsInSum:
    """A job's rows were loaded, or are about to leave in a sum. before: the jobs that had a sum over the same rows
    in the last 30 days. rows: what the ledger calls them."""

    job: str
    before: Collection[str]
    rows: str = ""


Release = Literal["model", "metrics"] | RowsInSum
"""What is about to leave a site: the model or the metrics of a release, or its rows in a sum."""


class Policy(Protocol):
    """The only checks of what a site's operator allows. Each method returns the refusal, or None."""

    def on_offer(self, offer: job.JobOffer) -> PolicyRefused | None:
        """A job is offered; nothing was read for it. Raises BadInput for settings in another form."""
        ...

    def on_plan(self, plan: RoundPlan) -> PolicyRefused | None:
        """The plan this site made of a job, after its rows were loaded or in a new process."""
        ...

    def on_release(self, what: Release) -> PolicyRefused | None: ...


class Exposures(Protocol):
    """The sums over this site's rows that the ledger has."""

    def has(self, header: str) -> bool: ...
    def rows_key(self, digest: str) -> str: ...
    def jobs_over(self, rows: str) -> Collection[str]: ...
    def statistics_only_with(
        self, rows: str, columns: Collection[str], besides: str = ""
    ) -> tuple[SiteId, ...] | None: ...


class Planner(Protocol):
    """Makes the plan and the first state that follow from an offer and this site's survey."""

    def plan(self, offer: job.JobOffer, survey: events.Surveyed) -> RoundPlan: ...
    def first_state(self, plan: RoundPlan, survey: events.Surveyed) -> JobState: ...
    def scheme(self, plan: RoundPlan) -> Scheme: ...


@dataclass(frozen=True)
class JobParams:
    """This site's identity, and what it requires of every job.

    minimum: of a cohort, in sites. timeout: seconds it waits at a stage of a round. keep_keys: seconds for
    which the secrets of a job's key epochs outlive the job.
    """

    federation: str
    id: SiteId
    identity: IdentityKey
    pins: Mapping[SiteId, bytes]
    policy: Policy
    ledger: Exposures
    planner: Planner
    entropy: Entropy
    minimum: int
    timeout: float
    keep_keys: float


def problem_of(error: Exception) -> str:
    """An error with its notes, in one line."""
    return "; ".join([str(error), *getattr(error, "__notes__", ())])


def require(refusal: PolicyRefused | None) -> None:
    """Raise a refusal of the policy, if there is one."""
    if refusal is not None:
        raise refusal


class Participation:
    """Whether this site takes part in one job."""

    def __init__(
        self, me: JobParams, name: str, *, asks: bool, about: Callable[[], Sequence[str]] = tuple
    ) -> None:
        self.me, self.job = me, name
        self.about = about
        """Lines about the job, for the log before its rows are read; they are made once the policy took the offer."""
        self.approval: Literal["not needed", "waiting", "approved"] = (
            "waiting" if asks else "not needed"
        )
        """Whether its operator must approve the job, and has."""
        self.refused: PolicyRefused | None = None
        """The policy's refusal of the job, if there is one."""
        self.barred = False
        """The policy in force refuses the job or its plan as such: the site is in no further round."""
        self.ending = False
        """The job is over, and this site fetches its last release: that gives nothing away."""
        self.left = ""
        """Why this site left the job permanently, if it did: its guard tripped."""
        self.survey: events.Surveyed | None = None
        self.rows = ""
        """What the ledger calls this site's rows; empty before they were loaded."""
        self.last_error = ""

    @property
    def out(self) -> bool:
        """Whether this site takes no part in the job now."""
        return bool(self.left) or (self.barred and not self.ending)

    def note(self, error: Exception) -> SiteEffects:
        """Show an error in log and status; what policy or ledger forbids ends the job here."""
        if isinstance(error, OtherSites):
            error = PolicyRefused(str(error), word="policy", remedy=error.remedy)
        if isinstance(error, PolicyRefused):
            yield from self.refuse(error)
        else:
            yield from self.show(problem_of(error), str(error))

    def show(self, problem: str, status: str = "") -> SiteEffects:
        """Show a problem in the log and, or else `status`, in the status."""
        self.last_error = status or problem
        yield effects.Warn(problem)

    def refuse(self, refused: PolicyRefused) -> SiteEffects:
        """Log the refusal once, and send its word to the coordinator, also at every new session."""
        if self.refused is None or str(self.refused) != str(refused):
            yield effects.Warn(f"job {self.job}: refused: {refused}; hint: {refused.remedy}")
        self.refused = refused
        yield from self.unable(refused.word)
        self.last_error = str(refused)
        yield effects.Report("idle")

    def unable(self, reason: str) -> SiteEffects:
        """Tell the coordinator that this site cannot take part. reason: one of REASONS."""
        self.last_error = self.left or job.REASONS[reason]
        yield effects.Send(COORDINATOR, job.SiteUnavailable(self.job, self.me.id, reason))

    def take_rows(self, found: events.Surveyed) -> None:
        """Keep what was loaded. Raises PolicyRefused where these rows are in enough jobs already."""
        self.rows = self.me.ledger.rows_key(found.rows)
        self.check_rows()
        self.survey = found

    def check_rows(self) -> None:
        """Raise PolicyRefused where this site's rows are in enough jobs already."""
        before = self.me.ledger.jobs_over(self.rows)
        require(self.me.policy.on_release(RowsInSum(self.job, before, self.rows)))

    def send_survey(self) -> SiteEffects:
        assert self.survey is not None
        yield effects.Send(COORDINATOR, job.SiteSurvey(self.job, self.me.id, self.survey.shape))


@dataclass
class HeldKeys:
    """The secrets of the key epoch installed here. payload: what they are made of."""

    scheme: Scheme
    secrets: EpochSecrets | None = None

    def use(self, payload: SecretBytes, maker: SiteId) -> EpochSecrets:
        """Open a payload and hold its secrets. Raises EnvelopeRefused, the maker's fault."""
        self.secrets = self.scheme.open_payload(payload.reveal(), maker)
        return self.secrets


@dataclass(frozen=True)
class Agreed:
    """The plan that this site made of the offer, with the names of the columns it standardises."""

    plan: RoundPlan
    features: int
    columns: tuple[tuple[str, float, float], ...]

    @property
    def names(self) -> list[str]:
        return [name for name, _, _ in self.columns]
