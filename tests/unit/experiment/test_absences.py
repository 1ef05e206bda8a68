"""Who is missing when: parsing, chance, and what runs with absences leave behind in every protection.

The protocol machines are held against `absences.outcome` elsewhere; here it is held against a count
made stage by stage, and whole runs against `plain`, which follows it.
"""

from __future__ import annotations

import io
import itertools
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from torch import nn

import fedcore
from fedcore.cli import console, main
from fedcore.cli.progress import RoundsProgress
from fedcore.cli.reproduce import reproduce
from fedcore.errors import Abandoned, BadInput, PlanRefused, RoundAbandoned, UnknownName
from fedcore.experiment import api
from fedcore.experiment.prepare import job_for, prepare
from fedcore.experiment.run import all_abandoned
from fedcore.experiment.simulation import Leaving
from fedcore.files import read_json, read_rounds
from fedcore.results import RoundRow
from fedcore.secagg.plan import default_threshold
from fedcore.secagg.protections import PROTECTIONS, SCHEMES
from fedcore.secagg.protocol.absences import (
    ABANDONED_AT,
    STAGES,
    Absence,
    earliest,
    outcome,
    parse_absence,
)

pytestmark = pytest.mark.usefixtures("no_drawings")

ROSTER = ("a", "b", "c", "d")


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# ------------------------------------------------------------------------------------- the words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3:submit:va", Absence(3, "submit", "va")),
        (" 6:keys:St. Mary: east ", Absence(6, "keys", "St. Mary: east")),
        ("1:release:3", Absence(1, "release", "3")),
    ],
)
def test_an_absence_is_round_stage_site(text, expected):
    assert parse_absence(text, ("va", "St. Mary: east", "3"), 5) == expected


@pytest.mark.parametrize(
    "text", ["", "3", "3:submit", "3:submit:", ":submit:va", "x:submit:va", "-1:keys:va"]
)
def test_anything_else_is_no_absence(text):
    with pytest.raises(BadInput, match="expected round:stage:site") as refused:
        parse_absence(text, ("va",), 5)
    assert "--drop 3:submit:va" in refused.value.remedy


@pytest.mark.parametrize("number", [0, 7])
def test_rounds_end_with_the_metrics_only_one(number):
    with pytest.raises(BadInput, match=f"found round {number}, expected 1 to 6"):
        parse_absence(f"{number}:submit:va", ("va",), 5)


@pytest.mark.parametrize(
    ("text", "message", "near"),
    [("3:sumbit:va", "stage: found 'sumbit'", "submit"), ("3:submit:vaa", "site: found 'vaa'", "va")],
)  # fmt: skip
def test_unknown_words_come_with_the_nearest(text, message, near):
    with pytest.raises(UnknownName, match=message) as refused:
        parse_absence(text, ("va", "cleveland"), 5)
    assert f"did you mean {near!r}?" in refused.value.remedy


def test_of_two_absences_of_one_site_the_earlier_stage_counts():
    absences = [
        Absence(2, "unmask", "a"), Absence(2, "keys", "a"), Absence(2, "confirm", "a"), Absence(2, "release", "b"),
        Absence(3, "keys", "c"),
    ]  # fmt: skip
    for order in itertools.permutations(absences):
        assert earliest(order, 2) == {"a": "keys", "b": "release"}
    assert earliest(absences, 1) == {}


# --------------------------------------------------------------------------------------- counting


def counted(threshold, absences):
    """Stage by stage: (survivors, None) or (None, (stage, how many stayed)). From unmask on it waits."""
    here, summed = set(ROSTER), None
    for stage in STAGES[: STAGES.index("unmask")]:
        here -= {site for site, left in absences.items() if left == stage}
        if len(here) < threshold:
            return None, (stage, len(here))
        if stage == "submit":
            summed = tuple(site for site in ROSTER if site in here)
    return summed, None


@pytest.mark.parametrize("threshold", [3, 4])
def test_outcome_is_the_count_of_every_pattern_of_absences(threshold):
    """All 7^4 patterns of four sites."""
    kinds = Counter()
    for stages in itertools.product((None, *STAGES), repeat=len(ROSTER)):
        absences = {s: stage for s, stage in zip(ROSTER, stages, strict=True) if stage}
        survivors, abandoned = counted(threshold, absences)
        if abandoned is None:
            found = outcome(ROSTER, threshold, absences)
            assert found == survivors, absences
            kinds["released", len(found)] += 1
            continue
        with pytest.raises(RoundAbandoned) as caught:
            outcome(ROSTER, threshold, absences)
        error = caught.value
        assert (error.stage, error.left) == abandoned, absences
        assert error.threshold == threshold and error.exit_code == 4
        kinds[error.stage] += 1
    assert kinds["released", 4] and bool(kinds["released", 3]) == (threshold == 3)
    assert {kind for kind in kinds if isinstance(kind, str)} == set(ABANDONED_AT)


def test_a_site_that_leaves_after_it_submitted_is_in_the_sum():
    assert outcome(ROSTER, 3, {"b": "confirm"}) == ROSTER
    assert outcome(ROSTER, 3, {"b": "unmask"}) == ROSTER
    assert outcome(ROSTER, 3, {"b": "submit"}) == ("a", "c", "d")


# ---------------------------------------------------------------------------------------- chance


def test_chance_takes_its_share_of_sites_at_every_stage():
    leaving = Leaving(chance=0.3, seed=5)
    found = Counter(
        (site, stage)
        for round_ in range(1, 2001)
        for site, stage in leaving.of(round_, ROSTER, 2000).items()
    )
    assert sum(found.values()) == pytest.approx(0.3 * 2000 * 4, rel=0.1)
    for site in ROSTER:
        assert sum(found[site, s] for s in STAGES) == pytest.approx(0.3 * 2000, rel=0.15)
    for stage in STAGES:
        assert sum(found[s, stage] for s in ROSTER) == pytest.approx(0.3 * 2000 * 4 / 6, rel=0.15)


def test_chance_follows_the_seed_and_the_round_and_nothing_else():
    def of(seed, sites=ROSTER):
        leaving = Leaving(chance=0.5, seed=seed)
        return [leaving.of(round_, sites, 9) for round_ in range(1, 10)]

    assert of(1) == of(1) != of(2)
    assert len({json.dumps(dict(sorted(each.items()))) for each in of(1)}) > 5
    assert of(1, ROSTER[::-1]) == of(1)  # of a site, whoever else is there


def test_chance_acts_on_rounds_of_training_only():
    always = Leaving((Absence(6, "keys", "a"),), chance=0.999999)
    assert set(always.of(5, ROSTER, 5)) == set(ROSTER)
    assert always.of(6, ROSTER, 5) == {"a": "keys"}
    assert Leaving().of(1, ROSTER, 5) == {}


def test_what_is_named_and_what_chance_takes_are_put_together():
    drawn = Leaving(chance=0.999999, seed=1).of(1, ROSTER, 5)
    later = {site for site, stage in drawn.items() if stage != "keys"}
    both = Leaving(tuple(Absence(1, "keys", site) for site in later), 0.999999, 1)
    assert later and set(both.of(1, ROSTER, 5).values()) == {"keys"}


# ------------------------------------------------------------------------------------------- runs


def data(site):
    rng = np.random.default_rng(site)
    x = rng.normal(size=(40 + 10 * site, 4)).astype("f4")
    return x, (x[:, 0] + rng.normal(scale=0.3, size=len(x)) > 0).astype("i8")


TASK = fedcore.Task(
    "absent", data, lambda: nn.Linear(4, 2), nn.functional.cross_entropy, ("accuracy", "auc"),
    sites={"a": 1, "b": 2, "c": 3, "d": 4},
)  # fmt: skip
SETTINGS = {"rounds": 4, "resamples": 20, "range": 0.25}


def run(**settings):
    return fedcore.simulate(TASK, **SETTINGS | settings)


def rows_of(found, arm="federated"):
    return [row for row in found.rounds if row["arm"] == arm]


def unmeasured(found):
    """Rows without what is of the machine or the protection's sizes."""
    measured = {"seconds", "bytes", "peak"}
    return [
        {k: v for k, v in row.items() if k.split("_")[0] not in measured} for row in found.rounds
    ]


def unnamed(rows):
    """`encrypted` has no keys and shares, so it names another stage for the same abandoned round."""
    return [row | ({"abandoned": True} if "abandoned" in row else {}) for row in rows]


def require_the_rounds_of(plain, found):
    if found.result["protection"] == "encrypted":
        assert unnamed(unmeasured(found)) == unnamed(unmeasured(plain))
        return
    assert unmeasured(found) == unmeasured(plain)
    assert found.result["abandoned_rounds"] == plain.result["abandoned_rounds"]


PATTERNS = {
    "one at each stage": ("1:keys:a", "2:shares:b", "3:submit:c", "4:confirm:d"),
    "one late": ("1:unmask:a", "2:release:b", "3:unmask:d,3:release:d"),
    "abandoned early": ("2:keys:a,2:submit:b", "4:confirm:c"),
    "abandoned at the last moment": ("2:confirm:a,2:confirm:b", "3:shares:c,3:confirm:d"),
    "waited for": (
        "2:unmask:a,2:unmask:b,2:unmask:c,2:unmask:d",
        "3:release:a,3:release:b",
        "4:submit:c,4:release:d",
    ),
    "no metrics": ("5:keys:a,5:unmask:b",),
    "metrics of three": ("5:submit:d",),
}

EVERY = {name: {"protection": p, "cipher": c} for name, (p, c) in SCHEMES.items()}
"""The settings of every protection with every cipher it takes."""


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_protection_ends_where_plain_ends(pattern):
    drop = [part for text in PATTERNS[pattern] for part in text.split(",")]
    # The other arms are trained without any protection: one pattern holds them against each other, too.
    arms = {} if pattern == "one late" else {"arms": "federated"}
    plain, *others = (run(**scheme, **arms, drop=drop) for scheme in EVERY.values())
    for found in others:
        assert found.result["model_sha256"] == plain.result["model_sha256"]
        assert found.result["unequal_rounds"] == 0
        require_the_rounds_of(plain, found)
        for key in ("protected_metrics", "protected_metrics_sites", "absences", "statistics"):
            assert found.result[key] == plain.result[key], key
        for metric in ("accuracy", "auc"):
            gap = found.result["gap"]["protection"][metric]
            assert (gap["mean"], gap["low"], gap["high"]) == (0.0, 0.0, 0.0)
    whole = run(protection="plain", **arms)
    assert plain.result["model_sha256"] != whole.result["model_sha256"] or (
        pattern in ("one late", "no metrics", "metrics of three")
    )


@pytest.mark.parametrize("scheme", EVERY)
def test_chance_takes_the_same_sites_in_every_protection(scheme):
    settings = {"rounds": 6, "dropout": 0.25, "arms": ("federated",)}
    plain, found = run(protection="plain", **settings), run(**EVERY[scheme], **settings)
    require_the_rounds_of(plain, found)
    assert found.result["model_sha256"] == plain.result["model_sha256"]
    survivors = [row["survivors"] for row in rows_of(plain)]
    assert [] in survivors and [*ROSTER] in survivors and {3, 4} <= set(map(len, survivors))


def test_a_row_names_its_survivors_and_one_that_was_abandoned_why():
    found = run(
        drop=["1:submit:b", "2:keys:a", "2:submit:c", "3:confirm:a", "3:confirm:b", "4:release:d"]
    )
    rows = rows_of(found)
    assert [row["survivors"] for row in rows] == [["a", "c", "d"], [], [], ["a", "b", "c", "d"]]
    assert [row.get("abandoned") for row in rows] == [
        None, "at submit: 2 of 4 sites stayed, 3 needed", "at confirm: 2 of 4 sites stayed, 3 needed", None,
    ]  # fmt: skip
    assert found.result["abandoned_rounds"] == [
        {"round": 2, "stage": "submit", "left": 2}, {"round": 3, "stage": "confirm", "left": 2},
    ]  # fmt: skip
    assert found.result["absences"] == 6
    assert len(found.rounds) == 4 * 4  # the other arms went on
    counted = {site: entry["rounds_in_sum"] for site, entry in found.result["per_site"].items()}
    assert counted == {"a": 2, "b": 1, "c": 2, "d": 2}
    page = (found.directory / "report.html").read_text()
    assert "rounds in the sum" in page and re.findall(r">(\d) of 4<", page) == ["2", "1", "2", "2"]
    without = run(protection="plain").directory / "report.html"
    assert "rounds in the sum" not in without.read_text()


def test_an_abandoned_round_changes_nothing_of_either_federated_arm():
    found = run(protection="plain", drop=["2:keys:a", "2:keys:b"])
    for arm in ("federated", "federated_float"):
        first, second, third, _ = rows_of(found, arm)
        for key in ("accuracy", "auc", "loss", "gradient_steps", "examples_seen"):
            assert second[key] == first[key], key
        assert second["train_loss"] is None
        assert third["loss"] != second["loss"] and third["examples_seen"] > second["examples_seen"]
    for arm in ("centralised", "local_only"):
        first, second, *_ = rows_of(found, arm)
        assert (
            second["loss"] != first["loss"]
            and second["examples_seen"] == 2 * first["examples_seen"]
        )
    # The range is of the state too: no count reached anybody.
    assert rows_of(found)[2]["range"] == rows_of(found)[1]["range"]


def test_the_float_arm_averages_the_same_survivors():
    """Quantisation alone lies between them: without absences of its own the gap would be a site."""
    found = run(
        protection="plain", bits=24, drop=["1:submit:d", "2:shares:d", "3:keys:d", "4:submit:d"]
    )
    arms = {arm: rows_of(found, arm) for arm in ("federated", "federated_float")}
    for federated, floating in zip(*arms.values(), strict=True):
        assert federated["loss"] == pytest.approx(floating["loss"], abs=1e-6)
        assert federated["examples_seen"] == floating["examples_seen"]
    without = fedcore.simulate(
        TASK, sites={"a": 1, "b": 2, "c": 3}, **SETTINGS | {"protection": "plain", "bits": 24, "max_examples": 128}
    )  # fmt: skip
    assert arms["federated"][-1]["train_loss"] == pytest.approx(
        rows_of(without)[-1]["train_loss"], abs=1e-5
    )


def test_the_threshold_is_the_job_s():
    drop = ["2:submit:a"]
    assert [row["survivors"] for row in rows_of(run(protection="plain", drop=drop, threshold=4))][
        1
    ] == []
    assert len(rows_of(run(protection="plain", drop=drop, threshold=3))[1]["survivors"]) == 3
    assert run(protection="plain").result["plan"]["threshold"] == default_threshold(4) == 3
    assert run(protection="plain", threshold=4).result["plan"]["threshold"] == 4


@pytest.mark.parametrize("threshold", [-1, 0, 2, 5])
def test_a_threshold_outside_half_to_all_is_refused_before_a_site_is_loaded(threshold):
    def never(site):
        raise AssertionError("a site was loaded")

    task = fedcore.Task("t", never, TASK.model, TASK.loss, sites=TASK.sites)
    for protection in PROTECTIONS:
        with pytest.raises(
            PlanRefused, match=f"found {threshold} for 4 sites, expected 3 to 4"
        ) as no:
            fedcore.simulate(task, protection=protection, threshold=threshold)
        assert "the default, 3" in no.value.remedy
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"drop": ["3:sumbit:a"]}, UnknownName, "round.drop: stage: found 'sumbit'"),
        ({"drop": ["3:submit:e"]}, UnknownName, "round.drop: site: found 'e'"),
        ({"drop": ["6:submit:a"]}, BadInput, "found round 6, expected 1 to 5"),
        ({"drop": "3:submit:a,3"}, BadInput, "found '3', expected round:stage:site"),
        ({"drop": [3]}, BadInput, r"round\.drop\.0: found 3"),
        ({"dropout": 1}, BadInput, r"round\.dropout: found 1, expected less than 1"),
        ({"dropout": -0.1}, BadInput, r"round\.dropout: found -0\.1"),
    ],
)
def test_wrong_absences_are_refused_before_anything_is_written(settings, error, message):
    with pytest.raises(error, match=message):
        run(**settings)
    assert not list(Path().iterdir())


def test_absences_come_from_every_kind_of_setting(tmp_path):
    def leaving(*layers):
        return prepare(
            *job_for(TASK, {"rounds": 4, "protection": "plain"}, *layers)
        ).federation.leaving

    expected = Leaving((Absence(3, "submit", "a"), Absence(5, "keys", "b")), 0.1, 0)
    for drop in ("3:submit:a, 5:keys:b", ["3:submit:a", "5:keys:b"], ("3:submit:a", "5:keys:b")):
        assert leaving({"drop": drop, "dropout": 0.1}) == expected
    assert leaving({"round": {"drop": ["3:submit:a", "5:keys:b"], "dropout": 0.1}}) == expected
    assert leaving({"seed": 7}).seed == 7


# ----------------------------------------------------------------------------- what a run then says


def test_abandoned_rounds_are_warnings():
    drop = ["2:keys:a", "2:keys:b", "3:confirm:a", "3:confirm:b"]
    for protection in PROTECTIONS:
        warnings = run(protection=protection, drop=drop).result["warnings"]
        (abandoned,) = [line for line in warnings if "were abandoned" in line]
        places = "2 at submit" if protection == "encrypted" else "2 at keys"
        assert abandoned.startswith("2 of 4 rounds")
        assert f"{places}, 3 at confirm" in abandoned
    one = run(protection="masked", drop=drop[:2]).result["warnings"]
    assert any(line.startswith("1 of 4 rounds was abandoned") for line in one)
    assert not any("abandoned" in line for line in run(protection="plain").result["warnings"])


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_sites_absent_from_unmask_on_only_delay_the_round(protection):
    """The sum may be known by then, so the round waits for them: nothing is abandoned, nothing lost."""
    drop = [f"{number}:{stage}:{site}" for number, stage in ((2, "unmask"), (3, "release"))
            for site in ROSTER]  # fmt: skip
    found, whole = run(protection=protection, drop=drop), run(protection=protection)
    assert found.result["model_sha256"] == whole.result["model_sha256"]
    assert found.result["abandoned_rounds"] == [] and found.result["absences"] == 8


def test_without_a_metrics_only_round_the_metrics_are_null_and_the_run_ends():
    found = run(protection="plain", drop=["5:submit:a", "5:submit:b"]).result
    assert found["protected_metrics"] is found["protected_metrics_bound"] is None
    assert found["protected_clipped"] is None and found["protected_metrics_sites"] == []
    assert found["abandoned_rounds"] == [] and found["absences"] == 2
    assert any("metrics-only round was abandoned" in line for line in found["warnings"])
    assert found["model_sha256"] == run(protection="plain").result["model_sha256"]


@pytest.mark.parametrize("protection", PROTECTIONS)
def test_an_abandoned_metrics_only_round_is_a_warning(protection):
    found = run(protection=protection, drop=["5:submit:a", "5:submit:b"]).result
    (line,) = [line for line in found["warnings"] if "metrics-only round was" in line]
    assert "abandoned at submit" in line
    assert found["protected_metrics_abandoned"] == {"stage": "submit", "left": 2}
    late = run(protection=protection, drop=["5:unmask:a", "5:unmask:b"]).result
    assert late["protected_metrics_abandoned"] is None


def test_metrics_of_the_survivors_are_of_their_rows():
    """Without d the metrics-only round knows the accuracy over the test rows of a, b and c."""
    found = run(protection="plain", drop=["5:submit:d", "3:submit:d"]).result
    assert found["protected_metrics_sites"] == ["a", "b", "c"]
    sites = [found["per_site"][site] for site in "abc"]
    hits = sum(round(s["federated"]["accuracy"] * s["test_rows"]) for s in sites)
    expected = hits / sum(s["test_rows"] for s in sites)
    assert found["protected_metrics"]["accuracy"] == pytest.approx(expected)


def test_own_metrics_count_the_survivors_offsets():
    def evaluate(module, rows):
        return {"negative": (-2.5 * len(rows), len(rows))}

    task = fedcore.Task(
        "own", data, TASK.model, TASK.loss, ("negative",), evaluate=evaluate, sites=TASK.sites
    )
    found = fedcore.simulate(task, **SETTINGS, protection="plain", drop=["2:keys:a", "5:keys:b"])
    assert found.result["protected_metrics"]["negative"] == pytest.approx(-2.5)
    before = [row["protected_negative_before"] for row in rows_of(found)]
    assert before == [pytest.approx(-2.5)] * 4


ALL = ["1:keys:a", "1:keys:b", "2:submit:a", "2:submit:b"]


def test_a_run_of_abandoned_rounds_only_ends_without_a_result():
    with pytest.raises(Abandoned, match="found all 2 rounds abandoned") as ended:
        run(rounds=2, drop=ALL, out="nothing")
    assert ended.value.exit_code == 4 and "--drop" in ended.value.remedy
    assert {path.name for path in Path("nothing").iterdir()} >= {
        "rounds.jsonl",
        "job.json",
        "plan.json",
    }
    for name in ("result.json", "model.safetensors", "checkpoint.pt", "report.html"):
        assert not (Path("nothing") / name).exists()
    rows = [row for row in read_rounds(Path("nothing")) if row["arm"] == "federated"]
    assert [row["survivors"] for row in rows] == [[], []]
    assert run(rounds=2, drop=ALL[:3], protection="plain").result["rounds"] == 2


def test_its_hint_names_a_smaller_threshold_only_where_there_is_one():
    for threshold, says in ((3, False), (4, True)):
        with pytest.raises(Abandoned) as ended:
            run(rounds=2, drop=ALL, threshold=threshold, protection="plain")
        assert ("--threshold" in ended.value.remedy) == says


def test_a_forced_run_that_was_abandoned_gives_the_former_one_back():
    before = run(rounds=2, protection="plain", out="here").result
    with pytest.raises(Abandoned):
        run(rounds=2, protection="plain", drop=ALL, out="here", force=True)
    assert fedcore.load("here").result == before


def test_on_the_command_line_it_is_code_4_and_where_to_look(capfd):
    call = ("simulate", "--task", "heart", "--rounds", "2", "--protection", "plain", "--out", "x")
    drops = (
        "--drop",
        "1:keys:va,1:keys:hungary",
        "--drop",
        "2:keys:va",
        "--drop",
        "2:submit:cleveland",
    )
    with pytest.raises(SystemExit) as ended:
        main.main([*call, *drops])
    said = capfd.readouterr().err
    assert ended.value.code == 4
    assert "round 1/2  abandoned at keys: 2 of 4 sites stayed, 3 needed" in said
    assert "what became of each round: x/rounds.jsonl" in said
    assert "error: run: found all 2 rounds abandoned" in said and "hint: fewer absences" in said
    assert "--resume" not in said
    for call, hint in (
        (("simulate", "--resume", "x"), "of which every round was abandoned"),
        (("runs", "."), " abandoned\n"),
    ):
        with pytest.raises(SystemExit) as ended:
            main.main(call)
        assert hint in "".join(capfd.readouterr()) and ended.value.code == (2 if "x" in call else 0)


def test_on_a_terminal_an_abandoned_round_stays_above_the_bar(monkeypatch):
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=100)
    monkeypatch.setattr(console, "stderr", terminal)
    bar = RoundsProgress()
    bar.begin(3, 4, "plain")
    for number, more in enumerate(
        ({}, {"abandoned": "at keys: 2 of 4 sites stayed, 3 needed"}, {}), 1
    ):
        row = {"arm": "federated", "round": number, "accuracy": 0.5, "survivors": [*ROSTER]} | more
        bar.row(RoundRow(row))
    bar.close()
    lines = [
        line for line in screen.getvalue().splitlines() if "round 2/3  abandoned at keys" in line
    ]
    assert len(lines) == 1 and "round 1/3" not in screen.getvalue()


def test_an_interrupted_run_whose_rounds_were_abandoned_so_far_can_go_on():
    def stop(row):
        if (row["round"], row["arm"]) == (2, "federated"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(rounds=3, drop=ALL, protection="plain", on_round=stop, out="broken")
    assert not all_abandoned(Path("broken"))
    assert api.resume("broken", task=TASK).result["rounds"] == 3


def test_the_screen_counts_the_sites_of_a_round(capfd):
    call = ("simulate", "--task", "heart", "--rounds", "2", "--protection", "plain", "--json")
    with pytest.raises(SystemExit) as ended:
        main.main([*call, "--drop=2:submit:va", "--dropout", "0", "--threshold", "3"])
    out, said = capfd.readouterr()
    assert ended.value.code == 0
    lines = [line for line in said.splitlines() if line.startswith("round ")]
    assert not lines[0].endswith("sites") and lines[1].endswith(", 3 of 4 sites")
    result = json.loads(out)
    assert (result["drop"], result["dropout"], result["absences"]) == (["2:submit:va"], 0, 1)


# ------------------------------------------------------------------------------------------- again

ABSENT = {
    "drop": ["1:submit:a", "3:keys:b", "3:submit:c", "5:release:d"],
    "dropout": 0.1,
    "rounds": 4,
}


@pytest.mark.parametrize("scheme", EVERY)
def test_an_interrupted_run_with_absences_resumes_to_the_same_bits(scheme):
    settings = ABSENT | EVERY[scheme] | {"server": "fedadam", "range": None}
    settings = {k: v for k, v in settings.items() if v is not None}
    settings["arms"] = ("centralised", "federated")  # test_run.py interrupts all of them
    whole = run(**settings)
    for place in ((2, "federated"), (3, "centralised"), (3, "federated")):

        def stop(row, place=place):
            if (row["round"], row["arm"]) == place:
                raise KeyboardInterrupt

        out = "-".join(map(str, place))
        with pytest.raises(KeyboardInterrupt):
            run(**settings, on_round=stop, out=out)
        stored = read_json(Path(out, "job.json"))
        assert stored["round"]["drop"] == ABSENT["drop"] and stored["round"]["dropout"] == 0.1
        found = api.resume(out, task=TASK)
        assert unmeasured(found) == unmeasured(whole)
        for key in (
            "model_sha256", "arms", "gap", "clipped_fraction", "absences", "abandoned_rounds", "warnings",
            "protected_metrics", "per_site",
        ):  # fmt: skip
            assert found.result[key] == whole.result[key], key
        assert [row["round"] for row in found.result["abandoned_rounds"]] == [3]


def test_an_own_evaluation_that_draws_resumes_to_the_same_bits_after_an_abandoned_round():
    """It is seeded by the round: the sums that ride in round 3 are of the scores of row 2."""
    import torch

    def evaluate(module, rows):
        return {"noise": (float(torch.rand(())), 1.0)}

    task = fedcore.Task(
        "noise", data, TASK.model, TASK.loss, ("noise",), evaluate=evaluate, sites=TASK.sites
    )
    settings = SETTINGS | {"protection": "plain", "drop": ["2:keys:a", "2:keys:b"]}
    whole = fedcore.simulate(task, **settings)

    def stop(row):
        if (row["round"], row["arm"]) == (3, "centralised"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fedcore.simulate(task, **settings, on_round=stop, out="broken")
    found = api.resume("broken", task=task)
    assert unmeasured(found) == unmeasured(whole)


@pytest.mark.parametrize("scheme", EVERY)
def test_a_run_with_absences_reproduces(scheme):
    found = run(**ABSENT | EVERY[scheme])
    again = reproduce(found.directory, task=TASK)
    assert again.same, again.difference


def test_reproduce_says_which_round_s_survivors_differ():
    found = run(**ABSENT, protection="plain")
    job = read_json(found.directory / "job.json")
    job["round"]["drop"] = ["2:submit:d"]
    (found.directory / "job.json").write_text(json.dumps(job))
    again = reproduce(found.directory, task=TASK)
    assert not again.same and "round 1" in again.difference


def test_a_comparison_has_absences_too_and_reproduces():
    settings = SETTINGS | {
        "protection": "plain",
        "drop": "2:keys:a,2:keys:b",
        "dropout": 0.1,
        "folds": 2,
    }
    found = fedcore.compare(TASK, seeds=2, **settings)
    absent = {
        cell: [row["survivors"] for row in found.rounds if (row["seed"], row["fold"]) == cell and "survivors" in row]
        for cell in itertools.product((0, 1), (0, 1))
    }  # fmt: skip
    assert all(rows[1] == [] for rows in absent.values())
    assert absent[0, 0] == absent[0, 1] != absent[1, 0]  # chance follows the seed, not the fold
    rounds = {(row["seed"], row["fold"], row["round"]) for row in found.result["abandoned_rounds"]}
    assert {(seed, fold, 2) for seed in (0, 1) for fold in (0, 1)} <= rounds
    assert found.result["absences"] >= 8
    assert any("abandoned" in line for line in found.result["warnings"])
    assert reproduce(found.directory, task=TASK).same


def test_a_comparison_names_the_split_that_was_abandoned():
    with pytest.raises(Abandoned, match="seed 0, fold 0: found all 2 rounds abandoned"):
        fedcore.compare(
            TASK, seeds=1, **SETTINGS | {"rounds": 2, "protection": "plain", "drop": ALL}
        )
