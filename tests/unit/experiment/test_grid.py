"""Grids of comparisons: which cells a file names, how they run, and what an interruption or a failure leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedcore.cli import main as commands
from fedcore.config.grid_file import cells_of, read_grid
from fedcore.errors import AlreadyExists, BadInput, UnknownName
from fedcore.experiment.grid import GridListener, asked_of, run_grid
from fedcore.experiment.run import Comparison
from fedcore.files import read_grid_result
from fedcore.report.grid_tables import lost_tables

pytestmark = pytest.mark.usefixtures("no_drawings")

TASK = """
import numpy as np, torch, fedcore

def data(source):
    rng = np.random.default_rng(source)
    x = rng.normal(size=(30, 3)).astype("f4")
    return x, (x[:, 0] > 0).astype(int)

def train(model, rows, fit):
    if fit.lr == 7:
        raise ValueError("no such rate")

def task_of(**more):
    return fedcore.Task("tiny", data, lambda: torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy,
                        sites={"a": 1, "b": 2, "c": 3}, **more)

task, fails = task_of(), task_of(train=train)
"""

GRID = """
name = "mine"
seeds = 1
settings = { folds = 2, rounds = 2 }
prices = { currency = "USD", per_gigabyte = 1000.0, per_hour = 3600.0 }

[tasks.tiny]
task = "task.py"

[tasks.fails]
task = "task.py:fails"

[partitions.skewed]
by = "dirichlet"
alpha = 0.5
n = 4

[algorithms.momentum]
server = "fedavgm"

[algorithms.wrong]
lr = 7.0

[privacy."each site"]
epsilon = 3.0
noise = "site"
max_examples = 64
lr = 1.0
arms = ["federated"]

[privacy.some]
epsilon = 3.0
max_examples = 64
lr = 1.0
arms = ["local_only", "federated"]
"""

WHOLE = """
[[grid]]
tasks = ["tiny"]
partitions = ["natural", "skewed"]
protections = ["plain"]

[[grid]]
tasks = ["tiny"]
protections = ["masked"]
privacy = ["none", "some", "each site"]
"""

PRODUCT = """
[[grid]]
tasks = ["tiny"]
partitions = ["natural", "skewed"]
algorithms = ["default", "momentum"]
protections = ["plain"]

[[grid]]
tasks = ["tiny"]
protections = ["masked"]
privacy = ["none", "some"]
seeds = 2
settings = { rounds = 5 }
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.py").write_text(TASK)
    return tmp_path


def grid_of(folder, blocks, head=GRID):
    (folder / "grid.toml").write_text(head + blocks)
    return read_grid(folder / "grid.toml"), folder


def table(directory):
    """Everything of a grid but its folder, when and how fast it ran, and what privacy draws anew."""
    result = read_grid_result(directory).to_json()
    for measured in ("started", "seconds_total", "workers", "asked"):
        del result[measured]
    result["cells"] = [cell for cell in result["cells"] if cell["privacy"] == "none"]
    for cell in result["cells"]:
        del cell["cost"]["seconds"], cell["cost"]["money"]
    rows = json.loads((directory / "table.json").read_text())
    return result, [row for row in rows if row["privacy"] == "none"]


def test_a_cell_is_every_combination_and_its_layers_add_up(folder):
    grid, base = grid_of(folder, PRODUCT)
    cells = cells_of(grid, base)
    assert [cell.names[1:4] for cell in cells[:4]] == [
        ("natural", "default", "plain"), ("natural", "momentum", "plain"),
        ("skewed", "default", "plain"), ("skewed", "momentum", "plain"),
    ]  # fmt: skip
    assert [(cell.names[3:], cell.seeds) for cell in cells[4:]] == [
        (("masked", "none"), (0, 1)), (("masked", "some"), (0, 1)),
    ]  # fmt: skip
    others = cells_of(*grid_of(folder, PRODUCT, "first_seed = 100\n" + GRID))
    assert others[4].seeds == (100, 101) and others[4].layers == cells[4].layers
    last = {key: value for layer in cells[5].layers for key, value in layer.items()}
    assert (last["rounds"], last["epsilon"], last["lr"]) == (5, 3.0, 1.0)
    merged = {key: value for layer in cells[3].layers for key, value in layer.items()}
    assert merged == {
        "base": str(folder), "folds": 2, "rounds": 2, "task": "task.py", "sites.by": "dirichlet", "sites.alpha": 0.5,
        "sites.n": 4, "server": "fedavgm", "protection": "plain",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("blocks", "error", "match"),
    [
        ("", BadInput, "grid: found nothing"),
        ("[[grid]]\ntasks = []", BadInput, "grid.0.tasks"),
        ("[[grid]]\ntasks = ['tiny']\nrounds = 3", UnknownName, "grid.0.rounds"),
        ("[[grid]]\ntasks = ['tiny']\nalgorithms = ['scafold']", UnknownName, "grid.algorithms"),
        ("[[grid]]\ntasks = ['tiny']\n" * 2, BadInput, "twice"),
    ],
)
def test_a_file_that_names_no_grid_is_refused(folder, blocks, error, match):
    with pytest.raises(error, match=match):
        cells_of(*grid_of(folder, blocks))


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ("lr = -1.0", BadInput, r"cell 1 \(tiny, natural, default, layered, none\): .*lr"),
        ("sites = { by = 'iid', n = 99 }", BadInput, "cell 1 .*99"),
        ("bits = 64", BadInput, "cell 1 .*"),
        ("track = { to = ['mlflow'] }", BadInput, "cell 1 .*in a comparison"),
    ],
)
def test_a_cell_that_is_refused_costs_no_training_and_leaves_nothing(
    folder, settings, error, match
):
    blocks = "[[grid]]\ntasks = ['tiny']\n[grid.settings]\n" + settings
    with pytest.raises(error, match=match):
        run_grid(*grid_of(folder, blocks), out=folder / "out", workers=1)
    assert not (folder / "out").exists()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    (folder / "task.py").write_text(TASK)
    with pytest.MonkeyPatch.context() as patch:
        from fedcore.report import page

        patch.setattr(page, "drawn", lambda *_: {})
        patch.setattr(page, "template", lambda _: _Nothing())
        run_grid(*grid_of(folder, WHOLE), out=folder / "out", workers=2)
    return folder / "out"


class _Nothing:
    def render(self, **_):
        return ""


def test_every_cell_is_the_comparison_of_its_settings(whole):
    result = read_grid_result(whole)
    assert [cell.failed for cell in result.cells] == [""] * 5
    for cell in result.cells:
        found = Comparison(whole / cell.folder).result
        assert cell.arms == found.arms and cell.gap == found.gap
        assert cell.size.splits == len(found.cells) == 2
        assert cell.gap_of("protection").mean == 0 == cell.gap_of("protection").low
    skewed = result.cells[1]
    assert (skewed.size.sites, skewed.size.rows) == (4, 90)
    assert (
        skewed.spread.sites <= 4 and skewed.spread.worst <= skewed.spread.mean <= skewed.spread.best
    )


def test_privacy_is_held_against_the_same_cell_without_it(whole):
    without, private = read_grid_result(whole).cells[2:4]
    assert without.bound.dp is None and without.bound.epsilon is None
    assert private.bound.epsilon == pytest.approx(3, abs=0.01)
    pooled, together = without.score("centralised"), without.score("federated")
    assert private.bound.dp.mean == pytest.approx(together - private.score("federated"))
    assert private.bound.lost.mean == pytest.approx(pooled - private.score("federated"))
    assert private.bound.dp.n == 2


def test_noise_of_each_site_is_held_against_the_same_epsilon_with_noise_inside_the_sum(whole):
    cells = read_grid_result(whole).cells
    once, each = cells[3:]
    assert [cell.bound.local is None for cell in cells] == [True] * 4 + [False]
    lost = once.score("federated") - each.score("federated")
    assert each.bound.local.mean == pytest.approx(lost) and each.bound.local.n == 2
    (table,) = [t for t in lost_tables(read_grid_result(whole)) if "natural" in t.title]
    assert table.head[-2:] == ("no privacy", "noise in the sum")


def test_the_cost_is_traffic_and_time_at_the_given_prices(whole):
    for cell in read_grid_result(whole).cells:
        cost = cell.cost
        assert cost.money == pytest.approx(cost.bytes_site * cell.size.sites * 1e-6 + cost.seconds)
        assert cell.by_bytes[-1][0] == pytest.approx(cost.bytes_site)
        assert cell.by_bytes[-1][1] == pytest.approx(cell.score("federated"))


def test_the_tidy_table_has_every_number_once(whole):
    rows = json.loads((whole / "table.json").read_text())
    keys = [tuple(str(row[key]) for key in row if key != "value") for row in rows]
    assert len(set(keys)) == len(keys)
    first = read_grid_result(whole).cells[0]
    values = [
        row["value"] for row in rows
        if (row["partition"], row["algorithm"], row["protection"], row["quantity"], row["name"], row["site"])
        == ("natural", "default", "plain", "score", "federated", None)
    ]  # fmt: skip
    assert sum(values) / len(values) == pytest.approx(first.score("federated"))


def test_an_interrupted_grid_goes_on_with_what_it_has(folder, whole):
    def stop(_run, _folder):
        def on_split(_cell, done, _total):
            if done == 3:
                raise KeyboardInterrupt

        return GridListener(on_split=on_split)

    out = folder / "out"
    with pytest.raises(KeyboardInterrupt):
        run_grid(*grid_of(folder, WHOLE), out=out, workers=1, listener=stop)
    asked = json.loads((out / "job.json").read_text())
    assert asked["base"] == ".."  # of no machine: results are passed on
    assert asked_of(out) == (read_grid(folder / "grid.toml"), folder)
    finished = {path.parent for path in out.glob("cells/*/result.json")}
    began = []

    def told(_run, _folder):
        return GridListener(on_begin=lambda *counts: began.append(counts))

    with pytest.raises(AlreadyExists, match="other settings"):
        run_grid(*grid_of(folder, WHOLE, GRID.replace("rounds = 2", "rounds = 3")), out=out)
    run_grid(*grid_of(folder, WHOLE), out=out, workers=2, listener=told)
    (done, total), (ours, theirs) = began[0], (table(out), table(whole))
    assert len(finished) == 1 and done == 1 and total == 8
    assert ours == theirs


FAILING = """
[[grid]]
tasks = ["tiny", "fails"]
algorithms = ["default", "wrong"]
protections = ["plain"]
"""


def test_a_cell_that_fails_is_told_and_the_others_go_on(folder):
    result, out = run_grid(*grid_of(folder, FAILING), out=folder / "out", workers=2)
    failed = [bool(cell.failed) for cell in result.cells]
    assert failed == [False, False, False, True]
    assert "no such rate" in result.cells[3].failed or "task.train" in result.cells[3].failed
    assert (out / result.cells[0].folder / "report.html").is_file()
    assert not (out / result.cells[3].folder / "result.json").exists()


def ends(*arguments):
    with pytest.raises(SystemExit) as ended:
        commands.main(arguments)
    return ended.value.code


ONE = "[[grid]]\ntasks = ['tiny']\nprotections = ['plain']\n"


def test_the_command_runs_a_file_and_prints_the_table(folder, capsys):
    grid_of(folder, ONE)
    assert (
        ends("compare", "grid.toml", "--seeds", "1", "--out", "out", "--per-gigabyte", "0.5") == 0
    )
    out, err = capsys.readouterr()
    assert "tiny, natural: " in out and "lost against pooling" in out and "exactly 0" in out
    assert "worst site" in out and "USD" in out and "out/report.html" in out
    assert "1 cells in out" in err or "1 cell in out" in err
    assert read_grid_result(Path("out")).asked["prices"]["per_gigabyte"] == 0.5
    assert ends("report", "out") == 0
    assert capsys.readouterr().out == "out/report.html\n"
    assert ends("compare", "--resume", "out") == 2
    assert "interrupted grid" in capsys.readouterr().err


def test_the_command_ends_with_the_code_of_the_cell_that_failed(folder, capsys):
    grid_of(folder, "[[grid]]\ntasks = ['fails']\nalgorithms = ['wrong']\nprotections = ['plain']")
    assert ends("compare", "grid.toml", "--out", "out", "--json") == 1
    assert json.loads(capsys.readouterr().out)["cells"][0]["failed"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("grid.toml", "--lr", "0.1"), "found lr beside a grid"),
        (("grid.toml", "--preset", "quick"), "found several"),
        (("--preset", "quik"), "--preset: found 'quik'"),
        (("--per-hour", "1"), "prices without a grid"),
    ],
)
def test_what_does_not_go_with_a_grid_is_refused(folder, capsys, arguments, match):
    grid_of(folder, ONE)
    assert ends("compare", *arguments) == 2
    assert match in capsys.readouterr().err
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("name", ["quick", "paper", "privacy"])
def test_a_preset_is_a_grid_whose_names_are_known(name):
    from fedcore.cli.grids import preset_file

    cells = cells_of(read_grid(preset_file(name)), Path())
    assert len(cells) >= 4
