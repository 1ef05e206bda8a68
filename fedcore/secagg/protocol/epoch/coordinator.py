"""The coordinator in a key epoch: it carries keys and sealed grants between the sites."""

from dataclasses import dataclass, replace

from fedcore.errors import Conflicting, KeyRefused, OutOfOrder, StaleEpoch, ThresholdRefused
from fedcore.secagg.protocol import checks
from fedcore.secagg.protocol.effects import Persist, Send
from fedcore.secagg.protocol.epoch import messages
from fedcore.secagg.protocol.epoch.messages import check_epoch, check_epoch_key, check_signed
from fedcore.secagg.protocol.messages import COORDINATOR, check_signature, in_order
from fedcore.secagg.protocol.moves import Tick, Timed
from fedcore.secagg.protocol.round.coordinator import CoordinatorParams, SiteReconnected
from fedcore.secagg.protocol.wire_form import digest, record, type_name
from fedcore.types import SiteId


@record("NoEpoch")
class NoEpoch:
    """No epoch yet. epoch: the last number used."""

    epoch: int = 0


@record("Calling")
class Calling(messages.InEpoch, Timed):
    """Waiting for epoch keys of the sites `awaited`; those of other sites are taken too."""

    keys: tuple[messages.EpochKey, ...] = ()
    awaited: tuple[SiteId, ...] = ()


@record("Granting")
class Granting(messages.InEpoch, Timed):
    """Waiting for the maker's grants."""

    keys: tuple[messages.EpochKey, ...]


@record("Spreading")
class Spreading(messages.InEpoch):
    """The payload is with its maker and on its way; complete when every key holder signed its id."""

    keys: tuple[messages.EpochKey, ...]
    grants: tuple[messages.Grant, ...]
    held: tuple[messages.KeyHeld, ...] = ()

    @property
    def holders(self) -> tuple[SiteId, ...]:
        """Sites that can take part in rounds."""
        return tuple(each.site for each in self.held)


CoordinatorEpochStage = NoEpoch | Calling | Granting | Spreading


@dataclass(frozen=True)
class StartEpoch:
    """Begin a new key epoch; its header names the maker.

    present: the sites whose keys are waited for, all of the roster if none is named; others join late.
    """

    header: messages.EpochHeader
    present: tuple[SiteId, ...] = ()


@dataclass(frozen=True)
class FromSite:
    """A message of an authenticated site."""

    sender: SiteId
    message: messages.SiteEpochMessage


CoordinatorEpochEvent = StartEpoch | FromSite | Tick | SiteReconnected

CoordinatorEpochEffect = Persist[CoordinatorEpochStage] | Send[messages.CoordinatorEpochMessage]

CoordinatorEpochStep = tuple[CoordinatorEpochStage, tuple[CoordinatorEpochEffect, ...]]


def awaited_in(stage: CoordinatorEpochStage) -> tuple[SiteId, ...]:
    """The sites whose message this stage waits for."""
    match stage:
        case Calling(keys=keys, awaited=awaited):
            came = {key.site for key in keys}
            return tuple(site for site in awaited if site not in came)
        case Granting(header=header):
            return (header.maker,)
    return ()


def first_maker(roster: tuple[SiteId, ...], present: tuple[SiteId, ...]) -> SiteId:
    """The first site of the roster that is present."""
    return next(site for site in roster if site in present)


def step_hub(
    hub: CoordinatorParams, stage: CoordinatorEpochStage, event: CoordinatorEpochEvent, now: float
) -> CoordinatorEpochStep:
    """One event at the coordinator. Raises a ProtocolRefused and changes nothing where it is not legal."""
    if isinstance(event, FromSite):
        checks.sender(getattr(event.message, "site", None), event.sender)
    message = event.message if isinstance(event, FromSite) else event
    match stage, message:
        case _, StartEpoch(header, present):
            checks.grows("key epoch", header.epoch, stage.epoch, StaleEpoch)
            calling = Calling(header, (), present or header.roster, until=now + hub.timeout)
            calls = tuple(Send(site, messages.EpochCall(header)) for site in header.roster)
            return calling, (Persist(calling), *calls)
        case Calling(), messages.EpochKey():
            return _take_key(hub, stage, message, now)
        case ((Calling() | Granting()), Tick()):
            return _late(hub, stage, now)
        case _, SiteReconnected(site):
            return stage, _pending(stage, site)
        case ((Granting() | Spreading()), messages.EpochKey()) if message in stage.keys:
            return stage, _pending(stage, message.site)
        case Granting(), messages.KeyHeld():
            return stage, ()  # the maker's, whose grants were lost: it is asked for them again
        case Granting(), messages.Grants():
            return _take_grants(hub, stage, message)
        case Spreading(), messages.Grants() if message.site == stage.header.maker:
            return stage, ()  # sent again after a new connection; the first ones count
        case Spreading(), messages.KeyHeld():
            return _take_held(hub, stage, message)
        case Spreading(), messages.EpochKey():
            return _late_joiner(hub, stage, message)
        case Spreading(), messages.Grant():
            return _take_grant(hub, stage, message)
        case _, Tick():
            return stage, ()
    raise OutOfOrder(
        "key epoch", type_name(type(message)), f"what {type_name(type(stage))} takes",
        event.sender if isinstance(event, FromSite) else COORDINATOR,
    )  # fmt: skip


def _take_key(
    hub: CoordinatorParams, stage: Calling, key: messages.EpochKey, now: float
) -> CoordinatorEpochStep:
    check_epoch_key(key, stage.header, hub.pins)
    if key in stage.keys:
        return stage, ()
    if key.site in {past.site for past in stage.keys}:
        raise Conflicting("second EpochKey", "another key", "one an epoch", key.site)
    keys = in_order(stage.header.roster, (*stage.keys, key))
    stage = replace(stage, keys=keys)
    came = {each.site for each in keys}
    if not {*stage.awaited, stage.header.maker} <= came or len(came) < stage.header.threshold:
        return stage, (Persist(stage),)
    return _ask_maker(hub, stage, now)


def _ask_maker(hub: CoordinatorParams, stage: Calling, now: float) -> CoordinatorEpochStep:
    granting = Granting(stage.header, stage.keys, until=now + hub.timeout)
    return granting, (Persist(granting), *_pending(granting, stage.header.maker))


def _pending(stage: CoordinatorEpochStage, site: SiteId) -> tuple[CoordinatorEpochEffect, ...]:
    """What a site may have missed."""
    match stage:
        case Calling() if site not in [key.site for key in stage.keys]:
            return (Send(site, messages.EpochCall(stage.header)),)
        case Granting() if site == stage.header.maker:
            return (Send(site, messages.EpochKeys(stage.header.digest, stage.keys)),)
        case Spreading() if site not in stage.holders:
            key = next((each for each in stage.keys if each.site == site), None)
            if key is None:
                return (Send(site, messages.EpochCall(stage.header)),)
            grants = {grant.recipient_key: grant for grant in stage.grants}
            if digest(key.key) in grants:
                return (Send(site, _granted(stage, grants[digest(key.key)])),)
            return _ask_a_holder(stage, key)
    return ()


def _ask_a_holder(stage: Spreading, key: messages.EpochKey) -> tuple[CoordinatorEpochEffect, ...]:
    holders = [site for site in stage.holders if site != key.site]
    return (Send(holders[0], messages.GrantRequest(key)),) if holders else ()


def _late(hub: CoordinatorParams, stage: Calling | Granting, now: float) -> CoordinatorEpochStep:
    """At the deadline: go on without silent sites, or call a new epoch under the next maker."""
    if now < stage.until:
        return stage, ()
    header = stage.header
    present = tuple(key.site for key in stage.keys)
    if len(present) < header.threshold:
        raise ThresholdRefused(
            "epoch keys", f"{len(present)} sites", f"at least {header.threshold}", COORDINATOR,
            remedy="a key epoch starts again when enough sites are connected",
        )  # fmt: skip
    if isinstance(stage, Calling) and header.maker in present:
        return _ask_maker(hub, stage, now)
    others = tuple(site for site in present if site != header.maker)
    after = [s for s in others if header.roster.index(s) > header.roster.index(header.maker)]
    maker = after[0] if after else others[0]
    new = StartEpoch(replace(header, epoch=header.epoch + 1, maker=maker), others)
    return step_hub(hub, stage, new, now)


def _take_grants(
    hub: CoordinatorParams, stage: Granting, message: messages.Grants
) -> CoordinatorEpochStep:
    header = stage.header
    check_epoch(message.header, header, message.site)
    expected = [key.site for key in stage.keys if key.site != header.maker]
    if message.site != header.maker or [g.recipient for g in message.grants] != expected:
        raise KeyRefused(
            "grants", f"{len(message.grants)} by {message.site!r}",
            f"one by the maker for each of {len(expected)} sites", message.site,
        )  # fmt: skip
    for grant in message.grants:
        check_signature(grant, hub.pins)
    spreading = Spreading(header, stage.keys, message.grants)
    sends = tuple(Send(g.recipient, _granted(spreading, g)) for g in message.grants)
    return spreading, (Persist(spreading), *sends)


def _take_grant(
    hub: CoordinatorParams, stage: Spreading, grant: messages.Grant
) -> CoordinatorEpochStep:
    """A holder's grant for a late joiner: both have signed a key of this epoch."""
    check_signed(grant, stage.header, hub.pins)
    if not {grant.site, grant.recipient} <= {key.site for key in stage.keys}:
        raise KeyRefused(
            "grant", f"one by {grant.site!r} for {grant.recipient!r}",
            "two sites with a key of this epoch", grant.site,
        )  # fmt: skip
    return stage, (Send(grant.recipient, _granted(stage, grant)),)


def _granted(stage: Spreading, grant: messages.Grant) -> messages.Granted:
    granter = next(key for key in stage.keys if key.site == grant.site)
    proved = len(stage.held) >= stage.header.threshold
    from_maker = grant.site == stage.header.maker
    return messages.Granted(grant, granter, stage.held if proved or not from_maker else ())


def _take_held(
    hub: CoordinatorParams, stage: Spreading, held: messages.KeyHeld
) -> CoordinatorEpochStep:
    check_signed(held, stage.header, hub.pins)
    if held.site in stage.holders:
        return stage, ()
    stage = replace(stage, held=in_order(stage.header.roster, (*stage.held, held)))
    return stage, (Persist(stage),)


def _late_joiner(
    hub: CoordinatorParams, stage: Spreading, key: messages.EpochKey
) -> CoordinatorEpochStep:
    """Ask a holder to grant; the newest key of a site counts, for it may have lost the older one."""
    check_epoch_key(key, stage.header, hub.pins)
    rest = tuple(each for each in stage.keys if each.site != key.site)
    held = tuple(each for each in stage.held if each.site != key.site)
    stage = replace(stage, keys=in_order(stage.header.roster, (*rest, key)), held=held)
    asked = _ask_a_holder(stage, key)
    if not asked:
        raise ThresholdRefused("late joiner", "no holder of the key", "at least one", COORDINATOR)
    return stage, (Persist(stage), *asked)
