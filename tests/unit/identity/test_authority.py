"""The development authority: what it issues stands before a verifier that it did not write."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from fedcore.errors import AlreadyExists, BadInput, UnknownName
from fedcore.identity.authority import LOOPBACK, Authority
from fedcore.identity.kit import AUTHORITY_FILE, CERTIFICATE_FILE, KEY_FILE, Kit
from fedcore.identity.peer import ROLES, peer_of

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
HEART = Authority.create("heart", NOW)


def issue(role, authority=HEART, **how):
    return authority.issue(role, "ann", NOW, hosts=LOOPBACK if role == "coordinator" else (), **how)


def policy(authority=HEART, at=NOW):
    return PolicyBuilder().store(Store([authority.certificate])).time(at)


@pytest.mark.parametrize("role", [role for role in ROLES if role != "coordinator"])
def test_a_client_may_connect_and_not_serve(role):
    certificate = x509.load_pem_x509_certificate(issue(role).certificate_pem)
    names = policy().build_client_verifier().verify(certificate, []).subjects
    assert [name.value for name in names] == [f"fedcore://heart/{role}/ann"]
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [x509.ExtendedKeyUsageOID.CLIENT_AUTH]
    with pytest.raises(VerificationError, match="no matching subjectAltName"):
        policy().build_server_verifier(x509.DNSName("localhost")).verify(certificate, [])


def test_a_coordinator_may_serve_its_hosts_and_not_connect():
    certificate = x509.load_pem_x509_certificate(issue("coordinator").certificate_pem)
    for host in (x509.DNSName("localhost"), *(x509.IPAddress(ip_address(a)) for a in LOOPBACK[1:])):
        policy().build_server_verifier(host).verify(certificate, [])
    with pytest.raises(VerificationError, match="no matching subjectAltName"):
        policy().build_server_verifier(x509.DNSName("hub.example")).verify(certificate, [])
    with pytest.raises(VerificationError, match="EKU"):
        policy().build_client_verifier().verify(certificate, [])


def test_an_issued_certificate_issues_none():
    issued = issue("site")
    key = serialization.load_pem_private_key(issued.key_pem.reveal(), None)
    theirs = x509.load_pem_x509_certificate(issued.certificate_pem)
    grandchild = x509.load_pem_x509_certificate(
        issue("operator", Authority("heart", theirs, key)).certificate_pem
    )
    with pytest.raises(VerificationError, match=r"(?i)cA|basic|key"):
        policy().build_client_verifier().verify(grandchild, [theirs])
    usage = theirs.extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical and not usage.value.key_cert_sign
    constraints = HEART.certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical and constraints.value.path_length == 0


def test_times():
    issued = x509.load_pem_x509_certificate(issue("site", days=30).certificate_pem)
    assert issued.not_valid_before_utc <= NOW - timedelta(minutes=4)
    assert abs(issued.not_valid_after_utc - (NOW + 30 * DAY)) < timedelta(seconds=2)
    short = Authority.create("heart", NOW, days=10)
    peer = peer_of(issue("site", short).certificate_pem)
    assert peer.ends == short.certificate.not_valid_after_utc
    late = Authority.create("heart", NOW + timedelta(minutes=3))
    assert (
        peer_of(issue("site", late).certificate_pem).begins == late.certificate.not_valid_before_utc
    )
    with pytest.raises(BadInput, match="found its end at"):
        short.issue("site", "va", NOW + 11 * DAY)


def test_every_certificate_has_a_key_and_a_serial_of_its_own():
    one, two = issue("site"), issue("site")
    assert one.key_pem.reveal() != two.key_pem.reveal()
    assert peer_of(one.certificate_pem).serial != peer_of(two.certificate_pem).serial
    public = x509.load_pem_x509_certificate(one.certificate_pem).public_key()
    assert isinstance(public, ec.EllipticCurvePublicKey) and public.curve.name == "secp256r1"


def test_no_private_key_is_printed():
    issued = issue("site")
    for text in (repr(issued), str(issued), repr(HEART), str(HEART)):
        assert "PRIVATE KEY" not in text
        assert "EllipticCurvePrivateKey" not in text


@pytest.mark.parametrize(
    ("role", "name", "hosts", "words"),
    [
        ("site", "a/b", (), "name: found 'a/b'"),
        ("site", "", (), "name: found ''"),
        ("site", "va\n", (), "name: found"),
        ("site", "a" * 65, (), "1 to 64"),
        ("site", "-va", (), "beginning with"),
        ("site", "zürich", (), "letters, digits"),
        ("site", "va", ["localhost"], "found localhost for role 'site'"),
        ("coordinator", "hub", (), "hosts: found none"),
        ("coordinator", "hub", ["hub.example:8443"], "without port"),
        ("coordinator", "hub", ["[::1]"], "brackets"),
        ("coordinator", "hub", ["*.example"], "DNS name"),
        ("coordinator", "hub", ["a" * 64 + ".example"], "DNS name"),
        ("coordinator", "hub", ["hub.example\n"], "DNS name"),
        ("coordinator", "hub", [".".join(["a" * 60] * 5)], "DNS name"),
    ],
)
def test_what_is_not_issued(role, name, hosts, words):
    with pytest.raises(BadInput, match=words.replace("[", r"\[")):
        HEART.issue(role, name, NOW, hosts=hosts)


def test_roles_are_a_closed_list():
    with pytest.raises(UnknownName, match="found 'sites'") as caught:
        HEART.issue("sites", "va", NOW)
    assert caught.value.remedy == "did you mean 'site'?"
    with pytest.raises(BadInput, match="federation: found 'a b'"):
        Authority.create("a b", NOW)


def test_what_is_saved_of_an_authority_and_of_a_kit(tmp_path):
    HEART.save(tmp_path / "authority")
    assert (tmp_path / "authority" / AUTHORITY_FILE).read_bytes() == HEART.certificate_pem
    kit = issue("site").save(tmp_path / "va")
    assert kit.peer.federation == "heart"
    for folder in ("authority", "va"):
        assert (tmp_path / folder / KEY_FILE).stat().st_mode & 0o777 == 0o600
        assert (tmp_path / folder).stat().st_mode & 0o777 == 0o700
    assert sorted(path.name for path in (tmp_path / "va").iterdir()) == sorted(
        [AUTHORITY_FILE, CERTIFICATE_FILE, KEY_FILE]
    )
    context = ssl.create_default_context(cadata=kit.authority_pem.decode())
    context.load_cert_chain(kit.certificate_path, kit.key_path)  # OpenSSL takes the pair


def test_nothing_is_overwritten(tmp_path):
    kit = issue("site").save(tmp_path)
    with pytest.raises(AlreadyExists, match=r"key\.pem: found a key already"):
        issue("site").save(tmp_path)
    assert Kit.load(tmp_path).certificate_pem == kit.certificate_pem
    with pytest.raises(AlreadyExists):
        HEART.save(tmp_path)
    assert Kit.load(tmp_path).authority_pem == kit.authority_pem


def test_an_authority_is_saved_in_a_folder_only(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BadInput, match="expected a folder that can be written"):
        HEART.save(tmp_path / "file")
