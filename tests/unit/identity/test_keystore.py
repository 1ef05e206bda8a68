"""The keystore's file, the passwords that it gives, and where a passphrase comes from."""

from __future__ import annotations

import hashlib
import json
import os
import ssl
import subprocess
import sys
import time
from datetime import UTC, datetime

import pytest
from support.keystores import AUTHORITY, PASSPHRASE, cheap_scrypt, passphrase_file

from fedcore.errors import AlreadyExists, BadInput
from fedcore.identity import keystore, passphrase
from fedcore.identity.identities import create_identity, read_identity
from fedcore.identity.keystore import Keystore, KeystoreFile, create_keystore, open_keystore
from fedcore.identity.kit import CERTIFICATE_FILE, KEY_FILE, Kit, KitFile, key_pem, read_key
from fedcore.identity.passphrase import KeystoreSection
from fedcore.secagg.crypto.secret import SecretBytes

SECRET = SecretBytes(PASSPHRASE.encode())
PARTY = "site va"


@pytest.fixture(autouse=True)
def _cheap(monkeypatch, request):
    if "real_cost" not in request.fixturenames:
        cheap_scrypt(monkeypatch)


@pytest.fixture
def real_cost():
    """This test pays what a user pays."""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "keystore.json"


# --------------------------------------------------------------------------------------- its file


@pytest.mark.usefixtures("real_cost")
def test_a_guess_costs_scrypt_of_128_mib(path):
    Keystore.create(path, PARTY, SECRET)
    assert KeystoreFile.read(path).n >= 1 << 17 and keystore.SCRYPT_R == 8
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(AlreadyExists):
        Keystore.create(path, PARTY, SECRET)


def test_each_file_of_each_party_has_its_own_password(path, tmp_path):
    made, again = Keystore.create(path, PARTY, SECRET), Keystore.load(path, PARTY, SECRET)
    assert again.password(KEY_FILE).reveal() == made.password(KEY_FILE).reveal()
    stores = [Keystore.create(tmp_path / n, f"site {n}", SECRET) for n in ("a", "b")]
    same_key = Keystore("site c", stores[0]._data_key)
    found = {
        each.password(name).reveal()
        for each in (*stores, same_key)
        for name in ("key.pem", "identity.pem")
    }
    assert len(found) == 6 and {len(each) for each in found} == {64}


@pytest.mark.parametrize(
    "other", [b"", b"correct", PASSPHRASE.encode() + b" ", PASSPHRASE.upper().encode()]
)
def test_another_passphrase_is_refused_and_not_quoted(path, other):
    Keystore.create(path, PARTY, SECRET)
    with pytest.raises(
        BadInput, match=r"keystore\.json: found a keystore that this passphrase does not"
    ) as error:
        Keystore.load(path, PARTY, SecretBytes(other))
    assert not other.strip() or other.decode() not in f"{error.value}{error.value.remedy}"


def test_a_damaged_keystore_is_named_with_what_to_restore(path):
    Keystore.create(path, PARTY, SECRET)
    whole = path.read_bytes()
    middle = whole.index(b'"salt"') + 20
    wrong = [whole[:n] for n in (0, 1, 100, len(whole) - 3)]
    wrong += [b"[]", b"{}", b"x", b"[" * 100_000, whole[:middle] + b"zz" + whole[middle + 2 :]]
    for data in wrong:
        path.write_bytes(data)
        with pytest.raises(BadInput, match=r"keystore\.json: found it damaged") as error:
            Keystore.load(path, PARTY, SECRET)
        assert "restore it from a backup" in error.value.remedy


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("party", "site b"),
        ("made", "2001"),
        ("n", 1 << 5),
        ("salt", "00" * 32),
        ("wrapped", "00" * 48),
    ],
)
def test_every_field_is_authenticated(path, field, value):
    """An attacker mends the checksum, too."""
    Keystore.create(path, PARTY, SECRET)
    path.write_text(json.dumps(mended(json.loads(path.read_text()) | {field: value})))
    party = value if field == "party" else PARTY
    with pytest.raises(BadInput, match="this passphrase does not open"):
        Keystore.load(path, party, SECRET)


@pytest.mark.usefixtures("real_cost")
@pytest.mark.parametrize("n", [1 << 14, 3 << 16, 1 << 21, -1, "131072", None, 131072.5])
def test_weaker_or_absurd_scrypt_parameters_are_refused_before_they_are_used(path, n, monkeypatch):
    with monkeypatch.context() as cheap:
        cheap_scrypt(cheap)
        Keystore.create(path, PARTY, SECRET)
    path.write_text(json.dumps(mended(json.loads(path.read_text()) | {"n": n})))
    with pytest.raises(BadInput, match="found it damaged"):
        Keystore.load(path, PARTY, SECRET)


def mended(tables):
    """With the checksum of what it says now."""
    rest = {k: v for k, v in tables.items() if k not in ("wrapped", "checksum")}
    header = json.dumps(rest, sort_keys=True).encode()
    return tables | {"checksum": hashlib.sha256(header + tables["wrapped"].encode()).hexdigest()}


def test_another_partys_version_or_mode_is_named(path):
    Keystore.create(path, PARTY, SECRET)
    with pytest.raises(BadInput, match="found the keystore of site va, expected that of site b"):
        Keystore.load(path, "site b", SECRET)
    whole = path.read_text()
    path.write_text(whole.replace('"version": 1', '"version": 2'))
    with pytest.raises(BadInput, match="found version 2, expected 1"):
        Keystore.load(path, PARTY, SECRET)
    path.write_text(whole)
    path.chmod(0o644)
    with pytest.raises(BadInput, match="found mode 0644"):
        Keystore.load(path, PARTY, SECRET)
    path.unlink()
    with pytest.raises(BadInput, match=r"keystore\.json: found no such file") as error:
        Keystore.load(path, PARTY, SECRET)
    assert "restore it from a backup" in error.value.remedy


# ---------------------------------------------------------------------------------- encrypted keys


def test_an_encrypted_kit_is_used_by_tls_and_reloaded(path, tmp_path):
    password = Keystore.create(path, PARTY, SECRET).password(KEY_FILE)
    before = AUTHORITY.issue("site", "va", datetime.now(UTC)).save(tmp_path / "kit")
    (tmp_path / "kit" / KEY_FILE).write_bytes(key_pem(read_key(before.key_path), password).reveal())
    kit = Kit.load(tmp_path / "kit", password)
    assert kit.key_pem.reveal() == before.key_pem.reveal()
    assert b"ENCRYPTED" in kit.key_path.read_bytes()
    kit.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    with pytest.raises(OSError, match=r"."):
        before.load_into(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))  # control: without the password
    current = KitFile(kit)
    pem = AUTHORITY.renew(kit.certificate_pem, datetime.now(UTC), days=40)
    (tmp_path / "kit" / CERTIFICATE_FILE).write_bytes(pem)
    assert current.refresh() and current.current.certificate_pem == pem
    assert current.current.password is password


def test_a_key_file_of_the_other_kind_is_named_with_the_way_out(path, tmp_path):
    password = Keystore.create(path, PARTY, SECRET).password("identity.pem")
    other = Keystore("site b", b"\1" * 32).password("identity.pem")
    key = create_identity(tmp_path / "sealed", password)
    create_identity(tmp_path / "clear")
    assert read_identity(tmp_path / "sealed", password).public == key.public
    for name, given, what, remedy in (
        ("clear", password, "found a key in clear", "`keystore encrypt` of fed-site"),
        ("sealed", None, "found a key under a passphrase", "[keystore]"),
        ("sealed", other, "that the keystore does not open", "restore both from one backup"),
        ("sealed", SECRET, "that the keystore does not open", "restore both"),
    ):
        with pytest.raises(BadInput, match=what) as error:
            read_identity(tmp_path / name, given)
        assert str(tmp_path / name) in str(error.value) and remedy in error.value.remedy
    whole = (tmp_path / "sealed").read_bytes()
    (tmp_path / "sealed").write_bytes(whole[:90] + bytes([whole[90] ^ 1]) + whole[91:])
    with pytest.raises(BadInput, match="sealed: found a key that the keystore does not open"):
        read_identity(tmp_path / "sealed", password)
    (tmp_path / "sealed").write_bytes(b"")
    with pytest.raises(BadInput, match="found no private key"):
        read_identity(tmp_path / "sealed", password)


# --------------------------------------------------------------------------------- the passphrase


def section(unlock, tmp_path):
    return KeystoreSection(unlock=unlock).placed(tmp_path / "site.toml")


@pytest.mark.parametrize(
    "unlock",
    [PASSPHRASE, "", "file:", "command:", "env:", "env:1X", "env:A B", "FILE:x", "prompt:"],
)
def test_a_passphrase_in_the_configuration_is_refused_and_not_quoted(unlock, tmp_path):
    with pytest.raises(BadInput, match=r"keystore\.unlock: found a text of") as error:
        section(unlock, tmp_path)
    assert PASSPHRASE not in str(error.value)
    assert PASSPHRASE not in repr(KeystoreSection(unlock=PASSPHRASE))


def test_a_passphrase_file_counts_from_the_configuration_and_is_the_owners(tmp_path):
    path = passphrase_file(tmp_path)
    found = section("file:passphrase", tmp_path)
    assert found.passphrase_file == path and found.read().reveal() == PASSPHRASE.encode()
    path.chmod(0o440)  # as secrets are mounted for a group
    assert found.read().reveal() == PASSPHRASE.encode()
    for mode in (0o644, 0o604, 0o660):
        path.chmod(mode)
        with pytest.raises(BadInput, match=f"passphrase: found mode {mode:04o}, expected 0600"):
            found.read()
    passphrase_file(tmp_path, "")
    with pytest.raises(BadInput, match="passphrase: found it empty"):
        found.read()
    path.unlink()
    with pytest.raises(BadInput, match="passphrase: found no such file"):
        found.read()


def test_a_variable_is_removed_before_anything_is_started(tmp_path, monkeypatch):
    monkeypatch.setenv("SITE_SECRET", PASSPHRASE)
    found = section("env:SITE_SECRET", tmp_path)
    create_keystore(found, PARTY)
    seen = "import os; print('SITE_SECRET' in os.environ)"
    child = subprocess.run([sys.executable, "-c", seen], capture_output=True, text=True, check=True)
    assert "SITE_SECRET" not in os.environ and child.stdout == "False\n"
    opened = open_keystore(found, PARTY)  # it is not needed again in this process
    assert opened is open_keystore(found, PARTY)
    with pytest.raises(BadInput, match="found no variable SITE_SECRET in the environment"):
        found.read()
    monkeypatch.setenv("SITE_SECRET", "")
    with pytest.raises(BadInput, match="variable SITE_SECRET: found it empty"):
        found.read()


def test_a_command_prints_the_passphrase_and_no_shell_reads_its_arguments(tmp_path, capfd):
    code = f"import sys; print(*sys.argv[1:], {PASSPHRASE!r})"
    found = section(f'command:{sys.executable} -c "{code}" $HOME ; x', tmp_path)
    assert found.read().reveal() == f"$HOME ; x {PASSPHRASE}".encode()
    assert capfd.readouterr() == ("", "") and found.source == f"command:{sys.executable}"


@pytest.mark.parametrize(
    ("command", "what"),
    [
        ("/nowhere/kms", "command /nowhere/kms: it cannot be started"),
        ("false", "command false: found exit status 1"),
        ("true", "command true: found it empty"),
        ("kms 'open", "found a command that cannot be split"),
        (" ", "it cannot be started (no program named)"),
    ],
)
def test_a_command_that_gives_no_passphrase_is_named(command, what, tmp_path):
    with pytest.raises(BadInput) as error:
        section(f"command:{command}", tmp_path).read()
    assert what in str(error.value)


def test_a_command_that_hangs_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(passphrase, "COMMAND_SECONDS", 0.1)
    begin = time.monotonic()
    with pytest.raises(BadInput, match="command sleep: found no end after"):
        section("command:sleep 60", tmp_path).read()
    assert time.monotonic() - begin < 30


def test_a_new_passphrase_is_long_and_typed_twice(tmp_path, monkeypatch):
    found = section("prompt", tmp_path)
    with pytest.raises(BadInput, match="no terminal to ask at"):
        found.read()
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    typed = iter([PASSPHRASE, PASSPHRASE, PASSPHRASE, "another one", "short", "short"])
    monkeypatch.setattr("getpass.getpass", lambda _: next(typed))
    assert found.read(new=True).reveal() == PASSPHRASE.encode()
    with pytest.raises(BadInput, match="found two that differ"):
        found.read(new=True)
    with pytest.raises(BadInput, match="found 5 characters, expected 12 or more"):
        found.read(new=True)
