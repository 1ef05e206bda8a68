"""From a float update to the slots of the ring and back: quantise -> limbs -> pack, each with its inverse.

Invariant: *n sites x largest field value < field modulus*, so the sum of n encoded vectors never wraps
and equals the plain integer sum of their fields, bit for bit.
"""
