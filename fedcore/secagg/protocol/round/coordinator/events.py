"""The parameters and the events of the coordinator's machine of a round."""

from collections.abc import Mapping
from dataclasses import dataclass

from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol import messages
from fedcore.secagg.protocol.moves import Restarted, Tick
from fedcore.types import SiteId


@dataclass(frozen=True)
class CoordinatorParams:
    """What the coordinator knows of a job. pins: {site: Ed25519 public key}; timeout: seconds a stage
    waits for silent sites before it goes on without them.

    enough: over-selection: so many vectors (and at least t) end the wait for vectors; 0 for all.
    """

    pins: Mapping[SiteId, bytes]
    timeout: float = 600.0
    enough: int = 0


@dataclass(frozen=True)
class Start:
    """Begin a round. size: bytes of one protected vector, salt: of the salt beside it, which both follow
    from the plan. keys: of every site of its roster, sent ahead; or none, and they are asked for."""

    header: RoundHeader
    size: int
    salt: int = 0
    keys: tuple[messages.Keys, ...] = ()


@dataclass(frozen=True)
class MessageFromSite:
    """A message of an authenticated site."""

    sender: SiteId
    message: messages.SiteMessage


@dataclass(frozen=True)
class Uploaded:
    """A vector arrived whole: what the site signed, and what its chunks really hash to."""

    sender: SiteId
    submit: messages.Submit
    digest: bytes
    size: int


@dataclass(frozen=True)
class Gone:
    """A site will not send any more at this stage. for_good: it is in this round no longer, as it says
    itself; else its connection is lost, and a round that has to be released takes it back."""

    site: SiteId
    for_good: bool = False


@dataclass(frozen=True)
class SumReady:
    """The masks are off the sum and it is spooled: its digest and size."""

    digest: bytes
    size: int


@dataclass(frozen=True)
class SiteReconnected:
    """A site is back: it gets again what this stage has for it."""

    site: SiteId


CoordinatorEvent = (
    Start | MessageFromSite | Uploaded | Gone | Tick | SumReady | Restarted | SiteReconnected
)
