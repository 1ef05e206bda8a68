"""The stages of a round at the coordinator: each holds only what is true in it."""

from collections.abc import Mapping
from typing import get_args

from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol import messages
from fedcore.secagg.protocol.moves import Timed
from fedcore.secagg.protocol.wire_form import record
from fedcore.types import SiteId


@record("Ready")
class Ready:
    """Between rounds. round: the last number used."""

    round: int = 0


@record("Advertising")
class Advertising(Timed):
    """Waiting for keys."""

    header: RoundHeader
    size: int
    salt: int
    keys: tuple[messages.Keys, ...] = ()
    gone: tuple[SiteId, ...] = ()


@record("Sharing")
class Sharing(Timed):
    """Waiting for shares of the sites in the bundle (U1)."""

    header: RoundHeader
    size: int
    salt: int
    bundle: tuple[messages.Keys, ...]
    shares: tuple[messages.Shares, ...] = ()
    gone: tuple[SiteId, ...] = ()


@record("Collecting")
class Collecting(Timed):
    """Waiting for vectors of the sites that shared (U2; under `encrypted` of the whole roster).

    left: of those gone, the sites that sent `Leave`: from here on they cannot help to open the sum.
    """

    header: RoundHeader
    size: int
    salt: int
    bundle: tuple[messages.Keys, ...]
    shares: tuple[messages.Shares, ...]
    submissions: tuple[messages.Submit, ...] = ()
    gone: tuple[SiteId, ...] = ()
    left: tuple[SiteId, ...] = ()


@record("Confirming")
class Confirming(Timed):
    """Waiting for signatures under the one survivor list (U3)."""

    header: RoundHeader
    bundle: tuple[messages.Keys, ...]
    shares: tuple[messages.Shares, ...]
    submissions: tuple[messages.Submit, ...]
    confirms: tuple[messages.Confirm, ...] = ()
    gone: tuple[SiteId, ...] = ()
    left: tuple[SiteId, ...] = ()


@record("Unmasking")
class Unmasking(Timed):
    """Waiting for the key shares of the survivors that confirmed; the others count as `left`."""

    header: RoundHeader
    bundle: tuple[messages.Keys, ...]
    shares: tuple[messages.Shares, ...]
    submissions: tuple[messages.Submit, ...]
    confirms: tuple[messages.Confirm, ...]
    answers: tuple[messages.Unmask, ...] = ()
    gone: tuple[SiteId, ...] = ()
    left: tuple[SiteId, ...] = ()


@record("Summing")
class Summing(Timed):
    """The masks are being taken off the sum. masks: of every survivor, and left by every dropout."""

    header: RoundHeader
    submissions: tuple[messages.Submit, ...]
    masks: tuple[tuple[SecretBytes, int], ...]
    gone: tuple[SiteId, ...] = ()
    left: tuple[SiteId, ...] = ()


@record("Releasing")
class Releasing(Timed):
    """Waiting for the survivors' statements about the sum."""

    header: RoundHeader
    submissions: tuple[messages.Submit, ...]
    aggregate: messages.Aggregate
    statements: tuple[messages.Statement, ...] = ()
    gone: tuple[SiteId, ...] = ()
    left: tuple[SiteId, ...] = ()
    refused: tuple[SiteId, ...] = ()


@record("Released")
class Released:
    """The round ended with a certificate."""

    header: RoundHeader
    certificate: messages.Certificate
    refused: tuple[SiteId, ...] = ()

    @property
    def round(self) -> int:
        """The number used up."""
        return self.header.round


@record("Abandoned")
class Failed:
    """The round ended without one. exposed: sites that may have helped to open its sum; if there are any,
    no other round follows from the same state (PROTOCOL H).

    refused: sites that refused the release; they take part in no further round of this key epoch.
    """

    header: RoundHeader
    stage: str
    left: int
    exposed: tuple[SiteId, ...]
    refused: tuple[SiteId, ...] = ()

    @property
    def round(self) -> int:
        """The number used up."""
        return self.header.round


Exposed = Unmasking | Releasing
"""Stages that end with enough answers, or when too few can still come; never by a deadline alone."""

Waiting = Advertising | Sharing | Collecting | Confirming | Exposed

InRound = Waiting | Summing

Ended = Released | Failed

Between = Ready | Ended

CoordinatorStage = Between | InRound

BETWEEN: tuple[type[Between], ...] = get_args(Between)

IN_ROUND: tuple[type[InRound], ...] = get_args(InRound)

EXPOSED: tuple[type[Exposed], ...] = get_args(Exposed)

ALL: tuple[type[CoordinatorStage], ...] = get_args(CoordinatorStage)

STAGE_NAMES: Mapping[type[CoordinatorStage], str] = {
    Advertising: "keys",
    Sharing: "shares",
    Collecting: "submit",
    Confirming: "confirm",
    Unmasking: "unmask",
    Summing: "unmask",
    Releasing: "release",
}
"""What the coordinator waits for at each stage, in the words of `absences.STAGES`."""
