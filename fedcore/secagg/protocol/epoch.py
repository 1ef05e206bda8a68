"""Key epochs: how the sites come to share one secret that the coordinator only carries (PROTOCOL E).

One site, the maker, makes the payload (BFV secret key and group secret G) and seals it for every other
site under keys that each signed for this epoch alone. A rostered late joiner gets the same payload from
any holder, and believes it only if at least t sites signed its key id.
Both roles are here, as in a round: `step_site` and `step_hub`, without input or output.

Invariant: epochs only grow at a site; a payload is installed only if the pinned sender signed the grant
for this site's own key of this epoch, roster and plan, and its key id is SHA-256("key id" || payload).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fedcore.errors import (
    Conflicting,
    HeaderRefused,
    KeyRefused,
    OutOfOrder,
    RosterRefused,
    StaleEpoch,
    ThresholdRefused,
)
from fedcore.secagg.crypto.hybrid import HybridKey, HybridPublic, open_envelope, seal_envelope
from fedcore.secagg.crypto.identity_key import roster_digest
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.crypto.sumtag import key_id
from fedcore.secagg.plan import PLAN_VERSION
from fedcore.secagg.protocol.effects import Persist, Send
from fedcore.secagg.protocol.messages import COORDINATOR, check_signature, sign
from fedcore.secagg.protocol.round.site import SiteParams
from fedcore.secagg.protocol.shared import check_members, check_protection
from fedcore.secagg.protocol.wire_form import digest, encode, record, type_name
from fedcore.types import SiteId


@record("EpochHeader")
@dataclass(frozen=True)
class EpochHeader:
    """What a key epoch belongs to. roster: every pinned site; threshold: signed key ids a late joiner
    asks for; maker: the site whose payload it will be."""

    federation: str
    job: str
    epoch: int
    roster: tuple[SiteId, ...]
    pins: str
    threshold: int
    plan_digest: str
    maker: SiteId
    version: int = PLAN_VERSION

    @property
    def digest(self) -> bytes:
        """32 bytes, in every message of the epoch."""
        return digest(self)


# --------------------------------------------------------------------------------------- messages


@record("EpochCall")
@dataclass(frozen=True)
class EpochCall:
    """Coordinator to sites: sign fresh keys for this epoch."""

    header: EpochHeader


@record("EpochKey")
@dataclass(frozen=True)
class EpochKey:
    """A site's fresh public keys for one epoch."""

    header: bytes
    site: SiteId
    key: HybridPublic
    signature: bytes


@record("EpochKeys")
@dataclass(frozen=True)
class EpochKeys:
    """Coordinator to the maker: everybody's signed epoch keys."""

    header: bytes
    keys: tuple[EpochKey, ...]


@record("Grant")
@dataclass(frozen=True)
class Grant:
    """The payload, sealed by `site` for one recipient's epoch key."""

    header: bytes
    site: SiteId
    recipient: SiteId
    recipient_key: bytes
    key_id: bytes
    envelope: bytes
    signature: bytes


@record("Grants")
@dataclass(frozen=True)
class Grants:
    """The maker to the coordinator: one grant for each other site."""

    header: bytes
    site: SiteId
    grants: tuple[Grant, ...]


@record("Granted")
@dataclass(frozen=True)
class Granted:
    """Coordinator to a site: its grant, the granter's signed epoch key, and who signed the key id.

    held: empty for the first recipients, who check the maker; at least t for a late joiner.
    """

    grant: Grant
    granter: EpochKey
    held: tuple[KeyHeld, ...]


@record("GrantRequest")
@dataclass(frozen=True)
class GrantRequest:
    """Coordinator to a holder: seal the payload for a late joiner."""

    key: EpochKey


@record("KeyHeld")
@dataclass(frozen=True)
class KeyHeld:
    """A site signs which payload it holds."""

    header: bytes
    site: SiteId
    key_id: bytes
    signature: bytes


SiteEpochMessage = EpochKey | Grants | Grant | KeyHeld
CoordinatorEpochMessage = EpochCall | EpochKeys | Granted | GrantRequest


# ------------------------------------------------------------------------------- a site: stages


@record("NoKey")
@dataclass(frozen=True)
class NoKey:
    """No payload of the present job. epoch: the last one seen."""

    epoch: int = 0


@record("Offered")
@dataclass(frozen=True)
class Offered:
    """This site's epoch key is signed; the payload is awaited."""

    header: EpochHeader
    secret: SecretBytes
    key: EpochKey

    @property
    def epoch(self) -> int:
        """Its number, used up."""
        return self.header.epoch


@record("Making")
@dataclass(frozen=True)
class Making:
    """This site is the maker, and its shell makes the payload."""

    header: EpochHeader
    secret: SecretBytes
    key: EpochKey
    keys: tuple[EpochKey, ...]

    @property
    def epoch(self) -> int:
        """Its number, used up."""
        return self.header.epoch


@record("Holding")
@dataclass(frozen=True)
class Holding:
    """The payload is installed. sent: what was said last, to be said again after a new connection."""

    header: EpochHeader
    secret: SecretBytes
    key: EpochKey
    payload: SecretBytes
    held: KeyHeld

    @property
    def epoch(self) -> int:
        """Its number."""
        return self.header.epoch


SiteEpochStage = NoKey | Offered | Making | Holding


@dataclass(frozen=True)
class FromCoordinator:
    """A message of the coordinator."""

    message: CoordinatorEpochMessage


@dataclass(frozen=True)
class Again:
    """The connection or the process is new: what was said last may not have arrived."""


@dataclass(frozen=True)
class SecretsMade:
    """The maker's shell made the payload."""

    payload: SecretBytes


@dataclass(frozen=True)
class MakeSecrets:
    """Effect: make a new random payload, then tell `SecretsMade`. Never derived from an old one."""

    header: EpochHeader


@dataclass(frozen=True)
class Install:
    """Effect: use this payload from now on; the round machine hears `NewEpoch(epoch, key_id)`."""

    epoch: int
    key_id: bytes
    payload: SecretBytes = field(repr=False)


SiteEpochEvent = FromCoordinator | Again | SecretsMade
SiteEpochEffect = Persist[SiteEpochStage] | Send[SiteEpochMessage] | MakeSecrets | Install
SiteEpochStep = tuple[SiteEpochStage, tuple[SiteEpochEffect, ...]]
"""The next stage, and what to do."""


def step_site(member: SiteParams, stage: SiteEpochStage, event: SiteEpochEvent) -> SiteEpochStep:
    """One event at a site; `Persist` records are whole stages here. Raises a ProtocolRefused and changes
    nothing where the event is not legal."""
    message = event.message if isinstance(event, FromCoordinator) else event
    match stage, message:
        case _, EpochCall(header):
            return _offer(member, stage, header)
        case Offered(), EpochKeys():
            return _begin_making(member, stage, message)
        case Making(), SecretsMade(payload):
            return _grant_all(member, stage, payload)
        case Offered(), Granted():
            return _accept(member, stage, message)
        case Holding(), GrantRequest(key):
            grant = _grant(member, stage, key, stage.payload, stage.held.key_id)
            return stage, (Send(COORDINATOR, grant),)
        case Holding(), Granted(grant) if grant.key_id == stage.held.key_id:
            return stage, (Send(COORDINATOR, stage.held),)
        case Making(), EpochKeys() if message.keys == stage.keys:
            return stage, (MakeSecrets(stage.header),)  # nothing of an earlier payload has left
        case Holding(), EpochKeys() if message.header == stage.header.digest:
            return stage, (Send(COORDINATOR, _grants(member, stage, message.keys)), _told(stage))
        case ((Offered() | Making() | Holding()), Again()):
            return stage, _say_again(stage)
        case NoKey(), Again():
            return stage, ()
    raise OutOfOrder(
        "key epoch", found=type_name(type(message)), expected=f"what {type_name(type(stage))} takes",
        fault=COORDINATOR,
    )  # fmt: skip


def _offer(member: SiteParams, stage: SiteEpochStage, header: EpochHeader) -> SiteEpochStep:
    if isinstance(stage, Offered | Making | Holding) and stage.header == header:
        return stage, (Send(COORDINATOR, stage.key),)
    if header.epoch <= stage.epoch:
        raise StaleEpoch(
            "key epoch", found=header.epoch, expected=f"more than {stage.epoch}", fault=COORDINATOR
        )
    _check_header(member, header)
    secret = HybridKey.draw(member.entropy)
    key = sign(EpochKey(header.digest, member.id, secret.public, b""), member.identity)
    offered = Offered(header, SecretBytes(secret.to_bytes()), key)
    return offered, (Persist(offered), Send(COORDINATOR, key))


def _check_header(member: SiteParams, header: EpochHeader) -> None:
    expected: dict[str, tuple[object, object]] = {
        "federation": (header.federation, member.federation),
        "job": (header.job, member.job),
        "protocol version": (header.version, PLAN_VERSION),
        "roster": (header.roster, tuple(member.pins)),
        "pinned keys": (header.pins, roster_digest(member.pins)),
        "plan digest": (header.plan_digest, member.plan.digest),
        "threshold": (header.threshold, member.plan.threshold),
    }
    for what, (found, wanted) in expected.items():
        if found != wanted:
            raise HeaderRefused(what, found=found, expected=wanted, fault=COORDINATOR)
    check_protection(member.plan.protection)
    if header.maker not in member.pins:
        raise RosterRefused(
            "maker", found=header.maker, expected="a pinned site", fault=COORDINATOR
        )


def check_epoch_key(key: EpochKey, header: EpochHeader, pins: Mapping[SiteId, bytes]) -> None:
    """One signed epoch key of this epoch, well formed."""
    _same_epoch(key.header, header, key.site)
    check_signature(key, pins)
    key.key.check(key.site)


def _same_epoch(found: bytes, header: EpochHeader, fault: str) -> None:
    if found != header.digest:
        raise StaleEpoch(
            "key epoch", found="a message of another one",
            expected=f"epoch {header.epoch} of job {header.job}", fault=fault,
        )  # fmt: skip


def _begin_making(member: SiteParams, stage: Offered, request: EpochKeys) -> SiteEpochStep:
    header = stage.header
    _same_epoch(request.header, header, COORDINATOR)
    if header.maker != member.id:
        raise OutOfOrder(
            "key epoch", found=f"a request to {member.id!r} to make it", expected=header.maker,
            fault=COORDINATOR,
        )  # fmt: skip
    names = [key.site for key in request.keys]
    check_members(names, header.roster, header.threshold, "epoch keys")
    seen: dict[bytes, SiteId] = {}
    for key in request.keys:
        check_epoch_key(key, header, member.pins)
        for public in (key.key.x25519, key.key.mlkem):
            if public in seen:
                raise KeyRefused(
                    "epoch keys", found=f"a key of {seen[public]!r} again",
                    expected="distinct keys", fault=key.site,
                )  # fmt: skip
            seen[public] = key.site
    making = Making(header, stage.secret, stage.key, request.keys)
    return making, (Persist(making), MakeSecrets(header))


def _context(
    header: EpochHeader, sender: SiteId, recipient: SiteId, recipient_key: bytes, name: bytes
) -> bytes:
    return encode(("fedcore/1 key epoch", header.digest, sender, recipient, recipient_key, name))


def _grant(
    member: SiteParams, stage: Holding, to: EpochKey, payload: SecretBytes, name: bytes
) -> Grant:
    """The payload for one recipient: sealed to its epoch key, bound to everything, signed."""
    header = stage.header
    check_epoch_key(to, header, member.pins)
    recipient_key = digest(to.key)
    envelope = seal_envelope(
        HybridKey.from_bytes(stage.secret.reveal()), to.key, payload.reveal(),
        context=_context(header, member.id, to.site, recipient_key, name), recipient=to.site,
        entropy=member.entropy,
    )  # fmt: skip
    grant = Grant(header.digest, member.id, to.site, recipient_key, name, envelope, b"")
    return sign(grant, member.identity)


def _grant_all(member: SiteParams, stage: Making, payload: SecretBytes) -> SiteEpochStep:
    holding, installed = _hold(member, stage, payload, key_id(payload.reveal()))
    sent = Send(COORDINATOR, _grants(member, holding, stage.keys))
    return holding, (*installed, sent, _told(holding))


def _grants(member: SiteParams, stage: Holding, keys: tuple[EpochKey, ...]) -> Grants:
    """The maker's grants; asked again it makes new envelopes of the same payload."""
    if stage.header.maker != member.id:
        raise OutOfOrder(
            "key epoch", found=f"a request to {member.id!r} to make it", expected=stage.header.maker,
            fault=COORDINATOR,
        )  # fmt: skip
    others = [key for key in keys if key.site != member.id]
    grants = [_grant(member, stage, key, stage.payload, stage.held.key_id) for key in others]
    return Grants(stage.header.digest, member.id, tuple(grants))


def _told(stage: Holding) -> Send[KeyHeld]:
    return Send(COORDINATOR, stage.held)


def _say_again(stage: Offered | Making | Holding) -> tuple[SiteEpochEffect, ...]:
    match stage:
        case Offered():
            return (Send(COORDINATOR, stage.key),)
        case Making():
            return (MakeSecrets(stage.header),)
        case Holding():
            return (_told(stage),)


def _hold(
    member: SiteParams, stage: Offered | Making, payload: SecretBytes, name: bytes
) -> tuple[Holding, tuple[SiteEpochEffect, ...]]:
    """The payload is this site's from here on: on disk, then in use. It is told last, by the caller."""
    held = sign(KeyHeld(stage.header.digest, member.id, name, b""), member.identity)
    holding = Holding(stage.header, stage.secret, stage.key, payload, held)
    install = Install(stage.header.epoch, name, payload)
    return holding, (Persist(holding), install)


def _accept(member: SiteParams, stage: Offered, granted: Granted) -> SiteEpochStep:
    header, grant, granter = stage.header, granted.grant, granted.granter
    _same_epoch(grant.header, header, grant.site)
    check_signature(grant, member.pins)
    check_epoch_key(granter, header, member.pins)
    mine = digest(stage.key.key)
    if (grant.recipient, grant.recipient_key) != (member.id, mine) or granter.site != grant.site:
        raise KeyRefused(
            "grant", found="one for another recipient or key", expected="this site's epoch key",
            fault=grant.site,
        )  # fmt: skip
    if grant.site != header.maker or granted.held:
        _check_held(member, header, grant.key_id, granted.held)
    payload = open_envelope(
        HybridKey.from_bytes(stage.secret.reveal()), granter.key, grant.envelope,
        context=_context(header, grant.site, member.id, mine, grant.key_id), sender=grant.site,
    )  # fmt: skip
    if key_id(payload) != grant.key_id:
        raise KeyRefused(
            "key id", found="another payload", expected="the one that was signed", fault=grant.site
        )
    holding, installed = _hold(member, stage, SecretBytes(payload), grant.key_id)
    return holding, (*installed, _told(holding))


def _check_held(
    member: SiteParams, header: EpochHeader, name: bytes, held: tuple[KeyHeld, ...]
) -> None:
    """At least t sites of the roster signed this very key id."""
    check_members([each.site for each in held], header.roster, header.threshold, "holders")
    for each in held:
        _same_epoch(each.header, header, each.site)
        check_signature(each, member.pins)
        if each.key_id != name:
            raise KeyRefused(
                "key id", found=f"another one at {each.site!r}", expected="that of the grant",
                fault=COORDINATOR,
            )  # fmt: skip


# ------------------------------------------------------------------------ the coordinator: stages


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
    _same_epoch(message.header, header, message.site)
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
    _same_epoch(grant.header, stage.header, grant.site)
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
    _same_epoch(held.header, stage.header, held.site)
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
