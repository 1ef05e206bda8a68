"""The page: one self-contained document, warnings first, nothing from a result unescaped."""

from __future__ import annotations

import copy
import json
import re
from base64 import b64encode
from dataclasses import replace
from functools import cache
from hashlib import sha256
from html.parser import HTMLParser

import pytest
from matplotlib.text import Text
from support.results import result_of, stored, stored_rounds

from fedcore import report
from fedcore.errors import BadInput
from fedcore.report import aligned, latex, markdown, page, plots, tables
from fedcore.results import ProtectedMetrics, Result, RoundRow

HOSTILE = (
    "<script>alert(1)</script>",
    "[red]",
    "a_b%",
    '"><img src=x onerror=y>',
    "$x^2$",
    "{{ 7*191 }}",
)


def load(name: str) -> tuple[Result, list[RoundRow]]:
    return result_of(stored(name)), stored_rounds(name)


@cache
def rendered(*names: str) -> str:
    """The page of these stored runs, drawn once for all tests."""
    return page.render([load(name) for name in names])


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
        if not {"style", "script"} & {*self._open}:
            self.text += data


def assert_only_our_script(text):
    """At most the script that sorts, allowed by its hash: the policy stops any other."""
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", text, re.DOTALL)
    allowed = re.findall(r"script-src 'sha256-([^']+)'", text)
    assert [b64encode(sha256(each.encode()).digest()).decode() for each in scripts] == allowed
    assert all("table.aligned button" in each for each in scripts) and len(scripts) <= 1


SETS = [
    ["heart"],
    ["heart_warned"],
    ["heart", "heart_warned"],
    ["heart_compare"],
    ["heart_compare"] * 2,
]


@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_the_page_is_self_contained_and_well_formed(names):
    text = rendered(*names)
    document = Document(text)
    tags = {tag for tag, _ in document.tags}
    # Without a folder there are no files to link to.
    assert not tags & {"img", "iframe", "object", "form", "a"}
    assert_only_our_script(text)
    for tag, attributes in document.tags:
        assert not any(name.startswith("on") for name in attributes), attributes
        reference = attributes.get("href") or attributes.get("src") or "#"
        assert reference.startswith("#") or (tag, reference) == ("link", "data:,")
    assert not re.search(r"url\((?!#)|@import|https?://", text)
    assert "None" not in document.text and "nan" not in document.text.split()


@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_every_reference_inside_the_drawings_has_its_target(names):
    text = rendered(*names)
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', text)) <= set(ids)


def test_the_page_answers_its_questions_then_draws_curves_then_says_who_saw_what():
    text = Document(rendered("heart")).text
    wanted = [
        "Before reading the numbers",
        "One seed and one split",
        "Lost against pooling",
        "Not resolved: 0.51\u00a0points of AUC lost on these rows, interval \u22120.23 to 1.38.",
        "Gained over staying alone",
        "3 of 4 sites score higher",
        "Cost of protection",
        "13.9\u00a0kB per site and round (one ciphertext, 13\u00a0% used)",
        "Reproduce",
        "fedcore reproduce runs/heart-encrypted-001",
        "Round by round",
        "Other curves",
        "Who could have seen what",
        "Does not protect against: one site together with the coordinator.",
        "Arms and gap",
    ]
    places = [text.index(part) for part in wanted]
    assert places == sorted(places)


def test_warnings_stand_above_every_number_of_the_result(no_drawings):
    result, rounds = load("heart_warned")
    text = Document(page.render([(result, rounds)])).text
    body = text[text.index("Before reading") :]
    for warning in result.warnings:
        assert body.index(warning.split(".")[0].replace("`", "")[:20]) < body.index(
            "Lost against pooling"
        )
    quiet = page.render([(replace(result, warnings=()), rounds)])
    assert "Before reading the numbers" not in quiet


def test_two_runs_overlay_and_stand_side_by_side():
    text = rendered("heart", "heart_warned")
    document = Document(text)
    assert "heart-encrypted-00116 bits, seed 0" in document.text
    assert "heart-encrypted-0028 bits, seed 3" in document.text
    assert text.count('<div class="wide"') == 2  # the metric with the gap, and the other curves
    # Shared sentences are said once: the label is the same for both.
    assert document.text.count("Does not protect against: one site") == 1


def with_seeds(n: int) -> list[tuple[Result, list[RoundRow]]]:
    rounds = stored_rounds("heart")
    return [
        (
            result_of(stored("heart"), seed=seed, run=f"runs/seed-{seed}"),
            [RoundRow(row | {"auc": row["auc"] + 0.002 * seed}) for row in rounds],
        )
        for seed in range(n)
    ]


def test_two_or_three_runs_are_drawn_one_by_one():
    runs = with_seeds(3)
    assert plots.groups(runs) == [[0], [1], [2]]
    figure = plots.rounds_figure(runs[:2], "auc")
    assert not figure.axes[0].collections and len(figure.axes[0].lines) == 8
    text = Document(page.render(runs[:2])).text
    assert "What differs" in text and "seed-1seed 1" in text and "bands run" not in text


def test_of_more_runs_those_that_differ_in_seed_only_share_a_line_with_a_band():
    runs = with_seeds(4)
    assert plots.groups(runs) == [[0, 1, 2, 3]]
    assert plots.groups([*runs, load("heart_warned")]) == [[0, 1, 2, 3], [4]]
    figure = plots.rounds_figure(runs, "auc")
    assert len(figure.axes[0].collections) == 4  # one band an arm
    middle = next(line for line in figure.axes[0].lines if line.get_linewidth() > 2)
    first = next(row for row in runs[0][1] if row["arm"] == "federated")
    assert middle.get_ydata()[0] == pytest.approx(first["auc"] + 0.003)


def test_the_splits_of_a_comparison_share_a_band_however_few():
    compared = load("heart_compare")[0]
    rounds = stored_rounds("heart")
    rows = [RoundRow(row | {"seed": 0, "fold": fold}) for fold in (0, 1) for row in rounds]
    assert plots.groups(plots.splits_of((compared, rows))) == [[0, 1]]


def test_a_run_of_fewer_arms_leaves_out_what_was_not_run():
    found = stored("heart")
    whole = result_of(copy.deepcopy(found))
    for values in (found["arms"], found["site_mean"], *found["per_site"].values()):
        for arm in ("centralised", "local_only", "federated_float"):
            del values[arm]
    result = result_of(found, gap={**found["gap"], "total": {}, "federation": {}})
    rounds = [row for row in stored_rounds("heart") if row.arm == "federated"]
    text = Document(page.render([(result, rounds)])).text
    assert "no centralised arm was run to compare with" in text
    assert "one class" not in text and "alone and together" not in text
    assert len(plots.rounds_figure([(result, rounds)], "auc").axes) == 1
    beside = Document(page.render([(whole, []), (result, rounds)])).text
    assert "–not run" in beside and "alone not run" in beside


def test_an_error_is_drawn_in_its_own_unit():
    found = json.loads(json.dumps(stored("heart")).replace("accuracy", "mse"))
    result = result_of(found, metrics=["mse"], lower_is_better=["mse"])
    rounds = [RoundRow(row | {"mse": row["accuracy"]}) for row in stored_rounds("heart")]
    axes = plots.rounds_figure([(result, rounds)], "mse").axes[1]
    assert axes.get_title(loc="left") == "Gap: MSE lost"
    assert abs(axes.lines[0].get_ydata()[0]) < 1
    text = Document(page.render([(result, rounds)])).text
    assert "points of" not in text.split("Terms")[0]


def test_every_other_metric_and_the_losses_have_a_panel_of_their_own():
    result, found = load("heart")
    run = (result, [RoundRow(row | {"train_loss": 0.5 / row.round}) for row in found])
    columns = plots.further_columns([run], "auc")
    assert columns == ["accuracy", "loss", "train_loss"]
    figure = plots.further_figure([run], columns)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Accuracy", "Loss on the test rows", "Loss on the training rows"]
    by = {(row.arm, row.round): row["accuracy"] for row in run[1]}
    line = next(each for each in figure.axes[0].lines if each.get_label() == "local only")
    assert list(line.get_ydata()) == [by["local_only", r] for r in range(1, 21)]


@pytest.mark.parametrize("missing", [["loss"], ["loss", "train_loss"], ["accuracy"]], ids="+".join)
def test_a_column_that_no_row_has_gets_no_panel(missing):
    result, rounds = load("heart")
    rows = [RoundRow({k: v for k, v in row.items() if k not in missing}) for row in rounds]
    assert not set(missing) & set(plots.further_columns([(result, rows)], "auc"))
    Document(page.render([(result, rows)]))


def test_a_page_without_further_curves_leaves_the_section_out():
    result, rounds = load("heart")
    rows = [RoundRow({k: row[k] for k in ("arm", "round", "auc")}) for row in rounds]
    text = Document(page.render([(result, rows)])).text
    assert "Round by round" in text and "Other curves" not in text


def test_the_legend_of_a_figure_names_the_arms_that_are_drawn_in_the_order_of_the_tables():
    result, rounds = load("heart")
    figure = plots.with_legend(plots.rounds_figure([(result, rounds)], "auc"))
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["centralised", "local only", "federated, float", "federated"]
    two = [row for row in rounds if row.arm in ("centralised", "federated")]
    figure = plots.with_legend(plots.rounds_figure([(result, two)], "auc"))
    names = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert names == ["centralised", "federated"]


def test_times_are_labelled_as_sums_over_sites_or_wall_time():
    text = Document(rendered("heart")).text
    assert "train, sum over sites" in text and "whole run, all arms, wall time" in text
    assert "summed over the sites" in text


def test_the_gap_below_the_curves_is_centralised_minus_federated_in_points():
    result, rounds = load("heart")
    figure = plots.rounds_figure([(result, rounds)], "auc")
    by = {(row.arm, row.round): row["auc"] for row in rounds}
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


def with_sites_by_round(n, scale=1.0):
    """The stored run of n sites whose rows hold each site's AUC: round / 100 alone, a tenth more together."""
    sites = [f"site-{i}" for i in range(n)]
    result = result_of(stored("heart"), sites=sites)
    rows = []
    for row in stored_rounds("heart"):
        more = {}
        if row.arm in plots.SITE_ARMS:
            value = row.round / 100 + (0.1 if row.arm == "federated" else 0)
            own = {"auc": scale * value, "accuracy": None}
            more = {"per_site": dict.fromkeys(sites, own)}
        rows.append(RoundRow(row | more))
    return result, rows


@pytest.mark.parametrize(("n", "drawn"), [(1, True), (20, True), (21, False)])
def test_each_site_has_a_panel_of_its_curves_while_there_are_not_too_many(n, drawn):
    text = page.render([with_sites_by_round(n)])
    assert ("Each site by round" in text) is drawn
    ids = re.findall(r' id="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_a_sites_panel_has_what_its_rows_say_alone_and_together():
    run = with_sites_by_round(3)
    curves = plots.site_curves(run, "auc")
    assert list(curves) == ["site-0", "site-1", "site-2"]
    assert curves["site-1"]["local_only"][7] == 0.07
    figure = plots.sites_by_round_figure(run, "auc")
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title(loc="left") for axes in shown] == list(curves)
    assert all(len(axes.lines) == 2 for axes in shown)
    assert list(shown[0].lines[1].get_ydata()) == pytest.approx(
        [r / 100 + 0.1 for r in range(1, 21)]
    )
    assert plots.site_curves(run, "accuracy") == {}  # unknown at every site


def texts_in_view(axes):
    """The title, then what stands beside the two axes."""
    name = axes.get_title(loc="left")
    title = axes.findobj(lambda each: isinstance(each, Text) and each.get_text() == name)
    found = [axes.xaxis.label]
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        ticks = zip(axis.get_majorticklocs(), axis.get_majorticklabels(), strict=False)
        found += [axis.get_offset_text(), *(text for at, text in ticks if low <= at <= high)]
    return [*title, *(text for text in found if text.get_text())]


@pytest.mark.parametrize(
    ("scale", "size"),
    [(1, plots.WIDE), (-1, plots.NARROW), (1e-7, plots.NARROW), (3e9, plots.WIDE)],
)
def test_numbers_and_names_are_inside_their_figure_and_no_title_lies_on_one(scale, size):
    """With a name that is cut, with signs, and with values that are shown with a power of ten."""
    found = json.dumps(stored("heart")).replace("cleveland", "massachusetts-general")
    rows = [RoundRow(row | {"auc": scale * row["auc"]}) for row in stored_rounds("heart")]
    run = (result_of(json.loads(found), lower_is_better=["auc"]), rows)
    for figure in (
        plots.rounds_figure([run], "auc", size),
        plots.further_figure([run], ["accuracy", "auc", "loss"], size),
        plots.splits_figure([result_of(stored("heart_compare"))], "auc", size),
        plots.sites_by_round_figure(with_sites_by_round(5, scale), "auc", size),
        plots.sites_figure(run[0], "auc", size),
    ):
        figure.draw_without_rendering()
        for axes in (each for each in figure.axes if each.get_visible()):
            title, *others = [text.get_window_extent() for text in texts_in_view(axes)]
            assert title.count_overlaps(others) == 0
            assert title.x0 >= 0 and title.y1 <= figure.bbox.y1
            room = figure.bbox.padded(1)
            assert all(room.contains(*each.min) and room.contains(*each.max) for each in others)


def test_two_runs_beside_each_other_have_no_curves_of_sites():
    run = with_sites_by_round(3)
    assert "Each site by round" not in page.render([run, run])


def of_many_sites(n, **more):
    """The stored run as of n sites, the i-th of which gains i points of AUC, the first loses one."""
    found = stored("heart")
    per_site = {}
    for i in range(n):
        alone = {"auc": 0.5, "accuracy": 0.5}
        together = {"auc": 0.49 + i / 100, "accuracy": 0.5}
        own = {"local_only": alone, "federated": together}
        per_site[f"site-{i}"] = {**found["per_site"]["va"], **own}
    return result_of(found, per_site=per_site, **more)


def test_the_aligned_table_has_the_cells_of_the_tables_by_metric():
    result, _ = load("heart")
    table, grids = aligned.site_table(result), tables.per_site([result])
    assert table.metrics == ("AUC", "accuracy") and table.columns == ("alone", "together", "gained")
    for i, row in enumerate([*table.rows, table.mean]):
        assert row[2:5] == grids[0].rows[i][2:] and row[5:] == grids[1].rows[i][2:]
    assert [row[0].text for row in table.rows] == list(result.per_site)
    assert list(table.labels)[:3] == ["site", "test rows", "AUC alone"]


def test_every_metric_has_a_mean_over_sites_in_the_table():
    table = aligned.site_table(load("heart")[0])
    assert all(cell.text not in ("", "–") for cell in table.mean[2:])


def test_without_a_local_arm_a_site_has_one_column_for_each_metric():
    found = stored("heart")
    for values in (found["arms"], found["site_mean"], *found["per_site"].values()):
        del values["local_only"]
    result = result_of(found)
    table = aligned.site_table(result)
    assert table.columns == ("",) and list(table.labels) == ["site", "test rows", "AUC", "accuracy"]
    assert set(plots.site_values(result, "auc").values()) == {
        result.site_score(site, "federated", "auc") for site in result.per_site
    }
    assert "sort by AUC" in page.render([(result, [])])


def test_a_result_that_knows_nothing_of_sites_has_no_table_of_them(no_drawings):
    result = result_of(stored("heart"), per_site={})
    assert aligned.site_table(result) is None
    assert "<script" not in page.render([(result, [])])


@pytest.mark.parametrize(("n", "drawn"), [(4, False), (20, False), (21, True)])
def test_more_than_twenty_sites_are_drawn_as_dots_and_their_table_is_folded(n, drawn):
    text = page.render([(of_many_sites(n), [])])
    assert ("<details" in text) is drawn
    assert (f'aria-label="AUC of {n} sites"' in text) is drawn
    assert text.count('data-label="AUC gained"') >= n


@pytest.mark.parametrize("n", [25, 61])
def test_dots_are_in_the_order_of_the_gain_and_named_while_there_is_room(n):
    (axes,) = plots.sites_figure(of_many_sites(n), "auc").axes
    drawn = axes.collections[0].get_offsets()
    assert list(drawn[:, 0]) == pytest.approx([i - 1 for i in range(n)])
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ([f"site-{i}" for i in range(n)] if n <= plots.NAMED_SITES else [])


def test_the_same_runs_make_the_same_page():
    assert page.render([load("heart")]) == rendered("heart")


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(name):
    result, rounds = stored("heart"), stored_rounds("heart")
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
    result["seen"]["site"] = result["seen"]["other"] = result["seen"]["protection"] = name
    result["gap"]["total"]["auc"]["method"] = name
    rounds = [RoundRow(row | {name: row["accuracy"]}) for row in rounds]
    # Once with the name as the plotted metric, so that it is drawn into the figure as well.
    only = {**result, "metrics": [name]}
    for variant in map(result_of, (result, only)):
        text = page.render([(variant, rounds), (variant, rounds)])
        document = Document(text)
        assert name in document.text
        assert {tag for tag, _ in document.tags} & {"script", "img"} == set()
        assert "1337" not in document.text


def test_a_comparison_and_a_run_are_not_mixed():
    with pytest.raises(BadInput, match="runs beside comparisons"):
        page.render([load("heart"), load("heart_compare")])
    with pytest.raises(BadInput, match="no run"):
        report.render([])


def test_a_bare_result_still_makes_a_page():
    """A task with its own loops, no rounds, one metric without intervals and no sites' values."""
    gap = {"mean": 0.01, "low": None, "high": None, "method": "difference", "n": 0}
    result = {
        "schema": 1, "kind": "run", "task": "own", "protection": "plain", "seed": 0, "rounds": 3,
        "sites": ["a", "b", "c"], "metrics": ["dice"], "arms": {"federated": {"dice": 0.5}},
        "gap": {"total": {"dice": gap}, "federation": {}}, "per_site": {},
    }  # fmt: skip
    text = Document(page.render([(result_of(result), [])])).text
    assert "Dice: 1.00\u00a0points lost, with no interval to judge it by." in text
    assert "Round by round" not in text


def test_a_table_of_categories_only_has_no_statistics_to_show(no_drawings):
    nothing = {key: [] for key in ("names", "mean", "std", "count", "sites", "clipped")}
    result = result_of(stored("heart"), statistics=nothing)
    assert tables.statistics([result]) == []
    text = page.render([(result, stored_rounds("heart"))])
    assert "Federated statistics" not in Document(text).text
    assert markdown.render(result) and latex.render(result)


def test_runs_without_arms_have_no_table_of_arms():
    result, rounds = load("heart")
    assert tables.arms([result, result])
    result = replace(result, arms={})
    assert tables.arms([result, result]) == []
    Document(page.render([(result, rounds), (result, rounds)]))


def protected_cells(results):
    (table,) = tables.protected(results)
    return {row[0].text: row[1:] for row in table.rows}


def test_metrics_from_sums_show_their_bound_and_what_was_clipped(no_drawings):
    result, rounds = load("heart")
    assert all(not cells[-1].sub for cells in protected_cells([result]).values())
    result = result_of(
        stored("heart"),
        protected_metrics_bound={"auc": 0.00391, "accuracy": None},
        protected_clipped={"accuracy": 1200},
    )
    cells = protected_cells([result])
    assert cells["AUC"][-1].sub == "± 0.004"  # rounded up: 0.0039 would be no bound
    assert cells["accuracy"][-1].sub == "1,200 clipped"
    beside = protected_cells([result, load("heart")[0]])
    assert re.fullmatch(r"exact 0\.\d{3}, ± 0\.004", beside["AUC"][0].sub)
    assert re.fullmatch(r"exact 0\.\d{3}", beside["AUC"][1].sub)
    assert "± 0.004" in Document(page.render([(result, rounds)])).text
    exact = replace(result, protected=replace(result.protected, bound={"auc": 0.0}))
    assert protected_cells([exact])["AUC"][-1].sub == "± 0"


def test_metrics_of_fewer_sites_have_no_bound_and_say_so():
    some = {
        "protected_metrics_bound": {"auc": 0.004},
        "protected_metrics_sites": ["cleveland", "hungary", "va"],
    }
    result = result_of(stored("heart"), **some)
    (table,) = tables.protected([result])
    assert "of the sites that stayed" in table.note
    assert "±" not in str(table.rows)
    everyone = replace(result, protected=replace(result.protected, sites=result.sites))
    (table,) = tables.protected([everyone])
    assert "that stayed" not in table.note and "±" in str(table.rows)
    assert tables.protected([replace(result, protected=ProtectedMetrics(sites=()))]) == []
