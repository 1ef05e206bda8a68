"""`fed-coordinator keystore`: the coordinator's key, encrypted at rest and used."""

from __future__ import annotations

import json
import ssl

import pytest
from fedcore_server.cli import main
from fedcore_server.config import read_config
from fedcore_server.federation import FederationFiles
from fedcore_server.tls import server_credentials
from support.federations import authority_of, new_federation, now
from support.keystores import cheap_scrypt, passphrase_file

from fedcore.errors import BadInput
from fedcore.identity.kit import KEY_FILE, KitFile


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A federation's file with a [keystore], its key still in clear."""
    cheap_scrypt(monkeypatch)
    path = new_federation(tmp_path / "one").config.roster.parent / "federation.toml"
    unlock = f"file:{passphrase_file(tmp_path / 'secrets')}"
    path.write_text(f"{path.read_text()}\n[keystore]\nunlock = {unlock!r}\n")
    return path


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
    assert (code, err) == (0, "") and "restart a running coordinator" in out
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
