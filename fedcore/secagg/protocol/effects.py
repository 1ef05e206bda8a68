"""The effects of a machine, to be carried out by its driver in this order (PROTOCOL D).

Invariant: a `Persist` stands before every `Send` or `Upload` that relies on it, and the driver does not
start an effect before the last one is done (for `Persist`: on disk). Secrets are in `Persist`
and in `MakeVector` and `RemoveMasks`, which stay in the process; never in a `Send`.
"""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol.messages import Certificate, Notice, Submit
from fedcore.types import SiteId

Entry_co = TypeVar("Entry_co", covariant=True)
Message_co = TypeVar("Message_co", covariant=True)

Mask = tuple[SecretBytes, int]
"""(seed, sign) of one mask over a whole vector: +1 is added, -1 subtracted."""


@dataclass(frozen=True)
class Persist(Generic[Entry_co]):
    """Append the record to the journal; done when it would survive a crash."""

    record: Entry_co


@dataclass(frozen=True)
class Send(Generic[Message_co]):
    """Send a message to one site, or to the coordinator. Sending the same one again is harmless."""

    to: str
    message: Message_co


@dataclass(frozen=True)
class Warn:
    """Write a warning to the local log."""

    text: str


@dataclass(frozen=True)
class MakeVector:
    """Train, quantise, pack, tag, add the masks, encrypt, spool; the result is `VectorMade`."""

    header: RoundHeader
    state_tag: bytes
    masks: tuple[Mask, ...] = field(repr=False)


@dataclass(frozen=True)
class Upload:
    """Send the spooled chunks of the vector with this digest."""

    submit: Submit


@dataclass(frozen=True)
class OpenSum:
    """Download, decrypt, check the tag against the survivors; the result is `SumOpened` or
    `CheckFailed`.

    salts: of the survivors' keystreams, in their order; each b"" under any other cipher.
    """

    header: RoundHeader
    survivors: tuple[SiteId, ...]
    salts: tuple[bytes, ...]
    state_tag: bytes
    digest: bytes
    size: int


@dataclass(frozen=True)
class ShowNotice:
    """Unseal why another site refused the release, for this site's own log."""

    notice: Notice


@dataclass(frozen=True)
class Apply:
    """Make the state that the opened sum led to the site's own."""

    certificate: Certificate


@dataclass(frozen=True)
class Erase:
    """Remove the round's secrets and spooled vector from memory and disk."""

    header: RoundHeader


@dataclass(frozen=True)
class FoldUpload:
    """Add one complete, verified upload to the running sum, once."""

    submit: Submit


@dataclass(frozen=True)
class Rebuild:
    """Make the running sum anew from the spool, of exactly these uploads."""

    submissions: tuple[Submit, ...]


@dataclass(frozen=True)
class RemoveMasks:
    """Subtract these masks from the running sum (none under `encrypted`); the result is
    `SumReady`."""

    header: RoundHeader
    survivors: tuple[SiteId, ...]
    masks: tuple[Mask, ...] = field(repr=False)


@dataclass(frozen=True)
class Discard:
    """Remove the round's spooled uploads and sum."""

    header: RoundHeader
