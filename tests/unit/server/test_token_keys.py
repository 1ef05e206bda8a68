"""The authority's key inside a token: SoftHSM stands for a hardware module."""

from __future__ import annotations

import copy
import gc
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from fedcore_server.authority_key import find_authority
from fedcore_server.cli import main
from fedcore_server.config import read_config
from fedcore_server.federation import FederationFiles

from fedcore.errors import AlreadyExists, BadInput
from fedcore.identity.tokens import TokenUri, make_token_key, open_token_key
from fedcore.secagg.crypto.secret import SecretBytes

PIN, OFFICER = "2468 1357", "8642"
WHERE = "federation.toml: enrolment.key"


def softhsm():
    """Where its library is; None without it."""
    found = Path("/usr/lib").glob("**/softhsm/libsofthsm2.so")
    return next(iter(sorted(found)), None) if shutil.which("softhsm2-util") else None


MODULE = softhsm()


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """SoftHSM with one token, in a folder of its own: the library reads the variable when it is first loaded."""
    pytest.importorskip("pkcs11", reason="python-pkcs11 is not installed (the extra `pkcs11`)")
    if MODULE is None:
        pytest.skip("SoftHSM is not installed (Debian's package softhsm2)")
    folder = tmp_path_factory.mktemp("softhsm")
    (folder / "tokens").mkdir()
    settings = folder / "softhsm2.conf"
    settings.write_text(f"directories.tokendir = {folder / 'tokens'}\nobjectstore.backend = file\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOFTHSM2_CONF", str(settings))
        made = ["softhsm2-util", "--init-token", "--free", "--label", "heart", "--so-pin", OFFICER]
        subprocess.run([*made, "--pin", PIN], check=True, capture_output=True)
        yield MODULE


@pytest.fixture
def uri(module, request):
    gc.collect()  # keys of earlier tests: as long as one is in use, its process counts as logged in
    return f"pkcs11:token=heart;object={request.node.name}?module-path={module}"


@pytest.fixture
def pin_file(tmp_path):
    path = tmp_path / "pin"
    path.touch(0o600)
    path.write_text(f"{PIN}\n")
    return path


def pin():
    return SecretBytes(PIN.encode())


def command(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main([*map(str, words)])
    return ended.value.code, *capsys.readouterr()


def test_a_key_is_made_signs_and_does_not_leave(uri):
    place = TokenUri.parse(uri, WHERE)
    key = make_token_key(place, pin)
    message = b"what the authority signs"
    for each in (key, open_token_key(place, pin), copy.copy(key), copy.deepcopy(key)):
        signature = each.sign(message, ec.ECDSA(hashes.SHA256()))
        key.public_key().verify(signature, message, ec.ECDSA(hashes.SHA256()))
    with pytest.raises(UnsupportedAlgorithm, match="does not leave it"):
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with pytest.raises(UnsupportedAlgorithm, match="does not leave it"):
        key.private_numbers()
    with pytest.raises(UnsupportedAlgorithm, match="SHA-256"):
        key.sign(message, ec.ECDSA(hashes.SHA512()))
    with pytest.raises(AlreadyExists, match="never overwritten"):
        make_token_key(place, pin)
    assert "heart" in repr(key) and PIN not in repr(key)


def test_a_federation_is_founded_and_lives_with_its_authority_in_a_token(
    uri, pin_file, tmp_path, capsys
):
    folder = tmp_path / "fed"
    code, out, err = command(
        capsys, "init", "heart", "--host", "localhost", "--out", folder, "--key", uri,
        "--unlock", f"file:{pin_file}",
    )  # fmt: skip
    assert (code, err) == (0, "") and "in its token" in out
    assert sorted(path.name for path in (folder / "authority").iterdir()) == ["authority.pem"]
    config = read_config(folder / "federation.toml")
    authority = find_authority(config)
    certificate = x509.load_pem_x509_certificate(authority.certificate_pem)
    certificate.verify_directly_issued_by(certificate)
    issued = authority.issue("site", "va", datetime.now(UTC))
    x509.load_pem_x509_certificate(issued.certificate_pem).verify_directly_issued_by(certificate)
    files = FederationFiles(config)
    assert files.roster().number == 1, "its signature was verified"
    code, out, err = command(capsys, "renew", "--config", folder / "federation.toml")
    assert (code, err) == (0, "") and "coordinator" in out
    every = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert PIN.encode() not in every
    status = command(capsys, "keystore", "status", "--config", folder / "federation.toml")[1]
    assert "authority: key" in status and "in token 'heart'" in status
    of = ("--of", "authority", "--config", folder / "federation.toml")
    code, _, err = command(capsys, "keystore", "backup", tmp_path / "x", *of)
    assert code == 2 and "by the token's own means" in err


def test_a_wrong_pin_token_or_key_is_named(uri, module, pin_file):
    place = TokenUri.parse(uri, WHERE)
    for found, what in (
        (place, "found 0 objects private key as key"),
        (TokenUri.parse(uri.replace("token=heart", "token=other"), WHERE), "found no answer for"),
        (TokenUri.parse(uri.replace(".so", ".none"), WHERE), "found no answer for"),
    ):
        with pytest.raises(BadInput, match=what):
            open_token_key(found, pin)
    with pytest.raises(BadInput, match="found a PIN that does not open") as error:
        open_token_key(place, lambda: SecretBytes(b"9999 9999"))
    assert "9999" not in str(error.value) and "locks itself" in error.value.remedy


def test_a_key_that_could_leave_its_token_is_refused(uri, module):
    import pkcs11
    from pkcs11.util.ec import encode_named_curve_parameters

    place = TokenUri.parse(uri, WHERE)
    token = pkcs11.lib(str(module)).get_token(token_label="heart")
    with token.open(rw=True, user_pin=PIN) as session:
        curve = {pkcs11.Attribute.EC_PARAMS: encode_named_curve_parameters("secp256r1")}
        session.create_domain_parameters(pkcs11.KeyType.EC, curve, local=True).generate_keypair(
            store=True, label=place.object,
            private_template={pkcs11.Attribute.SENSITIVE: False, pkcs11.Attribute.EXTRACTABLE: True},
        )  # fmt: skip
    with pytest.raises(BadInput, match="extractable, expected one that cannot leave"):
        open_token_key(place, pin)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "found no pkcs11: before it"),
        ("token=a;object=b?module-path=/m", "found no pkcs11: before it"),
        ("pkcs11:token=a;object=b", "lacks one of them"),
        ("pkcs11:object=b?module-path=/m", "lacks one of them"),
        ("pkcs11:token=a?module-path=/m", "lacks one of them"),
        ("pkcs11:token=a;object=b?module-path=m", "lacks one of them"),
        ("pkcs11:token=a;token=b;object=c?module-path=/m", "twice"),
        ("pkcs11:token;object=c?module-path=/m", "without a value"),
        ("pkcs11:token=a;object=b;type=cert?module-path=/m", "type of another object"),
        ("pkcs11:token=a;object=b;slot-id=0?module-path=/m", "the attribute 'slot-id'"),
        ("pkcs11:token=a;object=b?module-path=/m&pin-value=1357", "the attribute pin-value"),
        ("pkcs11:token=a;object=b?module-path=/m&pin-source=/p", "the attribute pin-source"),
    ],
)
def test_a_uri_that_names_no_key_or_has_a_pin_is_refused(text, what):
    with pytest.raises(BadInput, match=what) as error:
        TokenUri.parse(text, WHERE)
    assert str(error.value).startswith(WHERE) and "1357" not in str(error.value)


def test_the_parts_of_a_uri_are_decoded():
    text = "pkcs11:token=the%20heart;id=%01%ff;type=private?module-path=/usr/lib/m.so"
    found = TokenUri.parse(text, WHERE)
    assert (found.token, found.id, found.module) == (
        "the heart",
        b"\x01\xff",
        Path("/usr/lib/m.so"),
    )
    assert str(found) == "key '01ff' in token 'the heart' of /usr/lib/m.so"
