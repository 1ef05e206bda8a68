"""The page: one self-contained document, warnings first, nothing from a result unescaped."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedcore.errors import BadInput
from fedcore.report import page, plots
from fedcore.report.sentences import Json

FIXTURES = Path(__file__).parent / "fixtures"
HOSTILE = (
    "<script>alert(1)</script>",
    "[red]",
    "a_b%",
    '"><img src=x onerror=y>',
    "$x^2$",
    "{{ 7*191 }}",
)


def load(name: str) -> tuple[Json, list[Json]]:
    result = json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))
    path = FIXTURES / f"{name}.rounds.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return result, [json.loads(line) for line in lines]


class Document(HTMLParser):
    """Tags in order with their attributes, visible text, and whether every tag was closed."""

    VOID = frozenset({"meta", "link", "br", "img"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.text += data


SETS = [
    ["heart"],
    ["heart_warned"],
    ["heart", "heart_warned"],
    ["heart_compare"],
    ["heart_compare"] * 2,
]


@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_the_page_is_self_contained_and_well_formed(names):
    text = page.render([load(name) for name in names])
    document = Document(text)
    tags = {tag for tag, _ in document.tags}
    assert not tags & {"script", "img", "iframe", "object", "form", "a"}
    for tag, attributes in document.tags:
        assert not any(name.startswith("on") for name in attributes), attributes
        reference = attributes.get("href") or attributes.get("src") or "#"
        assert reference.startswith("#") or (tag, reference) == ("link", "data:,")
    assert not re.search(r"url\((?!#)|@import|https?://", text)
    assert "None" not in document.text and "nan" not in document.text.split()


@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_every_reference_inside_the_drawings_has_its_target(names):
    text = page.render([load(name) for name in names])
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(ids)


def test_the_first_screen_answers_the_five_questions_in_order():
    text = Document(page.render([load("heart")])).text
    wanted = [
        "Before reading the numbers",
        "One seed and one split",
        "Lost against pooling",
        "No loss measurable against pooling: AUC 0.51\u00a0points, interval \u22120.23 to 1.38.",
        "Gained over staying alone",
        "3 of 4 sites score higher",
        "Cost of protection",
        "13.9\u00a0kB per site and round (one ciphertext, 13\u00a0% used)",
        "Who could have seen what",
        "Does not protect against: one site together with the coordinator.",
        "Reproduce",
        "fedcore reproduce runs/heart-encrypted-001",
        "Round by round",
    ]
    places = [text.index(part) for part in wanted]
    assert places == sorted(places)


def test_warnings_stand_above_every_number_of_the_result():
    result, rounds = load("heart_warned")
    text = Document(page.render([(result, rounds)])).text
    body = text[text.index("Before reading") :]
    for warning in result["warnings"]:
        assert body.index(warning.split(".")[0].replace("`", "")[:20]) < body.index(
            "Lost against pooling"
        )
    quiet = page.render([({**result, "warnings": []}, rounds)])
    assert "Before reading the numbers" not in quiet


def test_two_runs_overlay_and_stand_side_by_side():
    text = page.render([load("heart"), load("heart_warned")])
    document = Document(text)
    assert "A, heart-encrypted-001" in document.text and "B, heart-encrypted-002" in document.text
    assert text.count('<div class="wide"') == 1
    # Shared sentences are said once: the label is the same for both.
    assert document.text.count("Does not protect against: one site") == 1


def test_runs_that_differ_in_seed_only_share_a_line_with_a_band():
    result, rounds = load("heart")
    other = {**result, "seed": 1, "run": "runs/heart-encrypted-003"}
    shifted = [{**row, "auc": row["auc"] + 0.004} for row in rounds]
    assert plots.groups([(result, rounds), (other, shifted)]) == [[0, 1]]
    assert plots.groups([(result, rounds), load("heart_warned")]) == [[0], [1]]
    figure = plots.rounds_figure([(result, rounds), (other, shifted)], "auc")
    assert len(figure.axes[0].collections) == 4  # one band an arm
    middle = next(line for line in figure.axes[0].lines if line.get_linewidth() > 2)
    first = next(row for row in rounds if row["arm"] == "federated")
    assert middle.get_ydata()[0] == pytest.approx(first["auc"] + 0.002)


def test_the_gap_below_the_curves_is_centralised_minus_federated_in_points():
    result, rounds = load("heart")
    figure = plots.rounds_figure([(result, rounds)], "auc")
    by = {(row["arm"], row["round"]): row["auc"] for row in rounds}
    drawn = figure.axes[1].lines[0].get_ydata()
    expected = [100 * (by["centralised", r] - by["federated", r]) for r in range(1, 21)]
    assert list(drawn) == pytest.approx(expected)


def test_a_comparison_draws_every_cell_and_its_interval():
    result, _ = load("heart_compare")
    figure = plots.splits_figure([result], "auc")
    dots = [line for line in figure.axes[1].lines if len(line.get_xdata()) == 25]
    assert len(dots) == 4
    text = Document(page.render([(result, [])])).text
    assert "By seed and fold" in text and "Nadeau-Bengio corrected t over 25 splits" in text
    assert "5 seeds \u00d7 5 folds" in text


def test_the_same_runs_make_the_same_page():
    assert page.render([load("heart")]) == page.render([load("heart")])


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(name):
    result, rounds = copy.deepcopy(load("heart"))
    result["task"] = name
    result["sites"] = [name, *result["sites"][1:]]
    result["per_site"] = {name: result["per_site"].pop("cleveland"), **result["per_site"]}
    result["per_site"][name]["class_counts"] = {name: 3}
    result["metrics"] = [name, "auc"]
    result["statistics"]["names"][0] = name
    result["plan"][name] = name
    for key in ("label", "run", "reproduce", "model_sha256", "stopped"):
        result[key] = name
    result["warnings"] = [name]
    result["environment"]["cpu"] = name
    result["gap"]["total"]["auc"]["method"] = name
    rounds = [{**row, name: row["accuracy"]} for row in rounds]
    # Once with the name as the plotted metric, so that it is drawn into the figure as well.
    only = {**result, "metrics": [name]}
    for variant in (result, only):
        text = page.render([(variant, rounds), (variant, rounds)])
        document = Document(text)
        assert name in document.text
        assert {tag for tag, _ in document.tags} & {"script", "img"} == set()
        assert "1337" not in document.text


def test_a_comparison_and_a_run_are_not_mixed():
    with pytest.raises(BadInput, match="runs beside comparisons"):
        page.render([load("heart"), load("heart_compare")])
    with pytest.raises(BadInput, match="no run"):
        page.render([])


def test_a_bare_result_still_makes_a_page():
    """A task with its own loops, no rounds, one metric without intervals and no sites' values."""
    gap = {"mean": 0.01, "low": None, "high": None, "method": "difference", "n": 0}
    result = {
        "schema": 1, "kind": "run", "task": "own", "protection": "plain", "seed": 0, "rounds": 3,
        "sites": ["a", "b", "c"], "metrics": ["dice"], "arms": {"federated": {"dice": 0.5}},
        "gap": {"total": {"dice": gap}, "federation": {}}, "per_site": {},
    }  # fmt: skip
    text = Document(page.render([(result, [])])).text
    assert "Dice: 1.00\u00a0points lost, with no interval to judge them by." in text
    assert "Round by round" not in text
