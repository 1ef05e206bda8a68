"""Files appear whole or not at all, and a failure names its own cause."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from fedcore.files import write_atomic


def test_a_failed_write_leaves_the_former_file_and_nothing_beside(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_atomic(path, b"former")

    def full(_):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left") as failed:
        write_atomic(path, b"new")
    assert failed.value.filename == str(path)
    assert path.read_bytes() == b"former"
    assert list(tmp_path.iterdir()) == [path]


def test_the_clean_up_does_not_hide_the_cause(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "no space left on device")

    def refused(*_, **__):
        raise PermissionError("the folder became read-only")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(OSError, match="no space left"):
        write_atomic(tmp_path / "result.json", b"new")
