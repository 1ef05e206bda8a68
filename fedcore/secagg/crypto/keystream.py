"""The cipher `keystream`: each vector under one more mask, whose seed follows from the sites' secret.

`c_i = v_i + AES-256-CTR(k_i)` in the slot ring, with `k_i = HKDF(G, salt h; site, state tag, s_i)` and a
salt s_i drawn anew for every vector, is additively homomorphic: the sum of the c_i less the streams of the
sites in it is the sum of the v_i (Castelluccia, Mykletun, Tsudik 2005; PROTOCOL X). Every holder of G can
make every stream; the coordinator has no G, and to it one vector and the sum of any are uniform in the ring.

Invariant: a stream key is used for one vector only. The salt alone ensures it: it is 32 bytes of
`Entropy`, never derived, also where a site makes a vector of the same round again.
A stream gives no integrity: what is added to a vector is added to the sum, and the sum tag (`sumtag.py`)
detects it. Streams are added and subtracted with the masks, in one pass (`masking.py`).
"""

from fedcore.secagg.crypto.entropy import Entropy
from fedcore.secagg.crypto.sumtag import GroupSecret
from fedcore.secagg.crypto.symmetric import Label
from fedcore.secagg.plan import SALT_BYTES
from fedcore.types import SiteId


def draw_salt(entropy: Entropy) -> bytes:
    """A fresh salt for one vector: 32 bytes."""
    return entropy.draw(SALT_BYTES)


def stream_key(
    group: GroupSecret, header: bytes, state_tag: bytes, site: SiteId, salt: bytes
) -> bytes:
    """The 32-byte seed of the stream over one site's vector. header: h; state_tag: the site's own."""
    return group.derive_labelled(Label.KEYSTREAM, site.encode(), state_tag, salt, salt=header)
