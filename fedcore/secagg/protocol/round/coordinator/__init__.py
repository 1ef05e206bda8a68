"""The coordinator in a round: `step(hub, stage, event, now) -> (stage, effects)`, without input or output.

It handles signed messages, sizes and digests, never a vector in clear, and holds no secret before the
survivors' answers let it rebuild the masks of one sum. A stage ends when every site it waits for has
answered or left, or at its deadline; with fewer than t sites left the round is abandoned, nothing is
opened, and the next round starts with fresh keys.
After unmask is asked for (under `encrypted`: after the sum is announced) no deadline abandons a round: it
waits until t sites have answered, and a site that left may return. If too few can still answer, the round
ends without a release, and no other round follows it (PROTOCOL H).

Invariant: an upload is folded once, U3 is journalled before it is sent, and of each site exactly one kind
of secret is asked for. `replay` of the journal gives the live stage.
Bonawitz et al. 2017 (ePrint 2017/281), figure 4.
"""

from fedcore.secagg.protocol.round.coordinator.closing import rebuild_masks as rebuild_masks
from fedcore.secagg.protocol.round.coordinator.entries import *
from fedcore.secagg.protocol.round.coordinator.events import *
from fedcore.secagg.protocol.round.coordinator.machine import *
from fedcore.secagg.protocol.round.coordinator.stages import *
from fedcore.secagg.protocol.round.coordinator.taking import ahead_of as ahead_of
