"""A site leaves a round, refuses it, or sends again what may be lost (PROTOCOL D, R)."""

from __future__ import annotations

from fedcore.errors import (
    EnvelopeRefused,
    ShareRefused,
)
from fedcore.secagg.protocol.effects import (
    Erase,
    ShowNotice,
    Upload,
    Warn,
)
from fedcore.secagg.protocol.messages import (
    COORDINATOR,
    LEFT,
    MATERIAL,
    RELEASE_REFUSED,
    Abandon,
    Leave,
    Notice,
    Unmask,
)
from fedcore.secagg.protocol.moves import Restarted
from fedcore.secagg.protocol.round.site.events import (
    CheckFailed,
    SessionRestored,
    SiteParams,
    Superseded,
)
from fedcore.secagg.protocol.round.site.journal import Departed, ReleaseRefusedHere, SiteMove
from fedcore.secagg.protocol.round.site.releasing import open_sum
from fedcore.secagg.protocol.round.site.stages import (
    EXPOSED,
    Advertised,
    Answered,
    Confirmed,
    InRound,
    Masking,
    Opening,
    Shared,
    Stated,
    Submitted,
)
from fedcore.secagg.protocol.shared import (
    check_header,
)
from fedcore.secagg.protocol.wire_form import decode, type_name


def abandon(move: SiteMove, stage: InRound, request: Abandon) -> None:
    """The coordinator gave the round up."""
    check_header(request.header, stage.header, COORDINATOR)
    _depart(move, stage)


def show_notice(move: SiteMove, stage: InRound, notice: Notice) -> None:
    """Another site's sealed reason, for the log of this one."""
    check_header(notice.header, stage.header, COORDINATOR)
    move.do(ShowNotice(notice))


def supersede(move: SiteMove, stage: InRound, _: Superseded) -> None:
    """Leave a round whose end was lost."""
    _depart(move, stage)


def _depart(move: SiteMove, stage: InRound) -> None:
    """Leave the round: nothing is applied, and what was secret is erased."""
    if isinstance(stage, EXPOSED):
        move.do(
            Warn(
                f"round {stage.header.round} was left after this site had helped to open its sum, and "
                "without a release: that sum may be known. This site joins no other round of the job "
                "before it has the state of a later release."
            )
        )
    move.record(Departed(type_name(type(stage))))
    move.do(Erase(stage.header))


def refuse(move: SiteMove, stage: InRound, event: CheckFailed) -> None:
    """One uniform refusal in the release, a plain departure before it (PROTOCOL R)."""
    if isinstance(stage, Opening | Stated):
        move.record(ReleaseRefusedHere(type_name(type(stage))))
        move.send(Leave(stage.header.digest, move.member.id, RELEASE_REFUSED, event.sealed))
        move.do(Erase(stage.header))
        return
    _depart(move, stage)
    anothers = event.sealed and _is_anothers_material(move.member, stage, event.error)
    code = MATERIAL if anothers else LEFT
    # While a vector is made every cause comes with a notice, so that none can be told from another.
    told = anothers or isinstance(stage, Masking)
    move.send(Leave(stage.header.digest, move.member.id, code, event.sealed if told else b""))


def _is_anothers_material(member: SiteParams, stage: InRound, error: Exception) -> bool:
    """Whether a parcel failed whose digest another site signed: the coordinator cannot have changed it.

    The other sites hear it, sealed; they take this site's word for it, so nothing but a line in their logs
    follows: a lying site can accuse an honest one. Proving it to all would show this site's channel key,
    and with it every key share sealed for it.
    """
    fault = getattr(error, "fault", COORDINATOR)
    blamed = fault in member.pins and fault != member.id
    return (
        blamed and isinstance(stage, Shared) and isinstance(error, EnvelopeRefused | ShareRefused)
    )


def resend(move: SiteMove, stage: InRound, _: SessionRestored | Restarted) -> None:
    """What was sent last, byte for byte as the journal has it."""
    match stage:
        case Advertised(keys=keys):
            move.send(keys)
        case Shared(shares=shares):
            move.send(shares)
        case Submitted(submit=submit):
            move.send(submit)
            move.do(Upload(submit))
        case Confirmed(confirm=confirm):
            move.send(confirm)
        case Answered(history=history):
            move.send(decode(history[-1].answer, Unmask))
        case Stated(statement=statement):
            move.send(statement)


def restart(move: SiteMove, stage: InRound, event: Restarted) -> None:
    """Go on from the journal, or leave the round (PROTOCOL V, D).

    The folder may have been put back to an earlier time, which a new process cannot see. Under masks it
    signs and answers nothing from there; what it answered already it may say again, byte for byte. A
    half-made vector is never made a second time.
    """
    masked = stage.header.layers.masks and not isinstance(stage, EXPOSED)
    if masked or isinstance(stage, Masking):
        _depart(move, stage)
        move.send(Leave(stage.header.digest, move.member.id, LEFT))
    elif isinstance(stage, Opening):
        move.do(open_sum(stage))
    else:
        resend(move, stage, event)
