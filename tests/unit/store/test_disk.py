"""Files and folders of a party are its user's alone, whatever the umask and whoever made them before."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from fedcore.errors import StoreProblem
from fedcore.files.disk import close_to_others, flushed_beside, open_to_others


@pytest.fixture(autouse=True)
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def mode(path):
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture
def folder(tmp_path):
    found = tmp_path / "state"
    (found / "jobs" / "one").mkdir(parents=True)
    (found / "jobs" / "one" / "rounds.jsonl").write_text("{}\n")
    (found / "status.json").write_text("{}")
    (found / "bin").mkdir()
    return found


def test_what_is_open_to_others_is_found(folder):
    found = set(open_to_others(folder, ("jobs", "status.json")))
    jobs = folder / "jobs"
    one = jobs / "one"
    assert found == {folder, jobs, one, one / "rounds.jsonl", folder / "status.json"}
    assert open_to_others(folder / "none", ("jobs",)) == []


def test_it_is_closed_and_new_files_are_too(folder, caplog):
    close_to_others(folder, ("jobs", "status.json"))
    assert open_to_others(folder, ("jobs", "status.json")) == []
    assert (mode(folder), mode(folder / "status.json")) == (0o700, 0o600)
    assert "found 5 files and folders open to other users" in caplog.text
    (folder / "jobs" / "one" / "later.json").write_text("{}")
    (folder / "later").mkdir()
    assert mode(folder / "jobs" / "one" / "later.json") == 0o600
    assert mode(folder / "later") == 0o700
    caplog.clear()
    close_to_others(folder, ("jobs", "status.json"))
    assert not caplog.text


def test_what_is_not_named_and_the_owners_rights_stay(folder):
    tool = folder / "jobs" / "tool"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    close_to_others(folder, ("jobs",))
    assert (mode(tool), mode(folder / "bin")) == (0o700, 0o755)


def test_links_are_not_followed(folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "file").write_text("")
    (folder / "jobs" / "link").symlink_to(elsewhere)
    close_to_others(folder, ("jobs",))
    assert (mode(elsewhere), mode(elsewhere / "file")) == (0o755, 0o644)


PROC = Path("/proc/self")


@pytest.mark.skipif(not PROC.exists(), reason="no folder here whose mode not even root may change")
def test_a_folder_that_cannot_be_closed_is_a_store_problem():
    with pytest.raises(StoreProblem, match="unusable") as caught:
        close_to_others(PROC, ("task",))
    assert "give this user the right" in caught.value.remedy


def test_a_flush_runs_while_the_block_does_and_before_what_follows_it():
    inside, done = threading.Event(), []
    with flushed_beside(lambda: done.append(inside.wait(60))):
        assert not done  # it waits for the block: one after the other would never get there
        inside.set()
    assert done == [True]


def test_what_a_flush_or_its_block_raises_is_raised_and_the_flush_has_ended():
    done = []

    def refuse():
        done.append("flush")
        raise StoreProblem("audit: found no room")

    with pytest.raises(StoreProblem, match="audit"), flushed_beside(refuse):
        done.append("block")
    assert sorted(done) == ["block", "flush"]
    with pytest.raises(ValueError, match="block"), flushed_beside(refuse):
        raise ValueError("block")
    assert sorted(done) == ["block", "flush", "flush"]
