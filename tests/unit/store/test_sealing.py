"""A journal whose contents are encrypted: nothing in clear on the disk, and every row only in its own place."""

from __future__ import annotations

import os
import sqlite3

import pytest

from fedcore.errors import EnvelopeRefused, StoreProblem
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.protocol.round.site import SiteProgress
from fedcore.store import sealing
from fedcore.store.journal import Journal
from fedcore.store.sealing import RowSealer, encrypt_journal, is_sealed

SEALER, OTHER = RowSealer(SecretBytes(b"\1" * 32)), RowSealer(SecretBytes(b"\2" * 32))
TRACE = b"a secret of the round"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.sqlite"


def opened(path, sealer=SEALER):
    return Journal.open(path, party="va", sealer=sealer)


def filled(path, sealer=SEALER):
    """Two jobs with records and values; everything that was written, by place."""
    with opened(path, sealer) as journal:
        for job in ("one", "two"):
            for number in range(3):
                records = [SiteProgress(number, TRACE + job.encode())]
                journal.append(job, "round", records, put={"state": TRACE, "seeds": b""})
            journal.append(job, "epoch", [SiteProgress(9, TRACE), SiteProgress(10, TRACE)])
    return contents(path, sealer)


def contents(path, sealer=SEALER):
    with opened(path, sealer) as journal:
        records = {place: list(journal.read(*place)) for place in journal.streams()}
        values = {(j, k): journal.get(j, k) for j in ("one", "two") for k in journal.keys(j)}
        assert journal.verify() == sum(map(len, records.values()))
        return records, values


def on_disk(path):
    return b"".join(each.read_bytes() for each in path.parent.glob(f"{path.name}*"))


def test_a_journal_reads_back_and_has_nothing_in_clear(path, tmp_path):
    clear = filled(tmp_path / "clear.sqlite", None)
    assert filled(path) == clear
    assert TRACE in on_disk(tmp_path / "clear.sqlite") and TRACE not in on_disk(path)
    with opened(path) as journal:
        journal.compact("one", "round", [SiteProgress(7, b"kept")], forget=["state"])
        journal.append("one", "round", [SiteProgress(8, b"later")])
        assert [each.epoch for each in journal.read("one", "round")] == [7, 8]
        assert journal.get("one", "state") is None and journal.get("one", "seeds") == b""


def test_the_same_content_twice_differs_on_the_disk(path):
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


def test_a_journal_in_the_other_form_is_refused_with_the_way_out(path, tmp_path):
    filled(path)
    clear = tmp_path / "clear.sqlite"
    filled(clear, None)
    for where, sealer, found, remedy in (
        (
            clear,
            SEALER,
            "found it in clear, expected it encrypted",
            "`keystore encrypt` of fed-site",
        ),
        (path, None, "found it encrypted, expected it in clear", "[keystore]"),
        (path, OTHER, "encrypted with another keystore's key", "restore the keystore"),
    ):
        with pytest.raises(StoreProblem, match=found) as error:
            opened(where, sealer)
        assert remedy in error.value.remedy
    assert (is_sealed(path, "va"), is_sealed(clear, "va")) == (True, False)
    with pytest.raises(StoreProblem, match="another keystore"):
        encrypt_journal(path, "va", OTHER)


def test_an_existing_journal_is_encrypted_whole(path):
    before = filled(path, None)
    assert encrypt_journal(path, "va", SEALER)
    assert TRACE not in on_disk(path)
    assert contents(path) == before
    assert not encrypt_journal(path, "va", SEALER)


@pytest.mark.parametrize("row", [0, 5, 14, 15])
def test_a_killed_encryption_left_everything_or_nothing(path, row, monkeypatch):
    before = filled(path, None)
    if child := os.fork():
        _, ended = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(ended) == 9
    else:
        try:
            kill_at(row)
            encrypt_journal(path, "va", SEALER)
        finally:
            os._exit(1)
    done = is_sealed(path, "va")
    assert done == (row == 15)
    assert contents(path, SEALER if done else None) == before
    encrypt_journal(path, "va", SEALER)
    assert contents(path) == before and TRACE not in on_disk(path)


def kill_at(row):
    """End this process at this step: the erasing as it opens, 14 contents, the erasing after them."""
    counted = iter(range(row))

    def killing(change):
        def maybe(*arguments):
            if next(counted, None) is None:
                os._exit(9)
            return change(*arguments)

        return maybe

    for name in ("record", "value"):
        setattr(RowSealer, name, killing(getattr(RowSealer, name)))
    sealing.SqliteFile.scrub = killing(sealing.SqliteFile.scrub)


def changed(path, *statements):
    with sqlite3.connect(path) as database:
        for each in statements:
            database.execute(each)
    database.close()


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
            SWAP.format(t="kept_values", a="key = 'state'", b="key = 'seeds'"),
            ("get", "one", "state"),
        ),
        ("UPDATE kept_values SET job = 'x' WHERE job = 'one'", ("get", "x", "state")),
        ("UPDATE kept_values SET key = 'epoch' WHERE key = 'state'", ("get", "one", "epoch")),
    ],
)
def test_a_row_in_anothers_place_is_refused_and_named(path, statement, read):
    filled(path)
    changed(path, statement)
    name, *place = read
    with opened(path) as journal:
        use = journal.get if name == "get" else lambda *there: list(journal.read(*there))
        with pytest.raises(StoreProblem, match="not encrypted for this place"):
            use(*place)
