"""Models of earlier rounds in a run's folder: which there are, that they load, and that they change nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fedcore
from fedcore.errors import BadInput
from fedcore.experiment import api
from fedcore.files import CHECKPOINTS

pytestmark = pytest.mark.usefixtures("no_drawings")

TASK = """
import numpy as np, torch, fedcore
def data(source):
    x = np.random.default_rng(source).normal(size=(20, 3)).astype("f4")
    return x, (x[:, 0] > 0).astype("i8")
task = fedcore.Task("small", data, lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4),
    torch.nn.Linear(4, 2)), torch.nn.functional.cross_entropy, sites={"a": 1, "b": 2, "c": 3},
    defaults={"protection": "plain", "rounds": 5, "arms": "federated", "resamples": 0, "lr": 0.5})
"""
ROWS = np.random.default_rng(9).normal(size=(6, 3)).astype("f4")


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task.py").write_text(TASK)


def small(**settings):
    return fedcore.simulate("task.py", **settings)


@pytest.mark.parametrize("buffers", ["average", "initial", "local"])
def test_every_so_many_rounds_the_model_of_that_round_is_kept(buffers):
    run = small(checkpoint_every=2, out="run", buffers=buffers)
    assert list(run.checkpoints) == [2, 4]
    names = sorted(path.name for path in (run.directory / CHECKPOINTS).iterdir())
    assert names == ["round-0002.safetensors", "round-0004.safetensors"]
    plain = small(out="plain", buffers=buffers)
    assert run.result.model_sha256 == plain.result.model_sha256
    assert not (plain.directory / CHECKPOINTS).exists() and plain.checkpoints == {}
    shorter = small(rounds=2, out="shorter", buffers=buffers)
    assert (
        (run.checkpoints[2]).read_bytes() == (shorter.directory / "model.safetensors").read_bytes()
    )
    assert np.array_equal(run.after(2).predict(ROWS), shorter.predict(ROWS))
    assert not np.array_equal(run.after(2).predict(ROWS), run.predict(ROWS))


def test_a_kept_model_loads_from_another_folder_by_its_file_and_begins_another_run(
    tmp_path, monkeypatch
):
    run = small(checkpoint_every=5, out="run", buffers="initial")
    assert torch.equal(
        next(run.after(5).model.parameters()), next(run.model.parameters())
    )  # the last round's
    monkeypatch.chdir(tmp_path.parent)
    elsewhere = fedcore.load(tmp_path / "run")
    assert np.array_equal(elsewhere.after(5).predict(ROWS), run.predict(ROWS))
    monkeypatch.chdir(tmp_path)
    again = small(
        initial=str(run.checkpoints[5]), rounds=1, lr=1e-9, out="again", buffers="initial"
    )
    assert np.allclose(again.predict(ROWS), run.predict(ROWS), atol=1e-5)


def test_an_interrupted_run_keeps_the_same_models_as_a_whole_one():
    whole = small(checkpoint_every=2, out="whole")

    def interrupt(row):
        if row.round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        small(checkpoint_every=2, out="broken", on_round=interrupt)
    again = api.resume("broken")
    assert list(again.checkpoints) == [2, 4]
    for round_, file in whole.checkpoints.items():
        assert again.checkpoints[round_].read_bytes() == file.read_bytes()


def test_with_the_best_round_released_the_kept_models_are_of_their_own_rounds():
    run = small(checkpoint_every=1, validate=0.3, keep="best", out="run")
    best = int(run.result.best["federated"].round)
    assert np.array_equal(run.after(best).predict(ROWS), run.predict(ROWS))


def test_a_round_that_was_not_kept_is_refused_by_those_that_were():
    with pytest.raises(BadInput, match=r"no model of round 3, expected one of: 2, 4"):
        small(checkpoint_every=2, out="run").after(3)
    with pytest.raises(BadInput, match="expected one of: none"):
        small(out="none", rounds=1).after(1)


def test_a_step_of_no_rounds_is_refused():
    with pytest.raises(BadInput, match=r"round.checkpoint_every: found 0, expected greater"):
        small(checkpoint_every=0)
