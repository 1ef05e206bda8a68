"""One deployment of real processes for many attacks: each attack has a task with rows of its own.

    with attacked(folder) as fed:
        attack(fed.folder, leave_out=["a", "b", "c", "d"], abandon=True)
        job = fed.submit("cohorts", rounds=1, protection="masked")

What a site has released is counted per set of rows, so two tests on the same rows would disturb each other.
"""

from __future__ import annotations

import contextlib
import time

import numpy as np
from deployment import HUB, deployment
from support.hostile_coordinator import attack, hostile
from support.unguarded_site import colluding, unguarded

from fedcore.learning.task import load_task

SITES = ("a", "b", "c", "d")
COLLUDER = "d"
ROWS = {"a": 23, "b": 31, "c": 27, "d": 19}
READS = "reads"
COLUMNS = (
    ("age", 20, 90),
    ("pressure", 80, 200),
    ("sugar", 0, 1),
    ("rate", 60, 202),
    ("dip", -3, 7),
)
"""(name, low, high) of what is known of a patient."""

TEXT = """
import numpy as np
import torch
import fedcore


def data(source):
    site, task, n = source
    with open({reads!r}, "a") as out:
        print(site, task, file=out)
    random = np.random.default_rng([site, task])
    columns = [
        random.integers(29, 78, n), random.integers(94, 190, n), random.integers(0, 2, n),
        random.integers(71, 195, n), random.integers(-20, 63, n) / 10,
    ]
    x = np.stack(columns, 1).astype(np.float32)
    return x, (x[:, 0] / 70 + random.normal(size=n) > 0.8).astype(np.int64)


def model():
    return torch.nn.Linear(5, 1)


def loss(outputs, targets):
    return torch.nn.functional.binary_cross_entropy_with_logits(outputs.squeeze(1), targets.float())


def of(name, number):
    return fedcore.Task(
        name=name, data=data, model=model, loss=loss, metrics=("accuracy",),
        statistics={ranges!r}, sites={{site: (i, number, {rows!r}[i]) for i, site in enumerate("abcd")}},
    )


{tasks}
"""


class Attacked:
    """A deployment under attack. folder: where the attack is written down, and what it gave."""

    def __init__(self, fed, file, folder, names):
        self.fed, self.file, self.folder = fed, file, folder
        self.names, self.prepared_jobs = names, {}

    def __getattr__(self, name):
        return getattr(self.fed, name)

    def submit(self, task, **settings):
        """Submit a job of this task; its id."""
        self.fed.task = f"{self.file}:{task}"
        self.fed.prepared = self.prepared_jobs.setdefault(task, {})
        return self.fed.submit(**{"max_examples": 64, "standardise": "federated", **settings})

    def reads(self, task):
        """How often sites have loaded their rows for a task, in all."""
        path = self.folder / READS
        lines = path.read_text().splitlines() if path.exists() else []
        return sum(line.split()[1] == str(self.names.index(task)) for line in lines)

    def data(self, task, site):
        """The rows that a site has for a task: (rows, columns) and labels."""
        source = SITES.index(site), self.names.index(task), ROWS[site]
        return load_task(f"{self.file}:{task}").data(source)


@contextlib.contextmanager
def attacked(folder, tasks, colluders=(COLLUDER,), sites=SITES):
    """Four sites with a hostile coordinator. tasks: names, one for each attack."""
    file, notes = folder / "patients.py", folder / "notes"
    notes.mkdir()
    lines = "\n".join(f"{name} = of({name!r}, {number})" for number, name in enumerate(tasks))
    ranges = tuple((low, high) for _, low, high in COLUMNS)
    file.write_text(
        TEXT.format(rows=list(ROWS.values()), ranges=ranges, tasks=lines, reads=str(notes / READS))
    )
    patches = {name: unguarded(notes) for name in sites}
    patches |= {name: colluding(notes) for name in colluders} | {HUB: hostile(notes)}
    attack(notes)
    first = f"{file}:{tasks[0]}"
    policy = {"statistics": "federated"}
    with deployment(folder, first, start=[], patches=patches, policy=policy) as fed:
        found = Attacked(fed, file, notes, list(tasks))
        allow(found, tasks)
        for name in sites:
            fed.start(name)
        while not {n for n, s in fed.jobs()["sites"].items() if s["connected"]} >= set(sites):
            ended = [name for name in sites if fed.processes[name].poll() is not None]
            assert not ended, fed.log(ended[0])
            time.sleep(0.1)
        yield found


def allow(found, tasks):
    """Each site's operator allows every one of the tasks."""
    digests = {task: load_task(f"{found.file}:{task}").digest() for task in tasks}
    for name in SITES:
        text = found.config(name).read_text().partition("[tasks.")[0]
        for number, task in enumerate(tasks):
            text += (
                f'[tasks.{task}]\ntask = "{found.file}:{task}"\nsha256 = "{digests[task]}"\n'
                f"source = [{SITES.index(name)}, {number}, {ROWS[name]}]\n"
            )
        found.config(name).write_text(text)


def columns_of(found):
    """(5,) the sum of each column in its own unit, of a statistics vector or a sum of such."""
    return np.array(
        [
            low * count + total * (high - low) / 65535
            for (_, low, high), count, total in zip(
                COLUMNS, found["wides"]["count"], found["wides"]["sum"], strict=True
            )
        ]
    )


def minus(total, *others):
    """What is left of a sum without these vectors: its wide integers and its coordinates."""
    wides = {
        name: np.subtract(values, sum(np.array(each["wides"][name]) for each in others))
        for name, values in total["wides"].items()
    }
    left = np.subtract(total["coordinates"], sum(np.array(o["coordinates"]) for o in others))
    return {"wides": wides, "coordinates": left}


def each_alone(sums):
    """site -> its own vector, from one sum without each of the sites; {} where one is missing."""
    missing = [set(SITES) - set(each["survivors"]) for each in sums]
    if sorted(map(len, missing)) != [1] * len(SITES) or set().union(*missing) != set(SITES):
        return {}
    times = len(SITES) - 1  # each site is in so many of the sums
    whole = {
        "wides": {
            name: sum(np.array(each["wides"][name]) for each in sums) // times
            for name in sums[0]["wides"]
        },
        "coordinates": sum(np.array(each["coordinates"]) for each in sums) // times,
    }
    return {name: minus(whole, each) for (name,), each in zip(missing, sums, strict=True)}


def is_vector(found, sent):
    """Whether these are exactly the integers that a site put into its vector.

    Marks, of which a vector has a place for each site, are no secret of its rows and are left out.
    """
    same = [
        np.array_equal(found["wides"][name], values)
        for name, values in sent["wides"].items()
        if name != "exceeds"
    ]
    return all(same) and np.array_equal(found["coordinates"], sent["coordinates"])
