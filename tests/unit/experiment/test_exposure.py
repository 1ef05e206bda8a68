"""What each party saw of one site's update: the measurement under every protection, and its words.

A reading that finds nothing says little unless the same reading finds an update that is there: each
"nothing" below stands beside a control in which the protection's own secret is given to the reader.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from jinja2 import Environment, PackageLoader
from support.plans import round_plan
from support.results import result_of

import fedcore
from fedcore.experiment import api
from fedcore.experiment import exposure as measured
from fedcore.experiment.exposure import (
    BOTH,
    COORDINATOR,
    SITE,
    chance,
    ciphertext_as_slots,
    correlation,
    observe,
    watch_one,
)
from fedcore.learning.stopwatch import Stopwatch
from fedcore.report import markdown, page
from fedcore.report import readings as words
from fedcore.results import Reading, UpdateExposure
from fedcore.secagg.crypto.masked import MaskedSealer
from fedcore.secagg.crypto.masking import add_masks
from fedcore.secagg.encode.bitpack import pack_words
from fedcore.secagg.encode.pack import Layout
from fedcore.secagg.in_process import sum_engine
from fedcore.secagg.packing import RINGS, Packing
from fedcore.secagg.plan import RangePlan
from fedcore.secagg.protections import PROTECTIONS, SCHEMES, Protection, masking
from fedcore.secagg.summing import RoundTrace, one_by_one

pytest.importorskip("tenseal.sealapi")

COORDINATES = 5000
FAR = 6 / np.sqrt(COORDINATES)
"""Six standard deviations: what unrelated values never reach, however often the tests run."""


def plan_of(scheme, sites=4, coordinates=COORDINATES):
    protection, cipher = SCHEMES[scheme]
    return round_plan(
        [f"site-{i}" for i in range(sites)], protection, cipher=cipher, parameters=coordinates,
        fields=coordinates, max_examples=100, rounds=1, range=RangePlan(start=1.0),
    )  # fmt: skip


def updates_of(plan):
    """Unrelated updates, so that the correlation of a mean is known: 1 / sqrt(sites in it)."""
    rng = np.random.default_rng(7)
    return rng.integers(1, 1 << 16, (len(plan.sites), plan.coordinates)).astype(np.uint64)


def round_seen(plan, absences=None, updates=None):
    """One real round; returns its witness and what was observed."""
    epoch, fields = (
        sum_engine("job", plan),
        updates_of(plan) if updates is None else updates,
    )
    witness = watch_one(plan.sites, absences or {})

    def contribute(index):
        return fields[index], {
            "weight": [10],
            "over_range": [0],
            "over_half_range": [0],
            "exceeds": [0],
        }

    epoch.sum(
        plan.update_vector,
        3,
        one_by_one(contribute),
        b"",
        Stopwatch(),
        absences=absences,
        witness=witness,
    )
    return witness, observe(witness, plan, epoch.sealer, 3)


@cache
def seen_under(protection):
    """What one real round under `protection` showed; do not change it."""
    return round_seen(plan_of(protection))[1]


def is_the_update(reading):
    return reading.correlation == 1.0 and reading.exact == 1.0


def is_noise(reading):
    return abs(reading.correlation) < FAR and reading.exact < 0.01


# ------------------------------------------------------------------------------ what each party has


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_coordinator_reads_an_upload_under_plain_only(scheme):
    found = seen_under(scheme).parties[COORDINATOR]
    assert (is_the_update if scheme == "plain" else is_noise)(found.message)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_coordinator_has_the_sum_unless_it_is_encrypted(scheme):
    found = seen_under(scheme).parties[COORDINATOR].sum
    if Protection.of(SCHEMES[scheme][0]).encrypts:
        assert found is None
    else:
        assert abs(found.correlation - 1 / np.sqrt(4)) < FAR


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_site_has_the_mean_of_the_others_and_no_upload(scheme):
    found = seen_under(scheme).parties[SITE]
    assert found.message is None
    assert abs(found.sum.correlation - 1 / np.sqrt(3)) < FAR
    assert found.sum.exact < 0.01


@pytest.mark.parametrize("scheme", SCHEMES)
def test_both_together_open_an_upload_without_masks(scheme):
    found = seen_under(scheme).parties[BOTH]
    assert (is_noise if Protection.of(SCHEMES[scheme][0]).masks else is_the_update)(found.message)
    assert found.sum == seen_under(scheme).parties[SITE].sum


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_best_reading_is_the_upload_where_it_tells_anything_else_the_sum(scheme):
    for found in seen_under(scheme).parties.values():
        message = found.message
        told = message is not None and measured.tells_more_than_chance(message, COORDINATES)
        best = found.message if told or found.sum is None else found.sum
        assert replace(found.best, strip=None) == best


@pytest.mark.parametrize("scheme", SCHEMES)
def test_beside_it_stands_the_same_round_under_plain(scheme):
    found = seen_under(scheme)
    plain = seen_under("plain")
    assert found.plain == plain.plain == plain.parties
    assert found.strip == plain.strip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_written_is_small_json(scheme):
    plan, found = plan_of(scheme), seen_under(scheme)
    text = json.dumps(found.to_json(), allow_nan=False)
    assert UpdateExposure.from_json(json.loads(text)) == found
    assert (found.site, found.other, found.round) == (*plan.sites[:2], 3)
    assert (found.coordinates, found.contributors) == (COORDINATES, 4)
    strips = [found.strip, *(view.best.strip for view in found.parties.values())]
    for strip in strips:
        assert len(strip) == measured.DRAWN and max(map(abs, strip)) == 100
    assert len(text) < 6000


def test_the_own_update_of_the_other_site_is_the_level_without_a_message():
    updates = updates_of(plan_of("plain"))
    alike = np.stack([updates[0], (updates[0] + updates[1]) // 2, *updates[2:]])
    _, found = round_seen(plan_of("plain"), updates=alike)
    assert abs(found.own - 1 / np.sqrt(2)) < FAR
    assert abs(seen_under("plain").own) < FAR


@pytest.mark.parametrize("scheme", SCHEMES)
def test_who_left_the_round_is_neither_named_nor_counted(scheme):
    _, found = round_seen(plan_of(scheme, sites=4), absences={"site-0": "submit"})
    assert (found.site, found.other, found.contributors) == ("site-1", "site-2", 3)
    assert abs(found.parties[SITE].sum.correlation - 1 / np.sqrt(2)) < FAR


def test_a_round_without_two_sites_to_the_end_has_no_witness():
    assert watch_one(("a", "b", "c"), {"a": "keys", "b": "unmask"}) is None
    assert watch_one(("a",), {}) is None
    witness = watch_one(("a", "b", "c"), {"b": "unmask"})
    assert (witness.target, witness.other) == (0, 2)


def test_with_two_sites_the_sum_less_ones_own_is_the_update():
    _, found = round_seen(plan_of("plain", sites=2))
    assert is_the_update(found.parties[SITE].sum)
    assert words.headline(found).count("all of it") == 2
    assert words.headline(found).endswith("site-1 all of it, and both together no more.")
    text = words.section(replace(result_of(), seen=found)).rows[1][1][0][0]
    assert text.endswith(
        "The sum less site-1's own update: the update itself, every coordinate exact."
    )


def test_of_equal_updates_a_mean_is_the_update():
    equal = np.tile(updates_of(plan_of("plain"))[0], (4, 1))
    _, found = round_seen(plan_of("plain"), updates=equal)
    assert is_the_update(found.parties[COORDINATOR].sum)
    assert is_the_update(found.parties[SITE].sum)


def test_an_update_that_does_not_vary_has_no_correlation():
    flat = np.stack([np.full(40, 1 << 15, dtype=np.uint64), *updates_of(plan_of("plain"))[1:, :40]])
    _, found = round_seen(plan_of("encrypted", coordinates=40), updates=flat)
    assert found.own is None
    assert found.parties[COORDINATOR].message.correlation is None
    assert found.parties[BOTH].message == Reading(None, 1.0)
    assert found.parties[BOTH].best.strip == found.strip == (0,) * 40
    text = words.section(replace(result_of(), seen=found)).rows[0][1][0][0]
    assert "nothing measurable (its values are all alike)" in text


# ---------------------------------------------- controls: the reading finds an update that is there


@pytest.mark.parametrize("ring", RINGS, ids=lambda ring: str(ring.degree))
def test_a_ciphertext_whose_key_is_zero_reads_as_its_slots(ring):
    """So noise in the coordinator's reading is the encryption's doing and not the reading's."""
    packing = max(
        (
            Packing(16, 4, fields, ring)
            for fields in (1, 2, 3)
            if ring.proves(4, 18 * fields) and 18 * fields <= 60
        ),
        key=lambda found: found.slot_bits,
    )
    # More than one chunk, of which the second is no whole ciphertext.
    sizes, rng = (64 * ring.degree, ring.degree - 16), np.random.default_rng(1)
    slots = rng.integers(0, 1 << packing.slot_bits, sum(sizes), dtype=np.uint64)
    slots[:2] = 0, (1 << packing.slot_bits) - 1
    exact = [
        ((int(slot) * ring.modulus >> packing.slot_bits) + int(noise)) % ring.modulus
        for slot, noise in zip(slots, rng.integers(-21, 22, len(slots)), strict=True)
    ]
    upload, start = [], 0
    for size in sizes:
        part = np.array(exact[start : start + size], dtype=np.uint64)
        upload.append(b"header and seeds" + pack_words(part, ring.modulus_bits))
        start += size
    assert np.array_equal(ciphertext_as_slots(packing, upload, len(slots)), slots)


def masked_witness(rebuilt, others):
    """A vector under a self mask and two pairwise masks: the coordinator rebuilt the first `rebuilt`,
    another site has the last `others`, with the other sign."""
    plan = plan_of("masked")
    layout, updates = Layout(plan.update_vector, plan.packing, 4), updates_of(plan)
    wides = {"weight": [10], "over_range": [0], "over_half_range": [0], "exceeds": [0]}
    vectors = [layout.pack(fields, wides, index) for index, fields in enumerate(updates)]
    masks = ((b"s" * 32, 1), (b"p" * 32, 1), (b"q" * 32, -1))
    masked = vectors[0].copy()
    add_masks(masked, masks, plan.packing.slot_bits)
    sealer = MaskedSealer(plan.packing)
    witness = RoundTrace(
        0, 1, layout=layout, slots=vectors[0], other_slots=vectors[1], upload=list(sealer.protect(masked)),
        total=np.sum(vectors, axis=0, dtype=np.uint64), survivors=(0, 1, 2, 3), masks=masks,
        rebuilt_masks=((b"r" * 32, 1), *masks[:rebuilt]),
        other_masks=((b"o" * 32, 1), *((seed, -sign) for seed, sign in masks[3 - others :])),
    )  # fmt: skip
    return observe(witness, plan, sealer, 1).parties


def test_whoever_knows_every_mask_reads_the_update_and_one_missing_mask_hides_all_of_it():
    assert is_the_update(masked_witness(3, 0)[COORDINATOR].message)
    for rebuilt, others in ((0, 3), (1, 2), (2, 1), (2, 2)):
        found = masked_witness(rebuilt, others)
        assert is_the_update(found[BOTH].message)
        assert is_noise(found[COORDINATOR].message)
    for rebuilt, others in ((0, 0), (0, 2), (1, 1), (2, 0)):
        assert is_noise(masked_witness(rebuilt, others)[BOTH].message)


@pytest.mark.parametrize("protection", masking())
def test_a_witness_holds_every_mask_that_a_party_can_know(protection):
    """Of three sites with threshold 2 one leaves after its keys are shared. The coordinator rebuilds
    its masks and the survivors' self masks, so that with one survivor it knows every mask of the other:
    what the label calls no colluding site tolerated."""
    plan = replace(plan_of(protection, sites=3), threshold=2)
    witness, found = round_seen(plan, absences={"site-2": "submit"})
    assert (len(witness.masks), len(witness.other_masks)) == (3, 3)
    assert len(witness.masks_among(witness.rebuilt_masks)) == 2
    assert len(witness.masks_among(witness.other_masks)) == 1
    assert is_the_update(found.parties[BOTH].message)
    assert is_noise(found.parties[COORDINATOR].message)


@pytest.mark.parametrize("protection", masking())
def test_one_more_honest_survivor_keeps_one_mask_that_nobody_else_knows(protection):
    witness, found = round_seen(plan_of(protection), absences={"site-3": "submit"})
    assert len(witness.masks) == 4
    assert len(witness.masks_among(witness.rebuilt_masks, witness.other_masks)) == 3
    assert is_noise(found.parties[BOTH].message)


# ------------------------------------------------------------------------------------- the numbers


def test_correlation_is_pearsons_and_exactly_one_for_equal_vectors():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=(2, 500))
    assert correlation(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    for size in range(2, 200):
        values = rng.integers(0, 1 << 24, size).astype(np.uint64)
        assert correlation(values, values) == 1.0
        assert correlation(values.astype(float), -values.astype(float)) == -1.0
    assert correlation(np.ones(5), x[:5]) is None
    assert correlation(np.empty(0), np.empty(0)) is None


@pytest.mark.parametrize("size", [8, 31, 500])
def test_one_reading_in_a_thousand_of_unrelated_values_exceeds_chance(size):
    rng = np.random.default_rng(5)
    update = rng.normal(size=size)
    readings = rng.integers(0, 1 << 18, (20_000, size)).astype(float)
    centred = readings - readings.mean(axis=1, keepdims=True)
    found = centred @ (update - update.mean())
    found /= np.linalg.norm(centred, axis=1) * np.linalg.norm(update - update.mean())
    assert 5 <= np.count_nonzero(np.abs(found) > chance(size)) <= 40


def test_of_three_coordinates_or_fewer_every_correlation_is_chance():
    assert [chance(size) for size in range(4)] == [1.0] * 4
    assert chance(4) < 1
    assert chance(31) == pytest.approx(0.552, abs=1e-3)


def test_a_reading_tells_more_than_chance_if_it_is_exact_or_correlates_either_way():
    def tells(correlation, exact=0.0):
        return measured.tells_more_than_chance(Reading(correlation, exact), 31)

    assert tells(0.6) and tells(-0.6) and tells(None, 1.0) and tells(0.0, 1.0)
    assert not tells(0.5) and not tells(-0.5) and not tells(None, 0.9)


def test_a_strip_of_noise_stands_about_its_middle():
    strip = seen_under("encrypted").parties[COORDINATOR].best.strip
    assert 16 < sum(value < 0 for value in strip) < 80


# --------------------------------------------------------------------------------------- the words


def test_the_report_knows_the_parties_by_the_same_names():
    assert words.PARTIES == measured.PARTIES
    assert set(words._UPLOAD) == {(p.masks, p.encrypts) for p in PROTECTIONS.values()}


HEADLINES = {
    "plain": "the coordinator could read all of it, site-1 only the mean of the other 3 sites, "
    "and both together all of it.",
    "encrypted": "the coordinator could read nothing measurable, site-1 only the mean of the other 3 "
    "sites, and both together all of it.",
    "masked": "the coordinator could read only the sum of 4 sites, site-1 only the mean of the other 3 "
    "sites, and both together no more.",
    "layered": "the coordinator could read nothing measurable, site-1 only the mean of the other 3 "
    "sites, and both together no more.",
}  # fmt: skip


def with_message(found, party, **changed):
    view = found.parties[party]
    view = replace(view, message=replace(view.message, **changed))
    return replace(found, parties={**found.parties, party: view})


@pytest.fixture
def quiet():
    """The rounds' numbers with every noise reading at 0.001, so that chance decides no test."""

    def of(protection):
        found = seen_under(protection)
        for party, view in found.parties.items():
            if view.message is not None and view.message.exact < 1:
                found = with_message(found, party, correlation=-0.001)
        return found

    return of


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_headline_says_what_each_party_could_read(quiet, scheme):
    protection, _ = SCHEMES[scheme]
    said = words.headline(quiet(scheme))
    assert said == f"Of site-0's update in round 3, {HEADLINES[protection]}"


CELLS = {
    "plain": ["The upload as it is: the update itself, every coordinate exact."] * 2,
    "encrypted": [
        "The upload, a ciphertext: nothing measurable (correlation -0.001; chance alone reaches 0.047). "
        "The sum stays encrypted for it.",
        "The upload, opened with the key that site-1 has: the update itself, every coordinate exact.",
    ],
    "masked": [
        "The upload less the masks it rebuilt: nothing measurable (correlation -0.001; chance alone reaches 0.047). "
        "The sum of 4 sites: correlation 0.",
        "The upload less every mask that one of them knows: nothing measurable (correlation -0.001; chance "
        "alone reaches 0.047). The sum less site-1's own update, so the mean of the other 3: correlation 0.",
    ],
    "layered": [
        "The upload, masked and encrypted: nothing measurable (correlation -0.001; chance alone "
        "reaches 0.047). The sum stays encrypted for it.",
        "The upload, decrypted, less every mask that one of them knows: nothing measurable (correlation "
        "-0.001; chance alone reaches 0.047). The sum less site-1's own update, so the mean of the "
        "other 3: correlation 0.",
    ],
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_cell_says_what_was_read_with_its_numbers(quiet, scheme):
    protection, _ = SCHEMES[scheme]
    section = words.section(replace(result_of(), seen=quiet(scheme)))
    coordinator, site, both = (cells[0][0] for _, cells in section.rows)
    for found, wanted in zip((coordinator, both), CELLS[protection], strict=True):
        # A correlation of a sum ends in digits that depend on the updates.
        assert re.sub(r"(?<=: correlation 0\.)\d+\.$", "", found) == wanted
    assert site.startswith(
        "It never gets the upload. The sum less site-1's own update, so the mean"
    )
    assert section.columns == tuple(f"under {p}" for p in dict.fromkeys((protection, "plain")))
    assert "999 of 1000" in section.note and "below 0.047" in section.note


def test_a_reading_beyond_chance_is_not_called_nothing(quiet):
    found = with_message(quiet("layered"), BOTH, correlation=-0.31, exact=0.125)
    assert words.headline(found).endswith("and both together something (correlation -0.310).")
    text = words.section(replace(result_of(), seen=found)).rows[2][1][0][0]
    assert (
        "correlation -0.310, where chance alone reaches 0.047; 12 % of the coordinates exact."
        in text
    )
    found = replace(with_message(found, BOTH, correlation=0.31), chance=0.31)
    assert (
        "nothing measurable (correlation 0.31; chance alone reaches 0.31)"
        in (words.section(replace(result_of(), seen=found)).rows[2][1][0][0])
    )


def test_a_correlation_is_never_minus_nothing(quiet):
    found = with_message(quiet("encrypted"), COORDINATOR, correlation=-0.0000001)
    assert "(correlation 0.000;" in words.section(replace(result_of(), seen=found)).rows[0][1][0][0]


def test_a_strip_draws_every_bar_and_says_what_it_shows(quiet):
    section = words.section(replace(result_of(), seen=quiet("encrypted")))
    templates = Environment(loader=PackageLoader("fedcore.report", "templates"), autoescape=True)
    templates.filters["typeset"] = str
    strip = templates.get_template("seen.html.j2").module.strip
    update, read, whole = (
        strip(each) for each in (section.bars, *(section.rows[k][1][0][1] for k in (0, 2)))
    )
    assert update.count("h3V20z") == read.count("h3V20z") == measured.DRAWN
    assert "--plot-ink" in update and "--plot-ink" in whole
    assert "--plot-muted" in read
    assert 'aria-label="site-0&#39;s update: its first 96 coordinates"' in update
    drawn = strip(words.Bars((100, -100, 0), "", exact=True))
    assert [float(y) for y in re.findall(r"20V([\d.]+)h", drawn)] == [1, 39, 20]


def test_a_result_without_a_witness_has_no_section():
    assert words.section(result_of()) is None
    assert words.table(result_of()) == []


def test_a_page_of_several_runs_has_one_section_for_each_protection(quiet):
    def run(name, protection):
        result = result_of(sites=["site-0"], run=name, metrics=["accuracy"], protection=protection)
        return replace(result, seen=quiet(protection)), []

    text = page.render([run("a", "encrypted"), run("b", "plain"), run("c", "encrypted")])
    found = re.findall(r'<span class="run">(\w)</span>Of site-0&#39;s update', text)
    assert found == ["a", "b"]
    assert text.count('data-column="under encrypted"') == 4
    assert text.count('data-column="under plain"') == 8


def test_markdown_has_the_same_words_in_a_table(quiet):
    found = quiet("encrypted")
    text = markdown.render(replace(result_of(sites=["site-0"]), seen=found))
    lines = text[text.index("## What anyone could read of site-0's update") :].splitlines()
    assert lines[2] == "| party | under encrypted | under plain |"
    assert [line.split(" | ")[0] for line in lines[4:7]] == [
        "| coordinator",
        "| another site (site-1)",
        "| both together",
    ]
    assert CELLS["encrypted"][1] in lines[6]
    assert words.headline(found) in lines[8]


# ------------------------------------------------------------------------------------- in a run


def heart(out, **settings):
    chosen = {"rounds": 3, "protection": "layered", "arms": ["federated"]} | settings
    return fedcore.simulate("heart", out=out, **chosen)


def test_a_run_names_the_first_site_that_stays_in_the_first_round_that_is_released(tmp_path):
    drops = ["1:submit:cleveland", "1:keys:va", "2:unmask:cleveland"]
    found = heart(tmp_path / "run", drop=drops).result.seen
    assert (found.site, found.other, found.round) == ("hungary", "switzerland", 2)
    assert found.protection == "layered"
    assert found.contributors == 4  # who leaves at unmask is in the sum all the same


def test_a_resumed_run_keeps_what_its_first_round_showed(tmp_path):
    def stop(row):
        if row.round == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        heart(tmp_path / "run", on_round=stop)
    assert api.resume(tmp_path / "run").result.seen.round == 1
    assert "What anyone could read of cleveland" in (tmp_path / "run" / "report.html").read_text()
    assert "What anyone could read of cleveland" in (tmp_path / "run" / "report.md").read_text()


def test_a_run_of_one_site_has_nobody_who_looks_on(tmp_path):
    rng = np.random.default_rng(0)
    sites = {"only": (rng.normal(size=(40, 3)).astype("f4"), rng.integers(0, 2, 40))}
    task = fedcore.Task(
        "one", lambda rows: rows, lambda: torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy
    )
    found = fedcore.simulate(task, sites, rounds=1, protection="plain", out=tmp_path / "run")
    assert found.result.seen is None
    assert "What anyone could read" not in (tmp_path / "run" / "report.html").read_text()
