"""A site's states of a job: the current one, those that a release may lead to, and the secret that proves them.

Invariant (PROTOCOL V): a candidate becomes the current state only under the one certificate it is held for, and
only after its HMAC was recomputed under the G of that certificate's key epoch.
"""

from fedcore.errors import ReleaseRefused, StoreProblem
from fedcore.learning.state import JobState
from fedcore.secagg.crypto.sumtag import GroupSecret, state_mac
from fedcore.secagg.plan import RoundHeader, canonical
from fedcore.secagg.protocol.job import effects
from fedcore.secagg.protocol.job.effects import SiteEffects
from fedcore.secagg.protocol.messages import COORDINATOR, Certificate
from fedcore.secagg.protocol.wire_form import encode
from fedcore.types import SiteId


def name_of(certificate: Certificate) -> str:
    """The name of a candidate: the hash of the only certificate that can make it the current state."""
    return certificate.hash


def led_to(header: RoundHeader, survivors: tuple[SiteId, ...], sum_mac: bytes, mac: bytes) -> str:
    """The name of the state that a sum leads to: the certificate's signatures are not in its hash."""
    return name_of(Certificate(header, survivors, sum_mac, mac, ()))


def require_certified(mac: bytes, certificate: Certificate) -> None:
    """Raise ReleaseRefused for a state of another HMAC than the certificate's."""
    if mac != certificate.state_mac:
        raise ReleaseRefused("state", "one of another HMAC", "the certified one", COORDINATOR)


class StateKeeper:
    """The states of one job at a site, in memory; effects write them to disk."""

    def __init__(self) -> None:
        self.current: JobState | None = None
        self.certificate: Certificate | None = None
        """The certificate that released the current state."""
        self.candidates: dict[str, tuple[JobState, bytes]] = {}
        """{name_of(certificate): a state that the release may lead to, and its bytes for the journal, b"" where they
        are in a file}; a release drops all of them."""
        self.groups: dict[str, str] = {}
        """{key epoch: its G in hex}: a certificate is checked under the G of its own epoch."""

    def learn_group(self, epoch: int, group: GroupSecret, *, installed: bool) -> SiteEffects:
        """Keep the G of a key epoch. installed: it is in use here, so it replaces one of a checkpoint."""
        if installed or str(epoch) not in self.groups:
            self.groups[str(epoch)] = group.to_bytes().hex()
        yield effects.PutValues({"groups": canonical(self.groups)})

    def group_of(self, certificate: Certificate) -> GroupSecret | None:
        """The G of this certificate's key epoch; None where it is not known here."""
        kept = self.groups.get(str(certificate.header.epoch))
        return None if kept is None else GroupSecret.from_bytes(bytes.fromhex(kept))

    def hold(self, name: str, state: JobState, data: bytes) -> None:
        self.candidates[name] = state, data

    def beside_statement(self, name: str) -> dict[str, bytes]:
        return {"candidate": encode((name, self._candidate(name)[1]))}

    def beside_release(self, certificate: Certificate) -> dict[str, bytes]:
        _, data = self._candidate(name_of(certificate))
        return {"certificate": encode(certificate), "state": data}

    def check(self, certificate: Certificate) -> None:
        """Recompute the HMAC of the state that this certificate releases. Raises ReleaseRefused."""
        state, _ = self._candidate(name_of(certificate))
        header, group = certificate.header.digest, self.group_of(certificate)
        mac = b"" if group is None else state_mac(group, header, state.canonical())
        require_certified(mac, certificate)

    def adopt(self, certificate: Certificate) -> SiteEffects:
        name = name_of(certificate)
        self.current, data = self._candidate(name)
        self.certificate, self.candidates = certificate, {}
        yield effects.AdoptState(name, data)

    def _candidate(self, name: str) -> tuple[JobState, bytes]:
        found = self.candidates.get(name)
        if found is None:
            raise StoreProblem(
                "states: found the state of a release gone, expected it until the round is over",
                remedy="check the disk; nothing but this site may remove files from its folder",
            )
        return found
