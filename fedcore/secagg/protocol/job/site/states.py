"""A site's state of the job: the current one, those that a release may lead to, and which secret proves them.

Invariant (PROTOCOL V): a candidate becomes the current state only under the one certificate it is held
for, and only after its HMAC was computed anew under the G of that certificate's key epoch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from fedcore.errors import ReleaseRefused, StoreProblem
from fedcore.secagg.crypto.sumtag import GroupSecret, state_mac
from fedcore.secagg.plan import RoundHeader, canonical
from fedcore.secagg.protocol.job.effects import PutValues
from fedcore.secagg.protocol.job.site.effects import AdoptState, SiteEffect, State
from fedcore.secagg.protocol.messages import COORDINATOR, Certificate
from fedcore.secagg.protocol.wire_form import encode
from fedcore.types import SiteId


def name_of(certificate: Certificate) -> str:
    """What a state is held under until it is certified: no other certificate can make it the state."""
    return certificate.hash


def led_to(header: RoundHeader, survivors: tuple[SiteId, ...], sum_mac: bytes, mac: bytes) -> str:
    """The name of the state that a sum leads to: the certificate's signatures are not in its hash."""
    return name_of(Certificate(header, survivors, sum_mac, mac, ()))


def require_certified(mac: bytes, certificate: Certificate) -> None:
    """Raise ReleaseRefused for a state of another HMAC than the certificate's."""
    if mac != certificate.state_mac:
        raise ReleaseRefused(
            "state", found="one of another HMAC", expected="the certified one", fault=COORDINATOR
        )


@dataclass(frozen=True)
class Candidate:
    """The state that a release may lead to. data: its bytes, where the journal has them with whatever relies
    on it; b"" where they are in a file."""

    state: State
    data: bytes


class StateKeeper:
    """The states of one job at a site, as plain values: `AdoptState` and `PutValues` say what the disk gets."""

    def __init__(self) -> None:
        self.current: State | None = None
        self.certificate: Certificate | None = None
        """Of the release that the current state is of."""
        self.candidates: dict[str, Candidate] = {}
        """By `name_of` the one certificate that can make it the state; a release drops all of them."""
        self.groups: dict[str, str] = {}
        """G of every key epoch here, in hex: a certificate is checked under the G of its own epoch."""

    def learn_group(
        self, epoch: int, group: GroupSecret, *, installed: bool
    ) -> Iterator[SiteEffect]:
        """Remember the G of a key epoch. installed: it is in use here, so it replaces what a checkpoint said."""
        if installed or str(epoch) not in self.groups:
            self.groups[str(epoch)] = group.to_bytes().hex()
        yield PutValues({"groups": canonical(self.groups)})

    def group_of(self, certificate: Certificate) -> GroupSecret | None:
        """The G under which this certificate was made; None where it is not known here."""
        kept = self.groups.get(str(certificate.header.epoch))
        return None if kept is None else GroupSecret.from_bytes(bytes.fromhex(kept))

    def hold(self, name: str, state: State, data: bytes) -> None:
        """Hold a state until a release makes it the current one."""
        self.candidates[name] = Candidate(state, data)

    def beside_statement(self, name: str) -> dict[str, bytes]:
        """What the journal gets with this site's statement of a sum."""
        return {"candidate": encode((name, self._candidate(name).data))}

    def beside_release(self, certificate: Certificate) -> dict[str, bytes]:
        """What the journal gets with the record of a release."""
        data = self._candidate(name_of(certificate)).data
        return {"certificate": encode(certificate), "state": data}

    def check(self, certificate: Certificate) -> None:
        """Compute the HMAC of the state that this certificate releases anew. Raises ReleaseRefused."""
        state, group = self._candidate(name_of(certificate)).state, self.group_of(certificate)
        header = certificate.header.digest
        mac = b"" if group is None else state_mac(group, header, state.canonical())
        require_certified(mac, certificate)

    def adopt(self, certificate: Certificate) -> Iterator[SiteEffect]:
        """The release is proved: its state is the current one."""
        name = name_of(certificate)
        found = self._candidate(name)
        self.current, self.certificate, self.candidates = found.state, certificate, {}
        yield AdoptState(name, found.data)

    def _candidate(self, name: str) -> Candidate:
        found = self.candidates.get(name)
        if found is None:
            raise StoreProblem(
                "states: found the state of a release gone, expected it until the round is over",
                remedy="check the disk; nothing but this site may remove files from its folder",
            )
        return found
