"""A journal whose contents are encrypted, in a file and on a PostgreSQL server: nothing in clear in its files and rows,
and every row only in its own place."""

from __future__ import annotations

import os

import pytest
from support.journals import PostgresqlPlace, SqlitePlace, opened

from fedcore.errors import EnvelopeRefused, StoreProblem
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.protocol.round.site import SiteProgress
from fedcore.store.postgresql import PostgresqlDatabase
from fedcore.store.sealing import RowSealer
from fedcore.store.sqlite import SqliteFile

SEALER, OTHER = RowSealer(SecretBytes(b"\1" * 32)), RowSealer(SecretBytes(b"\2" * 32))
TRACE = b"a secret of the round"


@pytest.fixture(params=["sqlite", "postgresql"])
def new(request, tmp_path):
    """Makes an empty place for a journal."""
    if request.param == "sqlite":
        counted = iter(range(9))
        return lambda: SqlitePlace(tmp_path / str(next(counted)))
    server = request.getfixturevalue("postgres")
    return lambda: PostgresqlPlace(server)


@pytest.fixture
def place(new):
    return new()


def filled(place, sealer=SEALER):
    """Two jobs with records and values; everything that was written, by place."""
    with opened(place.where, sealer=sealer) as journal:
        for job in ("one", "two"):
            for number in range(3):
                records = [SiteProgress(number, TRACE + job.encode())]
                journal.append(job, "round", records, put={"state": TRACE, "seeds": b""})
            journal.append(job, "epoch", [SiteProgress(9, TRACE), SiteProgress(10, TRACE)])
    return contents(place, sealer)


def contents(place, sealer=SEALER):
    with opened(place.where, sealer=sealer) as journal:
        records = {place: list(journal.read(*place)) for place in journal.streams()}
        values = {(j, k): journal.get(j, k) for j in ("one", "two") for k in journal.keys(j)}
        assert journal.verify() == sum(map(len, records.values()))
        return records, values


def test_a_journal_reads_back_and_has_nothing_in_clear(new):
    place, other = new(), new()
    clear = filled(other, None)
    assert filled(place) == clear
    assert TRACE in other.on_disk() and TRACE not in place.on_disk()
    with opened(place.where, sealer=SEALER) as journal:
        journal.compact("one", "round", [SiteProgress(7, b"kept")], forget=["state"])
        journal.append("one", "round", [SiteProgress(8, b"later")])
        assert [each.epoch for each in journal.read("one", "round")] == [7, 8]
        assert journal.get("one", "state") is None and journal.get("one", "seeds") == b""


def test_the_same_content_twice_differs_on_the_disk():
    sealed = [SEALER.value(TRACE, "one", "state") for _ in range(2)]
    assert sealed[0] != sealed[1]
    for each in sealed:
        assert SEALER.open_value(each, "one", "state") == TRACE


@pytest.mark.parametrize("cut", [0, 1, 31, 32, 47, 48, 60])
def test_a_damaged_content_is_refused(cut):
    sealed = SEALER.record(TRACE, "one", "round", "SiteProgress", 1)
    place = ("one", "round", "SiteProgress", 1)
    assert SEALER.open_record(sealed, *place) == TRACE
    for wrong in (sealed[:cut], sealed[:cut] + bytes([sealed[cut] ^ 1]) + sealed[cut + 1 :]):
        with pytest.raises(EnvelopeRefused):
            SEALER.open_record(wrong, *place)
    with pytest.raises(EnvelopeRefused):
        OTHER.open_record(sealed, *place)


def test_a_journal_in_the_other_form_is_refused_with_the_way_out(new):
    place, clear = new(), new()
    filled(place)
    filled(clear, None)
    for where, sealer, found, remedy in (
        (clear, SEALER, "found it in clear, expected it encrypted", "`keystore encrypt` of"),
        (place, None, "found it encrypted, expected it in clear", "[keystore]"),
        (place, OTHER, "encrypted with another keystore's key", "restore the keystore"),
    ):
        with pytest.raises(StoreProblem, match=found) as error:
            opened(where.where, sealer=sealer)
        assert remedy in error.value.remedy
    assert (place.sealed(), clear.sealed()) == (True, False)
    with pytest.raises(StoreProblem, match="another keystore"):
        place.encrypt(OTHER)


def test_an_existing_journal_is_encrypted_whole(place):
    before = filled(place, None)
    assert TRACE in place.on_disk(), "control"
    assert place.encrypt(SEALER)
    assert TRACE not in place.on_disk()
    assert contents(place) == before
    assert not place.encrypt(SEALER)


@pytest.mark.parametrize("row", [0, 5, 14, 15])
def test_a_killed_encryption_left_everything_or_nothing(place, row):
    before, in_file = filled(place, None), isinstance(place, SqlitePlace)
    if child := os.fork():
        _, ended = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(ended) == 9
    else:
        try:
            kill_at(row if in_file else row - 1 if row else 0)
            place.encrypt(SEALER)
        finally:
            os._exit(1)
    done = place.sealed()
    assert done == (row == 15)
    assert contents(place, SEALER if done else None) == before
    place.encrypt(SEALER)
    assert contents(place) == before and TRACE not in place.on_disk()


def kill_at(row):
    """End this process at this step. In a file: the erasing as it opens, 14 contents, the erasing after them; on a
    server: 14 contents, and the rewriting of the tables after them."""
    counted = iter(range(row))

    def killing(change):
        def maybe(*arguments):
            if next(counted, None) is None:
                os._exit(9)
            return change(*arguments)

        return maybe

    for owner, name in (
        (RowSealer, "record"), (RowSealer, "value"), (SqliteFile, "scrub"),
        (PostgresqlDatabase, "rewrite"),
    ):  # fmt: skip
        setattr(owner, name, killing(getattr(owner, name)))


SWAP = "UPDATE {t} SET body = (SELECT body FROM {t} WHERE {b}) WHERE {a}"


@pytest.mark.parametrize(
    ("statement", "read"),
    [
        (SWAP.format(t="records", a="id = 1", b="id = 2"), ("read", "one", "round")),
        (SWAP.format(t="records", a="id = 1", b="id = 6"), ("read", "one", "round")),
        (SWAP.format(t="records", a="id = 1", b="id = 4"), ("read", "one", "round")),
        ("UPDATE records SET id = 100 WHERE id = 1", ("read", "one", "round")),
        ("UPDATE records SET stream = 'round' WHERE id = 5", ("read", "one", "round")),
        ("UPDATE records SET job = 'one' WHERE id = 6", ("read", "one", "round")),
        ("UPDATE records SET kind = 'Idle' WHERE id = 1", ("read", "one", "round")),
        (
            SWAP.format(t="kept_values", a="key = 'state'", b="key = 'seeds' AND job = 'one'"),
            ("get", "one", "state"),
        ),
        ("UPDATE kept_values SET job = 'x' WHERE job = 'one'", ("get", "x", "state")),
        ("UPDATE kept_values SET key = 'epoch' WHERE key = 'state'", ("get", "one", "epoch")),
    ],
)
def test_a_row_in_anothers_place_is_refused_and_named(place, statement, read):
    filled(place)
    place.sql(statement)
    name, *there = read
    with opened(place.where, sealer=SEALER) as journal:
        use = journal.get if name == "get" else lambda *of: list(journal.read(*of))
        with pytest.raises(StoreProblem, match="not encrypted for this place"):
            use(*there)


# ------------------------------------------------------------------------------ on a server


@pytest.fixture
def served(postgres):
    return PostgresqlPlace(postgres)


def test_rows_of_two_parties_in_one_database_do_not_open_in_each_others_place(served):
    """An administrator of the server gives one federation the rows of another, at their ids."""
    filled(served)
    with opened(served.where, party="vb", sealer=OTHER) as journal:
        journal.append("one", "round", [SiteProgress(1, TRACE)], put={"state": b"mine"})
    swap = "UPDATE {t} SET body = (SELECT body FROM {t} WHERE party = 'va' {of}) WHERE party = 'vb'"
    served.sql(
        swap.format(t="records", of="AND id = 1"),
        swap.format(t="kept_values", of="AND job = 'one' AND key = 'state'"),
    )
    with opened(served.where, party="vb", sealer=OTHER) as journal:
        for use in (
            lambda: list(journal.read("one", "round")),
            lambda: journal.get("one", "state"),
        ):
            with pytest.raises(StoreProblem, match="not encrypted for this place"):
                use()


def test_the_mark_of_an_encrypted_journal_cannot_be_taken_away(served):
    """An administrator pretends that the journal is in clear, so that the coordinator would write the next rows so."""
    filled(served)
    served.sql("DELETE FROM meta WHERE name = 'sealed'")
    with pytest.raises(StoreProblem, match="found it in clear, expected it encrypted"):
        opened(served.where, sealer=SEALER)


def test_a_standby_reads_and_goes_on_with_the_same_keystore(served):
    with opened(served.where, sealer=SEALER) as journal:
        journal.append("job", "round", [SiteProgress(1, TRACE)], put={"state": TRACE})
    with opened(served.where, sealer=SEALER) as standby:
        standby.append("job", "round", [SiteProgress(n, b"") for n in range(2, 200)])
        assert [each.epoch for each in standby.read("job", "round")] == [*range(1, 200)]
        assert standby.get("job", "state") == TRACE
        with pytest.raises(StoreProblem, match="found it encrypted, expected it in clear"):
            opened(served.where, wait=lambda _: pytest.fail("a standby that cannot read waits"))


def test_a_standby_in_clear_that_waited_is_refused_when_it_takes_over(served):
    """The journal is encrypted while a coordinator without the keystore waits for the lease."""
    holder = opened(served.where)

    def encrypted(_):
        holder.close()
        assert served.encrypt(SEALER)

    with pytest.raises(StoreProblem, match="found it encrypted, expected it in clear"):
        opened(served.where, wait=encrypted)
