"""Identities of a simulation, in which one process stands for all sites: keys that follow from a site's place.

Anyone can compute them. No site on a machine of its own may use them, and none accepts another's: it pins the keys of
its own file.
"""

import hashlib

from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.types import SiteId

FEDERATION = "simulation"
"""The federation of these sites."""


def simulated_identities(sites: int) -> dict[SiteId, IdentityKey]:
    """site-0 to site-(n - 1), as `fedcore simulate` calls the sites of a Flower app, in this order."""
    return {
        SiteId(f"site-{place}"): IdentityKey(
            hashlib.sha256(b"fedcore/1 simulated identity %d" % place).digest()
        )
        for place in range(sites)
    }
