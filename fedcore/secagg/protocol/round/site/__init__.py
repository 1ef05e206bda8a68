"""A site in a round: `step(member, stage, event, now) -> (stage, effects)`, without input or output.

The stages hold only what is true in them; `MOVES` is the table of legal moves. Anything else raises a
typed error and leaves the stage as it was; the shell then steps with `Refused(error)`, which leaves the
round in the way PROTOCOL R allows: the coordinator learns that this site left, never why.

Invariant (PROTOCOL D): a round number is used once; one vector, one survivor list and one answer to
unmask leave this site in a round, each journalled before it is sent; an identical request gets the
stored bytes again, a different one is refused. `replay` of the journal gives the live stage.
Invariant (PROTOCOL H): of the state that a site stands at, at most one sum that holds its vector is ever
opened with its help. Once it has answered unmask (or begins to open a sum) it is exposed, and joins no
other round until that state is behind it.
Bonawitz et al. 2017 (ePrint 2017/281), figure 4, the variant against an active adversary.
"""

from fedcore.secagg.protocol.round.site.between import check_missed as check_missed
from fedcore.secagg.protocol.round.site.events import *
from fedcore.secagg.protocol.round.site.journal import *
from fedcore.secagg.protocol.round.site.machine import *
from fedcore.secagg.protocol.round.site.stages import *
