"""The stages of a site in a round: each holds only what is true in it."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import Self, get_args

from fedcore.errors import Conflicting
from fedcore.secagg.crypto.hybrid import HybridKey, HybridPublic
from fedcore.secagg.crypto.pairwise import MaskRoot
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol import messages
from fedcore.secagg.protocol.messages import COORDINATOR, CoordinatorMessage, SiteMessage
from fedcore.secagg.protocol.moves import Timed
from fedcore.secagg.protocol.wire_form import digest, encode, record, type_name
from fedcore.types import SiteId


@record("Exchange")
class Exchange:
    """One request that was answered: its record's name, its digest, and the byte form of the answer (or b"").

    An identical request gets the identical answer again, a different one of the same type is refused.
    """

    kind: str
    request: bytes
    answer: bytes


History = tuple[Exchange, ...]


def exchange(request: CoordinatorMessage, answer: SiteMessage | None = None) -> Exchange:
    """The record of a request and its answer."""
    return Exchange(type_name(type(request)), digest(request), encode(answer) if answer else b"")


def answered(history: History, request: object) -> Exchange | None:
    """The earlier exchange of an identical request; None for a request of a type not seen yet.

    Raises Conflicting for a different request of a type already answered.
    """
    kind = type_name(type(request))
    for past in history:
        if past.kind == kind:
            if past.request != digest(request):
                raise Conflicting(
                    f"second {kind}", "other bytes than the first", "the same request", COORDINATOR
                )
            return past
    return None


@record("Standing")
class SiteProgress:
    """The progress of a site between rounds, which the next header must match.

    epoch, key_id: the key epoch held. round: the last round number seen, abandoned ones included.
    certificate: hash of the last release certificate, "" before the first; released: its round.
    exposed: digest of the header of the round whose sum may be known and is not released yet, or b"".
    submitted: (purpose, training round) of the vectors sent under `encrypted` from the present state.
    proved: the highest round of which this site's own signature came back without a record of it here.
    Only a release ends the last three (PROTOCOL H, V): leaving a round or a key epoch does not.
    """

    epoch: int
    key_id: bytes
    round: int = 0
    certificate: str = ""
    released: int = 0
    exposed: bytes = b""
    submitted: tuple[tuple[str, int], ...] = ()
    proved: int = 0


@record("Secrets")
class Secrets:
    """The round's own secrets: mask root, self-seed, and the channel key of the envelopes."""

    root: SecretBytes
    self_seed: SecretBytes
    channel: SecretBytes

    @cached_property
    def keys(self) -> tuple[HybridKey, MaskRoot]:
        """The channel key and the mask root with its keys, derived once: they are gone with these secrets."""
        return HybridKey.from_bytes(self.channel.reveal()), MaskRoot(self.root.reveal())

    @property
    def public(self) -> tuple[HybridPublic, HybridPublic, bytes]:
        """The public keys of the envelopes and of the masks, and SHA-256 of the self-seed."""
        channel, root = self.keys
        return channel.public, root.keys.public, hashlib.sha256(self.self_seed.reveal()).digest()

    @classmethod
    def of(cls, channel: HybridKey, root: MaskRoot, self_seed: bytes) -> Self:
        """The secrets of these keys."""
        secret = map(SecretBytes, (root.to_bytes(), self_seed, channel.to_bytes()))
        found = cls(*secret)
        found.__dict__["keys"] = channel, root
        return found


@record("Held")
class HeldShares:
    """Two key shares of one site, kept until unmask asks for exactly one of them."""

    of: SiteId
    self_share: SecretBytes
    root_share: SecretBytes


@dataclass(frozen=True)
class SealedAhead:
    """Shares that were sent before the round began. bundle: the public keys for which they are sealed. arrived: the
    session in which they were sent has not ended since."""

    bundle: tuple[messages.NextKeys, ...]
    own: HeldShares
    shares: messages.Shares
    arrived: bool = True


@dataclass(frozen=True)
class Ahead:
    """The keys that a site sent for the round after a release, and what they belong to. In memory only: a new process
    has none, and the number of that round is used up.

    header: of that round, as this site expects it; other rounds get other keys.
    """

    header: RoundHeader
    state_tag: bytes
    secrets: Secrets
    keys: messages.Keys
    sealed: SealedAhead | None = None


@dataclass(frozen=True)
class DrawnNext:
    """Secrets for the round after this one, drawn with the confirmation. In memory only.

    digests: {site: digest of its `NextKeys`}, as their confirmations sign them; empty before they are here.
    bundle: the keys of all survivors, once they are here.
    """

    secrets: Secrets
    keys: messages.NextKeys
    digests: tuple[tuple[SiteId, bytes], ...] = ()
    bundle: tuple[messages.NextKeys, ...] = ()


@dataclass(frozen=True)
class _NextDrawn:
    """A stage that may have secrets for the round after this one."""

    drawn: DrawnNext | None = field(
        default=None, compare=False, kw_only=True, repr=False, metadata={"byte_form": False}
    )


@dataclass(frozen=True)
class _KeysAhead:
    """A stage that may have keys for the next round."""

    ahead: Ahead | None = field(
        default=None, compare=False, kw_only=True, repr=False, metadata={"byte_form": False}
    )


@record("Idle")
class Idle(_KeysAhead):
    """Between rounds."""

    standing: SiteProgress


@record("Halted")
class Halted:
    """A release was refused: no further round under this key epoch (PROTOCOL R)."""

    standing: SiteProgress


@dataclass(frozen=True)
class _Begun:
    """A round has begun here. state_tag: HMAC under G of the state that this site starts from."""

    standing: SiteProgress
    header: RoundHeader
    state_tag: bytes

    @property
    def begun(self) -> tuple[SiteProgress, RoundHeader, bytes]:
        return self.standing, self.header, self.state_tag


@record("Advertised")
class Advertised(_Begun, Timed):
    """Keys are sent; the bundle is awaited. sealed: the shares, where they were sent ahead; in memory only."""

    secrets: Secrets
    keys: messages.Keys
    history: History
    sealed: SealedAhead | None = field(
        default=None, compare=False, kw_only=True, repr=False, metadata={"byte_form": False}
    )


@record("Shared")
class Shared(_Begun, Timed):
    """Shares are sent; the others' are awaited. own: the shares kept of this site's own secrets."""

    secrets: Secrets
    bundle: tuple[messages.Keys, ...]
    own: HeldShares
    shares: messages.Shares
    history: History


@record("Masking")
class Masking(_Begun, Timed):
    """The vector is being made. masks: (seed, sign) of each; mask root and self-seed are gone."""

    bundle: bytes
    cohort: tuple[SiteId, ...]
    held: tuple[HeldShares, ...]
    masks: tuple[tuple[SecretBytes, int], ...]
    history: History


@record("Submitted")
class Submitted(_Begun, Timed):
    """The vector is on its way; the survivor list is awaited. The masks are gone."""

    bundle: bytes
    cohort: tuple[SiteId, ...]
    held: tuple[HeldShares, ...]
    submit: messages.Submit
    history: History


@record("Confirmed")
class Confirmed(_Begun, Timed, _NextDrawn):
    """One survivor list is signed; the others' signatures are awaited."""

    cohort: tuple[SiteId, ...]
    held: tuple[HeldShares, ...]
    submissions: tuple[messages.Submit, ...]
    confirm: messages.Confirm
    history: History


@record("Answered")
class Answered(_Begun, _NextDrawn):
    """Unmask is answered, so the round counts as released; the sum is awaited. The shares are gone."""

    submissions: tuple[messages.Submit, ...]
    history: History


@record("Opening")
class Opening(_Begun, _NextDrawn):
    """The sum is being opened and its tag checked."""

    submissions: tuple[messages.Submit, ...]
    aggregate: messages.Aggregate
    history: History


@record("Stated")
class Stated(_KeysAhead, _NextDrawn):
    """What the sum leads to is signed; the certificate is awaited, and nothing is applied before it."""

    standing: SiteProgress
    header: RoundHeader
    submissions: tuple[messages.Submit, ...]
    statement: messages.Statement
    history: History


Waiting = Advertised | Shared | Masking | Submitted | Confirmed
"""Stages that end by themselves, after the site's timeout."""

Exposed = Answered | Opening | Stated
"""Stages after unmask was answered: the coordinator may hold this round's sum. They have no timeout:
no other round may follow from the same state, so leaving would gain nothing."""

Between = Idle | Halted

InRound = Waiting | Exposed

SiteStage = Between | InRound

BETWEEN: tuple[type[Between], ...] = get_args(Between)

IN_ROUND: tuple[type[InRound], ...] = get_args(InRound)

EXPOSED: tuple[type[Exposed], ...] = get_args(Exposed)
