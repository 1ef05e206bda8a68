"""Where the run's randomness comes from: one function of (seed, round, site, purpose).

Invariant: the same four words always give the same numbers, whatever ran before, in whatever order or
process. Only training, rounding and splits draw from here: nothing under `secagg/crypto/` may (PROTOCOL Z).
"""

import hashlib

import numpy as np


def derive_seed(seed: int, round_: int, site: str, purpose: str) -> int:
    """A 63-bit seed: the first bytes of SHA-256 over the four words, each with its length."""
    words = (str(seed), str(round_), site, purpose)
    text = "".join(f"{len(word)}:{word}," for word in words)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, round_: int, site: str, purpose: str) -> np.random.Generator:
    """A counter-based NumPy generator (Philox) for these four words."""
    return np.random.Generator(np.random.Philox(derive_seed(seed, round_, site, purpose)))
