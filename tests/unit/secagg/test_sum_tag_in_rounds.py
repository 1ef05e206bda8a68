"""The sum tag where it is used: `InProcessFederation.sum` refuses what is not this sum (PROTOCOL T).

`test_sum_tag.py` has the tag's own attacks. Here a coordinator hands out sums of another round, purpose
or model, or alters the opened one, and the round itself must refuse: each attack with a positive
control, in which the tag is not checked and the wrong sum is accepted.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.plans import round_plan

import fedcore
from fedcore.errors import ReleaseRefused, TagRefused
from fedcore.experiment.loop import Experiment
from fedcore.experiment.prepare import job_for, prepare
from fedcore.learning.stopwatch import Stopwatch
from fedcore.secagg import in_process
from fedcore.secagg.crypto.masked import MaskedFold, MaskedSealer
from fedcore.secagg.crypto.sumtag import SumTag
from fedcore.secagg.encode.pack import Layout
from fedcore.secagg.in_process import InProcessFederation
from fedcore.secagg.plan import (
    VectorSpec,
    Wide,
)
from fedcore.secagg.protections import SCHEMES
from fedcore.secagg.protocol import messages
from fedcore.secagg.summing import one_by_one

pytest.importorskip("tenseal.sealapi")

from fedcore.secagg.crypto.bfv import EncryptedFold, EncryptedSealer

pytestmark = pytest.mark.usefixtures("no_drawings")

ROSTER = ("ann", "bob", "cat")
WIDES = (Wide("weight", 1, 20),)
SPEC = VectorSpec("update", 6, WIDES)
TAGGED = tuple(name for name in SCHEMES if name != "plain")
BFV = {"encrypted", "layered"}
FOLDS = {name: EncryptedFold if name in BFV else MaskedFold for name in TAGGED}
SEALERS = {name: EncryptedSealer if name in BFV else MaskedSealer for name in TAGGED}


def plan_of(scheme):
    protection, cipher = SCHEMES[scheme]
    return round_plan(
        ROSTER, protection, cipher=cipher, parameters=SPEC.coordinates, most=len(ROSTER) + 1
    )


# ------------------------------------------------------------------------------- sums of another


class Coordinator:
    """Keeps the first sum it released, and hands it out again instead of every later one."""

    def __init__(self, stand_in, scheme):
        self.kept = None
        honest = FOLDS[scheme].total

        def total(fold):
            released = list(honest(fold))
            self.kept = self.kept or released
            return iter(self.kept)

        stand_in(FOLDS[scheme], total=total)


def protected(epoch, value, *, purpose="update", round_=7, state=b"model"):
    """The opened sum of three sites whose coordinates and weight are all `value`."""
    fields = np.full(SPEC.coordinates, value, dtype=np.uint64)
    spec = VectorSpec(purpose, SPEC.coordinates, WIDES)
    return epoch.sum(
        spec, round_, one_by_one(lambda _: (fields, {"weight": [value]})), state, Stopwatch()
    ).opened


ANOTHER = {
    "repeat": {},  # everything the same: only the protocol's own counter is another
    "round": {"round_": 8},
    "purpose": {"purpose": "metrics"},
    "state": {"state": b"another model"},
}


@pytest.mark.parametrize("scheme", TAGGED)
@pytest.mark.parametrize("what", ANOTHER)
def test_a_released_sum_is_refused_where_it_does_not_belong(scheme, what, stand_in):
    Coordinator(stand_in, scheme)
    epoch = InProcessFederation("job", plan_of(scheme))
    assert protected(epoch, 100).wides == {"weight": [300]}
    with pytest.raises(TagRefused, match="its tag is not that of the listed survivors"):
        protected(epoch, 55, **ANOTHER[what])


@pytest.mark.parametrize("scheme", TAGGED)
@pytest.mark.parametrize("what", ANOTHER)
def test_without_the_check_it_is_accepted(scheme, what, stand_in, without):
    """The control: marks and canaries see nothing, so only the tag refuses it above. A keystream is bound
    to the header and state as the tag is, so for its control streams are the same in every round."""
    Coordinator(stand_in, scheme)
    without(SumTag, "check")
    if SCHEMES[scheme][1] == "keystream":
        same = {site: bytes([place]) * 32 for place, site in enumerate(ROSTER)}
        stand_in("fedcore.secagg.scheme", stream_key=lambda *parts: same[parts[3]])
    epoch = InProcessFederation("job", plan_of(scheme))
    assert protected(epoch, 100).wides == {"weight": [300]}
    opened = protected(epoch, 55, **ANOTHER[what])
    assert opened.wides == {"weight": [300]} and (opened.coordinates == 300).all()


def another_ciphertext(epoch):
    """From now on the coordinator hands out other bytes than it announced: the same sum, and an
    encrypted zero added to it."""

    def tap(_, message):
        if isinstance(message, messages.Aggregate):
            hub, shell = epoch.hub, epoch.shells[ROSTER[0]]
            slots = Layout(SPEC, epoch.plan.packing, len(ROSTER)).slots
            fold = hub.scheme.fold(slots)
            for chunks in (
                *hub.arrived.values(),
                shell.secrets.sealer.protect(np.zeros(slots, "u8")),
            ):
                for place, chunk in enumerate(chunks):
                    fold.add(place, chunk)
            hub.released = list(fold.total())

    epoch.tap = tap


def test_another_ciphertext_of_the_sum_than_the_announced_one_is_refused(without):
    """The tag holds for it; the control is the comparison of digests switched off."""
    epoch = InProcessFederation("job", plan_of("encrypted"))
    another_ciphertext(epoch)
    with pytest.raises(ReleaseRefused, match="sum: found other bytes than announced"):
        protected(epoch, 100)
    without(in_process, "check_announced")
    control = InProcessFederation("job", plan_of("encrypted"))
    another_ciphertext(control)
    assert protected(control, 100).wides == {"weight": [300]}


@pytest.mark.parametrize("scheme", TAGGED)
def test_the_tag_s_header_and_state_are_of_this_very_sum(scheme, stand_in):
    """Of each sum's tags: one header for all sites, every sum another one, and the plan in all."""
    made = []
    honest = SumTag.tag

    def record(tag, slots, site):
        made.append((site, tag.header, tag.state))
        return honest(tag, slots, site)

    stand_in(SumTag, tag=record)
    plan = plan_of(scheme)
    epoch = InProcessFederation("job", plan)
    protected(epoch, 1, purpose="range", round_=0, state=b"start")
    protected(epoch, 1, purpose="update", round_=3, state=b"start")
    protected(epoch, 1, purpose="update", round_=4, state=b"later")
    assert [site for site, _, _ in made] == [*ROSTER] * 3
    sums = [made[i : i + 3] for i in (0, 3, 6)]
    for tags in sums:
        assert len({(header.digest, state) for _, header, state in tags}) == 1
    headers = [tags[0][1] for tags in sums]
    assert [(h.purpose, h.training_round) for h in headers] == [
        ("range", 0), ("update", 3), ("update", 4),
    ]  # fmt: skip
    assert headers[0].round < headers[1].round < headers[2].round
    for header in headers:
        assert (header.job, header.plan_digest, header.roster) == ("job", plan.digest, ROSTER)
        assert (header.protection, header.threshold) == (SCHEMES[scheme][0], plan.threshold)
    assert len({tags[0][2] for tags in sums}) == 3


# --------------------------------------------------------------------------------- altered sums


def data(site):
    rng = np.random.default_rng(site)
    x = rng.normal(size=(40 + 10 * site, 4)).astype("f4")
    return x, (x[:, 0] > 0).astype("i8")


TASK = fedcore.Task(
    "tagged", data, lambda: torch.nn.Linear(4, 2), torch.nn.functional.cross_entropy,
    sites={"a": 1, "b": 2, "c": 3},
)  # fmt: skip
SETTINGS = {"rounds": 3, "range": 0.25, "resamples": 20, "arms": "federated"}


@pytest.fixture(params=TAGGED)
def scheme(request):
    return request.param


def settings_of(scheme):
    return dict(zip(("protection", "cipher"), SCHEMES[scheme], strict=True))


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Shift:
    """Adds 40 to the low field of five data slots of one opened sum; marks and canaries stay right."""

    def __init__(self, stand_in, scheme, which):
        self.sums, self.which = 0, which
        # Whoever looks on folds and opens one upload too: not here, where sums are counted.
        stand_in("fedcore.experiment.arms", watch_one=lambda *_: None)
        fold, sealer = FOLDS[scheme], SEALERS[scheme]
        total, open_ = fold.total, sealer.open

        def counted(fold):
            self.sums += 1
            return total(fold)

        def shift(slots):
            if self.sums == self.which:  # at every site that opens this sum
                slots[1:6] += np.uint64(40)

        def shifted(sealer, chunks, slots, each=None):
            if each is None:
                opened = open_(sealer, chunks, slots)
                shift(opened)
                return opened
            first = True

            def take(found):  # in place, before the tag is computed of them
                nonlocal first
                if first:
                    shift(found)
                first = False
                each(found)

            return open_(sealer, chunks, slots, take)

        stand_in(fold, total=counted)
        stand_in(sealer, open=shifted)


def test_a_shifted_sum_is_refused_and_the_run_leaves_nothing(in_tmp, scheme, stand_in):
    Shift(stand_in, scheme, which=1)
    rows = []
    with pytest.raises(TagRefused, match="its tag is not that of the listed survivors"):
        fedcore.simulate(TASK, **SETTINGS, **settings_of(scheme), on_round=rows.append)
    assert rows == []
    assert [path for path in Path().rglob("*") if path != Path("runs")] == []


def test_without_the_check_the_shifted_sum_is_accepted(in_tmp, scheme, stand_in, without):
    """The control: marks and canaries see nothing; only the comparison with the twin does."""
    honest = fedcore.simulate(TASK, **SETTINGS, **settings_of(scheme)).result
    Shift(stand_in, scheme, which=1)
    without(SumTag, "check")
    result = fedcore.simulate(TASK, **SETTINGS, **settings_of(scheme)).result
    assert result["rounds"] == 3 and result["unequal_rounds"] == 1
    assert result["model_sha256"] != honest["model_sha256"]


@pytest.mark.parametrize("which", [1, 2])
def test_a_refused_round_does_not_advance_the_state(in_tmp, scheme, which, stand_in):
    settings = SETTINGS | settings_of(scheme)
    experiment = Experiment(prepare(*job_for(TASK, settings)))
    federated = experiment.federated
    Shift(stand_in, scheme, which)
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
    after = federated.save()
    for key in ("counts", "bytes", "abandoned"):
        assert after[key] == before[key], key


def test_a_refusal_in_a_later_round_keeps_the_rounds_before_it(in_tmp, scheme, stand_in):
    """Resumed with new keys and no attack, the run ends where an undisturbed one does."""
    from fedcore.experiment import api

    settings = SETTINGS | settings_of(scheme)
    whole = fedcore.simulate(TASK, **settings).result
    attack = Shift(stand_in, scheme, which=2)
    with pytest.raises(TagRefused):
        fedcore.simulate(TASK, **settings, out="attacked")
    attack.which = None
    assert not Path("attacked/result.json").exists()
    assert not Path("attacked/model.safetensors").exists()
    found = api.resume("attacked", task=TASK).result
    assert found["model_sha256"] == whole["model_sha256"]
    assert found["unequal_rounds"] == 0
