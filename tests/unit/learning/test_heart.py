"""The built-in tasks: the vendored data is what its provenance says, and the models fit the rows."""

from __future__ import annotations

import hashlib
import re
import runpy
import shutil

import numpy as np
import pytest
import torch

from fedcore.errors import BadInput, UnknownName
from fedcore.learning.data import digits, heart
from fedcore.learning.data.linear import linear, logit_loss
from fedcore.learning.data.loading import load_rows
from fedcore.learning.data.tabular import Table
from fedcore.learning.task import load_task

SOURCE_SHA256 = "574f2fa2b43012fa25fca4fcdb36bd7c6bccdd0af4242f6c0e4c8633c5a072ae"
PROVENANCE = heart.FILE.with_name("heart.PROVENANCE.md").read_text()


def test_the_file_differs_from_its_source_in_one_cell():
    raw = heart.FILE.read_bytes()
    assert raw.count(b"\n304,28,Male,Hungary,") == 1
    source = raw.replace(b"\n304,28,Male,Hungary,", b"\n304,28,Male,Cleveland,")
    assert hashlib.sha256(source).hexdigest() == SOURCE_SHA256
    assert hashlib.sha256(raw).hexdigest() == heart.SHA256


def test_the_provenance_names_everything():
    for words in (
        SOURCE_SHA256,
        heart.SHA256,
        "CC BY 4.0",
        "Janosi",
        "Steinbrunn",
        "Pfisterer",
        "Detrano",
    ):
        assert words in PROVENANCE
    assert f"{len(heart.FILE.read_bytes()):,} bytes" in PROVENANCE
    assert re.search(r"`id` 304", PROVENANCE)


def test_a_changed_file_is_refused(tmp_path):
    (tmp_path / "heart.csv").write_bytes(heart.FILE.read_bytes() + b"\n")
    module = shutil.copy(heart.__file__, tmp_path / "heart.py")
    with pytest.raises(BadInput, match="SHA-256"):
        runpy.run_path(module)["data"]("va")


@pytest.mark.parametrize(
    ("site", "counts"),
    [
        ("cleveland", (164, 139)),
        ("hungary", (188, 106)),
        ("switzerland", (8, 115)),
        ("va", (51, 149)),
    ],
)
def test_four_hospitals(site, counts):
    rows, test = load_rows(heart.task, heart.task.sites[site], site)
    assert test is None
    assert tuple(np.bincount(rows.labels())) == counts
    assert rows.unknown == {}
    for i, (low, high) in enumerate(rows.layout.ranges):
        seen = rows.features[:, i][~np.isnan(rows.features[:, i])]
        assert ((seen >= low) & (seen <= high)).all()


def test_zero_means_not_measured():
    switzerland, va = heart.data("switzerland"), heart.data("va")
    chol, pressure = (va.layout.names.index(name) for name in ("chol", "trestbps"))
    assert np.isnan(switzerland.features[:, chol]).all()
    assert np.nanmin(va.features[:, chol]) > 0 and np.nanmin(va.features[:, pressure]) > 0


def test_ten_features_and_their_indicators():
    assert [name for name, _ in heart.table.specs] == [
        "age", "sex", "cp", "trestbps", "chol", "fbs", "restecg", "thalch", "exang", "oldpeak",
    ]  # fmt: skip
    indicators = [name for name in heart.table.columns if name.endswith("_missing")]
    assert len(indicators) == 7 and len(heart.table.columns) == 30
    assert Table.from_json(heart.table.to_json()) == heart.table


def test_reading_with_pandas_gives_the_same_rows():
    pd = pytest.importorskip("pandas")
    frame = pd.read_csv(heart.FILE)
    rows = heart.table(frame[frame["dataset"] == "VA Long Beach"])
    np.testing.assert_array_equal(rows.features, heart.data("va").features)
    np.testing.assert_array_equal(rows.fixed, heart.data("va").fixed)


def test_unknown_hospital():
    with pytest.raises(UnknownName) as caught:
        heart.data("clevland")
    assert "cleveland" in caught.value.remedy


def test_heart_model_takes_the_rows():
    task = load_task("heart")
    model = task.model()
    x = torch.zeros(3, len(heart.table.columns))
    loss = task.loss(model(x), torch.tensor([0, 1, 1]))
    assert loss.item() == pytest.approx(np.log(2))
    loss.backward()


def test_digits():
    task = load_task("digits")
    sites = task.sites(n=3, by="dirichlet", alpha=0.5, seed=2)
    rows = [load_rows(task, part, name)[0] for name, part in sites.items()]
    assert sum(map(len, rows)) == 1797
    x, _ = next(iter(rows[0].batches(16, None)))
    assert x.dtype == torch.float32 and x.min() >= 0 and x.max() == 1
    assert task.model()(x).shape == (16, 10)
    assert sum(p.numel() for p in task.model().parameters()) == 2410
    assert len(digits.sites()) == 4


@pytest.mark.parametrize(("classes", "outputs"), [(1, 1), (2, 1), (3, 3)])
def test_linear(classes, outputs):
    x = torch.ones(4, 5)
    for features in (5, None):
        model = linear(features, classes)()
        assert model(x).tolist() == [[0.0] * outputs] * 4
        assert type(model).__name__ == "ZeroLinear"
    assert linear(5, classes) == linear(5, classes)


@pytest.mark.parametrize("wrong", [(0, 2), (3, 0)])
def test_linear_refuses(wrong):
    with pytest.raises(BadInput, match="linear"):
        linear(*wrong)


def test_logit_loss_takes_any_binary_target():
    logits, y = torch.tensor([[2.0], [-1.0]]), torch.tensor([1, 0])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits[:, 0], y.float())
    for targets in (y, y.float(), y[:, None]):
        assert logit_loss(logits, targets) == logit_loss(logits[:, 0], targets) == expected
