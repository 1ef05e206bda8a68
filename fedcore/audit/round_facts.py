"""How lines name a round, alike at sites and at the coordinator."""

from fedcore.audit.lines import Fact
from fedcore.secagg.plan import RoundHeader


def place(header: RoundHeader) -> dict[str, Fact]:
    """Which vector of which round. round: of training, as a person counts; number: of the protocol."""
    return {
        "purpose": header.purpose, "round": header.training_round, "number": header.round,
        "header": header.digest.hex(),
    }  # fmt: skip
