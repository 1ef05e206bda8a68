"""The coordinator in a round: `step(hub, stage, event, now) -> (stage, effects)`, the other machine.

It sees signed messages, sizes and digests, never a vector in clear, and holds no secret until the
survivors' answers let it rebuild the masks of one sum. Each stage ends when everybody it waits for has
answered or left, or at its deadline; with fewer than t sites left the round is abandoned, nothing is
opened, and the next one starts with fresh keys.
Once unmask is asked for (under `encrypted`: once the sum is announced) no deadline abandons a round: it
waits until t sites answered, and a site that went may come back. Only where too few can still answer does
the round end without a release, and then no other one follows it (PROTOCOL H).

Invariant: an upload is folded once, U3 is journalled before anybody hears of it, and each site's
secret of exactly one kind is asked for. `replay` of the journal gives the live stage.
Bonawitz et al. 2017 (ePrint 2017/281), figure 4.
"""

from fedcore.secagg.protocol.round.coordinator.events import *
from fedcore.secagg.protocol.round.coordinator.journal import *
from fedcore.secagg.protocol.round.coordinator.machine import *
from fedcore.secagg.protocol.round.coordinator.stages import *
from fedcore.secagg.protocol.round.coordinator.unmasking import rebuild_masks as rebuild_masks
