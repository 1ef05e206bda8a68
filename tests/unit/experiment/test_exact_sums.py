"""`sum = "exact"`: a simulation adds without cryptography, gives the bits of the protocol, and states what it is."""

from __future__ import annotations

import json

import numpy as np
import pytest
from torch import nn

import fedcore
from fedcore.secagg.protections import SCHEMES

pytestmark = pytest.mark.usefixtures("no_drawings")

SITES = {"a": 1, "b": 2, "c": 3, "d": 4}
PROTECTED = {name: {"protection": p, "cipher": c} for name, (p, c) in SCHEMES.items() if p != "plain"}  # fmt: skip


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def data(site):
    rng = np.random.default_rng(site)
    x = rng.normal(size=(30 + 10 * site, 4)).astype("f4")
    return x, (x[:, 0] > 0).astype("i8")


def run(**settings):
    task = fedcore.Task(
        name="t", data=data, model=lambda: nn.Linear(4, 2), loss=nn.functional.cross_entropy,
        metrics=("accuracy",),
    )  # fmt: skip
    return fedcore.simulate(
        task, **{"sites": SITES, "rounds": 3, "arms": ("federated",)} | settings
    )


@pytest.mark.parametrize("scheme", PROTECTED)
def test_an_exact_sum_gives_the_bits_the_survivors_and_the_bytes_of_the_protocol(scheme):
    drop = {"drop": "2:submit:b,3:unmask:c"}
    full, exact = (run(sum=how, **PROTECTED[scheme], **drop) for how in ("full", "exact"))
    assert exact.result["model_sha256"] == full.result["model_sha256"]
    assert exact.result["protected_metrics"] == full.result["protected_metrics"]
    for one, other in zip(exact.rounds, full.rounds, strict=True):
        for column in ("survivors", "bytes_up", "bytes_down", "train_loss", "clipped_fraction"):
            assert one[column] == other[column], column
    assert exact.rounds[1]["survivors"] == ["a", "c", "d"]


def test_the_result_states_that_sums_were_not_protected_and_shows_no_exposure():
    full, exact = run(), run(sum="exact")
    stored = json.loads((exact.directory / "result.json").read_text())
    assert stored["sum"] == "exact" and stored["protection"] == "layered"
    assert stored["seen"] is None and full.result["seen"] is not None
    assert any("without cryptography" in warning for warning in exact.result["warnings"])
    assert "sum" not in json.loads((full.directory / "result.json").read_text())
    assert not any("without cryptography" in warning for warning in full.result["warnings"])
    plain = run(sum="exact", protection="plain")
    assert "sum" not in plain.result, "nothing is left out of `plain`"


def test_exact_sums_are_abandoned_where_the_protocol_abandons_them():
    found = run(sum="exact", drop="2:submit:a,2:submit:b")
    assert found.rounds[1]["abandoned"].startswith("at submit: 2 of 4 sites stayed")


@pytest.mark.parametrize("executor", ["sequential", "batched"])
def test_sites_encoded_together_give_the_bits_of_sites_encoded_one_by_one(executor):
    full, exact = (
        run(sum=how, protection="masked", executor=executor) for how in ("full", "exact")
    )
    assert exact.result["model_sha256"] == full.result["model_sha256"]
    assert exact.result["protected_metrics"] == full.result["protected_metrics"]


def test_exact_sums_of_groups_give_the_bits_of_their_protocol():
    groups = {
        "aggregate": "trimmed",
        "group_sites": 5,
        "sites": {f"s{k:02d}": k for k in range(15)},
    }
    full, exact = (
        run(sum=how, protection="masked", rounds=1, **groups) for how in ("full", "exact")
    )
    assert exact.result["model_sha256"] == full.result["model_sha256"]
