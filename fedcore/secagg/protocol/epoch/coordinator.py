"""The coordinator in a key epoch: it carries keys and sealed grants between the sites."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fedcore.errors import (
    Conflicting,
    KeyRefused,
    OutOfOrder,
    RosterRefused,
    StaleEpoch,
    ThresholdRefused,
)
from fedcore.secagg.protocol.effects import Persist, Send
from fedcore.secagg.protocol.epoch.records import (
    CoordinatorEpochMessage,
    EpochCall,
    EpochHeader,
    EpochKey,
    EpochKeys,
    Grant,
    Granted,
    GrantRequest,
    Grants,
    KeyHeld,
    SiteEpochMessage,
    check_epoch_key,
    same_epoch,
)
from fedcore.secagg.protocol.messages import COORDINATOR, check_signature
from fedcore.secagg.protocol.wire_form import digest, record, type_name
from fedcore.types import SiteId


@record("NoEpoch")
@dataclass(frozen=True)
class NoEpoch:
    """No epoch yet. epoch: the last number used."""

    epoch: int = 0


@record("Calling")
@dataclass(frozen=True)
class Calling:
    """Waiting for epoch keys. awaited: of these sites; more are welcome."""

    header: EpochHeader
    keys: tuple[EpochKey, ...] = ()
    awaited: tuple[SiteId, ...] = ()
    until: float = field(default=0.0, compare=False, metadata={"byte_form": False})

    @property
    def epoch(self) -> int:
        """Its number."""
        return self.header.epoch


@record("Granting")
@dataclass(frozen=True)
class Granting:
    """Waiting for the maker's grants."""

    header: EpochHeader
    keys: tuple[EpochKey, ...]
    until: float = field(default=0.0, compare=False, metadata={"byte_form": False})

    @property
    def epoch(self) -> int:
        """Its number."""
        return self.header.epoch


@record("Spreading")
@dataclass(frozen=True)
class Spreading:
    """The payload is with its maker and on its way; complete when every key holder signed its id."""

    header: EpochHeader
    keys: tuple[EpochKey, ...]
    grants: tuple[Grant, ...]
    held: tuple[KeyHeld, ...] = ()

    @property
    def epoch(self) -> int:
        """Its number."""
        return self.header.epoch

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

    header: EpochHeader
    present: tuple[SiteId, ...] = ()


@dataclass(frozen=True)
class FromSite:
    """A message of an authenticated site."""

    sender: SiteId
    message: SiteEpochMessage


@dataclass(frozen=True)
class EpochTick:
    """Time has passed."""


@dataclass(frozen=True)
class SiteReturned:
    """A site is back, or the coordinator is: the site gets again what this stage has for it."""

    site: SiteId


CoordinatorEpochEvent = StartEpoch | FromSite | EpochTick | SiteReturned

CoordinatorEpochEffect = Persist[CoordinatorEpochStage] | Send[CoordinatorEpochMessage]

CoordinatorEpochStep = tuple[CoordinatorEpochStage, tuple[CoordinatorEpochEffect, ...]]


@dataclass(frozen=True)
class EpochParams:
    """What the coordinator knows. patience: seconds it waits for keys, and then for the maker."""

    pins: Mapping[SiteId, bytes]
    patience: float = 600.0


def awaited_in(stage: CoordinatorEpochStage) -> tuple[SiteId, ...]:
    """The sites an epoch's coordinator waits for now: what a person waits for."""
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
    hub: EpochParams, stage: CoordinatorEpochStage, event: CoordinatorEpochEvent, now: float
) -> CoordinatorEpochStep:
    """One event at the coordinator. Raises a ProtocolRefused and changes nothing where it is not legal."""
    named = getattr(event.message, "site", None) if isinstance(event, FromSite) else None
    if isinstance(event, FromSite) and named != event.sender:
        raise RosterRefused(
            "message", found=f"one of {named!r} from {event.sender!r}",
            expected="its own", fault=event.sender,
        )  # fmt: skip
    message = event.message if isinstance(event, FromSite) else event
    match stage, message:
        case _, StartEpoch(header, present):
            if header.epoch <= stage.epoch:
                raise StaleEpoch(
                    "key epoch", found=header.epoch, expected=f"more than {stage.epoch}",
                    fault=COORDINATOR,
                )  # fmt: skip
            calling = Calling(header, (), present or header.roster, now + hub.patience)
            calls = tuple(Send(site, EpochCall(header)) for site in header.roster)
            return calling, (Persist(calling), *calls)
        case Calling(), EpochKey():
            return _take_key(hub, stage, message, now)
        case ((Calling() | Granting()), EpochTick()):
            return _late(hub, stage, now)
        case _, SiteReturned(site):
            return stage, _pending(stage, site)
        case ((Granting() | Spreading()), EpochKey()) if message in stage.keys:
            return stage, _pending(stage, message.site)
        case Granting(), KeyHeld():
            return stage, ()  # the maker's, whose grants were lost: it is asked for them again
        case Granting(), Grants():
            return _take_grants(hub, stage, message)
        case Spreading(), Grants() if message.site == stage.header.maker:
            return stage, ()  # said twice after a new connection; the first ones count
        case Spreading(), KeyHeld():
            return _take_held(hub, stage, message)
        case Spreading(), EpochKey():
            return _late_joiner(hub, stage, message)
        case Spreading(), Grant():
            return _take_grant(hub, stage, message)
        case _, EpochTick():
            return stage, ()
    raise OutOfOrder(
        "key epoch", found=type_name(type(message)), expected=f"what {type_name(type(stage))} takes",
        fault=event.sender if isinstance(event, FromSite) else COORDINATOR,
    )  # fmt: skip


def _take_key(hub: EpochParams, stage: Calling, key: EpochKey, now: float) -> CoordinatorEpochStep:
    check_epoch_key(key, stage.header, hub.pins)
    for past in stage.keys:
        if past.site == key.site:
            if past != key:
                raise Conflicting(
                    "second EpochKey", found="another key", expected="one an epoch", fault=key.site
                )
            return stage, ()
    place = stage.header.roster.index
    keys = tuple(sorted((*stage.keys, key), key=lambda each: place(each.site)))
    stage = replace(stage, keys=keys)
    came = {each.site for each in keys}
    if not {*stage.awaited, stage.header.maker} <= came or len(came) < stage.header.threshold:
        return stage, (Persist(stage),)
    return _ask_maker(hub, stage, now)


def _ask_maker(hub: EpochParams, stage: Calling, now: float) -> CoordinatorEpochStep:
    header = stage.header
    granting = Granting(header, stage.keys, now + hub.patience)
    request = EpochKeys(header.digest, stage.keys)
    return granting, (Persist(granting), Send(header.maker, request))


def _pending(stage: CoordinatorEpochStage, site: SiteId) -> tuple[CoordinatorEpochEffect, ...]:
    """What a site may have missed."""
    match stage:
        case Calling() if site not in [key.site for key in stage.keys]:
            return (Send(site, EpochCall(stage.header)),)
        case Granting() if site == stage.header.maker:
            return (Send(site, EpochKeys(stage.header.digest, stage.keys)),)
        case Spreading() if site not in stage.holders:
            key = next((each for each in stage.keys if each.site == site), None)
            if key is None:
                return (Send(site, EpochCall(stage.header)),)
            grants = {grant.recipient_key: grant for grant in stage.grants}
            if digest(key.key) in grants:
                return (Send(site, _granted(stage, grants[digest(key.key)])),)
            return _ask_a_holder(stage, key)
    return ()


def _ask_a_holder(stage: Spreading, key: EpochKey) -> tuple[CoordinatorEpochEffect, ...]:
    holders = [site for site in stage.holders if site != key.site]
    return (Send(holders[0], GrantRequest(key)),) if holders else ()


def _late(hub: EpochParams, stage: Calling | Granting, now: float) -> CoordinatorEpochStep:
    """At the deadline: go on without silent sites, or call a new epoch under the next maker."""
    if now < stage.until:
        return stage, ()
    header = stage.header
    present = tuple(key.site for key in stage.keys)
    if len(present) < header.threshold:
        raise ThresholdRefused(
            "epoch keys", found=f"{len(present)} sites", expected=f"at least {header.threshold}",
            fault=COORDINATOR, remedy="a key epoch starts again when enough sites are connected",
        )  # fmt: skip
    if isinstance(stage, Calling) and header.maker in present:
        return _ask_maker(hub, stage, now)
    others = tuple(site for site in present if site != header.maker)
    after = [s for s in others if header.roster.index(s) > header.roster.index(header.maker)]
    maker = after[0] if after else others[0]
    new = StartEpoch(replace(header, epoch=header.epoch + 1, maker=maker), others)
    return step_hub(hub, stage, new, now)


def _take_grants(hub: EpochParams, stage: Granting, message: Grants) -> CoordinatorEpochStep:
    header = stage.header
    same_epoch(message.header, header, message.site)
    expected = [key.site for key in stage.keys if key.site != header.maker]
    if message.site != header.maker or [g.recipient for g in message.grants] != expected:
        raise KeyRefused(
            "grants", found=f"{len(message.grants)} by {message.site!r}",
            expected=f"one by the maker for each of {len(expected)} sites", fault=message.site,
        )  # fmt: skip
    for grant in message.grants:
        check_signature(grant, hub.pins)
    spreading = Spreading(header, stage.keys, message.grants)
    sends = tuple(Send(g.recipient, _granted(spreading, g)) for g in message.grants)
    return spreading, (Persist(spreading), *sends)


def _take_grant(hub: EpochParams, stage: Spreading, grant: Grant) -> CoordinatorEpochStep:
    """A holder's grant for a late joiner: both have signed a key of this epoch."""
    same_epoch(grant.header, stage.header, grant.site)
    check_signature(grant, hub.pins)
    if not {grant.site, grant.recipient} <= {key.site for key in stage.keys}:
        raise KeyRefused(
            "grant", found=f"one by {grant.site!r} for {grant.recipient!r}",
            expected="two sites with a key of this epoch", fault=grant.site,
        )  # fmt: skip
    return stage, (Send(grant.recipient, _granted(stage, grant)),)


def _granted(stage: Spreading, grant: Grant) -> Granted:
    granter = next(key for key in stage.keys if key.site == grant.site)
    proved = len(stage.held) >= stage.header.threshold
    from_maker = grant.site == stage.header.maker
    return Granted(grant, granter, stage.held if proved or not from_maker else ())


def _take_held(hub: EpochParams, stage: Spreading, held: KeyHeld) -> CoordinatorEpochStep:
    same_epoch(held.header, stage.header, held.site)
    check_signature(held, hub.pins)
    if held.site in stage.holders:
        return stage, ()
    place = stage.header.roster.index
    everyone = tuple(sorted((*stage.held, held), key=lambda each: place(each.site)))
    stage = replace(stage, held=everyone)
    return stage, (Persist(stage),)


def _late_joiner(hub: EpochParams, stage: Spreading, key: EpochKey) -> CoordinatorEpochStep:
    """Ask a holder to grant; the newest key of a site counts, for it may have lost the older one."""
    check_epoch_key(key, stage.header, hub.pins)
    rest = tuple(each for each in stage.keys if each.site != key.site)
    place = stage.header.roster.index
    stage = replace(
        stage, keys=tuple(sorted((*rest, key), key=lambda each: place(each.site))),
        held=tuple(each for each in stage.held if each.site != key.site),
    )  # fmt: skip
    asked = _ask_a_holder(stage, key)
    if not asked:
        raise ThresholdRefused(
            "late joiner", found="no holder of the key", expected="at least one", fault=COORDINATOR
        )
    return stage, (Persist(stage), *asked)
