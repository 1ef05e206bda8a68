"""Files appear whole or not at all, and a failure names its own cause."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.full_disk import no_file_beyond

from fedcore.files import write_atomic


def test_a_failed_write_leaves_the_former_file_and_nothing_beside(tmp_path):
    path = tmp_path / "result.json"
    write_atomic(path, b"former")

    with pytest.raises(OSError, match="File too large") as failed, no_file_beyond(1000):
        write_atomic(path, bytes(2000))
    assert failed.value.filename == str(path)
    assert path.read_bytes() == b"former"
    assert list(tmp_path.iterdir()) == [path]


def test_the_clean_up_does_not_hide_the_cause(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError("the folder became read-only")

    monkeypatch.setattr(Path, "unlink", refused)
    with pytest.raises(OSError, match="File too large"), no_file_beyond(1000):
        write_atomic(tmp_path / "result.json", bytes(2000))
