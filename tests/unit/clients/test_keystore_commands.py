"""`fed-site keystore`, and a site whose private keys are encrypted at rest."""

from __future__ import annotations

import json
import os
import time

import pytest
from fedcore_clients import joining
from fedcore_clients.app import opened, read_papers
from fedcore_clients.cli import main
from fedcore_clients.config import read_config
from fedcore_clients.private_files import encrypt, encrypted_lines, keystore_status, private_files
from fedcore_clients.sandbox import hidden
from support.keystores import PASSPHRASE, cheap_scrypt, new_site, passphrase_file

from fedcore.audit.trail import TRAIL_FILE
from fedcore.errors import BadInput, Refused, StoreProblem
from fedcore.identity import encrypted_files
from fedcore.identity.identities import read_identity
from fedcore.identity.join_messages import JoinLine
from fedcore.identity.kit import read_key
from fedcore.store.journal import Journal


@pytest.fixture(autouse=True)
def _cheap(monkeypatch):
    cheap_scrypt(monkeypatch)


@pytest.fixture
def site(tmp_path):
    return new_site(tmp_path / "va")


def states(config):
    return {each.name: each.state for each in private_files(config)}


def public_keys(config):
    """Of a site whose keys are in clear."""
    return read_key(config.kit / "key.pem").public_key(), read_identity(config.identity).public


def command(capsys, *arguments, of="keystore"):
    with pytest.raises(SystemExit) as ended:
        main([of, *arguments])
    return ended.value.code, *capsys.readouterr()


def test_keys_are_encrypted_and_the_site_uses_them(site, capsys):
    tls, identity = public_keys(site)
    code, out, err = command(capsys, "encrypt", "--config", str(site.file))
    assert (code, err) == (0, "") and str(site.kit / "key.pem") in out
    papers = read_papers(site)
    assert papers.identity.public == identity
    assert read_key(papers.kit.key_path, papers.kit.password).public_key() == tls
    for path in (site.identity, site.kit / "key.pem", site.keystore.file):
        assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(BadInput, match="under a passphrase"):
        public_keys(site)
    trail = (site.folder / TRAIL_FILE).read_text()
    assert '"what":"private files"' in trail and PASSPHRASE not in trail + out


def test_the_status_needs_no_passphrase(site, capsys):
    at = ("status", "--config", str(site.file))
    code, out, _ = command(capsys, *at)
    assert code == 3 and out.count("in clear") == 2 and "hint: fed-site keystore encrypt" in out
    encrypt(site)
    site.keystore.passphrase_file.unlink()
    code, out, _ = command(capsys, *at, "--json")
    found = json.loads(out)
    assert code == 0 and found["at_rest"] and found["keystore"]["party"] == "site va"
    site.file.write_text(site.file.read_text().partition("[keystore]")[0])
    code, out, _ = command(capsys, *at)
    assert code == 0 and "no [keystore]: private files are in clear" in out


def test_the_roster_is_read_without_the_passphrase(site, capsys):
    encrypt(site)
    site.keystore.passphrase_file.unlink()
    code, out, err = command(capsys, "--config", str(site.file), of="roster")
    assert (code, err) == (0, "") and "3 sites" in out


def test_a_site_with_a_key_in_clear_does_not_start_until_it_is_encrypted(site):
    with pytest.raises(BadInput, match=r"keystore\.json: found no such file") as error:
        read_papers(site)
    assert "`keystore encrypt` makes it" in error.value.remedy
    kept = {path: path.read_bytes() for path in (site.identity, site.kit / "key.pem")}
    encrypt(site)
    for path, clear in kept.items():
        sealed = path.read_bytes()
        path.write_bytes(clear)  # put back by hand
        with pytest.raises(BadInput, match=f"{path.name}: found a key in clear") as error:
            read_papers(site)
        assert "`keystore encrypt` of fed-site" in error.value.remedy
        assert encrypt(site)["encrypted"] == [str(path)]
        read_papers(site)
        assert path.read_bytes() != sealed


@pytest.mark.parametrize("steps", range(10))
def test_a_killed_encrypt_is_repeated_by_the_same_command(site, steps):
    """Killed before its nth change of the disk, with what it had written left there."""
    before = public_keys(site)
    if child := os.fork():
        _, ended = os.waitpid(child, 0)
        killed = os.waitstatus_to_exitcode(ended) == 9
    else:
        status = 1
        try:
            kill_after(steps)
            encrypt(site)
            status = 0
        finally:
            os._exit(status)
    assert killed == (steps < 9)
    assert {"encrypted", "in clear"} >= set(states(site).values())
    encrypt(site)
    papers = read_papers(site)
    tls = read_key(papers.kit.key_path, papers.kit.password).public_key()
    assert (tls, papers.identity.public) == before
    left = [p.name for p in site.base.rglob(".*") if "keystore" not in p.name]
    assert left == [] and not encrypt(site)["encrypted"]


def kill_after(steps):
    """End this process without any clean-up before its change number `steps` to the private files."""
    counted = iter(range(steps))

    def killing(change):
        def maybe(*arguments, **options):
            if next(counted, None) is None:
                os._exit(9)
            return change(*arguments, **options)

        return maybe

    for name in ("create_keystore", "write_private", "sync_folder"):
        setattr(encrypted_files, name, killing(getattr(encrypted_files, name)))
    os.link = killing(os.link)


def test_a_key_that_a_killed_command_left_in_clear_is_removed(site):
    left = site.kit / ".key.pem.4711.part"
    left.write_bytes((site.kit / "key.pem").read_bytes())
    encrypt(site)
    assert not left.exists()


def test_a_lost_keystore_is_named_and_no_other_one_is_made(site, tmp_path):
    encrypt(site)
    kept, sealer = site.keystore.file.read_bytes(), site.row_sealer()
    site.keystore.file.unlink()
    for use in (encrypt, read_papers):
        with pytest.raises(BadInput, match=r"keystore\.json: found no such file") as error:
            use(site)
        assert "from a backup" in error.value.remedy
    assert not site.keystore.file.exists()
    other = new_site(tmp_path / "other")
    with Journal.open(other.folder / "journal.sqlite", party="site va", sealer=sealer):
        pass
    with pytest.raises(
        BadInput, match=r"expected the keystore that .*journal\.sqlite is encrypted"
    ):
        encrypt(other)
    assert set(states(other).values()) == {"in clear"} and not other.keystore.file.exists()
    site.keystore.file.write_bytes(kept)
    site.keystore.file.chmod(0o600)
    read_papers(site)


def test_what_cannot_be_encrypted_is_refused_and_nothing_is_changed(site, tmp_path):
    def unchanged(what, config=site):
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        with pytest.raises((BadInput, Refused, StoreProblem), match=what):
            encrypt(config)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before

    passphrase_file(tmp_path / "secrets", "short")
    unchanged("found 5 characters, expected 12 or more")
    passphrase_file(tmp_path / "secrets").chmod(0o644)
    unchanged("passphrase: found mode 0644")
    passphrase_file(tmp_path / "secrets")
    site.identity.chmod(0o640 | 0o004)
    unchanged(r"identity\.pem: found mode 0644")
    site.identity.chmod(0o600)
    whole = site.identity.read_bytes()
    site.identity.write_bytes(b"x")
    unchanged(r"identity\.pem: found no private key")
    site.identity.write_bytes(whole)
    unchanged("found no \\[keystore\\]", site.model_copy(update={"keystore": None}))
    with Journal.open(site.folder / "journal.sqlite", party="site va"):
        unchanged("found process .* using it")
    status = {"running": True, "written": time.time(), "process": os.getpid()}
    (site.folder / "status.json").write_text(json.dumps(status))
    unchanged("found its process running, expected it stopped")


def test_a_site_that_joins_with_a_keystore_never_writes_a_key_in_clear(tmp_path):
    config = new_site(tmp_path / "va")
    for path in (config.identity, *config.kit.iterdir()):
        path.unlink()
    line = JoinLine.create("localhost", 1, "va", "0" * 64)
    with pytest.raises(BadInput, match=r"keystore\.json: found no such file"):
        joining.begin(line, config.base)
    assert encrypt(config)["made"] and set(states(config).values()) == {"missing"}
    request = joining.begin(line, config.base)
    assert set(states(config).values()) == {"encrypted"}
    assert joining.begin(line, config.base).identity == request.identity


def test_the_journal_is_encrypted_with_the_keys_and_used(site, capsys):
    secret, path = b"a secret of the round", site.folder / "journal.sqlite"
    with Journal.open(path, party="site va") as journal:
        journal.put("job", "epoch", secret)
    assert secret in path.read_bytes()
    assert command(capsys, "status", "--config", str(site.file))[1].count("in clear") == 3
    assert str(path) in encrypt(site)["encrypted"]
    assert secret not in path.read_bytes()
    with opened(site, read_papers(site)) as context:
        assert context.journal.get("job", "epoch") == secret
    found = keystore_status(site)
    assert found["at_rest"] and found["files"][-1]["state"] == "encrypted"
    with pytest.raises(StoreProblem, match="found it encrypted, expected it in clear"):
        Journal.open(path, party="site va")


def test_a_journal_in_clear_is_refused_where_there_is_a_keystore(site):
    Journal.open(site.folder / "journal.sqlite", party="site va").close()
    (site.folder / "journal.sqlite").rename(site.base / "kept")
    encrypt(site)
    (site.base / "kept").rename(site.folder / "journal.sqlite")
    with (
        pytest.raises(StoreProblem, match="found it in clear") as error,
        opened(site, read_papers(site)),
    ):
        pass
    assert "fed-site" in error.value.remedy and not keystore_status(site)["at_rest"]


def test_the_task_can_read_neither_keystore_nor_passphrase(site):
    encrypt(site)
    assert {site.keystore.file, site.keystore.passphrase_file} <= set(hidden(site))


def test_the_report_says_what_to_keep_and_what_stays_in_clear(site):
    said = "\n".join(encrypted_lines(encrypt(site)))
    assert (
        "fed-site keystore backup FILE" in said
        and "overwritten blocks of the disk, are still in clear" in said
    )
    assert "no private file was in clear" in "\n".join(encrypted_lines(encrypt(site)))
    assert keystore_status(site)["unlock"].startswith("file:")
    other = site.file.read_text().replace("file:", "command:kms --token=abc")
    site.file.write_text(other)
    assert keystore_status(read_config(site.file))["unlock"] == "command:kms"
