"""Whole runs against one slow federation in plain loops (`reference.federation`), arm by arm.

The sites are unequal and their test rows extreme, so a row, weight, seed or count that is taken from
the wrong place moves a number. What the run reports of itself (clipping, unequal sums, the protection
gap) is checked beside it.
"""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from support import reference
from torch import nn

import fedcore
from fedcore.experiment import api, simulation
from fedcore.learning.data.rows import ArrayRows
from fedcore.learning.data.split import FoldSplit
from fedcore.secagg.crypto.plain import PlainFold, PlainSealer
from fedcore.secagg.packing import field_width
from fedcore.secagg.plan import TrainPlan
from fedcore.secagg.protections import PROTECTIONS

pytestmark = pytest.mark.usefixtures("no_drawings")

SIZES = {"a": 25, "b": 41, "c": 63, "d": 102}
SEED, FOLD, FOLDS = 3, 1, 4
RANGES = ((-60.0, 60.0), (-1.5, 1.5), (-60.0, 60.0), (-60.0, 60.0))
INDICATED = (False, False, True, False)
TRAIN = {"lr": 0.05, "momentum": 0.5, "epochs": 2, "batch_size": 16}
ARMS = ("centralised", "local_only", "federated_float", "federated")


def data(site):
    """Unequal means, spreads and classes. Test rows are 15 times as large as the others.

    At site a, x3 is observed in 4 training rows, one too few, and in every test row.
    """
    rng = np.random.default_rng(SIZES[site])
    rows = SIZES[site]
    x = rng.normal(size=(rows, 4)) * [1.0, 1.0, 2.0, 0.5] + rng.normal(size=4)
    y = (x @ [1.0, -0.5, 0.4, 0.3] + rng.normal(scale=0.5, size=rows) > 0.2).astype(np.int64)
    numbered = ArrayRows(torch.arange(rows), torch.from_numpy(y))
    train, test = FoldSplit(SEED, FOLD, FOLDS).divide(numbered, site)
    x[test.x] *= 15
    x[rng.random(rows) < 0.2, 2] = np.nan
    if site == "a":
        x[train.x[4:], 3] = np.nan
    return x, y


def model():
    return nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 2))


TASK = fedcore.Task(
    "byhand", data, model, nn.functional.cross_entropy,
    statistics=tuple(
        fedcore.number(low, high, may_be_missing=flag)
        for (low, high), flag in zip(RANGES, INDICATED, strict=True)
    ),
)  # fmt: skip


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@cache
def by_hand(start=None, *, fold=FOLD, adaptive=True, absences=False):
    """Computed once for all protections; with `absences` as of STAYED."""
    rounds, stayed = (5, STAYED) if absences else (2, {})
    settings = reference.Settings(
        SEED, fold, FOLDS, rounds, 8, start, adaptive, TrainPlan("sgd", **TRAIN), stayed
    )
    return reference.federation(TASK, list(SIZES), RANGES, INDICATED, settings)


SETTINGS = {
    "sites": {site: site for site in SIZES}, "rounds": 2, "bits": 8, "protection": "plain", "folds": FOLDS,
    "resamples": 20, "standardise": "federated", **TRAIN,
}  # fmt: skip


def run(**settings):
    return fedcore.simulate(TASK, **SETTINGS | {"seed": SEED, "fold": FOLD} | settings)


def column(found, arm, name):
    return [row[name] for row in found.rounds if row["arm"] == arm]


# The range: found by calibration; exceeded by every second coordinate; by one in fifty; far too large.
STARTS = (None, 0.002, 0.05, 8.0)


@pytest.mark.parametrize("start", STARTS)
def test_two_rounds_on_unequal_sites_are_the_reference(start):
    slow, found = by_hand(start), run(**({} if start is None else {"range": start}))
    result = found.result

    parameters = reference.flat(found.model)
    np.testing.assert_array_equal(parameters, slow.arms["federated"].model)
    assert result["model_sha256"] == slow.digest

    for name, values in slow.statistics.items():
        assert result["statistics"][name] == pytest.approx(values, rel=1e-12), name

    assert column(found, "federated", "range") == slow.ranges
    values = len(SIZES) * len(parameters)
    assert column(found, "federated", "clipped_fraction") == [n / values for n in slow.over]
    assert result["clipped_fraction"] == sum(slow.over) / (2 * values)
    assert any("clipped to the range" in line for line in result["warnings"]) == (
        sum(slow.over) > 1e-3 * 2 * values
    )

    for name, arm in slow.arms.items():
        for key in ("train_loss", "loss", "accuracy"):
            assert column(found, name, key) == pytest.approx(getattr(arm, key), rel=1e-9), name
        per_site = [result["per_site"][site][name]["accuracy"] for site in SIZES]
        assert per_site == pytest.approx(arm.per_site), name
        assert result["arms"][name]["accuracy"] == pytest.approx(arm.accuracy[-1])


def test_the_reference_meets_every_case_of_the_range_rule():
    """Else the test above could not tell a wrong rule from a right one."""
    ranges = {start: by_hand(start).ranges for start in STARTS}
    assert ranges[0.002] == [0.002, 0.004] and ranges[8.0] == [8.0, 4.0]
    assert ranges[0.05] == [0.05, 0.1] and 0 < by_hand(0.05).over[0] < 0.05 * 4 * 98
    assert ranges[None] == [0.125, 0.125]


def test_statistics_are_numpy_s_of_the_training_rows():
    """Within the fixed-point step, and of no test row: those would move each of them."""
    slow, found = by_hand(8.0), run(range=8.0, arms=("federated",)).result["statistics"]
    for place, (low, high) in enumerate(RANGES):
        columns = [rows[:, place] for rows in slow.train]
        columns = [c[~np.isnan(c)] for c in columns if (~np.isnan(c)).sum() >= 5]
        values = np.concatenate(columns).clip(low, high)
        step = (high - low) / 65535
        assert found["mean"][place] == pytest.approx(values.mean(), abs=step)
        assert found["std"][place] == pytest.approx(values.std(), abs=step)
        assert found["count"][place] == len(values)
        everything = np.concatenate([data(site)[0][:, place] for site in SIZES]).clip(low, high)
        assert abs(np.nanstd(everything) - values.std()) > 10 * step
    assert found["sites"] == [4, 4, 4, 3]


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_every_protected_run_is_the_reference_too(protection):
    assert run(range=0.05, protection=protection).result["model_sha256"] == by_hand(0.05).digest


ABSENT = {
    "drop": ["1:submit:c", "2:keys:a", "2:confirm:d", "3:unmask:b", "4:shares:d"], "rounds": 5, "dropout": 0.0,
}  # fmt: skip
STAYED = {1: ("a", "b", "d"), 2: (), 4: ("a", "b", "c")}
"""Of 4 sites 3 are needed: in round 2 two stayed; in round 3 b had submitted when it left."""


@pytest.mark.parametrize("protection", PROTECTIONS)
@pytest.mark.parametrize("start", [0.002, 8.0])
def test_a_run_with_absences_is_the_reference_of_who_stayed(start, protection):
    """Weights, ranges and clipping count survivors only; 0.002 doubles twice, 8 halves in every round."""
    slow = by_hand(start, absences=True)
    found = run(range=start, protection=protection, **ABSENT)
    assert found.result["model_sha256"] == slow.digest
    assert column(found, "federated", "range") == slow.ranges
    # One for each round that was released, none for round 2; 4 times the first one is the largest.
    assert len(set(slow.ranges)) == (3 if start == 0.002 else 4)
    survivors = column(found, "federated", "survivors")
    assert survivors == [list(STAYED.get(r, tuple(SIZES))) for r in range(1, 6)]
    values = [len(sites) * len(reference.flat(found.model)) for sites in survivors]
    assert column(found, "federated", "clipped_fraction") == [
        over / size if size else None for over, size in zip(slow.over, values, strict=True)
    ]
    assert found.result["clipped_fraction"] == sum(slow.over) / sum(values)
    for name in ARMS:
        for key in ("train_loss", "loss", "accuracy"):
            expected = getattr(slow.arms[name], key)
            got = column(found, name, key)
            assert [v is None for v in got] == [v is None for v in expected]
            pairs = [(a, b) for a, b in zip(got, expected, strict=True) if b is not None]
            assert [a for a, _ in pairs] == pytest.approx([b for _, b in pairs], rel=1e-9), name


def test_a_fixed_range_stays():
    slow, found = by_hand(0.002, adaptive=False), run(range=0.002, adaptive_range=False)
    assert column(found, "federated", "range") == [0.002, 0.002] == slow.ranges
    assert found.result["model_sha256"] == slow.digest


def test_compare_tests_every_fold_once():
    found = fedcore.compare(TASK, **SETTINGS, seeds=[SEED], range=0.002, arms=ARMS).result
    assert [cell["fold"] for cell in found["cells"]] == [0, 1, 2, 3]
    for cell in found["cells"]:
        slow = by_hand(0.002, fold=cell["fold"])
        assert cell["model_sha256"] == slow.digest
        for name, arm in slow.arms.items():
            assert cell["arms"][name]["accuracy"] == pytest.approx(arm.accuracy[-1])
            per_site = [cell["per_site"][site][name]["accuracy"] for site in SIZES]
            assert per_site == pytest.approx(arm.per_site)
    assert any("clipped to the range" in line for line in found["warnings"])


def test_clipping_is_warned_of_and_only_then():
    clipping = run(range=0.002, arms=("federated",)).result
    assert clipping["clipped_fraction"] > 0.1
    (line,) = [line for line in clipping["warnings"] if "clipped to the range" in line]
    assert f"{100 * clipping['clipped_fraction']:.2f} %" in line
    wide = run(range=8.0, arms=("federated",)).result
    assert wide["clipped_fraction"] == 0
    assert not any("clipped to the range" in line for line in wide["warnings"])


# --------------------------------------------------------------------- a sum that opens wrongly

STATISTICS, ROUND_1, ROUND_2 = 0, 1, 2
"""The sums of a run with a stated range, in the order in which they are opened."""


def shift_opened(stand_in, which, by):
    """Under `plain`, where no tag watches: add `by` to the last layer's weights of class 1."""
    fold_total, original, sums = PlainFold.total, PlainSealer.open, []

    def counted(self):
        sums.append(self)
        return fold_total(self)

    def shifted(self, chunks, slots):
        total = original(self, chunks, slots)
        if len(sums) - 1 == which and sums[-1] is not None:
            part = total[1 + 84 : 1 + 96]  # behind the canary: 72 + 12 come before them
            fields = part & np.uint64((1 << field_width(8, len(SIZES))) - 1)
            possible = fields + np.uint64(by) <= len(SIZES) * 255
            part[possible] += np.uint64(by)
            sums[-1] = None  # once: whoever looks on may open other things later
        return total

    # Whoever looks on folds and opens one upload too: not here, where sums are counted.
    stand_in("fedcore.experiment.arms", watch_one=lambda *_: None)
    stand_in(PlainFold, total=counted)
    stand_in(PlainSealer, open=shifted)


def test_a_wrong_last_sum_is_a_protection_gap_of_its_size(stand_in, without):
    """The twin is what the plain integers lead to: the run that nothing disturbed.

    No site's guard looks here: it would leave the model that the wrong sum leads to.
    """
    without(simulation, "judge_all")
    right = run(range=8.0, adaptive_range=False).result
    shift_opened(stand_in, ROUND_2, 200)
    wrong = run(range=8.0, adaptive_range=False).result
    assert right["unequal_rounds"] == 0 and wrong["unequal_rounds"] == 1
    accuracies = [r["arms"]["federated"]["accuracy"] for r in (right, wrong)]
    assert accuracies[0] != accuracies[1]
    gap = wrong["gap"]["protection"]["accuracy"]["mean"]
    assert gap == pytest.approx(accuracies[0] - accuracies[1]) and abs(gap) > 0.05
    assert right["gap"]["protection"]["accuracy"]["mean"] == 0
    assert wrong["model_sha256"] != right["model_sha256"]


def test_a_resumed_run_still_counts_the_rounds_before(stand_in):
    """Round 1 clips twice as much as round 2, and its sum opens wrongly; then the run is interrupted."""

    def interrupt(row):
        if (row["round"], row["arm"]) == (2, "centralised"):
            raise KeyboardInterrupt

    shift_opened(stand_in, ROUND_1, 1)
    with pytest.raises(KeyboardInterrupt):
        run(range=0.005, on_round=interrupt, out="broken")
    found = api.resume("broken", task=TASK)
    by_round = column(found, "federated", "clipped_fraction")
    assert (
        len(by_round) == 2 and all(b < 0.8 * a for a, b in pairwise(by_round)) and by_round[1] > 0
    )
    assert found.result["clipped_fraction"] == pytest.approx(sum(by_round) / 2, rel=1e-12)
    assert found.result["unequal_rounds"] == 1
