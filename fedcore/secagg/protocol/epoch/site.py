"""A site in a key epoch: it signs a fresh key, makes or receives the payload, and grants it to others."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedcore.errors import (
    HeaderRefused,
    KeyRefused,
    OutOfOrder,
    RosterRefused,
    StaleEpoch,
)
from fedcore.secagg.crypto.hybrid import HybridKey, open_envelope, seal_envelope
from fedcore.secagg.crypto.identity_key import roster_digest
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.crypto.sumtag import key_id
from fedcore.secagg.plan import PLAN_VERSION
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
from fedcore.secagg.protocol.messages import COORDINATOR, check_signature, sign
from fedcore.secagg.protocol.round.site import SiteParams
from fedcore.secagg.protocol.shared import check_members, check_protection
from fedcore.secagg.protocol.wire_form import digest, encode, record, type_name
from fedcore.types import SiteId


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
            grant = seal_grant(member, stage, key, stage.payload, stage.held.key_id)
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


def _begin_making(member: SiteParams, stage: Offered, request: EpochKeys) -> SiteEpochStep:
    header = stage.header
    same_epoch(request.header, header, COORDINATOR)
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


def seal_grant(
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
    grants = [seal_grant(member, stage, key, stage.payload, stage.held.key_id) for key in others]
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
    same_epoch(grant.header, header, grant.site)
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
        same_epoch(each.header, header, each.site)
        check_signature(each, member.pins)
        if each.key_id != name:
            raise KeyRefused(
                "key id", found=f"another one at {each.site!r}", expected="that of the grant",
                fault=COORDINATOR,
            )  # fmt: skip
