"""A town whose sites train a task: what `town.py` draws by chance is computed, in this process."""

from __future__ import annotations

import json
import threading

from fedcore_clients.trainer import Training, _answer_of
from fedcore_clients.worker import Worker
from town import SITES, Town

from fedcore.config import build_job, wire_settings
from fedcore.learning.data.split import FoldSplit
from fedcore.learning.task import load_task
from fedcore.secagg.plan import canonical
from fedcore.secagg.protocol import job_messages

ONE_AT_A_TIME = threading.Lock()
"""Python 3.11 miscounts the depth of what two threads parse at once, as np.load does with the header of an array."""


class InThisProcess(Training):
    """The training process of one life of a site, without a process: what it held is lost with it."""

    def __init__(self, task, site, source):
        super().__init__()
        self.task, self.site, self.source, self.worker = task, site, source, Worker()

    async def load(self, job, settings, task, digest):
        return await self.load_task(
            job, task=self.task, base="/", digest=digest, settings=settings, site=self.site,
            source=self.source, split=FoldSplit().to_json(),
        )  # fmt: skip

    def _turn(self, asked, blobs, needs):
        with ONE_AT_A_TIME:
            head, found = self.worker.answer(
                json.loads(json.dumps(asked)), [bytes(b) for b in blobs]
            )
        return _answer_of(json.loads(json.dumps(head)), found)


class TrainedTown(Town):
    """Four sites that train a task, named as `load_task` takes it. sources: of the sites' rows."""

    def __init__(self, folder, pool, task, settings, sources):
        super().__init__(folder, pool)
        loaded = load_task(task)
        self.task, self.sources, self.rules = (
            task,
            sources,
            {"tasks": {loaded.name: loaded.digest()}},
        )
        self.settings = wire_settings(build_job(loaded.defaults, settings))
        about = canonical(self.settings)
        self.offer = job_messages.JobOffer("job", loaded.name, loaded.digest(), about)

    def contributor(self, name):
        return InThisProcess(self.task, name, self.sources[name])

    def kept(self, name):
        """What a site has kept for its next round: in its journal, and in files."""
        files = sorted((self.folder / name / "states" / "job").glob("app-*"))
        return self.journals[name].get("job", "app"), files

    async def play(self, look=lambda found: None, **kill):
        """A whole job; (the model of every site, commits of site b). look: called after the second round was begun;
        kill: when site b dies."""
        try:
            for name in SITES:
                self.start(name, **(kill if name == "b" else {}))
            self.start_hub()
            await self.run(
                until=lambda: len(self.hub.facts.rounds.known) >= 2 if self.hub else False
            )
            look(self)
            await self.run()
            assert self.deaths == (["b"] if kill else [])
            await self.run(until=lambda: all(self.kept(name) == (None, []) for name in SITES))
            models = {site.job.state.model_sha256 for site in self.sites.values()}
            return models, self.journals["b"].writes
        finally:
            await self.close()
