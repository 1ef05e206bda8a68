"""Local training: a function of (model, rows, settings, seed, round, site), and honest about steps."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fedcore.errors import BadInput, TaskFailed
from fedcore.learning import training
from fedcore.learning.data.rows import ArrayRows, DatasetRows
from fedcore.learning.model import FlatModel, build_model
from fedcore.learning.scoring import probe, score
from fedcore.learning.task import Task
from fedcore.learning.training import make_optimiser
from fedcore.secagg.plan import TrainPlan

local_train = partial(training.local_train, rounds=4)


def task(**changes):
    given = {
        "name": "t",
        "data": lambda source: source,
        "model": lambda: nn.Linear(3, 2),
        "loss": nn.functional.cross_entropy,
    }
    return Task(**given | changes)


def rows(count=33, seed=0):
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(count, 3)).astype("f4"))
    return ArrayRows(x, torch.from_numpy(rng.integers(0, 2, count)))


def trained(plan, *, make=lambda: nn.Linear(3, 2), seed=0, round_=1, site="a", count=33, **changes):
    module = build_model(make, 0, lambda _: None)
    report = local_train(
        task(**changes), module, rows(count), plan, seed=seed, round_=round_, site=site
    )
    return FlatModel(module).read(), report


CLASSES = {
    "sgd": lambda parameters, plan: torch.optim.SGD(
        parameters, lr=0.1, momentum=plan.momentum, weight_decay=plan.weight_decay
    ),
    "adam": lambda parameters, plan: torch.optim.Adam(
        parameters, lr=0.1, weight_decay=plan.weight_decay
    ),
    "adamw": lambda parameters, plan: torch.optim.AdamW(
        parameters, lr=0.1, weight_decay=plan.weight_decay
    ),
}


@pytest.mark.parametrize(
    ("name", "momentum"), [("sgd", 0.0), ("sgd", 0.9), ("adam", 0.0), ("adamw", 0.0)]
)
@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_an_optimiser_has_the_bits_and_the_saved_state_of_torchs_class(
    name, momentum, weight_decay
):
    """Of two layers one has no gradient in every second step; the state is loaded in the middle, from either."""
    plan = TrainPlan(optimiser=name, lr=0.1, momentum=momentum, weight_decay=weight_decay)

    def theirs(module):
        return CLASSES[name](module.parameters(), plan)

    def ours(module):
        return make_optimiser(module, plan)

    def models(before, after):
        module = build_model(
            lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), 0, lambda _: None
        )
        optimiser, x = before(module), rows().x
        for step in range(6):
            if step == 3:
                saved, optimiser = optimiser.state_dict(), after(module)
                optimiser.load_state_dict(saved)
            optimiser.zero_grad(set_to_none=True)
            module[1](x if step % 2 else module[0](x)).square().sum().backward()
            optimiser.step()
        return FlatModel(module).read()

    expected = models(theirs, theirs)
    for before in (ours, theirs):
        assert (models(before, ours) == expected).all()
    before, after = nn.Linear(3, 2), rows().x
    before(after).sum().backward()
    optimiser = ours(before)
    optimiser.zero_grad(set_to_none=False)
    assert all((parameter.grad == 0).all() for parameter in before.parameters())


def test_training_does_not_load_torchs_compiler():
    """It takes as long to load as torch itself, in every process that trains."""
    code = (
        "import sys, torch\n"
        "from fedcore.learning.training import OPTIMISERS, make_optimiser\n"
        "from fedcore.secagg.plan import TrainPlan\n"
        "for name in OPTIMISERS:\n"
        "    module = torch.nn.Linear(3, 1)\n"
        "    optimiser = make_optimiser(module, TrainPlan(optimiser=name))\n"
        "    module(torch.ones(2, 3)).sum().backward()\n"
        "    optimiser.step()\n"
        "    optimiser.zero_grad(set_to_none=True)\n"
        "    print(name, 'torch._dynamo' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "sgd False\nadam False\nadamw False\n", done.stderr


def test_one_epoch_is_the_textbook_loop():
    """A slow obvious reference: gradient descent by hand over the same order."""
    from fedcore.seeds import generator

    plan = TrainPlan(lr=0.1, batch_size=8)
    got, report = trained(plan)
    module = build_model(lambda: nn.Linear(3, 2), 0, lambda _: None)
    data = rows()
    order = torch.from_numpy(generator(0, 1, "a", "shuffle 0").permutation(33))
    losses = []
    for start in range(0, 33, 8):
        x, y = data.x[order[start : start + 8]], data.y[order[start : start + 8]]
        loss = nn.functional.cross_entropy(module(x), y)
        grads = torch.autograd.grad(loss, list(module.parameters()))
        losses.append(loss.item())
        with torch.no_grad():
            for parameter, grad in zip(module.parameters(), grads, strict=True):
                parameter.sub_(0.1 * grad)
    np.testing.assert_allclose(got, FlatModel(module).read(), atol=1e-6)
    assert (report.steps, report.examples) == (5, 33)
    assert report.loss == pytest.approx(np.mean(losses))


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_same_words_same_bits_and_each_word_matters(optimiser):
    plan = TrainPlan(optimiser=optimiser, epochs=2, batch_size=8)

    def net():
        return nn.Sequential(nn.Linear(3, 8), nn.Dropout(), nn.Linear(8, 2))

    base, _ = trained(plan, make=net)
    torch.rand(10)
    np.testing.assert_array_equal(trained(plan, make=net)[0], base)
    for other in ({"seed": 1}, {"round_": 2}, {"site": "b"}):
        assert (trained(plan, make=net, **other)[0] != base).any()


def test_a_lone_last_row_does_not_break_batch_norm():
    def net():
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))

    _, report = trained(TrainPlan(batch_size=8), make=net, count=33)
    assert (report.steps, report.examples) == (4, 32)
    assert trained(TrainPlan(batch_size=8), count=33)[1].examples == 33


def norm_net():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


@pytest.mark.parametrize(("count", "batch_size"), [(1, 8), (5, 1)])
def test_batch_norm_on_batches_of_one_row_says_what_to_do(count, batch_size):
    with pytest.raises(BadInput, match=r"^site a, round 1: found a batch of 1 row") as caught:
        trained(TrainPlan(batch_size=batch_size), make=norm_net, count=count)
    assert "2 training rows" in caught.value.remedy and "GroupNorm" in caught.value.remedy


def test_batch_norm_takes_one_row_that_has_many_values_per_channel():
    module = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 2))
    image = ArrayRows(torch.rand(1, 1, 4, 4), torch.zeros(1, dtype=torch.int64))
    report = local_train(task(), module, image, TrainPlan(), seed=0, round_=1, site="a")
    assert (report.steps, report.examples) == (1, 1)


def test_a_loader_s_own_batch_size_counts():
    pairs = [(torch.zeros(3), 0)] * 10
    module = nn.Linear(3, 2)
    report = local_train(
        task(),
        module,
        DatasetRows(pairs, None, 5),
        TrainPlan(batch_size=2),
        seed=0,
        round_=1,
        site="a",
    )
    assert report.steps == 2


def test_own_train_gets_rows_and_settings_and_is_seeded():
    seen = []

    def own(module, data, fit):
        seen.append(
            (len(data), fit.lr, fit.round, fit.site, float(torch.rand(1)), np.random.rand())
        )
        with torch.no_grad():
            module.weight.fill_(1.0)

    module = nn.Linear(3, 2)
    for _ in range(2):
        report = local_train(
            task(train=own), module, rows(), TrainPlan(lr=0.3, epochs=2), seed=0, round_=4, site="b"
        )
    assert seen[0] == seen[1]
    assert seen[0][:4] == (33, 0.3, 4, "b")
    assert (module.weight == 1).all()
    assert (report.examples, report.loss) == (66, None)


def test_an_exception_names_site_and_round_and_shows_the_user_s_frames():
    def broken(module, batch):
        raise KeyError("column")

    with pytest.raises(
        TaskFailed,
        match=r"site a, round 3: task\.model, task\.predict or task\.loss raised KeyError",
    ) as caught:
        local_train(
            task(predict=broken), nn.Linear(3, 2), rows(), TrainPlan(), seed=0, round_=3, site="a"
        )
    trace = caught.value.user_traceback
    assert "in broken" in trace and "fedcore/learning" not in trace


def test_the_centralised_arm_is_called_by_its_name():
    def broken(module, batch):
        raise KeyError("column")

    with pytest.raises(
        TaskFailed,
        match=r"^all sites pooled, round 1: task\.model, task\.predict or task\.loss raised",
    ):
        trained(TrainPlan(), predict=broken, site="")


def test_scores_have_one_row_per_example_and_a_mean_loss():
    module = nn.Linear(3, 2)
    data = rows(2100)
    found = score(task(), module, data, seed=0, round_=1, site="a")
    with torch.no_grad():
        expected = module(data.x)
    np.testing.assert_allclose(found.outputs, expected.numpy(), rtol=1e-5)
    assert found.loss == pytest.approx(
        float(nn.functional.cross_entropy(expected, data.y)), rel=1e-5
    )
    assert not module.training


def test_own_evaluate_gives_sums():
    found = score(
        task(evaluate=lambda m, r: {"hits": (3, len(r)), "more": None}, metrics=("hits",)),
        nn.Linear(3, 2),
        rows(),
        seed=0,
        round_=1,
        site="a",
    )
    assert found.own == {"hits": (3.0, 33.0)}


def scored(returned, metrics=("f1",), site="b", round_=2):
    own = task(evaluate=lambda m, r: returned, metrics=metrics)
    return score(own, nn.Linear(3, 2), rows(), seed=0, round_=round_, site=site)


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ({"f1": (float("nan"), 3)}, "returned nan for 'f1', expected a finite (total, count)"),
        ({"f1": (1.0, float("inf"))}, "returned inf for 'f1', expected a finite (total, count)"),
        ({"f1": 0.5}, "returned 0.5 for 'f1', expected a finite (total, count)"),
        ({"f1": (1, 2, 3)}, "returned (1, 2, 3) for 'f1'"),
        ({"f1": (None, 2)}, "returned (None, 2) for 'f1'"),
        ({"f1": torch.ones(2, 2)}, "returned tensor([[1., 1.], [1., 1.]]) for 'f1'"),
        ({"auc": (1, 2)}, ": found auc, expected f1 too"),
        ({}, ": found no metrics, expected f1 too"),
        ([("f1", 1, 2)], "returned list of 1, expected {metric: (total, count)}"),
        (None, "returned NoneType, expected {metric: (total, count)}"),
    ],
)
def test_what_evaluate_may_not_return_names_site_and_round(returned, says):
    with pytest.raises(BadInput) as caught:
        scored(returned)
    message = str(caught.value)
    assert message.startswith("site b, round 2: task.evaluate") and says in message
    assert "\n" not in message and caught.value.remedy


def test_tensors_and_arrays_are_sums_too():
    pair = {"f1": (torch.tensor(2.0), np.int64(4))}
    assert scored(pair).own == {"f1": (2.0, 4.0)}
    assert scored({"f1": torch.tensor([2.0, 4.0])}).own == {"f1": (2.0, 4.0)}


def test_outputs_of_a_diverged_model_name_site_and_round():
    module = nn.Linear(3, 2)
    nn.init.constant_(module.weight, float("nan"))
    with pytest.raises(TaskFailed) as caught:
        score(task(), module, rows(), seed=0, round_=2, site="b")
    assert str(caught.value).startswith("site b, round 2: found 66 of 66 model outputs not finite")
    assert "train.lr" in caught.value.remedy


def test_a_probe_looks_at_shapes_only():
    """Rows not yet standardised may overflow a model; its number of outputs is known all the same."""
    module = nn.Linear(3, 2)
    nn.init.constant_(module.weight, float("inf"))
    found = probe(task(), module, rows(2), seed=0, round_=0, site="a")
    assert found.outputs.shape == (2, 2)
    own = task(evaluate=lambda m, r: {"accuracy": (float("nan"), 0)})
    assert set(probe(own, module, rows(2), seed=0, round_=0, site="a").own) == {"accuracy"}


@pytest.mark.parametrize("name", ["probe", "score"])
def test_scoring_builds_no_graph(name):
    from fedcore.learning import scoring as module

    seen = []

    def predict(model, batch):
        outputs = model(batch[0])
        seen.append(outputs.requires_grad)
        return outputs, batch[1]

    getattr(module, name)(
        task(predict=predict), nn.Linear(3, 2), rows(), seed=0, round_=1, site="a"
    )
    assert seen == [False]


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(3, 2)

    def forward(self, x):
        x /= 255
        return self.inner(x)


def spoils_all(module, rows, *_):
    rows.x.zero_()
    rows.y.zero_()
    return {"f1": (1, 2)}


@pytest.mark.parametrize(
    ("changes", "make"),
    [
        ({"predict": lambda model, batch: (model(batch[0].div_(255)), batch[1])}, None),
        ({"predict": lambda model, batch: (model(batch[0]), batch[1].zero_())}, None),
        ({}, InPlace),
        ({"train": spoils_all}, None),
        ({"evaluate": spoils_all, "metrics": ("f1",)}, None),
    ],
)
def test_a_task_that_changes_its_batches_in_place_leaves_the_rows_as_they_are(changes, make):
    ours, before = rows(), rows()
    model = (make or (lambda: nn.Linear(3, 2)))()
    plan = TrainPlan(lr=0.1, batch_size=8)
    for _ in range(2):
        local_train(task(**changes), model, ours, plan, seed=0, round_=1, site="a")
        score(task(**changes), model, ours, seed=0, round_=1, site="a")
    assert torch.equal(ours.x, before.x) and torch.equal(ours.y, before.y)
