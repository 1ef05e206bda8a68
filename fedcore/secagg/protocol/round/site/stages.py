"""The stages of a site in a round: each holds only what is true in it."""

from dataclasses import dataclass
from typing import get_args

from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol import messages
from fedcore.secagg.protocol.moves import Timed
from fedcore.secagg.protocol.shared import History, SiteProgress
from fedcore.secagg.protocol.wire_form import record
from fedcore.types import SiteId


@record("Secrets")
class Secrets:
    """The round's own secrets: mask root, self-seed, and the channel key of the envelopes."""

    root: SecretBytes
    self_seed: SecretBytes
    channel: SecretBytes


@record("Held")
class HeldShares:
    """Two key shares of one site, kept until unmask asks for exactly one of them."""

    of: SiteId
    self_share: SecretBytes
    root_share: SecretBytes


@record("Idle")
class Idle:
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
        """The three, which the next stage begins with."""
        return self.standing, self.header, self.state_tag


@record("Advertised")
class Advertised(_Begun, Timed):
    """Keys are sent; the bundle is awaited."""

    secrets: Secrets
    keys: messages.Keys
    history: History


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
class Confirmed(_Begun, Timed):
    """One survivor list is signed; the others' signatures are awaited."""

    cohort: tuple[SiteId, ...]
    held: tuple[HeldShares, ...]
    submissions: tuple[messages.Submit, ...]
    confirm: messages.Confirm
    history: History


@record("Answered")
class Answered(_Begun):
    """Unmask is answered, so the round counts as released; the sum is awaited. The shares are gone."""

    submissions: tuple[messages.Submit, ...]
    history: History


@record("Opening")
class Opening(_Begun):
    """The sum is being opened and its tag checked."""

    submissions: tuple[messages.Submit, ...]
    aggregate: messages.Aggregate
    history: History


@record("Stated")
class Stated:
    """What the sum leads to is signed; the certificate is awaited, and nothing is applied before it."""

    standing: SiteProgress
    header: RoundHeader
    submissions: tuple[messages.Submit, ...]
    statement: messages.Statement
    history: History


Waiting = Advertised | Shared | Masking | Submitted | Confirmed
"""Stages that end by themselves, after the site's patience."""

Exposed = Answered | Opening | Stated
"""Stages after unmask was answered: the coordinator may hold this round's sum. They have no timeout:
no other round may follow from the same state, so leaving would gain nothing."""

Between = Idle | Halted

InRound = Waiting | Exposed

SiteStage = Between | InRound

BETWEEN: tuple[type[Between], ...] = get_args(Between)

IN_ROUND: tuple[type[InRound], ...] = get_args(InRound)

EXPOSED: tuple[type[Exposed], ...] = get_args(Exposed)
