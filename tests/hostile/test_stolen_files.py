"""A thief has a copy of a site's whole folder, from a disk or a backup, but not the passphrase."""

from __future__ import annotations

import base64
import shutil

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from fedcore_clients.app import read_papers
from fedcore_clients.private_files import encrypt
from fedcore_clients.state_files import StateFiles, state_folder
from support.keystores import PASSPHRASE, cheap_scrypt, new_site

from fedcore.errors import BadInput
from fedcore.identity.identities import read_identity
from fedcore.identity.kit import read_key
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.secagg.protocol.round.site import Secrets
from fedcore.store.journal import Journal

OF_A_ROUND = [bytes([number]) * 32 for number in (201, 202, 203)]
OF_AN_EPOCH = bytes([204]) * 32
MODEL = bytes(range(100, 164))


@pytest.fixture(autouse=True)
def _cheap(monkeypatch):
    cheap_scrypt(monkeypatch)


def secrets_of(config):
    """Every form in which the two private keys of a site could stand in a file. Read before they are encrypted."""
    tls, identity = read_key(config.kit / "key.pem"), read_key(config.identity)
    assert isinstance(tls, ec.EllipticCurvePrivateKey)
    raw = [tls.private_numbers().private_value.to_bytes(32, "big"), identity.private_bytes_raw()]
    pem = [path.read_bytes().splitlines()[1] for path in (config.kit / "key.pem", config.identity)]
    return [form for key in raw for form in (key, key.hex().encode(), base64.b64encode(key))] + pem


def found_in(folder, secrets):
    files = [path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()]
    return [secret for secret in secrets if any(secret in data for data in files)]


def test_stolen_files_hold_no_key_and_no_passphrase(tmp_path):
    config = new_site(tmp_path / "va")
    secrets = [*secrets_of(config), PASSPHRASE.encode(), PASSPHRASE.encode().hex().encode()]
    with Journal.open(config.folder / "journal.sqlite", party=config.party) as journal:
        journal.append("job", "round", [Secrets(*map(SecretBytes, OF_A_ROUND))])
        journal.put("job", "epoch", OF_AN_EPOCH)
    secrets += [*OF_A_ROUND, OF_AN_EPOCH, MODEL]
    states = StateFiles(state_folder(config.folder, "job"))
    states.write(states.current, MODEL)
    shutil.copytree(config.base, tmp_path / "before")
    assert len(found_in(tmp_path / "before", secrets)) == 7, (
        "control: the keys' PEM, the journal's, the model"
    )
    encrypt(config)
    read_papers(config)
    assert found_in(config.base, secrets) == []


def test_stolen_key_files_open_with_nothing_that_was_stolen_with_them(tmp_path):
    """Neither the passphrase itself nor what stands in the keystore is their password: a guess costs scrypt."""
    config = new_site(tmp_path / "va")
    encrypt(config)
    words = config.keystore.file.read_text().replace('"', " ").replace(",", " ").split()
    raw = [bytes.fromhex(word) for word in words if len(word) in (64, 96)]
    tried = [b"x", PASSPHRASE.encode(), *(word.encode() for word in words), *raw]
    for path in (config.identity, config.kit / "key.pem"):
        for guess in tried:
            with pytest.raises(ValueError, match=r"."):
                serialization.load_pem_private_key(path.read_bytes(), guess)
        name = path.name
        read_key(path, config.password(name))  # control: its own password opens it


def test_key_files_put_in_each_others_place_are_refused(tmp_path):
    """Between the two files of a site, and between two sites that were given the same passphrase."""
    va, oslo = new_site(tmp_path / "va"), new_site(tmp_path / "oslo", name="oslo")
    for config in (va, oslo):
        encrypt(config)
    identity, key = va.identity.read_bytes(), (va.kit / "key.pem").read_bytes()
    for path, other in (
        (va.identity, key), (va.kit / "key.pem", identity),
        (va.identity, oslo.identity.read_bytes()), (va.kit / "key.pem", (oslo.kit / "key.pem").read_bytes()),
    ):  # fmt: skip
        own = path.read_bytes()
        path.write_bytes(other)
        with pytest.raises(BadInput, match=f"{path.name}: found a key that the keystore does not"):
            read_papers(va)
        path.write_bytes(own)
    read_papers(va)
    va.keystore.file.write_bytes(oslo.keystore.file.read_bytes())
    with pytest.raises(BadInput, match="found the keystore of site oslo, expected that of site va"):
        read_papers(va)


def test_a_key_of_the_thiefs_own_in_clear_is_not_used(tmp_path):
    """Whoever can write to the folder, but has no passphrase, cannot make the site sign with another key."""
    config = new_site(tmp_path / "va")
    clear = config.identity.read_bytes()
    encrypt(config)
    config.identity.write_bytes(clear)
    with pytest.raises(BadInput, match="found a key in clear, expected it encrypted"):
        read_papers(config)
    assert read_identity(config.identity).public, "control: without [keystore] it would be used"
    config.identity.write_bytes(sealed_by_thief(config))
    with pytest.raises(BadInput, match="does not open"):
        read_papers(config)


def sealed_by_thief(config):
    key = read_key(config.identity)
    form = serialization.PrivateFormat.PKCS8, serialization.BestAvailableEncryption(b"of the thief")
    return key.private_bytes(serialization.Encoding.PEM, *form)
