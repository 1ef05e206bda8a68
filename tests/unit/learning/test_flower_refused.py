"""What is refused of a Flower app: strategies that no protected sum serves (on Flower's engine too), and bad input."""

import inspect
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flwr")

from fedcore_clients.worker import Worker
from flwr.common import ndarrays_to_parameters
from flwr.server import strategy as legacy
from flwr.serverapp import strategy as current
from support.flower_apps import LEGACY_CLIENT, LEGACY_SERVER, SERVER, flower_app
from torch.utils.data import Subset

from fedcore.cli.flags import of_flower_app
from fedcore.errors import BadInput, PlanRefused, TaskFailed
from fedcore.flower import SecureAggregation
from fedcore.learning.flower_apps.app_arrays import load, module_of
from fedcore.learning.flower_apps.refused import NEEDS_SINGLE_UPDATES
from fedcore.learning.flower_apps.strategies import _OTHERS, _TAKEN, _TAKEN_LEGACY
from fedcore.learning.task import load_task

GIVEN = {
    "client_learning_rate": "0.1", "num_sampled_clients": "100", "noise_multiplier": "1.0", "clipping_norm": "1.0",
    "clip_norm": "1.0", "strategy": "strategies.FedAvg()", "initial_parameters": "start",
}  # fmt: skip
"""Arguments that strategies have no value for."""


def line(package, name, called=None):
    """Source that makes a strategy of flwr, or with `called` one that derives from it and is called so."""
    needed = inspect.signature(getattr(package, name)).parameters.values()
    given = [
        f"{p.name}={GIVEN[p.name]}"
        for p in needed
        if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    ]
    return f"{called or f'strategies.{name}'}({', '.join(given)})"


def names(package):
    """Of the strategies that flwr ships."""
    return [n for n in package.__all__ if n not in {"Strategy", "Result"}]


def refused(package):
    return [name for name in names(package) if name in NEEDS_SINGLE_UPDATES]


OWN = "class Mine(strategies.{}):\n    pass\n\n"


def app_of(folder, package, made, own=""):
    """An app, in the API of the package, whose server starts this strategy."""
    if package is current:
        server = SERVER.replace("strategies.FedAvg()", made)
        return flower_app(
            folder, server=server.replace("app = ServerApp()", f"{own}app = ServerApp()")
        )
    server = LEGACY_SERVER.replace("strategies.FedAvg(initial_parameters=start)", made)
    return flower_app(
        folder, client=LEGACY_CLIENT, server=server.replace("def server_fn", f"{own}def server_fn")
    )


def built(package, made, own=""):
    """The strategy itself."""
    scope = {"strategies": package, "start": ndarrays_to_parameters([np.zeros(2)])}
    exec(own, scope)
    return eval(made, scope)


@pytest.mark.parametrize("package", [current, legacy], ids=["message API", "older API"])
def test_every_strategy_of_flwr_is_taken_or_refused_by_name(package):
    taken = {each.__name__ for each in (_TAKEN if package is current else _TAKEN_LEGACY)}
    assert set(names(package)) == taken | set(refused(package)) | (
        set(_OTHERS) & set(names(package))
    )
    assert not taken & (set(NEEDS_SINGLE_UPDATES) | set(_OTHERS))


CASES = [
    pytest.param(package, name, id=f"{name}, {api}")
    for package, api in ((current, "message API"), (legacy, "older API"))
    for name in refused(package)
]


@pytest.mark.parametrize("derived", [False, True], ids=["as it is", "derived in the app"])
@pytest.mark.parametrize(("package", "name"), CASES)
def test_strategy_that_needs_single_updates_is_refused_in_both_directions(
    tmp_path, package, name, derived
):
    own = OWN.format(name) if derived else ""
    called = f"Mine (a {name})" if derived else name
    made = line(package, name, "Mine" if derived else None)
    why, instead = NEEDS_SINGLE_UPDATES[name]
    with pytest.raises(PlanRefused) as here:
        load_task(f"flower:{app_of(tmp_path / 'app', package, made, own)}")
    assert str(here.value) == f"strategy {called}: found it in Flower app tinyapp; it {why}"
    with pytest.raises(PlanRefused) as there:
        SecureAggregation(built(package, made, own), federation="hospitals", max_examples=8)
    assert str(there.value) == f"strategy {called}: found it in SecureAggregation; it {why}"
    assert here.value.remedy == there.value.remedy == instead
    assert here.value.exit_code == 3


@pytest.mark.parametrize("name", sorted(_OTHERS))
def test_other_strategy_of_the_older_api_is_refused_with_what_to_use(tmp_path, name):
    made = line(legacy, name)
    with pytest.raises(
        PlanRefused, match=f"strategy {name}: found it in Flower app tinyapp, expected one of flwr"
    ):
        load_task(f"flower:{app_of(tmp_path / 'app', legacy, made)}")
    with pytest.raises(PlanRefused, match=f"found {name} of flwr.server.strategy") as there:
        SecureAggregation(built(legacy, made), federation="h", max_examples=8)
    assert "of flwr.serverapp.strategy" in there.value.remedy


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam"])
def test_strategy_of_the_apps_own_is_refused_here_and_taken_on_flowers_engine(tmp_path, name):
    own = OWN.format(name)
    with pytest.raises(
        PlanRefused,
        match=rf"strategy Mine \(a {name}\): found a strategy of Flower app tinyapp's own",
    ):
        load_task(f"flower:{app_of(tmp_path / 'app', current, 'Mine()', own)}")
    made = built(current, "Mine(fraction_evaluate=0.0)", own)
    assert SecureAggregation(made, federation="h", max_examples=8).strategy is made


def test_the_page_for_people_of_flower_names_every_refused_strategy():
    page = (Path(__file__).parents[3] / "docs/coming-from-flower.md").read_text(encoding="utf-8")
    listed = page[page.index("## Refused by name") :]
    assert [name for name in (*NEEDS_SINGLE_UPDATES, *_OTHERS) if name not in listed] == []


# --- Apps that this engine cannot run -------------------------------------------------------------------------------

NODE = {"partition-id": 0, "num-partitions": 2}
TRAINED = "(w - step).astype(np.float32)"
TRAIN_EXAMPLES = '{"num-examples": len(x), "train_loss"'
EVALUATE_EXAMPLES = '{"num-examples": len(x), "error"'


def edited(folder, old, new, file="tinyapp/client_app.py"):
    """An app with one line changed."""
    path = flower_app(folder) / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    return folder


def asked(folder):
    """What a site asks the app before the first round."""
    task = load_task(f"flower:{folder}")
    task.app.at_source(task, NODE)
    return task.app.data(NODE)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (TRAINED, f"{TRAINED} * np.nan", "train: found NaN or infinity in array 'w', expected finite numbers"),
        (TRAINED, f"{TRAINED} + np.float32(np.inf)", "train: found NaN or infinity in array 'w'"),
        (TRAINED, "w.astype(np.complex64)", "train: found array 'w' of dtype complex64, expected real numbers"),
        (TRAINED, "np.array(['a'] * 4)", "train: found array 'w' of dtype <U1"),
        (TRAINED, "w > 0", "train: found no array of floating-point numbers"),
        (f'{{"w": Array({TRAINED}), "count": Array(np.asarray(count + 1))}}', "", "train: found no array"),
        ('"arrays": out, ', '"arrays": out, "more": out, ', "train: found 2 ArrayRecords in the reply, expected 1"),
        (', "metrics": metrics}', "}", "found 0 MetricRecords in the reply, expected one"),
        ("reply_to=msg)\n\n@app.ev", "reply_to=msg).content\n\n@app.ev", "train: found RecordDict as its reply"),
        ("    step =", "    import flwr\n    return Message(flwr.app.Error(1, 'no rows'), reply_to=msg)\n    step =",
         "train: found the error 'no rows' as its reply, expected a Message"),
        ("@app.train()\n", "", "train: found no such function in its ClientApp"),
        ("@app.evaluate()\n", "", "evaluate: found no such function in its ClientApp"),
        ('"error": error', '"error": [error, error]', "found a list in the metric 'error', expected a number"),
        *[
            (kind, kind.replace("len(x)", value), rf"found num-examples = {shown} in the reply, expected one")
            for kind in (TRAIN_EXAMPLES, EVALUATE_EXAMPLES)
            for value, shown in {
                "-3": "-3", "0": "0", "2.5": "2.5", "[3]": r"\[3\]", 'float("nan")': "nan", 'float("inf")': "inf",
                "2 ** 62": "4611686018427387904",
            }.items()
        ],
    ],
)  # fmt: skip
def test_reply_that_no_sum_can_hold_is_refused_before_the_first_round(tmp_path, old, new, message):
    with pytest.raises(BadInput, match=message) as refused:
        asked(edited(tmp_path / "app", old, new))
    assert refused.value.remedy
    assert "\n" not in str(refused.value)


def test_the_app_that_the_refused_ones_are_made_from_is_taken(tmp_path):
    train, test = asked(flower_app(tmp_path / "app"))
    assert (len(train), len(test)) == (3, 3)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_metric_that_is_not_finite_is_refused_with_its_node(tmp_path, value):
    folder = edited(tmp_path / "app", '"error": error', f'"error": float("{value}")')
    task = load_task(f"flower:{folder}")
    _, test = task.app.data(NODE)
    rows = Subset(test, range(3))
    with pytest.raises(
        BadInput, match=rf"round 2 \(partition-id = 0, num-partitions = 2\): found {value} in the"
    ):
        task.app.evaluate(task.model(), rows, 2)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "np.zeros(4, np.float32)",
            "np.full(4, np.nan, np.float32)",
            "initial_arrays: found NaN or infinity",
        ),
        (
            "np.zeros(4, np.float32)",
            "np.zeros(4, np.complex64)",
            "initial_arrays: found array 'w' of dtype complex64",
        ),
        ("ArrayRecord(arrays)", "ArrayRecord()", "initial_arrays: found no array"),
        ("ArrayRecord(arrays)", "None", "initial_arrays: found NoneType, expected an ArrayRecord"),
        ("ArrayRecord(arrays)", "arrays", "initial_arrays: found dict, expected an ArrayRecord"),
    ],
)
def test_initial_arrays_that_are_no_model_are_refused(tmp_path, old, new, message):
    with pytest.raises(BadInput, match=message) as refused:
        load_task(f"flower:{edited(tmp_path / 'app', old, new, 'tinyapp/server_app.py')}")
    assert refused.value.remedy


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[tool.flwr.app.components]", "[tool.flwr.app.others]", "found none as tool.flwr.app.components.serverapp"),
        ("tinyapp.client_app:app", ".client_app:app", "expected 'module:attribute'"),
        ("tinyapp.client_app:app", "tinyapp.client_app:", "expected 'module:attribute'"),
        ('"tinyapp.client_app:app"', "5", "found 5 as tool.flwr.app.components.clientapp"),
        ("tinyapp.client_app:app", "tinyapp.client_app:app.nothing", "found no 'app.nothing' in tinyapp.client_app"),
        ("dependencies = []", 'dependencies = ["FLWR>=1.50"]', "found the dependency 'FLWR>=1.50', and flwr"),
        ("dependencies = []", 'dependencies = ["flwr>=1.43,<2"]', "found the dependency 'flwr>=1.43,<2', and flwr"),
        ("dependencies = []", 'dependencies = ["flwr<1.30"]', "found the dependency 'flwr<1.30', and flwr"),
    ],
)  # fmt: skip
def test_declaration_that_flwr_could_not_follow_either_is_refused(tmp_path, old, new, message):
    with pytest.raises(BadInput, match=message) as refused:
        load_task(f"flower:{edited(tmp_path / 'app', old, new, 'pyproject.toml')}")
    assert str(tmp_path / "app" / "pyproject.toml") in str(refused.value)
    assert refused.value.remedy


def test_component_may_be_an_attribute_of_an_attribute(tmp_path):
    folder = edited(tmp_path / "app", "client_app:app", "client_app:Holder.app", "pyproject.toml")
    path = folder / "tinyapp/client_app.py"
    path.write_text(path.read_text() + "\nclass Holder:\n    app = app\n")
    assert asked(folder)


def test_of_an_app_that_cannot_be_imported_nothing_is_left_for_the_next_one(tmp_path):
    with pytest.raises(TaskFailed, match=r"tinyapp\.client_app raised SyntaxError"):
        load_task(
            f"flower:{edited(tmp_path / 'broken', 'def rows(context):', 'def rows(context:')}"
        )
    with pytest.raises(BadInput, match=r"found no module 'tinyapp\.nowhere'"):
        load_task(
            f"flower:{edited(tmp_path / 'gone', 'client_app:app', 'nowhere:app', 'pyproject.toml')}"
        )
    assert asked(flower_app(tmp_path / "app"))


@pytest.mark.parametrize(
    ("file", "old", "hint"),
    [
        (
            "client_app",
            'run_config["learning-rate"]',
            "declares num-server-rounds, learning-rate; the node config has",
        ),
        (
            "client_app",
            'node_config["partition-id"]',
            "the node config has partition-id, num-partitions",
        ),
        (
            "server_app",
            'run_config["num-server-rounds"]',
            "declares num-server-rounds, learning-rate",
        ),
    ],
)
def test_key_that_a_config_lacks_is_an_error_of_the_app_with_the_keys_there_are(
    tmp_path, file, old, hint
):
    with pytest.raises(TaskFailed, match="raised KeyError: 'other'") as failed:
        asked(
            edited(tmp_path / "app", old, f'{old.partition("[")[0]}["other"]', f"tinyapp/{file}.py")
        )
    assert hint in failed.value.remedy
    assert failed.value.exit_code == 1


def test_another_key_error_of_the_app_has_no_hint_about_its_configs(tmp_path):
    with pytest.raises(TaskFailed, match="raised KeyError: 'other'") as failed:
        asked(edited(tmp_path / "app", 'arrays["w"]', '{}["other"]'))
    assert "declares" not in failed.value.remedy


def test_run_config_may_be_given_in_several_flags():
    found = of_flower_app({}, Path("app"), ["a=1 b='x y'", "c=true"])
    assert {key: value for key, value in found.items() if key != "task"} == {
        "task.a": 1, "task.b": "x y", "task.c": True,
    }  # fmt: skip


@pytest.mark.parametrize("other", [np.int64, np.complex64, np.str_])
def test_float_array_that_comes_back_as_another_kind_of_number_is_refused(other):
    like = {"w": np.zeros(2, np.float32), "b": np.zeros(1, np.float32)}
    arrays = {"w": np.ones(2).astype(other), "b": np.ones(1)}
    with pytest.raises(BadInput, match="a train: found 'w' of dtype"):
        load(module_of(like), arrays, like, "a train")
    module = module_of(like)
    load(module, {"w": np.ones(2), "b": np.ones(1)}, like, "a train")  # float64 is a float array
    assert module.state_dict()["w"].dtype.is_floating_point


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("clientapp =", "client =", "found none as tool.flwr.app.components.clientapp, expected"),
        ("tinyapp.client_app:app", "tinyapp.client_app:other", "found no 'other' in tinyapp.client_app"),
        ("dependencies = []", 'dependencies = ["flwr>=1.50"]', "found the dependency 'flwr>=1.50', and flwr"),
        ("", "", "expected a Flower app (hint: the folder that `flwr run` takes)"),
    ],
)  # fmt: skip
def test_deployed_site_says_in_one_line_why_it_cannot_load_an_app(tmp_path, old, new, line):
    folder = tmp_path / "app"
    if old:
        edited(folder, old, new, "pyproject.toml")
    asked_for = {"do": "digest", "task": f"flower:{folder}", "base": str(tmp_path)}
    text = Worker().answer(asked_for, [])[0]["text"]
    assert line in text
    assert "(hint: " in text and "\n" not in text


def test_deployed_site_shows_an_error_of_an_app_from_the_apps_own_line_on(tmp_path):
    folder = edited(tmp_path / "app", "app = ClientApp()", "app = ClientApp(\nraise")
    asked_for = {"do": "digest", "task": f"flower:{folder}", "base": str(tmp_path)}
    first, *shown = Worker().answer(asked_for, [])[0]["text"].splitlines()
    assert "tinyapp.client_app raised SyntaxError" in first
    assert not [each for each in shown if "/clients/" in each or "fedcore" in each]
