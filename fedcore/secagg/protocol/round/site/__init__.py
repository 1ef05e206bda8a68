"""A site in a round: `step(member, stage, event, now) -> (stage, effects)`, without input or output.

`MOVES` is the table of legal moves. Any other event raises a typed error and leaves the stage as it was;
the driver then steps with `CheckFailed(error)`, and the site leaves the round (PROTOCOL R): the
coordinator learns that it left, never why.

Invariant (PROTOCOL D): a round number is used once; a site sends one vector, one survivor list and one
answer to unmask in a round, each journalled before it is sent. Requests are idempotent: an identical one
gets the stored answer again, a different one is refused. `replay` of the journal gives the live stage.
Invariant (PROTOCOL H): of one state at most one sum with this site's vector is ever opened with its help.
After it has answered unmask (or begun to open a sum) it is exposed, and joins no other round before it
has a later state.
Bonawitz et al. 2017 (ePrint 2017/281), figure 4, the variant against an active adversary.
"""

from fedcore.secagg.protocol.round.site.between import check_missed as check_missed
from fedcore.secagg.protocol.round.site.entries import *
from fedcore.secagg.protocol.round.site.events import *
from fedcore.secagg.protocol.round.site.machine import *
from fedcore.secagg.protocol.round.site.stages import *
