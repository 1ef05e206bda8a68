"""The solver: both sides of every headroom boundary, against the documents' tables and SEAL itself.

Sums still decrypt two to four bits beyond the proof, so only arithmetic can test it (PROTOCOL Headroom).
"""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import reference

from fedcore.config import build_job
from fedcore.errors import BadInput, PlanRefused, UnknownName
from fedcore.secagg.packing import (
    MAX_SLOT_BITS,
    RINGS,
    SECURITY_TABLE,
    Packing,
    Ring,
    field_width,
    price_list,
    solve_packing,
)
from fedcore.secagg.plan import (
    PLAN_VERSION,
    ModelPlan,
    RangePlan,
    RoundHeader,
    RoundPlan,
    ServerPlan,
    TrainPlan,
    Wide,
    canonical,
    check_threshold,
    default_threshold,
)
from fedcore.secagg.protections import MAX_MASKED_SITES, PROTECTIONS, SCHEMES, refuse_roster

SMALL, LARGE = RINGS
PAIRS = tuple((ring.degree, ring.modulus) for ring in RINGS)


# -------------------------------------------------------------------------- the proved inequality


@pytest.mark.parametrize(
    ("sites", "log_t"),
    [(3, 46), (4, 46), (5, 46), (8, 45), (10, 45), (16, 44), (32, 43), (64, 42), (128, 41)],
)
def test_the_largest_plain_modulus_of_the_protocol_table(sites, log_t):
    assert SMALL.proves(sites, log_t)
    assert not SMALL.proves(sites, log_t + 1)


@pytest.mark.parametrize("log_t", range(30, 47))
def test_the_last_site_of_each_plain_modulus(log_t):
    # 43 n + 1 < q / t, solved for n by hand.
    last = (SMALL.modulus - 1 - 2**log_t) // (43 * 2**log_t)
    assert SMALL.proves(last, log_t)
    assert not SMALL.proves(last + 1, log_t)


@given(
    sites=st.integers(1, 100_000),
    slot_bits=st.integers(1, 59),
    ring=st.sampled_from(RINGS),
)
def test_headroom_is_the_noise_bound_of_the_reference(sites, slot_bits, ring):
    assert ring.proves(sites, slot_bits) == reference.proves(sites, slot_bits, ring.modulus)


def test_the_inequality_is_strict():
    # A (composite) modulus of exactly (43 n + 1) t leaves no margin; one more is enough.
    edge = (43 * 5 + 1) << 40
    assert not Ring(2048, edge).proves(5, 40)
    assert Ring(2048, edge + 1).proves(5, 40)


def test_a_plain_modulus_that_seal_cannot_hold_is_never_proved():
    wide = Ring(8192, (1 << 217) + 1)  # room for any noise
    assert wide.proves(3, 59)
    assert not wide.proves(3, 60)


# ------------------------------------------------- the largest bits per sites and fields per slot


@pytest.mark.parametrize(
    ("sites", "small_k2", "small_k3", "small_k4", "large_k2"),
    [
        (4, 21, 13, 9, 24),  # "24+": one more bit than the solver ever asks for is not tried
        (16, 18, 10, 7, 21),
        (32, 16, 9, 5, 19),
        (33, 15, 8, 4, 18),
        (64, 15, 8, 4, 18),
        (100, 13, 6, 3, 16),
        (500, 10, 4, 0, 13),
    ],
)
def test_the_largest_bits_of_the_engine_table(sites, small_k2, small_k3, small_k4, large_k2):
    for ring, k, bits in (
        (SMALL, 2, small_k2),
        (SMALL, 3, small_k3),
        (SMALL, 4, small_k4),
        (LARGE, 2, large_k2),
    ):
        assert ring.proves(sites, k * field_width(bits, sites))
        if bits < 24:
            assert not ring.proves(sites, k * field_width(bits + 1, sites))


@given(bits=st.integers(1, 24), sites=st.integers(1, 5000))
def test_the_field_holds_the_largest_sum_and_not_one_bit_is_wasted(bits, sites):
    width = field_width(bits, sites)
    assert sites * (2**bits - 1) < 2**width
    # A power of two of sites needs log2 n bits exactly; every other n the next one.
    assert 2 ** (width - bits) < 2 * sites


@settings(max_examples=300)
@given(bits=st.integers(2, 24), sites=st.integers(1, 3000))
def test_the_solver_finds_the_cheapest_proved_packing(bits, sites):
    best = reference.cheapest(bits, sites, PAIRS)
    if best is None:
        with pytest.raises(PlanRefused):
            solve_packing(bits, sites, "encrypted")
        return
    packing = solve_packing(bits, sites, "encrypted")
    assert packing.ring in RINGS
    assert packing.wire_bits == best * packing.fields_per_slot
    assert reference.proves(sites, packing.slot_bits, packing.ring.modulus)
    assert packing.slot_bits == packing.fields_per_slot * field_width(bits, sites)


@pytest.mark.parametrize("protection", ["plain", "masked"])
@given(bits=st.integers(2, 24), sites=st.integers(1, 1 << 20))
def test_words_cost_one_field_each_and_as_many_fill_a_slot_as_the_tag_field_takes(
    protection, bits, sites
):
    packing, width = solve_packing(bits, sites, protection), field_width(bits, sites)
    assert packing.ring is None
    assert packing.wire_bits == packing.fields_per_slot * width <= MAX_SLOT_BITS
    # Every price per field is equal, and every slot of a vector costs 8 bytes of each mask.
    assert packing.slot_bits + width > MAX_SLOT_BITS
    assert packing.slots_per_block == 2048


@given(bits=st.integers(2, 24), sites=st.integers(3, 64), fields=st.integers(1, 10**7))
def test_a_vector_of_words_costs_the_fewest_bytes_counting_a_bit_for_each_slot_s_masks(
    bits, sites, fields
):
    width = field_width(bits, sites)

    def blocks(k):
        return -(-fields // (2048 * k))

    found = solve_packing(bits, sites, "masked", fields)
    bytes_of = {k: blocks(k) * k for k in range(1, 60 // width + 1)}
    assert bytes_of[found.fields_per_slot] * width + blocks(found.fields_per_slot) == min(
        count * width + blocks(k) for k, count in bytes_of.items()
    )
    assert solve_packing(bits, sites, "plain", fields) == found


def test_full_slots_are_worth_the_rounding_up_to_a_last_block():
    # 489 blocks of one field cost 0.2 % less than 245 of two, and twice the keystream of each mask.
    assert solve_packing(16, 64, "masked", 1_000_000).fields_per_slot == 2
    assert solve_packing(16, 16, "masked", 1_000_000).fields_per_slot == 3
    # A small model has one block either way, and empty fields are bytes on the wire.
    assert solve_packing(16, 16, "masked", 500).fields_per_slot == 1


@settings(max_examples=100)
@given(
    bits=st.integers(2, 24), sites=st.integers(3, 64),
    fields=st.one_of(st.none(), st.integers(1, 10**7)),
)  # fmt: skip
def test_layered_is_packed_as_encrypted_is(bits, sites, fields):
    assert solve_packing(bits, sites, "layered", fields) == solve_packing(
        bits, sites, "encrypted", fields
    )


def test_equal_prices_go_to_the_smaller_ring():
    # 9 fields of 5 bits in the ring of 54 bits, 10 in that of 60: six bits a field, exactly.
    assert (SMALL.proves(4, 45), SMALL.proves(4, 50)) == (True, False)
    assert (LARGE.proves(4, 50), LARGE.proves(4, 55)) == (True, False)
    assert solve_packing(3, 4, "encrypted") == Packing(3, 4, 9, SMALL)


def test_16_bits_pack_two_per_slot_up_to_32_sites_only():
    at_32, at_33 = solve_packing(16, 32, "encrypted"), solve_packing(16, 33, "encrypted")
    assert (at_32.fields_per_slot, at_32.ring) == (2, SMALL)
    assert (at_33.fields_per_slot, at_33.ring) == (2, LARGE)
    rows = price_list(16, "encrypted", limit=64)
    assert rows[0] == {
        "from_sites": 3, "to_sites": 32, "fields_per_slot": 2, "degree": 2048,
        "bytes_up_per_parameter": 3.375,
    }  # fmt: skip
    assert rows[1] == {
        "from_sites": 33, "to_sites": 64, "fields_per_slot": 2, "degree": 4096,
        "bytes_up_per_parameter": 3.75,
    }  # fmt: skip


def test_the_price_list_covers_every_roster_once_and_names_what_does_not_fit(monkeypatch):
    rows = price_list(24, "encrypted", limit=300)
    assert [row["from_sites"] for row in rows[1:]] == [row["to_sites"] + 1 for row in rows[:-1]]
    assert (rows[0]["from_sites"], rows[-1]["to_sites"]) == (3, 300)
    for row in rows:
        for sites in (row["from_sites"], row["to_sites"]):
            packing = solve_packing(24, sites, "encrypted")
            assert row["fields_per_slot"] == packing.fields_per_slot
            assert row["degree"] == packing.ring.degree
            price = packing.wire_bits / packing.fields_per_slot / 8
            assert row["bytes_up_per_parameter"] == pytest.approx(price, abs=5e-4)
    monkeypatch.setattr("fedcore.secagg.packing.RINGS", (Ring(1024, (1 << 27) - 2047),))
    last = price_list(16, "encrypted", limit=64)[-1]
    assert (last["fields_per_slot"], last["degree"], last["bytes_up_per_parameter"]) == (None,) * 3
    assert price_list(16, "plain", limit=5)[0]["degree"] is None


@pytest.mark.parametrize("protection", ["masked", "layered"])
def test_the_price_list_under_masks_ends_where_rosters_do(protection):
    rows = price_list(16, protection)
    assert (rows[0]["from_sites"], rows[-1]["to_sites"]) == (3, MAX_MASKED_SITES)
    assert price_list(16, protection, limit=10)[-1]["to_sites"] == 10
    assert price_list(16, "encrypted", limit=65)[-1]["to_sites"] == 65


def test_the_price_list_of_words_says_what_a_field_costs_and_names_no_ring():
    rows = price_list(16, "masked")
    assert rows[0] == {
        "from_sites": 3, "to_sites": 4, "fields_per_slot": 3, "degree": None,
        "bytes_up_per_parameter": 2.25,
    }  # fmt: skip
    at_16 = next(row for row in rows if row["from_sites"] <= 16 <= row["to_sites"])
    assert (at_16["fields_per_slot"], at_16["bytes_up_per_parameter"]) == (3, 2.5)
    rows = price_list(16, "layered")
    assert [row["degree"] for row in rows] == [2048, 4096]


# -------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(("bits", "sites"), [(24, 32_769), (24, 1_000_000), (20, 200_000)])
def test_a_refusal_names_the_largest_values_that_fit(bits, sites):
    with pytest.raises(PlanRefused, match=f"found {bits} bits for up to {sites} sites") as refused:
        solve_packing(bits, sites, "encrypted")
    named = re.findall(
        r"(\d+) bits for (\d+) sites, or (\d+) sites at (\d+) bits", refused.value.remedy
    )
    assert named, refused.value.remedy
    fitting_bits, same_sites, fitting_sites, same_bits = map(int, named[0])
    assert (same_sites, same_bits) == (sites, bits)
    solve_packing(fitting_bits, sites, "encrypted")
    solve_packing(bits, fitting_sites, "encrypted")
    for worse in ((fitting_bits + 1, sites), (bits, fitting_sites + 1)):
        with pytest.raises(PlanRefused):
            solve_packing(*worse, "encrypted")


def test_a_refusal_without_any_fitting_bits_names_sites_only():
    with pytest.raises(PlanRefused) as refused:
        solve_packing(24, 1 << 40, "encrypted")
    assert re.fullmatch(r"\d+ sites at 24 bits", refused.value.remedy)


@pytest.mark.parametrize("bits", [-1, 0, 1, 25, 64])
def test_bits_outside_2_to_24_are_refused(bits):
    with pytest.raises(BadInput, match=f"protect.bits: found {bits}, expected 2 to 24"):
        solve_packing(bits, 4, "encrypted")


@pytest.mark.parametrize("protection", PROTECTIONS)
@pytest.mark.parametrize("bits", [2, 24])
def test_bits_2_and_24_are_accepted(bits, protection):
    assert solve_packing(bits, 4, protection).bits == bits


def test_no_sites_and_unknown_protections_are_refused():
    with pytest.raises(BadInput, match="max_sites: found 0"):
        solve_packing(16, 0, "plain")
    with pytest.raises(UnknownName) as unknown:
        solve_packing(16, 4, "encypted")
    assert "did you mean 'encrypted'?" in unknown.value.remedy


def test_a_packing_without_proof_cannot_be_made():
    Packing(16, 32, 2, SMALL)
    Packing(16, 64, 2, LARGE)
    for unproved in (
        (16, 33, 2, SMALL),  # decrypts in every experiment; not proved
        (16, 64, 2, SMALL),
        (16, 32, 3, SMALL),
        (24, 1 << 36, 1, LARGE),
        (24, 1 << 37, 1, None),  # 61-bit slots
        (16, 4, 4, None),
        (16, 4, 0, None),
    ):
        with pytest.raises(PlanRefused, match="expected a slot that proves headroom"):
            Packing(*unproved)


# ------------------------------------------------------------------------------- rings, and SEAL


@pytest.mark.parametrize("degree", sorted(SECURITY_TABLE))
def test_a_ring_holds_the_security_table_and_not_one_bit_more(degree):
    limit = SECURITY_TABLE[degree]
    assert Ring(degree, (1 << limit) - 1).modulus_bits == limit
    with pytest.raises(
        PlanRefused, match=f"{limit + 1}-bit modulus, expected at most {limit} bits"
    ):
        Ring(degree, 1 << limit)


@pytest.mark.parametrize("degree", [0, 512, 2047, 16384])
def test_a_degree_off_the_table_is_refused(degree):
    with pytest.raises(PlanRefused, match="at most 0 bits"):
        Ring(degree, 12289)


def test_the_security_table_is_that_of_the_standard():
    assert SECURITY_TABLE == {1024: 27, 2048: 54, 4096: 109, 8192: 218}


def test_the_security_table_and_the_primes_are_those_of_seal():
    sealapi = pytest.importorskip("tenseal.sealapi")
    level = sealapi.SEC_LEVEL_TYPE.TC128
    for degree, bits in SECURITY_TABLE.items():
        assert sealapi.CoeffModulus.MaxBitCount(degree, level) == bits
    for ring in RINGS:
        (prime,) = sealapi.CoeffModulus.Create(ring.degree, [ring.modulus_bits])
        assert prime.value() == ring.modulus


def test_the_moduli_are_primes_that_split_and_leave_the_table_unbroken():
    assert SMALL.modulus == 2**54 - 77823
    for ring in RINGS:
        assert ring.modulus % (2 * ring.degree) == 1
        assert pow(3, ring.modulus - 1, ring.modulus) == 1
        assert ring.modulus_bits <= SECURITY_TABLE[ring.degree]


# ------------------------------------------------------------------------------------ round plans


def round_plan(**changes):
    values = {
        "task": "heart", "task_digest": "00", "sites": ("a", "b", "c"), "protection": "encrypted",
        "packing": solve_packing(16, 4, "encrypted"), "parameters": 21, "buffer_coordinates": 2,
        "max_examples": 512, "rounds": 20, "train": TrainPlan(), "server": ServerPlan(),
        "range": RangePlan(), "metric_sums": (Wide("metric:accuracy", 2, 10),),
    }  # fmt: skip
    return RoundPlan(**values | changes)


@pytest.mark.parametrize("protection", ["encrypted", "masked", "layered"])
@pytest.mark.parametrize("sites", [(), ("a",), ("a", "b")])
def test_fewer_than_three_sites_are_refused_unless_plain(sites, protection):
    packing = solve_packing(16, 4, protection)
    with pytest.raises(PlanRefused, match=f"found {len(sites)} under '{protection}'") as refused:
        round_plan(sites=sites, protection=protection, packing=packing)
    assert "expected at least 3: with fewer, the sum shows each site" in str(refused.value)
    assert "--protection plain" in refused.value.remedy
    with pytest.raises(PlanRefused):
        refuse_roster(len(sites), protection)
    refuse_roster(3, protection)
    round_plan(protection=protection, packing=packing)


@pytest.mark.parametrize("sites", [("a",), ("a", "b")])
def test_plain_runs_with_one_site_or_two(sites):
    round_plan(sites=sites, protection="plain", packing=solve_packing(16, 4, "plain"))


@pytest.mark.parametrize("protection", ["masked", "layered"])
def test_more_sites_than_a_complete_graph_of_masks_takes_are_refused(protection):
    names = tuple(f"site-{place}" for place in range(65))
    packing = solve_packing(12, 65, protection)
    with pytest.raises(
        PlanRefused, match=f"found 65 under '{protection}', expected at most 64"
    ) as no:
        round_plan(sites=names, protection=protection, packing=packing)
    assert "every pair of sites agrees on a mask" in str(no.value)
    assert "--protection encrypted" in no.value.remedy
    assert round_plan(sites=names[:64], protection=protection, packing=packing).threshold == 43
    for other in ("plain", "encrypted"):
        refuse_roster(65, other)


# ------------------------------------------------------------------------------------- thresholds


@pytest.mark.parametrize(
    ("sites", "threshold"),
    [(1, 1), (2, 2), (3, 3), (4, 3), (5, 4), (6, 5), (7, 5), (8, 6), (9, 7), (16, 11), (64, 43)],
)
def test_the_default_threshold_is_two_thirds_and_one_more(sites, threshold):
    assert default_threshold(sites) == threshold
    assert check_threshold(threshold, sites) == threshold
    names = tuple(f"site-{place}" for place in range(sites))
    packing = solve_packing(12, 64, "plain")
    plan = round_plan(sites=names, protection="plain", packing=packing)
    assert plan.threshold == threshold
    assert plan.to_json()["threshold"] == threshold


@given(sites=st.integers(1, 200), threshold=st.integers(-5, 205))
def test_a_threshold_above_half_and_up_to_all_is_accepted_and_no_other(sites, threshold):
    # Two lists of t sites each must share a site, or a coordinator opens both (PROTOCOL C).
    if threshold > sites / 2 and threshold <= sites:
        assert check_threshold(threshold, sites) == threshold
        return
    with pytest.raises(PlanRefused, match=f"found {threshold} for {sites} sites") as refused:
        check_threshold(threshold, sites)
    low, high = map(int, re.findall(r"expected (\d+) to (\d+)", str(refused.value))[0])
    assert (low, high) == (min(t for t in range(1, 202) if 2 * t > sites), sites)
    assert f"the default, {default_threshold(sites)}" in refused.value.remedy


@pytest.mark.parametrize("threshold", [-1, 1, 2, 5, 99])
def test_a_plan_refuses_a_threshold_outside_its_roster(threshold):
    four = {"sites": ("a", "b", "c", "d")}
    with pytest.raises(PlanRefused, match=rf"protect\.threshold: found {threshold} for 4 sites"):
        round_plan(threshold=threshold, **four)
    assert [round_plan(threshold=t, **four).threshold for t in (0, 3, 4)] == [3, 3, 4]
    assert round_plan(threshold=0, **four).digest == round_plan(threshold=3, **four).digest


def test_a_site_twice_or_more_sites_than_planned_are_refused():
    with pytest.raises(BadInput, match="twice"):
        round_plan(sites=("a", "b", "a"))
    round_plan(sites=("a", "b", "c", "d"))
    with pytest.raises(PlanRefused, match=r"found 5, expected at most protect\.max_sites = 4"):
        round_plan(sites=("a", "b", "c", "d", "e"))


def test_the_vectors_of_a_plan_reserve_enough_bits():
    plan = round_plan()
    assert plan.coordinates == 23
    widths = {wide.name: wide for wide in plan.update_vector.wides}
    assert widths["weight"].bits == 10  # 512 itself must fit
    assert 2 ** widths["over_range"].bits > plan.coordinates
    assert [w.name for w in plan.update_vector.wides][-1] == "metric:accuracy"
    # All of 32 coordinates may exceed the range, so a count of 32 must fit too.
    assert round_plan(parameters=30).count_bits == 6
    assert plan.range_vector.wides == (Wide("exceeding", 24, 5),)
    assert plan.metrics_vector.coordinates == 0
    vectors = (plan.update_vector, plan.range_vector, plan.metrics_vector)
    assert [vector.purpose for vector in vectors] == ["update", "range", "metrics"]


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "x"}, {"task_digest": "01"}, {"sites": ("a", "b", "d")}, {"sites": ("b", "a", "c")},
        {"packing": solve_packing(15, 4, "encrypted")}, {"packing": solve_packing(16, 5, "encrypted")},
        {"protection": "layered"}, {"parameters": 22}, {"buffer_coordinates": 1}, {"max_examples": 511},
        {"rounds": 19}, {"train": TrainPlan(lr=0.1)}, {"server": ServerPlan("fedadam")},
        {"range": RangePlan(start=0.5)}, {"metric_sums": ()},
        {"model": ModelPlan(inputs="02")}, {"threshold": 2}, {"public_metrics": True, "protection": "layered"},
        {"release": "coordinator", "protection": "layered"},
        {"settings": "0" * 64}, {"standardise": "federated"}, {"model": ModelPlan(initial="0" * 64)},
        {"cipher": "keystream", "packing": solve_packing(16, 4, "encrypted", cipher="keystream")},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_every_field_of_a_plan_is_in_its_digest(changes):
    assert round_plan().digest == round_plan().digest
    assert round_plan(**changes).digest != round_plan().digest


def test_a_plan_of_another_version_is_refused_by_name():
    written = round_plan().to_json()
    assert written["version"] == PLAN_VERSION
    for other in (PLAN_VERSION + 1, PLAN_VERSION - 1, str(PLAN_VERSION), None):
        with pytest.raises(BadInput, match=f"not of version {PLAN_VERSION}"):
            RoundPlan.from_json(written | {"version": other})
    del written["version"]
    with pytest.raises(BadInput, match=f"not of version {PLAN_VERSION}"):
        RoundPlan.from_json(written)


HEADER = RoundHeader(
    federation="clinics", job="job", epoch=1, round=3, training_round=2, purpose="update",
    roster=("a", "b", "c"), pins="pins", threshold=2, protection="layered", plan_digest="digest",
    certificate="certificate",
)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        {"federation": "clinic"}, {"job": "jo"}, {"epoch": 2}, {"round": 4}, {"training_round": 3},
        {"purpose": "metrics"}, {"roster": ("a", "b")}, {"roster": ("b", "a", "c")},
        {"roster": ("a", "b,c")}, {"pins": "pin"}, {"threshold": 3}, {"protection": "masked"},
        {"plan_digest": "digesu"}, {"certificate": ""}, {"version": PLAN_VERSION + 1},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_every_field_of_a_header_is_in_h(changes):
    assert len(HEADER.digest) == 32
    assert replace(HEADER).digest == HEADER.digest
    assert replace(HEADER, **changes).digest != HEADER.digest


@pytest.mark.parametrize(
    ("test", "record"),
    [
        (test_every_field_of_a_plan_is_in_its_digest, RoundPlan),
        (test_every_field_of_a_header_is_in_h, RoundHeader),
    ],
)
def test_the_lists_of_changes_above_are_complete(test, record):
    changed = {name for changes in test.pytestmark[0].args[1] for name in changes}
    assert changed == {field.name for field in fields(record)}


def test_the_place_of_a_site_is_that_in_the_roster():
    assert [HEADER.place(site) for site in HEADER.roster] == [0, 1, 2]
    with pytest.raises(ValueError, match="not in tuple"):
        HEADER.place("d")


def test_the_canonical_form_is_unique_and_has_no_nan():
    assert canonical({"b": 1, "a": [0.1, "é"]}) == canonical({"a": [0.1, "é"], "b": 1})
    assert canonical({"a": 1.0}) == b'{"a":1.0}'
    with pytest.raises(ValueError, match="JSON"):
        canonical({"a": float("nan")})


def test_weights_are_rows_in_32_steps_of_the_cap():
    """At least one step, never above the cap, and off by at most half a step between."""
    for cap in (1, 5, 31, 32, 33, 63, 64, 100, 512, 1000, 4096):
        made = round_plan(max_examples=cap)
        step = made.weight_step
        assert step == max(1, cap // 32)
        for rows in range(1, cap + 1):
            weight = made.weight_of(rows)
            assert weight % step == 0 and step <= weight <= cap
            nearest = abs(weight - rows) * 2 <= step
            assert nearest or rows < step or rows > cap - step
    assert len({round_plan(max_examples=512).weight_of(rows) for rows in range(1, 513)}) == 32


# ------------------------------------------------------------------------------ ciphers and lattices


@pytest.mark.parametrize(
    ("protection", "cipher", "lattice", "found"),
    [
        ("masked", "keystream", "standard", r"protect\.cipher: found 'keystream' under 'masked'"),
        ("plain", "keystream", "standard", r"protect\.cipher: found 'keystream' under 'plain'"),
        (
            "layered",
            "keystream",
            "wide",
            r"protect\.lattice: found 'wide' under the cipher 'keystream'",
        ),
        ("masked", "bfv", "wide", r"protect\.lattice: found 'wide' under 'masked'"),
    ],
)
def test_a_cipher_or_lattice_without_a_use_is_refused(protection, cipher, lattice, found):
    with pytest.raises(PlanRefused, match=found) as refusal:
        solve_packing(16, 4, protection, cipher=cipher, lattice=lattice)
    assert "leave" in refusal.value.remedy
    with pytest.raises(PlanRefused, match=found):
        build_job({"protection": protection, "cipher": cipher, "lattice": lattice})
    if cipher == "keystream" and lattice == "standard":
        with pytest.raises(PlanRefused, match=found):
            round_plan(protection=protection, cipher=cipher, packing=solve_packing(16, 4, "masked"))


@pytest.mark.parametrize("what", ["cipher", "lattice"])
def test_an_unknown_cipher_or_lattice_is_refused(what):
    with pytest.raises(UnknownName, match=rf"protect\.{what}: found 'rot13'"):
        solve_packing(16, 4, "layered", **{what: "rot13"})
    with pytest.raises(BadInput, match=rf"protect\.{what}: found 'rot13'"):
        build_job({what: "rot13"})


@pytest.mark.parametrize("sites", [3, 16, 64])
@pytest.mark.parametrize("bits", [2, 8, 16, 24])
def test_a_wide_lattice_is_of_degree_4096_whatever_is_cheaper(bits, sites):
    for size in (None, 10, 100_000):
        packing = solve_packing(bits, sites, "layered", size, lattice="wide")
        assert packing.ring.degree == 4096
        assert packing.ring.proves(sites, packing.slot_bits)
        assert SECURITY_TABLE[4096] - packing.ring.modulus_bits == 49
    assert solve_packing(16, 4, "layered", 10).ring.degree == 2048  # the control
    assert {row["degree"] for row in price_list(16, "layered", lattice="wide")} == {4096}


def test_a_keystream_packs_as_masks_do_and_needs_no_headroom_but_its_width():
    for bits, sites, size in ((16, 4, None), (24, 64, 500), (16, 64, 1_000_000)):
        stream = solve_packing(bits, sites, "layered", size, cipher="keystream")
        assert stream == solve_packing(bits, sites, "masked", size) and stream.ring is None
    large = solve_packing(16, 1000, "encrypted", cipher="keystream")
    assert large.field_width == 26
    rows = price_list(16, "layered", cipher="keystream")
    assert rows == price_list(16, "masked") and rows[-1]["to_sites"] == 64
    assert price_list(16, "encrypted", limit=100, cipher="keystream")[-1]["to_sites"] == 100


def test_a_plan_s_ring_and_cipher_agree():
    """A packing of another cipher would be read as what it is not."""
    words, ring = solve_packing(16, 4, "masked"), solve_packing(16, 4, "layered")
    for protection, cipher, wrong in (
        ("layered", "keystream", ring), ("layered", "bfv", words), ("masked", "bfv", ring),
    ):  # fmt: skip
        with pytest.raises(PlanRefused, match=r"packing: found (a|no) ring under"):
            round_plan(protection=protection, cipher=cipher, packing=wrong)
    for protection, cipher, right in (
        ("layered", "keystream", words), ("layered", "bfv", ring), ("masked", "bfv", words),
    ):  # fmt: skip
        plan = round_plan(protection=protection, cipher=cipher, packing=right)
        assert RoundPlan.from_json(plan.to_json()) == plan
        assert plan.to_json().get("cipher") == (None if protection == "masked" else cipher)


def test_the_names_of_schemes_are_those_of_protections_with_their_ciphers():
    assert SCHEMES == {
        "plain": ("plain", "bfv"), "encrypted": ("encrypted", "bfv"),
        "encrypted-keystream": ("encrypted", "keystream"), "masked": ("masked", "bfv"),
        "layered": ("layered", "bfv"), "layered-keystream": ("layered", "keystream"),
    }  # fmt: skip
