"""How lines name a round, alike at sites and at the coordinator."""

from fedcore.audit.lines import Fact
from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol.messages import Certificate


def place(header: RoundHeader) -> dict[str, Fact]:
    """Which vector of which round. round: of training, as a person counts; number: of the protocol."""
    return {
        "purpose": header.purpose, "round": header.training_round, "number": header.round,
        "header": header.digest.hex(),
    }  # fmt: skip


def release(certificate: Certificate) -> dict[str, Fact]:
    """A release: its certificate, whose sum it is, and who signed it."""
    return place(certificate.header) | {
        "certificate_hash": certificate.hash, "survivors": certificate.survivors,
        "signed_by": tuple(site for site, _ in certificate.signatures),
    }  # fmt: skip
