"""The label against the table of collusion (PROTOCOL L), and as text a person reads."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import combinations, product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.plans import round_plan

from fedcore.cli.inspect import plan_page
from fedcore.config import build_job, plan_of
from fedcore.errors import PlanRefused
from fedcore.experiment.prepare import describe_plan
from fedcore.report.terminal import as_text
from fedcore.secagg.label import Collusion, Terms, collusion, label_of, label_warnings
from fedcore.secagg.plan import (
    METRIC,
    ModelShape,
    Wide,
    default_threshold,
)
from fedcore.secagg.protections import PROTECTIONS

MASKED = ("masked", "layered")


def plan_for(sites, threshold=0, protection="layered"):
    return round_plan(
        [f"site-{place}" for place in range(sites)], protection, bits=8, most=64, parameters=21,
        max_examples=512, rounds=20, threshold=threshold,
    )  # fmt: skip


def terms_for(sites, threshold=0, protection="layered"):
    return Terms.of_plan(plan_for(sites, threshold, protection))


TABLE = [  # PROTOCOL L: n, t, active, curious, absences; the last is t less active
    (3, 3, 1, 1, 0, 2),
    (3, 2, 0, 0, 1, 2),
    (4, 3, 1, 1, 1, 2),
    (4, 4, 2, 2, 0, 2),
    (5, 4, 2, 2, 1, 2),
    (6, 5, 3, 3, 1, 2),
    (7, 5, 2, 3, 2, 3),
    (8, 6, 3, 4, 2, 3),
    (16, 11, 5, 9, 5, 6),
    (64, 43, 21, 41, 21, 22),
]


@pytest.mark.parametrize("protection", MASKED)
@pytest.mark.parametrize(("sites", "threshold", *Collusion.__annotations__), TABLE)
def test_the_table_of_the_protocol(
    sites, threshold, active, curious, absences, hidden_among, protection
):
    found = collusion(terms_for(sites, threshold, protection))
    assert found == Collusion(active, curious, absences, hidden_among)
    if threshold == default_threshold(sites):
        assert collusion(terms_for(sites, 0, protection)) == found


ACTIVE, CURIOUS, ABSENCES, HIDDEN = "active", "curious", "absences", "hidden_among"
MEANT = {
    "sites that may collude with a coordinator that breaks every rule": ACTIVE,
    "sites that may collude with one that only looks on": CURIOUS,
    "the coordinator breaks every rule": ACTIVE,
    "it keeps to the rules and looks on": CURIOUS,
    "absences survived": ABSENCES,
    "honest updates that each is hidden among, at least": HIDDEN,
}
"""First cells of the rows with figures, in every table of the documentation that has them."""

PAGES = {"docs/threat-model.md": 3, "docs/operations.md": 4}
"""Where these tables are, and how many rows of figures each has."""


def tables_of(text):
    """The tables of a page: lists of rows, each a list of its cells."""
    found = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            found[-1].append([cell.strip() for cell in line.strip("| ").split("|")])
        elif found[-1]:
            found.append([])
    return found


def numbers(cells):
    return [int(re.match(r"\d+", cell)[0]) for cell in cells]


@pytest.mark.parametrize("page", PAGES)
def test_the_tables_of_the_pages_are_the_labels(page):
    """Row by row: the numbers of sites, the thresholds, and what each pair of them withstands."""
    text = (Path(__file__).resolve().parents[3] / page).read_text()
    (table,) = [rows for rows in tables_of(text) if any(row[0] in MEANT for row in rows)]
    by_name = {row[0]: row[1:] for row in table}
    said = next(cells for name, cells in by_name.items() if re.search(r"\bt$", name))
    thresholds = numbers(said)
    if page == "docs/operations.md":
        assert table[0][0].startswith("sixteen sites")
        sites = [16] * len(thresholds)
    else:
        sites = numbers(table[0][1:])
    figures = [collusion(terms_for(n, t)) for n, t in zip(sites, thresholds, strict=True)]
    checked = 0
    for name, cells in by_name.items():
        if name in MEANT:
            assert numbers(cells) == [getattr(each, MEANT[name]) for each in figures], name
            checked += 1
    assert checked == PAGES[page]
    for n, t, cell in zip(sites, thresholds, said, strict=True):
        assert "default" not in cell or t == default_threshold(n)


def test_the_figures_of_readme_are_the_labels_of_default_plans():
    text = (Path(__file__).resolve().parents[3] / "README.md").read_text()
    (said,) = re.findall(r"by default ((?:\d+ of \d+(?: sites)?(?:, )?)+)", text)
    pairs = re.findall(r"(\d+) of (\d+)", said)
    assert len(pairs) == 3
    for colluding, n in pairs:
        figures = collusion(terms_for(int(n), default_threshold(int(n))))
        assert getattr(figures, ACTIVE) == int(colluding)


# ------------------------------------------------------- counting what can be opened in one round


def bits(members):
    return sum(1 << each for each in members)


def sets_of(members, least):
    """Every subset of a set with at least `least` members; sets are the bits of a number."""
    places = [place for place in range(members.bit_length()) if members >> place & 1]
    return [
        bits(chosen)
        for size in range(least, len(places) + 1)
        for chosen in combinations(places, size)
    ]


def both_signed(one, two, colluders, threshold):
    """Whether one honest site a list can sign so that both lists have t signatures of their members.

    A colluding site signs both, an honest one only a list that it is on, and only one of the two.
    """
    honest = ~colluders
    lacking = [
        max(0, threshold - (each & colluders).bit_count() - (each & ~other & honest).bit_count())
        for each, other in ((one, two), (two, one))
    ]
    return sum(lacking) <= (one & two & honest).bit_count()


def both_signed_slowly(one, two, colluders, threshold, sites):
    """The same by trying what every honest site may sign."""
    honest = [place for place in range(sites) if not colluders >> place & 1]
    for signed in product((0, 1, 2), repeat=len(honest)):
        first = bits(p for p, choice in zip(honest, signed, strict=True) if choice == 1)
        second = bits(p for p, choice in zip(honest, signed, strict=True) if choice == 2)
        if first & ~one or second & ~two:
            continue
        counts = [
            ((own | colluders) & each).bit_count() for own, each in ((first, one), (second, two))
        ]
        if min(counts) >= threshold:
            return True
    return False


def smallest_sum(lists, cohort, colluders, threshold):
    """Honest updates in the smallest sum that the coordinator and these colluders can open.

    lists: the survivor lists that t sites signed, one or two. Who signed gives, of each site of the
    cohort, the share of its self-seed where the list has it, else that of its mask root; t shares give
    the secret. A colluding site has both kinds of every site, and the masks it made itself.
    """
    honest = cohort & ~colluders
    if (cohort & colluders).bit_count() >= threshold:
        return 1 if honest else 0
    seeds = roots = 0
    for each in lists:
        seeds |= each
        roots |= cohort & ~each
    # Known roots take every pairwise mask off a site; the others' masks with each other remain.
    single = seeds & roots & honest
    together = honest & ~roots
    sums = [1] if single else []
    if together and not together & ~seeds:
        sums.append(together.bit_count())
    return min(sums, default=sites_never(cohort))


def sites_never(cohort):
    """More sites than there are: nothing opens."""
    return cohort.bit_length() + 1


def counted(sites, threshold, colluders, shrunk=None):
    """(smallest honest sum under a coordinator that looks on, under one that breaks every rule), over
    every cohort that is permitted, every survivor list, and every two lists that t sites can sign.

    shrunk: t of a smaller cohort, if it were another one; three sites may then be invited.
    """
    curious = active = sites + 1
    for cohort in sets_of((1 << sites) - 1, 3 if shrunk else threshold):
        size = cohort.bit_count()
        needed = shrunk(size) if shrunk and size < sites else threshold
        lists = sets_of(cohort, needed)
        for one in lists:
            curious = min(curious, smallest_sum((one,), cohort, colluders, needed))
        for one, two in combinations(lists, 2):
            if both_signed(one, two, colluders, needed):
                active = min(active, smallest_sum((one, two), cohort, colluders, needed))
    return curious, min(curious, active)


def withstood(sites, threshold, place, shrunk=None):
    """The most colluders under whom nothing but sums of two honest updates and more is opened."""
    opened = [
        counted(sites, threshold, (1 << count) - 1, shrunk)[place] <= 1 for count in range(sites)
    ]
    assert all(opened[opened.index(True) :]), "more colluders open no less"
    return opened.index(True) - 1


CASES = [(n, t) for n in range(3, 9) for t in range(n // 2 + 1, n + 1)]


@pytest.mark.parametrize(("sites", "threshold"), CASES)
def test_the_figures_are_what_counting_every_set_of_colluders_gives(sites, threshold):
    """The slow second version: all cohorts, all lists, and the colluders up to their names."""
    found = collusion(terms_for(sites, threshold))
    assert found.curious == withstood(sites, threshold, 0)
    assert found.active == withstood(sites, threshold, 1)
    assert counted(sites, threshold, 0) == (threshold, threshold), "the smallest sum there may be"
    assert counted(sites, threshold, (1 << found.active) - 1)[1] == found.hidden_among
    assert found.absences == sites - threshold


@pytest.mark.parametrize(("sites", "threshold"), [case for case in CASES if case[0] <= 5])
def test_it_matters_how_many_collude_and_not_who(sites, threshold):
    """Nor does the count of signatures differ from trying what every honest site may sign."""
    for colluders in range((1 << sites) - 1):
        first = (1 << colluders.bit_count()) - 1
        assert counted(sites, threshold, colluders) == counted(sites, threshold, first)
        for one, two in product(sets_of((1 << sites) - 1, threshold), repeat=2):
            assert both_signed(one, two, colluders, threshold) == both_signed_slowly(
                one, two, colluders, threshold, sites
            )


@pytest.mark.parametrize("sites", range(3, 9))
def test_the_whole_roster_is_the_worst_cohort(sites):
    """Two lists of t within m sites share 2t - m at least: fewer the larger the cohort is."""
    for threshold in range(sites // 2 + 1, sites + 1):
        whole = collusion(terms_for(sites, threshold)).active
        for cohort in range(max(3, threshold), sites):
            if 2 * threshold > cohort:
                assert collusion(terms_for(cohort, threshold)).active >= whole


@pytest.mark.parametrize(("sites", "active", "smallest"), [(5, 1, 3), (7, 1, 3), (8, 1, 3)])
def test_with_a_threshold_that_shrank_with_the_cohort_the_label_would_be_wrong(
    sites, active, smallest
):
    """The control: what the same count finds where a smaller cohort has the default for its size."""
    said = collusion(terms_for(sites))
    threshold = default_threshold(sites)
    assert withstood(sites, threshold, 1, default_threshold) == active < said.active
    assert counted(sites, threshold, 0, default_threshold)[0] == smallest < threshold


def test_the_figures_up_to_64_sites():
    """By numbers alone: c colluders, who are on both lists, and m - c honest sites who sign one each."""
    for sites in range(3, 65):
        for threshold in range(sites // 2 + 1, sites + 1):
            found = collusion(terms_for(sites, threshold))
            alone = next(c for c in range(sites + 1) if threshold - c <= 1)
            split = next(
                c for c in range(sites + 1)
                if any(2 * (threshold - c) <= m - c for m in range(threshold, sites + 1))
            )  # fmt: skip
            assert (found.curious, found.active) == (alone - 1, min(alone, split) - 1)
            assert found.hidden_among == threshold - found.active >= 2
            assert found.active >= 0


@pytest.mark.parametrize(("protection", "hidden"), [("encrypted", 3), ("plain", 1)])
def test_without_masks_no_colluding_site_is_withstood(protection, hidden):
    assert collusion(terms_for(4, 3, protection)) == Collusion(0, 0, 1, hidden)


# ------------------------------------------------------------------------------ terms of a job


@pytest.mark.parametrize("protection", PROTECTIONS)
@pytest.mark.parametrize("scaled", ["ranges", "federated"])
def test_a_job_and_its_roster_give_the_label_of_the_plan_before_a_row_is_read(protection, scaled):
    names = tuple(f"site-{place}" for place in range(5))
    asked = {"protection": protection, "threshold": 4, "standardise": scaled}
    if PROTECTIONS[protection].encrypts:
        asked["cipher"] = "keystream"
    if protection != "encrypted":
        asked |= {"release": "coordinator", "public_metrics": True}
    job = build_job({"task": "heart"}, asked)
    shape = ModelShape("heart", "00", 21, 0, 13, "columns", (Wide(METRIC + "auc", 512, 10),))
    terms = Terms.of_job(job, names)
    assert terms == Terms.of_plan(plan_of(job, shape, names, 512))
    assert (terms.cipher == "keystream") == PROTECTIONS[protection].encrypts
    assert terms.threshold == 4 and terms.statistics == scaled
    # The number of sites says as much as their names.
    assert label_of(Terms.of_job(job, 5)) == label_of(terms)


def test_a_job_that_takes_features_of_few_sites_says_so_until_they_are_known():
    few = Terms.of_job(build_job({"task": "heart", "single_site_features": True}), 4)
    said = "Statistics of a feature may come from fewer than 3 sites"
    assert said in label_of(few).splitlines()[-2]
    assert said not in label_of(few, ["age"]) and "of age come from fewer" in label_of(few, ["age"])
    assert said not in label_of(few, []) and said not in label_of(
        replace(few, single_site_features=False)
    )


@pytest.mark.parametrize("protection", PROTECTIONS)
@pytest.mark.parametrize("few", [(), ("age",)])
def test_a_label_says_that_sums_of_columns_are_opened_where_they_are(protection, few):
    quiet = Terms(protection, 4)
    before, after = (
        label_of(replace(quiet, statistics=how), few).splitlines()
        for how in ("ranges", "federated")
    )
    said = "Exact sums of every column over all sites are opened before the first round"
    assert said in after[-2] and len(after) <= 8
    assert said not in "\n".join(before)
    assert ("of age come from fewer than 3 sites" in after[-2]) == bool(few)
    assert before[-1] == after[-1]


@pytest.mark.parametrize(
    ("sites", "asked", "text"),
    [
        (5, {"threshold": 2}, "protect.threshold: found 2 for 5 sites, expected 3 to 5"),
        (3, {"threshold": 4}, "protect.threshold: found 4 for 3 sites, expected 2 to 3"),
        (2, {}, "sites: found 2 under 'layered', expected at least 3"),
        (65, {}, "sites: found 65 under 'layered', expected at most 64"),
    ],
)
def test_terms_that_no_plan_can_have_are_refused(sites, asked, text):
    with pytest.raises(PlanRefused) as refused:
        Terms.of_job(build_job({"task": "heart"}, asked), sites)
    assert str(refused.value).startswith(text) and refused.value.remedy


# ------------------------------------------------------------------------------------------- text


@pytest.mark.parametrize("protection", PROTECTIONS)
@given(sites=st.integers(3, 64), data=st.data(), features=st.lists(st.just("age"), max_size=2))
def test_a_label_is_a_few_whole_sentences_without_a_formula(protection, sites, data, features):
    threshold = data.draw(st.integers(sites // 2 + 1, sites))
    terms = terms_for(sites, threshold, protection)
    lines = label_of(terms, features).splitlines()
    assert len(lines) <= 8
    assert lines[0].startswith("Protects against: ")
    assert lines[1].startswith("Does not protect against: ")
    assert "only differential privacy bounds that" in lines[-1]
    for line in [*lines, *label_warnings(terms)]:
        assert line.endswith(".")
        assert not re.search(
            r"[=<>+*/_]|\b[ntc]\b|  |\.\.| 0 (?!of)|None", line.replace("`", "")
        ), line
        for number, more, word in re.findall(r"(\d+)( or more)? (?:colluding )?(sites?)\b", line):
            assert (word == "site") == (number == "1" and not more), line
    assert any("of age, age come" in line or "of age come" in line for line in lines) == bool(
        features
    )


@pytest.mark.parametrize(("sites", "threshold", *Collusion.__annotations__), TABLE)
def test_a_label_says_its_figures(sites, threshold, active, curious, absences, hidden_among):
    lines = label_of(terms_for(sites, threshold)).splitlines()
    protects, does_not, who, hidden, absent, right, _ = lines
    many = {0: "alone,", 1: "with 1 colluding site,"}.get(
        active, f"up to {active} colluding sites,"
    )
    assert f"{many} even if it breaks the rules" in protects
    enough = f"{active + 1} or more colluding sites" if active else "1 colluding site"
    assert f"the coordinator and {enough} together" in does_not
    looks_on = {0: "no site", 1: "1 site"}.get(curious, f"up to {curious} sites")
    assert f"only looks on, {looks_on} may collude" in who
    assert "the coordinator's own identities on the roster count as colluding sites" in who
    if threshold > 2:
        assert f"sums of at least {threshold} sites are opened" in hidden
        assert f"hidden among at least {hidden_among} honest ones" in hidden
        assert (f"with {active} colluding site" in hidden) == (active > 0)
    else:
        assert "each can work out the other's update" in hidden
    assert absent.startswith(f"Absences survived: {absences} of {sites}.")
    assert f"fewer than {threshold} sites is abandoned" in absent
    assert "the result is right if no colluding site lies" in right


def test_four_hospitals_read_this():
    assert label_of(terms_for(4)).splitlines() == [
        "Protects against: the coordinator, alone or with 1 colluding site, even if it breaks the rules. "
        "It sees no site's update; alone, neither their sum nor the model.",
        "Does not protect against: the coordinator and 2 or more colluding sites together: they open "
        "other sites' updates. With 1 colluding site it also sees the sum and the model.",
        "A colluding site is one that hands over all it holds; the coordinator's own identities on the "
        "roster count as colluding sites. If the coordinator keeps to the rules and only looks on, "
        "1 site may collude with it.",
        "Only sums of at least 3 sites are opened; with 1 colluding site among them, each honest update "
        "is hidden among at least 2 honest ones, its own included.",
        "Absences survived: 1 of 4. A round with fewer than 3 sites is abandoned, and no site's update "
        "is opened.",
        "A sum is accepted only with a tag that proves it is of exactly the listed sites, this round, "
        "each once; the result is right if no colluding site lies.",
        "Not bounded by any of this: what the released model itself reveals about training rows; what a "
        "row that changes between two jobs, or a site that is absent from one of two rounds, shows in the "
        "difference of their sums and models; only differential privacy bounds that.",
    ]


def test_who_sees_the_sum_is_in_the_first_two_lines():
    """Under `masked` the coordinator, under `layered` only with a site, never alone."""
    first = {p: label_of(terms_for(16, protection=p)).splitlines()[:2] for p in PROTECTIONS}
    assert "it does see their sum and the model" in first["masked"][0]
    assert "alone, neither their sum nor the model" in first["layered"][0]
    assert first["layered"][1].endswith("With 1 colluding site it also sees the sum and the model.")
    assert "the sum and the model" not in first["masked"][1]
    assert "not their sum and not the model" in first["encrypted"][0]
    assert "opens every site's update" in first["encrypted"][1]
    assert "nobody" in first["plain"][0]
    # Without a colluding site to spare, the coordinator is alone.
    assert "not their sum and not the model" in label_of(terms_for(3, 2)).splitlines()[0]


# --------------------------------------------------------------------------------------- warnings


def test_three_sites_survive_no_absence_and_are_told_what_does():
    (warning,) = label_warnings(terms_for(3))
    assert warning == (
        "Absences survived: 0 of 3. One absent site abandons the round. A threshold of 2 "
        "(`protect.threshold`) survives 1 absence, but tolerates no colluding site; four sites with a "
        "threshold of 3 survive 1 absence and tolerate 1 colluding site."
    )
    # What it says of the alternatives is what they are.
    assert collusion(terms_for(3, 2)) == Collusion(0, 0, 1, 2)
    assert collusion(terms_for(4, 3)) == Collusion(1, 1, 1, 2)
    (other,) = label_warnings(terms_for(3, protection="encrypted"))
    assert "survives 1 absence, but of two sites in a sum, each can work out the other's" in other
    (plain,) = label_warnings(terms_for(3, protection="plain"))
    assert "collu" not in plain and "two sites" not in plain


@pytest.mark.parametrize(
    ("sites", "tolerated"), [(4, "1 colluding site."), (6, "3 colluding sites.")]
)
def test_a_threshold_of_all_sites_is_told_what_one_less_gives(sites, tolerated):
    (warning,) = label_warnings(terms_for(sites, sites, "masked"))
    assert warning.startswith(f"Absences survived: 0 of {sites}.")
    said = f"A threshold of {sites - 1} (`protect.threshold`) survives 1 absence and tolerates "
    assert warning.endswith(said + tolerated)


def test_a_threshold_of_two_is_told_that_each_of_two_reads_the_other():
    for protection in ("encrypted", *MASKED):
        (warning,) = label_warnings(terms_for(3, 2, protection))
        assert "each can work out the other's update" in warning
        assert "The default for 3 sites is 3." in warning


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_the_page_of_a_plan_shows_its_label_threshold_and_warnings(protection):
    for sites, threshold in ((3, 3), (4, 3)):
        plan = plan_for(sites, threshold, protection)
        terms = Terms.of_plan(plan)
        said = {"label": label_of(terms), "warnings": label_warnings(terms)}
        text = " ".join(as_text(plan_page(describe_plan(plan) | said)).split())
        assert f"threshold: {threshold} of {sites} sites at every stage" in text
        assert f"absences survived: {sites - threshold}" in text
        for line in said["label"].splitlines():
            assert line in text
        assert text.count("warning: ") == len(said["warnings"]) == (sites == 3)
        assert all(f"warning: {warning}" in text for warning in said["warnings"])
        # A list of prices ends where rosters under masks do.
        assert (" to 64 " in text and "1024" not in text) == (protection in MASKED)


def test_no_warning_where_there_is_nothing_to_change():
    for protection in PROTECTIONS:
        for sites in (4, 5, 16, 64):
            assert label_warnings(terms_for(sites, protection=protection)) == []
    for sites, threshold in ((1, 0), (2, 0), (3, 2)):
        assert label_warnings(terms_for(sites, threshold, "plain")) == []


@pytest.mark.parametrize("protection", ["encrypted", "layered"])
def test_the_label_names_the_streams_that_hide_what_travels(protection):
    """The figures of collusion are the same: both ciphers' keys are shared by all sites."""
    bfv, stream = (Terms(protection, 4, cipher=c) for c in ("bfv", "keystream"))
    added = " What travels is encrypted by AES-256 streams of a secret that all sites share."
    assert label_of(stream).replace(added, "") == label_of(bfv) and added in label_of(stream)
    assert collusion(stream) == collusion(bfv)


def test_a_plan_and_its_job_have_the_same_cipher_in_their_label():
    job = build_job({"protection": "layered", "cipher": "keystream"})
    assert Terms.of_job(job, 4).cipher == "keystream"
    assert Terms.of_job(build_job({}), 4).cipher == "bfv"


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_a_label_says_that_test_rows_choose_the_model(protection):
    """Also under `plain`: the scores are too good whoever sees them."""
    asked = {"protection": protection, "judge": "released", "keep": "best"}
    chosen = Terms.of_job(build_job({"task": "heart"}, asked), 4)
    last = build_job({"task": "heart"}, {"protection": protection})
    said = "The sites judge released models by the metrics of their test rows"
    assert said in label_of(chosen) and "too good" in label_of(chosen)
    assert said not in label_of(Terms.of_job(last, 4))
    shape = ModelShape("heart", "00", 21, 0, 13, "columns", (Wide(METRIC + "auc", 512, 10),))
    plan = plan_of(build_job({"task": "heart"}, asked), shape, ("a", "b", "c", "d"), 512)
    assert Terms.of_plan(plan) == replace(chosen, sites=("a", "b", "c", "d"))
