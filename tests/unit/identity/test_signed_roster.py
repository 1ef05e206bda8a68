"""The signed roster: what verifies, and each way in which one does not."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import BadInput, PeerRefused, RosterRefused, SignatureRefused
from fedcore.identity.authority import Authority
from fedcore.identity.identities import write_roster
from fedcore.identity.signed_roster import MOST_BYTES, SignedRoster, read_pins
from fedcore.secagg.crypto.identity_key import IdentityKey, roster_digest

NOW = datetime(2026, 11, 30, 12, 0, 30, 700_000, tzinfo=UTC)
HEART = Authority.create("heart", NOW)
TRUSTED = HEART.certificate_pem
KEYS = {name: IdentityKey(bytes([n]) * 32).public for n, name in enumerate(["va", "oslo", "basel"])}
SIGNED = SignedRoster("heart", 3, NOW, KEYS).sign(HEART)
TEXT = SIGNED.to_toml().decode()


def parsed(text: str) -> SignedRoster:
    return SignedRoster.parse(text.encode(), "roster.toml")


def test_a_signed_roster_is_read_back_and_verifies(tmp_path):
    SIGNED.save(tmp_path / "roster.toml")
    sites, found = read_pins(tmp_path / "roster.toml", TRUSTED, "heart")
    assert found == SIGNED
    assert list(sites.items()) == list(KEYS.items())
    assert found.digest == roster_digest(KEYS)
    found.verify(TRUSTED, "heart", newest=3)


def test_the_first_roster_of_a_federation_has_no_sites():
    empty = SignedRoster("heart", 1, NOW, {}).sign(HEART)
    found = SignedRoster.parse(empty.to_toml())
    found.verify(TRUSTED, "heart")
    assert found.sites == {}


def test_the_time_zone_of_the_date_does_not_count():
    there = NOW.astimezone(timezone(timedelta(hours=5, minutes=30)))
    found = SignedRoster.parse(replace(SIGNED, issued=there).sign(HEART).to_toml())
    found.verify(TRUSTED, "heart")
    assert found.issued == NOW.replace(microsecond=0)


def test_a_static_roster_has_no_number(tmp_path):
    write_roster(tmp_path / "roster.toml", KEYS)
    assert read_pins(tmp_path / "roster.toml", TRUSTED, "heart") == (KEYS, None)
    with pytest.raises(SignatureRefused, match="found no signature"):
        SignedRoster.parse((tmp_path / "roster.toml").read_bytes())


def test_another_authority_of_the_same_name_is_refused():
    forged = SignedRoster("heart", 3, NOW, KEYS).sign(Authority.create("heart", NOW))
    with pytest.raises(SignatureRefused, match="signature of another authority") as caught:
        forged.verify(TRUSTED, "heart")
    assert "fingerprint of authority.pem" in caught.value.remedy
    with pytest.raises(SignatureRefused, match="does not verify"):
        replace(forged, by=HEART.fingerprint).verify(TRUSTED, "heart")


def test_one_of_several_trusted_authorities_is_enough():
    new = Authority.create("heart", NOW)
    SignedRoster("heart", 4, NOW, KEYS).sign(new).verify(TRUSTED + new.certificate_pem, "heart")


def test_an_older_number_is_refused():
    SIGNED.verify(TRUSTED, "heart", newest=3)
    with pytest.raises(RosterRefused, match="found number 3, expected 4 or newer"):
        SIGNED.verify(TRUSTED, "heart", newest=4)


def test_a_roster_of_another_federation_is_refused():
    with pytest.raises(RosterRefused, match="found federation 'heart', expected 'lungs'"):
        SIGNED.verify(TRUSTED, "lungs")


OTHER_KEY = IdentityKey(b"\x09" * 32).public


@pytest.mark.parametrize(
    "altered",
    [
        replace(SIGNED, number=4),
        replace(SIGNED, issued=SIGNED.issued + timedelta(seconds=1)),
        replace(SIGNED, sites={**KEYS, "oslo": OTHER_KEY}),
        replace(SIGNED, sites={**KEYS, "bonn": OTHER_KEY}),
        replace(SIGNED, sites={name: KEYS[name] for name in ("va", "oslo")}),
        replace(SIGNED, sites={name: KEYS[name] for name in ("oslo", "va", "basel")}),
        replace(SIGNED, sites={"va": KEYS["oslo"], "oslo": KEYS["va"], "basel": KEYS["basel"]}),
        replace(SIGNED, signature=SIGNED.signature[:-1]),
        replace(SIGNED, signature=b""),
    ],
    ids=["number", "date", "key", "added", "removed", "order", "swapped", "cut", "empty"],
)
def test_what_is_altered_after_signing_is_refused(altered):
    with pytest.raises(SignatureRefused, match="found a signature that does not verify"):
        altered.verify(TRUSTED, "heart")


@given(st.integers(0, len(TEXT) - 1), st.characters(min_codepoint=32, max_codepoint=126))
def test_another_character_anywhere_changes_nothing_or_is_refused(place, character):
    try:
        found = parsed(TEXT[:place] + character + TEXT[place + 1 :])
        found.verify(TRUSTED, "heart")
    except (BadInput, PeerRefused):
        return
    assert (found.number, found.issued, dict(found.sites)) == (3, SIGNED.issued, KEYS)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("number = 3", "number = 0", "number: found 0, expected 1 or more"),
        ("number = 3", "number = true", "number: found True"),
        ("number = 3", f"number = {1 << 63}", "number: found"),
        ("number = 3\n", "", "expected federation, issued, number"),
        ('federation = "heart"', "federation = 3", "federation: found 3"),
        ('federation = "heart"', 'federation = "he art"', "federation: found 'he art'"),
        ("12:00:30Z", "12:00:30", "issued: found 2026-11-30 12:00:30, expected a date"),
        ("issued = 2026-11-30T12:00:30Z", "issued = 3", "issued: found 3"),
        ("[signature]\n", "[signature]\nalso = 1\n", "signature: found other keys"),
        ('by = "', 'by = "zz', "signature.by: expected a SHA-256 fingerprint"),
        ('value = "', 'value = "!', "signature.value: expected base64"),
        ("[sites]\n", "[sites]\n[sites.ulm]\n", "sites.ulm: found dict"),
        ("[sites]\n", "[sites]\n[sites]\n", "cannot be read as TOML"),
        (KEYS["oslo"].hex(), KEYS["va"].hex(), "sites.oslo: found the key of va"),
        ("number = 3", "x = " + "[" * 5000, "cannot be read as TOML"),
    ],
)
def test_a_malformed_roster_names_the_entry(old, new, words):
    assert old in TEXT
    with pytest.raises(BadInput, match=re.escape(words)) as caught:
        parsed(TEXT.replace(old, new, 1))
    assert str(caught.value).startswith("roster.toml: ")


def test_an_endless_roster_is_not_read():
    with pytest.raises(BadInput, match=f"expected at most {MOST_BYTES}"):
        SignedRoster.parse(b"#" * (MOST_BYTES + 1))


def test_changes_are_told_in_words():
    after = {"va": OTHER_KEY, "basel": KEYS["basel"], "bonn": KEYS["oslo"], "ulm": bytes(32)}
    assert replace(SIGNED, sites=after).changes(KEYS) == [
        "2 sites added: bonn, ulm",
        "1 site removed: oslo",
        "1 site with another identity key: va",
    ]
    assert SIGNED.changes(KEYS) == []
    turned = {name: KEYS[name] for name in reversed(KEYS)}
    assert SIGNED.changes(turned) == ["the order of the sites differs"]


@pytest.mark.parametrize(
    "roster", [SignedRoster("heart", 0, NOW, KEYS), SignedRoster("lungs", 1, NOW, KEYS)]
)
def test_an_authority_signs_numbered_rosters_of_its_own_federation(roster):
    with pytest.raises(BadInput, match="expected 1 or more of 'heart'"):
        roster.sign(HEART)


def test_two_sites_with_one_key_are_not_signed():
    with pytest.raises(RosterRefused):
        SignedRoster("heart", 1, NOW, {"va": KEYS["va"], "oslo": KEYS["va"]}).sign(HEART)
