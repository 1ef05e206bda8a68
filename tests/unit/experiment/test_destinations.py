"""Where else a run's rows go: TensorBoard, MLflow and Weights & Biases, each where its package is there."""

from __future__ import annotations

import builtins
import sqlite3
import warnings

import pytest

import fedcore
from fedcore.config import build_job, settings_digest
from fedcore.errors import BadInput
from fedcore.experiment.destinations import Destinations, TensorBoard
from fedcore.results import RoundRow

JOB = {"task_name": "t", "seed": 3, "train": {"lr": 0.5, "batch_size": 8}, "sites": None}
ROW = RoundRow({"arm": "federated", "round": 1, "accuracy": 0.5, "loss": None, "note": "text"})


def job(*to):
    return JOB | {"track": {"to": list(to)}}


def without(monkeypatch, package, error):
    """Imports of a package and what is in it raise `error`."""
    real = builtins.__import__

    def broken(name, *rest):
        if name.partition(".")[0] == package:
            raise error
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)


@pytest.mark.parametrize(
    "error",
    [ImportError("no module"), TypeError("Descriptors cannot be created directly")],
    ids=["absent", "built for another protobuf"],
)
def test_without_a_working_tensorboard_nothing_is_written_unless_it_is_asked_for(
    tmp_path, monkeypatch, error
):
    without(monkeypatch, "tensorboard", error)
    found = Destinations(tmp_path, job())
    found.row(ROW)
    found.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(BadInput, match=r"track\.to: "):
        Destinations(tmp_path, job("tensorboard"))


@pytest.mark.parametrize("name", ["mlflow", "wandb", "tensorboard"])
def test_a_missing_package_is_refused_with_the_command_that_installs_it(
    tmp_path, monkeypatch, name
):
    without(monkeypatch, name, ModuleNotFoundError(f"No module named '{name}'"))
    with pytest.raises(BadInput) as caught:
        Destinations(tmp_path, job(name))
    assert f"track.to: found '{name}', whose package cannot be imported" in str(caught.value)
    assert caught.value.remedy == f"pip install {name}"
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_a_missing_package_leaves_no_folder(tmp_path, monkeypatch):
    without(monkeypatch, "wandb", ModuleNotFoundError("No module named 'wandb'"))
    with pytest.raises(BadInput, match=r"track\.to: found 'wandb'"):
        fedcore.simulate("heart", protection="plain", to=["wandb"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("to", [(), ("tensorboard",)])
def test_each_arm_has_its_tensorboard_events(tmp_path, to):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = Destinations(tmp_path, job(*to))
    found.row(ROW)
    found.row(RoundRow({**ROW, "arm": "centralised", "round": 2, "accuracy": 0.75}))
    found.close()
    found.close()
    for arm, step, value in [("federated", 1, 0.5), ("centralised", 2, 0.75)]:
        (file,) = (tmp_path / "tensorboard" / arm).iterdir()
        events = [event for event in EventFileLoader(str(file)).Load() if event.summary.value]
        tags = [(e.step, v.tag, v.tensor.float_val[0]) for e in events for v in e.summary.value]
        assert tags == [(step, "accuracy", value)]


def test_mlflow_has_settings_and_metrics_and_a_resumed_run_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "run-001"
    directory.mkdir()
    for round_ in (1, 2):  # the second as after an interrupt
        found = Destinations(directory, job("mlflow"))
        found.row(RoundRow({**ROW, "round": round_, "within 5 %": 0.25}))
        found.close()
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        runs = store.execute("select name, status from runs").fetchall()
        params = dict(store.execute("select key, value from params").fetchall())
        metrics = store.execute("select key, value, step from metrics order by step, key")
        assert runs == [("run-001", "FINISHED")]
        assert params["train.lr"] == "0.5" and params["seed"] == "3" and "sites" not in params
        assert metrics.fetchall() == [
            ("federated/accuracy", 0.5, 1), ("federated/within 5 _", 0.25, 1),
            ("federated/accuracy", 0.5, 2), ("federated/within 5 _", 0.25, 2),
        ]  # fmt: skip


def test_wandb_keeps_an_offline_run_in_the_folder(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    found = Destinations(tmp_path, job("wandb"))
    found.row(ROW)
    found.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert b"federated/accuracy" in file.read_bytes()


def test_one_that_fails_later_is_left_out_with_one_warning(tmp_path, stand_in):
    pytest.importorskip("tensorboard")

    def full(*_):
        raise OSError("no space left on device\nsecond line")

    found = Destinations(tmp_path, job("tensorboard"))
    stand_in(TensorBoard, row=full)
    with pytest.warns(
        UserWarning, match="tensorboard gets no more rows .OSError: no space left on dev"
    ):
        found.row(ROW)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found.row(ROW)
        found.close()


def test_a_destination_changes_no_plan_and_one_that_is_not_known_is_refused():
    assert settings_digest(build_job({"to": "wandb"}), 64) == settings_digest(build_job({}), 64)
    with pytest.raises(BadInput, match=r"track\.to"):
        build_job({"to": "neptune"})
