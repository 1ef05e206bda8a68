"""Keys, kits and rosters on disk: who can read them, and what is said of bad ones."""

from __future__ import annotations

import base64
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fedcore.errors import AlreadyExists, BadInput, CertificateRefused, RosterRefused
from fedcore.identity.authority import Authority
from fedcore.identity.identities import create_identity, read_identity, read_roster, write_roster
from fedcore.identity.kit import (
    AUTHORITY_FILE,
    CERTIFICATE_FILE,
    KEY_FILE,
    Kit,
    read_key,
    write_private,
)
from fedcore.secagg.crypto.identity_key import IdentityKey, roster_digest, verify
from fedcore.secagg.crypto.secret import SecretBytes

NOW = datetime.now(UTC)
HEART = Authority.create("heart", NOW)
KEYS = {name: IdentityKey(bytes([n]) * 32).public for n, name in enumerate(["va", "oslo", "basel"])}

# ------------------------------------------------------------------------------------------- keys


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_private_file_is_its_owners_whatever_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        write_private(tmp_path / "key.pem", SecretBytes(b"secret"))
    finally:
        os.umask(before)
    assert (tmp_path / "key.pem").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "key.pem").read_bytes() == b"secret"
    assert [path.name for path in tmp_path.iterdir()] == ["key.pem"]


def test_a_leftover_of_a_killed_process_is_no_trap(tmp_path):
    leftover = tmp_path / f".key.pem.{os.getpid()}.part"
    leftover.write_bytes(b"half")
    leftover.chmod(0o644)
    write_private(tmp_path / "key.pem", SecretBytes(b"secret"))
    assert (tmp_path / "key.pem").stat().st_mode & 0o777 == 0o600
    assert not leftover.exists()


def test_a_key_is_never_overwritten(tmp_path):
    path = tmp_path / "key.pem"
    write_private(path, SecretBytes(b"one"))
    with pytest.raises(AlreadyExists, match=r"key\.pem: found a key already"):
        write_private(path, SecretBytes(b"two"))
    assert path.read_bytes() == b"one"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    code = (
        "import resource, signal, sys; from pathlib import Path\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
        "from fedcore.errors import BadInput\n"
        "from fedcore.secagg.crypto.secret import SecretBytes\n"
        "from fedcore.identity.kit import write_private\n"
        "try: write_private(Path(sys.argv[1]), SecretBytes(bytes(1000)))\n"
        "except BadInput as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, str(tmp_path / "key.pem")],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert "key.pem: it cannot be written (File too large)" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(BadInput, match="it cannot be written \\(No such file"):
        create_identity(tmp_path / "nowhere" / "identity.pem")


@pytest.mark.parametrize(
    ("mode", "usable"),
    [
        (0o600, True),
        (0o400, True),
        (0o440, True),
        (0o640, True),
        (0o644, False),
        (0o660, False),
        (0o604, False),
    ],
)
def test_a_key_that_others_can_read_is_not_used(tmp_path, mode, usable):
    path = tmp_path / "identity.pem"
    key = create_identity(path)
    path.chmod(mode)
    if usable:
        assert read_identity(path).public == key.public
        return
    with pytest.raises(BadInput, match=f"found mode {mode:04o}, expected 0600") as caught:
        read_identity(path)
    assert caught.value.remedy == f"chmod 600 {path}"


def test_identity_keys_come_back_and_sign(tmp_path):
    made, other = create_identity(tmp_path / "a"), create_identity(tmp_path / "b")
    assert made.public != other.public
    again = read_identity(tmp_path / "a")
    verify(made.public, b"keys", b"m", again.sign(b"keys", b"m"), signer="va")
    assert b"BEGIN PRIVATE KEY" in (tmp_path / "a").read_bytes()
    with pytest.raises(AlreadyExists):
        create_identity(tmp_path / "a")


def pem(key, encryption=None):
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        encryption or serialization.NoEncryption(),
    )


ELLIPTIC = ec.generate_private_key(ec.SECP256R1())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "no private key"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "no private key"),
        (pem(ELLIPTIC, serialization.BestAvailableEncryption(b"x")), "under a passphrase"),
        (pem(ELLIPTIC), "another kind, expected Ed25519"),
        (bytes(1 << 20) + b"x", "more than 1048576 bytes"),
    ],
)
def test_files_that_hold_no_identity(tmp_path, data, words):
    path = tmp_path / "identity.pem"
    write_private(path, SecretBytes(data))
    with pytest.raises(BadInput, match=words):
        read_identity(path)


# ------------------------------------------------------------------------------------------- kits


def test_a_kit_prints_without_its_key(tmp_path):
    assert "PRIVATE" not in repr(HEART.issue("site", "va", NOW).save(tmp_path / "kit"))


def test_kits_that_do_not_load(tmp_path):
    folder = tmp_path / "kit"
    HEART.issue("site", "va", NOW).save(folder)

    def spoiled(name, data, match, error=BadInput):
        before = (folder / name).read_bytes()
        (folder / name).write_bytes(data)
        with pytest.raises(error, match=match):
            Kit.load(folder)
        (folder / name).write_bytes(before)

    spoiled(KEY_FILE, pem(ELLIPTIC), r"key\.pem: found the key of another certificate")
    spoiled(KEY_FILE, b"x", r"key\.pem: found no private key")
    for name in (AUTHORITY_FILE, CERTIFICATE_FILE):
        spoiled(name, b"x", rf"{name}: found no certificate")
    spoiled(
        CERTIFICATE_FILE,
        HEART.certificate_pem,
        r"certificate\.pem: certificate: found no federation in it",
        CertificateRefused,
    )
    assert Kit.load(folder).peer.name == "va"
    (folder / AUTHORITY_FILE).unlink()
    with pytest.raises(BadInput, match=r"authority\.pem: it cannot be read \(No such file"):
        Kit.load(folder)


def test_read_key_takes_what_a_kit_holds(tmp_path):
    HEART.issue("site", "va", NOW).save(tmp_path)
    assert isinstance(read_key(tmp_path / KEY_FILE), ec.EllipticCurvePrivateKey)


# ----------------------------------------------------------------------------------------- roster


def roster_file(tmp_path, text) -> Path:
    path = tmp_path / "roster.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_order_of_the_file_is_the_roster(tmp_path):
    for names in (["va", "oslo", "basel"], ["basel", "va", "oslo"]):
        roster = {name: KEYS[name] for name in names}
        write_roster(tmp_path / "roster.toml", roster)
        found = read_roster(tmp_path / "roster.toml")
        assert list(found.items()) == list(roster.items())
        assert roster_digest(found) == roster_digest(roster)


def test_keys_in_base64_and_hexadecimal(tmp_path):
    text = (
        f'[sites]\nva = {{ identity = "{base64.b64encode(KEYS["va"]).decode()}" }}\n'
        f'[sites.oslo]\nidentity = "{KEYS["oslo"].hex().upper()}"\n'
        f'[sites."basel.1"]\nidentity = "{KEYS["basel"].hex()}"\n'
    )
    assert read_roster(roster_file(tmp_path, text)) == {
        "va": KEYS["va"],
        "oslo": KEYS["oslo"],
        "basel.1": KEYS["basel"],
    }


VA_KEY = KEYS["va"].hex()


def entry(name="va", key=VA_KEY):
    return f'{name} = {{ identity = "{key}" }}\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "found nothing, expected one table"),
        ("sites = 3\n", "expected one table"),
        ("[sites]\n[other]\n", "found 'sites', 'other'"),
        ("[sites\n", "cannot be read as TOML"),
        ("[sites]\n" + entry() + entry(), "cannot be read as TOML"),
        ("[sites]\nva = 3\n", "sites.va: found int"),
        ("[sites]\nva = {}\n", "sites.va: found dict"),
        ('[sites]\nva = { identity = "ab", role = "x" }\n', "sites.va: found dict"),
        ("[sites]\nva = { identity = 3 }\n", "sites.va.identity: found int, expected 32 bytes"),
        ("[sites]\n" + entry(key="ab"), "sites.va.identity: found a text of 2 characters"),
        ("[sites]\n" + entry(key="z" * 64), "found a text of 64 characters"),
        ("[sites]\n" + entry(key=base64.b64encode(bytes(31)).decode()), "found a text of 44"),
        ("[sites]\n" + entry(key=f"!{base64.b64encode(bytes(32)).decode()}"), "a text of 45"),
        ("[sites]\n" + entry('"a b"'), "roster.toml: sites: found 'a b'"),
        (
            "[sites]\n" + entry() + entry("oslo"),
            "sites.oslo: found the key of va, expected a key of",
        ),
        ("[sites]\n" + entry(key="00" * 32), "sites.va: found a point of small order"),
    ],
)
def test_rosters_that_are_refused_name_the_entry(tmp_path, text, words):
    with pytest.raises(BadInput, match=words) as caught:
        read_roster(roster_file(tmp_path, text))
    assert "roster.toml" in str(caught.value)
    assert "z" * 64 not in str(caught.value)  # it may be a private key, pasted by mistake


def test_a_roster_that_is_no_text_or_not_there(tmp_path):
    with pytest.raises(BadInput, match="it cannot be read"):
        read_roster(tmp_path / "roster.toml")
    (tmp_path / "roster.toml").write_bytes(b"\xff")
    with pytest.raises(BadInput, match="cannot be read as TOML"):
        read_roster(tmp_path / "roster.toml")


def test_a_roster_that_would_be_refused_is_not_written(tmp_path):
    with pytest.raises(RosterRefused):
        write_roster(tmp_path / "roster.toml", {"va": KEYS["va"], "oslo": KEYS["va"]})
    with pytest.raises(BadInput):
        write_roster(tmp_path / "roster.toml", {'va"': KEYS["va"]})
    assert not (tmp_path / "roster.toml").exists()
