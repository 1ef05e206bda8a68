"""The sites at each stage of a round: which it takes messages of, waits for, and sends its own message to."""

from collections import Counter

from fedcore.secagg.protocol import messages
from fedcore.secagg.protocol.messages import survivors_of
from fedcore.secagg.protocol.round.coordinator import stages
from fedcore.types import SiteId


def exposed_sites(stage: stages.InRound) -> tuple[SiteId, ...]:
    """The sites that may have helped to open the sum of this round (PROTOCOL H)."""
    match stage:
        case stages.Unmasking():  # a site that was asked and is connected may have answered
            answered = {answer.site for answer in stage.answers}
            return tuple(
                s for s in survivors_of(stage.submissions) if s in answered or s not in stage.left
            )
        case stages.Summing() if not stage.header.layers.masks:
            return ()  # without masks nothing is asked of a site before the sum is there
        case stages.Summing() | stages.Releasing():
            return survivors_of(stage.submissions)
    return ()


def members_of(stage: stages.CoordinatorStage) -> tuple[SiteId, ...]:
    """The sites whose message a stage takes: the roster, then U1, U2, U3."""
    match stage:
        case stages.Advertising():
            return stage.header.roster
        case stages.Sharing():
            return tuple(keys.site for keys in stage.bundle)
        case stages.Collecting():
            shared = tuple(shares.head.site for shares in stage.shares)
            return shared if stage.header.layers.masks else stage.header.roster
        case stages.Confirming() | stages.Unmasking() | stages.Releasing() | stages.Summing():
            return survivors_of(stage.submissions)
    return ()


def received_in(stage: stages.CoordinatorStage) -> tuple[messages.SiteMessage, ...]:
    """What this stage has received so far."""
    match stage:
        case (
            stages.Advertising(keys=came)
            | stages.Sharing(shares=came)
            | stages.Collecting(submissions=came)
            | stages.Confirming(confirms=came)
            | stages.Unmasking(answers=came)
            | stages.Releasing(statements=came)
        ):
            return came
    return ()


def waiting_for(stage: stages.CoordinatorStage) -> tuple[SiteId, ...]:
    """The sites whose message this stage still waits for.

    A round that has to be released also waits for sites whose connection is lost, as long as too few
    others are connected.
    """
    if not isinstance(stage, stages.Waiting):
        return ()
    came = {message.site for message in received_in(stage)}
    missing = tuple(s for s in members_of(stage) if s not in came and not is_out(stage, s))
    here = tuple(s for s in missing if s not in stage.gone)
    return here if _enough(stage, counted(stage) + len(here)) else missing


def is_out(stage: stages.InRound, site: SiteId) -> bool:
    """Whether nothing more of this site can count at this stage."""
    return site in (stage.left if isinstance(stage, stages.Exposed) else stage.gone)


def sites_left(stage: stages.InRound) -> tuple[SiteId, ...]:
    """The sites that are no longer in this round; before `Collecting` those are all sites that are gone."""
    return stage.gone if isinstance(stage, stages.Advertising | stages.Sharing) else stage.left


def _enough(stage: stages.Waiting, count: int) -> bool:
    return not isinstance(stage, stages.Exposed) or count >= stage.header.threshold


def counted(stage: stages.CoordinatorStage) -> int:
    """How many answers so far count towards t; of the statements only the largest group that agrees."""
    if isinstance(stage, stages.Releasing):
        return max(Counter(map(found_in, stage.statements)).values(), default=0)
    return len(received_in(stage))


def in_sight(stage: stages.CoordinatorStage) -> int:
    """How many answers count so far, plus those that may still come."""
    return counted(stage) + len(waiting_for(stage))


def found_in(statement: messages.Statement) -> tuple[bytes, bytes]:
    """The HMACs of the sum and of the state after it, as one site found them."""
    return statement.sum_mac, statement.state_mac


def is_first(stage: stages.CoordinatorStage) -> bool:
    """Whether a round begins with this stage: the sites it waits for may not have heard of the round."""
    if isinstance(stage, stages.Collecting):
        return not stage.header.layers.masks
    return isinstance(stage, stages.Advertising)


def asked(stage: stages.CoordinatorStage) -> tuple[SiteId, ...]:
    """The sites that get the stage's message: those whose answer can count; at the end the whole roster."""
    if isinstance(stage, stages.Released):  # first the sites that can go on
        return tuple(dict.fromkeys((*stage.certificate.survivors, *stage.header.roster)))
    if isinstance(stage, stages.Failed):
        return stage.header.roster
    return tuple(
        s for s in members_of(stage) if not (isinstance(stage, stages.Exposed) and is_out(stage, s))
    )


def request_for(stage: stages.CoordinatorStage, site: SiteId) -> messages.CoordinatorMessage | None:
    """What a site is sent at this stage, the same when it is sent again. None while the sum is made."""
    match stage:
        case stages.Advertising(header=header):
            return messages.Announce(header)
        case stages.Collecting(header=header) if not header.layers.masks:
            return messages.Announce(header)
        case stages.Sharing(header=header, bundle=bundle):
            return messages.KeyBundle(header.digest, bundle)
        case stages.Collecting(header=header, shares=shares):
            heads = tuple(each.head for each in shares)
            parcels = tuple(p for each in shares for p in each.parcels if p.recipient == site)
            return messages.Delivery(header.digest, heads, parcels)
        case stages.Confirming(header=header, submissions=submissions):
            return messages.SurvivorList(header.digest, submissions)
        case stages.Unmasking(header=header, confirms=confirms):
            return messages.Confirmations(header.digest, confirms)
        case stages.Releasing(aggregate=aggregate):
            return aggregate
        case stages.Released(
            header, certificate
        ):  # a site that is not in the sum leaves the round now
            late = messages.Abandon(header.digest, stages.STAGE_NAMES[stages.Collecting])
            return certificate if site in certificate.survivors else late
        case stages.Failed(header, name):
            return messages.Abandon(header.digest, name)
    return None
