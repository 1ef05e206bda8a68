"""Whole runs in one process: arms, equalities the contract rests on, and what each check is for."""

from __future__ import annotations

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

import fedcore
from fedcore.errors import BadInput, GuardTripped, PlanRefused, TagRefused
from fedcore.experiment import simulation
from fedcore.learning.metric_sums import MetricTransport
from fedcore.learning.scoring import Scored
from fedcore.learning.stopwatch import Stopwatch
from fedcore.learning.training import local_train
from fedcore.secagg.in_process import InProcessFederation
from fedcore.secagg.plan import VectorSpec, Wide, canonical
from fedcore.secagg.protections import SCHEMES
from fedcore.secagg.summing import PlainSum, one_by_one, sites_of

pytestmark = pytest.mark.usefixtures("no_drawings")

SITES = {"a": 1, "b": 2, "c": 3}

EVERY = {name: {"protection": p, "cipher": c} for name, (p, c) in SCHEMES.items()}
"""The settings of every protection with every cipher it takes."""
PROTECTED = [name for name in EVERY if name != "plain"]


def data(site):
    rng = np.random.default_rng(site)
    x = rng.normal(size=(40 + 10 * site, 4)).astype("f4")
    return x, (x[:, 0] + rng.normal(scale=0.3, size=len(x)) > 0).astype("i8")


def make_task(**changes):
    given = {
        "name": "t",
        "data": data,
        "model": lambda: nn.Linear(4, 2),
        "loss": nn.functional.cross_entropy,
        "metrics": ("accuracy", "auc"),
    }
    return fedcore.Task(**given | changes)


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


FEDERATED = {"standardise": "federated"}
ROSTER = ("cleveland", "hungary", "switzerland", "va")
"""Of the built-in task."""


def run(task=None, **settings):
    return fedcore.simulate(task or make_task(), **{"sites": SITES, "rounds": 3} | settings)


def unmeasured(found):
    """The rows without what this machine and the protection's size of things decide."""
    measured = {"seconds", "bytes", "peak"}
    return [
        {k: v for k, v in row.items() if k.split("_")[0] not in measured} for row in found.rounds
    ]


def test_every_protection_gives_the_same_model_and_another_seed_another():
    plain, *others = (run(**scheme) for scheme in EVERY.values())
    wide = run(protection="layered", lattice="wide")
    assert json.loads((wide.directory / "plan.json").read_text())["degree"] == 4096
    for found in (*others, run(protection="layered"), wide):
        assert found.result["model_sha256"] == plain.result["model_sha256"]
        assert found.result["unequal_rounds"] == 0
        assert unmeasured(found) == unmeasured(plain)
        assert found.result["protected_metrics"] == plain.result["protected_metrics"]
        for metric in ("accuracy", "auc"):
            gap = found.result["gap"]["protection"][metric]
            assert (gap["mean"], gap["low"], gap["high"]) == (0.0, 0.0, 0.0)
    other = run(protection="plain", seed=1)
    assert other.result["model_sha256"] != plain.result["model_sha256"]


@pytest.mark.parametrize("server", ["fedavg", "fedavgm", "fedadam", "fedyogi"])
@pytest.mark.parametrize("bits", [8, 16, 24])
def test_every_server_and_width_agrees_across_protections(server, bits):
    settings = {
        "server": server,
        "server_lr": 0.5,
        "bits": bits,
        "rounds": 2,
        "arms": ("federated",),
    }
    hashes = {run(**scheme, **settings).result["model_sha256"] for scheme in EVERY.values()}
    assert len(hashes) == 1


def test_one_round_is_the_weighted_mean_of_the_sites_models():
    """A slow obvious reference: train each site from the same start and average by the plan's weights."""
    found = run(rounds=1, protection="plain", bits=24, arms=("federated", "federated_float"))
    from fedcore.experiment.prepare import job_for, prepare

    task, job = job_for(
        make_task(), {"sites": SITES, "rounds": 1, "protection": "plain", "bits": 24}
    )
    prepared = prepare(task, job)
    start = prepared.flat.read()
    total, weight = np.zeros(len(start)), 0
    for site in prepared.sites:
        prepared.flat.write(start)
        local_train(
            task,
            prepared.flat.module,
            site.train,
            prepared.plan.train,
            seed=0,
            round_=1,
            rounds=1,
            site=site.id,
        )
        own = prepared.plan.weight_of(len(site.train))
        total += prepared.flat.read().astype(float) * own
        weight += own
    mean = total / weight
    got = torch.cat([p.detach().reshape(-1) for p in found.model.parameters()]).numpy()
    np.testing.assert_allclose(got, mean, atol=1e-5)


def test_budgets_are_equal_where_the_arms_promise_it():
    arms = run().result["arms"]
    assert len({arm["examples_seen"] for arm in arms.values()}) == 1
    assert arms["federated"]["gradient_steps"] == arms["federated_float"]["gradient_steps"]
    assert arms["federated"]["gradient_steps"] == arms["local_only"]["gradient_steps"] > 0


def test_gap_parts_add_up_to_the_total():
    result = run().result
    for metric in ("accuracy", "auc"):
        parts = {part: by[metric]["mean"] for part, by in result["gap"].items()}
        assert parts["total"] == pytest.approx(
            parts["federation"] + parts["quantisation"] + parts["protection"]
        )
        arms = result["arms"]
        assert parts["total"] == pytest.approx(
            arms["centralised"][metric] - arms["federated"][metric]
        )


def test_metrics_that_travelled_protected_equal_the_pooled_ones():
    result = run().result
    assert result["protected_metrics"]["accuracy"] == pytest.approx(
        result["arms"]["federated"]["accuracy"]
    )
    assert result["protected_metrics"]["auc"] == pytest.approx(
        result["arms"]["federated"]["auc"], abs=0.02
    )


@pytest.mark.parametrize("scheme", PROTECTED)
def test_a_fold_that_loses_a_site_is_refused_and_nothing_is_written(scheme, tmp_path, stand_in):
    """Take one site's chunks out of the fold: the tag must notice, and the run must leave nothing."""
    from fedcore.secagg.crypto.bfv import EncryptedFold
    from fedcore.secagg.crypto.masked import MaskedFold

    fold = EncryptedFold if scheme in {"encrypted", "layered"} else MaskedFold
    original, seen = fold.add, []

    def forgetful(self, index, chunk):
        seen.append(index)
        if len(seen) != 2:
            original(self, index, chunk)

    stand_in(fold, add=forgetful)
    with pytest.raises(TagRefused):
        run(**EVERY[scheme])
    assert not list(tmp_path.glob("runs/t-*"))


def test_a_wrong_sum_shows_as_a_protection_gap_not_as_zero(stand_in, without):
    """The zero of gap.protection is measured: shift what `plain` opens, and it is zero no more.

    No site's guard looks here: it would leave the model that the wrong sum leads to.
    """
    from fedcore.secagg.crypto.plain import PlainSealer

    original = PlainSealer.open

    def shifted(self, chunks, slots):
        total = original(self, chunks, slots)
        if total[1] > 50_000:  # some coordinates of an update, far from canaries and marks
            total[1:6] += 40_000
        return total

    stand_in(PlainSealer, open=shifted)
    without(simulation, "judge_all")
    result = run(protection="plain", range=8.0, adaptive_range=False).result
    assert result["unequal_rounds"] == 3
    assert any("NOT the plain integer sum" in line for line in result["warnings"])


@pytest.mark.parametrize("count", [1, 2])
def test_fewer_than_three_sites_only_plain(count):
    sites = dict(list(SITES.items())[:count])
    with pytest.raises(PlanRefused, match=f"found {count} under 'layered'"):
        run(sites=sites)
    assert run(sites=sites, protection="plain").result["rounds"] == 3


def test_batch_norm_statistics_travel_or_stay():
    def net():
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))

    averaged = run(make_task(model=net), protection="plain").model
    kept = run(make_task(model=net), protection="plain", buffers="initial").model
    assert (averaged[1].running_mean != 0).any() and (averaged[1].running_var != 1).any()
    assert (kept[1].running_mean == 0).all() and (kept[1].running_var == 1).all()
    # At a rate of 1 FedAdam moves every coordinate by about 1 a round, and the loss really rises: guards trip.
    adam = run(make_task(model=net), server="fedadam", server_lr=0.1, rounds=2)
    assert adam.result["rounds"] == 2


class Annealed(nn.Linear):
    """Its temperature falls with every training step; the count is an ordinary attribute."""

    def __init__(self):
        super().__init__(4, 2)
        self.seen = 0

    def forward(self, x):
        self.seen += self.training
        return super().forward(x) * (1 + self.seen / 10)


def test_a_model_that_counts_is_the_same_whatever_arms_run():
    settings = {"protection": "plain", "resamples": 20, "standardise": "ranges"}
    whole = run(make_task(model=Annealed), **settings).result
    alone = run(make_task(model=Annealed), arms=("federated",), **settings).result
    assert whole["model_sha256"] == alone["model_sha256"]
    assert abs(whole["gap"]["quantisation"]["auc"]["mean"]) < 0.01


def test_guards_stay_in_an_honest_job_whose_running_statistics_do_not_fit_yet(stand_in):
    """Rows of mean 20, and a server that moves running means by its own rate: in evaluation mode the loss
    rises to more than three times the first one, while the loss that is trained, and the model, get better."""

    def net():
        return nn.Sequential(
            nn.Linear(4, 32), nn.BatchNorm1d(32), nn.ReLU(),
            nn.Linear(32, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2),
        )  # fmt: skip

    def shifted(site):
        x, y = data(site)
        return x * 5 + 20, y

    task = make_task(model=net, data=shifted)
    settings = {"server": "fedadam", "server_lr": 0.1, "lr": 0.05, "rounds": 8}
    found = run(task, protection="plain", arms=("federated",), **settings).result
    assert found["rounds"] == 8
    assert found["per_site"]["b"]["federated"]["auc"] > 0.9

    @contextmanager
    def evaluation_mode(module):
        module.eval()
        yield

    stand_in("fedcore.learning.scoring", _batch_statistics=evaluation_mode)
    with pytest.raises(GuardTripped, match="after round 2"):
        run(task, protection="plain", arms=("federated",), **settings)


def test_models_that_differ_between_sites_are_named():
    def uneven(site):
        x, y = data(site)
        return (x if site < 3 else np.hstack([x, x])), y

    with pytest.raises(BadInput, match="site c: found a model of 18 coordinates, expected 10"):
        run(make_task(data=uneven, model=lambda: nn.LazyLinear(2)))


def test_a_site_with_more_rows_than_the_public_cap_takes_part_with_as_many():
    result = run(max_examples=32, protection="plain").result
    assert {name: entry["rows"] for name, entry in result["per_site"].items()}["a"] == 32
    (line,) = [line for line in result["warnings"] if "max_examples" in line and "Site a" in line]
    assert "Site a has 50 rows, more than protect.max_examples = 32" in line
    again = run(max_examples=32, protection="plain").result
    assert again["model_sha256"] == result["model_sha256"]


def test_a_site_without_test_rows_takes_part():
    def some(site):
        x, y = data(site)
        return ((x, y), (x[:10], y[:10])) if site != 2 else ((x, y), (x[:0], y[:0]))

    with pytest.raises(BadInput, match=r"site b \(test part\): found 0 rows"):
        run(make_task(data=some), protection="plain")


def test_a_site_too_small_for_a_test_part_takes_part():
    def tiny(site):
        x, y = data(site)
        return (x, y) if site != 2 else (x[:1], y[:1])

    result = run(make_task(data=tiny)).result
    assert result["per_site"]["b"]["test_rows"] == 0
    assert result["per_site"]["b"]["federated"]["accuracy"] is None


def test_one_class_at_a_site_is_a_warning_and_its_auc_null():
    def single(site):
        x, y = data(site)
        return x, (y if site != 2 else np.ones_like(y))

    result = run(make_task(data=single)).result
    assert result["per_site"]["b"]["federated"]["auc"] is None
    assert result["arms"]["federated"]["auc"] is not None
    assert any("Site b has rows of one class" in line for line in result["warnings"])


def test_on_round_sees_every_row_and_can_stop():
    rows = []

    def watch(row):
        rows.append(row)
        return fedcore.STOP if row["round"] == 2 and row["arm"] == "centralised" else None

    found = run(rounds=5, on_round=watch)
    assert [r["arm"] for r in rows[:4]] == [
        "centralised",
        "local_only",
        "federated_float",
        "federated",
    ]
    assert found.result["rounds"] == 2 and "STOP" in found.result["stopped"]
    assert len(found.rounds) == 8


def test_own_evaluate_has_gaps_without_interval():
    def evaluate(module, rows):
        hits = count = 0
        for x, y in rows.batches(16, None):
            hits += int((module(x).argmax(1) == y).sum())
            count += len(y)
        return {"hit_rate": (hits, count)}

    own = run(make_task(evaluate=evaluate, metrics=("hit_rate",))).result
    usual = run().result
    assert own["arms"]["federated"]["hit_rate"] == usual["arms"]["federated"]["accuracy"]
    assert own["protected_metrics"]["hit_rate"] == pytest.approx(
        own["arms"]["federated"]["hit_rate"]
    )
    gap = own["gap"]["total"]["hit_rate"]
    assert gap["mean"] is not None and gap["low"] is None


def test_evaluate_must_return_the_named_metrics():
    with pytest.raises(BadInput, match=r"task\.evaluate: found f1, expected accuracy, auc"):
        run(make_task(evaluate=lambda m, r: {"f1": (1, 2)}))


@pytest.mark.parametrize("value", [(float("nan"), 1), (1e300, 1), (float("inf"), 1)])
def test_own_metrics_must_be_finite(value):
    transport = MetricTransport((), ("m",), 0, 10)
    with pytest.raises(BadInput, match="expected a finite number"):
        transport.sums(Scored(np.empty(0), np.empty(0), None, {"m": value}))


def test_own_metrics_survive_the_integers_with_their_sign():
    transport = MetricTransport((), ("m",), 0, 10)
    parts = [(-3.5, 2.0), (1.25, 4.0)]
    sums = [
        transport.sums(Scored(np.empty(0), np.empty(0), None, {"m": p}))["metric:m"] for p in parts
    ]
    total = {"metric:m": [a + b for a, b in zip(*sums, strict=True)]}
    assert transport.finish(total, 2) == {"m": pytest.approx(-2.25 / 6)}
    assert transport.finish({"metric:m": [0, 0]}, 2) == {"m": None}, "not contributed by rule"


def prepared_run(**settings):
    from fedcore.experiment.prepare import job_for, prepare

    given = {"sites": SITES, "rounds": 2, "range": 0.25} | settings
    return prepare(*job_for(make_task(), given))


@pytest.mark.parametrize("scheme", PROTECTED)
def test_an_epoch_s_secrets_do_not_follow_the_seed(scheme, stand_in):
    """Two runs of one seed: equal models, and no upload of one is an upload of the other."""
    from fedcore.secagg.crypto.bfv import EncryptedFold
    from fedcore.secagg.crypto.masked import MaskedFold

    fold = EncryptedFold if scheme in {"encrypted", "layered"} else MaskedFold
    original, sent = fold.add, []

    def record(self, index, chunk):
        sent.append(bytes(chunk))
        original(self, index, chunk)

    stand_in(fold, add=record)
    uploads, hashes = [], set()
    for _ in range(2):
        hashes.add(run(**EVERY[scheme], rounds=2).result["model_sha256"])
        uploads.append(list(sent))
        sent.clear()
    assert len(hashes) == 1
    assert len(uploads[0]) == len(uploads[1]) >= 3 * (1 + 2 + 1)  # calibration, rounds, metrics
    assert not set(uploads[0]) & set(uploads[1])


def test_equal_contributions_of_two_sites_travel_as_different_bytes():
    """What `plain` cannot say: there equal vectors are equal but for the mark of the site."""
    from fedcore.secagg.summing import RoundTrace

    spec = VectorSpec("update", 6, (Wide("weight", 1, 20),))
    fields = np.full(6, 7, dtype=np.uint64)
    for scheme in PROTECTED:
        epoch = InProcessFederation("job", prepared_run(**EVERY[scheme]).plan)
        uploads = []
        for target in (0, 0, 1):
            witness = RoundTrace(target, 2)
            total = epoch.sum(
                spec, 1, one_by_one(lambda _: (fields, {"weight": [1]})), b"", Stopwatch(),
                witness=witness,
            )  # fmt: skip
            assert total.opened.wides == {"weight": [3]}
            uploads.append(b"".join(witness.upload))
        assert len(set(uploads)) == 3


def sums_of(stand_in, keep):
    """Call keep(arguments, keywords, total) of each sum under `plain`."""
    original = PlainSum.sum

    def record(self, *arguments, **keywords):
        total = original(self, *arguments, **keywords)
        keep(arguments, keywords, total)
        return total

    stand_in(PlainSum, sum=record)


def test_the_tag_covers_the_statistics_a_site_starts_from(stand_in):
    """Sites with other statistics have another state, so their sums do not verify together."""
    from fedcore.experiment.prepare import job_for, prepare

    seen = []
    sums_of(stand_in, lambda arguments, _, total: seen.append(arguments[3]))
    federation = prepare(
        *job_for(None, {"rounds": 1, "protection": "plain", **FEDERATED})
    ).federation
    federation.advance()
    statistics = canonical(federation.state.statistics.to_json())
    assert b'"mean"' in statistics
    assert [statistics in state for state in seen] == [False, True]


def test_a_release_names_the_state_that_its_sum_leads_to(stand_in):
    """What the sites sign as their new state is what they then start from, in every kind of round."""
    from fedcore.experiment.prepare import job_for, prepare

    started, led = [], []

    def keep(arguments, keywords, total):
        names = sites_of(federation[0].plan.sites, total.survivors) if federation else ROSTER
        started.append(arguments[3])
        led.append(keywords["lead"](total.opened, names))

    federation = []
    sums_of(stand_in, keep)
    settings = {"rounds": 2, "protection": "plain", "server": "fedadam", "drop": "2:submit:va"}
    federation.append(prepare(*job_for(None, settings | FEDERATED)).federation)
    while federation[0].step is not None:
        federation[0].advance()
        assert led[-1] == federation[0].state.canonical()
    assert started[1:] == led[:-1] and len(set(led)) == len(led) == 5


def test_every_sum_says_what_it_is_of(stand_in):
    """Preparatory rounds are training round 0; the metrics-only round comes after the last one."""
    seen = []
    sums_of(stand_in, lambda arguments, *_: seen.append((arguments[0].purpose, arguments[1])))
    two = {"rounds": 2, "protection": "plain", "arms": "federated", "resamples": 0}
    fedcore.simulate("heart", **two)
    assert seen == [("range", 0), ("update", 1), ("update", 2), ("metrics", 3)]
    seen.clear()
    fedcore.simulate("heart", **two, **FEDERATED)
    assert seen == [("statistics", 0), ("range", 0), ("update", 1), ("update", 2), ("metrics", 3)]
    seen.clear()
    stop = lambda row: fedcore.STOP if row["round"] == 1 else None  # noqa: E731  one expression
    run(rounds=5, protection="plain", range=0.1, on_round=stop)
    assert seen == [("update", 1), ("metrics", 6)]


def test_a_range_outside_the_limits_is_refused():
    with pytest.raises(BadInput, match=r"protect\.range: found 5000"):
        run(range=5000.0)
