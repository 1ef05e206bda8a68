"""TensorBoard is optional: whatever keeps it from being imported, the run goes on without."""

from __future__ import annotations

import builtins

import pytest

from fedcore.experiment.loop import Events
from fedcore.results import RoundRow

ROW = RoundRow({"arm": "federated", "round": 1, "accuracy": 0.5, "loss": None})


@pytest.mark.parametrize(
    "error",
    [ImportError("no module"), TypeError("Descriptors cannot be created directly")],
    ids=["absent", "built for another protobuf"],
)
def test_without_a_working_tensorboard_nothing_is_written(tmp_path, monkeypatch, error):
    real = builtins.__import__

    def broken(name, *rest):
        if name.startswith("tensorboard"):
            raise error
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", broken)
    events = Events(tmp_path)
    events.row(ROW)
    events.close()
    assert list(tmp_path.iterdir()) == []


def test_each_arm_has_its_events(tmp_path):
    pytest.importorskip("tensorboard")
    events = Events(tmp_path)
    events.row(ROW)
    events.close()
    events.close()
    assert len(list((tmp_path / "tensorboard" / "federated").iterdir())) == 1
