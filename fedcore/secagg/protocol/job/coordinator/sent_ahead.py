"""What sites send for a round before it is announced (docs/decisions/0037-shares-are-sent-ahead.md)."""

from dataclasses import dataclass, field

from fedcore.secagg.plan import RoundHeader
from fedcore.secagg.protocol import messages
from fedcore.secagg.protocol.messages import survivors_of
from fedcore.secagg.protocol.round import coordinator
from fedcore.secagg.protocol.wire_form import digest
from fedcore.types import SiteId


@dataclass
class SentAhead:
    """What sites sent for the round after the one under way, the last of each. Not on disk: without it keys and shares
    are asked for.

    announced: public keys, sent with the confirmation. passed_on: they were sent to all survivors, so shares may be
    sealed for them.
    """

    keys: dict[SiteId, messages.Keys] = field(default_factory=dict)
    shares: dict[SiteId, messages.Shares] = field(default_factory=dict)
    announced: dict[SiteId, messages.NextKeys] = field(default_factory=dict)
    passed_on: bool = False

    def bundle(self, stage: coordinator.Unmasking) -> messages.NextBundle | None:
        """The announced keys of all survivors, once; None while one is missing, or is not what its site confirmed."""
        signed = {confirm.site: confirm.next for confirm in stage.confirms}
        found = [self.announced.get(site) for site in survivors_of(stage.submissions)]
        keys = tuple(k for k in found if k is not None and digest(k) == signed.get(k.site))
        if self.passed_on or len(keys) < len(found):
            return None
        self.passed_on = True
        return messages.NextBundle(stage.header.digest, keys)

    def for_round(
        self, hub: coordinator.CoordinatorParams, header: RoundHeader
    ) -> tuple[tuple[messages.Keys, ...], list[messages.Shares]]:
        """The keys with which a round can begin, none unless each of its sites sent them; and the shares so far.

        None, too, where a site's keys are not those that it announced: the others have sealed shares for these, and
        would refuse. It was restarted in between.
        """
        keys = coordinator.ahead_of(hub, header, self.keys)
        if self.passed_on and any(self.announced[k.site].public != k.public for k in keys):
            return (), []
        mine = [self.shares[k.site] for k in keys if k.site in self.shares]
        return keys, [each for each in mine if each.head.header == header.digest]
