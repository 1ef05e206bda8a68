"""From the protected vector to the release: one vector, one survivor list, one answer, one sum (PROTOCOL R).

And how a site leaves a round before that, refuses its release, or resends what may be lost (PROTOCOL D).
"""

from dataclasses import replace

from fedcore.errors import (
    EnvelopeRefused,
    ListRefused,
    OutOfOrder,
    ReleaseRefused,
    ShareRefused,
    VectorRefused,
)
from fedcore.secagg.protocol import checks, effects, messages
from fedcore.secagg.protocol.messages import COORDINATOR, listed, sign, survivors_of
from fedcore.secagg.protocol.moves import Restarted
from fedcore.secagg.protocol.round.site import entries, events, stages
from fedcore.secagg.protocol.round.site.between import check_company
from fedcore.secagg.protocol.round.site.entries import SiteMove
from fedcore.secagg.protocol.round.site.following import (
    confirmed_by,
    draw_next,
    send_keys,
    share_ahead,
)
from fedcore.secagg.protocol.round.site.stages import exchange
from fedcore.secagg.protocol.wire_form import digest, type_name


def submit_vector(move: SiteMove, stage: stages.Masking, made: events.VectorMade) -> None:
    """Sign and send the one vector of this round."""
    member, (standing, header, state_tag) = move.member, stage.begun
    check_company(member, header, header.roster, "cohort")
    vector = made.digest, made.size, state_tag, standing.key_id, made.salt
    submit = sign(messages.Submit(header.digest, member.id, *vector, b""), member.identity)
    move.record(entries.VectorSpooled(submit))
    move.send(submit)
    move.do(effects.Upload(submit))


def _check_list(
    member: events.SiteParams,
    stage: stages.Submitted,
    request: messages.SurvivorList | messages.Aggregate,
) -> None:
    """U3: a subset of U2, at least t, with this site's own submission, each signed by its site."""
    checks.of_round(request.header, stage.header, COORDINATOR)
    names = survivors_of(request.submissions)
    checks.members(names, stage.cohort, stage.header.threshold, "survivor list", member.id)
    check_company(member, stage.header, names, "survivor list")
    for submit in request.submissions:
        checks.submission(submit, stage.header, member.pins, member.plan.salt_bytes)
    checks.same_state(request.submissions, stage.state_tag, stage.standing.key_id)
    _check_own_submission(request.submissions, stage.submit)


def _check_own_submission(submissions: tuple[messages.Submit, ...], own: messages.Submit) -> None:
    if own not in submissions:
        raise VectorRefused(
            "survivor list", "another submission of this site", "the one it sent", COORDINATOR
        )


def confirm_list(move: SiteMove, stage: stages.Submitted, request: messages.SurvivorList) -> None:
    """Sign the one survivor list of this round. Raises ListRefused, VectorRefused or StateDiffers."""
    member, h = move.member, stage.header.digest
    if not stage.header.layers.masks:
        raise OutOfOrder("message", "SurvivorList", "none under `encrypted`", COORDINATOR)
    _check_list(member, stage, request)
    lists, drawn = (
        (stage.bundle, digest(stage.cohort), listed(request.submissions)),
        draw_next(member, h),
    )
    keys = b"" if drawn is None else digest(drawn.keys)
    confirm = sign(messages.Confirm(h, member.id, *lists, keys, b""), member.identity)
    move.record(entries.ListSigned(request.submissions, confirm, exchange(request, confirm)))
    move.send(confirm)
    if drawn is not None:
        assert isinstance(move.stage, stages.Confirmed)
        move.stage = replace(move.stage, drawn=drawn)
        move.send(drawn.keys)


def answer_unmask(move: SiteMove, stage: stages.Confirmed, request: messages.Confirmations) -> None:
    """Give one key share of each site of U2, once t survivors signed the same list."""
    member = move.member
    checks.of_round(request.header, stage.header, COORDINATOR)
    survivors = survivors_of(stage.submissions)
    check_company(member, stage.header, survivors, "survivor list")
    signers = [confirm.site for confirm in request.confirms]
    checks.members(signers, survivors, stage.header.threshold, "confirmations", member.id)
    for confirm in request.confirms:
        checks.confirm(confirm, stage.confirm, member.pins)
    held = {each.of: each for each in stage.held}
    answers = tuple(_one_share(held[of], of in survivors) for of in stage.cohort)
    unmask = messages.Unmask(stage.header.digest, member.id, answers)
    move.record(entries.UnmaskAnswered(exchange(request, unmask)))
    assert isinstance(move.stage, stages.Answered)
    move.stage = replace(move.stage, drawn=confirmed_by(stage.drawn, request.confirms))
    move.send(unmask)


def _one_share(held: stages.HeldShares, survived: bool) -> messages.Answer:
    """Exactly one of the two: both would open the update of a site."""
    if survived:
        return messages.Answer(held.of, messages.SELF_SEED, held.self_share.reveal())
    return messages.Answer(held.of, messages.MASK_ROOT, held.root_share.reveal())


def begin_opening(
    move: SiteMove,
    stage: stages.Submitted | stages.Confirmed | stages.Answered,
    request: messages.Aggregate,
) -> None:
    """Open the announced sum, of exactly the survivors that this site agreed to."""
    member, header = move.member, stage.header
    if isinstance(stage, stages.Submitted):
        if header.layers.masks:
            raise OutOfOrder("message", "Aggregate", "SurvivorList first", COORDINATOR)
        _check_list(member, stage, request)
    else:
        checks.of_round(request.header, header, COORDINATOR)
        if request.submissions != stage.submissions:
            raise ListRefused(
                "sum", "another survivor list", "the one this site signed", COORDINATOR
            )
        if isinstance(stage, stages.Confirmed):  # opening the sum is its first help
            check_company(member, header, survivors_of(stage.submissions), "survivor list")
    move.record(entries.SumAnnounced(request, exchange(request)))
    assert isinstance(move.stage, stages.Opening)
    if isinstance(stage, stages.Answered):
        move.stage = replace(move.stage, drawn=stage.drawn)
    move.do(open_sum(move.stage))


def open_sum(stage: stages.Opening) -> effects.OpenSum:
    """The effect that opens the sum of this stage."""
    names, found = survivors_of(stage.submissions), stage.aggregate
    salts = tuple(submit.salt for submit in stage.submissions)
    return effects.OpenSum(stage.header, names, salts, stage.state_tag, found.digest, found.size)


def state_sum(move: SiteMove, stage: stages.Opening, opened: events.SumOpened) -> None:
    """Sign what was found in the sum; before it go keys for the next round, since the statement may end this one, and
    after it shares for that round."""
    member, h = move.member, stage.header.digest
    found = digest(survivors_of(stage.submissions)), opened.sum_mac, opened.state_mac
    statement = sign(messages.Statement(h, member.id, *found, b""), member.identity)
    move.record(entries.SumStated(statement))
    if opened.following is not None:
        assert isinstance(move.stage, stages.Stated)
        move.stage = replace(move.stage, drawn=stage.drawn)
        send_keys(move, opened.following)
    move.send(statement)
    if opened.following is not None:
        assert isinstance(move.stage, stages.Stated)
        share_ahead(move, move.stage)


def release(move: SiteMove, stage: stages.Stated, certificate: messages.Certificate) -> None:
    """Apply the new state, once t survivors certified it. Raises ReleaseRefused."""
    member = move.member
    checks.certificate(certificate, stage.header, member.pins)
    own = stage.statement
    if certificate.statement(member.id, own.signature) != own:
        raise ReleaseRefused(
            "certificate", "another sum, state or survivor list", "what this site found in the sum",
            COORDINATOR,
        )  # fmt: skip
    move.record(entries.Certified(certificate))
    move.stage = stages.Idle(move.stage.standing, ahead=stage.ahead)
    move.do(effects.Apply(certificate), effects.Erase(stage.header))


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
        text = (
            f"round {stage.header.round} was left after this site had helped to open its sum, and without "
            "a release: that sum may be known. This site joins no other round of the job before it has "
            "the state of a later release."
        )
        move.do(effects.Warn(text))
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
        if isinstance(stage, stages.Stated) and stage.ahead is not None:
            move.send(stage.ahead.keys)
        move.answer_again(stage.history[-1])
        if isinstance(stage, stages.Stated) and stage.ahead is not None and stage.ahead.sealed:
            move.send(stage.ahead.sealed.shares)


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
