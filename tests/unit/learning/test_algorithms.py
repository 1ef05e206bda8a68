"""Each algorithm against a plain reimplementation of its paper, in float64 and without any of Fedcore's code."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import nn

import fedcore
from fedcore.config import build_job, wire_settings
from fedcore.errors import BadInput, PlanRefused, UnknownName
from fedcore.experiment.arms import loss_of
from fedcore.experiment.loop import Experiment
from fedcore.experiment.prepare import job_for, prepare
from fedcore.files import read_json
from fedcore.learning.kept import KeptValues
from fedcore.learning.model import FlatModel
from fedcore.learning.rules import RULES
from fedcore.learning.rules.control_variates import scale
from fedcore.learning.saved import checkpoint_bytes, load_model, read_checkpoint
from fedcore.learning.state import JobState
from fedcore.learning.task import Task
from fedcore.secagg.algorithms import ALGORITHMS
from fedcore.secagg.label import Terms, collusion, label_of, label_warnings
from fedcore.secagg.plan import RoundPlan
from fedcore.secagg.protections import PROTECTIONS

ROWS = {"a": 40, "b": 24, "c": 16, "d": 30}
CAP, LR, EPOCHS, ROUNDS = 64, 0.05, 3, 5
WEIGHTS = {
    name: 2 * round(rows * 4 / 5 / 2) for name, rows in ROWS.items()
}  # multiples of CAP / 32

PLAN_FIELDS = {each.name for each in fields(RoundPlan)} | {"version", "inputs"}
USUAL = {
    "protection": "plain", "arms": ("federated_float", "federated"), "resamples": 0, "lr": LR,
    "epochs": EPOCHS, "batch_size": CAP, "rounds": ROUNDS, "max_examples": CAP, "bits": 20,
    "range": 4.0, "adaptive_range": False,
}  # fmt: skip


def data(name):
    """A linear task whose best answer differs between sites."""
    random = np.random.default_rng(ord(name))
    x = random.normal(size=(ROWS[name], 3)).astype("f4")
    best = np.array([1.0, -2.0, 0.5]) + 0.8 * (ord(name) - ord("b"))
    return x, (x @ best).astype("f4").reshape(-1, 1)


def task(**changes):
    given = {
        "name": "lines", "data": data, "model": lambda: nn.Linear(3, 1), "loss": nn.MSELoss(),
        "metrics": ("rmse",), "sites": {name: name for name in ROWS},
    }  # fmt: skip
    return Task(**given | changes)


def experiment(**settings):
    return Experiment(prepare(*job_for(task(), USUAL | settings)))


def trained(**settings):
    """An experiment, all rounds done, each of a site's steps on all of its rows."""
    found = experiment(**settings)
    for _ in found.rounds():
        pass
    return found


class Site:
    """A site of a reimplementation: gradients of its mean squared error, in float64."""

    def __init__(self, found):
        rows = found.train
        self.x = np.asarray(rows.x, dtype=np.float64)
        self.x = np.concatenate([self.x, np.ones((len(self.x), 1))], axis=1)
        self.y = np.asarray(rows.y, dtype=np.float64).reshape(-1)
        self.weight = WEIGHTS[found.id]
        self.kept = np.zeros(4)
        self.model = None

    def gradient(self, w):
        return 2 * self.x.T @ (self.x @ w - self.y) / len(self.y)


def reimplemented(found, one_round, absent=frozenset()):
    """The model after all rounds, and the sites. one_round(w, sites, share) -> the next w; share: |S| / N."""
    everyone = [Site(site) for site in found.prepared.sites]
    flat = found.prepared.flat
    flat.write(found.federation.sites[0].initial)
    w = np.concatenate([flat.read(), flat.read_local()]).astype(np.float64)
    for k in range(1, ROUNDS + 1):
        sites = [
            s
            for s, of in zip(everyone, found.prepared.sites, strict=True)
            if (k, of.id) not in absent
        ]
        w = one_round(w, sites, len(sites) / len(everyone))
    return w, everyone


def mean(sites, values):
    return np.average(values, axis=0, weights=[site.weight for site in sites])


def descended(site, start, gradient):
    w = start.copy()
    for _ in range(EPOCHS):
        w = w - LR * gradient(w)
    return w


def fedavg(w, sites, share):
    return mean(sites, [descended(s, w, s.gradient) for s in sites])


def fedprox(w, sites, share):
    return mean(
        sites, [descended(s, w, lambda v, s=s: s.gradient(v) + 0.5 * (v - w)) for s in sites]
    )


class Server:
    """A server optimiser of Reddi et al. 2021, algorithm 2, with Adam's bias correction; FedAvgM without moments."""

    def __init__(self, second=None, rate=0.1, corrected=True):
        self.second, self.rate, self.corrected = second, rate, corrected
        self.m, self.v, self.t = np.zeros(4), np.zeros(4), 0

    def __call__(self, w, sites, share):
        step = fedavg(w, sites, share) - w
        self.t += 1
        if self.second is None:
            self.m = 0.9 * self.m + step
            return w + self.m
        self.m = 0.9 * self.m + 0.1 * step
        self.v = self.second(self.v, step**2)
        m, v = self.m, self.v
        if self.corrected:
            m, v = m / (1 - 0.9**self.t), v / (1 - 0.99**self.t)
        return w + self.rate * m / (np.sqrt(v) + 0.001)


class Scaffold:
    def __init__(self):
        self.control = np.zeros(4)

    def __call__(self, w, sites, share):
        ends, changes = [], []
        for site in sites:
            end = descended(site, w, lambda v, s=site: s.gradient(v) - s.kept + self.control)
            new = site.kept - self.control + (w - end) / (EPOCHS * LR)
            ends.append(end)
            changes.append(new - site.kept)
            site.kept = new
        self.control = self.control + share * mean(sites, changes)
        return mean(sites, ends)


class FedDyn:
    alpha = 0.3

    def __init__(self):
        self.drift = np.zeros(4)

    def __call__(self, w, sites, share):
        ends = []
        for site in sites:
            end = descended(
                site, w, lambda v, s=site: s.gradient(v) - s.kept + self.alpha * (v - w)
            )
            site.kept = site.kept - self.alpha * (end - w)
            ends.append(end)
        self.drift = self.drift - self.alpha * share * mean(sites, [end - w for end in ends])
        return mean(sites, ends) - self.drift / self.alpha


def with_own_bias(w, sites, share):
    """FedPer: the last of the parameters stays."""
    ends = []
    for site in sites:
        start = np.concatenate([w[:3], [site.kept[3] if site.model else w[3]]])
        end = descended(site, start, site.gradient)
        site.model, site.kept = True, end
        ends.append(end)
    return np.concatenate([mean(sites, ends)[:3], w[3:]])


def ditto(w, sites, share):
    for site in sites:
        own = w if site.model is None else site.kept
        site.model = True
        site.kept = descended(site, own, lambda v, s=site: s.gradient(v) + 0.7 * (v - w))
    return fedavg(w, sites, share)


CASES = {
    "averaging": (lambda: fedavg, {}),
    "fedprox": (lambda: fedprox, {"proximal_mu": 0.5}),
    "fedavgm": (Server, {"server": "fedavgm"}),
    "fedadam": (
        lambda: Server(lambda v, square: 0.99 * v + 0.01 * square),
        {"server": "fedadam", "server_lr": 0.1},
    ),
    "fedyogi": (
        lambda: Server(lambda v, square: v - 0.01 * square * np.sign(v - square)),
        {"server": "fedyogi", "server_lr": 0.1},
    ),
    "fedadagrad": (
        lambda: Server(lambda v, square: v + square, 1.0, corrected=False),
        {"server": "fedadagrad", "server_lr": 1.0},
    ),
    "scaffold": (Scaffold, {"algorithm": "scaffold"}),
    "feddyn": (FedDyn, {"algorithm": "feddyn", "feddyn_alpha": 0.3}),
    "ditto": (lambda: ditto, {"algorithm": "ditto", "ditto_lambda": 0.7}),
    "layers that stay": (lambda: with_own_bias, {"local_parameters": ("bias",)}),
}
KEEPING = ["scaffold", "feddyn", "ditto", "layers that stay"]


@pytest.mark.parametrize("absent", [(), ((2, "b"), (4, "c"))], ids=["all present", "absences"])
@pytest.mark.parametrize("case", CASES)
def test_it_is_what_its_paper_has(case, absent):
    """The float arm up to float32, the protected one up to the quantiser's step."""
    make, settings = CASES[case]
    drop = tuple(f"{k}:submit:{name}" for k, name in absent)
    found = trained(drop=drop, threshold=3, **settings)
    whole, sites = reimplemented(found, make(), frozenset(absent))
    expected = whole[: found.prepared.plan.parameters]
    assert np.abs(expected - found.federation.sites[0].initial).max() > 0.3  # something was learnt
    of_float = found.arms["federated_float"].state.server.model
    np.testing.assert_allclose(of_float, expected, atol=2e-6)
    step = 2 * max(row["range"] for row in found.history if row.arm == "federated") / (1 << 20)
    near = 2e-6 + 40 * step * CAP / sum(WEIGHTS.values())
    np.testing.assert_allclose(found.federated.state.server.model, expected, atol=near)
    assert step < 1e-5
    if found.prepared.plan.train.personal:
        for trainer, site in zip(found.federation.sites, sites, strict=True):
            trainer.write(
                found.federated.state.server.model, trainer.standard_rows(found.federated.state),
                trainer.kept_at(found.federated.state),
            )  # fmt: skip
            module = trainer.flat.module
            used = [*module.weight.detach().numpy().ravel(), *module.bias.detach().numpy()]
            own = np.concatenate([expected, site.kept[3:]]) if len(expected) == 3 else site.kept
            np.testing.assert_allclose(used, own, atol=near)


def test_every_algorithm_has_a_case_and_rules():
    assert list(RULES) == list(ALGORITHMS)
    assert set(ALGORITHMS) <= set(CASES)


@pytest.mark.parametrize("case", KEEPING)
def test_every_protection_gives_the_same_model(case):
    models = set()
    for protection in PROTECTIONS:
        usual = {
            "protection": protection,
            "threshold": 4,
            "rounds": 2,
            "arms": ("federated",),
            "bits": 16,
        }
        found = trained(**usual | CASES[case][1]).federated
        models.add((found.state.model_sha256, *found.models()[:2]))
    assert len(models) == 1


@pytest.mark.parametrize("case", KEEPING)
def test_an_interrupted_run_goes_on_to_the_same_model(case):
    settings = {**CASES[case][1], "drop": ("2:submit:b",), "threshold": 3}
    whole = trained(**settings)
    first, second = (experiment(**settings) for _ in range(2))
    rows = first.rounds()
    while first.round < 3:
        next(rows)
    next(rows)  # both arms have stepped
    second.restore(read_checkpoint(checkpoint_bytes(first.save())))
    for _ in second.rounds():
        pass
    for arm in ("federated_float", "federated"):
        assert second.arms[arm].models() == whole.arms[arm].models()
        assert loss_of(second.arms[arm].evaluate(ROUNDS)) == loss_of(
            whole.arms[arm].evaluate(ROUNDS)
        )


def test_what_is_kept_is_that_of_the_last_sum_with_the_site():
    old, new = {"control": np.zeros(2, "f4")}, {"control": np.ones(2, "f4")}
    kept = KeptValues(old, 7, new)
    for each in (kept, KeptValues.from_bytes(kept.to_bytes())):
        assert each.at(7)["control"].tolist() == [1, 1]
        assert each.at(6)["control"].tolist() == each.at(0)["control"].tolist() == [0, 0]
    assert KeptValues().to_bytes() == b""
    with pytest.raises(BadInput, match="kept values of a site"):
        KeptValues.from_bytes(b"app-00")


def test_a_state_says_in_whose_sums_a_site_was():
    found = trained(drop=("2:submit:b", "5:submit:c"), threshold=3, algorithm="feddyn")
    state = found.federation.state
    assert state.summed == {"a": 5, "b": 5, "c": 4, "d": 5}
    assert JobState.from_bytes(state.to_bytes()).summed == state.summed
    assert replace(state, summed={}).canonical() != state.canonical()
    assert not trained(rounds=1).federation.state.summed


@pytest.mark.parametrize(
    ("settings", "error", "words", "hint"),
    [
        ({"algorithm": "krum"}, PlanRefused, "compares the sites' updates", "max_examples"),
        ({"algorithm": "Multi-Krum"}, PlanRefused, "only sums exist", "guard"),
        ({"algorithm": "median"}, PlanRefused, "sorts the sites' values", "leave it out"),
        ({"algorithm": "q-FedAvg"}, PlanRefused, "that site's own loss", "per_site"),
        ({"algorithm": "scafold"}, UnknownName, "scafold", "scaffold"),
        (
            {"algorithm": "scaffold", "momentum": 0.9}, BadInput,
            r"train\.momentum: found 0\.9 with the algorithm 'scaffold', expected 0\.0", "leave momentum out",
        ),
        ({"algorithm": "scaffold", "optimiser": "adam"}, BadInput, r"train\.optimiser", "leave"),
        ({"algorithm": "scaffold", "max_grad_norm": 1.0}, BadInput, r"expected none", "leave"),
        ({"algorithm": "feddyn", "proximal_mu": 0.1}, BadInput, r"train\.proximal_mu", "leave"),
        ({"feddyn_alpha": 0.5}, BadInput, r"train\.feddyn_alpha: found 0\.5", "feddyn"),
        ({"algorithm": "feddyn", "server": "fedadam"}, BadInput, r"round\.server", "leave"),
        ({"algorithm": "feddyn", "server_lr": 0.5}, BadInput, r"server_lr 0\.5", "leave"),
        ({"ditto_lambda": 1.0}, BadInput, r"train\.ditto_lambda: found 1\.0", "ditto"),
        ({"local_parameters": "a.*", "algorithm": "ditto"}, BadInput, r"a\.\* with the algorithm 'ditto'", "one of"),
        ({"local_parameters": "a.*", "proximal_mu": 1.0}, BadInput, "with proximal_mu", "one of"),
        ({"local_parameters": "a.*", "release": "coordinator"}, BadInput, "they stay at the sites", "fed-site model"),
    ],
)  # fmt: skip
def test_what_does_not_go_together_is_refused_with_what_does(settings, error, words, hint):
    with pytest.raises(error, match=words) as refused:
        build_job(settings)
    assert hint in refused.value.remedy


@pytest.mark.parametrize("algorithm", ["scaffold", "feddyn"])
def test_a_task_that_trains_by_itself_is_refused(algorithm):
    made = task(train=lambda model, rows, fit: None)
    with pytest.raises(BadInput, match=f"found '{algorithm}' for the task 'lines'"):
        prepare(*job_for(made, {"algorithm": algorithm, "protection": "plain"}))


def test_without_the_setting_nothing_of_it_travels():
    plan = trained(rounds=1, arms=("federated",)).prepared.plan
    assert "algorithm" not in plan.to_json()["train"]
    assert "algorithm" not in wire_settings(build_job({}))["train"]
    assert list(plan.blocks.values()) == [4]


def norms():
    """A network whose normalisation layer may stay."""
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))


def test_layers_that_stay_are_neither_sent_nor_averaged_and_come_with_their_statistics(tmp_path):
    """FedBN: of the sites' normalisation layers none is in a vector, and each site's file has its own."""
    made = task(model=norms)
    settings = USUAL | {"local_parameters": "1.*", "rounds": 2, "arms": ("federated",)}
    run = fedcore.simulate(made, out=tmp_path / "run", **settings)
    plan = RoundPlan.from_json(
        {k: v for k, v in read_json(tmp_path / "run" / "plan.json").items() if k in PLAN_FIELDS}
    )
    assert (plan.parameters, plan.buffer_coordinates) == (3 * 4 + 4 + 4 + 1, 0)
    files = {
        name: load_model(tmp_path / "run" / f"model-{name}.safetensors", made).module
        for name in ROWS
    }
    common = load_model(tmp_path / "run", made).module
    for name in ("1.weight", "1.bias", "1.running_mean", "1.running_var"):
        values = torch.stack([module.state_dict()[name] for module in files.values()])
        assert len(values.unique(dim=0)) == len(ROWS), name
        mean = common.state_dict()[name]
        assert ((mean > values.amin(0)) & (mean < values.amax(0))).all()
    for name in ("0.weight", "3.bias"):
        values = torch.stack([module.state_dict()[name] for module in files.values()])
        assert len(values.unique(dim=0)) == 1, name
    assert any("model-SITE.safetensors" in line for line in run.result.warnings)


@pytest.mark.parametrize(
    ("patterns", "error", "words"),
    [
        ("2.*", UnknownName, "'2.*'"),
        ("*", BadInput, "all parameters of the model"),
    ],
)
def test_patterns_that_cannot_be_meant_are_refused(patterns, error, words):
    with pytest.raises(error, match=re.escape(words)):
        FlatModel(norms(), local_parameters=(patterns,))


def test_ditto_fits_sites_that_the_common_model_does_not():
    """Scores of the federated arm are of the models that the sites use."""
    common, own = (
        trained(rounds=ROUNDS, arms=("federated",), **settings).history[-1]["per_site"]
        for settings in ({}, {"algorithm": "ditto", "ditto_lambda": 0.01})
    )
    for name in ("a", "c"):  # the mean fits b best
        assert own[name]["rmse"] < common[name]["rmse"] - 0.1


def test_what_a_public_file_has_is_nothing_of_a_site():
    for settings in ({"local_parameters": ("bias",)}, {"algorithm": "ditto"}):
        found = trained(rounds=2, arms=("federated",), **settings)
        state = found.federated.state
        assert len({site.exported(state, public=True) for site in found.federation.sites}) == 1
        assert len({site.exported(state) for site in found.federation.sites}) == len(ROWS)


def test_the_guard_judges_with_what_stays_at_the_site():
    found = trained(rounds=2, arms=("federated",), local_parameters=("bias",))
    found.federation.judge()
    for site, guard in zip(found.federation.sites, found.federation.guards, strict=True):
        assert guard.local.tolist() == site.kept_at(found.federated.state)["local"].tolist()
        guard.flat.write(found.federated.state.server.model)
        assert guard.local.tolist() != guard.flat.read_local().tolist()


def test_a_second_block_is_a_second_equation_about_the_same_updates():
    """The attack that the threshold is for: of a sum of three sites, one works out the updates of both others."""
    found = experiment(arms=("federated",), algorithm="scaffold", batch_size=8)
    plan, sites = found.prepared.plan, found.federation.sites[1:]
    state = JobState.initial(plan, sites[0].initial)
    sent = [site.train(plan, state, 1).astype(np.float64) for site in sites]
    steps, weights = (
        [site.report.steps for site in sites],
        [WEIGHTS[site.site.id] for site in sites],
    )
    # What b sees of the sum without itself, and what it can count or guess of the others' rows:
    first, second = sum(w * s for w, s in zip(weights[1:], sent[1:], strict=True)).reshape(2, 4)
    per_step = [-w * scale(plan, 1) / (k * LR) for w, k in zip(weights[1:], steps[1:], strict=True)]
    solved = np.linalg.solve([weights[1:], per_step], [first, second])
    np.testing.assert_allclose(solved, [each[:4] for each in sent[1:]], atol=1e-3)


@pytest.mark.parametrize("protection", ["encrypted", "masked", "layered"])
def test_scaffold_needs_a_threshold_of_4_and_its_label_counts_the_second_equation(protection):
    settings = {"algorithm": "scaffold", "protection": protection}
    with pytest.raises(PlanRefused, match=r"found 3 of 4 sites .* two equations") as refused:
        Terms.of_job(build_job(settings), 4)
    assert "--threshold 4" in refused.value.remedy and "feddyn" in refused.value.remedy
    with pytest.raises(PlanRefused, match="two equations"):
        prepare(*job_for(task(), USUAL | settings))
    (warning,) = label_warnings(Terms.of_job(build_job(settings | {"threshold": 4}), 4))
    assert "5 sites with a threshold of 4 survive 1 absence" in warning
    terms = Terms.of_job(build_job(settings | {"threshold": 6}), 8)
    usual = replace(terms, second_block=False)
    assert collusion(usual).hidden_among - collusion(terms).hidden_among <= 1
    assert collusion(terms).curious == max(0, collusion(usual).curious - 1)
    assert "two equations" in label_of(terms) and "two equations" not in label_of(usual)
