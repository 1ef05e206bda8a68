"""Every error Fedcore raises, split by whose fault it is, each with the exit code of the command line.

    FedcoreError
    |-- TaskFailed            1  the user's own task raised, or produced NaN
    |-- BadInput              2  a key, a path, a file or rows that cannot be used
    |   |-- UnknownName       2  a task, protection or key nobody knows; carries the nearest one
    |   `-- AlreadyExists     2  a directory that would be overwritten
    |-- Refused               3  understood, but a plan or policy says no
    |   |-- PlanRefused       3  no packing proves headroom; carries the largest value that fits
    |   |-- PolicyRefused     3  this site's [policy] does not allow it; carries the coordinator's word
    |   |-- Unavailable       3  a protection whose library is missing or broken here
    |   |-- LeaseLost         3  another process took over this one's journal: it writes nothing more
    |   |-- GuardTripped      3  a site leaves a job whose released model it does not trust; carries why
    |   `-- PeerRefused       3  bytes from the other side break a rule of the round
    |       |-- ChunkRefused       3  truncated, oversized, foreign or malformed ciphertext chunk
    |       |-- TagRefused         3  the sum is not of exactly the listed survivors, this round, each once
    |       |-- CertificateRefused 3  a certificate fails a check of TLS or of ours; carries which
    |       `-- ProtocolRefused    3  a message breaks the protocol, each rule a class below it
    |-- StoreProblem          2  a journal or spool that cannot be used here; nothing in it is lost
    |   `-- StoreFull         2  no room for more: the disk, or the spool's quota
    |-- RankLost              2  another process of a run under torchrun has ended; its whole rounds are kept
    |-- DataLost              2  a stored file is gone and cannot be made again: what needs it fails
    `-- Abandoned             4  a round or run ended without a result
        `-- RoundAbandoned    4  fewer sites than the threshold; carries stage and left

Invariant: a message says what, found and expected, and never contains a key, a share or an update's
value. `remedy` is the sentence the command line prints behind `hint:`.
"""

import difflib
import importlib.util
from collections.abc import Iterable, Sequence

EXIT_DONE = 0
EXIT_TASK_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_REFUSED = 3
EXIT_ABANDONED = 4
EXIT_INTERRUPTED = 130


class FedcoreError(Exception):
    """Base of the tree: `str(error)` is one line; `remedy` is the next step, or empty."""

    exit_code = EXIT_BAD_INPUT

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy
        if remedy:
            self.add_note(f"hint: {remedy}")  # for notebooks; the command line prints it itself

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the message and the fields: the classes below take other arguments than a message."""
        return _unpickled, (type(self), self.args, self.__dict__)


def with_hint(error: Exception) -> str:
    """The error in one line, with its next step in brackets."""
    remedy = error.remedy if isinstance(error, FedcoreError) else ""
    return f"{error} (hint: {remedy})" if remedy else str(error)


def _unpickled(
    kind: type[FedcoreError], arguments: tuple[object, ...], fields: dict[str, object]
) -> FedcoreError:
    found = kind.__new__(kind, *arguments)
    found.args = arguments
    found.__dict__.update(fields)
    return found


class TaskFailed(FedcoreError):
    """The user's task raised; `user_traceback` starts at the user's own frame."""

    exit_code = EXIT_TASK_FAILED

    def __init__(self, message: str, *, user_traceback: str = "", remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.user_traceback = user_traceback


class BadInput(FedcoreError):
    """Something the caller gave cannot be used."""


def require_extra(what: str, extra: str, *modules: str) -> None:
    """Raise BadInput, in one line and before anything has begun, unless these modules of an extra can be found."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    if absent:
        raise BadInput(
            f"{what}: found no {', '.join(absent)} in this environment, expected the extra `{extra}`",
            remedy=f"pip install 'fedcore-fl[{extra}]'",
        )


class UnknownName(BadInput):
    """A name outside a closed list; the hint offers `remedy`, or the nearest known one, or the whole list."""

    def __init__(self, what: str, found: str, known: Iterable[str], *, remedy: str = "") -> None:
        names = sorted(known)
        near = difflib.get_close_matches(found, names, n=1, cutoff=0.5)
        nearest = f"did you mean {near[0]!r}?" if near else f"one of: {', '.join(names)}"
        remedy = remedy or nearest
        super().__init__(f"{what}: found {found!r}, which is not known", remedy=remedy)


class AlreadyExists(BadInput):
    """A directory that holds something already."""


class Refused(FedcoreError):
    """The request is understood and a rule says no."""

    exit_code = EXIT_REFUSED


class PlanRefused(Refused):
    """The plan cannot be proved safe, or breaks a rule of its protection."""


class PolicyRefused(Refused):
    """The operator of this site does not allow it. word: all that the coordinator is told, one of
    `job_messages.REASONS`; the message and the remedy stay in this site's log and status."""

    def __init__(self, message: str, *, word: str, remedy: str) -> None:
        super().__init__(message, remedy=remedy)
        self.word = word


class Unavailable(Refused):
    """A protection that this machine cannot run; the others still can."""


class LeaseLost(Refused):
    """Another process holds the lease of this journal now, or may: no retry helps."""


class GuardTripped(Refused):
    """Sites leave a job: the released model is not one that honest training leads to (PROTOCOL G).

    sites: which; round: of training, whose release led to it. cause: for other sites, without a number.
    found: the numbers, for this site's own log. calmer: what to change where training diverges.
    """

    def __init__(
        self,
        sites: Sequence[str],
        round_: int,
        cause: str,
        *,
        found: str = "",
        calmer: str = "lower train.lr or round.server_lr",
    ) -> None:
        some = len(sites) > 1
        super().__init__(
            f"guard: {'sites' if some else 'site'} {', '.join(sites)} {'leave' if some else 'leaves'} "
            f"the job after round {round_}: {cause}" + (f" ({found})" if found else ""),
            remedy=f"a site may lie, or the training diverges: compare the sites' records, {calmer}",
        )
        self.sites, self.round, self.cause, self.found = tuple(sites), round_, cause, found
        self.calmer = calmer


class PeerRefused(Refused):
    """Material from the other side of a round breaks one of its rules."""


class ChunkRefused(PeerRefused):
    """A chunk of a protected vector is truncated, oversized, foreign or malformed."""


class TagRefused(PeerRefused):
    """PROTOCOL T: the opened sum is not the sum of the listed survivors of this round, each once."""


class CertificateRefused(PeerRefused):
    """A certificate, of either side, does not prove what it should.

    check: "readable", "issuer", "begins", "expired", "usage", "federation", "role", "host", "roster",
    "revoked", "version" (of TLS), "tls" (none spoken) or "accepted" (closed without a reason).
    """

    def __init__(self, message: str, *, check: str, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.check = check


class ProtocolRefused(PeerRefused):
    """A message breaks the protocol. found, expected: as in the message's text; fault: the party that made it.

    fault: a site id, "coordinator", or "this site". None of the three ever holds a secret.
    """

    def __init__(
        self, what: str, found: object, expected: object, fault: str, *, remedy: str = ""
    ) -> None:
        super().__init__(
            f"{what}: found {found}, expected {expected} (fault: {fault})", remedy=remedy
        )
        self.found, self.expected, self.fault = found, expected, fault


class MalformedMessage(ProtocolRefused):
    """Bytes that are no message of the protocol, have a tail, or are of another type."""


class VersionRefused(MalformedMessage):
    """The other side speaks another wire version, so nothing else it says is read."""


class OutOfOrder(ProtocolRefused):
    """This stage does not take this message."""


class RosterRefused(ProtocolRefused):
    """The cohort is too small, names an unpinned or unknown site, or one twice; or a signed roster is of another
    federation, or older than one seen."""


class ThresholdRefused(ProtocolRefused):
    """The threshold lies outside (n/2, n], or fewer answers came than it asks for."""


class HeaderRefused(ProtocolRefused):
    """The announced round is not one this site may take part in."""


class OtherSites(ProtocolRefused):
    """A sum of this kind over these rows was given with another set of sites, in this job or an earlier
    one: the difference of the two sums would show the sites that only one of them has (PROTOCOL H)."""


class StaleEpoch(HeaderRefused):
    """The key epoch is not the one held here."""


class SignatureRefused(ProtocolRefused):
    """A signature does not verify under the pinned key, or is missing."""


class KeyRefused(ProtocolRefused):
    """A public key is a duplicate, malformed or of low order."""


class StateDiffers(ProtocolRefused):
    """A site starts from another state than this one (PROTOCOL S)."""


class EnvelopeRefused(ProtocolRefused):
    """A sealed message does not open under the keys and context it is meant for."""


class ShareRefused(ProtocolRefused):
    """A key share is not what its sender signed, or the shares rebuild something else."""


class ListRefused(ProtocolRefused):
    """A list of sites overlaps, repeats, or is no subset of the one before it."""


class VectorRefused(ProtocolRefused):
    """A protected vector has the wrong size or digest."""


class OffsetRefused(VectorRefused):
    """A part of a vector that does not go on where the last one ended; `expected` is where that is."""


class Conflicting(ProtocolRefused):
    """A second request for what was already given, and a different one (PROTOCOL D)."""


class SecondSum(HeaderRefused):
    """A round that would add to another sum of a state of which one may be known (PROTOCOL H)."""


class OldFolder(HeaderRefused):
    """A signature of this site proves that it did more than its folder knows of (PROTOCOL V)."""


class ReleaseRefused(ProtocolRefused):
    """The release is not proved; no further round runs under this key epoch (PROTOCOL R)."""


class ImpossibleSum(ReleaseRefused):
    """PROTOCOL U: no vectors of honest sites have this sum; which site lied, the sum does not show."""


class StoreProblem(FedcoreError):
    """A journal or spool that cannot be opened, read or written; what was on disk before still is."""


class StoreFull(StoreProblem):
    """No room for more, on the disk or within the quota; nothing of this step was kept."""


class RankLost(FedcoreError):
    """Another process of a run of several, under torchrun, has ended: the run goes on from its last whole round when
    all of them are started again."""


class DataLost(FedcoreError):
    """Something that was stored is gone, and no retry can bring it back."""


class Abandoned(FedcoreError):
    """The run ended without a result, and nothing was opened."""

    exit_code = EXIT_ABANDONED


class RoundAbandoned(Abandoned):
    """A round ended below its threshold; the next one starts with fresh randomness.

    stage: where, always before `unmask`; left: how many sites were still there.
    """

    def __init__(self, stage: str, left: int, threshold: int) -> None:
        super().__init__(
            f"round abandoned at {stage}: found {left} sites, expected at least {threshold}"
        )
        self.stage, self.left, self.threshold = stage, left, threshold


def printable(text: str, most: int = 400) -> str:
    """One line of printable characters, without control sequences, of at most so many: for text of any origin."""
    line = "".join(each if each.isprintable() else " " for each in text)
    return line if len(line) <= most else f"{line[: most - 3]}..."
