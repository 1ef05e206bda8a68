"""A journal on a PostgreSQL server: many parties in one database, one writer for each, and refusals in one line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path

import pytest
from support.journals import PostgresqlPlace, opened
from support.postgres import PASSWORD

from fedcore.errors import BadInput, FedcoreError, LeaseLost, StoreProblem
from fedcore.secagg.protocol.round.site import SiteProgress
from fedcore.store import lease as leases
from fedcore.store.postgresql import POLL_SECONDS, PostgresqlDatabase, read_url

TESTS = Path(__file__).resolve().parents[2]
PRELUDE = f"""
import os, signal, sys
sys.path.insert(0, {str(TESTS)!r})
from support.journals import opened
from fedcore.secagg.protocol.round.site import SiteProgress
from fedcore.store.lease import Lease

def paused():
    print("paused", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)

def write(number):
    try:
        journal.append("job", "round", [SiteProgress(number, b"")])
        print("written", flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)

journal = opened(sys.argv[1], seconds=float(sys.argv[2]))
"""


@pytest.fixture
def place(postgres):
    return PostgresqlPlace(postgres)


def numbers(journal):
    return [found.epoch for found in journal.read("job", "round")]


def record(number):
    return [SiteProgress(number, b"")]


def child(place, code, written=0):
    """A process that opened the journal, after so many records and its line "paused"."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", PRELUDE + code, place.where, "0.4"],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert [process.stdout.readline() for _ in range(written)] == ["written\n"] * written
    assert process.stdout.readline() == "paused\n"
    return process


# ------------------------------------------------------------------------------ several parties


def test_parties_of_one_database_have_rows_of_their_own(place):
    with opened(place.where, "va") as a, opened(place.where, "vb") as b:
        for journal, number in ((a, 1), (b, 2)):
            journal.append("job", "round", record(number), put={"state": b"%d" % number})
        a.append("job", "epoch", record(3))
        b.trim("job", "round", forget=["state"])
        assert numbers(a) == [1] and a.get("job", "state") == b"1" and a.verify() == 2
        assert numbers(b) == [] and b.keys("job") == [] and b.streams() == []
        b.put("job", "state", b"2")
        a.compact("job", "round", forget=["state"])
        assert a.keys("job") == [] and b.get("job", "state") == b"2"


def test_another_federation_of_the_same_name_is_refused(place):
    opened(place.where, authority="1" * 64).close()
    with pytest.raises(StoreProblem, match="another federation of this name") as caught:
        opened(place.where, authority="2" * 64)
    assert "another database" in caught.value.remedy
    opened(place.where, authority="1" * 64).close()


def test_a_schema_of_another_program_is_refused_and_stays_as_it_is(place):
    place.sql("CREATE SCHEMA fedcore", "CREATE TABLE fedcore.patients (name text)")
    with pytest.raises(StoreProblem, match="of another program"):
        opened(place.where)
    tables = "SELECT table_name FROM information_schema.tables WHERE table_schema = 'fedcore'"
    assert place.sql(tables) == [("patients",)]


# ------------------------------------------------------------------------------ lease and fence


def test_paused_between_two_records_the_old_holder_writes_none_after_a_takeover(place):
    old = child(place, "write(1); paused(); write(2); write(3)", written=1)
    with opened(place.where) as new:  # waits until the lease has expired
        new.append("job", "round", record(7))
        old.send_signal(signal.SIGCONT)
        said = old.communicate(timeout=60)[0].splitlines()
        assert len(said) == 2 and all(line.startswith("LeaseLost") for line in said)
        assert "another process took it over" in said[0]
        assert numbers(new) == [1, 7]


PAUSED_INSIDE = """
check = Lease.check
def then_pause(self, connection):
    check(self, connection)
    paused()
Lease.check = then_pause
write(1)
Lease.check = check
write(2)
"""


def test_paused_inside_a_transaction_the_old_holder_neither_commits_nor_blocks_the_takeover(place):
    old = child(place, PAUSED_INSIDE)  # it has checked the lease, and locks its row
    with opened(place.where) as new:
        new.append("job", "round", record(7))
        old.send_signal(signal.SIGCONT)
        said = old.communicate(timeout=60)[0].splitlines()
        assert [line.split()[0] for line in said] == ["StoreProblem", "LeaseLost"]
        assert numbers(new) == [7]


def test_without_the_fence_the_paused_holder_would_write(place, without):
    """The positive control: renewal alone is not enough."""
    with opened(place.where, seconds=60.0) as old:
        place.sql("UPDATE leases SET expires = '-infinity'")
        with opened(place.where) as new:
            without(leases.Lease, "check")
            old.append("job", "round", record(1))
            assert numbers(new) == [1]


def test_a_takeover_waits_for_the_transaction_under_way(place):
    with opened(place.where, seconds=60.0) as old, opened(place.where, "vb") as other:
        place.sql("UPDATE leases SET expires = '-infinity'")
        with old._database.writing():
            assert leases.take(other._connection, "va", 1.0) is None
        assert leases.take(other._connection, "va", 1.0) == 2
        with pytest.raises(LeaseLost):
            old.put("job", "key", b"value")
        assert old.keys("job") == []


def test_a_living_holder_keeps_its_lease(place):
    with opened(place.where) as journal, opened(place.where, "vb") as other:
        seen = set()
        while len(seen) < 5:  # renewed four times: longer than the lease lasts without
            seen |= set(place.sql("SELECT expires FROM leases WHERE party = 'va'"))
            assert leases.take(other._connection, "va", 1.0) is None
        journal.append("job", "round", record(1))


def test_the_loss_is_told_once_and_at_once_to_whoever_asks_later(place):
    told, known = [], threading.Event()
    with opened(place.where) as journal:
        lease = journal._database.lease
        lease.on_loss(lambda error: (told.append(error), known.set()))
        place.sql("UPDATE leases SET fence = fence + 1")
        assert known.wait(60)
        with pytest.raises(LeaseLost):
            journal.forget("job", "key")
        assert len(told) == 1 and told[0].exit_code == 3
        lease.on_loss(told.append)
        assert told[1] is told[0]


def test_a_server_that_no_longer_answers_ends_the_lease(place):
    told, known = [], threading.Event()
    with opened(place.where) as journal:
        journal._database.lease.on_loss(lambda error: (told.append(str(error)), known.set()))
        disconnect(place, allow=False)
        assert known.wait(60)
        assert "no way to renew it" in told[0] and "\n" not in told[0]
        with pytest.raises((LeaseLost, StoreProblem)):
            journal.append("job", "round", record(1))


def disconnect(place, *, allow):
    place.server.sql(
        "postgres",
        f"ALTER DATABASE {place.name} ALLOW_CONNECTIONS {str(allow).lower()}",
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{place.name}'",
    )


def test_a_restarted_server_costs_one_refusal_and_nothing_that_was_written(place):
    with opened(place.where, seconds=60.0) as journal:
        journal.append("job", "round", record(1))
        disconnect(place, allow=True)
        with pytest.raises(StoreProblem, match="append: found it refused"):
            journal.append("job", "round", record(2))
        journal.append("job", "round", record(3))
        assert numbers(journal) == [1, 3]


def test_a_standby_says_whom_it_waits_for_and_takes_over_when_the_holder_closes(place):
    first, said, got = opened(place.where, seconds=60.0), [], []
    waiting = threading.Event()

    def stand_by():
        with opened(place.where, wait=lambda line: (said.append(line), waiting.set())) as journal:
            got.append(numbers(journal))

    standby = threading.Thread(target=stand_by)
    standby.start()
    assert waiting.wait(60)
    first.append("job", "round", record(1))
    first.close()
    standby.join(60)
    assert got == [[1]] and len(said) == 1 and f"process {os.getpid()} on" in said[0]


def test_a_standby_waits_for_a_server_that_is_down(place, caplog):
    """It says so once, and takes over when the server is back: the holder may have lost its lease meanwhile."""
    holder, got, waiting = opened(place.where, seconds=60.0), [], threading.Event()

    def stand_by():
        with opened(place.where, wait=lambda _: waiting.set()) as journal:
            got.append(numbers(journal))

    holder.append("job", "round", record(1))
    standby = threading.Thread(target=stand_by)
    standby.start()
    assert waiting.wait(60)
    disconnect(place, allow=False)
    while "asked again" not in caplog.text and standby.is_alive():
        time.sleep(0.01)
    disconnect(place, allow=True)
    holder.close()
    place.sql("UPDATE leases SET expires = '-infinity'")  # its connection may be lost, too
    standby.join(60)
    assert got == [[1]]
    assert PASSWORD not in caplog.text


def test_the_waits_of_a_takeover_are_shorter_than_ten_seconds():
    """The lease's end, a transaction of the holder, the poll; what a standby does besides is work, not waiting."""
    assert leases.LEASE_SECONDS + leases.IDLE_SECONDS + POLL_SECONDS < 9


# ------------------------------------------------------------------------------------ refusals


def refusal(url):
    with pytest.raises(FedcoreError) as caught:
        PostgresqlDatabase.open(url, party="va", authority="1" * 64)
    assert "\n" not in str(caught.value) and caught.value.remedy
    return caught.value


@pytest.mark.parametrize(
    ("url", "kind", "words"),
    [
        ("tcp:wrong", StoreProblem, "password authentication failed"),
        ("tcp:no such database", StoreProblem, "does not exist"),
        ("postgresql://fedcore:{}@127.0.0.1:1/x", StoreProblem, "Connection refused"),
        ("postgresql://fedcore:{}@nowhere.invalid/x", StoreProblem, "resolve host"),
        ("postgresql://fedcore:{}@127.0.0.1:1/x?no_such_option=1", StoreProblem, "no_such_option"),
        ("postgresql://fedcore:{}/or@h/x", BadInput, "more than one '@'"),
        ("postgresql://fedcore:{}@127.0.0.1:port/x", BadInput, "cannot be read"),
        ("postgresql://fedcore:{}@127.0.0.1", BadInput, "without the database's name"),
        ("postgresql://fedcore@h/x?password={}", BadInput, "a password after"),
        ("mysql://fedcore:{}@h/x", BadInput, "another database than PostgreSQL"),
        ("postgresql+asyncpg://fedcore:{}@h/x", BadInput, "a driver that is not known"),
        ("fedcore:{}@h", BadInput, "cannot be read"),
    ],
)
def test_a_url_that_does_not_work_is_one_line_without_its_password(postgres, url, kind, words):
    secret = f"{PASSWORD}@odd" if "/or@" in url else PASSWORD
    if url.startswith("tcp:"):
        wrong = url == "tcp:wrong"
        secret = "not-the-" + PASSWORD if wrong else PASSWORD
        url = postgres.tcp(*(["postgres", secret] if wrong else ["nothing", secret]))
    error = refusal(url.format(secret))
    said = "".join(traceback.format_exception(error))
    assert type(error) is kind and words in str(error)
    assert PASSWORD not in said and error.__cause__ is None


def test_a_role_without_the_right_to_make_tables_is_told_what_to_grant(place):
    place.sql("CREATE ROLE weak LOGIN", f"REVOKE CREATE ON DATABASE {place.name} FROM PUBLIC")
    error = refusal(place.where.replace("fedcore@", "weak@"))
    assert "permission denied" in str(error) and "CREATE SCHEMA fedcore" in error.remedy


def test_the_password_may_be_in_libpqs_password_file(place, tmp_path, monkeypatch):
    file = tmp_path / "pgpass"
    file.write_text(f"127.0.0.1:{place.server.port}:{place.name}:fedcore:{PASSWORD}\n")
    file.chmod(0o600)
    monkeypatch.setenv("PGPASSFILE", str(file))
    with opened(f"postgresql://fedcore@127.0.0.1:{place.server.port}/{place.name}") as journal:
        journal.append("job", "round", record(1))


@pytest.mark.parametrize(
    "text", ["postgresql://a:b%40c@h:5/d", " postgresql://h/d?sslmode=require\n"]
)
def test_a_url_that_can_be_used(text):
    url = read_url(text)
    assert url.drivername == "postgresql+psycopg" and url.database == "d" and url.host == "h"
