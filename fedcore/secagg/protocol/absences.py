"""Who is missing when: simulated absences, and what a round makes of them by counting alone.

`outcome` is the deliberately simple second version of what the protocol machines do: it only counts who
is left at each stage. `plain` runs by it, and the tests hold the machines against it.

Invariant: a site that leaves before `unmask` sends nothing of that stage or a later one, so the sites
left only become fewer, and the survivors of a sum are those that were still there when vectors were sent.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fedcore.errors import BadInput, RoundAbandoned, UnknownName
from fedcore.types import SiteId

STAGES = ("keys", "shares", "submit", "confirm", "unmask", "release")
"""What a site sends in a round, in order (docs/protocol.md)."""

ABANDONED_AT = ("keys", "shares", "submit", "confirm")
"""Stages at which too few sites end a round. Later ones wait for them: the sum may be known (PROTOCOL H)."""

Absences = Mapping[SiteId, str]
"""{site: the first stage of the round of which it sends nothing}."""


@dataclass(frozen=True)
class Absence:
    """One site leaves one training round before sending its message of `stage`."""

    training_round: int
    stage: str
    site: SiteId


def parse_absence(text: str, sites: Sequence[SiteId], rounds: int) -> Absence:
    """`3:submit:va` to an Absence. Rounds 1 to `rounds`, and `rounds` + 1 for the last, metrics-only one.

    Raises BadInput, or UnknownName with the nearest stage or site.
    """
    number, _, rest = text.strip().partition(":")
    stage, _, site = rest.partition(":")
    if not site or not number.isdecimal():
        raise BadInput(
            f"round.drop: found {text!r}, expected round:stage:site", remedy="--drop 3:submit:va"
        )
    if not 1 <= int(number) <= rounds + 1:
        raise BadInput(
            f"round.drop: found round {number}, expected 1 to {rounds + 1}",
            remedy=f"the job has {rounds} rounds, and {rounds + 1} is the metrics-only one after them",
        )
    if stage not in STAGES:
        raise UnknownName("round.drop: stage", stage, STAGES)
    if site not in sites:
        raise UnknownName("round.drop: site", site, sites)
    return Absence(int(number), stage, SiteId(site))


def earliest(absences: Iterable[Absence], training_round: int) -> dict[SiteId, str]:
    """The absences of one round by site; of several of one site the earliest stage counts."""
    found: dict[SiteId, str] = {}
    for absence in absences:
        if absence.training_round == training_round:
            stages = (absence.stage, found.get(absence.site, STAGES[-1]))
            found[absence.site] = min(stages, key=STAGES.index)
    return found


def outcome(roster: Sequence[SiteId], threshold: int, absences: Absences) -> tuple[SiteId, ...]:
    """The survivors: sites that were still there when vectors were sent, in roster order.

    Raises RoundAbandoned at the first stage with fewer than `threshold` sites. From `unmask` on the round
    waits: who is absent then comes back and answers, and at the release misses it at most.
    """
    survivors: tuple[SiteId, ...] = ()
    for stage in ABANDONED_AT:
        left = [s for s in roster if not gone(absences.get(s), stage)]
        if len(left) < threshold:
            raise RoundAbandoned(stage, len(left), threshold)
        if stage == "submit":
            survivors = tuple(left)
    return survivors


def gone(absent_from: str | None, stage: str) -> bool:
    """Whether a site that is absent from this stage on sends nothing of `stage`."""
    return absent_from is not None and STAGES.index(absent_from) <= STAGES.index(stage)
