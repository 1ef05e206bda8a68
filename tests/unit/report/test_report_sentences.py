"""The report's sentences: what may be claimed, how numbers are said, what is said about nothing."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.results import result_of, stored

from fedcore.experiment.gap import PRIVATE_PARTS
from fedcore.learning.metrics import METRICS
from fedcore.report import latex, markdown, phrases, tables, warnings
from fedcore.report import sentences as say
from fedcore.report.methods import methods, settings_of
from fedcore.report.terminal import as_text, summary
from fedcore.results import ERRORS, Result
from fedcore.types import ARMS, Json

FRACTION = st.floats(-1, 1).map(lambda x: round(x, 6))


def load(name: str) -> Result:
    return result_of(stored(name))


def with_gap(mean: float | None, low: float | None, high: float | None, **more: object) -> Result:
    gap = {"mean": mean, "low": low, "high": high, "method": "a method", "n": 184}
    arms = {"centralised": {"auc": None}, "federated": {"auc": None}}
    if more.get("kind") == "compare":
        arms = {}
    return result_of(metrics=["auc"], gap={"total": {"auc": gap}}, arms=arms, **more)


def of_errors(mean: float, low: float, high: float, pooled: float = 0.026) -> Result:
    """A result whose only metric is MSE."""
    gap = {"mean": mean, "low": low, "high": high, "method": "a method", "n": 184}
    arms = {"centralised": {"mse": pooled}, "federated": {"mse": pooled + mean}}
    return result_of(metrics=["mse"], gap={"total": {"mse": gap}}, arms=arms)


def federated_only(name: str = "heart") -> Json:
    """What `[track] arms = ["federated"]` leaves: nothing to compare with, but the integer twin."""
    result = stored(name)
    for values in (result["arms"], result["site_mean"], *result["per_site"].values()):
        for arm in ("centralised", "local_only", "federated_float"):
            del values[arm]
    for part in ("total", "federation"):
        result["gap"][part] = {}
    return result


def test_names_cover_exactly_the_arms_and_parts_of_results():
    assert tuple(phrases.ARM_NAMES) == ARMS
    assert set(phrases.PART_NAMES) == set(PRIVATE_PARTS)
    assert {m.name for m in METRICS.values() if not m.higher_is_better} == ERRORS


def test_a_loss_is_stated_only_above_zero():
    assert say.lost(with_gap(0.0138, 0.0031, 0.0252)) == [
        "1.38 points of AUC lost against pooling, interval 0.31 to 2.52."
    ]
    assert say.lost(with_gap(-0.001, -0.009, 0.006)) == [
        "No loss measurable against pooling: AUC 0.10 points higher, interval of the loss -0.90 to 0.60."
    ]
    assert say.lost(with_gap(-0.02, -0.03, -0.01)) == [
        "No loss: AUC is 2.00 points higher than pooling, interval 1.00 to 3.00."
    ]


def test_what_a_wide_interval_cannot_show_is_not_said():
    assert say.lost(with_gap(0.0817, -0.0263, 0.1982)) == [
        "Not resolved: 8.17 points of AUC lost on these rows, interval -2.63 to 19.82."
    ]
    assert say.lost(with_gap(-0.02, -0.05, 0.01)) == [
        "Not resolved: 2.00 points of AUC gained on these rows, interval of the loss -5.00 to 1.00."
    ]
    assert say.lost(with_gap(0.0, -0.02, 0.02))[0].startswith(
        "Not resolved: no AUC lost or gained on these rows"
    )
    compared = with_gap(0.003, -0.007, 0.013, kind="compare", seeds=5, folds=5)
    assert say.lost(compared)[0] == (
        "Not resolved: 0.30 points of AUC lost over 5 seeds x 5 folds, interval -0.70 to 1.30."
    )
    edge = say.lost(with_gap(0.0, -0.01, 0.01))[0]
    assert edge.startswith("No loss measurable")


def test_errors_keep_their_unit():
    assert say.lost(of_errors(1.2157, 0.9, 1.5)) == [
        "1.22 of MSE lost against pooling (0.026 centralised, 1.242 federated), "
        "interval 0.900 to 1.50."
    ]
    # One hundredth of the centralised arm's takes the place of a point.
    assert say.lost(of_errors(0.5, -0.6, 0.9, pooled=100.0))[0].startswith("No loss measurable")
    assert say.lost(of_errors(0.5, -0.6, 1.1, pooled=100.0))[0].startswith("Not resolved")
    assert "MSE is 0.0100 lower than pooling" in say.lost(of_errors(-0.01, -0.02, -0.005))[0]
    amounts = [
        phrases.amount(result_of(), "mae", x) for x in (0.02618, 121.57, 98765.4, 3e-9, -0.5)
    ]
    assert amounts == ["0.0262", "122", "98,765", "3.00e-09", "-0.500"]
    assert [phrases.score(x) for x in (1.2411, 0.0042, 123456.7)] == ["1.241", "0.0042", "123,457"]
    assert phrases.in_units([result_of()], ["auc", "mse"]) == "in points (MSE in its own unit)"


def test_the_direction_of_a_metric_is_the_results_own():
    own = result_of(lower_is_better=["distance"])
    assert own.better_by("distance", 0.9, 0.8) == pytest.approx(-0.1)
    assert phrases.amount(own, "distance", 1.2157) == "1.22"
    # A task's own `mse` that it did not declare has a gap of the other sign.
    assert not own.is_error("mse") and result_of().is_error("mse")


def test_an_arm_that_was_not_run_is_not_of_one_class():
    found = federated_only()
    result = result_of(found)
    assert say.ordered_metrics(result) == ["auc", "accuracy"]
    assert say.lost(result) == [
        "Federated AUC 0.883; no centralised arm was run to compare with.",
        "Federated accuracy 0.800.",
    ]
    assert say.gained(result) == ["Not measured: no site was trained alone to compare with."]
    assert "Reference arms" not in methods(result)
    found["rows"]["test"], found["arms"]["federated"] = 0, {"auc": None, "accuracy": None}
    assert say.lost(result_of(found))[0].endswith("– (no test rows).")


def test_a_site_without_test_rows_says_so():
    result = stored("heart")
    site = result["per_site"]["va"]
    site["test_rows"] = 0
    for arm in ("local_only", "federated"):
        site[arm] = {"auc": None, "accuracy": None}
    assert "va – (no test rows)" in say.gained(result_of(result))[0]


@given(FRACTION, FRACTION, FRACTION)
def test_an_interval_that_touches_zero_never_reads_as_a_loss(a: float, b: float, c: float):
    low, mean, high = sorted((a, b, c))
    sentence = say.lost(with_gap(mean, low, high))[0]
    claims_loss = "lost against pooling" in sentence and not sentence.startswith("No loss")
    assert claims_loss == (low > 0)
    if sentence.startswith("No loss measurable"):
        assert -say.NEGLIGIBLE <= low <= 0 <= high <= say.NEGLIGIBLE
    assert "signific" not in sentence


def test_without_an_interval_nothing_is_concluded():
    assert say.lost(with_gap(0.01, None, None)) == [
        "AUC: 1.00 points lost, with no interval to judge it by."
    ]
    assert say.how_measured(with_gap(0.01, None, None)) == ""
    assert say.lost(with_gap(None, None, None)) == ["AUC: – (one class among the test rows)."]
    assert say.lost(with_gap(0.0, 0.0, 0.0)) == ["AUC is exactly that of the centralised arm."]
    assert say.lost(result_of()) == ["No metric was measured."]


@pytest.mark.parametrize(
    ("fraction", "text"),
    [
        (0.0012, "0.12"),
        (-0.001, "-0.10"),
        (0, "0.00"),
        (-0.00001, "0.00"),
        (None, "–"),
        (1, "100.00"),
    ],
)
def test_points_are_hundredths_and_never_minus_zero(fraction: float | None, text: str):
    assert phrases.points(fraction) == text


def test_gains_are_signed_and_turned_for_errors():
    assert phrases.points(0.01, signed=True) == "+1.00"
    assert result_of().better_by("auc", 0.9, 0.8) == pytest.approx(0.1)
    assert result_of().better_by("mse", 0.9, 0.8) == pytest.approx(-0.1)
    assert result_of().better_by("auc", None, 0.8) is None


@pytest.mark.parametrize(
    ("count", "text"),
    [(84, "84 B"), (999, "999 B"), (1000, "1.00 kB"), (13888, "13.9 kB"), (27777, "27.8 kB"),
     (3_530_000, "3.53 MB"), (999_600, "1.00 MB"), (5.2e12, "5.20 TB"), (None, "–")],
)  # fmt: skip
def test_sizes_are_decimal(count: float | None, text: str):
    assert phrases.size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (0.0004, "0.4 ms"), (0.021, "21 ms"), (0.31, "0.31 s"), (12.44, "12.4 s"),
     (200, "3 min 20 s"), (3840, "1 h 4 min"), (None, "–")],
)  # fmt: skip
def test_durations(seconds: float | None, text: str):
    assert phrases.duration(seconds) == text


def test_a_model_smaller_than_a_ciphertext_has_no_bytes_per_parameter():
    small = {
        "bytes_up_per_site_round": 13888,
        "bytes_per_parameter_up": 661.3,
        "ciphertexts_up": 1,
        "ciphertext_used": 0.0093,
    }
    text = say.per_site_and_round(result_of(small))
    assert text == "13.9 kB per site and round (one ciphertext, 1 % used)"
    tiny = say.per_site_and_round(result_of(small, ciphertext_used=0.001))
    assert tiny.endswith("(one ciphertext, under 1 % used)")
    large = {
        "bytes_up_per_site_round": 3_532_000,
        "bytes_per_parameter_up": 3.532,
        "ciphertexts_up": 245,
    }
    assert say.per_site_and_round(result_of(large)) == (
        "3.53 MB per site and round (245 ciphertexts, 3.53 bytes per parameter)"
    )
    plain = {"bytes_up_per_site_round": 80, "ciphertexts_up": 0, "ciphertext_used": None}
    assert say.per_site_and_round(result_of(plain)) == "80 B per site and round"


def test_what_sites_gained_names_the_site_without_an_auc():
    first, caveat = say.gained(load("heart_warned"))
    assert first.startswith("3 of the 3 sites with a known AUC score higher in AUC together")
    assert "switzerland – (one class)" in first
    assert "not as proof" in caveat


def test_many_sites_are_summed_up():
    sites = {
        f"s{i}": {"federated": {"auc": 0.9}, "local_only": {"auc": 0.8 + i / 1000}}
        for i in range(64)
    }
    sentence = say.gained(with_gap(0.0, -0.1, 0.1, per_site=sites))[0]
    assert sentence.startswith("64 of 64 sites score higher")
    assert "s17" not in sentence and "+10.00" in sentence


def test_protection_must_change_nothing_and_says_so_if_it_does():
    result = stored("heart")
    assert say.protection_changed(result_of(result)).startswith("Protection changed no result")
    broken = copy.deepcopy(result)
    broken["gap"]["protection"]["auc"]["mean"] = 0.0001
    assert "not to be trusted" in say.protection_changed(result_of(broken))
    unequal = result_of(result, unequal_rounds=2)
    assert say.protection_changed(unequal).startswith("In 2 rounds")
    assert "Nothing was protected" in say.cost(result_of(result, protection="plain"))[0]


def test_methods_follow_plan_and_result():
    text = methods(load("heart"))
    for fact in (
        "4 sites holding 920 rows (cleveland, n = 303;",
        "735 training and 185 test rows; seed 0, fold 0",
        "SGD (learning rate 0.2, batch size 64)",
        "16-bit integers, two to a slot of 36 bits",
        "ring degree 2048, one 54-bit prime",
        "at most 4 sites cannot overflow",
        "paired bootstrap over 185 test rows",
    ):
        assert fact in text
    assert "not protected" in methods(result_of(stored("heart"), protection="plain"))
    assert "5 seeds x 5 folds" in methods(load("heart_compare"))


ABSENT = {
    "absences": 3, "drop": ["3:submit:va", "5:keys:va"], "dropout": 0.1,
    "abandoned_rounds": [{"round": 5, "stage": "keys", "left": 2}],
}  # fmt: skip


def with_absences(threshold: int = 3, **more: object) -> Result:
    found = stored("heart") | ABSENT
    found["plan"]["threshold"] = threshold
    return result_of(found, **more)


def test_absences_are_among_the_facts_and_none_are_not():
    facts = say.setting(with_absences())
    assert facts[-2:] == ["3 absences", "1 round abandoned"]
    assert say.setting(with_absences(absences=1, abandoned_rounds=[]))[-1] == "1 absence"
    without = say.setting(with_absences(absences=0, abandoned_rounds=[]))
    assert without == say.setting(load("heart"))


def test_methods_say_the_threshold_and_that_absences_were_simulated():
    text = methods(with_absences())
    assert "A round needed 3 of 4 sites at every stage." in text
    assert (
        "Absences were simulated: 3 times a site left a round, and 1 round in which too few" in text
    )
    quiet = methods(with_absences(absences=0, abandoned_rounds=[]))
    assert "A round needed 3 of 4 sites" in quiet and "simulated" not in quiet
    one = methods(with_absences(absences=1, abandoned_rounds=[], protection="plain"))
    assert "1 time a site left a round." in one and "A round needed" in one
    plain = methods(with_absences(absences=0, abandoned_rounds=[], protection="plain"))
    assert "A round needed" not in plain


def test_methods_say_who_trained_on_the_rows_of_absent_sites():
    """The centralised arm goes on where a round is abandoned: it saw more rows than the federation."""
    assert "splits and saw as many training rows." in methods(load("heart"))
    text = methods(with_absences())
    assert "as many training rows" not in text
    assert "centralised and local only trained on all sites' rows in every round" in text
    assert ", and federated averaging in floating point on those of each round's survivors." in text
    arms = {
        k: v for k, v in stored("heart")["arms"].items() if k in ("federated", "federated_float")
    }
    assert "trained on all sites' rows" not in methods(with_absences(arms=arms))


@pytest.mark.parametrize(
    ("protection", "masks", "ciphertexts"),
    [("plain", False, False), ("encrypted", False, True), ("masked", True, False), ("layered", True, True)],
)  # fmt: skip
def test_methods_name_the_layers_of_the_protection(protection: str, masks: bool, ciphertexts: bool):
    text = methods(result_of(stored("heart"), protection=protection))
    assert ("pairwise and self masks" in text) == ("X25519 with ML-KEM-768" in text) == masks
    assert ("BFV homomorphic" in text) == ("ring degree 2048" in text) == ciphertexts
    assert ", put under" in text if protection == "layered" else ", put under" not in text


def test_runs_that_differ_in_their_absences_say_so():
    one, other = with_absences(), with_absences(4, drop=["3:submit:va"], dropout=0.0)
    _, own = settings_of([one, other])
    assert own[0][:3] == ["threshold 3", "drop 3:submit:va and 5:keys:va", "dropout 0.1"]
    assert own[1][:2] == ["threshold 4", "drop 3:submit:va"]
    assert not any("dropout" in fact for fact in own[1])


def test_methods_leave_out_what_the_result_does_not_say():
    text = methods(result_of(sites=["a"], metrics=["accuracy"]))
    assert "None" not in text and "learning rate" not in text and "interval" not in text


@pytest.mark.parametrize("name", ["heart", "heart_warned", "heart_compare"])
def test_no_sentence_prints_a_python_value(name: str):
    result = load(name)
    said = [*say.lost(result), *say.gained(result), *say.cost(result), *say.setting(result)]
    said += [
        say.title(result),
        methods(result),
        *result.warnings,
        *say.label_lines(result.label),
    ]
    for text in said:
        assert not any(word in text for word in ("None", "nan", "{", "}", "True", "False")), text


def test_plain_leaves_no_control_characters():
    assert phrases.plain("a\x1b[31mb\n c\u202ed\x00") == "a\ufffd[31mb c\ufffdd\ufffd"


def test_run_names_are_folders_and_distinct():
    one, other = load("heart"), load("heart_warned")
    assert say.run_names([one, other]) == ["heart-encrypted-001", "heart-encrypted-002"]
    assert len(set(say.run_names([one, one, result_of()]))) == 3
    assert say.run_tags([one, other]) == ["heart-encrypted-001", "heart-encrypted-002"]
    assert say.run_labels([one] * 4)[3] == "D, heart-encrypted-001 (4)"
    assert say.run_tags([one, result_of(stored("heart_warned"), run="runs/" + "long" * 9)]) == [
        "A",
        "B",
    ]


def test_what_differs_between_runs_is_named():
    one, other = load("heart"), load("heart_warned")
    shared, own = settings_of([one, other])
    assert "20 rounds" in shared and not any("seed" in fact for fact in shared)
    assert own == [
        ["16 bits", "seed 0", "fold 0 (5 folds)"],
        ["8 bits", "seed 3", "fold 2 (5 folds)"],
    ]
    assert settings_of([one, one])[1] == [["the same plan, training and seed"]] * 2
    found = stored("heart_warned")
    found["plan"]["server"] = {"optimiser": "fedavg"}
    assert settings_of([one, result_of(found)])[1][1][:2] == ["8 bits", "server fedavg"]


SPAN = st.tuples(FRACTION, FRACTION, FRACTION).map(sorted)


@given(st.dictionaries(st.sampled_from(["auc", "accuracy", "mse", "mae"]), SPAN, min_size=1))
def test_headline_names_the_worst_loss_of_any_metric(gaps):
    """Whoever reads the headline only is told that something was lost, and never of a negative loss."""
    found = {m: {"mean": mean, "low": low, "high": high} for m, (low, mean, high) in gaps.items()}
    scores = dict.fromkeys(gaps, 0.5)
    result = result_of(
        metrics=list(gaps), gap={"total": found},
        arms={"centralised": scores, "federated": scores},
    )  # fmt: skip
    headline = say.lost(result)[0]
    lost = {m: mean / (0.5 if m in ERRORS else 1) for m, (low, mean, _) in gaps.items() if low > 0}
    assert ("lost against pooling" in headline and "No loss" not in headline) == bool(lost)
    if lost:
        worst = max(lost.values())
        named = [m for m in lost if f" of {phrases.metric_name(m)} lost" in headline]
        assert len(named) == 1 and lost[named[0]] == worst
    assert len(say.lost(result)) == len(gaps)
    before_interval = [sentence.partition("interval")[0] for sentence in say.lost(result)]
    assert not [text for text in before_interval if " -" in text.replace(" - ", "")]


def test_a_model_that_learnt_nothing_is_a_warning():
    def warned(arms, constant=None, predicts="class"):
        found = {} if constant is None else {"constant": {"predicts": predicts, **constant}}
        result = result_of(metrics=list(arms["federated"]), arms=arms, gap={}, **found)
        return " ".join(warnings.of_run(result))

    low = warned({"centralised": {"auc": 0.486}, "federated": {"auc": 0.61}})
    assert "AUC below 0.5 (centralised): worse than guessing" in low and "not scaled" in low
    assert "guessing" not in warned({"centralised": {"auc": 0.5}, "federated": {"auc": 0.61}})
    arms = {"centralised": {"accuracy": 0.7}, "federated": {"accuracy": 0.65}}
    most = "No arm is better than always answering the most frequent class (accuracy 0.700)"
    assert most in warned(arms, {"accuracy": 0.7})
    assert "No arm is better" not in warned(arms, {"accuracy": 0.69})
    assert "No arm is better" not in warned(arms)
    errors = {"centralised": {"mae": 3.2}, "federated": {"mae": 3.4}}
    middle = "No arm is better than always answering the mean of the training targets (MAE 3.100)"
    assert middle in warned(errors, {"mae": 3.1}, "mean")
    assert "No arm is better" not in warned(errors, {"mae": 3.3}, "mean")


def test_what_the_arms_must_beat_is_in_every_table_of_arms():
    stated = {"predicts": "class", "auc": 0.5, "accuracy": 0.546}
    one = result_of(stored("heart"), constant=stated)
    (grid,) = tables.arms([one])
    row = [cell.text for cell in grid.rows[-1] if cell.text]
    assert row == ["majority / chance", "0.500", "0.546"]
    assert "most frequent class of the training rows" in grid.note
    assert "majority / chance" in as_text(summary(one)) and "0.546" in as_text(summary(one))
    assert "| majority / chance | 0.500 |" in markdown.render(one)
    assert "majority / chance & 0.500" in latex.render(one)
    # Beside a run of before, which does not know it, and one of a regression.
    of_values = result_of(stored("heart"), constant=stated | {"predicts": "mean"})
    several = tables.arms([one, result_of(stored("heart")), of_values])
    named = {row[0].text: [cell.text for cell in row[1:]] for row in several[0].rows}
    assert named["majority / chance"] == ["0.500", "–", "–"]
    assert named["training mean"] == ["–", "–", "0.500"]
    assert "majority" not in markdown.render(result_of(stored("heart")))
