"""The round after this one: its keys go with the confirmation, and its shares with the statement.

A site draws the secrets of the following round when it confirms the survivor list. Its confirmation signs the digest of
their public keys, so every survivor can check the keys of all others before the sum is opened, and seal its shares for
them once it knows what the sum leads to. Shares are bound to the whole header of that round, as after an announcement.
Invariant: in memory only, and used for one header; a new process, another cohort or a missing site lead to fresh keys.
"""

from dataclasses import replace

from fedcore.errors import KeyRefused, ProtocolRefused
from fedcore.secagg.protocol import checks, effects, messages
from fedcore.secagg.protocol.messages import COORDINATOR, survivors_of
from fedcore.secagg.protocol.round.site import entries, events, stages
from fedcore.secagg.protocol.round.site.between import draw_keys, draw_secrets, keys_of
from fedcore.secagg.protocol.round.site.entries import SiteMove
from fedcore.secagg.protocol.round.site.sharing import make_shares
from fedcore.secagg.protocol.wire_form import digest


def draw_next(member: events.SiteParams, header: bytes) -> stages.DrawnNext | None:
    """Secrets for the round after the one of this header; None where nothing is sent ahead."""
    if not member.ahead:
        return None
    secrets = draw_secrets(member)
    return stages.DrawnNext(secrets, messages.NextKeys(header, member.id, *secrets.public))


def confirmed_by(
    drawn: stages.DrawnNext | None, confirms: tuple[messages.Confirm, ...]
) -> stages.DrawnNext | None:
    """The same with what the confirmations sign of the others' keys."""
    if drawn is None:
        return None
    return replace(drawn, digests=tuple((confirm.site, confirm.next) for confirm in confirms))


def take_bundle(
    move: SiteMove,
    stage: stages.Exposed,
    bundle: messages.NextBundle,
) -> None:
    """Keep the keys of all survivors, and share with them at once where this site has stated its sum.

    A bundle that fails a check is dropped with a warning: nothing is sealed for it, and the round after this one
    begins with shares that are asked for.
    """
    drawn = stage.drawn
    if drawn is None or drawn.bundle:  # a new process has none
        return
    try:
        _check(stage, drawn, bundle)
    except ProtocolRefused as error:
        move.do(effects.Warn(f"{error}; the next round begins without it"))
        move.stage = replace(stage, drawn=None)
        return
    move.stage = replace(stage, drawn=replace(drawn, bundle=bundle.keys))
    if isinstance(move.stage, stages.Stated):
        share_ahead(move, move.stage)


def _check(
    stage: stages.Exposed,
    drawn: stages.DrawnNext,
    bundle: messages.NextBundle,
) -> None:
    checks.of_round(bundle.header, stage.header, COORDINATOR)
    survivors = survivors_of(stage.submissions)
    names = [keys.site for keys in bundle.keys]
    checks.members(names, survivors, len(survivors), "keys of the next round")
    signed = dict(drawn.digests)
    for keys in bundle.keys:
        if keys.header != stage.header.digest or digest(keys) != signed.get(keys.site):
            raise KeyRefused(
                "keys of the next round", f"others of {keys.site!r} than it confirmed", "those it confirmed",
                COORDINATOR,
            )  # fmt: skip
        checks.well_formed(keys)
    public = [(keys.site, each) for keys in bundle.keys for each in keys.public]
    checks.distinct(public, "keys of the next round")


def send_keys(move: SiteMove, opened: events.Following) -> None:
    """Send the keys of the round that follows: those drawn with the confirmation, else fresh ones."""
    stage = move.stage
    assert isinstance(stage, stages.Stated)
    key_id, found = stage.standing.key_id, (opened.header, opened.state_tag)
    if stage.drawn is None:
        ahead = draw_keys(move.member, *found, key_id)
    else:
        ahead = keys_of(move.member, *found, key_id, stage.drawn.secrets)
    move.record(entries.KeysSentAhead(opened.header.round))
    assert isinstance(move.stage, stages.Stated)
    move.stage = replace(move.stage, ahead=ahead)
    move.send(ahead.keys)


def share_ahead(move: SiteMove, stage: stages.Stated) -> None:
    """Seal the shares of the round that follows for its sites, where this site has the keys of all of them."""
    ahead, drawn = stage.ahead, stage.drawn
    if ahead is None or ahead.sealed is not None or drawn is None or not drawn.bundle:
        return
    own, shares = make_shares(move.member, ahead.header, ahead.secrets, drawn.bundle)
    sealed = stages.SealedAhead(drawn.bundle, own, shares)
    move.stage = replace(stage, ahead=replace(ahead, sealed=sealed), drawn=None)
    move.send(shares)
