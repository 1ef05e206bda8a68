"""What the terminal shows: 80 columns, piped or not, nothing cut, no markup from names."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console, RenderableType
from support.results import result_of, stored

from fedcore.report import terminal
from fedcore.results import ListedRun, Result, RoundRow

NAMES = ["heart", "heart_warned", "heart_compare"]


def load(name: str) -> Result:
    return result_of(stored(name))


def header_of(result: Result, task: str | None = None) -> RenderableType:
    rows = result.rows.train + result.rows.test
    facts = [f"{len(result.sites)} sites", f"{rows:,} rows", result.model.summary]
    facts += [result.protection, result.origin.run]
    return terminal.header(task or result.task, facts, result.label)


def test_the_header_is_one_line_and_the_first_two_of_the_label():
    lines = terminal.as_text(header_of(load("heart"))).splitlines()
    assert lines[0] == (
        "heart: 4 sites, 920 rows, Linear 30 -> 1, encrypted, runs/heart-encrypted-001"
    )
    rest = " ".join(lines[1:])
    assert rest.startswith("Protects against: the coordinator alone.")
    assert rest.endswith("which opens every site's update.")
    assert "nobody" in terminal.as_text(terminal.header("t", [], "nobody"))


@pytest.mark.parametrize("name", NAMES)
def test_the_summary_fits_80_columns(name):
    text = terminal.as_text(terminal.summary(load(name), "runs/x/report.html"))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "\x1b" not in text and "…" not in text


def test_the_summary_has_everything_and_warnings_first():
    result = load("heart")
    text = terminal.as_text(terminal.summary(result, "runs/x/report.html"))
    wanted = [
        "warning: One seed",
        "Not resolved: 0.51 points of AUC lost on these rows, interval -0.23 to 1.38.",
        "federated         0.883  0.51 [-0.23, 1.38]     0.800  1.08 [0.00, 2.70]",
        "where it is lost, in points",
        "protection                              0 exact            0 exact",
        "switzerland   123  0.870     0.913   +4.35     0.920     0.800  -12.00",
        "13.9 kB per site and round (one ciphertext, 13 % used)",
        "paired bootstrap over 185 test rows, 1000 resamples",
        "report    runs/x/report.html",
        f"model     {result.model_sha256}",
        "reproduce fedcore reproduce runs/heart-encrypted-001",
    ]
    places = [text.index(part) for part in wanted]
    assert places == sorted(places)


def test_a_site_of_one_class_says_so():
    text = terminal.as_text(terminal.summary(load("heart_warned")))
    line = next(line for line in text.splitlines() if line.startswith("switzerland"))
    assert line.split()[:5] == ["switzerland", "123", "–", "–", "one"]


def test_a_comparison_counts_splits():
    text = terminal.as_text(terminal.summary(load("heart_compare")))
    assert "Nadeau-Bengio corrected t over 25 splits" in text
    assert "loss -0.09 to 0.38" in " ".join(text.split())


def test_commands_paths_and_hashes_stay_on_one_line_of_a_narrow_pipe():
    result = result_of(stored("heart"), reproduce="fedcore reproduce " + "/long" * 40)
    path = "/deep" * 30 + "/report.html"
    lines = terminal.as_text(terminal.summary(result, path), width=60).splitlines()
    for whole in (result.origin.reproduce, path, result.model_sha256):
        assert any(line.endswith(whole) for line in lines)


def test_a_terminal_gets_colours_and_a_pipe_none():
    def printed(**kind) -> str:
        console = Console(file=io.StringIO(), width=80, no_color=False, **kind)
        terminal.show(console, terminal.summary(load("heart")))
        return console.file.getvalue()  # type: ignore[attr-defined]

    assert "\x1b[" in printed(force_terminal=True, color_system="standard", _environ={})
    assert "\x1b" not in printed(force_terminal=False, _environ={})


@pytest.mark.parametrize(
    "name", ["[red]", "[/bold]", "[link=x]", "<script>", "a_b%", ":warning:", "\x1b[31m"]
)
def test_hostile_names_print_as_they_are(name):
    found = stored("heart")
    found["per_site"] = {name: found["per_site"].pop("cleveland"), **found["per_site"]}
    found["task"] = found["label"] = found["reproduce"] = found["run"] = name
    found["warnings"] = [name]
    found["sites"] = [name, "b", "c", "d"]
    result = result_of(found)
    shown = name.replace("\x1b", "\ufffd")
    text = terminal.as_text(terminal.summary(result, name))
    assert "\x1b" not in text
    assert (
        f"warning: {shown}" in text
        and f"reproduce {shown}" in text
        and f"report    {shown}" in text
    )
    assert any(line.startswith(f"{shown} ") for line in text.splitlines())
    assert shown in terminal.as_text(header_of(result))
    assert shown in terminal.as_text(terminal.runs_table([ListedRun(name)]))


def test_many_sites_leave_the_rest_to_the_report():
    found = stored("heart")
    sites = {f"site-{i}": found["per_site"]["va"] for i in range(40)}
    text = terminal.as_text(terminal.summary(result_of(found, per_site=sites)))
    assert (
        "site-11 " in text and "site-12" not in text and "and 28 more sites in the report" in text
    )


def test_more_than_two_metrics_take_more_tables():
    found = stored("heart")
    found["metrics"] = ["accuracy", "auc", "balanced_accuracy"]
    for arm in found["arms"].values():
        arm["balanced_accuracy"] = 0.7512
    text = terminal.as_text(terminal.summary(result_of(found)))
    assert "balanced accuracy" in text and "0.751" in text
    assert max(len(line) for line in text.splitlines()) <= 80


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ({"accuracy": 0.8114, "auc": 0.9, "survivors": ["a", "b", "c", "d"]}, "accuracy 0.811"),
        ({"auc": None, "accuracy": 0.5, "survivors": ["a", "c", "d"]}, "accuracy 0.500, 3 of 4 sites"),
        ({"mse": 2.0, "survivors": ["a", "b", "c", "d"]}, "mse 2.000"),
        ({"round": 1, "mine": 0.5, "loss": 1.0, "survivors": ["a", "b", "c", "d"]}, "mine 0.500"),
        ({"round": 1, "r2": None, "rmse": 15_540.2, "loss": 1.0, "survivors": ["a"]}, "rmse 15,540, 1 of 4 sites"),
        ({"survivors": ["a", "b", "c", "d"], "seconds": 0.094}, "4 of 4 sites, 94 ms"),
        ({"survivors": ["a", "b", "c"], "seconds": 72.4}, "3 of 4 sites, 1 min 12 s"),
        ({"accuracy": 0.8, "survivors": ["a", "b", "c"], "seconds": 1.0}, "accuracy 0.800, 3 of 4 sites"),
        ({"loss": 2.0, "survivors": ["a", "b", "c"]}, "3 of 4 sites"),
        (
            {"accuracy": 0.8, "survivors": [], "abandoned": "at keys: 2 of 4 sites stayed, 3 needed"},
            "abandoned at keys: 2 of 4 sites stayed, 3 needed",
        ),
    ],
)  # fmt: skip
def test_a_round_in_a_few_words(row, text):
    assert terminal.progress(RoundRow(row), 4) == text


def test_the_list_of_runs():
    runs = [ListedRun(load(name).origin.run, load(name)) for name in NAMES]
    text = terminal.as_text(terminal.runs_table([*runs, ListedRun("runs/heart-plain-001")]))
    lines = text.splitlines()
    assert lines[2].split() == [
        "runs/heart-encrypted-001", "2026-11-21", "0", "AUC", "0.883", "0.51", "[-0.23,", "1.38]",
    ]  # fmt: skip
    assert "5 x 5" in lines[4] and "not finished" in lines[5]
    assert max(map(len, lines)) <= 80
    errors = json.loads(json.dumps(stored("heart")).replace("auc", "mse"))
    other = ListedRun("runs/b", result_of(errors, metrics=["mse"]))
    listed = terminal.as_text(terminal.runs_table([runs[0], other])).splitlines()
    assert listed[2].endswith("0.51 [-0.23, 1.38] points")
    assert listed[3].endswith("0.00507 [-0.00235, 0.0138]")


@pytest.mark.parametrize("width", [40, 60, 76])
@pytest.mark.parametrize("name", NAMES)
def test_a_narrow_screen_breaks_no_word_of_a_table(name, width):
    result = load(name)
    text = terminal.as_text(terminal.summary(result), width=width)
    words = set(text.split())
    for word in (*result.sites, "accuracy", "together", "federated,", "centralised"):
        assert word in words, word
    # Below the warnings, and above the hash and the command, which stay whole.
    tables = text[text.index("\narm ") : text.index("\ncost ")]
    assert all(len(line) <= max(width, 47) for line in tables.splitlines())


def test_a_long_name_folds_and_numbers_stay():
    found = stored("heart")
    sites = {"hospital" * 20: found["per_site"]["va"]}
    text = terminal.as_text(terminal.summary(result_of(found, per_site=sites)), width=60)
    assert "0.693     0.740   +4.70" in text
    assert max(len(line) for line in text.splitlines() if "hospital" in line) <= 60


def test_a_pipe_gets_no_trailing_spaces():
    console = Console(file=io.StringIO(), width=80, force_terminal=False)
    terminal.show(console, terminal.summary(load("heart")))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert lines and all(line == line.rstrip() for line in lines)


def test_many_warnings_leave_the_rest_to_the_report():
    result = result_of(stored("heart"), warnings=[f"warning {i}" for i in range(9)])
    text = terminal.as_text(terminal.summary(result))
    assert "warning 5" in text and "warning 6" not in text
    assert "... and 3 more in the report" in text


def test_a_run_of_fewer_arms_has_no_empty_columns():
    found = stored("heart")
    for values in (found["arms"], *found["per_site"].values()):
        for arm in ("centralised", "local_only", "federated_float"):
            del values[arm]
    found["gap"] = {"total": {}, "federation": {}}
    text = terminal.as_text(terminal.summary(result_of(found)))
    assert "one class" not in text and "lost" not in text and "alone" not in text
    assert "Federated AUC 0.883; no centralised arm was run to compare with." in text
    assert "cleveland     303  0.907     0.820" in text
