"""The four hospitals of `heart` as `fedcore up` deploys them, with what the tests patch in.

with hospitals(folder, rounds=30) as town:
    job = town.submit(rounds=20)
    town.wait(job)
    town.held("hungary", job)          # the state in that hospital's own files
"""

from __future__ import annotations

import contextlib
import json
import sys

from deployment import Deployment
from safetensors import safe_open
from support.lying_site import steering
from support.unguarded_site import unguarded

from fedcore.cli.up import _write
from fedcore.experiment.prepare import job_for, prepare
from fedcore.identity.kit import Kit
from fedcore.learning.data.statistics import Statistics
from fedcore.learning.state import JobState
from fedcore.local_deployment import running

LIAR = "va"


class Hospitals(Deployment):
    """A deployment of `fedcore up` that runs. files: what `up` wrote; notes: the folder of what attackers
    write down; asked: the settings of each job, unless it has others."""

    def __init__(self, asked, prepared, files, notes):
        super().__init__(files.folder, "heart", dict(prepared.task.sites), files.port)
        self.asked, self.trial, self.files, self.notes = asked, prepared, files, notes

    def kit(self, role, name):
        """The operator's, which `up` made."""
        return Kit.load(self.files.folder / role / "kit")

    def log(self, name):
        """Everything a party said."""
        return self.files.log("coordinator" if name == "hub" else name).read_text(errors="replace")

    def state(self, name):
        """What a party keeps."""
        return self.files.state("coordinator" if name == "hub" else name)

    def submit(self, **settings):
        """The operator submits a job; its id."""
        return super().submit(**{**self.asked, **settings})

    def held(self, site, job):
        """The state that a site has in its own files."""
        path = self.state(site) / "states" / job / "current.safetensors"
        return JobState.from_bytes(path.read_bytes())

    def given(self, job):
        """The statistics in the model that a job gave to the coordinator."""
        path = self.state("hub") / "jobs" / job / "model.safetensors"
        with safe_open(path, "np") as file:
            about = json.loads(file.metadata()["fedcore"])
        return Statistics.from_json(about["statistics"])


@contextlib.contextmanager
def hospitals(folder, **asked):
    """Deploy heart with these settings and run it: every site's rules can be switched off, one site lies
    where it is asked to."""
    notes = folder / "notes"
    notes.mkdir()
    task, job = job_for(None, {"task": "heart", "seed": 0, **asked})
    prepared = prepare(task, job)
    files = _write(prepared, folder / "deployment")
    commands = {name: _patched(name, line, notes) for name, line in files.commands().items()}
    with running(files, commands):
        found = Hospitals(asked, prepared, files, notes)
        found.connected()
        yield found


def _patched(name, line, notes):
    """The same command line, with Python before it."""
    if "fedcore_clients.cli" not in line:
        return line
    patch = unguarded(notes) + (steering(notes) if name == LIAR else "")
    words = line[line.index("fedcore_clients.cli") + 1 :]
    code = f"{patch}\nfrom fedcore_clients.cli import main\nmain()\n"
    return [sys.executable, "-P", "-c", code, *words]
