"""The authority's folder: its keystore, a key of the earlier form, and what is refused."""

from __future__ import annotations

import shutil
import time
from datetime import UTC, datetime

import pytest
from support.keystores import AUTHORITY, PASSPHRASE, cheap_scrypt
from support.killed import killed_before

from fedcore.errors import AlreadyExists, BadInput
from fedcore.files import lock
from fedcore.files.disk import open_to_others
from fedcore.identity.authority import Authority
from fedcore.identity.authority_files import open_authority_files, save_authority
from fedcore.identity.kit import read_key
from fedcore.secagg.crypto.secret import SecretBytes

SECRET = SecretBytes(PASSPHRASE.encode())


@pytest.fixture(autouse=True)
def _cheap(monkeypatch):
    cheap_scrypt(monkeypatch)


@pytest.fixture
def folder(tmp_path):
    save_authority(AUTHORITY, tmp_path / "authority", SECRET)
    return tmp_path / "authority"


@pytest.fixture
def earlier(tmp_path):
    """A folder of the earlier form: the passphrase itself encrypts the key."""
    AUTHORITY.save(tmp_path / "earlier", SECRET)
    return tmp_path / "earlier"


def opened(folder, secret=SECRET):
    return open_authority_files(folder, lambda: secret)[0]


def opens_by_passphrase_alone(folder):
    try:
        read_key(folder / "key.pem", SECRET)
    except BadInput:
        return False
    return True


def test_the_passphrase_opens_the_key_through_the_keystore_only(folder):
    assert opened(folder).fingerprint == AUTHORITY.fingerprint
    assert not opens_by_passphrase_alone(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "authority.pem", "key.pem", "keystore.json"
    ]  # fmt: skip
    assert all(folder.joinpath(n).stat().st_mode & 0o077 == 0 for n in ("key.pem", "keystore.json"))
    with pytest.raises(AlreadyExists):
        save_authority(AUTHORITY, folder, SECRET)
    pem = opened(folder).issue("site", "va", datetime.now(UTC)).certificate_pem
    assert pem.startswith(b"-----BEGIN CERTIFICATE")


def test_a_key_of_the_earlier_form_is_opened_and_encrypted_anew(earlier, caplog):
    assert opens_by_passphrase_alone(earlier), "the control: 1 ms a guess"
    assert opened(earlier).fingerprint == AUTHORITY.fingerprint
    assert "encrypted anew" in caplog.text and PASSPHRASE not in caplog.text
    assert not opens_by_passphrase_alone(earlier)
    caplog.clear()
    assert opened(earlier).fingerprint == AUTHORITY.fingerprint and caplog.text == ""
    with pytest.raises(BadInput, match="a keystore that this passphrase does not open"):
        opened(earlier, SecretBytes(b"another passphrase"))


def test_encrypting_anew_can_be_killed_between_any_two_steps(earlier, tmp_path):
    step, conversions = 0, set()
    while True:
        folder = tmp_path / str(step)
        shutil.copytree(earlier, folder)
        killed = killed_before(step, lambda at=folder: opened(at))
        conversions.add(opens_by_passphrase_alone(folder))
        assert open_to_others(folder, ["key.pem", ".*", "keystore*"]) in ([], [folder])
        assert opened(folder).fingerprint == AUTHORITY.fingerprint
        assert not opens_by_passphrase_alone(folder)
        assert not [path.name for path in folder.glob(".*.encrypted")]
        if not killed:
            break
        step += 1
    assert step > 20 and conversions == {True, False}


def test_a_folder_that_cannot_be_written_is_used_as_it_is(earlier, caplog, monkeypatch):
    (earlier / ".lock").mkdir()  # also root cannot make the file
    assert opened(earlier).fingerprint == AUTHORITY.fingerprint
    assert "cannot be encrypted anew" in caplog.text and "give this user the right" in caplog.text
    assert opens_by_passphrase_alone(earlier)


def test_another_command_that_encrypts_it_is_waited_for(earlier, monkeypatch):
    monkeypatch.setattr(lock, "WAIT_SECONDS", 0.05)
    held = lock.FileLock(earlier / ".lock", BadInput)
    begin = time.monotonic()
    assert open_authority_files(earlier, lambda: SECRET)[1] is None
    assert time.monotonic() - begin >= 0.05
    held.release()
    assert open_authority_files(earlier, lambda: SECRET)[1] is not None


@pytest.mark.parametrize("name", ["key.pem", "keystore.json"])
def test_a_file_that_others_can_read_is_refused_before_the_passphrase_is_read(folder, name):
    (folder / name).chmod(0o644)
    with pytest.raises(BadInput, match=f"{name}: found mode 0644, expected 0600"):
        open_authority_files(folder, lambda: pytest.fail("the passphrase was read"))


def test_a_damaged_or_missing_file_is_named_with_what_to_restore(folder, tmp_path):
    keystore, key = folder / "keystore.json", folder / "key.pem"
    whole, sealed = keystore.read_bytes(), key.read_bytes()
    keystore.write_bytes(whole[:-9])
    with pytest.raises(BadInput, match=r"keystore\.json: found it damaged") as error:
        opened(folder)
    assert "restore it from a backup" in error.value.remedy
    keystore.unlink()
    with pytest.raises(BadInput, match=r"key\.pem: found a key that this passphrase") as error:
        opened(folder)
    assert "keystore.json was beside the key: restore it" in error.value.remedy
    keystore.write_bytes(whole)
    keystore.chmod(0o600)
    key.write_bytes(sealed[:90] + bytes([sealed[90] ^ 1]) + sealed[91:])
    with pytest.raises(BadInput, match=r"key\.pem: found a key that its keystore does not open"):
        opened(folder)
    key.unlink()
    with pytest.raises(BadInput, match=r"key\.pem: it cannot be read"):
        opened(folder)
    Authority.create("heart", datetime.now(UTC)).save(tmp_path / "clear")
    with pytest.raises(BadInput, match="found a key in clear, or none, expected it encrypted"):
        opened(tmp_path / "clear")
