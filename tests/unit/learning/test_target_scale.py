"""Targets of any size are scaled for training, by a public range or their size over sites; results keep their unit."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score
from torch.utils.data import DataLoader, TensorDataset

import fedcore
from fedcore.config import build_job
from fedcore.errors import BadInput, Refused
from fedcore.experiment.prepare import prepare
from fedcore.learning import metrics
from fedcore.learning.data.split import FoldSplit
from fedcore.learning.data.targets import SIZES, TargetScale, sizes
from fedcore.learning.exported import script
from fedcore.learning.saved import load_model
from fedcore.learning.site import SiteTrainer
from fedcore.learning.task import Task

pytestmark = pytest.mark.usefixtures("no_drawings")

SITES = {"north": 1, "south": 2, "coast": 3}
SLOPES = np.array([3.0, -2.0, 1.0, 0.0, 0.5])
METRICS = ("mae", "mse", "rmse", "r2")


def squared(outputs, targets):
    return torch.nn.functional.mse_loss(outputs.squeeze(1), targets)


def rows_of(middle, size, kind="f8"):
    def data(source):
        random = np.random.default_rng(source)
        x = random.normal(size=(120, 5)).astype("f4")
        noise = random.normal(0, 0.3, 120)
        return x, (middle + size * (x @ SLOPES + noise)).astype(kind)

    return data


def made(data, **changes):
    given = {
        "name": "price",
        "model": fedcore.linear(5, classes=1),
        "loss": squared,
        "metrics": METRICS,
    }
    return Task(data=data, sites=SITES, **given | changes)


def run(task, tmp_path, **settings):
    given = {
        "rounds": 12,
        "resamples": 0,
        "protection": "plain",
        "arms": ("centralised", "federated"),
    }
    return fedcore.simulate(task, out=tmp_path / "run", **given | settings)


PRICES = rows_of(250_000, 60_000)
RANGE = {"target_range": (-500_000, 1_000_000)}
FEDERATED = {"defaults": {"standardise": "federated"}}


def loader(source):
    x, y = PRICES(source)
    return DataLoader(
        TensorDataset(torch.from_numpy(x), torch.from_numpy(y).float()), batch_size=32
    )


@pytest.mark.parametrize(
    ("data", "changes"),
    [
        (PRICES, RANGE),
        (PRICES, FEDERATED),
        (rows_of(250_000, 60_000, "i8"), RANGE),
        (loader, RANGE),
        (rows_of(0, 1e-6), {"target_range": (-1e-5, 1e-5)}),
        (rows_of(0, 1e-6), FEDERATED),
        (rows_of(2000, 5), {"target_range": (1950, 2050)}),
    ],
)
def test_a_federation_learns_targets_of_any_size_as_pooled_rows_do(data, changes, tmp_path):
    found = run(made(data, **changes), tmp_path)
    pooled, together = (found.result.arms[arm].metrics for arm in ("centralised", "federated"))
    assert together["mae"] == pytest.approx(pooled["mae"], rel=0.05)
    assert together["r2"] > 0.95, "in units of another size it would have learnt nothing"
    # What the sites know from sums is the same, in the target's unit.
    protected = found.result.protected
    for name in ("mae", "mse", "rmse"):
        assert protected.metrics[name] == pytest.approx(together[name], rel=1e-3)
    assert protected.metrics["r2"] == pytest.approx(together["r2"], abs=1e-3)
    assert protected.clipped == dict.fromkeys(METRICS, 0)


def test_predictions_and_the_exported_model_are_in_the_targets_unit(tmp_path):
    found = run(made(PRICES, **RANGE), tmp_path)
    x, y = PRICES(9)
    predicted = found.predict(x)
    assert predicted.shape == (120,)
    assert mean_absolute_error(y, predicted) < 30_000 < np.abs(y).mean() / 5
    scripted = tmp_path / "model.pt"
    scripted.write_bytes(script(load_model(found.directory, made(PRICES, **RANGE)), x))
    assert torch.jit.load(scripted)(torch.from_numpy(x)).numpy() == pytest.approx(predicted)


def test_a_table_with_a_range_of_its_target_and_federated_columns(tmp_path):
    read = fedcore.table(
        target="price", regression=True, columns={f"c{i}": fedcore.number(-5, 5) for i in range(5)}
    )

    def data(source):
        x, y = PRICES(source)
        return read({"price": y} | {f"c{i}": x[:, i] for i in range(5)})

    for number, changes in enumerate((RANGE, FEDERATED, RANGE | FEDERATED)):
        found = run(made(data, **changes), tmp_path / str(number), rounds=20)
        assert found.result.arms["federated"].metrics["r2"] > 0.95
        names = [f"c{i}" for i in range(5)]
        learned = [SIZES[0]] if changes is FEDERATED else []
        assert found.result.statistics["names"] == names + learned
        x, y = PRICES(9)
        assert r2_score(y, found.predict({f"c{i}": x[:, i] for i in range(5)})) > 0.95


@pytest.mark.parametrize("protection", ["plain", "masked"])
def test_large_targets_without_a_scale_are_refused_before_anything_is_written(protection, tmp_path):
    with pytest.raises(BadInput) as caught:
        run(made(PRICES), tmp_path, protection=protection)
    assert "site north: targets: found values of size " in str(caught.value)
    assert "target_range=(low, high)" in caught.value.remedy
    assert "train.standardise=federated" in caught.value.remedy
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("middle", "size", "warned"),
    [(5000, 1, True), (0, 1e-6, True), (3, 1, False), (400, 20, False)],
)
def test_targets_that_a_model_learns_slowly_are_a_warning(middle, size, warned):
    def findings(**changes):
        task = made(rows_of(middle, size), **changes)
        return prepare(task, build_job(task.defaults, {"protection": "plain"})).findings

    assert [text.partition(": ")[2][:21] for text, _ in findings()] == [
        "found targets of size"
    ] * warned
    assert not findings(target_range=(-20_000, 20_000))
    assert not findings(**FEDERATED)


def test_sizes_over_too_few_sites_are_refused_as_any_statistics_are(tmp_path):
    def data(source):
        x, y = PRICES(source)
        return (x[:20], np.zeros(20)) if source == 1 else (x, y)  # no size but of zeros

    with pytest.raises(Refused, match=r"log2 of the target's size.*found 2 contributing sites"):
        run(made(data, **FEDERATED), tmp_path, protection="masked")


def test_a_deployed_site_computes_the_same_scale(tmp_path):
    task = made(PRICES, **FEDERATED)
    job = build_job(task.defaults, {"rounds": 1})
    site = SiteTrainer.load(task, job, "north", 1, 128, FoldSplit(0))
    assert site.columns == (SIZES,)
    assert site.shape.features == 1
    ranged = SiteTrainer.load(made(PRICES, **RANGE), job, "north", 1, 128, FoldSplit(0))
    assert ranged.columns == ()
    other = made(PRICES, target_range=(0, 1_000_000)).digest()
    assert len({ranged.shape.task_digest, other, site.shape.task_digest}) == 3, (
        "sites would not share a sum"
    )


@pytest.mark.parametrize("bad", [(1, 1), (2, 1), (0, float("inf")), (0,), "ab", 5, (0, "x")])
def test_a_range_that_is_none_is_refused(bad):
    with pytest.raises(BadInput, match=r"task.target_range: found .* expected"):
        made(PRICES, target_range=bad)


@pytest.mark.parametrize(
    "changes",
    [
        {"metrics": ("accuracy",)},
        {"metrics": ("mae", "accuracy")},
        {"metrics": ("mine",), "evaluate": lambda model, rows: {"mine": (1, 1)}},
        {"train": lambda model, rows, fit: None},
    ],
)
def test_a_range_beside_what_would_not_use_it_is_refused(changes):
    with pytest.raises(BadInput, match="expected a regression that fedcore trains and scores"):
        made(PRICES, **RANGE | changes)


def test_scales_by_range_and_by_size():
    scale = TargetScale.of_range(0, 800)
    assert scale == TargetScale(400.0, 100.0)
    assert scale.step == 128.0
    scaled = scale.to_model(torch.tensor([0, 400, 500]))
    assert scaled.dtype == torch.float32
    assert scaled.tolist() == [-4.0, 0.0, 1.0]
    assert scale.to_unit(np.array([-4.0, 1.0])).tolist() == [0.0, 500.0]
    found = sizes(torch.tensor([[8.0], [-0.5], [0.0]]))
    assert found[:2, 0].tolist() == [3.0, -1.0]
    assert np.isnan(found[2, 0])
    assert TargetScale.of_sizes(2.7) == TargetScale(0.0, 8.0)


def test_the_metrics_are_those_of_scikit_learn_and_so_are_their_sums():
    random = np.random.default_rng(0)
    targets = random.normal(40, 10, 200)
    outputs = targets + random.normal(0, 3, 200)
    expected = {
        "mae": mean_absolute_error(targets, outputs),
        "mse": mean_squared_error(targets, outputs),
        "rmse": mean_squared_error(targets, outputs) ** 0.5,
        "r2": r2_score(targets, outputs),
    }
    counts = random.integers(0, 3, (4, 200))
    for name, value in expected.items():
        metric = metrics.METRICS[name]
        assert metric.exact(outputs, targets) == pytest.approx(value, rel=1e-12)
        assert metric.finish(metric.sums(outputs, targets)) == pytest.approx(value, rel=1e-4)
        taken = [np.repeat(np.arange(200), times) for times in counts]
        each = [metric.exact(outputs[rows], targets[rows]) for rows in taken]
        assert metric.exact_resampled(outputs, targets, counts) == pytest.approx(each, rel=1e-9)
        assert metric.higher_is_better == (name == "r2")
    same, known = np.full(5, 7.0), metrics.METRICS
    assert known["r2"].exact(outputs[:5], same) is None
    assert known["r2"].finish(known["r2"].sums(outputs[:5], same)) is None
    assert Counter(metric.of_values for metric in known.values())[True] == len(expected)
