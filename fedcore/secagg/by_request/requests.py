"""What travels: one request of the coordinator to a site, and its one reply."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fedcore.errors import MalformedMessage

Parts = dict[str, bytes | list[bytes]]
"""A request or reply as named byte strings."""


@dataclass(frozen=True)
class Request:
    """One request. Every field but `training` may be absent.

    terms: `RunTerms.to_bytes`. messages: byte forms of protocol messages, in order. model: 32 bytes, SHA-256 of what
    is trained from. certificate, state: of the last release, for a site that missed it. body: the container of a
    sum. give: whether the site gives the coordinator the sum that it has a certificate for.
    training: what the engine carries to the training function; it is not looked at here.
    """

    terms: bytes = b""
    messages: Sequence[bytes] = ()
    model: bytes = b""
    certificate: bytes = b""
    state: bytes = b""
    body: bytes = field(default=b"", repr=False)
    give: bool = False
    training: object = field(default=None, repr=False)

    def parts(self) -> Parts:
        """All but `body` and `training`, which engines carry in a way of their own."""
        found: Parts = {
            "terms": self.terms, "messages": list(self.messages), "model": self.model,
            "certificate": self.certificate, "state": self.state, "give": b"1" if self.give else b"",
        }  # fmt: skip
        return found

    @classmethod
    def of_parts(cls, parts: Mapping[str, object], body: bytes, model: bytes) -> "Request":
        """The inverse. model: SHA-256 of what this request really carries to the training function, or b"" where it
        carries nothing. Raises MalformedMessage."""
        single = {name: _bytes(parts, name) for name in ("terms", "certificate", "state", "give")}
        return cls(
            single["terms"], _list(parts, "messages"), model or _bytes(parts, "model"),
            single["certificate"], single["state"], body, bool(single["give"]),
        )  # fmt: skip


@dataclass
class SiteReply:
    """One reply. messages: as in a request. refused: one line, where the site takes no part. body: a vector's
    container, or the sum that was asked for. state: the 32-byte digest of the site's state after a release."""

    messages: list[bytes] = field(default_factory=list)
    refused: str = ""
    body: bytes = field(default=b"", repr=False)
    state: bytes = b""

    def parts(self) -> Parts:
        """All but `body`."""
        return {"messages": self.messages, "refused": self.refused.encode(), "state": self.state}

    @classmethod
    def of_parts(cls, parts: Mapping[str, object], body: bytes) -> "SiteReply":
        """The inverse. Raises MalformedMessage."""
        refused = _bytes(parts, "refused").decode(errors="replace")
        return cls(list(_list(parts, "messages")), refused, body, _bytes(parts, "state"))


def _bytes(parts: Mapping[str, object], name: str) -> bytes:
    found = parts.get(name)
    if not isinstance(found, bytes):
        raise MalformedMessage(name, type(found).__name__, "bytes", "the sender")
    return found


def _list(parts: Mapping[str, object], name: str) -> list[bytes]:
    found = parts.get(name)
    if not isinstance(found, list) or not all(isinstance(each, bytes) for each in found):
        raise MalformedMessage(name, type(found).__name__, "a list of bytes", "the sender")
    return found


class Link(Protocol):
    """How the coordinator reaches the sites: an engine, seen from here."""

    def nodes(self) -> Sequence[Hashable]:
        """The engine's nodes that are connected now."""

    def ask(
        self, requests: Mapping[Hashable, Request]
    ) -> Iterator[tuple[Hashable, SiteReply | None]]:
        """Send each node its request, and yield each reply as soon as it is there, one at a time; None for a node
        that does not answer in time or fails."""


RECORD, BODY, STYPE = "fedcore", "fedcore.body", "fedcore.bytes"
"""Names under which an engine of named records carries the parts and the body, and the type of a body's bytes."""
