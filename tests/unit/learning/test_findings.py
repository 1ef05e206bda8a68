"""A task is looked at once before it is trained: what is certainly wrong is refused by its name, the rest warned of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fedcore
from fedcore.config import build_job
from fedcore.errors import BadInput
from fedcore.experiment.prepare import prepare
from fedcore.learning.data.linear import logit_loss
from fedcore.learning.task import Task, load_task

SITES = {"north": 1, "south": 2, "coast": 3}
functional = nn.functional


def binary(source, rows=60):
    random = np.random.default_rng(source)
    x = random.normal(size=(rows, 4)).astype("f4")
    return x, (x[:, 0] > 0).astype("f4")


def integers(source):
    x, y = binary(source)
    return x, y.astype("i8")


def numbers(source):
    x, _ = binary(source)
    return x, (x @ [1.0, 2.0, 0.0, -1.0] + 3).astype("f4")


def one_logit():
    return nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))


def made(*, protection="plain", **changes):
    given = {
        "name": "t", "data": binary, "model": one_logit, "loss": nn.BCEWithLogitsLoss(),
        "metrics": ("accuracy", "auc"), "sites": SITES,
    }  # fmt: skip
    task = Task(**given | changes)
    return prepare(task, build_job(task.defaults, {"protection": protection, "rounds": 1}))


def refused(**changes):
    with pytest.raises(BadInput) as caught:
        made(**changes)
    return str(caught.value), caught.value.remedy


def warned(**changes):
    return made(**changes).findings


class Functional(nn.Module):
    """One of several ways to end in probabilities without a layer of that name."""

    def __init__(self, outputs, last):
        super().__init__()
        self.linear, self.last = nn.Linear(4, outputs), last

    def forward(self, x):
        return self.last(self.linear(x))


def nll(outputs, targets):
    return functional.nll_loss(torch.log(outputs + 1e-9), targets)


def bce(outputs, targets):
    return functional.binary_cross_entropy(outputs.reshape(-1), targets)


@pytest.mark.parametrize(
    ("model", "loss", "name", "instead"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 1), nn.Sigmoid(), nn.Flatten(0)), bce, "Sigmoid", "BCEWithLogits"),
        (lambda: Functional(1, torch.sigmoid), bce, "Sigmoid", "BCEWithLogits"),
        (lambda: Functional(1, lambda z: torch.sigmoid(z).clamp(1e-6, 1 - 1e-6)[:, 0]), bce, "Sigmoid", "BCE"),
        (lambda: Functional(1, lambda z: 1 / (1 + torch.exp(-z))), bce, "Sigmoid", "BCEWithLogits"),
        (lambda: Functional(1, lambda z: functional.logsigmoid(z)[:, 0]), nn.BCEWithLogitsLoss(), "LogSigmoid", "BCE"),
        (lambda: nn.Sequential(nn.Linear(4, 2), nn.Softmax(dim=1)), nll, "Softmax", "CrossEntropy"),
        (lambda: Functional(3, lambda z: functional.softmax(z, 1)), nll, "Softmax", "CrossEntropy"),
        (lambda: Functional(3, lambda z: z.exp() / z.exp().sum(1, keepdim=True)), nll, "Softmax", "CrossEntropy"),
    ],
)  # fmt: skip
def test_probabilities_as_outputs_are_refused(model, loss, name, instead):
    said, hint = refused(model=model, loss=loss, data=integers if loss is nll else binary)
    assert f"probabilities as outputs ({name}: " in said
    assert "expected logits for accuracy, auc" in said
    assert f"leave the {name} out and use torch.nn.{instead}" in hint


def test_outputs_of_a_log_softmax_are_logits_and_predict_gives_their_probabilities():
    def small():
        model = nn.Linear(4, 1)
        with torch.no_grad():  # logits in [0, 1] by chance
            model.weight.mul_(0.01)
            model.bias.fill_(0.5)
        return nn.Sequential(model, nn.Flatten(0))

    log_softmax = {
        "model": lambda: Functional(3, lambda z: functional.log_softmax(z, 1)),
        "loss": nn.NLLLoss(),
    }
    zeros = {"model": fedcore.linear(4, classes=3), "loss": nn.CrossEntropyLoss()}
    for changes in ({"model": small}, log_softmax | {"data": integers}, zeros | {"data": integers}):
        assert not warned(**changes)
    # A regression may have a sigmoid at its end.
    assert not warned(
        model=lambda: Functional(1, lambda z: torch.sigmoid(z)[:, 0]), loss=nn.MSELoss(), metrics=("mae",)
    )  # fmt: skip


def test_the_model_is_as_before_after_a_look_with_other_parameters():
    def skewed():
        torch.manual_seed(3)
        model = nn.Linear(4, 1)
        with torch.no_grad():
            model.bias.fill_(0.5)
            model.weight.mul_(0.01)
        return nn.Sequential(model, nn.Flatten(0))

    expected = torch.cat([each.reshape(-1) for each in skewed().parameters()])
    assert np.array_equal(made(model=skewed).flat.read(), expected.detach().numpy())


def one_hot(source):
    x, y = binary(source)
    return x, np.eye(2, dtype="f4")[y.astype(int)]


def several(source):
    x, y = binary(source)
    return x, np.stack([y, x[:, 1] > 0], axis=1).astype("f4")


def signs(source):
    x, y = binary(source)
    return x, (2 * y - 1).astype("i8")


def from_one(source):
    x, y = binary(source)
    return x, y.astype("i8") + 1


def as_tensors(data):
    return lambda source: tuple(torch.from_numpy(np.asarray(part)) for part in data(source))


TWO = {"model": lambda: nn.Linear(4, 2), "loss": nn.CrossEntropyLoss()}
MARGIN = {"loss": lambda o, t: functional.soft_margin_loss(o, t.float())}


@pytest.mark.parametrize(
    ("changes", "found", "hint"),
    [
        (TWO | {"data": one_hot}, "one-hot rows of shape (60, 2)", "y.argmax(1) in task.data"),
        (TWO | {"data": as_tensors(one_hot)}, "one-hot rows of shape (60, 2)", "y.argmax(1) in task.data"),
        ({"model": lambda: nn.Linear(4, 2), "data": several}, "rows of several labels of shape (60, 2)", "evaluate("),
        (MARGIN | {"data": signs}, "found -1 in", "(y + 1) // 2 in task.data"),
        (MARGIN | {"data": as_tensors(signs)}, "found -1 in", "(y + 1) // 2 in task.data"),
        (TWO | {"data": from_one}, "found 2 in", "y - 1 in task.data: classes count from 0"),
        (TWO | {"data": lambda s: (binary(s)[0], binary(s)[1] + 0.5)}, "found 1.5 in", "one output per class"),
    ],
)  # fmt: skip
def test_labels_that_are_no_class_indices_are_refused_by_their_name(changes, found, hint):
    said, remedy = refused(**changes)
    assert said.startswith("site north: targets: found ")
    assert found in said
    assert hint in remedy


def test_a_label_out_of_range_is_found_wherever_it_is_among_the_rows():
    def data(source):
        x, y = integers(source)
        y[-1] = 7 if source == 2 else 0
        return x, y

    said, _ = refused(data=data, **TWO)
    assert said == "site south: targets: found 7 in 1 of 60 rows, expected class indices 0..1"


@pytest.mark.parametrize(
    ("loss", "data", "found", "hint"),
    [
        (nn.CrossEntropyLoss(), lambda s: (binary(s)[0], binary(s)[1]), "float32 targets for 2 outputs", "int64"),
        (nn.NLLLoss(), lambda s: (binary(s)[0], binary(s)[1]), "float32 targets for 2 outputs", "int64"),
    ],
)  # fmt: skip
def test_targets_of_a_dtype_that_the_loss_does_not_take(loss, data, found, hint):
    said, remedy = refused(model=lambda: nn.Linear(4, 2), loss=loss, data=data)
    assert said.startswith("site north: task.loss: found ")
    assert found in said
    assert hint in remedy


def test_integer_targets_of_a_loss_on_floats():
    said, remedy = refused(data=integers, loss=functional.binary_cross_entropy_with_logits)
    assert "found int64 targets for one output a row, expected float32" in said
    assert "targets.float() in the loss" in remedy


@pytest.mark.parametrize(
    "loss",
    [
        nn.MSELoss(),
        nn.L1Loss(),
        nn.HuberLoss(),
        lambda outputs, targets: ((outputs - targets) ** 2).mean(),
    ],
)
def test_a_loss_that_pairs_every_output_with_every_target_is_refused(loss):
    said, remedy = refused(model=lambda: nn.Linear(4, 1), loss=loss, data=numbers, metrics=("mse",))
    assert "outputs of shape (48, 1) and targets of shape (48,)" in said
    assert "squeeze(1)" in remedy
    column = refused(
        loss=loss, data=lambda s: (numbers(s)[0], numbers(s)[1][:, None]), metrics=("mse",)
    )
    assert "outputs of shape (48,) and targets of shape (48, 1)" in column[0]


@pytest.mark.parametrize(
    "loss",
    [
        lambda outputs, targets: functional.mse_loss(outputs.squeeze(1), targets),
        lambda outputs, targets: functional.l1_loss(outputs, targets.squeeze(1)),
        lambda outputs, targets: ((outputs[:, 0] - targets) ** 2).sum(),
        lambda outputs, targets: ((outputs - targets.reshape(-1)) ** 2).sum() / len(targets),
    ],
)
def test_a_loss_that_reshapes_one_of_two_columns_is_refused(loss):
    columns = {"data": lambda s: (numbers(s)[0], numbers(s)[1][:, None]), "metrics": ("mse",)}
    said, remedy = refused(model=lambda: nn.Linear(4, 1), loss=loss, **columns)
    assert "outputs of shape (48, 1) and targets of shape (48, 1), which it broadcasts" in said
    assert remedy == "the loss reshapes one of them: squeeze both, or neither"
    for right in (
        nn.MSELoss(),
        lambda outputs, targets: functional.mse_loss(outputs[:, 0], targets[:, 0]),
        lambda outputs, targets: (outputs.mean() - targets.mean()) ** 2,  # of no single pair
    ):
        assert not warned(model=lambda: nn.Linear(4, 1), loss=right, **columns)


@pytest.mark.parametrize(
    "loss",
    [
        lambda outputs, targets: functional.mse_loss(outputs.squeeze(1), targets),
        lambda outputs, targets: functional.mse_loss(outputs, targets.reshape(outputs.shape)),
        lambda outputs, targets: (outputs**2).mean(),  # of no target
    ],
)
def test_a_loss_that_brings_both_to_one_shape_is_not_refused(loss):
    assert not warned(model=lambda: nn.Linear(4, 1), loss=loss, data=numbers, metrics=("mse",))


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (lambda o, t: functional.mse_loss(o, t) * float("nan"), "found nan on 48 rows"),
        (lambda o, t: torch.log(o * 0).mean(), "found -inf on 48 rows"),
        (nn.MSELoss(reduction="none"), "found a tensor of shape (48,), expected one number"),
    ],
)
def test_a_loss_that_is_no_finite_number_is_refused(loss, found):
    said, remedy = refused(loss=loss, data=numbers, metrics=("mse",))
    assert said.startswith("site north: task.loss: ")
    assert found in said
    assert remedy


def test_unscaled_inputs_are_a_warning_that_names_the_worst_column_and_how_many_sites():
    def data(source):
        x, y = binary(source)
        x[:, 2] = 2500 + 1000 * x[:, 2]
        return x, y

    ((text, hint),) = warned(data=data)
    assert text.startswith("site north and 2 more: found inputs from ")
    assert "in column 2, expected about -3 to 3" in text
    assert "Task(statistics=" in hint
    # The remedy works, and so does a model that scales by itself.
    assert not warned(data=data, statistics=((-5, 5), (-5, 5), (0, 5000), (-5, 5)))
    assert not warned(data=data, predict=lambda model, batch: (model(batch[0] / 2500), batch[1]))
    normalised = nn.BatchNorm1d
    assert warned(
        data=data, model=lambda: nn.Sequential(normalised(4), nn.Linear(4, 1), nn.Flatten(0))
    )
    with_instance_norm = lambda: nn.Sequential(  # noqa: E731
        nn.Unflatten(1, (1, 4)), nn.InstanceNorm1d(1), nn.Flatten(), nn.Linear(4, 1), nn.Flatten(0)
    )
    assert not warned(data=data, model=with_instance_norm)


def test_a_table_warns_of_values_outside_its_declaration():
    read = fedcore.table(
        target="ill",
        columns={
            "age": fedcore.number(0, 120),
            "smoker": fedcore.category("never", "now"),
            "dose": fedcore.number(0, 1),
        },
    )

    def data(source):
        random = np.random.default_rng(source)
        age = random.integers(20, 90, 100).astype(float)
        smoker = random.choice(["never", "now"], 100)
        dose = random.random(100)
        if source == 2:
            smoker[:10] = "Now"
            age[3] = 999
            dose[:2] = 1.2
        if source == 3:
            dose[0] = 1.2  # one of a hundred, and near: no warning
        return read({"age": age, "smoker": smoker, "dose": dose, "ill": (age > 50).astype(int)})

    found = warned(data=data, model=fedcore.linear(len(read.columns)), loss=logit_loss)
    assert [text for text, _ in found] == [
        "site south: found 10 of 100 values of 'smoker' that are not declared, expected the declared ones",
        "site south: found 1 of 100 values of 'age' outside 0 to 120, such as 999",
        "site south: found 2 of 100 values of 'dose' outside 0 to 1, such as 1.2",
    ]


@pytest.mark.parametrize(
    "model", [nn.Linear(4, 1), nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)), one_logit()]
)
def test_a_model_instead_of_a_function_is_refused_where_the_task_is_made(model):
    with pytest.raises(
        BadInput, match=f"task.model: found a {type(model).__name__} itself"
    ) as caught:
        Task(name="t", data=binary, model=model, loss=nn.BCEWithLogitsLoss())
    assert "a function that returns a new one at each call" in caught.value.remedy


@pytest.mark.parametrize("kind", ["numpy generator", "torch generator", "counter", "buffer"])
def test_a_model_whose_initial_values_are_not_of_the_seed_is_refused(kind):
    fresh, own, calls = np.random.default_rng(), torch.Generator().manual_seed(1), []

    def model():
        module = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
        calls.append(1)
        weight = module[0].weight
        with torch.no_grad():
            if kind == "numpy generator":
                weight.copy_(torch.from_numpy(fresh.normal(size=(1, 4))))
            elif kind == "torch generator":
                weight.copy_(torch.randn(1, 4, generator=own))
            elif kind == "counter":
                weight.fill_(len(calls))
            else:
                module.register_buffer("started", torch.tensor(len(calls)))
        return module

    said, remedy = refused(model=model)
    assert f"other initial values of {'started' if kind == 'buffer' else '0.weight'}" in said
    assert "torch.empty sets none" in remedy


def test_metrics_that_the_outputs_do_not_fit_are_refused_before_training():
    said, _ = refused(data=integers, metrics=("top_3_accuracy",), **TWO)
    assert "found 2 classes, expected more than 3 for top_3_accuracy" in said
    three = {
        "model": lambda: nn.Sequential(nn.Linear(4, 6), nn.Unflatten(1, (2, 3))),
        "loss": lambda o, t: o.sum(),
    }
    said, _ = refused(data=integers, **three)
    assert "found outputs of shape (48, 2, 3)" in said


def test_nothing_is_found_in_a_table_task_that_declares_the_ranges_of_its_values():
    task = load_task("heart")
    assert not prepare(task, build_job(task.defaults, {"protection": "plain"})).findings


def test_a_task_with_loops_of_its_own_keeps_outputs_and_labels_of_any_form():
    model = lambda: nn.Linear(4, 2)  # noqa: E731
    own = {"evaluate": lambda model, rows: {"accuracy": (1, 1)}, "metrics": ("accuracy",)}
    assert not warned(model=model, data=several, **own)
    assert not warned(
        model=model,
        data=one_hot,
        train=lambda model, rows, fit: None,
        loss=lambda o, t: 1 / 0,
        **own,
    )
