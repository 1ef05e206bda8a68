"""`fed-coordinator keystore`: the coordinator's key, encrypted at rest and used."""

from __future__ import annotations

import base64
import json
import os
import ssl

import pytest
from fedcore_server.app import open_journal
from fedcore_server.cli import main
from fedcore_server.config import find_place, kept_coordinator, read_config
from fedcore_server.federation import FederationFiles
from fedcore_server.job_disk import JobDisk
from fedcore_server.operators import Operator
from fedcore_server.private_files import private_files
from fedcore_server.sealed_models import MODEL_FILE, SealedModels, require_sealed_models
from fedcore_server.tls import server_credentials
from support.federations import PASSPHRASE as AUTHORITYS
from support.federations import authority_of, new_federation, now
from support.job_parts import facts_of
from support.journals import PostgresqlPlace
from support.keystores import PASSPHRASE, cheap_scrypt, passphrase_file
from support.killed import killed_before
from support.postgres import PASSWORD

from fedcore.errors import BadInput, EnvelopeRefused, StoreProblem
from fedcore.files import lock
from fedcore.files.disk import open_to_others
from fedcore.identity.keystore import Keystore, KeystoreFile
from fedcore.identity.keystore_backup import back_up, restore, rotate
from fedcore.identity.kit import KEY_FILE, KitFile
from fedcore.identity.passphrase import KeystoreSection
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.store.journal import Journal
from fedcore.store.sealed_files import FileSealer
from fedcore.store.spool import Spool


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A federation's file with a [keystore], its key still in clear."""
    cheap_scrypt(monkeypatch)
    path = new_federation(tmp_path / "one").config.roster.parent / "federation.toml"
    unlock = f"file:{passphrase_file(tmp_path / 'secrets')}"
    for each in (path, operator_of(path)):
        each.write_text(f"{each.read_text()}\n[keystore]\nunlock = {unlock!r}\n")
    return path


def operator_of(place):
    return place.parent / "operator" / "operator.toml"


def command(capsys, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["keystore", *arguments])
    return ended.value.code, *capsys.readouterr()


def test_the_key_is_encrypted_and_serves_and_a_renewed_certificate_is_used(place, capsys):
    before = read_config(place).model_copy(update={"keystore": None}).read_kit()
    with pytest.raises(BadInput, match="found no such file, expected the keystore"):
        read_config(place).read_kit()
    assert "in clear" in command(capsys, "status", "--config", str(place))[1]
    code, out, err = command(capsys, "encrypt", "--config", str(place))
    assert (code, err) == (0, "") and "keystore backup FILE" in out
    config = read_config(place)
    kit = config.read_kit()
    assert kit.key_pem.reveal() == before.key_pem.reveal()
    assert b"ENCRYPTED" in kit.key_path.read_bytes()
    kit.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    server_credentials(kit)
    kits, files = KitFile(kit), FederationFiles(config)
    assert len(files.renew_own(authority_of(files), [], now(), 400.0)) == 2
    assert kits.refresh() and kits.current.password is not None
    found = json.loads(command(capsys, "status", "--config", str(place), "--json")[1])
    assert found["files"][0]["state"] == "encrypted"
    assert found["keystore"]["party"] == "coordinator of heart"


OTHER = "another passphrase entirely"
KITS = {"coordinator": "kit", "authority": "authority", "operator": "operator/kit"}
KEYSTORES = {"coordinator": ".", "authority": "authority", "operator": "operator"}


@pytest.fixture
def words(place, capsys, tmp_path):
    """How a command names the federation, its passphrases in files; all keys are encrypted."""
    operator = ["--of", "operator", "--operator", str(operator_of(place))]
    command(capsys, "encrypt", "--config", str(place))
    command(capsys, "encrypt", *operator)
    secret = passphrase_file(tmp_path / "of-authority", AUTHORITYS)
    return {
        "operator": operator,
        "coordinator": ["--config", str(place)],
        "authority": ["--of", "authority", "--config", str(place), "--passphrase-file", str(secret)],
    }  # fmt: skip


@pytest.mark.parametrize("party", KITS)
def test_keys_come_back_from_a_backup_after_the_disk_was_lost(
    place, words, party, capsys, tmp_path
):
    out = tmp_path / "kept.backup"
    code, said, err = command(capsys, "backup", str(out), *words[party])
    assert (code, err) == (0, "") and "keystore.json, key.pem, authority.pem" in said
    assert out.stat().st_mode & 0o077 == 0
    data = out.read_bytes()
    assert b"PRIVATE KEY" not in data and PASSPHRASE.encode() not in data
    kept = place.parent / KEYSTORES[party] / "keystore.json"
    lost = {path: path.read_bytes() for path in (place.parent / KITS[party]).iterdir()}
    lost[kept] = kept.read_bytes()
    for path in lost:
        if party != "authority" or path.name != "authority.pem":
            path.unlink()
    code, said, err = command(capsys, "restore", str(out), *words[party])
    assert (code, err) == (0, "") and "restored " in said
    assert {path: path.read_bytes() for path in lost} == lost
    assert "everything was there already" in command(capsys, "restore", str(out), *words[party])[1]
    (place.parent / KITS[party] / "key.pem").write_text("another key")
    code, _, err = command(capsys, "restore", str(out), *words[party])
    assert code != 0 and "a restore overwrites nothing" in err


@pytest.mark.parametrize("party", KITS)
def test_a_backup_without_its_passphrase_is_useless(place, words, party, capsys, tmp_path):
    out = tmp_path / "kept.backup"
    command(capsys, "backup", str(out), *words[party])
    found = json.loads(out.read_bytes())
    sealed = base64.b64decode(found["sealed"])
    for guess in (OTHER, PASSPHRASE + " ", found["sealed"][:44]):
        with pytest.raises(BadInput, match="this passphrase does not open"):
            Keystore.unwrap(
                KeystoreFile.parse(found["keystore"].encode(), "backup"),
                json.loads(found["keystore"])["party"], SecretBytes(guess.encode()), "backup",
            )  # fmt: skip
    mine = Keystore(json.loads(found["keystore"])["party"], bytes(32))
    with pytest.raises(EnvelopeRefused):
        mine.open_backup(sealed)
    out.chmod(0o640)
    code, _, err = command(capsys, "restore", str(out), *words[party])
    assert code == 0, "a group may read it, as mounted secrets are"
    out.chmod(0o644)
    code, _, err = command(capsys, "restore", str(out), *words[party])
    assert code == 2 and "found mode 0644, expected 0600" in err


@pytest.mark.parametrize("party", KITS)
def test_a_new_passphrase_opens_the_same_keys(place, words, party, capsys, tmp_path):
    keys = {path: path.read_bytes() for path in place.parent.rglob("key.pem")}
    new = passphrase_file(tmp_path / "new", OTHER)
    code, out, err = command(capsys, "rotate", "--new", f"file:{new}", *words[party])
    assert (code, err) == (0, "") and OTHER not in out
    assert {path: path.read_bytes() for path in place.parent.rglob("key.pem")} == keys
    code, _, err = command(capsys, "backup", str(tmp_path / "x"), *words[party])
    assert code == 2 and "this passphrase does not open" in err
    for path in (tmp_path / "secrets" / "passphrase", tmp_path / "of-authority" / "passphrase"):
        path.write_text(OTHER)
    assert command(capsys, "backup", str(tmp_path / "x"), *words[party])[0] == 0


def test_of_two_operators_who_change_the_passphrase_at_once_one_is_refused(
    place, words, tmp_path, monkeypatch
):
    """Both know the old one. While the first command is under way the other waits; afterwards the old one is void."""
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.05)
    kept = kept_coordinator(read_config(place), place)
    ada, bob = (
        KeystoreSection(unlock=f"file:{passphrase_file(tmp_path / n, f'the passphrase of {n}')}")
        for n in ("ada", "bob")
    )

    def meanwhile():
        with pytest.raises(BadInput, match=r"keystore\.json: found another command changing it"):
            rotate(kept, bob)

    rotate(kept, ada, meanwhile)
    with pytest.raises(BadInput, match="this passphrase does not open"):
        rotate(kept, bob)
    assert Keystore.load(kept.keystore, kept.party, ada.read())


def test_commands_of_the_keystore_are_in_the_audit_trail(place, words, capsys, tmp_path):
    out, new = tmp_path / "kept.backup", passphrase_file(tmp_path / "new", OTHER)
    command(capsys, "backup", str(out), *words["authority"])
    command(capsys, "rotate", "--new", f"file:{new}", *words["coordinator"])
    notes = []
    files = FederationFiles(read_config(place))
    files.take_notes(lambda event, **facts: notes.append((event, facts["call"], facts["party"])))
    assert notes == [
        ("operator", "keystore encrypt", "coordinator"),
        ("operator", "keystore backup", "authority"),
        ("operator", "keystore rotate", "coordinator"),
    ]


def test_a_backup_is_never_open_to_others_whatever_the_umask(place, words, tmp_path):
    kept, folder, before = (
        kept_coordinator(read_config(place), place),
        tmp_path / "out",
        os.umask(0),
    )
    folder.mkdir(0o700)
    try:
        step = 0
        while killed_before(step, lambda: back_up(kept, folder / "backup")):
            assert open_to_others(folder, ["*", ".*"]) == []
            (folder / "backup").unlink(missing_ok=True)
            step += 1
    finally:
        os.umask(before)
    assert step > 10 and open_to_others(folder, ["*", ".*"]) == []


def test_keys_of_one_party_are_not_restored_as_those_of_another(words, capsys, tmp_path, place):
    out = tmp_path / "kept.backup"
    command(capsys, "backup", str(out), *words["authority"])
    (place.parent / "keystore.json").unlink()
    code, _, err = command(capsys, "restore", str(out), *words["coordinator"])
    assert code == 2 and "found the keystore of authority of heart, expected that of coor" in err


def test_restoring_can_be_killed_between_any_two_steps(place, words, capsys, tmp_path):
    out, config = tmp_path / "kept.backup", read_config(place)
    command(capsys, "backup", str(out), *words["coordinator"])
    kept = kept_coordinator(config, place)
    files = {path: path.read_bytes() for path in (kept.keystore, *kept.places.values())}
    step, states = 0, set()
    while True:
        for path in files:
            path.unlink(missing_ok=True)
        killed = killed_before(step, lambda: restore(kept, out))
        states.add(sum(path.exists() for path in files))
        assert all(path.read_bytes() == files[path] for path in files if path.exists())
        restore(kept, out)
        assert {path: path.read_bytes() for path in files} == files
        if not killed:
            break
        step += 1
    assert states == {0, 1, 2, 3, 4}


def test_a_key_in_clear_or_a_lost_keystore_is_refused(place, capsys):
    key = read_config(place).kit / KEY_FILE
    clear = key.read_bytes()
    command(capsys, "encrypt", "--config", str(place))
    sealed = key.read_bytes()
    key.write_bytes(clear)
    with pytest.raises(BadInput, match="found a key in clear") as error:
        read_config(place).read_kit()
    assert "fed-coordinator" in error.value.remedy
    key.write_bytes(sealed)
    (place.parent / "keystore.json").unlink()
    code, _, err = command(capsys, "encrypt", "--config", str(place))
    assert code == 2 and "restore it from a backup" in err
    place.write_text(place.read_text().partition("[keystore]")[0])
    code, _, err = command(capsys, "encrypt", "--config", str(place))
    assert code == 2 and "federation.toml: found no [keystore]" in err


# ------------------------------------------------------------------------------------- an operator's key


def test_an_operators_key_is_encrypted_and_opens_with_its_own_passphrase(place, words, capsys):
    kept = find_place(None, None, operator_of(place))
    assert b"ENCRYPTED" in (kept.kit / KEY_FILE).read_bytes()
    assert Operator(kept).where == "localhost:" + str(kept.port)
    found = json.loads(command(capsys, "status", "--config", str(place), "--json")[1])
    assert found["operator"]["files"][0]["state"] == "encrypted"
    with pytest.raises(BadInput, match="found a key under a passphrase, expected one without") as e:
        Operator(find_place("localhost:1", kept.kit, operator_of(place)))
    assert "operator.toml" in e.value.remedy, "a kit that is named has no keystore"
    code, _, err = command(capsys, "encrypt", "--of", "authority", "--config", str(place))
    assert code == 2 and "always encrypted" in err
    operator_of(place).write_text(operator_of(place).read_text().partition("[keystore]")[0])
    code, _, err = command(capsys, "encrypt", *words["operator"])
    assert code == 2 and "operator.toml: found no [keystore]" in err


# ------------------------------------------------------------------------- the journal, and models of jobs

SUM, MODEL = bytes(range(1, 200)), bytes(range(200, 0, -1)) * 9000


def given(config, sealer, job="job"):
    """A job of this coordinator to which the sites gave a model."""
    journal = Journal.open(
        config.folder / "journal.sqlite", party=config.party, sealer=config.row_sealer()
    )
    spool, folder = Spool(config.folder / "spool"), config.folder / "jobs" / job
    folder.mkdir(parents=True)
    disk = JobDisk(journal, spool, folder, facts_of(), SealedModels(sealer))
    stored = spool.put(job, "upload", [MODEL[:7], MODEL[7:]])
    disk.uploads[stored.digest] = stored
    disk.keep_model(stored.digest)
    spool.drop(job)
    disk.put({"sum-1": SUM})
    journal.close()
    return disk, folder / MODEL_FILE


def found_on_disk(config):
    files = [path.read_bytes() for path in config.folder.rglob("*") if path.is_file()]
    return [what for what in (SUM, MODEL[-64:]) if any(what in data for data in files)]


def test_stolen_files_of_a_coordinator_hold_no_sum_and_no_model(place, capsys):
    config = read_config(place)
    given(config.model_copy(update={"keystore": None}), None)
    assert found_on_disk(config) == [SUM, MODEL[-64:]], "control: without a keystore"
    with pytest.raises(StoreProblem, match="found it in clear"):
        require_sealed_models(config.folder, FileSealer(SecretBytes(bytes(32))))
    code, out, err = command(capsys, "encrypt", "--config", str(place))
    assert (code, err) == (0, "") and "journal.sqlite" in out and MODEL_FILE in out
    assert found_on_disk(config) == []
    disk, path = given(config, config.file_sealer(), "second")
    assert found_on_disk(config) == []
    with disk.open_file(path) as file:
        assert file.read() == MODEL
    with SealedModels(config.file_sealer()).open(
        config.folder / "jobs" / "job" / MODEL_FILE
    ) as file:
        assert file.seek(1 << 20) == 1 << 20 and file.read(9) == MODEL[1 << 20 :][:9]
    require_sealed_models(config.folder, config.file_sealer())
    with open_journal(config, config.read_kit(), pytest.fail) as journal:
        assert journal.get("job", "sum-1") == SUM
        states = {f.name: f.state for f in private_files(config)}
        assert states == {"key.pem": "encrypted", "journal.sqlite": "in use", "jobs": "encrypted"}
        code, _, err = command(capsys, "encrypt", "--config", str(place))
        assert code != 0 and "found process" in err, "not while it runs"


@pytest.mark.parametrize("before", ["encrypted", "in clear"])
def test_a_standby_gets_a_model_from_the_database_and_encrypts_it(place, capsys, before):
    command(capsys, "encrypt", "--config", str(place))
    config = read_config(place)
    folder, sealer = config.folder / "jobs" / "job", config.file_sealer()
    folder.mkdir(parents=True)
    path = folder / MODEL_FILE
    with Journal.open(config.folder / "other", party=config.party) as journal:
        journal.elsewhere = True  # as on a server
        models = SealedModels(sealer if before == "encrypted" else None)
        spool = Spool(config.folder / "spool")
        disk = JobDisk(journal, spool, folder, facts_of(), models)
        stored = spool.put("job", "upload", [MODEL])
        disk.uploads[stored.digest] = stored
        disk.keep_model(stored.digest)
        path.unlink()
        standby = JobDisk(journal, spool, folder, facts_of(), SealedModels(sealer))
        standby.load()
        with standby.open_file(path) as file:
            assert file.read() == MODEL
        assert MODEL[-64:] not in path.read_bytes()
        with pytest.raises(StoreProblem, match="expected it in clear"):
            SealedModels(None).open(path)


def test_a_model_of_another_job_or_in_the_other_form_is_refused(place, capsys):
    config = read_config(place)
    command(capsys, "encrypt", "--config", str(place))
    (_, one), (disk, two) = (
        given(config, config.file_sealer()),
        given(config, config.file_sealer(), "2"),
    )
    two.write_bytes(one.read_bytes())
    with pytest.raises(StoreProblem, match="not encrypted for this place"):
        disk.open_file(two)
    one.write_bytes(MODEL)
    with pytest.raises(StoreProblem, match="found it in clear"):
        require_sealed_models(config.folder, config.file_sealer())
    one.unlink()
    with pytest.raises(StoreProblem, match="found it encrypted, expected it in clear"):
        require_sealed_models(config.folder, None)


def test_a_journal_in_clear_is_refused_where_there_is_a_keystore(place, capsys):
    config = read_config(place)
    Journal.open(config.folder / "journal.sqlite", party=config.party).close()
    (config.folder / "journal.sqlite").rename(place.parent / "kept")
    command(capsys, "encrypt", "--config", str(place))
    (place.parent / "kept").rename(config.folder / "journal.sqlite")
    with pytest.raises(StoreProblem, match="found it in clear") as error:
        open_journal(config, config.read_kit(), pytest.fail)
    assert "fed-coordinator" in error.value.remedy


# ------------------------------------------------------------------------- the journal on a database server


def test_a_journal_on_a_server_is_encrypted_and_a_standby_opens_it_with_the_same_keystore(
    place, capsys, postgres, tmp_path
):
    database = PostgresqlPlace(postgres)
    url = postgres.tcp(database.name)
    place.write_text(f'database = "{url}"\n' + place.read_text())
    place.chmod(0o600)
    config = read_config(place)
    kit = config.model_copy(update={"keystore": None}).read_kit()
    with open_journal(config.model_copy(update={"keystore": None}), kit, pytest.fail) as journal:
        journal.put("job", "sum-1", SUM)
        code, _, err = command(capsys, "encrypt", "--config", str(place))
        assert code == 2 and "with the lease of" in err, "not while it runs"
        assert not (place.parent / "keystore.json").exists(), "nothing half-done"
    rows = "SELECT body FROM fedcore.kept_values"
    assert database.sql(rows)[0][0] == SUM, "control: its administrator reads it"
    assert (
        "in clear   postgresql://fedcore@" in command(capsys, "status", "--config", str(place))[1]
    )
    code, out, err = command(capsys, "encrypt", "--config", str(place))
    assert (code, err) == (0, "") and "write-ahead log and backups" in out
    assert SUM not in database.sql(rows)[0][0] and SUM not in database.on_disk()
    with open_journal(read_config(place), read_config(place).read_kit(), pytest.fail) as journal:
        assert journal.get("job", "sum-1") == SUM
        out = command(capsys, "status", "--config", str(place))[1]
        assert "encrypted  postgresql://fedcore@" in out and PASSWORD not in out, "while it runs"

    backup, standby = tmp_path / "backup", tmp_path / "standby" / "federation.toml"
    assert command(capsys, "backup", str(backup), "--config", str(place))[0] == 0
    (standby.parent / "kit").mkdir(parents=True)
    standby.write_text(place.read_text())
    standby.chmod(0o600)
    code, _, err = command(capsys, "restore", str(backup), "--config", str(standby))
    assert (code, err) == (0, "")
    config = read_config(standby)
    with open_journal(config, config.read_kit(), pytest.fail) as journal:
        assert journal.get("job", "sum-1") == SUM
    (standby.parent / "keystore.json").unlink()
    code, _, err = command(capsys, "encrypt", "--config", str(standby))
    assert code == 2 and "expected the keystore that" in err, "no second keystore is made"
