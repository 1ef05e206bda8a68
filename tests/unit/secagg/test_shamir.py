"""Key shares: round trips, what t - 1 of them say, a second implementation, and shares that are refused."""

from __future__ import annotations

import itertools
import os

import pytest
import shamirs
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import BadInput, ShareRefused, ThresholdRefused
from fedcore.secagg.crypto.shamir import PRIME, SHARE_BYTES, combine, split

SECRET = bytes(range(100, 132))


def dealt(threshold: int, count: int, secret: bytes = SECRET) -> dict[int, bytes]:
    return dict(enumerate(split(secret, threshold, count, os.urandom), start=1))


def share(value: int) -> bytes:
    return value.to_bytes(SHARE_BYTES, "little")


def drawing(*values: int):
    """A source that gives these coefficients, and fails when asked for more or for another length."""
    source = iter(values)

    def draw(length: int) -> bytes:
        return next(source).to_bytes(length, "little")

    return draw


def lagrange_at(points: dict[int, int], x: int) -> int:
    """The textbook formula, one modular inverse per term."""
    total = 0
    for one, y in points.items():
        term = y
        for other in points.keys() - {one}:
            term = term * (x - other) * pow(one - other, -1, PRIME) % PRIME
        total += term
    return total % PRIME


def coefficients_through(points: dict[int, int]) -> list[int]:
    """The polynomial through (points) in Newton's form, multiplied out."""
    found, basis = [0] * len(points), [1]
    for x, y in points.items():
        at = [pow(x, power, PRIME) for power in range(len(points))]
        value = sum(a * b for a, b in zip(found, at, strict=True))
        step = (y - value) * pow(sum(a * b for a, b in zip(basis, at, strict=False)), -1, PRIME)
        for power, factor in enumerate(basis):
            found[power] = (found[power] + step * factor) % PRIME
        basis = [(a - x * b) % PRIME for a, b in zip([0, *basis], [*basis, 0], strict=True)]
    return found


# ------------------------------------------------------------------------------------- the field


def is_prime(number: int) -> bool:
    """Miller and Rabin, 40 bases: a composite passes with probability below 2^-80."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in range(2, 42):
        power = pow(base, odd, number)
        if power not in {1, number - 1} and all(
            pow(power, 1 << k, number) != number - 1 for k in range(1, twos)
        ):
            return False
    return True


def test_the_field_is_that_of_the_smallest_prime_above_32_bytes():
    assert is_prime(PRIME)
    assert not any(is_prime(number) for number in range(2**256, PRIME))
    assert is_prime(2**255 - 19)  # the control of the test itself
    assert not is_prime((2**61 - 1) * (2**31 - 1))


# ------------------------------------------------------------------------------------ round trips


@st.composite
def cohorts(draw):
    count = draw(st.integers(2, 12))
    threshold = draw(st.integers(2, count))
    chosen = draw(st.permutations(range(1, count + 1)))
    return threshold, count, chosen[: draw(st.integers(threshold, count))]


@given(secret=st.binary(min_size=32, max_size=32), cohort=cohorts())
def test_any_t_or_more_shares_in_any_order_give_the_secret(secret, cohort):
    threshold, count, chosen = cohort
    shares = dealt(threshold, count, secret)
    assert {len(one) for one in shares.values()} == {SHARE_BYTES}
    assert combine({x: shares[x] for x in chosen}, threshold, owner="ann") == secret


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32], ids=["least", "largest"])
@pytest.mark.parametrize(("threshold", "count"), [(2, 2), (3, 3), (43, 64), (64, 64), (2, 255)])
def test_extreme_secrets_and_cohorts(secret, threshold, count):
    shares = dealt(threshold, count, secret)
    assert combine(shares, threshold, owner="ann") == secret
    last = dict(itertools.islice(reversed(shares.items()), threshold))
    assert combine(last, threshold, owner="ann") == secret


def test_every_subset_of_a_small_cohort():
    shares = dealt(3, 5)
    for size in range(6):
        for chosen in itertools.combinations(shares, size):
            given_shares = {x: shares[x] for x in chosen}
            if size < 3:
                with pytest.raises(ShareRefused):
                    combine(given_shares, 3, owner="ann")
            else:
                assert combine(given_shares, 3, owner="ann") == SECRET


def test_shares_are_the_polynomial_with_the_coefficients_in_the_order_they_were_drawn():
    secret = int.from_bytes(SECRET, "little")
    shares = split(SECRET, 4, 5, drawing(5, PRIME - 1, 7 * PRIME + 11))
    expected = [(secret + 5 * x - x**2 + 11 * x**3) % PRIME for x in range(1, 6)]
    assert shares == [share(value) for value in expected]


def test_draws_have_48_bytes_and_there_is_one_less_than_the_threshold():
    asked = []

    def draw(length: int) -> bytes:
        asked.append(length)
        return os.urandom(length)

    split(SECRET, 5, 7, draw)
    assert asked == [48] * 4


# ------------------------------------------------------------------------- what too few shares say


@given(other=st.binary(min_size=32, max_size=32), threshold=st.integers(2, 6))
def test_one_share_less_fits_every_secret_equally(other, threshold):
    # For any other secret there is exactly one choice of coefficients with the very same t - 1 shares:
    # an observer of those learns nothing, provided that no coefficient is excluded when drawing.
    shares = split(SECRET, threshold, threshold + 2, os.urandom)
    seen = {x + 1: int.from_bytes(shares[x], "little") for x in range(threshold - 1)}
    constant, *coefficients = coefficients_through({0: int.from_bytes(other, "little"), **seen})
    assert constant == int.from_bytes(other, "little")
    again = split(other, threshold, threshold + 2, drawing(*coefficients))
    assert again[: threshold - 1] == shares[: threshold - 1]
    assert again[threshold - 1] != shares[threshold - 1] or other == SECRET


@given(cohort=cohorts())
def test_combining_is_the_textbook_formula(cohort):
    threshold, count, chosen = cohort
    points = dealt(threshold, count)
    chosen = sorted(chosen)[:threshold]
    found = lagrange_at({x: int.from_bytes(points[x], "little") for x in chosen}, 0)
    assert found.to_bytes(32, "little") == combine(
        {x: points[x] for x in chosen}, threshold, owner="a"
    )


def test_the_last_coefficient_may_be_zero():
    # A split that excluded it would tell the holders of t - 1 shares one secret that it is not.
    assert split(SECRET, 3, 3, drawing(0, 0)) == [SECRET + b"\x00"] * 3


def test_too_few_shares_interpolate_to_something_else():
    shares = dealt(4, 6)
    assert combine(shares, 4, owner="ann") == SECRET
    three = {x: int.from_bytes(shares[x], "little") for x in (1, 2, 3)}
    assert lagrange_at(three, 0) != int.from_bytes(SECRET, "little")


def test_two_splits_of_one_secret_share_no_share():
    assert not set(dealt(3, 5).values()) & set(dealt(3, 5).values())


# -------------------------------------------------------------------- against a second Shamir


@given(secret=st.binary(min_size=32, max_size=32), cohort=cohorts())
def test_shamirs_of_pypi_combines_ours(secret, cohort):
    threshold, count, chosen = cohort
    ours = dealt(threshold, count, secret)
    theirs = [shamirs.share(x, int.from_bytes(ours[x], "little"), PRIME) for x in chosen]
    found = shamirs.interpolate(theirs, threshold=threshold)
    assert found == int.from_bytes(secret, "little")


@given(secret=st.binary(min_size=32, max_size=32), cohort=cohorts())
def test_we_combine_those_of_shamirs_of_pypi(secret, cohort):
    threshold, count, chosen = cohort
    number = int.from_bytes(secret, "little")
    dealt_there = shamirs.shares(number, quantity=count, modulus=PRIME, threshold=threshold)
    theirs = {one.index: share(one.value) for one in dealt_there}
    assert combine({x: theirs[x] for x in chosen}, threshold, owner="ann") == secret


# --------------------------------------------------------------------------------------- refusals


@given(
    wrong=st.integers(1, 7), delta=st.integers(1, PRIME - 1), others=st.permutations(range(1, 8))
)
def test_one_wrong_share_among_more_than_the_threshold_is_found(wrong, delta, others):
    shares = dealt(4, 7)
    spoiled = shares | {wrong: share((int.from_bytes(shares[wrong], "little") + delta) % PRIME)}
    chosen = {wrong, *others[:5]}
    with pytest.raises(ShareRefused, match="no one polynomial") as refused:
        combine({x: spoiled[x] for x in chosen}, 4, owner="ann")
    assert refused.value.fault == "ann"
    assert combine({x: shares[x] for x in chosen}, 4, owner="ann") == SECRET


def test_two_shares_under_each_others_number_are_found():
    shares = dealt(3, 4)
    with pytest.raises(ShareRefused, match="no one polynomial"):
        combine(shares | {1: shares[2], 2: shares[1]}, 3, owner="ann")


def test_shares_of_two_splits_of_one_secret_do_not_mix():
    one, two = dealt(3, 5), dealt(3, 5)
    with pytest.raises(ShareRefused, match="no one polynomial"):
        combine({1: one[1], 2: one[2], 3: two[3], 4: two[4]}, 3, owner="ann")


def replaced(shares: dict[int, bytes], x: int, with_x: int, value: bytes) -> dict[int, bytes]:
    return {with_x if k == x else k: value if k == x else v for k, v in shares.items()}


GOOD = dealt(3, 4)
BEYOND = {x: share((2**256 + 5 + 3 * x + 8 * x**2) % PRIME) for x in (1, 2, 3)}
REFUSED = {
    "too few": ({1: GOOD[1], 2: GOOD[2]}, "2 shares", "coordinator"),
    "none": ({}, "0 shares", "coordinator"),
    "x of zero": (replaced(GOOD, 1, 0, GOOD[1]), "x from 0", "coordinator"),
    "x below zero": (replaced(GOOD, 1, -1, GOOD[1]), "x from -1", "coordinator"),
    "x too large": (replaced(GOOD, 4, 256, GOOD[4]), "to 256", "coordinator"),
    "short": (replaced(GOOD, 2, 2, GOOD[2][:-1]), "32 bytes at x = 2", "ann"),
    "long": (replaced(GOOD, 2, 2, GOOD[2] + b"\x00"), "34 bytes at x = 2", "ann"),
    "p itself": (replaced(GOOD, 3, 3, share(PRIME)), "x = 3 beyond the field", "ann"),
    "the same value plus p": (
        replaced(GOOD, 3, 3, share(int.from_bytes(GOOD[3], "little") + PRIME)),
        "x = 3 beyond the field",
        "ann",
    ),
    "secret too long": (BEYOND, "more than 32 bytes", "ann"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_shares(name):
    assert combine(GOOD, 3, owner="ann") == SECRET
    shares, found, fault = REFUSED[name]
    with pytest.raises(ShareRefused, match=found) as refused:
        combine(shares, 3, owner="ann")
    assert refused.value.fault == fault


def test_a_refusal_says_nothing_of_the_shares():
    numbers = {str(int.from_bytes(one, "little")) for one in GOOD.values()}
    hexes = {one.hex() for one in GOOD.values()}
    for shares, _, _ in REFUSED.values():
        with pytest.raises(ShareRefused) as refused:
            combine(shares, 3, owner="ann")
        assert not any(text in str(refused.value) for text in numbers | hexes)


@pytest.mark.parametrize(("threshold", "count"), [(0, 3), (1, 3), (4, 3), (2, 256)])
def test_thresholds_that_protect_nothing_or_cannot_be_met(threshold, count):
    with pytest.raises(ThresholdRefused):
        split(SECRET, threshold, count, os.urandom)


@pytest.mark.parametrize("length", [0, 31, 33])
def test_secrets_of_another_length(length):
    with pytest.raises(BadInput):
        split(bytes(length), 2, 3, os.urandom)
