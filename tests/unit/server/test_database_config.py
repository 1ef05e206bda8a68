"""Where a coordinator's journal is: `database` and `database_file` of federation.toml, and what is refused."""

from __future__ import annotations

import pytest
from fedcore_clients.config import read_config as read_site
from fedcore_server.app import _folder_lock
from fedcore_server.config import read_config

from fedcore.errors import BadInput, StoreProblem, UnknownName

FILE = 'name = "town"\nroster = "roster.toml"\nkit = "kit"\nfolder = "state"\n'
SECRET = "hunter2secret"


def config(tmp_path, more, mode=0o600):
    path = tmp_path / "federation.toml"
    path.write_text(FILE + more)
    path.chmod(mode)
    return path


def url_file(tmp_path, mode=0o600):
    path = tmp_path / "url"
    path.write_text(f"postgresql://u:{SECRET}@h/d\n")
    path.chmod(mode)
    return path


def test_the_url_is_in_the_file_or_in_one_that_it_names(tmp_path):
    assert read_config(config(tmp_path, "")).database is None
    found = read_config(config(tmp_path, 'database = "postgresql://u@h/d"\n', 0o644))
    assert found.database == "postgresql://u@h/d"
    url_file(tmp_path)
    found = read_config(config(tmp_path, 'database_file = "url"\n', 0o644))
    assert found.database == f"postgresql://u:{SECRET}@h/d"
    assert SECRET not in repr(found) and SECRET not in str(found)


@pytest.mark.parametrize(
    ("more", "mode", "words"),
    [
        (f'database = "postgresql://u:{SECRET}@h/d"\n', 0o644, "found mode 0644, expected 0600"),
        ('database_file = "url"\n', 0o644, "found mode 0644, expected 0600"),
        ('database_file = "nothing"\n', 0o600, "nothing"),
        ('database = "postgresql://u@h/d"\ndatabase_file = "url"\n', 0o600, "expected one of them"),
        (f'database = ["postgresql://u:{SECRET}@h/d"]\n', 0o600, "expected string"),
        (f'database = "postgresql://u:{SECRET}@h/d\n', 0o600, "cannot be read as TOML"),
    ],
)
def test_what_cannot_be_used_is_one_line_without_the_password(tmp_path, more, mode, words):
    url_file(tmp_path, mode)
    with pytest.raises(BadInput, match=words) as caught:
        read_config(config(tmp_path, more, mode))
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value)


def test_a_site_is_refused_a_database(tmp_path):
    path = tmp_path / "site.toml"
    path.write_text('site = "va"\ndatabase = "postgresql://u@h/d"\n')
    with pytest.raises(UnknownName, match="'database'") as caught:
        read_site(path)
    assert "only a file in `folder` can erase" in caught.value.remedy


def test_two_coordinators_in_one_folder_are_refused(tmp_path):
    found = read_config(config(tmp_path, 'database = "postgresql://u@h/d"\n'))
    with _folder_lock(found):
        with pytest.raises(StoreProblem, match="expected no other process") as caught:
            _folder_lock(found).__enter__()
        assert "a folder of its own" in caught.value.remedy
    with _folder_lock(found):
        pass
