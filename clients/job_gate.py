"""The check that each record and each upload of a site's session passes: by the list of its job (`leaving.py`)."""

from collections.abc import Mapping

from fedcore_clients.job_runner import JobRunner
from fedcore_clients.leaving import CHECKPOINT, MODEL, OutgoingList

from fedcore.errors import PolicyRefused
from fedcore.secagg.protocol.job.site.rounds import header_of
from fedcore.secagg.protocol.job_messages import model_upload
from fedcore.secagg.protocol.wire_form import type_name


class JobGate:
    """By the list of each job of this site."""

    def __init__(self, jobs: Mapping[str, JobRunner]) -> None:
        self._jobs = jobs

    def record(self, job: str, message: object, size: int) -> None:
        """See `Gate`."""
        self._of(job).check(type_name(type(message)), "record", size)

    def upload(self, job: str, header: bytes, size: int) -> bool:
        """See `Gate`. A vector goes under the header of the round under way, everything else under a release."""
        if job not in self._jobs:
            return False
        leaving, found = self._of(job), self._jobs[job].job
        under_way, certificate = header_of(found.stage), found.states.certificate
        if under_way is not None and under_way.digest == header:
            leaving.check(under_way.purpose, "vector", size)
        elif header == model_upload(found.stage.standing.certificate):
            leaving.check(MODEL, "file", size)
        elif certificate is not None and certificate.header.digest == header:
            leaving.check(CHECKPOINT, "file", size)
        else:
            return False
        return True

    def stopped(self, job: str, message: object, refused: PolicyRefused) -> None:
        """See `Gate`."""
        if job in self._jobs:
            self._jobs[job].kept_here(message, refused)

    def _of(self, job: str) -> OutgoingList:
        return self._jobs[job].leaving if job in self._jobs else OutgoingList(None, 0, 0)
