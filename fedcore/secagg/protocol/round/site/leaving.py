"""A site leaves a round, refuses it, or sends again what may be lost (PROTOCOL D, R)."""

from fedcore.errors import EnvelopeRefused, ShareRefused
from fedcore.secagg.protocol import checks, effects, messages
from fedcore.secagg.protocol.messages import COORDINATOR
from fedcore.secagg.protocol.moves import Restarted
from fedcore.secagg.protocol.round.site import entries, events, stages
from fedcore.secagg.protocol.round.site.entries import SiteMove
from fedcore.secagg.protocol.round.site.releasing import open_sum
from fedcore.secagg.protocol.wire_form import type_name


def abandon(move: SiteMove, stage: stages.InRound, request: messages.Abandon) -> None:
    """The coordinator gave the round up."""
    checks.of_round(request.header, stage.header, COORDINATOR)
    depart(move, stage)


def show_notice(move: SiteMove, stage: stages.InRound, notice: messages.Notice) -> None:
    """Another site's sealed reason, for the log of this one."""
    checks.of_round(notice.header, stage.header, COORDINATOR)
    move.do(effects.ShowNotice(notice))


def depart(move: SiteMove, stage: stages.InRound, _: object = None) -> None:
    """Leave the round: nothing is applied, and what was secret is erased."""
    if isinstance(stage, stages.EXPOSED):
        move.do(
            effects.Warn(
                f"round {stage.header.round} was left after this site had helped to open its sum, and "
                "without a release: that sum may be known. This site joins no other round of the job "
                "before it has the state of a later release."
            )
        )
    move.record(entries.Departed(type_name(type(stage))))
    move.do(effects.Erase(stage.header))


def refuse(move: SiteMove, stage: stages.InRound, event: events.CheckFailed) -> None:
    """One uniform refusal in the release, a plain departure before it (PROTOCOL R)."""
    if isinstance(stage, stages.Opening | stages.Stated):
        move.record(entries.ReleaseRefusedHere(type_name(type(stage))))
        move.leave(stage.header, messages.RELEASE_REFUSED, event.sealed)
        move.do(effects.Erase(stage.header))
        return
    depart(move, stage)
    anothers = event.sealed and _is_anothers_material(move.member, stage, event.error)
    code = messages.MATERIAL if anothers else messages.LEFT
    # While a vector is made, every cause has a notice, so that the causes look alike from outside.
    told = anothers or isinstance(stage, stages.Masking)
    move.leave(stage.header, code, event.sealed if told else b"")


def _is_anothers_material(
    member: events.SiteParams, stage: stages.InRound, error: Exception
) -> bool:
    """Whether a parcel failed whose digest another site signed: the coordinator cannot have changed it.

    The other sites receive the cause, sealed, and write it to their logs; nothing more follows, because
    a dishonest site could accuse an honest one. A proof would need this site's channel key, and with it
    every key share sealed for it.
    """
    fault = getattr(error, "fault", COORDINATOR)
    blamed = fault in member.pins and fault != member.id
    of_parcel = isinstance(error, EnvelopeRefused | ShareRefused)
    return blamed and of_parcel and isinstance(stage, stages.Shared)


def resend(move: SiteMove, stage: stages.InRound, _: events.SessionRestored | Restarted) -> None:
    """Send the last message again, byte for byte as the journal has it."""
    if isinstance(stage, stages.Submitted):
        move.send(stage.submit)
        move.do(effects.Upload(stage.submit))
    else:
        move.answer_again(stage.history[-1])


def restart(move: SiteMove, stage: stages.InRound, event: Restarted) -> None:
    """Go on from the journal, or leave the round (PROTOCOL V, D).

    The folder may be a restored old copy, which a new process cannot detect. Under masks the site signs
    and answers nothing new from it, and only resends stored answers. A vector is never made twice.
    """
    masked = stage.header.layers.masks and not isinstance(stage, stages.EXPOSED)
    if masked or isinstance(stage, stages.Masking):
        depart(move, stage)
        move.leave(stage.header)
    elif isinstance(stage, stages.Opening):
        move.do(open_sum(stage))
    else:
        resend(move, stage, event)
