"""The journal: durable and whole at every kill, held by one process, and secrets gone when removed.

Tests that take `place` run on an SQLite file and on a PostgreSQL server; those that take `path` are of the file.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import traceback
from pathlib import Path

import pytest
from sqlalchemy import text as sql
from support.journals import PostgresqlPlace, SqlitePlace, opened

from fedcore.errors import StoreProblem
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.protocol.round.site import Exchange, Secrets, SiteProgress
from fedcore.secagg.protocol.wire_form import encode
from fedcore.store import sqlite as module
from fedcore.store.database import SCHEMA, Compiled
from fedcore.store.journal import Journal

TESTS = Path(__file__).resolve().parents[2]
PRELUDE = f"""
import os, resource, sys
sys.path.insert(0, {str(TESTS)!r})
from support.journals import opened
from pathlib import Path
from fedcore.errors import StoreProblem
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.protocol.round.site import SiteProgress
from fedcore.secagg.protocol.round.site import Secrets
from fedcore.store.journal import Journal
path = Path(sys.argv[1])
"""


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A real process on a real journal; `-u`, so that what it says is said at once."""
    return subprocess.Popen(
        [sys.executable, "-u", "-c", PRELUDE + textwrap.dedent(code), *map(str, arguments)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


def done(code: str, *arguments: object) -> list[str]:
    process = child(code, *arguments)
    lines = process.communicate(timeout=300)[0].splitlines()
    assert process.returncode == 0
    return lines


def secret_of(body: bytes) -> Secrets:
    return Secrets(SecretBytes(body), SecretBytes(b""), SecretBytes(b""))


def all_bytes(path: Path) -> bytes:
    return b"".join(each.read_bytes() for each in sorted(path.parent.iterdir()))


def numbers(journal: Journal, stream: str = "round") -> list[int]:
    return [standing.round for standing in journal.read("job", stream)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "site" / "journal.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def place(request, tmp_path):
    """Where a journal of either kind is made."""
    if request.param == "sqlite":
        return SqlitePlace(tmp_path)
    return PostgresqlPlace(request.getfixturevalue("postgres"))


# -------------------------------------------------------------------------------- what is kept


def test_streams_come_back_as_they_were_written(place):
    records = [SiteProgress(1, b"k"), secret_of(b"s" * 32), Exchange("Keys", b"d", b"")] * 50
    with opened(place.where) as journal:
        journal.append("job", "round", records[:1], put={"state": b"one"})
        journal.append("job", "round", records[1:], put={"state": b"two"})
        journal.append("b", "epoch", records[:2])
    with opened(place.where) as journal:
        assert [encode(each) for each in journal.read("job", "round")] == list(map(encode, records))
        assert list(journal.read("job", "epoch")) == []
        assert journal.streams() == [("job", "round"), ("b", "epoch")]
        assert (journal.get("job", "state"), journal.get("b", "state")) == (b"two", None)
        assert journal.keys("job") == ["state"] and journal.keys("b") == []
        assert journal.verify() == len(records) + 2
        journal.compact(
            "job", "round", [SiteProgress(2, b"k")], put={"next": b"n"}, forget=["state"]
        )
        assert list(journal.read("job", "round")) == [SiteProgress(2, b"k")]
        assert journal.keys("job") == ["next"]
        assert journal.streams() == [("b", "epoch"), ("job", "round")]


def test_a_record_that_has_no_byte_form_leaves_nothing_behind(place):
    with opened(place.where) as journal:
        with pytest.raises(TypeError):
            journal.append("job", "round", [SiteProgress(1, b""), object()], put={"key": b"value"})
        assert journal.verify() == 0 and journal.keys("job") == []


def test_calls_from_many_threads_wait_for_each_other(place):
    with opened(place.where) as journal:

        def work(stream: str) -> None:
            for number in range(20):
                journal.append("job", stream, [SiteProgress(0, b"", number)] * 2)
                assert len(numbers(journal, stream)) == 2 * (number + 1)

        threads = [threading.Thread(target=work, args=(f"s{each}",)) for each in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert journal.verify() == 4 * 40


def test_every_commit_is_synced_and_files_are_private(path):
    with Journal.open(path, party="va") as journal:
        settings = [
            journal._database._run(f"PRAGMA {name}") for name in ("synchronous", "journal_mode")
        ]
        assert settings == [2, "wal"]  # FULL: a sync of the log in every commit
        journal.append("job", "round", [SiteProgress(1, b"")])
        assert {each.stat().st_mode & 0o777 for each in path.parent.iterdir()} == {0o600}
        assert path.parent.stat().st_mode & 0o777 == 0o700


# ------------------------------------------------------------------------------------- crashes

WRITER = """
with opened(sys.argv[1]) as journal:
    number = int((journal.get("job", "last") or b"0"))
    print("open", flush=True)
    while True:
        number += 1
        group = [SiteProgress(0, os.urandom(int(sys.argv[2])), number)] * 3
        journal.append("job", "round", group, put={"last": b"%d" % number})
        print(number, flush=True)
"""


@pytest.mark.parametrize(
    ("place", "size", "kills"),
    [("sqlite", 10, 4), ("sqlite", 20_000, 4), ("postgresql", 20_000, 2)],
    indirect=["place"],
)
def test_killed_at_any_instant_all_that_was_reported_is_there_and_nothing_by_half(
    place, size, kills
):
    reported, rng = 0, random.Random(size)
    for _ in range(kills):
        process = child(WRITER, place.where, size)
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        lines = [process.stdout.readline() for _ in range(rng.randrange(2, 20))]
        time.sleep(rng.uniform(0, 0.01))
        process.kill()
        lines += process.stdout.read().splitlines()
        assert process.wait() == -signal.SIGKILL
        reported = int(lines[-1])
        with opened(place.where) as journal:
            journal.verify()
            found, last = numbers(journal), int(journal.get("job", "last") or b"0")
        assert found == [number for number in range(1, last + 1) for _ in range(3)]
        assert last in {reported, reported + 1}  # the last one may have been on its way
        reported = last
    assert reported > kills


# -------------------------------------------------------------------------------------- secrets


def history(journal: Journal, path: Path, rng: random.Random, steps: int) -> tuple[int, int]:
    """Records of many sizes in streams that grow and are removed: how many secrets were removed, and
    how many of them were still in some file right after a removal."""
    live: dict[str, list[bytes]] = {}
    gone: list[bytes] = []
    left = 0
    for _ in range(steps):
        stream = f"s{rng.randrange(6)}"
        if rng.random() < 0.85 or stream not in live:
            secret = rng.randbytes(16)
            body = rng.randbytes(rng.choice([10, 40, 100, 300, 700])) + secret
            journal.append("job", stream, [secret_of(body)])
            live.setdefault(stream, []).append(secret)
            continue
        gone += live.pop(stream)
        journal.compact("job", stream)
        data = all_bytes(path)
        left += sum(each in data for each in gone)
        assert all(each in data for secrets in live.values() for each in secrets)  # the control
    return len(gone), left


@pytest.mark.parametrize(("seed", "steps"), [(0, 200), (1, 500)])
def test_removed_secrets_are_in_no_file(path, seed, steps):
    """SQLite's secure_delete alone left some of them in five of six such histories."""
    with Journal.open(path, party="va") as journal:
        gone, left = history(journal, path, random.Random(seed), steps)
    assert gone > 100 and left == 0


@pytest.mark.parametrize(("part", "seed", "steps"), [("scrub", 0, 100), ("_rewrite", 1, 400)])
def test_without_either_part_of_an_erasure_they_would_still_be_there(
    path, without, part, seed, steps
):
    without(module.SqliteFile, part)
    with Journal.open(path, party="va") as journal:
        assert history(journal, path, random.Random(seed), steps)[1] > 0


def test_values_and_what_they_replaced_are_gone_after_forget(path):
    old, new, kept = b"old" + os.urandom(32), b"new" + os.urandom(32), b"kept" + os.urandom(32)
    with Journal.open(path, party="va") as journal:
        journal.put("job", "payload", old)
        journal.put("job", "payload", new)
        journal.put("job", "other", kept)
        assert old in all_bytes(path) and new in all_bytes(path)
        journal.forget("job", "payload")
        data = all_bytes(path)
    assert old not in data and new not in data and kept in data


def test_what_a_kill_in_the_middle_of_a_compaction_left_goes_when_the_journal_is_opened(path):
    secret = "5ec2e7" * 8
    process = child(
        """
        journal = Journal.open(path, party="va")
        journal.append("job", "round", [Secrets(*[SecretBytes(sys.argv[2].encode())] * 3)])
        journal._database.scrub = lambda: os.kill(os.getpid(), 9)
        journal.compact("job", "round", [SiteProgress(7, b"")])
        """,
        path, secret,
    )  # fmt: skip
    assert process.wait(300) == -signal.SIGKILL
    assert secret.encode() in all_bytes(path)
    with Journal.open(path, party="va") as journal:
        assert secret.encode() not in all_bytes(path)
        assert list(journal.read("job", "round")) == [SiteProgress(7, b"")]


def test_what_is_trimmed_is_not_read_again_and_gone_for_good_later(path):
    secret, kept = secret_of(os.urandom(32)), b"kept" + os.urandom(32)
    with Journal.open(path, party="va") as journal:
        journal.append("job", "round", [secret], put={"sum": b"s", "other": kept})
        journal.append("job", "epoch", [SiteProgress(1, b"")])
        journal.trim("job", "round", put={"stage": b"now"}, forget=["sum", "never there"])
        assert list(journal.read("job", "round")) == []
        assert journal.keys("job") == ["other", "stage"] and journal.get("job", "stage") == b"now"
        assert list(journal.read("job", "epoch")) == [SiteProgress(1, b"")]
        journal.compact("job", "nothing")
        data = all_bytes(path)
    assert secret.root.reveal() not in data and kept in data


def test_what_is_trimmed_or_compacted_is_not_read_again(place):
    with opened(place.where) as journal:
        journal.append("job", "round", [SiteProgress(1, b"")], put={"sum": b"s", "other": b"o"})
        journal.append("job", "epoch", [SiteProgress(1, b"")])
        journal.trim("job", "round", put={"stage": b"now"}, forget=["sum", "never there"])
        journal.compact("job", "epoch", [SiteProgress(2, b"")], forget=["other"])
    with opened(place.where) as journal:
        assert list(journal.read("job", "round")) == []
        assert journal.keys("job") == ["stage"] and journal.get("job", "stage") == b"now"
        assert list(journal.read("job", "epoch")) == [SiteProgress(2, b"")]


def test_a_trim_is_one_commit(place):
    with opened(place.where) as journal:
        journal.append("job", "round", [SiteProgress(1, b"")], put={"sum": b"s"})
        with pytest.raises(StoreProblem):
            journal.trim("job", "round", put={"stage": object()}, forget=["sum"])  # type: ignore[dict-item]
        assert numbers(journal) == [0] and journal.get("job", "sum") == b"s"


def test_commits_are_synced_again_after_an_erasure_and_one_that_failed(path):
    def setting(journal):
        return journal._database._run("PRAGMA synchronous")

    seen = []
    with Journal.open(path, party="va") as journal:
        scrub = journal._database.scrub
        journal._database.scrub = lambda: (seen.append(setting(journal)), scrub())
        journal.append("job", "round", [SiteProgress(1, b"")])
        for erase in (
            lambda: journal.compact("job", "round"), lambda: journal.forget("job", "key"),
        ):  # fmt: skip
            erase()
            assert seen.pop() == 1 and setting(journal) == 2
            assert (path.parent / f"{path.name}-wal").stat().st_size == 0  # all is in the file
        with pytest.raises(TypeError):
            journal.compact("job", "round", [object()])
        assert setting(journal) == 2

        def refused():
            raise sqlite3.OperationalError

        journal._database.scrub = refused
        with pytest.raises(StoreProblem):
            journal.compact("job", "round")
        assert setting(journal) == 2
        journal.append("job", "round", [SiteProgress(2, b"")])


# ------------------------------------------------------------------------------------- refusals


def refusal(*arguments, **options) -> StoreProblem:
    with pytest.raises(StoreProblem) as caught:
        Journal.open(*arguments, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_second_process_is_told_the_first_ones_id(place):
    process = child("opened(sys.argv[1]); print('open'); sys.stdin.read()", place.where)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    try:
        with pytest.raises(StoreProblem, match=f"process {process.pid} ") as caught:
            opened(place.where, wait=None)
        assert "\n" not in str(caught.value)
    finally:
        process.kill()
        process.wait()
    with (  # the lock is free again
        opened(place.where),
        pytest.raises(StoreProblem, match=f"process {os.getpid()} "),
    ):
        opened(place.where, wait=None)
    opened(place.where, wait=None).close()


@pytest.mark.parametrize("version", [SCHEMA - 1, SCHEMA + 1])
def test_a_journal_of_another_version_is_refused_and_stays_as_it_is(place, version):
    opened(place.where).close()
    place.sql(f"UPDATE meta SET value = '{version}' WHERE name = 'version'")
    for _ in range(2):
        with pytest.raises(StoreProblem, match=f"found version {version}, expected {SCHEMA}"):
            opened(place.where)
    place.sql(f"UPDATE meta SET value = '{SCHEMA}' WHERE name = 'version'")
    opened(place.where).close()


def test_another_party_another_program_no_database_and_other_urls(path, tmp_path):
    Journal.open(path, party="va").close()
    assert "'va', expected 'vb'" in str(refusal(path, party="vb"))
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE patients (name TEXT)")
    database.close()
    assert "another program's tables" in str(refusal(other, party="va"))
    text = tmp_path / "text.db"
    text.write_text("this is no database at all\n" * 100)
    assert refusal(text, party="va").remedy == "the file is no journal: name another one"
    assert "URL of postgresql" in str(refusal("postgresql://host/db", party="va"))
    assert "URL of sqlite" in str(refusal("sqlite://", party="va"))
    assert "cannot be read" in str(refusal("://", party="va"))


def test_a_folder_may_have_any_name(tmp_path):
    path = tmp_path / "a b?mode=memory&c%20d#e" / "journal.db"
    with Journal.open(path, party="va") as journal:
        journal.append("job", "round", [SiteProgress(1, b"")])
        assert path.stat().st_size > 0
    with Journal.open(path, party="va") as journal:
        assert list(journal.read("job", "round")) == [SiteProgress(1, b"")]


def test_a_closed_journal_says_so(place):
    journal = opened(place.where)
    journal.close()
    journal.close()
    with pytest.raises(StoreProblem, match="found it closed"):
        journal.append("job", "round", [])


def test_a_damaged_record_is_named(place):
    with opened(place.where) as journal:
        journal.append("job", "round", [SiteProgress(1, b""), SiteProgress(2, b"")])
    for change in ("body = substr(body, 1, 1)", "kind = 'Idle'"):
        place.sql(f"UPDATE records SET {change} WHERE id = 2")
        with opened(place.where) as journal:
            found = journal.read("job", "round")
            assert next(found) == SiteProgress(1, b"")
            with pytest.raises(StoreProblem, match="record 2"):
                next(found)


def test_a_folder_that_may_not_be_written_to(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    tmp_path.chmod(0o755)
    lines = done(
        """
        Journal.open(Path(sys.argv[2]) / "journal.db", party="va").close()  # loads what it needs
        if os.getuid() == 0:
            os.setuid(65534)
        try:
            Journal.open(path, party="va")
        except StoreProblem as error:
            print(error)
            print(error.remedy)
        """,
        closed / "journal.db", tmp_path / "warm",
    )  # fmt: skip
    assert len(lines) == 2 and "Permission denied" in lines[0] and "the right to write" in lines[1]
    assert list(closed.iterdir()) == []


def test_a_full_disk_is_one_line_and_keeps_what_was_there(path):
    lines = done(
        """
        import traceback
        secret = "0ddba11" * 40
        journal = Journal.open(path, party="va")
        size = sum(each.stat().st_size for each in path.parent.iterdir())
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 200_000, resource.RLIM_INFINITY))
        number = 0
        try:
            while True:
                number += 1
                group = [Secrets(*[SecretBytes(secret.encode())] * 3)] * 10
                journal.append("job", "round", [*group, SiteProgress(0, b"", number)], put={"last": b"%d" % number})
        except StoreProblem as error:
            print(str(error))
            print(error.remedy)
            print(secret in "".join(traceback.format_exception(error)))
        print(number, journal.get("job", "last").decode(), len(list(journal.read("job", "round"))))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        journal.append("job", "round", [SiteProgress(0, b"", number)] * 11, put={"last": b"%d" % number})
        os._exit(0)
        """,
        path,
    )  # fmt: skip
    assert len(lines) == 4 and str(path) in lines[0] and "disk full" in lines[1]
    assert lines[2] == "False"
    refused, last, count = map(int, lines[3].split())
    assert refused > 3 and last == refused - 1 and count == 11 * last
    with Journal.open(path, party="va") as journal:
        assert journal.verify() == 11 * refused  # and it went on where there was room again
        assert journal.get("job", "last") == str(refused).encode()


def test_an_error_names_neither_statement_nor_content(place):
    secret = os.urandom(8).hex()
    with opened(place.where) as journal:
        with journal._database.writing():
            name = journal._tables.values.fullname
            journal._database.run(
                Compiled(sql(f"DROP TABLE {name}"), journal._connection.dialect), {}
            )
        with pytest.raises(StoreProblem) as caught:
            journal.put("job", secret, secret.encode())
        text = "".join(traceback.format_exception(caught.value))
    assert "kept_values" in str(caught.value) and secret not in text


def test_nobody_reads_along_which_would_keep_the_log_from_being_cut(path):
    with Journal.open(path, party="va"):
        other = sqlite3.connect(path, timeout=0.1)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("SELECT * FROM records")
        other.close()
