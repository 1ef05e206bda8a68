"""Rounds by requests and replies: the exact sum, sites that do not answer, memories that are lost."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
from support.by_request import LAYOUT, MODEL, kinds_of, one_round, run_of, said, without

from fedcore.errors import Abandoned, PlanRefused, Refused, RoundAbandoned
from fedcore.experiment.prepare import job_for, prepare
from fedcore.secagg.by_request.terms import RunTerms, Trained
from fedcore.secagg.encode.quantise import quantise
from fedcore.secagg.protocol.schedule import PlannedRound
from fedcore.seeds import generator

PROTECTIONS = [("masked", "bfv"), ("layered", "bfv"), ("layered", "keystream")]


def plain_sum(run, content, sites, number=1):
    """The integer sum of the sites' quantised updates, without any protection."""
    plan = run.terms.plan
    weight = plan.weight_of(40)
    total = np.zeros(plan.parameters, dtype=np.uint64)
    for site in sites:
        weighted = content[site] * (weight / plan.max_examples)
        rounding = generator(0, number, site, "rounding")
        total += quantise(weighted, plan.packing.bits, run.state.bound, rounding).fields
    return total


@pytest.mark.parametrize(("protection", "cipher"), PROTECTIONS)
def test_a_released_sum_is_the_plain_integer_sum(protection, cipher):
    run, _, content = run_of(protection=protection, cipher=cipher)
    run.begin()
    expected = plain_sum(run, content, run.pins)
    found = one_round(run)
    assert np.array_equal(found.opened.coordinates, expected)
    assert found.survivors == tuple(run.pins)
    assert np.abs(found.mean - np.mean(list(content.values()), axis=0)).max() < 1e-4
    assert run.terms.metric_means(found.opened)["train_loss"] == pytest.approx(0.5, abs=1e-5)


def test_a_range_that_is_not_given_is_measured_in_a_round_before_the_first():
    run, _, _ = run_of(value_range=None)
    run.begin()
    found = run.round(PlannedRound("range", 0), MODEL, MODEL)
    assert len(found.mean) == 0
    assert run.state.bound == 1.0  # the power of two above every weighted update
    assert one_round(run).opened.coordinates.shape == (7,)


@pytest.mark.parametrize(
    ("kind", "in_the_sum"),
    [
        ("Announce", False), ("KeyBundle", False), ("Delivery", False), ("SurvivorList", True),
        ("Confirmations", True), ("Aggregate", True), ("Certificate", True),
    ],
)  # fmt: skip
def test_a_site_that_a_stage_does_not_reach_is_survived_and_is_back_in_the_next_round(
    kind, in_the_sum
):
    run, link, content = run_of()
    run.begin()
    link.change = without("rome", kind)
    expected = plain_sum(run, content, [s for s in run.pins if in_the_sum or s != "rome"])
    first = one_round(run)
    assert ("rome" in first.survivors) is in_the_sum
    assert np.array_equal(first.opened.coordinates, expected)
    link.change.on = False
    assert one_round(run, 2).survivors == tuple(run.pins)


def test_a_site_that_comes_late_gets_the_key_and_the_state_of_the_releases_before():
    run, link, _ = run_of()
    link.silent = {"bern"}
    run.begin()
    assert "bern" not in one_round(run).survivors
    link.silent = set()
    assert one_round(run, 2).survivors == tuple(run.pins)


def test_metrics_are_left_out_where_they_would_show_those_of_the_site_that_is_away():
    run, link, _ = run_of()
    run.begin()
    assert run.terms.metric_means(one_round(run).opened)
    link.silent = {"bern"}
    assert run.terms.metric_means(one_round(run, 2).opened) == {}
    link.silent = set()
    assert run.terms.metric_means(one_round(run, 3).opened)


def test_a_first_maker_that_is_absent_is_replaced():
    run, link, _ = run_of()
    link.silent = {"va"}
    run.begin()
    assert one_round(run).survivors == ("oslo", "rome", "bern")


def test_two_of_four_that_do_not_send_vectors_abandon_the_round_and_the_next_one_works():
    run, link, _ = run_of()
    run.begin()
    bern, rome = without("bern", "Delivery"), without("rome", "Delivery")
    link.change = lambda node, request: bern(node, request) and rome(node, request)
    with pytest.raises(RoundAbandoned, match="submit: found 2 sites, expected at least 3"):
        one_round(run)
    assert not any("Unmask" in said(link, site) for site in run.pins)
    bern.on = rome.on = False
    assert one_round(run, 2).survivors == tuple(run.pins)


def test_a_sum_that_too_few_sites_open_ends_the_run():
    run, link, _ = run_of()
    run.begin()
    bern, rome = without("bern", "Aggregate"), without("rome", "Aggregate")
    link.change = lambda node, request: bern(node, request) and rome(node, request)
    with pytest.raises(Abandoned, match="its sum may be known and cannot be released"):
        one_round(run)
    link.change = None
    with pytest.raises(Refused, match="whose sum may be known"):
        one_round(run, 2)


def test_sites_that_an_exposed_stage_reached_late_are_asked_again():
    run, link, _ = run_of()
    run.begin()
    lost = []

    def change(node, request):
        if "Aggregate" in kinds_of(request) and node in {"bern", "rome"} and node not in lost:
            lost.append(node)
            return None
        return request

    link.change = change
    assert one_round(run).survivors == tuple(run.pins)
    assert sorted(lost) == ["bern", "rome"]


def test_training_that_fails_leaves_the_round_without_a_word_of_why():
    run, link, _ = run_of()
    run.begin()
    secret = "row 17 of patient 3"

    def fails():
        raise ValueError(secret)

    link.trains["oslo"] = fails
    assert one_round(run).survivors == ("va", "rome", "bern")
    sent = [data for _, reply in link.replies for data in reply.messages]
    assert not any(secret.encode() in data for data in sent)
    assert "Leave" in said(link, "oslo")


def test_an_update_of_another_length_or_with_nan_leaves_the_round():
    run, link, _ = run_of()
    run.begin()
    link.trains["oslo"] = lambda: Trained(np.zeros(6), 40, {})
    assert "oslo" not in one_round(run).survivors
    link.trains["oslo"] = lambda: Trained(np.full(7, np.nan), 40, {})
    assert "oslo" not in one_round(run, 2).survivors


def test_a_site_whose_memory_is_lost_or_older_takes_no_further_part():
    run, link, _ = run_of()
    run.begin()
    older = copy.deepcopy(link.memories["rome"])
    one_round(run)
    link.memories["rome"] = older
    assert "rome" not in one_round(run, 2).survivors
    assert any("memory is not that of its last reply" in r.refused for _, r in link.replies)
    link.memories["rome"] = {}
    assert "rome" not in one_round(run, 3).survivors


def test_secrets_of_a_round_are_in_no_memory_once_they_are_used():
    run, link, _ = run_of()
    run.begin()
    held = {}

    def look(node, request):
        for kind in kinds_of(request):
            held.setdefault(kind, link.memories[node]["stage"])
        return request

    link.change = look
    one_round(run)
    assert b"Secrets" in held["Delivery"]  # the root and the self-seed, until the masks are agreed
    assert b"Secrets" not in held["SurvivorList"]
    assert b"Held" in held["SurvivorList"]
    assert b"Held" not in held["Aggregate"]
    assert all(b"Secrets" not in memory["stage"] for memory in link.memories.values())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"federation": "other"}, "federation: found hospitals, expected other"),
        ({"protections": ("layered",)}, "protection: found masked, expected layered"),
        ({"minimum": 4}, "threshold: found 3, expected at least 4"),
    ],
)
def test_sites_take_no_part_in_terms_that_their_operators_do_not_allow(change, text):
    run, link, _ = run_of()
    link.members = {name: replace(member, **change) for name, member in link.members.items()}
    with pytest.raises(Refused, match=text):
        run.begin()
    assert not link.memories["va"]


def test_a_site_keeps_to_the_terms_it_began_with():
    run, link, _ = run_of()
    run.begin()
    other = replace(run.terms, seed=1)
    run.terms = other
    request = replace(link.asked[0][1], terms=RunTerms.to_bytes(other))
    reply = link.site("va").answer(request)
    assert "terms of the run: found" in reply.refused
    assert reply.messages == []


@pytest.mark.parametrize("protection", ["plain", "encrypted", "nothing"])
def test_a_protection_under_which_no_sum_may_go_to_the_coordinator_is_refused(protection):
    with pytest.raises(Exception, match=r"protection|release") as found:
        RunTerms.make(
            "f", "j", ("a", "b", "c"), parameters=1, layout=LAYOUT, rounds=1, max_examples=9,
            protection=protection,
        )  # fmt: skip
    assert isinstance(found.value, PlanRefused) or protection == "nothing"


def test_terms_whose_parts_do_not_belong_together_are_refused():
    run, _, _ = run_of()
    kept = run.terms
    assert RunTerms.from_bytes(kept.to_bytes()) == kept
    for other in (
        replace(kept, seed=7),
        replace(kept, metrics={"train_loss": (0.0, 3.0)}),
        replace(kept, layout="2" * 64),
        replace(kept, metrics={}),
    ):
        with pytest.raises(Exception, match="other settings"):
            RunTerms.from_bytes(other.to_bytes())


def test_rounds_end_with_the_model_of_a_simulation_bit_for_bit():
    settings = {"protection": "masked", "range": 0.5, "rounds": 3, "server": "fedavg"}
    prepared = prepare(*job_for(None, settings))
    federation, plan = prepared.federation, prepared.plan
    start = federation.state
    trainers = dict(zip(plan.sites, federation.sites, strict=True))
    run, link, _ = run_of(
        4, "layered", names=plan.sites, parameters=plan.coordinates, rounds=3, metrics={},
        value_range=plan.range.start, max_examples=plan.max_examples, seed=prepared.job.run.seed,
        bits=plan.packing.bits,
    )  # fmt: skip
    run.begin()
    model = start.server.parameters
    for number in (1, 2, 3):
        state = replace(start, server=replace(start.server, parameters=model))
        for site, trainer in trainers.items():
            update = trainer.train(plan, state, number).astype(np.float64)
            trained = Trained(update, len(trainer.site.train), {})
            link.trains[site] = lambda trained=trained: trained
        model = model + one_round(run, number).mean
        federation.advance()
    assert np.array_equal(model, federation.state.server.parameters)
    assert run.state.bound == federation.state.server.bound
    assert not np.array_equal(model, start.server.parameters)
