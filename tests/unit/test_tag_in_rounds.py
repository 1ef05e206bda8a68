"""The sum tag where it is used: `KeyEpoch.protected_sum` refuses what is not this sum (PROTOCOL T).

`test_sumtag.py` has the tag's own attacks. Here a coordinator hands out sums of another round, stage,
plan, roster or model, or alters the opened one, and the round itself must refuse: each attack with a
positive control, in which the tag is not checked and the wrong sum is accepted.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fedcore
from fedcore import simulation
from fedcore.comparison.experiment import Experiment, job_for, prepare
from fedcore.errors import TagRefused
from fedcore.plan import RoundHeader, VectorSpec, Wide, solve_packing
from fedcore.protect.sumtag import SumTag, state_tag
from fedcore.simulation import KeyEpoch, Stopwatch

pytest.importorskip("tenseal.sealapi")

from fedcore.protect.bfv import EncryptedFold, EncryptedSealer

ROSTER = ("ann", "bob", "cat")
PACKING = solve_packing(16, len(ROSTER) + 1, "encrypted")
WIDES = (Wide("weight", 1, 20),)
SPEC = VectorSpec("update", 6, WIDES)


def unchecked(monkeypatch):
    """The positive control: what would happen without the tag."""
    monkeypatch.setattr(SumTag, "check", lambda *_: None)


# ------------------------------------------------------------------------------- sums of another


class Coordinator:
    """Keeps the first sum it released, and hands it out again instead of every later one."""

    def __init__(self, monkeypatch):
        self.kept = None
        honest = EncryptedFold.total

        def total(fold):
            released = list(honest(fold))
            self.kept = self.kept or released
            return iter(self.kept)

        monkeypatch.setattr(EncryptedFold, "total", total)


@pytest.fixture
def epoch():
    return KeyEpoch("job", "encrypted", PACKING, "plan digest")


def protected(epoch, value, *, stage="update", round_=7, roster=ROSTER, state=b"model"):
    """The opened sum of three sites whose coordinates and weight are all `value`."""
    fields = np.full(SPEC.coordinates, value, dtype=np.uint64)
    contributions = ((place, fields, {"weight": [value]}) for place in range(3))
    spec = VectorSpec(stage, SPEC.coordinates, WIDES)
    return epoch.protected_sum(spec, round_, roster, contributions, state, Stopwatch()).opened


ANOTHER = {
    "round": {"round_": 8},
    "stage": {"stage": "metrics"},
    "roster": {"roster": ("cat", "bob", "ann")},
    "state": {"state": b"another model"},
    "plan": {},
    "job": {},
}


@pytest.mark.parametrize("what", ANOTHER)
def test_a_released_sum_is_refused_where_it_does_not_belong(epoch, what, monkeypatch):
    Coordinator(monkeypatch)
    assert protected(epoch, 100).wides == {"weight": [300]}
    # The control: where it belongs, the same chunks are accepted, so only what differs refuses them.
    assert protected(epoch, 55).wides == {"weight": [300]}
    if what == "plan":
        epoch.plan_digest = "another digest"
    if what == "job":
        epoch.job = "another job"
    with pytest.raises(TagRefused, match="its tag is not that of the listed survivors"):
        protected(epoch, 55, **ANOTHER[what])
    unchecked(monkeypatch)
    opened = protected(epoch, 55, **ANOTHER[what])
    assert opened.wides == {"weight": [300]} and (opened.coordinates == 300).all()


@pytest.mark.parametrize("what", ["round", "stage", "roster", "plan", "job"])
def test_the_header_alone_refuses_it_too(epoch, what, monkeypatch):
    """The state tag covers job and round as well; with one tag for all, the header must suffice."""
    monkeypatch.setattr(simulation, "state_tag", lambda *_: bytes(32))
    test_a_released_sum_is_refused_where_it_does_not_belong(epoch, what, monkeypatch)


@pytest.mark.parametrize("what", ["round", "state", "job"])
def test_the_state_tag_alone_refuses_it_too(epoch, what, monkeypatch):
    """As above, with one header for all."""
    header = RoundHeader("any", 0, "any", ROSTER, "any")
    monkeypatch.setattr(simulation, "RoundHeader", lambda *_: header)
    test_a_released_sum_is_refused_where_it_does_not_belong(epoch, what, monkeypatch)


def test_the_tag_s_keys_come_from_exactly_these_words(epoch, monkeypatch):
    made = []

    def record(group, header, state):
        made.append((header, state))
        return SumTag(group, header, state)

    monkeypatch.setattr(simulation, "SumTag", record)
    protected(epoch, 1, stage="range", round_=0, state=b"start")
    protected(epoch, 1, stage="update", round_=3, state=b"later")
    assert made == [
        (
            RoundHeader("job", round_, stage, ROSTER, "plan digest"),
            state_tag(epoch._group, "job", round_, state),
        )
        for stage, round_, state in (("range", 0, b"start"), ("update", 3, b"later"))
    ]


# --------------------------------------------------------------------------------- altered sums


def data(site):
    rng = np.random.default_rng(site)
    x = rng.normal(size=(40 + 10 * site, 4)).astype("f4")
    return x, (x[:, 0] > 0).astype("i8")


TASK = fedcore.Task(
    "tagged", data, lambda: torch.nn.Linear(4, 2), torch.nn.functional.cross_entropy,
    sites={"a": 1, "b": 2, "c": 3},
)  # fmt: skip
SETTINGS = {"rounds": 3, "protection": "encrypted", "range": 0.25, "resamples": 20}


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Shift:
    """Adds 40 to the low field of five data slots of one opened sum; marks and canaries stay right."""

    def __init__(self, monkeypatch, which):
        self.opened = 0
        honest = EncryptedSealer.open

        def open_(sealer, chunks, slots):
            total = honest(sealer, chunks, slots)
            self.opened += 1
            if self.opened == which:
                total[1:6] += np.uint64(40)
            return total

        monkeypatch.setattr(EncryptedSealer, "open", open_)


def test_a_shifted_sum_is_refused_and_the_run_leaves_nothing(in_tmp, monkeypatch):
    Shift(monkeypatch, which=1)
    rows = []
    with pytest.raises(TagRefused, match="its tag is not that of the listed survivors"):
        fedcore.simulate(TASK, **SETTINGS, on_round=rows.append)
    assert all(row["arm"] != "federated" for row in rows)
    assert [path for path in Path().rglob("*") if path != Path("runs")] == []


def test_without_the_check_the_shifted_sum_is_accepted(in_tmp, monkeypatch):
    """The control: marks and canaries see nothing; only the comparison with the twin does."""
    honest = fedcore.simulate(TASK, **SETTINGS).result
    Shift(monkeypatch, which=1)
    unchecked(monkeypatch)
    result = fedcore.simulate(TASK, **SETTINGS).result
    assert result["rounds"] == 3 and result["unequal_rounds"] == 1
    assert result["model_sha256"] != honest["model_sha256"]


@pytest.mark.parametrize("which", [1, 2])
def test_a_refused_round_does_not_advance_the_state(in_tmp, which, monkeypatch):
    experiment = Experiment(prepare(*job_for(TASK, SETTINGS)))
    federated = experiment.federated
    Shift(monkeypatch, which)
    for round_ in range(1, which):
        federated.step(round_)
    before = federated.save()
    state, twin, budget = federated.state, federated.twin, federated.budget.examples
    kept = state.canonical()
    with pytest.raises(TagRefused):
        federated.step(which)
    assert federated.state is state and federated.twin is twin
    assert state.canonical() == kept
    assert federated.budget.examples == budget
    assert [federated.save()[key] for key in ("counts", "bytes")] == [
        before[key] for key in ("counts", "bytes")
    ]


def test_a_refusal_in_a_later_round_keeps_the_rounds_before_it(in_tmp, monkeypatch):
    """Resumed with new keys and no attack, the run ends where an undisturbed one does."""
    from fedcore.comparison import api

    whole = fedcore.simulate(TASK, **SETTINGS).result
    with monkeypatch.context() as attack:
        Shift(attack, which=2)
        with pytest.raises(TagRefused):
            fedcore.simulate(TASK, **SETTINGS, out="attacked")
    assert not Path("attacked/result.json").exists()
    assert not Path("attacked/model.safetensors").exists()
    found = api.resume("attacked", task=TASK).result
    assert found["model_sha256"] == whole["model_sha256"]
    assert found["unequal_rounds"] == 0
