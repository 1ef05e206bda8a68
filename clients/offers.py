"""What a site makes of an offer: its job, its plan, the lines that an operator reads, and the operator's approval.

Where `jobs = "ask"`, `fed-site approve` writes one small file for each approved job and the running process polls
for it, so neither waits for the other. Invariant: a file approves one offer, by its SHA-256, and no other offer under
the same id. Files are written atomically, for this user only.
"""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from fedcore.config import Job, build_job, plan_of, read_settings
from fedcore.errors import FedcoreError
from fedcore.files import read_json, write_json
from fedcore.files.disk import close_to_others, make_folder, sync_folder
from fedcore.learning.state import JobState
from fedcore.secagg.label import Terms, label_of, leaving_of
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protocol.job.site.events import Surveyed
from fedcore.secagg.protocol.job_messages import JobOffer
from fedcore.secagg.protocol.wire_form import encode
from fedcore.secagg.scheme import Scheme
from fedcore.types import SiteId

APPROVALS = "approvals"
"""The folder of approvals in a site's folder."""


def job_of(offer: JobOffer) -> Job:
    """The job of an offer. Raises BadInput and Refused."""
    return build_job(read_settings(offer.settings))


@dataclass(frozen=True)
class PlanMaker:
    """Makes plans for the sites of a roster."""

    sites: tuple[SiteId, ...]

    def plan(self, offer: JobOffer, survey: Surveyed) -> RoundPlan:
        """The plan of an offer, from what this site surveyed itself."""
        asked = job_of(offer)
        cap = asked.protect.max_examples
        assert cap is not None
        return plan_of(asked, survey.shape, self.sites, cap)

    def first_state(self, plan: RoundPlan, survey: Surveyed) -> JobState:
        """The state before the first round."""
        return JobState.initial(plan, survey.initial)

    def scheme(self, plan: RoundPlan) -> Scheme:
        """What the plan's protection needs in its key epochs."""
        return Scheme.of(plan)


@dataclass(frozen=True)
class About:
    """What an operator should know of a job before a row is read for it; empty where no plan follows."""

    protection: str = ""
    label: Sequence[str] = ()
    leaves: Sequence[str] = ()

    @property
    def lines(self) -> list[str]:
        """For the log."""
        return [f"label: {line}" for line in self.label] + [f"leaves: {x}" for x in self.leaves]

    @classmethod
    def of(cls, offer: JobOffer, sites: Sequence[SiteId]) -> Self:
        """Label and list of what leaves, from settings and roster only."""
        try:
            asked = job_of(offer)
            terms = Terms.of_job(asked, tuple(sites))
        except FedcoreError:  # it is refused, with the reason
            return cls()
        return cls(terms.protection, label_of(terms).splitlines(), leaving_of(asked, terms))


def offer_digest(offer: JobOffer) -> str:
    """SHA-256 over an offer: id, task, the task's hash, settings."""
    return hashlib.sha256(encode(offer)).hexdigest()


def _path(folder: Path, job: str) -> Path:
    return folder / APPROVALS / f"{job}.json"


def is_approved(folder: Path, offer: JobOffer) -> bool:
    """Whether exactly this offer was approved. Raises BadInput for a file that cannot be read."""
    path = _path(folder, offer.job)
    return path.is_file() and read_json(path).get("offer") == offer_digest(offer)


def approve_offer(folder: Path, job: str, digest: str) -> None:
    """Approve the offer of this id and digest; durable on return. Raises StoreProblem."""
    path = _path(folder, job)
    make_folder(path.parent)
    close_to_others(folder, (APPROVALS,))
    write_json(path, {"job": job, "offer": digest, "approved": time.time()})
    sync_folder(path.parent)
