"""Key shares: a 32-byte secret split into n, any t of which rebuild it; t - 1 reveal nothing.

The secret is the value at 0 of a polynomial of degree t - 1 over the field of p = 2^256 + 297, the
smallest prime above every 32-byte secret; share k is its value at x = k + 1 (Shamir 1979).
Invariant: what `combine` returns is on one polynomial of degree below t with *all* the shares given.
It cannot detect a wrong share among exactly t; `protocol/` checks each against its signed digest, and the
rebuilt secret against its public key or hash.

Plain integer arithmetic, not in constant time: `split` runs at the secret's owner, and `combine` where the
secret becomes known anyway.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce

from fedcore.errors import BadInput, ShareRefused, ThresholdRefused

PRIME = (1 << 256) + 297
SECRET_BYTES = 32
SHARE_BYTES = 33
MAX_SHARES = 255

_DRAW_BYTES = 48
"""Per coefficient: 384 bits reduced mod p are uniform to within 2^-128."""


def split(secret: bytes, threshold: int, count: int, draw: Callable[[int], bytes]) -> list[bytes]:
    """`count` shares of 33 bytes, little-endian, at x = 1 to `count`.

    draw(48) gives each coefficient, of x first, of x^(threshold - 1) last; the last may be zero, or
    t - 1 shares would exclude one secret. Raises BadInput, ThresholdRefused outside 2 to count <= 255.
    """
    if len(secret) != SECRET_BYTES:
        raise BadInput(f"key shares: found a secret of {len(secret)} bytes, expected 32")
    if not 2 <= threshold <= count <= MAX_SHARES:
        found, expected = f"{threshold} of {count}", f"at least 2 of at most {MAX_SHARES}"
        raise ThresholdRefused("key shares", found, expected, "this site")
    drawn = (int.from_bytes(draw(_DRAW_BYTES), "little") % PRIME for _ in range(threshold - 1))
    coefficients = [int.from_bytes(secret, "little"), *drawn]
    return [_evaluate(coefficients, x).to_bytes(SHARE_BYTES, "little") for x in range(1, count + 1)]


def combine(shares: Mapping[int, bytes], threshold: int, *, owner: str) -> bytes:
    """The secret, 32 bytes, of shares {x: share}, x from 1; owner: the site that it belongs to.

    The first `threshold` in ascending x are used, and every further one must lie on their polynomial.
    Raises ShareRefused for that, too few shares, an x outside 1 to 255, a share of another length or not
    below p, and a secret of more than 32 bytes.
    """
    if len(shares) < threshold:
        raise _refused(owner, f"{len(shares)} shares", f"at least {threshold}", "coordinator")
    points = sorted(shares)
    if points[0] < 1 or points[-1] > MAX_SHARES:
        raise _refused(
            owner, f"x from {points[0]} to {points[-1]}", f"1 to {MAX_SHARES}", "coordinator"
        )
    values = [_read(shares[x], x, owner) for x in points]
    at = _interpolate(points[:threshold], values[:threshold])
    for x, value in zip(points[threshold:], values[threshold:], strict=True):
        if at(x) != value:
            raise _refused(
                owner, "shares of no one polynomial", f"one of degree below {threshold}", owner
            )
    secret = at(0)
    if secret >> (8 * SECRET_BYTES):
        raise _refused(owner, "a secret of more than 32 bytes", "32 bytes", owner)
    return secret.to_bytes(SECRET_BYTES, "little")


def _evaluate(coefficients: Sequence[int], x: int) -> int:
    # Reduced once, at the end: x is small, so the value grows by 8 bits a term, and dividing costs more.
    return reduce(lambda value, each: value * x + each, reversed(coefficients), 0) % PRIME


def _interpolate(points: Sequence[int], values: Sequence[int]) -> Callable[[int], int]:
    """Lagrange's polynomial through (points, values), to be evaluated at x outside `points`.

    `f(x) = sum_i y_i / d_i * prod_(j != i) (x - x_j)` with `d_i = prod_(j != i) (x_i - x_j)`. The d_i are
    small exact integers, so they are brought to one denominator, and only that is inverted mod p.
    """
    divisors = [math.prod(x - other for other in points if other != x) for x in points]
    common = math.lcm(*divisors)
    scaled = [y * (common // d) for y, d in zip(values, divisors, strict=True)]
    inverse = pow(common, -1, PRIME)  # p is larger than any factor of it

    def at(x: int) -> int:
        product = math.prod(x - other for other in points)
        total = sum(y * (product // (x - other)) for y, other in zip(scaled, points, strict=True))
        return total * inverse % PRIME

    return at


def _read(share: bytes, x: int, owner: str) -> int:
    if len(share) != SHARE_BYTES:
        raise _refused(owner, f"{len(share)} bytes at x = {x}", f"{SHARE_BYTES} bytes", owner)
    value = int.from_bytes(share, "little")
    if value >= PRIME:
        raise _refused(owner, f"a value at x = {x} beyond the field", "one below p", owner)
    return value


def _refused(owner: str, found: str, expected: str, fault: str) -> ShareRefused:
    return ShareRefused(f"key shares of {owner}", found, expected, fault)
