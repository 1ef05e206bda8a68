"""The operator's approval of jobs, where `jobs = "ask"`: one small file for each approved job.

`fed-site approve` writes it and the running process polls for it, so neither waits for the other. Invariant: a file
approves one offer, by its SHA-256, and no other offer under the same id. Files are written atomically, for this user
only.
"""

import hashlib
import time
from pathlib import Path

from fedcore.files import read_json, write_json
from fedcore.secagg.protocol.job_messages import JobOffer
from fedcore.secagg.protocol.wire_form import encode
from fedcore.store.disk import close_to_others, make_folder, sync_folder

FOLDER = "approvals"


def offer_digest(offer: JobOffer) -> str:
    """SHA-256 over an offer: id, task, the task's hash, settings."""
    return hashlib.sha256(encode(offer)).hexdigest()


def _path(folder: Path, job: str) -> Path:
    return folder / FOLDER / f"{job}.json"


def is_approved(folder: Path, offer: JobOffer) -> bool:
    """Whether exactly this offer was approved. Raises BadInput for a file that cannot be read."""
    path = _path(folder, offer.job)
    return path.is_file() and read_json(path).get("offer") == offer_digest(offer)


def approve_offer(folder: Path, job: str, digest: str) -> None:
    """Approve the offer of this id and digest; durable on return. Raises StoreProblem."""
    path = _path(folder, job)
    make_folder(path.parent)
    close_to_others(folder, (FOLDER,))
    write_json(path, {"job": job, "offer": digest, "approved": time.time()})
    sync_folder(path.parent)
