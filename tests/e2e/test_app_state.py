"""A Flower app's Context.state at deployed sites: kept through the death of a process, and erased with the job."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

pytest.importorskip("flwr")

from fedcore_clients.trainer import Training, _answer_of
from fedcore_clients.worker import Worker
from support.flower_apps import MOMENTUM, flower_app
from town import SITES, Town

import fedcore
from fedcore.config import build_job, wire_settings
from fedcore.learning.data.split import FoldSplit
from fedcore.learning.model import single_thread
from fedcore.learning.task import load_task
from fedcore.secagg.plan import canonical
from fedcore.secagg.protocol import job_messages

SETTINGS = {
    "protection": "encrypted", "rounds": 3, "bits": 16, "range": 4.0, "adaptive_range": False, "max_examples": 16,
    "resamples": 0,
}  # fmt: skip
SOURCES = {name: {"partition-id": k, "num-partitions": 4} for k, name in enumerate(SITES)}


ONE_AT_A_TIME = threading.Lock()
"""Python 3.11 miscounts the depth of what two threads parse at once, as np.load does with the header of an array."""


class InThisProcess(Training):
    """The training process of one life of a site, without a process: what it held is lost with it."""

    def __init__(self, task, site):
        super().__init__()
        self.task, self.site, self.worker = task, site, Worker()

    async def load(self, job, settings, task, digest):
        return await self.load_task(
            job, task=self.task, base="/", digest=digest, settings=settings, site=self.site,
            source=SOURCES[self.site], split=FoldSplit().to_json(),
        )  # fmt: skip

    def _turn(self, asked, blobs, needs):
        with ONE_AT_A_TIME:
            head, found = self.worker.answer(
                json.loads(json.dumps(asked)), [bytes(b) for b in blobs]
            )
        return _answer_of(json.loads(json.dumps(head)), found)


class Clinics(Town):
    """Four sites that train a Flower app."""

    def __init__(self, folder, pool, app):
        super().__init__(folder, pool)
        task = load_task(f"flower:{app}")
        self.app, self.rules = app, {"tasks": {task.name: task.digest()}}
        self.settings = wire_settings(build_job(task.defaults, SETTINGS))
        about = canonical(self.settings)
        self.offer = job_messages.JobOffer("job", task.name, task.digest(), about)

    def contributor(self, name):
        return InThisProcess(f"flower:{self.app}", name)

    def kept(self, name):
        """What a site has of the app's state: in its journal, and in files."""
        files = sorted((self.folder / name / "states" / "job").glob("app-*"))
        return self.journals[name].get("job", "app"), files


async def trained(folder, pool, app, look=lambda found: None, **kill):
    """A whole job; (the model of every site, commits of site b). kill: when site b dies."""
    found = Clinics(folder, pool, app)
    try:
        for name in SITES:
            found.start(name, **(kill if name == "b" else {}))
        found.start_hub()
        await found.run(
            until=lambda: len(found.hub.facts.rounds.known) >= 2 if found.hub else False
        )
        look(found)
        await found.run()
        assert found.deaths == (["b"] if kill else [])
        await found.run(until=lambda: all(found.kept(name) == (None, []) for name in SITES))
        models = {site.job.state.model_sha256 for site in found.sites.values()}
        return models, found.journals["b"].writes
    finally:
        await found.close()


@pytest.mark.parametrize("large", [False, True], ids=["in the journal", "in a file"])
def test_state_survives_the_death_of_a_site_and_gives_the_model_of_the_simulation(
    tmp_path, pool, large
):
    """Site b dies before and after commits of its journal: a round that it trains again starts from the state before
    that round, so that no momentum is added twice."""
    app = flower_app(
        tmp_path / "app",
        client=MOMENTUM.replace("LENGTH = 2", f"LENGTH = {20_000 if large else 2}"),
    )

    def look(found):
        kept, files = found.kept("b")
        assert kept
        assert len(files) in ((1, 2) if large else (0,))

    with single_thread():
        run = fedcore.simulate(f"flower:{app}", sites=SOURCES, out=tmp_path / "run", **SETTINGS)
        models, commits = asyncio.run(trained(tmp_path / "whole", pool, app, look))
        assert models == {run.result.model_sha256}
        for at in (commits // 3, commits // 2 + large):
            folder, late = tmp_path / str(at), bool(at % 2)
            models, _ = asyncio.run(trained(folder, pool, app, at=at, late=late))
            assert models == {run.result.model_sha256}, at
