"""The models that jobs gave the coordinator, `jobs/JOB/model.safetensors`, encrypted where there is a keystore.

Invariant: with a sealer each file is encrypted for its own job; `result` gives its content over TLS, to holders of an
operator's or observer's certificate.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from fedcore.files import write_atomic
from fedcore.files.disk import sync_folder
from fedcore.store.sealed_files import FORM, FileSealer, in_clear, is_sealed_file, sealed

JOBS_FOLDER, MODEL_FILE = "jobs", "model.safetensors"


class SealedModels:
    """sealer: what they are encrypted with; None: they are in clear."""

    def __init__(self, sealer: FileSealer | None) -> None:
        self._sealer = sealer

    def content(self, path: Path, parts: Iterable[bytes]) -> Iterable[bytes]:
        """What is written into a job's file."""
        return parts if self._sealer is None else self._sealer.seal(parts, *_place(path))

    def restored(self, path: Path, data: bytes) -> Iterable[bytes]:
        """What is written into a job's file of one that another machine wrote. data: as it was there."""
        return (data,) if data.startswith(FORM) else self.content(path, (data,))

    def open(self, path: Path) -> BinaryIO:
        """A job's file, to be read in clear. Raises StoreProblem for one that was not written for this job, or is
        encrypted where there is no keystore; OSError."""
        if self._sealer is not None:
            return self._sealer.reader(path, *_place(path))
        if is_sealed_file(path):
            raise sealed(path)
        return path.open("rb")


def _place(path: Path) -> tuple[str, ...]:
    return JOBS_FOLDER, path.parent.name, path.name


def all_models(folder: Path) -> Iterator[Path]:
    """Every model below the coordinator's folder."""
    yield from sorted((folder / JOBS_FOLDER).glob(f"*/{MODEL_FILE}"))


def remove_torn(folder: Path) -> None:
    """Remove what a killed process began: unused, and perhaps in clear."""
    for path in (folder / JOBS_FOLDER).glob(f"*/.{MODEL_FILE}.*"):
        path.unlink()


def require_sealed_models(folder: Path, sealer: FileSealer | None) -> None:
    """Raise StoreProblem for a model in clear where there is a sealer, or an encrypted one where there is none."""
    remove_torn(folder)
    for path in all_models(folder):
        if is_sealed_file(path) != (sealer is not None):
            raise in_clear(path) if sealer is not None else sealed(path)


def seal_models(folder: Path, sealer: FileSealer) -> list[Path]:
    """Encrypt the models that are in clear, each replaced whole: which. Raises OSError."""
    remove_torn(folder)
    found = [path for path in all_models(folder) if not is_sealed_file(path)]
    for path in found:
        with path.open("rb") as file:
            write_atomic(path, sealer.seal(iter(lambda: file.read(1 << 20), b""), *_place(path)))
        sync_folder(path.parent)
    return found
