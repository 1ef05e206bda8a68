"""Key epochs: how the sites come to share one secret that the coordinator only carries (PROTOCOL E).

One site, the maker, makes the payload (BFV secret key and group secret G) and seals it for every other
site under keys that each signed for this epoch alone. A rostered late joiner gets the same payload from
any holder, and believes it only if at least t sites signed its key id.
Both roles are here, as in a round: `step_site` and `step_hub`, without input or output.

Invariant: epochs only grow at a site; a payload is installed only if the pinned sender signed the grant
for this site's own key of this epoch, roster and plan, and its key id is SHA-256("key id" || payload).
"""

from fedcore.secagg.protocol.epoch.coordinator import *
from fedcore.secagg.protocol.epoch.messages import *
from fedcore.secagg.protocol.epoch.site import *
