"""A site in a key epoch: it signs a fresh key, makes or receives the payload, and grants it to others."""

from dataclasses import dataclass, field

from fedcore.errors import KeyRefused, OutOfOrder, RosterRefused, StaleEpoch
from fedcore.secagg.crypto.hybrid import HybridKey, open_envelope, seal_envelope
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.crypto.sumtag import key_id
from fedcore.secagg.plan import PLAN_VERSION
from fedcore.secagg.protocol import checks
from fedcore.secagg.protocol.effects import Persist, Send
from fedcore.secagg.protocol.epoch import messages
from fedcore.secagg.protocol.epoch.messages import check_epoch, check_epoch_key, check_signed
from fedcore.secagg.protocol.messages import COORDINATOR, sign
from fedcore.secagg.protocol.round.site import SiteParams
from fedcore.secagg.protocol.wire_form import digest, encode, record, type_name
from fedcore.types import SiteId


@record("NoKey")
class NoKey:
    """No payload of the present job. epoch: the last one seen."""

    epoch: int = 0


@dataclass(frozen=True)
class _KeySigned(messages.InEpoch):
    """This site signed a fresh key for the epoch. secret: the private half."""

    secret: SecretBytes
    key: messages.EpochKey


@record("Offered")
class Offered(_KeySigned):
    """This site's epoch key is signed; the payload is awaited."""


@record("Making")
class Making(_KeySigned):
    """This site is the maker, and its driver makes the payload."""

    keys: tuple[messages.EpochKey, ...]


@record("Holding")
class Holding(_KeySigned):
    """The payload is installed. held: the signed key id, sent again after a new connection."""

    payload: SecretBytes
    held: messages.KeyHeld


SiteEpochStage = NoKey | Offered | Making | Holding


@dataclass(frozen=True)
class FromCoordinator:
    """A message of the coordinator."""

    message: messages.CoordinatorEpochMessage


@dataclass(frozen=True)
class Again:
    """The connection or the process is new: the last message may be lost."""


@dataclass(frozen=True)
class SecretsMade:
    """The maker's driver made the payload."""

    payload: SecretBytes


@dataclass(frozen=True)
class MakeSecrets:
    """Effect: make a new random payload, never derived from an old one; the result is `SecretsMade`."""

    header: messages.EpochHeader


@dataclass(frozen=True)
class Install:
    """Effect: use this payload from now on; the round machine gets `NewEpoch(epoch, key_id)`."""

    epoch: int
    key_id: bytes
    payload: SecretBytes = field(repr=False)


SiteEpochEvent = FromCoordinator | Again | SecretsMade

SiteEpochEffect = Persist[SiteEpochStage] | Send[messages.SiteEpochMessage] | MakeSecrets | Install

SiteEpochStep = tuple[SiteEpochStage, tuple[SiteEpochEffect, ...]]
"""The next stage, and what to do."""


def step_site(member: SiteParams, stage: SiteEpochStage, event: SiteEpochEvent) -> SiteEpochStep:
    """One event at a site; `Persist` records are whole stages here. Raises a ProtocolRefused and changes
    nothing where the event is not legal."""
    message = event.message if isinstance(event, FromCoordinator) else event
    match stage, message:
        case _, messages.EpochCall(header):
            return _offer(member, stage, header)
        case Offered(), messages.EpochKeys():
            return _begin_making(member, stage, message)
        case Making(), SecretsMade(payload):
            return _hold(member, stage, payload, key_id(payload.reveal()))
        case Offered(), messages.Granted():
            return _accept(member, stage, message)
        case Holding(), messages.GrantRequest(key):
            grant = seal_grant(member, stage, key, stage.payload, stage.held.key_id)
            return stage, (Send(COORDINATOR, grant),)
        case Making(), messages.EpochKeys() if message.keys == stage.keys:
            return stage, (MakeSecrets(stage.header),)  # nothing of an earlier payload has left
        case Holding(), messages.EpochKeys() if message.header == stage.header.digest:
            grants = _grants(member, stage, message.keys)
            return stage, (Send(COORDINATOR, grants), Send(COORDINATOR, stage.held))
        case Holding(), messages.Granted(grant) if grant.key_id == stage.held.key_id:
            return stage, (Send(COORDINATOR, stage.held),)
        case Holding(), Again():
            return stage, (Send(COORDINATOR, stage.held),)
        case Making(), Again():
            return stage, (MakeSecrets(stage.header),)
        case Offered(), Again():
            return stage, (Send(COORDINATOR, stage.key),)
        case NoKey(), Again():
            return stage, ()
    raise OutOfOrder(
        "key epoch", type_name(type(message)), f"what {type_name(type(stage))} takes", COORDINATOR
    )


def _offer(
    member: SiteParams, stage: SiteEpochStage, header: messages.EpochHeader
) -> SiteEpochStep:
    if isinstance(stage, Offered | Making | Holding) and stage.header == header:
        return stage, (Send(COORDINATOR, stage.key),)
    checks.grows("key epoch", header.epoch, stage.epoch, StaleEpoch)
    _check_header(member, header)
    secret = HybridKey.draw(member.entropy)
    key = sign(messages.EpochKey(header.digest, member.id, secret.public, b""), member.identity)
    offered = Offered(header, SecretBytes(secret.to_bytes()), key)
    return offered, (Persist(offered), Send(COORDINATOR, key))


def _check_header(member: SiteParams, header: messages.EpochHeader) -> None:
    checks.equal(
        ("protocol version", header.version, PLAN_VERSION),
        *member.same_job(header),
        ("roster", header.roster, tuple(member.pins)),
        ("threshold", header.threshold, member.plan.threshold),
    )
    checks.protection(member.plan.protection)
    if header.maker not in member.pins:
        raise RosterRefused("maker", header.maker, "a pinned site", COORDINATOR)


def _begin_making(member: SiteParams, stage: Offered, request: messages.EpochKeys) -> SiteEpochStep:
    header = stage.header
    check_epoch(request.header, header, COORDINATOR)
    _must_make(member, header)
    names = [key.site for key in request.keys]
    checks.members(names, header.roster, header.threshold, "epoch keys")
    for key in request.keys:
        check_epoch_key(key, header, member.pins)
    public = ((k.site, each) for k in request.keys for each in (k.key.x25519, k.key.mlkem))
    checks.distinct(public, "epoch keys")
    making = Making(header, stage.secret, stage.key, request.keys)
    return making, (Persist(making), MakeSecrets(header))


def _must_make(member: SiteParams, header: messages.EpochHeader) -> None:
    if header.maker != member.id:
        raise OutOfOrder(
            "key epoch", f"a request to {member.id!r} to make it", header.maker, COORDINATOR
        )


def _context(header: messages.EpochHeader, *grant: SiteId | bytes) -> bytes:
    """grant: its sender and recipient, the recipient's key, and the name of the payload."""
    return encode(("fedcore/1 key epoch", header.digest, *grant))


def seal_grant(
    member: SiteParams, stage: Holding, to: messages.EpochKey, payload: SecretBytes, name: bytes
) -> messages.Grant:
    """The payload for one recipient: sealed to its epoch key, bound to everything, signed."""
    header = stage.header
    check_epoch_key(to, header, member.pins)
    recipient_key = digest(to.key)
    envelope = seal_envelope(
        HybridKey.from_bytes(stage.secret.reveal()), to.key, payload.reveal(),
        context=_context(header, member.id, to.site, recipient_key, name), recipient=to.site,
        entropy=member.entropy,
    )  # fmt: skip
    grant = messages.Grant(header.digest, member.id, to.site, recipient_key, name, envelope, b"")
    return sign(grant, member.identity)


def _grants(
    member: SiteParams, stage: Holding, keys: tuple[messages.EpochKey, ...]
) -> messages.Grants:
    """The maker's grants; asked again it makes new envelopes of the same payload."""
    _must_make(member, stage.header)
    others = [key for key in keys if key.site != member.id]
    grants = [seal_grant(member, stage, key, stage.payload, stage.held.key_id) for key in others]
    return messages.Grants(stage.header.digest, member.id, tuple(grants))


def _hold(
    member: SiteParams, stage: Offered | Making, payload: SecretBytes, name: bytes
) -> SiteEpochStep:
    """The payload is on disk, then in use; the maker grants it to the others, and its id is signed last."""
    held = sign(messages.KeyHeld(stage.header.digest, member.id, name, b""), member.identity)
    holding = Holding(stage.header, stage.secret, stage.key, payload, held)
    effects: list[SiteEpochEffect] = [Persist(holding), Install(holding.epoch, name, payload)]
    if isinstance(stage, Making):
        effects.append(Send(COORDINATOR, _grants(member, holding, stage.keys)))
    return holding, (*effects, Send(COORDINATOR, held))


def _accept(member: SiteParams, stage: Offered, granted: messages.Granted) -> SiteEpochStep:
    header, grant, granter = stage.header, granted.grant, granted.granter
    check_signed(grant, header, member.pins)
    check_epoch_key(granter, header, member.pins)
    mine = digest(stage.key.key)
    if (grant.recipient, grant.recipient_key) != (member.id, mine) or granter.site != grant.site:
        raise KeyRefused(
            "grant", "one for another recipient or key", "this site's epoch key", grant.site
        )
    if grant.site != header.maker or granted.held:
        _check_held(member, header, granted)
    payload = open_envelope(
        HybridKey.from_bytes(stage.secret.reveal()), granter.key, grant.envelope,
        context=_context(header, grant.site, member.id, mine, grant.key_id), sender=grant.site,
    )  # fmt: skip
    if key_id(payload) != grant.key_id:
        raise KeyRefused("key id", "another payload", "the one that was signed", grant.site)
    return _hold(member, stage, SecretBytes(payload), grant.key_id)


def _check_held(
    member: SiteParams, header: messages.EpochHeader, granted: messages.Granted
) -> None:
    """At least t sites of the roster signed this very key id."""
    holders = [each.site for each in granted.held]
    checks.members(holders, header.roster, header.threshold, "holders")
    for each in granted.held:
        check_signed(each, header, member.pins)
        if each.key_id != granted.grant.key_id:
            raise KeyRefused(
                "key id", f"another one at {each.site!r}", "that of the grant", COORDINATOR
            )
