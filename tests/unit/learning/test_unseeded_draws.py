"""What a task draws without a generator of its own: the same in every run and process, or named as the cause."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from fedcore_clients.trainer import Training
from torch import nn
from torch.utils.data import Dataset

import fedcore
from fedcore.cli.main import main
from fedcore.cli.reproduce import reproduce
from fedcore.experiment.environment import random_causes
from fedcore.learning.task import load_task

pytestmark = pytest.mark.usefixtures("no_drawings")
GENERATORS = {
    "random": random.random, "numpy": np.random.rand, "torch": lambda: float(torch.rand(1)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Jittered(Dataset):
    """Items change each time they are read, as images under random transforms do."""

    def __init__(self, source, draw):
        r = np.random.default_rng(source)
        self.y, self.draw = r.integers(0, 2, 40), draw
        self.x = (r.normal(size=(40, 3)) + self.y[:, None]).astype("f4")

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return torch.from_numpy(self.x[i]) * (1 + self.draw() / 5), int(self.y[i])


def arrays(source, shift=0.0):
    r = np.random.default_rng(source)
    y = r.integers(0, 2, 40)
    return (r.normal(size=(40, 3)) + y[:, None] + shift).astype("f4"), y


def drawing_task(part, draw):
    given = {
        "name": "drawn", "data": arrays, "model": lambda: nn.Linear(3, 2), "sites": {"a": 1, "b": 2, "c": 3},
        "loss": nn.functional.cross_entropy,
    }  # fmt: skip
    parts = {
        "items": {"data": lambda source: Jittered(source, draw)},
        "data": {"data": lambda source: arrays(source, draw())},
        "sites": {"sites": lambda: {name: int(1000 * draw()) for name in "abc"}},
        "model": {"model": lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout(draw() / 2))},
        "loss": {"loss": lambda out, y: nn.functional.cross_entropy(out, y) * (0.5 + draw())},
    }
    return fedcore.Task(**given | parts[part])


def digest(task):
    random.seed()
    np.random.seed()
    torch.seed()
    settings = {"protection": "plain", "rounds": 2, "arms": ("federated",), "resamples": 20}
    return fedcore.simulate(task, **settings).result.model_sha256


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("part", ["items", "data", "sites", "model", "loss"])
def test_a_global_generator_gives_the_same_model_in_every_run(part, generator):
    task = drawing_task(part, GENERATORS[generator])
    assert digest(task) == digest(task)


def test_the_callers_generator_goes_on_where_it_was():
    task = drawing_task("items", random.random)
    random.seed(3)
    expected = [random.random() for _ in range(3)]
    random.seed(3)
    settings = {"protection": "plain", "rounds": 1, "arms": ("federated",), "resamples": 20}
    fedcore.simulate(task, **settings)
    assert [random.random() for _ in range(3)] == expected


IMPORTING = """
import random
import numpy as np, torch, fedcore
SHIFT = random.random() + np.random.rand() + float(torch.rand(1))
task = fedcore.Task("i", lambda s: s, lambda: torch.nn.Linear(1, 1), torch.nn.functional.mse_loss)
"""


def test_what_a_task_file_draws_while_it_is_loaded_is_the_same(tmp_path):
    found = set()
    for name in ("one.py", "two.py"):
        (tmp_path / name).write_text(IMPORTING)
        random.seed()
        found.add(sys.modules[load_task(name).home].SHIFT)
    assert len(found) == 1


UNSEEDED = """
import numpy as np, torch, fedcore
def data(source):
    y = np.arange(40) % 2
    return (np.random.default_rng().normal(size=(40, 3)) + y[:, None]).astype("f4"), y
task = fedcore.Task("unseeded", data, lambda: torch.nn.Linear(3, 2), torch.nn.CrossEntropyLoss(),
                    sites={"a": 1, "b": 2, "c": 3}, defaults={"rounds": 1, "protection": "plain", "resamples": 20})
"""


def test_reproduce_names_what_is_not_seeded(tmp_path, capsys):
    (tmp_path / "task.py").write_text(UNSEEDED)
    fedcore.simulate("task.py", out="run")
    found = reproduce(tmp_path / "run")
    assert not found.same and "default_rng() or torch.Generator() without a seed" in found.causes
    with pytest.raises(SystemExit) as ended:
        main(["reproduce", "run"])
    assert ended.value.code == 3
    assert "hint: " in (said := capsys.readouterr().err) and "os.urandom" in said


def test_an_unfixed_hash_order_is_named_first():
    assert random_causes("0", "random").startswith("the order of a set of text")
    assert "set of text" not in random_causes("0", "0")


START = "from fedcore.seeds import fix_hash_order, hash_seed; fix_hash_order(); print(hash('fever'), hash_seed())"


def printed(**env):
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONHASHSEED"}
    done = subprocess.run(
        [sys.executable, "-c", START], env=inherited | env, capture_output=True, text=True, check=True
    )  # fmt: skip
    return done.stdout.split()


def test_a_program_fixes_its_hash_order_and_keeps_the_users():
    first, again, users = printed(), printed(), printed(PYTHONHASHSEED="5")
    assert first == again and first[1] == "0"
    assert users[1] == "5" and users[0] != first[0]


ANSWERING = (
    "from fedcore.runtime.pipes import Parent; "
    "Parent.of_this_process().serve(lambda head, _: ({'name': '', 'digest': hash('fever')}, []))"
)


def test_every_training_process_has_the_same_hash_order(monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "5")

    async def digest_of():
        training = Training([sys.executable, "-c", ANSWERING])
        try:
            return (await training.task_digest("", ""))[1]
        finally:
            await training.close()

    assert asyncio.run(digest_of()) == printed(PYTHONHASHSEED="0")[0]
