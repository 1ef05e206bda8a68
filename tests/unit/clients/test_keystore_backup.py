"""`fed-site keystore rotate`, `backup`, `restore`: another passphrase, and the keys on another machine."""

from __future__ import annotations

import shutil

import pytest
from fedcore_clients.app import opened, read_papers
from fedcore_clients.cli import main
from fedcore_clients.config import read_config
from fedcore_clients.private_files import back_up, encrypt, restore, rotate
from support.keystores import PASSPHRASE, cheap_scrypt, new_site, passphrase_file
from support.killed import killed_before

from fedcore.errors import AlreadyExists, BadInput
from fedcore.files.disk import open_to_others

OTHER = "another passphrase entirely"
TRACE = b"a value of the journal"


@pytest.fixture(autouse=True)
def _cheap(monkeypatch):
    cheap_scrypt(monkeypatch)


@pytest.fixture
def site(tmp_path):
    """With encrypted keys and a journal that has a value."""
    config = new_site(tmp_path / "va")
    encrypt(config)
    with opened(config, read_papers(config)) as context:
        context.journal.put("site", "jobs", TRACE)
    return config


def with_unlock(config, folder, text):
    """The site whose [keystore] names a new file."""
    path = passphrase_file(folder, text)
    old = f"file:{config.keystore.passphrase_file}"
    config.file.write_text(config.file.read_text().replace(old, f"file:{path}"))
    return read_config(config.file)


def jobs_of(config):
    with opened(config, read_papers(config)) as context:
        return context.journal.get("site", "jobs")


# ----------------------------------------------------------------------------------------- rotate


def test_a_new_passphrase_opens_the_same_keys_and_the_old_one_does_not(site, tmp_path, capsys):
    kept = {p: p.read_bytes() for p in (site.identity, site.kit / "key.pem")}
    new = passphrase_file(tmp_path / "new", OTHER)
    with pytest.raises(SystemExit) as ended:
        main(["keystore", "rotate", "--new", f"file:{new}", "--config", str(site.file)])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "") and OTHER not in out and str(new) in out
    assert {p: p.read_bytes() for p in kept} == kept
    assert site.keystore.file.stat().st_mode & 0o777 == 0o600
    with pytest.raises(BadInput, match="this passphrase does not open"):
        read_papers(site)
    assert jobs_of(with_unlock(site, tmp_path / "new", OTHER)) == TRACE


def test_a_killed_or_refused_rotation_changes_nothing(site, tmp_path):
    before = site.keystore.file.read_bytes()
    for text, what in (("short", "found 5 characters"), ("", "found it empty")):
        with pytest.raises(BadInput, match=what):
            rotate(site, f"file:{passphrase_file(tmp_path / 'new', text)}")
    with pytest.raises(BadInput, match="--new: found a text of"):
        rotate(site, OTHER)
    new = f"file:{passphrase_file(tmp_path / 'new', OTHER)}"
    step = 0
    while killed_before(step, lambda: rotate(site, new)):
        assert open_to_others(site.base, ["keystore*", ".*"]) in ([], [site.base])
        step += 1
        if site.keystore.file.read_bytes() != before:
            break
        read_papers(site)
    assert step > 10
    assert jobs_of(with_unlock(site, tmp_path / "new", OTHER)) == TRACE


# --------------------------------------------------------------------------------- backup, restore


def test_a_site_comes_back_from_a_backup_on_another_machine(site, tmp_path):
    public = read_papers(site).identity.public
    back_up(site, tmp_path / "va.backup")
    assert (tmp_path / "va.backup").stat().st_mode & 0o777 == 0o600
    there = tmp_path / "there"
    there.mkdir()
    for name in ("site.toml", "roster.toml"):
        shutil.copy(site.base / name, there)
    config = read_config(there / "site.toml")
    assert len(restore(config, tmp_path / "va.backup")["restored"]) == 5
    assert read_papers(config).identity.public == public
    assert restore(config, tmp_path / "va.backup")["restored"] == []  # a killed one is repeated
    assert jobs_of(config) is None
    for path in (config.identity, config.kit / "key.pem", config.keystore.file):
        assert path.stat().st_mode & 0o777 == 0o600


def test_a_backup_has_no_journal_state_or_key_in_clear(site, tmp_path):
    """A site put back to an earlier moment of a round could answer twice."""
    (site.folder / "states").mkdir()
    (site.folder / "states" / "current").write_bytes(TRACE)
    done = back_up(site, tmp_path / "va.backup")
    assert done["files"] == [
        "keystore.json",
        "key.pem",
        "identity.pem",
        "authority.pem",
        "certificate.pem",
    ]
    data = (tmp_path / "va.backup").read_bytes()
    for secret in (TRACE, TRACE.hex().encode(), PASSPHRASE.encode(), b"PRIVATE KEY"):
        assert secret not in data
    assert len(data) < 8192
    with pytest.raises(AlreadyExists):
        back_up(site, tmp_path / "va.backup")


def test_a_restore_overwrites_nothing(site, tmp_path):
    back_up(site, tmp_path / "va.backup")
    other = new_site(tmp_path / "again")
    for missing in (None, other.identity):
        if missing is not None:
            missing.unlink()
        before = {p: p.read_bytes() for p in other.base.rglob("*") if p.is_file()}
        with pytest.raises(AlreadyExists, match=r"key\.pem: found another file there"):
            restore(other, tmp_path / "va.backup")
        assert {p: p.read_bytes() for p in other.base.rglob("*") if p.is_file()} == before


def test_a_bad_backup_is_named_and_nothing_is_written(site, tmp_path):
    path = tmp_path / "va.backup"
    back_up(site, path)
    whole = path.read_bytes()
    there = tmp_path / "there"
    there.mkdir()
    for name in ("site.toml", "roster.toml"):
        shutil.copy(site.base / name, there)
    config = read_config(there / "site.toml")
    at = whole.index(b'"sealed"') + 100
    wrong = [whole[:-20], b"x", b"[]", b"{}", whole.replace(b"backup 1", b"backup 9")]
    wrong.append(whole[:at] + (b"A" if whole[at : at + 1] != b"A" else b"B") + whole[at + 1 :])
    for data in wrong:
        path.write_bytes(data)
        with pytest.raises(BadInput, match=r"va\.backup: found something else, or it damaged"):
            restore(config, path)
    path.write_bytes(whole)
    path.chmod(0o644)
    with pytest.raises(BadInput, match=r"va\.backup: found mode 0644"):
        restore(config, path)
    path.chmod(0o600)
    oslo = config.model_copy(update={"site": "oslo"})
    with pytest.raises(BadInput, match="found the keystore of site va, expected that of site oslo"):
        restore(oslo, path)
    with pytest.raises(BadInput, match="this passphrase does not open"):
        restore(with_unlock(config, tmp_path / "new", OTHER), path)
    assert sorted(p.name for p in there.iterdir()) == ["roster.toml", "site.toml"]


def test_keys_in_clear_are_not_backed_up(tmp_path, site):
    clear = new_site(tmp_path / "clear")
    with pytest.raises(BadInput, match=r"keystore\.json: found no such file"):
        back_up(clear, tmp_path / "out")
    site.identity.write_bytes(clear.identity.read_bytes())
    with pytest.raises(BadInput, match=r"identity\.pem: found a key in clear"):
        back_up(site, tmp_path / "out")
    with pytest.raises(BadInput, match="found no \\[keystore\\]"):
        back_up(site.model_copy(update={"keystore": None}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
