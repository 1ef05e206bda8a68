"""Models at a site with a keystore: encrypted in every file, each for its own place."""

from __future__ import annotations

import shutil

import pytest
from fedcore_clients.app import opened, read_papers
from fedcore_clients.config import read_config
from fedcore_clients.ledger import LEDGER_FILE, Exposure, Ledger, read_ledger
from fedcore_clients.private_files import encrypt, keystore_status
from fedcore_clients.state_files import StateFiles, state_folder
from support.keystores import cheap_scrypt, new_site
from support.killed import killed_before

from fedcore.errors import StoreProblem
from fedcore.identity.identities import read_identity
from fedcore.secagg.crypto.secret import SecretBytes
from fedcore.store.sealed_files import FileSealer, is_sealed_file
from fedcore.wire.limits import INLINE

SMALL, LARGE = b"a small model", b"a large model" * (INLINE // 8)
NAME = "c" * 64


@pytest.fixture
def files(tmp_path):
    return StateFiles(state_folder(tmp_path, "job"), FileSealer(SecretBytes(bytes(32))))


def in_clear(folder, *contents):
    data = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
    return [each for each in contents if any(each[:64] in found for found in data)]


def test_a_state_comes_back_and_is_in_no_file_in_clear(files):
    files.write(files.candidate(NAME), LARGE)
    assert files.read_candidate(NAME) == LARGE
    files.adopt(NAME, b"")
    assert files.read(files.current) == LARGE and not files.candidate(NAME).exists()
    files.show(SMALL)
    assert files.shows(SMALL) and not files.shows(LARGE)
    kept = files.keep(LARGE)
    assert files.kept(kept) == LARGE and files.keep(LARGE) != kept
    assert in_clear(files.folder, SMALL, LARGE) == []
    clear = StateFiles(files.folder.with_name("clear"))
    clear.write(clear.current, LARGE)
    assert in_clear(clear.folder, LARGE) == [LARGE], "the control: without a sealer"


def test_a_file_in_anothers_place_is_refused(files):
    """A thief who can write, but has no key, cannot make a site go on from a state that was not certified, from that
    of another job, or from an app's."""
    files.write(files.current, LARGE)
    files.write(files.candidate(NAME), SMALL * 2)
    other = StateFiles(files.folder.with_name("other"), files._sealer)
    other.write(other.current, SMALL)
    app = files.folder / files.keep(LARGE).decode()
    for path in (files.candidate(NAME), other.current, app):
        shutil.copy(path, files.current)
        with pytest.raises(
            StoreProblem, match=r"current\.safetensors: found a content that was not"
        ):
            files.read(files.current)
        assert not files.shows(LARGE)


def test_adopting_a_state_can_be_killed_between_any_two_steps(files):
    step, found = 0, set()
    while True:
        files.write(files.current, SMALL)
        files.write(files.candidate(NAME), LARGE)
        killed = killed_before(step, lambda: files.promote(NAME))
        found.add((files.read(files.current), files.candidate(NAME).exists()))
        if files.candidate(NAME).exists():
            files.promote(NAME)
        assert files.read(files.current) == LARGE
        if not killed:
            break
        step += 1
    assert found == {(SMALL, True), (LARGE, True), (LARGE, False)}


@pytest.fixture
def site(tmp_path, monkeypatch):
    cheap_scrypt(monkeypatch)
    config = new_site(tmp_path / "va")
    files = StateFiles(state_folder(config.folder, "job"))
    files.write(files.current, LARGE)
    files.write(files.folder / files.keep(LARGE).decode(), LARGE)
    (files.folder / ".current.safetensors.part").write_bytes(LARGE)
    (files.folder / "recipe.json").write_text("{}")
    return config


def test_a_sites_states_are_encrypted_by_the_command_and_required_at_the_start(site):
    assert {f["name"]: f["state"] for f in keystore_status(site)["files"]}["states"] == "in clear"
    folder = state_folder(site.folder, "job")
    clear = (folder / "current.safetensors").read_bytes()
    assert str(site.folder / "states") in encrypt(site)["encrypted"]
    assert in_clear(folder, LARGE) == [] and encrypt(site)["encrypted"] == []
    status = keystore_status(site)
    assert status["at_rest"] and all(f["state"] != "in clear" for f in status["files"])
    files = StateFiles(folder, site.file_sealer())
    assert files.read(files.current) == LARGE and (folder / "recipe.json").read_text() == "{}"
    with opened(site, read_papers(site)) as context:
        assert context.sealer is not None
    files.current.write_bytes(clear)
    assert not keystore_status(site)["at_rest"]
    with (
        pytest.raises(StoreProblem, match=r"current\.safetensors: found it in clear") as error,
        opened(site, read_papers(site)),
    ):
        pass
    assert "keystore encrypt" in error.value.remedy


def test_encrypting_states_can_be_killed_between_any_two_steps(site):
    encrypt(site)
    folder = state_folder(site.folder, "job")
    files = StateFiles(folder, site.file_sealer())
    step, sealed = 0, set()
    while True:
        files.current.write_bytes(LARGE)
        killed = killed_before(step, lambda: encrypt(site))
        sealed.add(is_sealed_file(files.current))
        encrypt(site)
        assert files.read(files.current) == LARGE and not list(folder.glob(".*"))
        if not killed:
            break
        step += 8  # each opens files of the trail and the journal, too
    assert sealed == {True, False}


def test_a_ledger_is_encrypted_line_by_line_each_for_its_place(site):
    path, job = site.folder / LEDGER_FILE, "a-job-of-this-test"
    entries = [
        Exposure(f"h{n}", "rows", "update", job, "plan", n, n, ("a",), (), (), 1.0)
        for n in range(3)
    ]
    with Ledger.open(site.folder, read_identity(site.identity)) as ledger:
        for each in entries[:2]:
            ledger.exposed(each)
    assert job in path.read_text(), "the control"
    assert not keystore_status(site)["at_rest"]
    assert str(path) in encrypt(site)["encrypted"] and path.stat().st_mode & 0o777 == 0o600
    with opened(site, read_papers(site)) as context:
        assert list(context.ledger) == entries[:2]
        context.ledger.exposed(entries[2])
        context.ledger.certified("h1", "certificate")
    assert job not in path.read_text()
    found = read_ledger(site.folder, site.ledger_sealer())
    assert [(each.header, each.certificate) for each in found] == [
        ("h0", ""), ("h1", "certificate"), ("h2", ""),
    ]  # fmt: skip
    lines = path.read_bytes().splitlines(keepends=True)
    for changed in (lines[1:], [lines[1], lines[0], *lines[2:]], [lines[0], *lines]):
        path.write_bytes(b"".join(changed))
        with pytest.raises(StoreProblem, match="damaged"):
            read_ledger(site.folder, site.ledger_sealer())
    path.write_bytes(b"".join(lines) + lines[0][:30])  # of a process that was killed
    with opened(site, read_papers(site)) as context:
        assert len(list(context.ledger)) == 3
    assert path.read_bytes() == b"".join(lines)
    with pytest.raises(StoreProblem, match=r"found it encrypted, expected it in clear"):
        read_ledger(site.folder)
    path.write_text('{"exposed": {}}\n')
    with pytest.raises(StoreProblem, match=r"found it in clear") as error:
        read_ledger(site.folder, site.ledger_sealer())
    assert error.value.remedy == "fed-site keystore encrypt"


def test_without_its_keystore_an_encrypted_site_does_not_start(site):
    encrypt(site)
    site.file.write_text(site.file.read_text().partition("[keystore]")[0])
    config = read_config(site.file).model_copy(update={"kit": site.kit})
    papers = read_papers(site)
    with (
        pytest.raises(StoreProblem, match="found it encrypted, expected it in clear"),
        opened(config, papers),
    ):
        pass
