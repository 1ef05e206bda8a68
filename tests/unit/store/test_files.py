"""Files appear whole or not at all, and a failure names its own cause."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.full_disk import no_file_beyond

from fedcore.files import WatchedFile, write_atomic


def test_a_failed_write_leaves_the_former_file_and_nothing_beside(tmp_path):
    path = tmp_path / "result.json"
    write_atomic(path, b"former")

    with pytest.raises(OSError, match="File too large") as failed, no_file_beyond(1000):
        write_atomic(path, bytes(2000))
    assert failed.value.filename == str(path)
    assert path.read_bytes() == b"former"
    assert list(tmp_path.iterdir()) == [path]


def test_the_clean_up_does_not_hide_the_cause(tmp_path, stand_in):
    def refused(*_, **__):
        raise PermissionError("the folder became read-only")

    stand_in(Path, unlink=refused)
    with pytest.raises(OSError, match="File too large"), no_file_beyond(1000):
        write_atomic(tmp_path / "result.json", bytes(2000))


def test_a_watched_file_changes_when_it_is_written_replaced_or_removed(tmp_path):
    path = tmp_path / "policy.toml"
    watched = WatchedFile(path)
    assert watched.changed(), "a file that is missing is looked at once, so that its reader says so"
    assert not watched.changed()
    for change in (
        lambda: path.write_bytes(b"1"), lambda: write_atomic(path, b"2"), path.unlink,
    ):  # fmt: skip
        change()
        assert watched.changed()
        assert not watched.changed()


def test_a_watched_file_that_was_read_already_has_not_changed(tmp_path):
    path = tmp_path / "policy.toml"
    path.write_bytes(b"1")
    watched = WatchedFile(path)
    watched.known()
    assert not watched.changed()
    assert not WatchedFile(None).changed()
