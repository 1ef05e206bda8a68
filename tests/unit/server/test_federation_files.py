"""A federation's folder: how it begins, who can read it, and several commands that change it at once."""

from __future__ import annotations

import json
import os
import tomllib
from concurrent.futures import ThreadPoolExecutor

import pytest
from fedcore_clients import joining
from fedcore_server import new_federation as new
from fedcore_server.authority_key import (
    PASSPHRASE_VARIABLE,
    find_authority,
    find_unlock,
    open_authority,
    read_passphrase,
)
from fedcore_server.cli import main
from fedcore_server.config import read_config
from fedcore_server.federation import FederationFiles
from fedcore_server.federation_views import roster_lines, sites_rows
from support.keystores import cheap_scrypt, passphrase_file

from fedcore.audit.keys import SiteSigner
from fedcore.audit.noted import user_name
from fedcore.audit.trail import TRAIL_FILE, AuditTrail
from fedcore.errors import AlreadyExists, BadInput, CertificateRefused, Refused, StoreFull
from fedcore.identity.identities import write_roster
from fedcore.identity.join_messages import JoinRefused
from fedcore.identity.kit import Kit
from fedcore.identity.peer import peer_of
from fedcore.identity.revocation import Revocations
from fedcore.identity.signed_roster import kept_pins
from fedcore.results import JobSite
from fedcore.secagg.crypto.identity_key import IdentityKey
from fedcore.secagg.crypto.secret import SecretBytes
from tests.support.federations import PASSPHRASE, authority_of, new_federation, now
from tests.support.full_disk import no_file_beyond
from tests.support.live_sessions import recorded


@pytest.fixture(autouse=True)
def _cheap(monkeypatch):
    cheap_scrypt(monkeypatch)


def asked(files, site, folder):
    """A site that has asked to join."""
    request = joining.begin(files.invite(site, 7, now())[0], folder / site)
    files.ask(request, now())
    return request


def joined(files, site, folder):
    asked(files, site, folder)
    return files.answer(files.approve(site, authority_of(files), now()))


# ------------------------------------------------------------------------------------------ init


def test_a_new_federation_has_all_it_needs(files):
    folder = files.config.roster.parent
    assert {path.name for path in folder.iterdir()} == {
        "federation.toml", "authority", "kit", "operator", "roster.toml", "revoked.txt", "enrolment", "state"
    }  # fmt: skip
    Kit.load(folder / "kit").check("coordinator", now())
    Kit.load(folder / "operator" / "kit").check("operator", now())
    assert files.roster().number == 1
    assert "heart" in authority_of(files).federation
    assert files.config.enrol_port != files.config.port


def test_every_private_key_is_its_owners_and_the_authoritys_is_encrypted(files):
    folder = files.config.roster.parent
    keys = sorted(folder.rglob("key.pem"))
    assert len(keys) == 3
    assert {path.stat().st_mode & 0o777 for path in keys} == {0o600}
    assert b"ENCRYPTED PRIVATE KEY" in (folder / "authority" / "key.pem").read_bytes()
    assert folder.stat().st_mode & 0o077 == 0
    every = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert PASSPHRASE.encode() not in every


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path):
    new_federation(tmp_path / "one")
    before = (tmp_path / "one" / "kit" / "key.pem").read_bytes()
    with pytest.raises(AlreadyExists, match="found something there already"):
        new_federation(tmp_path / "one")
    assert (tmp_path / "one" / "kit" / "key.pem").read_bytes() == before
    with pytest.raises(BadInput, match="federation: found 'he art'"):
        new_federation(tmp_path / "he" / "art", "he art")
    with pytest.raises(BadInput, match="hosts: found 'hub:7443'"):
        new.create(
            "heart", tmp_path / "two", ["hub:7443"], SecretBytes(b"x"), now(),
            port=1, enrol_port=2, approval="manual",
        )  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.fixture
def command(capsys, monkeypatch, tmp_path):
    """Run a command of fed-coordinator: its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(PASSPHRASE_VARIABLE, raising=False)

    def run(*words):
        with pytest.raises(SystemExit) as ended:
            main([*words])
        return ended.value.code, *capsys.readouterr()

    return run


def test_the_commands_of_an_operator(command, tmp_path, monkeypatch):
    monkeypatch.setenv(PASSPHRASE_VARIABLE, PASSPHRASE)
    code, made, said = command("init", "heart", "--host", "hub.example.org", "--out", "f")
    assert (code, said) == (0, "")
    for word in ("made there", "keep safe", "the passphrase", "fingerprint", "next", "serve"):
        assert word in made
    monkeypatch.chdir(tmp_path / "f")
    _, line, told = command("invite", "va", "--days", "2")
    assert line.startswith("fedcore-join:hub.example.org:7444:va:")
    assert line.count("\n") == 1
    assert "once, until" in told
    request = joining.begin(joining.JoinLine.parse(line), tmp_path / "va")
    (tmp_path / "request.json").write_text(json.dumps(request.to_json()))
    words = ("approve", "va", "--request", "../request.json", "--answer", "../answer.json")
    assert PASSPHRASE_VARIABLE not in os.environ, "init has read it, and removed it"
    code, shown, refused = command(*words)
    assert (code, shown) == (2, "")
    assert "passphrase of the authority: found none and no terminal" in refused
    monkeypatch.setenv(PASSPHRASE_VARIABLE, PASSPHRASE)
    _, approved, _ = command(*words)
    assert "site 'va' is on roster 2" in approved
    joining.finish(tmp_path / "va", joining.read_answer(tmp_path / "answer.json"), now(), tasks=[])
    _, listed, told_too = command("sites")
    assert "joined" in listed
    assert "whether they are connected is unknown" in told_too
    every = made + told + approved + listed
    assert PASSPHRASE not in every
    assert line.strip().rsplit(":", 1)[1] not in every + (tmp_path / "request.json").read_text()


def test_counters_have_a_port_where_one_is_named(command, tmp_path, monkeypatch):
    words = "init", "heart", "--host", "hub.example.org", "--out"
    for name, more in (
        ("f", ()),
        ("g", ("--metrics-port", "9443")),
        ("h", ("--metrics-port", "7444")),
    ):
        monkeypatch.setenv(PASSPHRASE_VARIABLE, PASSPHRASE)
        code, _, said = command(*words, name, *more)
        assert code == (2 if name == "h" else 0)
    assert "--metrics-port: found 7444, a port of the sites" in said
    assert read_config(tmp_path / "f" / "federation.toml").metrics_port is None
    assert read_config(tmp_path / "g" / "federation.toml").metrics_port == 9443


def test_commands_are_in_the_coordinators_trail_though_no_coordinator_runs(
    command, tmp_path, monkeypatch
):
    (tmp_path / "passphrase").touch(0o600)
    (tmp_path / "passphrase").write_text(PASSPHRASE)
    key = "--passphrase-file", str(tmp_path / "passphrase")
    command("init", "heart", "--host", "hub.example.org", "--out", "f", *key)
    monkeypatch.chdir(tmp_path / "f")
    files = FederationFiles(read_config(tmp_path / "f" / "federation.toml"))
    line = command("invite", "va")[1]
    files.ask(joining.begin(joining.JoinLine.parse(line), tmp_path / "va"), now())
    command("approve", "va", *key)
    command("renew", "va", "--answer", "answer.json", *key)
    command("revoke", "va", *key)
    assert command("revoke", "vb", *key)[0] == 2, "and what is refused changed nothing"
    with AuditTrail.open(tmp_path / "hub", SiteSigner(IdentityKey()), {}) as trail:
        size = (tmp_path / "hub" / TRAIL_FILE).stat().st_size
        with no_file_beyond(size), pytest.raises(StoreFull):
            files.take_notes(trail.record)
        for _ in range(2):
            files.take_notes(trail.record)
    lines = recorded(tmp_path / "hub", "operator")
    calls = ["init", "invite", "approve", "renew", "revoke", "sign roster"]
    assert [facts["call"] for facts in lines] == calls
    assert {facts["user"] for facts in lines} == {user_name()}
    assert [facts["site"] for facts in lines if "site" in facts] == ["va"] * 3
    assert (lines[2]["roster"], lines[5]["number"]) == (2, 3)
    assert line.strip().rsplit(":", 1)[1] not in (tmp_path / "hub" / TRAIL_FILE).read_text()


def test_a_note_that_was_altered_is_recorded_as_such(files, tmp_path):
    files.note("revoke", now(), site="va")
    path = files.config.roster.parent / "enrolment" / "commands.jsonl"
    path.write_text(path.read_text() + 'nonsense\n[1]\n{"call": 1.5}\n')
    with AuditTrail.open(tmp_path / "hub", SiteSigner(IdentityKey()), {}) as trail:
        files.take_notes(trail.record)
    calls = [facts["call"] for facts in recorded(tmp_path / "hub", "operator")]
    assert calls == ["revoke", "unknown", "unknown", "unknown"]


def test_every_roster_is_kept_with_the_keys_of_sites_that_left(files, tmp_path):
    joined(files, "va", tmp_path)
    first = files.roster().sites["va"]
    files.revoke("va")
    files.sign_roster(authority_of(files), now())
    joined(files, "va", tmp_path / "again")
    second = files.roster().sites["va"]
    folder = files.config.roster.parent / "enrolment" / "rosters"
    assert sorted(path.name for path in folder.iterdir()) == [
        "1.toml",
        "2.toml",
        "3.toml",
        "4.toml",
    ]
    third = tomllib.loads((folder / "3.toml").read_text())
    pins = kept_pins(folder, files.authority_pem, files.config.name, {"va": second, "ch": first})
    assert pins == [
        ("va", second, ""), ("ch", first, ""), ("va", first, f"{third['issued']:%Y-%m-%dT%H:%M:%SZ}")
    ]  # fmt: skip
    (folder / "2.toml").write_text(
        (folder / "2.toml").read_text().replace("number = 2", "number = 9")
    )
    pins = kept_pins(folder, files.authority_pem, files.config.name, {})
    assert pins == [("va", second, "")], "one that the authority did not sign counts for nothing"


# ------------------------------------------------------------------------------------------ the key


def test_where_a_passphrase_comes_from(tmp_path, monkeypatch):
    monkeypatch.delenv(PASSPHRASE_VARIABLE, raising=False)
    one, two = tmp_path / "one", tmp_path / "two"
    for path in (one, two):
        path.write_text(f"{path.name}\n")
        path.chmod(0o600)
    configured = f"file:{two}"
    assert find_unlock(None, None) is None
    assert read_passphrase(find_unlock(None, configured)).reveal() == b"two"
    monkeypatch.setenv(PASSPHRASE_VARIABLE, "from the environment")
    assert find_unlock(one, configured) == f"file:{one}"
    unlock = find_unlock(None, configured)
    assert read_passphrase(unlock).reveal() == b"from the environment"
    assert PASSPHRASE_VARIABLE not in os.environ, "no child process inherits it"
    assert read_passphrase(f"command:cat {one}").reveal() == b"one"
    with pytest.raises(BadInput, match="passphrase of the authority: found none and no terminal"):
        read_passphrase("prompt")
    one.chmod(0o644)
    with pytest.raises(BadInput, match="others on this machine can read"):
        read_passphrase(f"file:{one}")
    two.write_text("\n")
    with pytest.raises(BadInput, match="found it empty"):
        read_passphrase(configured)


def test_where_the_serving_process_finds_the_passphrase(files, tmp_path):
    path = files.config.roster.parent / "federation.toml"
    text = path.read_text()
    secret = passphrase_file(tmp_path / "secrets")
    for line, source in (
        (f'passphrase_file = "{secret}"', f"file:{secret}"),
        ('passphrase_file = "../secrets/passphrase"', f"file:{path.parent / '../secrets/passphrase'}"),
        (f'unlock = "file:{secret}"', f"file:{secret}"),
        (f'unlock = "command:cat {secret}"', f"command:cat {secret}"),
    ):  # fmt: skip
        path.write_text(f"{text}\n{line}\n")
        config = read_config(path)
        assert config.enrolment.unlock == source
        assert find_authority(config).fingerprint == files.fingerprint
    path.write_text(f'{text}\nunlock = "{PASSPHRASE}"\n')
    with pytest.raises(BadInput, match=r"enrolment\.unlock: found a text of") as error:
        read_config(path)
    assert PASSPHRASE not in str(error.value)
    path.write_text(f'{text}\nunlock = "prompt"\npassphrase_file = "x"\n')
    with pytest.raises(BadInput, match="found unlock and passphrase_file, expected one"):
        read_config(path)


def test_the_authority_opens_with_its_own_passphrase_only(files, tmp_path, monkeypatch):
    folder = files.config.enrolment.authority
    with pytest.raises(BadInput, match="that this passphrase does not open") as caught:
        open_authority(files.config, folder, f"file:{passphrase_file(tmp_path, 'correct horse')}")
    assert "correct horse" not in str(caught.value)
    other = new_federation(tmp_path / "other")
    with pytest.raises(BadInput, match="that of 'heart'"):
        open_authority(files.config, other.config.enrolment.authority, "prompt")
    monkeypatch.delenv(PASSPHRASE_VARIABLE, raising=False)
    assert find_authority(files.config) is None
    monkeypatch.setenv(PASSPHRASE_VARIABLE, PASSPHRASE)
    assert find_authority(files.config).fingerprint == files.fingerprint
    assert PASSPHRASE_VARIABLE not in os.environ, (
        "a process that is started now does not inherit it"
    )
    monkeypatch.setenv(PASSPHRASE_VARIABLE, PASSPHRASE)
    (folder / "key.pem").rename(tmp_path / "key.pem")  # to another machine
    assert find_authority(files.config) is None


# ------------------------------------------------------------------------------------------ together


def test_operators_at_once_do_not_corrupt_the_roster(files, tmp_path):
    names = [f"site-{n}" for n in range(6)]
    for name in names:
        asked(files, name, tmp_path)
    others = [FederationFiles(files.config) for _ in names]
    authority = authority_of(files)

    def work(each):
        one, name = each
        one.approve(name, authority, now())
        one.invite(f"{name}-b", 7, now())
        if name == "site-0":
            one.revoke(name)
            one.sign_roster(authority, now())

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, zip(others, names, strict=True)))
    roster = files.roster()
    assert sorted(roster.sites) == names[1:]
    assert roster.number == 1 + 6 + 1
    known = files.enrolments()
    assert {name: known[name].state for name in names} == dict.fromkeys(names, "approved") | {
        "site-0": "revoked"
    }
    assert all(known[f"{name}-b"].state == "invited" for name in names)
    assert [path.name for path in files.config.roster.parent.glob(".*")] == []


def test_a_command_that_finds_another_one_says_so(files, monkeypatch):
    monkeypatch.setattr("fedcore.files.lock.WAIT_SECONDS", 0.05)
    with files._locked(), pytest.raises(BadInput, match="found another command changing it"):
        files.invite("va", 7, now())
    files.invite("va", 7, now())


def test_an_approval_that_was_killed_is_repeated(files, tmp_path, monkeypatch):
    asked(files, "va", tmp_path)
    monkeypatch.setattr(
        FederationFiles, "_write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        files.approve("va", authority_of(files), now())
    monkeypatch.undo()
    assert (files.roster().number, files.enrolment("va").state) == (2, "asked")
    files.approve("va", authority_of(files), now())
    assert (files.roster().number, files.enrolment("va").state) == (2, "approved")


def test_two_sites_with_one_identity_key_are_refused(files, tmp_path):
    joined(files, "va", tmp_path)
    line = files.invite("vb", 7, now())[0]
    (tmp_path / "vb").mkdir()
    (tmp_path / "vb" / "identity.pem").write_bytes((tmp_path / "va" / "identity.pem").read_bytes())
    (tmp_path / "vb" / "identity.pem").chmod(0o600)
    files.ask(joining.begin(line, tmp_path / "vb"), now())
    with pytest.raises(Refused, match="the key of va"):
        files.approve("vb", authority_of(files), now())
    assert files.roster().number == 2


@pytest.mark.parametrize("name", ["../x", "a/b", "coordinator", "VA", "a b", "", ".hidden", "con"])
def test_names_that_no_site_may_have_are_refused(files, name):
    files.invite("va", 7, now())
    with pytest.raises(BadInput):
        files.invite(name, 7, now())
    assert [*files.enrolments()] == ["va"]


def test_a_federation_of_fedcore_up_has_no_invitations(files):
    write_roster(files.config.roster, {"va": IdentityKey().public})
    with pytest.raises(BadInput, match="found a roster without signature") as caught:
        files.invite("oslo", 7, now())
    assert "fed-coordinator init" in caught.value.remedy


# ------------------------------------------------------------------------------------------ revocation


def test_a_revoked_site_is_on_the_list_and_off_the_roster(files, tmp_path):
    answer = joined(files, "va", tmp_path)
    joined(files, "oslo", tmp_path)
    revocations = Revocations(files.config.revoked)
    revocations.check(peer_of(answer.certificate))
    count, roster = files.revoke("va"), files.sign_roster(authority_of(files), now())
    assert (count, roster.number, [*roster.sites]) == (1, 4, ["oslo"])
    assert revocations.refresh()
    with pytest.raises(CertificateRefused, match="found it withdrawn"):
        revocations.check(peer_of(answer.certificate))
    files.revoke("va")  # again: nothing changes
    files.sign_roster(authority_of(files), now())
    assert (files.roster().number, revocations.refresh()) == (4, True)
    assert files.config.revoked.read_text().count("# va") == 1


def test_every_certificate_of_a_site_is_revoked(files, tmp_path):
    first = joined(files, "va", tmp_path)
    second = files.renew("va", None, authority_of(files), now())
    assert first.certificate != second.certificate
    assert files.revoke("va") == 2
    revocations = Revocations(files.config.revoked)
    for answer in (first, second):
        with pytest.raises(CertificateRefused):
            revocations.check(peer_of(answer.certificate))


def test_without_the_authority_a_site_is_cut_off_and_the_roster_follows(files, tmp_path):
    joined(files, "va", tmp_path)
    assert files.revoke("va") == 1
    assert [*files.roster().sites] == ["va"]
    signed = files.sign_roster(authority_of(files), now())
    assert (signed.number, [*signed.sites]) == (3, [])
    assert files.sign_roster(authority_of(files), now()).number == 3


def test_a_site_is_cut_off_before_the_passphrase_is_asked_for(command, tmp_path, monkeypatch):
    monkeypatch.setenv(PASSPHRASE_VARIABLE, PASSPHRASE)
    command("init", "heart", "--host", "hub.example.org", "--out", "f")
    monkeypatch.chdir(tmp_path / "f")
    files = FederationFiles(read_config(tmp_path / "f" / "federation.toml"))
    answer = joined(files, "va", tmp_path)
    code, shown, said = command("revoke", "va")
    assert (code, "'va' is revoked (1 certificate)" in shown) == (2, True)
    assert said.startswith("error: passphrase of the authority: found none")
    with pytest.raises(CertificateRefused, match="found it withdrawn"):
        Revocations(files.config.revoked).check(peer_of(answer.certificate))
    assert [*files.roster().sites] == ["va"]
    monkeypatch.setenv(PASSPHRASE_VARIABLE, PASSPHRASE)
    assert command("revoke", "va")[1].endswith("roster 3 is without it\n")
    assert [*files.roster().sites] == []


def test_a_site_that_is_revoked_before_its_answer_gets_none(files, tmp_path):
    asked(files, "va", tmp_path)
    approved = files.approve("va", authority_of(files), now())
    files.revoke("va")
    with pytest.raises(JoinRefused, match=r"\(token\)"):
        files.answer(approved)
    assert files.enrolment("va").state == "revoked"


def test_an_invitation_is_revoked(files):
    files.invite("va", 7, now())
    assert files.revoke("va") == 0
    assert files.enrolment("va").state == "revoked"
    with pytest.raises(BadInput, match="site: found 'vb', which is not known"):
        files.revoke("vb")


def test_a_list_without_a_line_end_is_not_damaged(files, tmp_path):
    joined(files, "va", tmp_path)
    files.config.revoked.write_text("# mine\nabc")
    files.revoke("va")
    assert files.config.revoked.read_text().startswith("# mine\nabc\n")
    Revocations(files.config.revoked)


# ------------------------------------------------------------------------------------------ views


def test_the_table_of_sites(files, tmp_path):
    joined(files, "va", tmp_path)
    asked(files, "oslo", tmp_path)
    files.invite("basel", 7, now())
    joined(files, "bonn", tmp_path)
    files.revoke("bonn")
    files.sign_roster(authority_of(files), now())
    rows = {
        row["site"]: row
        for row in sites_rows(files, {"va": JobSite(connected=True), "oslo": JobSite()})
    }
    assert {name: row["state"] for name, row in rows.items()} == {
        "va": "joined", "oslo": "asked", "basel": "invited", "bonn": "revoked"
    }  # fmt: skip
    assert [name for name, row in rows.items() if row["connected"]] == ["va"]
    assert [name for name, row in rows.items() if row["on_roster"]] == ["va"]
    assert rows["basel"]["invitation_expires"]
    assert not rows["va"]["invitation_expires"]
    shown = roster_lines(files.roster())
    assert rows["va"]["identity"] in shown[1]
    assert "1 site," in shown[0]


def test_settings_of_joining_are_checked(files):
    path = files.config.roster.parent / "federation.toml"
    path.write_text(
        path.read_text()
        .replace('"automatic" ', '"sometimes" ')
        .replace('= "automatic"', '= "sometimes"')
    )
    with pytest.raises(BadInput, match=r"enrolment.approval: found 'sometimes', expected"):
        read_config(path)
