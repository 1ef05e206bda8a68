"""Frozen names of records: the list of them, and that the name of a class is in nothing that is kept."""

from __future__ import annotations

import json
import shutil
import sqlite3
from dataclasses import dataclass

import pytest
from support.parties import Parties
from support.records import forgetful
from support.scripts import load_script

from fedcore.errors import OutOfOrder
from fedcore.secagg.protocol import messages
from fedcore.secagg.protocol.round import coordinator, site
from fedcore.secagg.protocol.wire_form import decode, encode, record, records
from fedcore.store.journal import Journal
from fedcore.wire.records import TO_COORDINATOR, TO_SITE

generate, script = load_script("vectors/generate.py"), load_script("vectors/records.py")
FOUND = script.registered()
FILE = script.FILE
LISTED = json.loads(FILE.read_text())
LEAVE = messages.Leave(b"h" * 32, "ann", "left")


def test_every_record_is_listed_with_its_name_fields_and_bytes():
    assert FOUND.keys() <= LISTED.keys(), "`python scripts/vectors/records.py` adds a new record"
    different = {name for name in LISTED if LISTED[name] != FOUND.get(name)}
    assert not different, "journals and signatures hold these bytes: see scripts/vectors/records.py"


@pytest.mark.parametrize("name", LISTED)
def test_the_listed_bytes_are_read_and_written_again(name):
    data = bytes.fromhex(LISTED[name]["example"])
    assert encode(forgetful(decode(data, records()[name]))) == data


def test_a_record_has_one_name_which_no_other_has():
    other = dataclass(frozen=True)(type("Other", (), {}))
    for name, kind in (("Leave", other), ("Another", messages.Leave)):
        with pytest.raises(TypeError, match=f"record '{name}': expected a name that is not taken"):
            record(name)(kind)
    assert other not in records().values() and records().keys().isdisjoint({"Another"})


def test_every_stage_is_a_record():
    """So `status` and the journal show it under a frozen name."""
    stages = {*site.MOVES, *coordinator.MOVES}
    assert len(stages) == 20
    assert stages <= set(records().values())


# ------------------------------------------------------------------------- classes that are renamed


@pytest.fixture
def renamed():
    """Every record's class under another name."""
    kinds = list(records().values())
    before = [(kind.__name__, kind.__qualname__) for kind in kinds]
    for number, kind in enumerate(kinds):
        kind.__name__ = kind.__qualname__ = f"Renamed{number}"
    yield
    for kind, names in zip(kinds, before, strict=True):
        kind.__name__, kind.__qualname__ = names


@pytest.mark.usefixtures("renamed")
def test_a_renamed_class_keeps_its_list_entry():
    assert type(LEAVE).__name__ != "Leave"
    assert script.registered() == LISTED


@pytest.mark.usefixtures("renamed")
def test_a_round_of_renamed_classes_has_the_recorded_messages():
    """Signatures among them."""
    golden = json.loads((FILE.parent / "masked_round.json").read_text())
    assert generate.message_list(generate.replay(golden)) == golden["messages"]


@pytest.mark.usefixtures("renamed")
def test_the_journal_of_renamed_classes_holds_frozen_names_only(tmp_path):
    parties = Parties(4)
    parties.play(s03="submit")
    parties.refusers = {"s00"}
    parties.catch_up()
    parties.play(s01="release")
    written = [entry for who in parties.journals for entry in parties.records(who)]
    with Journal.open(tmp_path / "journal", party="all") as journal:
        journal.append("job", "round", written)
        assert len(list(journal.read("job", "round"))) == len(written)
    with sqlite3.connect(tmp_path / "journal") as database:
        kinds = {kind for (kind,) in database.execute("SELECT kind FROM records")}
    database.close()
    exchanges = {each.exchange.kind for each in written if hasattr(each, "exchange")}
    stages = {each.stage for each in written if isinstance(each, site.ReleaseRefusedHere)}
    assert {"Joined", "SharesMade"} <= kinds <= LISTED.keys()
    assert {"Announce", "KeyBundle"} <= exchanges <= LISTED.keys()
    assert stages == {"Opening"}
    assert not any(b"Renamed" in encode(each) for each in written)


@pytest.mark.usefixtures("renamed")
def test_errors_name_records_of_renamed_classes_by_their_frozen_names():
    parties = Parties(4)
    event = site.MessageFromCoordinator(messages.Aggregate(b"", (), b"", 0))
    with pytest.raises(OutOfOrder) as refused:
        site.step(parties.members["s00"], parties.stages["s00"], event, 0.0)
    assert refused.value.found == "Aggregate"
    assert refused.value.expected == "Abandon or Certificate or NextBundle or Notice"


def test_tables_of_the_wire_are_by_frozen_name():
    for table in (TO_COORDINATOR, TO_SITE):
        assert table
        assert all(records()[name] is entry.kind for name, entry in table.items())


# --------------------------------------------------------------------------------- keeping the list


@pytest.fixture
def listing(tmp_path):
    """The script of a repository with a list of its own: change it, run, and get (exit code, the list after)."""
    for folder in script.PACKAGES:
        (tmp_path / folder).symlink_to(script.ROOT / folder)
    for folder in ("scripts/vectors", "tests/vectors"):
        (tmp_path / folder).mkdir(parents=True)
    other = load_script(shutil.copy(script.__file__, tmp_path / "scripts" / "vectors"))

    def run(listed, *args):
        other.FILE.write_text(json.dumps(listed))
        return other.main(list(args)), json.loads(other.FILE.read_text())

    return run


def without(name):
    return {key: about for key, about in LISTED.items() if key != name}


def test_the_script_adds_a_record_that_is_missing(listing):
    assert listing(without("Leave")) == (0, LISTED)


@pytest.mark.parametrize(
    "change",
    [
        {"Leave": {**LISTED["Leave"], "fields": LISTED["Leave"]["fields"][::-1]}},
        {"Leave": {**LISTED["Leave"], "example": LISTED["Keys"]["example"]}},
        {"NoSuchRecord": LISTED["Leave"]},
    ],
    ids=["fields", "bytes", "gone"],
)
def test_the_script_changes_or_drops_a_record_only_with_force(listing, change, capsys):
    changed = LISTED | change
    assert listing(changed) == (1, changed)
    assert "changed or gone" in capsys.readouterr().err
    assert listing(changed, "--force") == (0, LISTED)


def test_the_file_is_as_the_script_writes_it(listing, tmp_path):
    listing(LISTED)
    written = tmp_path / "tests" / "vectors" / "records.json"
    assert written.read_text() == FILE.read_text()
