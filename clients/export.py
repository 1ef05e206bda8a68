"""`fed-site model`: the model this site was released, as a file that predicts on raw rows.

Under the default protection only the sites have it. The file is the one `fedcore simulate` writes:
safetensors, with the statistics and columns that raw rows go through first (`learning/saved.py`).

Invariant: only a certified state is exported, the one the site trains from; it is read, never changed.
"""

from dataclasses import dataclass
from pathlib import Path

from fedcore_clients.app import RECIPE_FILE, job_folder, require_job
from fedcore_clients.config import SiteConfig
from fedcore_clients.state_files import StateFiles

from fedcore.config import build_job
from fedcore.errors import BadInput, Refused
from fedcore.files import read_json, write_atomic
from fedcore.identity.identities import read_identity
from fedcore.learning.data.split import split_from_json
from fedcore.learning.model import single_thread
from fedcore.learning.site import SiteTrainer
from fedcore.learning.state import JobState
from fedcore.learning.task import load_task
from fedcore.results import JsonRecord
from fedcore.secagg.protocol.schedule import released_round
from fedcore.types import SiteId


@dataclass(frozen=True)
class Exported(JsonRecord):
    """What was written. round: of training, after which the model was released."""

    path: str
    round: int
    model_sha256: str


def export_model(config: SiteConfig, name: str, out: Path) -> Exported:
    """Write the last released model of a job. Raises BadInput, UnknownName, Refused, TaskFailed."""
    known = [path.parent.name for path in job_folder(config.folder, "").glob(f"*/{RECIPE_FILE}")]
    require_job(name, known, "`fed-site jobs` lists the jobs this site was offered")
    folder = job_folder(config.folder, name)
    recipe, path = read_json(folder / RECIPE_FILE), StateFiles(folder).current
    state = JobState.from_bytes(path.read_bytes()) if path.is_file() else None
    done = state.done if state else None
    if state is None or done is None or not released_round(done):
        raise BadInput(
            f"job {name}: found no released model at this site, expected one round to be over",
            remedy="`fed-site status` shows how far it is",
        )
    allowed = config.tasks.get(recipe["task"])
    if allowed is None:
        raise Refused(
            f"job {name}: found its task {recipe['task']!r} not in site.toml, expected [tasks.{recipe['task']}]",
            remedy="the architecture comes from the task: allow it again",
        )
    task = load_task(allowed.task, config.base)
    if task.digest() != recipe["task_sha256"]:
        raise Refused(
            f"job {name}: found {allowed.task} changed since it trained, expected sha256 "
            f"{recipe['task_sha256']}",
            remedy="install the version of the task that trained this model; `fed-site check` prints hashes",
        )
    job = build_job(recipe["settings"])
    cap = job.protect.max_examples
    assert cap is not None
    split = split_from_json(config.split.of(read_identity(config.identity)))
    with single_thread():
        site = SiteTrainer.load(task, job, SiteId(config.site), allowed.source, cap, split)
        data = site.exported(state)
    write_atomic(out, data)
    return Exported(str(out), released_round(done), state.model_sha256)
