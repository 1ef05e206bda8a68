"""`workers`: processes train and score the sites of a simulation, to the bits of one process, a killed one or not."""

from __future__ import annotations

import multiprocessing
import os
import signal
from contextlib import closing

import numpy as np
import pytest
from torch import nn

import fedcore
from fedcore.errors import BadInput, TaskFailed
from fedcore.experiment.environment import usable_cores
from fedcore.experiment.prepare import job_for, prepare
from fedcore.experiment.workers import LEAST, MOST, pieces

pytestmark = pytest.mark.usefixtures("no_drawings")

SITES = {f"s{number:02d}": number for number in range(40)}
HERE = os.getpid()


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def data(site):
    rng = np.random.default_rng(site)
    x = rng.normal(size=(9 + site % 13, 4)).astype("f4")
    return x, (x[:, 0] > 0).astype("i8")


def prepared(workers=None, loss=nn.functional.cross_entropy, **settings):
    task = fedcore.Task("t", data, lambda: nn.Linear(4, 2), loss, metrics=("accuracy",))
    given = {
        "sites": SITES, "rounds": 2, "sum": "exact", "protection": "masked", "arms": ("federated",), "cohort": 36,
        "batch_size": 4, "folds": 3,
    }  # fmt: skip
    run = prepare(*job_for(task, given | settings))
    if workers is not None:
        run.federation.use_workers(workers)
    return run


def outcome(run):
    """States, reports and scores of all rounds."""
    federation, found = run.federation, []
    with closing(federation):
        while federation.step is not None:
            release = federation.advance()
            scores = federation.executor.scores(federation.sites, federation.state, 1)
            scored = [(s.outputs.tobytes(), s.loss) for s in scores if s is not None]
            found.append(
                (release.state.canonical(), release.reports, release.total.opened.wides, scored)
            )
    return found


@pytest.mark.parametrize("executor", ["sequential", "batched"])
def test_any_number_of_workers_gives_the_states_reports_and_scores_of_one_process(executor):
    expected = outcome(prepared(executor=executor))
    assert len(expected) == 4  # range, two rounds, metrics
    for workers in (1, 2, 3):
        assert outcome(prepared(workers, executor=executor)) == expected
    assert not multiprocessing.active_children()


def dying(times, path):
    """A loss whose process is killed so often, in workers only."""

    def loss(outputs, targets):
        if os.getpid() != HERE and len(list(path.glob("died-*"))) < times:
            (path / f"died-{os.getpid()}").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return nn.functional.cross_entropy(outputs, targets)

    return loss


def test_the_sites_of_a_killed_worker_are_trained_by_another_to_the_same_bits(tmp_path):
    expected = outcome(prepared())
    assert outcome(prepared(2, dying(1, tmp_path))) == expected
    assert len(list(tmp_path.glob("died-*"))) == 1


def test_a_run_whose_workers_are_killed_again_and_again_ends_with_an_error_and_no_process(tmp_path):
    with pytest.raises(
        BadInput, match=r"13 sites \(s12, .*\) was killed by SIGKILL, and so did"
    ) as refused:
        outcome(prepared(1, dying(1000, tmp_path), cohort=40))
    assert "fewer --workers" in refused.value.remedy
    assert not multiprocessing.active_children()


def test_what_the_task_raises_in_a_worker_is_raised_as_in_one_process():
    def loss(outputs, targets):
        if len(targets) == 3:
            raise ZeroDivisionError("no rows of this kind")
        return nn.functional.cross_entropy(outputs, targets)

    said = []
    for workers in (None, 2):
        with pytest.raises(TaskFailed, match="no rows of this kind") as raised:
            outcome(prepared(workers, loss, range=1.0))
        said.append(type(raised.value))
    assert said[0] is said[1]


REFUSED = {
    "the protocol": ({"sum": "full", "cohort": None, "protection": "encrypted"}, "--sum exact"),
    "vectors that are shown": ({"protection": "plain", "cohort": None}, "'plain' and no cohort"),
    "groups of sites": ({"aggregate": "trimmed", "cohort": None}, r"groups of sites \(round.aggregate\)"),
    "an algorithm that keeps values": ({"algorithm": "scaffold"}, "'scaffold' keeps values at each site"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_needs_one_process_is_refused(what):
    settings, said = REFUSED[what]
    with pytest.raises(BadInput, match=said):
        prepared(2, **settings)


def test_simulate_says_how_many_workers_there_were_and_refuses_none(tmp_path):
    task = fedcore.Task(
        "t", data, lambda: nn.Linear(4, 2), nn.functional.cross_entropy, metrics=("accuracy",)
    )
    settings = {"sites": SITES, "rounds": 1, "sum": "exact", "arms": ("federated",), "cohort": 36}
    with pytest.raises(BadInput, match="workers: found 0, expected 1 or more"):
        fedcore.simulate(task, workers=0, out=tmp_path / "none", **settings)
    assert not (tmp_path / "none").exists()
    many = usable_cores() + 1
    run = fedcore.simulate(task, workers=many, out=tmp_path / "run", **settings)
    assert run.result.executor == {"name": "sequential", "workers": many}
    assert any(f"{many} workers take turns on" in text for text in run.result.warnings)
    assert not multiprocessing.active_children()


def test_pieces_follow_from_the_sites_alone_and_are_of_about_one_size():
    sites = prepared().federation.sites
    found = pieces(sites)
    assert [[s.site.id for s in piece] for piece in pieces(sites[::-1])] == [
        [s.site.id for s in piece] for piece in found
    ]
    assert sorted(s.site.id for piece in found for s in piece) == list(SITES)
    rows = [len(s.site.train) for piece in found for s in piece]
    assert rows == sorted(rows, reverse=True)
    for count in (1, 15, 40, 100, 129, 1000):
        sizes = [len(piece) for piece in pieces([*sites * 25][:count])]
        assert sum(sizes) == count and max(sizes) - min(sizes) <= 1 and max(sizes) <= MOST
        assert len(sizes) == 1 or min(sizes) > LEAST // 2
    assert pieces([]) == []
