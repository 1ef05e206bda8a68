"""A trail with some lines, and its bytes."""

import pytest

from fedcore.audit.keys import SiteSigner, site_key
from fedcore.audit.trail import TRAIL_FILE, AuditTrail
from fedcore.secagg.crypto.identity_key import IdentityKey

KEY = IdentityKey(bytes(range(32)))


def written(folder, lines=12, key=KEY):
    """The bytes of a trail with so many lines."""
    with AuditTrail.open(folder, SiteSigner(key), {"party": "site va"}, now=lambda: 1.8e9) as trail:
        for number in range(2, lines + 1):
            trail.record("sent", job="heart-1", round=number, bytes=4096, sha256="ab" * 32)
    return (folder / TRAIL_FILE).read_bytes()


@pytest.fixture(scope="session")
def trail(tmp_path_factory):
    """The bytes of twelve lines."""
    return written(tmp_path_factory.mktemp("trail"))


@pytest.fixture(scope="session")
def trusted():
    """The key of the trail."""
    return {site_key(KEY.public)}
