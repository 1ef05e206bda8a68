"""From the protected vector to the release: one vector, one survivor list, one answer, one sum (PROTOCOL R)."""

from __future__ import annotations

from collections.abc import Iterable

from fedcore.errors import (
    ListRefused,
    OutOfOrder,
    ReleaseRefused,
    VectorRefused,
)
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol.effects import (
    Apply,
    Erase,
    OpenSum,
    Upload,
)
from fedcore.secagg.protocol.messages import (
    COORDINATOR,
    MASK_ROOT,
    SELF_SEED,
    Aggregate,
    Answer,
    Certificate,
    Confirm,
    Confirmations,
    CoordinatorMessage,
    Statement,
    Submit,
    SurvivorList,
    Unmask,
    sign,
)
from fedcore.secagg.protocol.round.site.events import SiteParams, SumOpened, VectorMade
from fedcore.secagg.protocol.round.site.joining import check_company
from fedcore.secagg.protocol.round.site.journal import (
    Certified,
    ListSigned,
    SiteMove,
    SumAnnounced,
    SumStated,
    UnmaskAnswered,
    VectorSpooled,
)
from fedcore.secagg.protocol.round.site.stages import (
    Answered,
    Confirmed,
    HeldShares,
    Masking,
    Opening,
    Stated,
    Submitted,
)
from fedcore.secagg.protocol.shared import (
    check_certificate,
    check_confirm,
    check_header,
    check_members,
    check_same_state,
    check_submission,
    exchange,
    listed,
    refuse_missing,
    survivors_of,
)
from fedcore.secagg.protocol.wire_form import digest, type_name
from fedcore.types import SiteId


def submit_vector(move: SiteMove, stage: Masking, made: VectorMade) -> None:
    """Sign and send the one vector of this round."""
    member = move.member
    check_company(member, stage.header, stage.header.roster, "cohort")
    submit = sign(
        Submit(
            stage.header.digest, member.id, made.digest, made.size, stage.state_tag,
            stage.standing.key_id, made.salt, b"",
        ),
        member.identity,
    )  # fmt: skip
    move.record(VectorSpooled(submit))
    move.send(submit)
    move.do(Upload(submit))


def _check_list(
    member: SiteParams, stage: Submitted, header: bytes, submissions: tuple[Submit, ...],
    cohort: Iterable[SiteId],
) -> None:  # fmt: skip
    """U3: a subset of U2, at least t, with this site's own submission, each signed by its site."""
    check_header(header, stage.header, COORDINATOR)
    names = survivors_of(submissions)
    check_members(names, list(cohort), stage.header.threshold, "survivor list")
    refuse_missing(member.id, names, "survivor list")
    check_company(member, stage.header, names, "survivor list")
    for submit in submissions:
        check_submission(submit, stage.header, member.pins, member.plan.salt_bytes)
    check_same_state(submissions, stage.state_tag, stage.standing.key_id)


def _check_own_submission(submissions: tuple[Submit, ...], own: Submit) -> None:
    if own not in submissions:
        raise VectorRefused(
            "survivor list", found="another submission of this site", expected="the one it sent",
            fault=COORDINATOR,
        )  # fmt: skip


def confirm_list(move: SiteMove, stage: Submitted, request: SurvivorList) -> None:
    """Sign the one survivor list of this round. Raises ListRefused, VectorRefused or StateDiffers."""
    member = move.member
    _must_mask(stage.header, request)
    _check_list(member, stage, request.header, request.submissions, stage.cohort)
    _check_own_submission(request.submissions, stage.submit)
    confirm = sign(
        Confirm(
            stage.header.digest, member.id, stage.bundle, digest(stage.cohort),
            listed(request.submissions), b"",
        ),
        member.identity,
    )  # fmt: skip
    move.record(ListSigned(request.submissions, confirm, exchange(request, confirm)))
    move.send(confirm)


def _must_mask(header: RoundHeader, request: CoordinatorMessage) -> None:
    if not header.layers.masks:
        raise OutOfOrder(
            "message", found=type_name(type(request)), expected="none under `encrypted`",
            fault=COORDINATOR,
        )  # fmt: skip


def answer_unmask(move: SiteMove, stage: Confirmed, request: Confirmations) -> None:
    """Give one key share of each site of U2, once t survivors signed the same list."""
    member = move.member
    check_header(request.header, stage.header, COORDINATOR)
    survivors = survivors_of(stage.submissions)
    check_company(member, stage.header, survivors, "survivor list")
    signers = [confirm.site for confirm in request.confirms]
    check_members(signers, survivors, stage.header.threshold, "confirmations")
    refuse_missing(member.id, signers, "confirmations")
    for confirm in request.confirms:
        check_confirm(confirm, stage.confirm, member.pins)
    held = {each.of: each for each in stage.held}
    answers = tuple(_one_share(held[of], of in survivors) for of in stage.cohort)
    unmask = Unmask(stage.header.digest, member.id, answers)
    move.record(UnmaskAnswered(exchange(request, unmask)))
    move.send(unmask)


def _one_share(held: HeldShares, survived: bool) -> Answer:
    """Exactly one of the two: both would open the update of a site."""
    if survived:
        return Answer(held.of, SELF_SEED, held.self_share.reveal())
    return Answer(held.of, MASK_ROOT, held.root_share.reveal())


def begin_opening(
    move: SiteMove, stage: Submitted | Confirmed | Answered, request: Aggregate
) -> None:
    """Open the announced sum, of exactly the survivors that this site agreed to."""
    member, header = move.member, stage.header
    if isinstance(stage, Submitted):
        if header.layers.masks:
            raise OutOfOrder(
                "message", found="Aggregate", expected="SurvivorList first", fault=COORDINATOR
            )
        _check_list(member, stage, request.header, request.submissions, stage.cohort)
        _check_own_submission(request.submissions, stage.submit)
    else:
        check_header(request.header, header, COORDINATOR)
        if request.submissions != stage.submissions:
            raise ListRefused(
                "sum", found="another survivor list", expected="the one this site signed",
                fault=COORDINATOR,
            )  # fmt: skip
        if isinstance(stage, Confirmed):  # it has not helped yet, and this would be its help
            check_company(member, header, survivors_of(stage.submissions), "survivor list")
    move.record(SumAnnounced(request, exchange(request)))
    assert isinstance(move.stage, Opening)
    move.do(open_sum(move.stage))


def open_sum(stage: Opening) -> OpenSum:
    """The effect that opens the sum of this stage."""
    names, found = survivors_of(stage.submissions), stage.aggregate
    salts = tuple(submit.salt for submit in stage.submissions)
    return OpenSum(stage.header, names, salts, stage.state_tag, found.digest, found.size)


def state_sum(move: SiteMove, stage: Opening, opened: SumOpened) -> None:
    """Sign what was found in the sum."""
    member = move.member
    survivors = digest(survivors_of(stage.submissions))
    statement = sign(
        Statement(stage.header.digest, member.id, survivors, opened.sum_mac, opened.state_mac, b""),
        member.identity,
    )
    move.record(SumStated(statement))
    move.send(statement)


def release(move: SiteMove, stage: Stated, certificate: Certificate) -> None:
    """Apply the new state, once t survivors certified it. Raises ReleaseRefused."""
    member = move.member
    check_certificate(certificate, stage.header, member.pins)
    own = stage.statement
    if certificate.statement(member.id, own.signature) != own:
        raise ReleaseRefused(
            "certificate", found="another sum, state or survivor list",
            expected="what this site found in the sum", fault=COORDINATOR,
        )  # fmt: skip
    move.record(Certified(certificate))
    move.do(Apply(certificate))
    move.do(Erase(stage.header))
