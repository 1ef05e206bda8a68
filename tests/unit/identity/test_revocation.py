"""The list of withdrawn certificates, read again while it is used."""

from __future__ import annotations

import dataclasses
import os
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import BadInput, CertificateRefused
from fedcore.identity.authority import Authority
from fedcore.identity.peer import peer_of
from fedcore.identity.revocation import EMPTY, Revocations

NOW = datetime.now(UTC)
HEART = Authority.create("heart", NOW)
VA, OSLO = (peer_of(HEART.issue("site", name, NOW).certificate_pem) for name in ("va", "oslo"))
SMALL = dataclasses.replace(VA, serial="1f", fingerprint="00ab" * 16)  # leading zeros come and go


def withdrawn(revocations, peer=VA) -> bool:
    try:
        revocations.check(peer)
    except CertificateRefused:
        return True
    return False


def colons(text):
    return ":".join(text[i : i + 2] for i in range(0, len(text), 2))


@pytest.mark.parametrize(
    "entry",
    [
        VA.serial,
        VA.serial.upper(),
        colons(VA.serial.zfill(40)),
        VA.serial.zfill(40),
        VA.fingerprint,
        colons(VA.fingerprint).upper(),
        f"  {VA.serial}\t# stolen",
        f"# a comment\n\n{VA.fingerprint}\r",
    ],
    ids=range(8),  # the entries are drawn anew by every process
)
def test_an_entry_withdraws_one_certificate(tmp_path, entry):
    path = tmp_path / "revoked.txt"
    path.write_text(f"{entry}\n", newline="")
    found = Revocations(path)
    assert withdrawn(found, VA)
    assert not withdrawn(found, OSLO)


@pytest.mark.parametrize("entry", ["1f", "1F", "001f", "00:1f", "00ab" * 16, colons("00AB" * 16)])
def test_leading_zeros_of_a_serial_do_not_count_and_of_a_fingerprint_do(tmp_path, entry):
    path = tmp_path / "revoked.txt"
    path.write_text(f"{entry}\n")
    assert withdrawn(Revocations(path), SMALL)
    assert not withdrawn(Revocations(path), VA)


def test_without_a_file_nobody_is_withdrawn(tmp_path):
    assert not withdrawn(Revocations())
    assert not Revocations().refresh()
    path = tmp_path / "revoked.txt"
    path.write_bytes(EMPTY)
    assert not withdrawn(Revocations(path))


BAD = {
    "a word": (b"va\n", "line 1: found 'va'"),
    "second line": (f"{VA.serial}\n0x1f\n".encode(), "line 2: found '0x1f'"),
    "too long for a serial": (b"a" * 41 + b"\n", "line 1"),
    "too short for a fingerprint": (VA.fingerprint[:-1].encode() + b"\n", "line 1"),
    "cut in the middle": (VA.serial[:10].encode(), "no end of line"),
    "emptied": (b"", "no end of line"),
    "two in a line": (f"{VA.serial} {OSLO.serial}\n".encode(), "line 1"),
    "no text": (b"\xff\xfe\n", "no text"),
    "huge": (b"#\n" * 600_000, "more than 1048576 bytes"),
    "other digits": ("\u0663\n".encode(), "line 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_at_the_start_and_changes_nothing_later(tmp_path, name):
    data, words = BAD[name]
    path = tmp_path / "revoked.txt"
    path.write_bytes(data)
    with pytest.raises(BadInput, match=words):
        Revocations(path)
    path.write_text(f"{VA.serial}\n")
    found = Revocations(path)
    path.write_bytes(data)
    with pytest.raises(BadInput, match="stays in force") as caught:
        found.refresh()
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert withdrawn(found, VA) and not withdrawn(found, OSLO)
    assert not found.refresh()  # told once
    path.write_text(f"{OSLO.serial}\n")
    assert found.refresh()
    assert withdrawn(found, OSLO) and not withdrawn(found, VA)


def test_a_missing_file(tmp_path):
    path = tmp_path / "revoked.txt"
    with pytest.raises(BadInput, match=r"revoked\.txt: it cannot be read \(No such file"):
        Revocations(path)
    path.write_text(f"{VA.serial}\n")
    found = Revocations(path)
    path.unlink()
    with pytest.raises(BadInput, match="it cannot be read"):
        found.refresh()
    assert withdrawn(found) and not found.refresh()


def test_a_change_is_seen_by_time_by_size_and_by_file(tmp_path):
    path, beside = tmp_path / "revoked.txt", tmp_path / "new"
    path.write_text(f"{VA.serial}\n")
    found = Revocations(path)
    assert not found.refresh()
    before = path.stat()
    beside.write_text(f"{OSLO.serial.zfill(len(VA.serial))[-len(VA.serial) :]}\n")
    os.utime(beside, ns=(before.st_atime_ns, before.st_mtime_ns))  # same size, same time
    beside.replace(path)
    assert found.refresh() and not withdrawn(found, VA)
    path.write_text(f"{VA.serial}\n")  # in place, its time set back
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert found.refresh() and withdrawn(found, VA)


def test_the_line_names_whose_and_which(tmp_path):
    path = tmp_path / "revoked.txt"
    path.write_text(f"{VA.serial}\n")
    with pytest.raises(CertificateRefused) as caught:
        Revocations(path).check(VA)
    assert caught.value.check == "revoked"
    assert str(caught.value) == (
        f"certificate of site 'va' of 'heart', serial {VA.serial}: found it withdrawn, expected one in force"
    )


@given(st.binary(max_size=300))
def test_any_bytes_are_a_list_or_one_clear_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("any") / "revoked.txt"
    path.write_bytes(data)
    said = ""
    try:
        Revocations(path)
    except BadInput as error:
        said = str(error)
    assert "\n" not in said
