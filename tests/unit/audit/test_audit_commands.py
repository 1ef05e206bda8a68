"""`fed-site audit` and `fed-coordinator audit` as an operator runs them: what is printed, and the exit codes."""

import json
from datetime import UTC, datetime

import pytest
from fedcore_clients.cli import main as fed_site
from fedcore_server.cli import main as fed_coordinator

from fedcore.audit.keys import CoordinatorSigner, SiteSigner
from fedcore.audit.receipt import RECEIPTS_FILE, Receipt
from fedcore.audit.trail import TRAIL_FILE, AuditTrail
from fedcore.identity.authority import LOOPBACK, Authority
from fedcore.identity.identities import write_roster
from fedcore.identity.kit import Kit
from fedcore.secagg.crypto.identity_key import IdentityKey

SITE = """
site = "va"
coordinator = "127.0.0.1:7443"
kit = "kit"
identity = "identity.pem"
roster = "roster.toml"
folder = "state"
"""
HUB = 'name = "town"\nroster = "../roster.toml"\nkit = "kit"\nfolder = "state"\n'


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A site's folder with a trail of five lines and a receipt, and the coordinator's below it."""
    folder, now, key = tmp_path_factory.mktemp("site"), datetime.now(UTC), IdentityKey()
    hub = folder / "hub"
    authority = Authority.create("town", now)
    authority.issue("site", "va", now).save(folder / "kit")
    authority.issue("coordinator", "hub", now, hosts=LOOPBACK).save(hub / "kit")
    write_roster(folder / "roster.toml", {"va": key.public})
    (folder / "site.toml").write_text(SITE)
    (hub / "federation.toml").write_text(HUB)
    signer = CoordinatorSigner(Kit.load(hub / "kit"))
    with AuditTrail.open(folder / "state", SiteSigner(key), {"party": "site va"}) as trail:
        trail.record("decision", job="heart-1", word="accepted")
        trail.record("sent", job="heart-1", what="vector", bytes=4608)
        trail.record("sent", job="lung-2", what="vector", bytes=10)
        trail.record("ended", job="heart-1", outcome="finished")
        pem = signer.certificate.decode()
        receipt = Receipt("town", "va", *trail.head, 1, "0" * 64, 10**12, pem).signed(signer)
        receipt.append(folder / "state")
    with AuditTrail.open(hub / "state", signer, {"certificate": pem}) as trail:
        trail.record("operator", call="submit", operator="ann", job="heart-1")
    return folder


@pytest.fixture
def place(made, monkeypatch):
    """The site's folder, as the current one; its trail as it was."""
    monkeypatch.chdir(made)
    kept = {name: (made / "state" / name).read_bytes() for name in (TRAIL_FILE, RECEIPTS_FILE)}
    yield made
    for name, data in kept.items():
        (made / "state" / name).write_bytes(data)


def ran(capsys, main, *arguments):
    with pytest.raises(SystemExit) as ended:
        main(["audit", *arguments])
    return ended.value.code, *capsys.readouterr()


def test_whole_trail_is_verified(place, capsys):
    code, out, _ = ran(capsys, fed_site, "verify")
    assert code == 0
    first, second = out.splitlines()
    assert first.startswith("audit trail of site va: 5 lines, none changed; the last at 20")
    assert second == "confirmed up to number 5: lines missing behind it would not be noticed"


def test_without_receipts_it_says_what_it_cannot_show(place, capsys):
    (place / "state" / RECEIPTS_FILE).unlink()
    code, out, _ = ran(capsys, fed_site, "verify")
    assert code == 0
    assert "not confirmed: lines missing at the end would not be noticed" in out


def test_changed_line_is_named_and_the_code_is_3(place, capsys):
    path = place / "state" / TRAIL_FILE
    path.write_bytes(path.read_bytes().replace(b'"bytes":4608', b'"bytes":4609'))
    code, out, err = ran(capsys, fed_site, "verify")
    assert (code, out) == (3, "")
    error, hint = err.splitlines()
    assert error == (
        "error: audit trail of site va: line 3: changed or inserted: its signature is not that of the "
        "trail's key"
    )
    assert hint.startswith("hint: ")


def test_every_finding_is_listed_and_the_first_is_the_error(place, capsys):
    path = place / "state" / TRAIL_FILE
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([rows[0], rows[2], rows[3]]))
    code, out, err = ran(capsys, fed_site, "verify")
    assert code == 3
    assert out.splitlines() == [
        "line 2: before it number 2 is missing",
        "line 4: cut off: number 5 is missing, which the coordinator's receipt of 2001-09-09T01:46:40 confirms",
    ]
    assert "line 2: before it number 2 is missing (and 1 more)" in err


def test_json_has_the_findings_and_the_same_code(place, capsys):
    path = place / "state" / TRAIL_FILE
    path.write_bytes(path.read_bytes()[:-40])
    code, out, err = ran(capsys, fed_site, "verify", "--json")
    assert (code, err) == (3, "")
    found = json.loads(out)
    assert (found["whole"], [each["line"] for each in found["findings"]]) == (False, [5, 6])


def test_no_trail_is_bad_input_with_a_hint(place, capsys):
    path = place / "state" / TRAIL_FILE
    path.unlink()
    code, out, err = ran(capsys, fed_site, "verify")
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 2


@pytest.mark.parametrize("wrong", [("--receipts", "none.jsonl"), ("--receipts", "site.toml")])
def test_unusable_receipts_are_named(place, capsys, wrong):
    code, _, err = ran(capsys, fed_site, "verify", *wrong)
    assert code == 2
    assert wrong[1] in err


def test_trail_under_another_key_is_refused_unless_the_key_is_given(place, capsys):
    other = IdentityKey()
    write_roster(place / "roster.toml", {"va": other.public})
    try:
        code, _, err = ran(capsys, fed_site, "verify")
        assert code == 3
        assert "line 1: opened with another key than this party's" in err
        key = json.loads((place / "state" / TRAIL_FILE).read_bytes().splitlines()[0])["facts"][
            "key"
        ]
        assert ran(capsys, fed_site, "verify", "--key", key)[0] == 0
    finally:
        write_roster(place / "roster.toml", {"va": bytes.fromhex(key.removeprefix("ed25519:"))})


def test_show_is_a_table_of_one_job(place, capsys):
    code, out, _ = ran(capsys, fed_site, "show", "--job", "heart-1")
    assert code == 0
    assert [row[24:] for row in out.splitlines()] == [
        "decision: accepted, job heart-1", "left this party: vector, job heart-1, bytes 4,608",
        "end of a job: job heart-1, outcome finished",
    ]  # fmt: skip
    assert ran(capsys, fed_site, "show", "--since", "2999-01-01")[1] == "no such lines\n"
    found = json.loads(ran(capsys, fed_site, "show", "--json")[1])
    assert [line["number"] for line in found["lines"]] == [1, 2, 3, 4, 5]


def test_time_and_format_that_are_none_are_refused(place, capsys):
    assert ran(capsys, fed_site, "show", "--since", "yesterday")[0] == 2
    code, _, err = ran(capsys, fed_site, "export", "--format", "xml")
    assert code == 2
    assert "'xml'" in err


@pytest.mark.parametrize(
    ("form", "begins"), [("jsonl", '{"seq":'), ("cef", "CEF:0|"), ("syslog", "<1")]
)
def test_export_is_one_line_an_event(place, capsys, form, begins):
    code, out, _ = ran(capsys, fed_site, "export", "--format", form)
    rows = out.splitlines()
    assert (code, len(rows)) == (0, 5)
    assert all(row.startswith(begins) for row in rows)
    if form == "jsonl":
        assert out.encode() == (place / "state" / TRAIL_FILE).read_bytes()


def test_coordinators_trail_is_read_by_the_same_commands(place, capsys):
    config = ("--config", str(place / "hub" / "federation.toml"))
    code, out, _ = ran(capsys, fed_coordinator, "verify", *config)
    assert code == 0
    assert out.startswith("audit trail of coordinator of town: 2 lines, none changed")
    assert "submit, operator ann" in ran(capsys, fed_coordinator, "show", *config)[1]
    assert (
        ran(capsys, fed_coordinator, "export", "--format", "cef", *config)[1].count("CEF:0|") == 2
    )
    path = place / "hub" / "state" / TRAIL_FILE
    path.write_bytes(path.read_bytes().replace(b'"ann"', b'"bob"'))
    code, _, err = ran(capsys, fed_coordinator, "verify", *config)
    assert code == 3
    assert "line 2: changed or inserted" in err
