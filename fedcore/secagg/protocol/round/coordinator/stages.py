"""The stages of a round at the coordinator, each with only what is true in it, and the sites at each: which it takes
messages of, waits for, and sends its own message to."""

from collections import Counter
from collections.abc import Mapping
from typing import get_args

from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol import messages
from fedcore.secagg.protocol.messages import survivors_of
from fedcore.secagg.protocol.moves import Timed
from fedcore.secagg.protocol.wire_form import record
from fedcore.types import SiteId


@record("Ready")
class Ready:
    """Between rounds. round: the last number used."""

    round: int = 0


@record("Advertising")
class Advertising(Timed):
    """Waiting for keys."""

    header: RoundHeader
    size: int
    salt: int
    keys: tuple[messages.Keys, ...] = ()
    gone: tuple[SiteId, ...] = ()


@record("Sharing")
class Sharing(Timed):
    """Waiting for shares of the sites in the bundle (U1)."""

    header: RoundHeader
    size: int
    salt: int
    bundle: tuple[messages.Keys, ...]
    shares: tuple[messages.Shares, ...] = ()
    gone: tuple[SiteId, ...] = ()
    ahead: int = 0
    """1 where the round began with keys that were sent ahead: the bundle is part of its announcement."""


@record("Collecting")
class Collecting(Timed):
    """Waiting for vectors of the sites that shared (U2; under `encrypted` of the whole roster).

    left: of those gone, the sites that sent `Leave`: from here on they cannot help to open the sum.
    """

    header: RoundHeader
    size: int
    salt: int
    bundle: tuple[messages.Keys, ...]
    shares: tuple[messages.Shares, ...]
    submissions: tuple[messages.Submit, ...] = ()
    gone: tuple[SiteId, ...] = ()
    left: tuple[SiteId, ...] = ()
    ahead: int = 0
    """As of `Sharing`: a site that sent its shares ahead, too, may not have heard of the round."""


@record("Confirming")
class Confirming(Timed):
    """Waiting for signatures under the one survivor list (U3)."""

    header: RoundHeader
    bundle: tuple[messages.Keys, ...]
    shares: tuple[messages.Shares, ...]
    submissions: tuple[messages.Submit, ...]
    confirms: tuple[messages.Confirm, ...] = ()
    gone: tuple[SiteId, ...] = ()
    left: tuple[SiteId, ...] = ()


@record("Unmasking")
class Unmasking(Timed):
    """Waiting for the key shares of the survivors that confirmed; the others count as `left`."""

    header: RoundHeader
    bundle: tuple[messages.Keys, ...]
    shares: tuple[messages.Shares, ...]
    submissions: tuple[messages.Submit, ...]
    confirms: tuple[messages.Confirm, ...]
    answers: tuple[messages.Unmask, ...] = ()
    gone: tuple[SiteId, ...] = ()
    left: tuple[SiteId, ...] = ()


@record("Summing")
class Summing(Timed):
    """The masks are being taken off the sum. masks: of every survivor, and left by every dropout."""

    header: RoundHeader
    submissions: tuple[messages.Submit, ...]
    masks: tuple[tuple[SecretBytes, int], ...]
    gone: tuple[SiteId, ...] = ()
    left: tuple[SiteId, ...] = ()


@record("Releasing")
class Releasing(Timed):
    """Waiting for the survivors' statements about the sum."""

    header: RoundHeader
    submissions: tuple[messages.Submit, ...]
    aggregate: messages.Aggregate
    statements: tuple[messages.Statement, ...] = ()
    gone: tuple[SiteId, ...] = ()
    left: tuple[SiteId, ...] = ()
    refused: tuple[SiteId, ...] = ()


@record("Released")
class Released:
    """The round ended with a certificate."""

    header: RoundHeader
    certificate: messages.Certificate
    refused: tuple[SiteId, ...] = ()

    @property
    def round(self) -> int:
        return self.header.round


@record("Abandoned")
class Failed:
    """The round ended without one. exposed: sites that may have helped to open its sum; if there are any,
    no other round follows from the same state (PROTOCOL H).

    refused: sites that refused the release; they take part in no further round of this key epoch.
    """

    header: RoundHeader
    stage: str
    left: int
    exposed: tuple[SiteId, ...]
    refused: tuple[SiteId, ...] = ()

    @property
    def round(self) -> int:
        return self.header.round


Exposed = Unmasking | Releasing
"""Stages that end with enough answers, or when too few can still come; never by a deadline alone."""

Waiting = Advertising | Sharing | Collecting | Confirming | Exposed

InRound = Waiting | Summing

Ended = Released | Failed

Between = Ready | Ended

CoordinatorStage = Between | InRound

BETWEEN: tuple[type[Between], ...] = get_args(Between)

ENDED: tuple[type[Ended], ...] = get_args(Ended)

IN_ROUND: tuple[type[InRound], ...] = get_args(InRound)

EXPOSED: tuple[type[Exposed], ...] = get_args(Exposed)

ALL: tuple[type[CoordinatorStage], ...] = get_args(CoordinatorStage)

STAGE_NAMES: Mapping[type[CoordinatorStage], str] = {
    Advertising: "keys",
    Sharing: "shares",
    Collecting: "submit",
    Confirming: "confirm",
    Unmasking: "unmask",
    Summing: "unmask",
    Releasing: "release",
}
"""What the coordinator waits for at each stage, in the words of `absences.STAGES`."""


def exposed_sites(stage: InRound) -> tuple[SiteId, ...]:
    """The sites that may have helped to open the sum of this round (PROTOCOL H)."""
    match stage:
        case Unmasking():  # a site that was asked and is connected may have answered
            answered = {answer.site for answer in stage.answers}
            return tuple(
                s for s in survivors_of(stage.submissions) if s in answered or s not in stage.left
            )
        case Summing() if not stage.header.layers.masks:
            return ()  # without masks nothing is asked of a site before the sum is there
        case Summing() | Releasing():
            return survivors_of(stage.submissions)
    return ()


def members_of(stage: CoordinatorStage) -> tuple[SiteId, ...]:
    """The sites whose message a stage takes: the roster, then U1, U2, U3."""
    match stage:
        case Advertising():
            return stage.header.roster
        case Sharing():
            return tuple(keys.site for keys in stage.bundle)
        case Collecting():
            shared = tuple(shares.head.site for shares in stage.shares)
            return shared if stage.header.layers.masks else stage.header.roster
        case Confirming() | Unmasking() | Releasing() | Summing():
            return survivors_of(stage.submissions)
    return ()


def received_in(stage: CoordinatorStage) -> tuple[messages.SiteMessage, ...]:
    """What this stage has received so far."""
    match stage:
        case (
            Advertising(keys=came)
            | Sharing(shares=came)
            | Collecting(submissions=came)
            | Confirming(confirms=came)
            | Unmasking(answers=came)
            | Releasing(statements=came)
        ):
            return came
    return ()


def waiting_for(stage: CoordinatorStage) -> tuple[SiteId, ...]:
    """The sites whose message this stage still waits for.

    A round that has to be released also waits for sites whose connection is lost, as long as too few
    others are connected.
    """
    if not isinstance(stage, Waiting):
        return ()
    came = {message.site for message in received_in(stage)}
    missing = tuple(s for s in members_of(stage) if s not in came and not is_out(stage, s))
    here = tuple(s for s in missing if s not in stage.gone)
    return here if _enough(stage, counted(stage) + len(here)) else missing


def is_out(stage: InRound, site: SiteId) -> bool:
    """Whether nothing more of this site can count at this stage."""
    return site in (stage.left if isinstance(stage, Exposed) else stage.gone)


def sites_left(stage: InRound) -> tuple[SiteId, ...]:
    """The sites that are no longer in this round; before `Collecting` those are all sites that are gone."""
    return stage.gone if isinstance(stage, Advertising | Sharing) else stage.left


def _enough(stage: Waiting, count: int) -> bool:
    return not isinstance(stage, Exposed) or count >= stage.header.threshold


def counted(stage: CoordinatorStage) -> int:
    """How many answers so far count towards t; of the statements only the largest group that agrees."""
    if isinstance(stage, Releasing):
        return max(Counter(map(found_in, stage.statements)).values(), default=0)
    return len(received_in(stage))


def in_sight(stage: CoordinatorStage) -> int:
    """How many answers count so far, plus those that may still come."""
    return counted(stage) + len(waiting_for(stage))


def found_in(statement: messages.Statement) -> tuple[bytes, bytes]:
    """The HMACs of the sum and of the state after it, as one site found them."""
    return statement.sum_mac, statement.state_mac


def is_first(stage: CoordinatorStage) -> bool:
    """Whether a round begins with this stage: the sites it waits for may not have heard of the round."""
    if isinstance(stage, Collecting) and not stage.header.layers.masks:
        return True
    return isinstance(stage, Advertising) or (
        isinstance(stage, Sharing | Collecting) and bool(stage.ahead)
    )


def asked(stage: CoordinatorStage) -> tuple[SiteId, ...]:
    """The sites that get the stage's message: those whose answer can count; at the end the whole roster."""
    if isinstance(stage, Released):  # first the sites that can go on
        return tuple(dict.fromkeys((*stage.certificate.survivors, *stage.header.roster)))
    if isinstance(stage, Failed):
        return stage.header.roster
    return tuple(
        s for s in members_of(stage) if not (isinstance(stage, Exposed) and is_out(stage, s))
    )


def announced_again(stage: CoordinatorStage) -> messages.Announce | None:
    """What a site is sent before the message of this stage when it is sent again: where its keys and shares were sent
    ahead, it may not have heard that the round began."""
    if isinstance(stage, Collecting) and stage.ahead:
        return messages.Announce(stage.header, stage.bundle)
    return None


def request_for(stage: CoordinatorStage, site: SiteId) -> messages.CoordinatorMessage | None:
    """What a site is sent at this stage, the same when it is sent again. None while the sum is made."""
    match stage:
        case Advertising(header=header):
            return messages.Announce(header)
        case Collecting(header=header) if not header.layers.masks:
            return messages.Announce(header)
        case Sharing(header=header, bundle=bundle, ahead=1):
            return messages.Announce(header, bundle)
        case Sharing(header=header, bundle=bundle):
            return messages.KeyBundle(header.digest, bundle)
        case Collecting(header=header, shares=shares):
            heads = tuple(each.head for each in shares)
            parcels = tuple(p for each in shares for p in each.parcels if p.recipient == site)
            return messages.Delivery(header.digest, heads, parcels)
        case Confirming(header=header, submissions=submissions):
            return messages.SurvivorList(header.digest, submissions)
        case Unmasking(header=header, confirms=confirms):
            return messages.Confirmations(header.digest, confirms)
        case Releasing(aggregate=aggregate):
            return aggregate
        case Released(header, certificate):  # a site that is not in the sum leaves the round now
            late = messages.Abandon(header.digest, STAGE_NAMES[Collecting])
            return certificate if site in certificate.survivors else late
        case Failed(header, name):
            return messages.Abandon(header.digest, name)
    return None
