"""Who a certificate names, what it is good for, and the words for what it is not."""

from __future__ import annotations

import dataclasses
import ssl
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import CertificateRefused, SignatureRefused, printable
from fedcore.identity.authority import LOOPBACK, Authority
from fedcore.identity.peer import (
    ROLES,
    Peer,
    peer_of,
    require_federation,
    require_role,
    require_rostered,
    require_time,
)
from fedcore.identity.verify import (
    check_certificate,
    fingerprint,
)
from fedcore.wire.refusals import refusal_from, refusal_text

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
SECOND = timedelta(seconds=1)
HEART = Authority.create("heart", NOW)
PEM = HEART.issue("site", "va", NOW).certificate_pem
DER = x509.load_pem_x509_certificate(PEM).public_bytes(serialization.Encoding.DER)
VA = peer_of(PEM)


def naming(*names, subject="va", usage=()) -> bytes:
    """A self-signed certificate under any names."""
    key = ec.generate_private_key(ec.SECP256R1())
    holder = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, subject)] if subject else [])
    builder = (
        x509.CertificateBuilder()
        .subject_name(holder)
        .issuer_name(holder)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(NOW - DAY)
        .not_valid_after(NOW + DAY)
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    if usage:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usage), critical=False)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def uri(text):
    return x509.UniformResourceIdentifier(text)


def test_a_peer_is_what_its_certificate_says():
    certificate = x509.load_pem_x509_certificate(PEM)
    assert (VA.federation, VA.role, VA.name) == ("heart", "site", "va")
    assert int(VA.serial, 16) == certificate.serial_number
    assert VA.fingerprint == certificate.fingerprint(hashes.SHA256()).hex() == fingerprint(PEM)
    assert (VA.begins, VA.ends) == (
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
    )
    assert str(VA) == f"site 'va' of 'heart', serial {VA.serial}"


def test_other_names_beside_ours_do_not_count():
    pem = naming(x509.DNSName("localhost"), uri("https://a.example"), uri("fedcore://h/site/va"))
    assert peer_of(pem).name == "va"


@pytest.mark.parametrize(
    "names",
    [
        (),
        (x509.DNSName("fedcore://heart/site/va"),),
        (uri("https://heart/site/va"),),
        (uri("fedcore://heart/site/va"), uri("fedcore://heart/operator/va")),
        (uri("fedcore://heart/site/va"), uri("FEDCORE://heart/operator/va")),
        (uri("fedcore:heart/site/va"), uri("fedcore://heart/site/va")),
        (uri("fedcore://heart/site/va/"),),
        (uri("fedcore://heart/site/va\n"),),
        (uri("fedcore://heart/site/../va"),),
        (uri("fedcore://heart/site/"),),
        (uri("fedcore:///site/va"),),
        (uri("fedcore://heart/root/va"),),
        (uri("fedcore://heart/Site/va"),),
        (uri("Fedcore://heart/site/va"),),
        (uri("fedcore://heart/site/v%61"),),
        (uri(" fedcore://heart/site/va"),),
        (uri("fedcore://heart/site/" + "a" * 65),),
    ],
)
def test_anything_else_names_nobody(names):
    assert peer_of(naming(uri("fedcore://heart/site/va"))).name == "va"
    with pytest.raises(
        CertificateRefused, match="expected one fedcore://FEDERATION/ROLE/NAME"
    ) as caught:
        peer_of(naming(*names))
    found = [name.value for name in names if name.value.lower().startswith("fedcore:")]
    if not found or isinstance(names[0], x509.DNSName):
        assert "found no federation in it" in str(caught.value)
    else:
        assert f"found {', '.join(map(repr, found))} in it" in str(caught.value)


@given(place=st.integers(0, len(DER) - 1), bit=st.integers(0, 7), cut=st.integers(0, len(DER)))
def test_damaged_certificates_are_refused_or_read_and_nothing_else(place, bit, cut):
    damaged = bytearray(DER)
    damaged[place] ^= 1 << bit
    for der in (bytes(damaged), DER[:cut]):
        with suppress(CertificateRefused):
            assert peer_of(ssl.DER_cert_to_PEM_cert(der).encode()).role in ROLES


@given(st.binary(max_size=200))
def test_bytes_that_are_no_certificate(data):
    with pytest.raises(CertificateRefused) as caught:
        peer_of(data)
    assert caught.value.check == "readable"


# --------------------------------------------------------------------------- one function each


def test_federation():
    require_federation(VA, "heart")
    for other in ("Heart", "lungs", ""):
        with pytest.raises(
            CertificateRefused, match=f"found federation 'heart', expected {other!r}"
        ):
            require_federation(VA, other)


def test_role():
    require_role(VA, ["operator", "site"])
    for roles in (["operator"], []):
        with pytest.raises(CertificateRefused, match="found role 'site', expected"):
            require_role(VA, roles)


def test_time_is_inclusive_at_both_ends():
    require_time(str(VA), VA.begins, VA.ends, VA.begins)
    require_time(str(VA), VA.begins, VA.ends, VA.ends)
    with pytest.raises(CertificateRefused, match=r"found not valid before .* UTC") as early:
        require_time(str(VA), VA.begins, VA.ends, VA.begins - SECOND)
    with pytest.raises(CertificateRefused, match=r"found expired since .* UTC") as late:
        require_time(str(VA), VA.begins, VA.ends, VA.ends + SECOND)
    assert (early.value.check, late.value.check) == ("begins", "expired")
    assert "clock" in early.value.remedy and "clock" in late.value.remedy


def test_roster_is_for_sites():
    require_rostered(VA, {"va"})
    require_rostered(dataclasses.replace(VA, role="operator"), set())
    for roster in (set(), {"VA", "va2"}):
        with pytest.raises(CertificateRefused, match=f"the roster's {len(roster)} sites"):
            require_rostered(VA, roster)


# ------------------------------------------------------------------- one certificate, every check


def checked(pem=PEM, authority=HEART.certificate_pem, **how) -> Peer:
    how = {"federation": "heart", "role": "site", "now": NOW} | how
    return check_certificate(pem, authority, **how)


HUB = HEART.issue("coordinator", "hub", NOW, hosts=[*LOOPBACK, "hub.example"]).certificate_pem
OTHER = Authority.create("heart", NOW).certificate_pem


def test_a_certificate_that_passes():
    assert checked() == VA
    assert checked(authority=OTHER + HEART.certificate_pem) == VA  # several may be trusted
    for host in ("localhost", "127.0.0.1", "::1", "0:0:0:0:0:0:0:1", "HUB.example"):
        assert checked(HUB, role="coordinator", host=host).name == "hub"


@pytest.mark.parametrize(
    ("how", "check", "words"),
    [
        ({"pem": b"x"}, "readable", "no X.509 certificate"),
        ({"authority": OTHER}, "issuer", "found issuer .*O=heart that is not trusted here"),
        ({"pem": naming(uri("fedcore://heart/site/va"))}, "issuer", "found itself as issuer"),
        ({"now": NOW + 91 * DAY}, "expired", "certificate of site 'va' of 'heart'"),
        ({"now": NOW - DAY}, "begins", "certificate of site 'va' of 'heart'"),
        ({"federation": "lungs"}, "federation", "expected 'lungs'"),
        ({"role": "operator"}, "role", "expected operator"),
        (
            {"pem": HUB, "role": "coordinator", "host": "hub.example.org"},
            "host",
            "made out to local",
        ),
        ({"pem": HUB, "role": "coordinator", "host": "::2"}, "host", "::1, expected ::2"),
        ({"pem": HUB, "role": "coordinator", "host": "example"}, "host", "expected example"),
    ],
)
def test_the_first_check_that_fails_is_named(how, check, words):
    with pytest.raises(CertificateRefused, match=words) as caught:
        checked(**how)
    assert caught.value.check == check


def test_an_authority_past_its_time():
    old = Authority.create("heart", NOW - 20 * DAY, days=10)
    long_lived = dataclasses.replace(HEART, key=old.key)  # a certificate that outlives its issuer
    pem = long_lived.issue("site", "va", NOW).certificate_pem
    with pytest.raises(
        CertificateRefused, match=r"certificate of authority CN=.* expired"
    ) as caught:
        checked(pem, old.certificate_pem)
    assert caught.value.check == "expired"


def test_usage():
    for serves, role in ((True, "site"), (False, "coordinator")):
        usage = (
            x509.ExtendedKeyUsageOID.SERVER_AUTH if serves else x509.ExtendedKeyUsageOID.CLIENT_AUTH
        )
        pem = naming(uri(f"fedcore://heart/{role}/a"), usage=[usage])
        words = "may not connect" if serves else "may not serve"
        with pytest.raises(CertificateRefused, match=words) as caught:
            checked(pem, pem, role=role)  # trusted itself, so that nothing else is amiss
        assert caught.value.check == "usage"
    without = naming(uri("fedcore://heart/site/a"))
    assert checked(without, without).name == "a"


@pytest.mark.parametrize(
    ("host", "answers"),
    [
        ("a.example", True),
        ("A.EXAMPLE", True),
        ("a.b.example", False),
        ("example", False),
        (".example", False),
        ("127.0.0.1", False),
    ],
)
def test_a_star_is_one_label(host, answers):
    pem = naming(uri("fedcore://heart/coordinator/hub"), x509.DNSName("*.example"))
    if answers:
        assert checked(pem, pem, role="coordinator", host=host).name == "hub"
        return
    with pytest.raises(CertificateRefused, match="made out to") as caught:
        checked(pem, pem, role="coordinator", host=host)
    assert caught.value.check == "host"


def test_a_strangers_words_are_made_harmless():
    pem = naming(subject="\x1b[31mva\r\n" + "x" * 50)
    with pytest.raises(CertificateRefused) as caught:
        checked(pem)
    assert str(caught.value).isprintable()
    with pytest.raises(CertificateRefused, match="certificate of nobody, serial 7"):
        checked(naming(subject=""))


# ---------------------------------------------------------------------- a refusal on its way


def test_a_refusal_arrives_as_it_was():
    sent = CertificateRefused("certificate of va: found x, expected y", check="role", remedy="do z")
    got = refusal_from(refusal_text(sent))
    assert str(got) == "refused by the coordinator: certificate of va: found x, expected y"
    assert (got.check, got.remedy) == ("role", "do z")
    other = SignatureRefused("s", found="a", expected="b", fault="va")
    assert refusal_from(refusal_text(other)).check == ""


@given(st.text(max_size=1500))
def test_whatever_the_coordinator_says_is_one_short_line(text):
    got = refusal_from(text)
    for line in (str(got), got.check, got.remedy):
        assert line.isprintable()
        assert len(line) < 450


def test_printable():
    assert printable("a\x1b[2J\nb\u202ec") == "a [2J b c"
    assert printable("é 中") == "é 中"
    assert printable("x" * 1000) == "x" * 397 + "..."
