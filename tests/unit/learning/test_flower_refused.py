"""Strategies of flwr that no protected sum serves: refused by name here, and by our protection on Flower's engine."""

import inspect
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("flwr")

from flwr.common import ndarrays_to_parameters
from flwr.server import strategy as legacy
from flwr.serverapp import strategy as current
from support.flower_apps import LEGACY_CLIENT, LEGACY_SERVER, SERVER, flower_app

from fedcore.errors import PlanRefused
from fedcore.flower import SecureAggregation
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
        SecureAggregation(
            built(package, made, own), sites={"a": "00"}, federation="hospitals", max_examples=8
        )
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
        SecureAggregation(built(legacy, made), sites={"a": "00"}, federation="h", max_examples=8)
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
    assert (
        SecureAggregation(made, sites={"a": "00"}, federation="h", max_examples=8).strategy is made
    )


def test_the_page_for_people_of_flower_names_every_refused_strategy():
    page = (Path(__file__).parents[3] / "docs/coming-from-flower.md").read_text(encoding="utf-8")
    listed = page[page.index("## Refused by name") :]
    assert [name for name in (*NEEDS_SINGLE_UPDATES, *_OTHERS) if name not in listed] == []
