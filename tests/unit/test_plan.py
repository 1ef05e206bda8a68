"""The solver: both sides of every headroom boundary, against the documents' tables and SEAL itself.

Sums still decrypt two to four bits beyond the proof, so only arithmetic can test it (PROTOCOL, Headroom).
"""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st

from fedcore.errors import BadInput, PlanRefused, UnknownName
from fedcore.plan import (
    MAX_SLOT_BITS,
    RINGS,
    SECURITY_TABLE,
    Packing,
    RangePlan,
    Ring,
    RoundHeader,
    RoundPlan,
    ServerPlan,
    TrainPlan,
    Wide,
    canonical,
    field_width,
    price_list,
    refuse_small_roster,
    solve_packing,
)

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


@given(bits=st.integers(2, 24), sites=st.integers(1, 1 << 20))
def test_plain_slots_cost_one_field_each_and_fit_the_tag_field(bits, sites):
    packing = solve_packing(bits, sites, "plain")
    assert packing.ring is None
    assert packing.slot_bits <= MAX_SLOT_BITS
    assert packing.wire_bits == packing.fields_per_slot * field_width(bits, sites)
    assert packing.slots_per_block == 2048


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
    monkeypatch.setattr("fedcore.plan.RINGS", (Ring(1024, (1 << 27) - 2047),))
    last = price_list(16, "encrypted", limit=64)[-1]
    assert (last["fields_per_slot"], last["degree"], last["bytes_up_per_parameter"]) == (None,) * 3
    assert price_list(16, "plain", limit=5)[0]["degree"] is None


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


@pytest.mark.parametrize("protection", ["plain", "encrypted"])
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
        "range": RangePlan(), "metric_sums": (Wide("metric accuracy", 2, 10),),
    }  # fmt: skip
    return RoundPlan(**values | changes)


@pytest.mark.parametrize("sites", [(), ("a",), ("a", "b")])
def test_fewer_than_three_sites_are_refused_unless_plain(sites):
    with pytest.raises(PlanRefused, match=f"found {len(sites)} under 'encrypted'") as refused:
        round_plan(sites=sites)
    assert "--protection plain" in refused.value.remedy
    round_plan(sites=sites, protection="plain", packing=solve_packing(16, 4, "plain"))
    with pytest.raises(PlanRefused):
        refuse_small_roster(len(sites), "encrypted")
    refuse_small_roster(3, "encrypted")


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
    assert [w.name for w in plan.update_vector.wides][-1] == "metric accuracy"
    # All of 32 coordinates may exceed the range, so a count of 32 must fit too.
    assert round_plan(parameters=30).count_bits == 6
    assert plan.range_vector.wides == (Wide("exceeding", 24, 5),)
    assert plan.metrics_vector.coordinates == 0
    stages = {v.stage for v in (plan.update_vector, plan.range_vector, plan.metrics_vector)}
    assert len(stages) == 3


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "x"}, {"task_digest": "01"}, {"sites": ("a", "b", "d")}, {"sites": ("b", "a", "c")},
        {"packing": solve_packing(15, 4, "encrypted")}, {"packing": solve_packing(16, 5, "encrypted")},
        {"protection": "plain"}, {"parameters": 22}, {"buffer_coordinates": 1}, {"max_examples": 511},
        {"rounds": 19}, {"train": TrainPlan(lr=0.1)}, {"server": ServerPlan("fedadam")},
        {"range": RangePlan(start=0.5)}, {"metric_sums": ()}, {"version": 2},
        {"inputs": "02"},
    ],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_every_field_of_a_plan_is_in_its_digest(changes):
    assert round_plan().digest == round_plan().digest
    assert round_plan(**changes).digest != round_plan().digest


def test_the_list_of_changes_above_is_complete():
    marks = test_every_field_of_a_plan_is_in_its_digest.pytestmark
    changed = {name for changes in marks[0].args[1] for name in changes}
    assert changed == {field.name for field in fields(RoundPlan)}


HEADER = RoundHeader("job", 3, "update", ("a", "b", "c"), "digest")


@pytest.mark.parametrize(
    "other",
    [
        replace(HEADER, job="jo"), replace(HEADER, round=4), replace(HEADER, stage="metrics"),
        replace(HEADER, roster=("a", "b")), replace(HEADER, roster=("b", "a", "c")),
        replace(HEADER, roster=("a", "b,c")), replace(HEADER, plan_digest="digesu"),
        replace(HEADER, version=2),
    ],
)  # fmt: skip
def test_every_field_of_a_header_is_in_h(other):
    assert len(HEADER.digest) == 32
    assert replace(HEADER).digest == HEADER.digest
    assert other.digest != HEADER.digest


def test_the_canonical_form_is_unique_and_has_no_nan():
    assert canonical({"b": 1, "a": [0.1, "é"]}) == canonical({"a": [0.1, "é"], "b": 1})
    assert canonical({"a": 1.0}) == b'{"a":1.0}'
    with pytest.raises(ValueError, match="JSON"):
        canonical({"a": float("nan")})
