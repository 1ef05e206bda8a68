"""Names of sites: one rule for every command, before a row is read or a process started."""

from __future__ import annotations

import pytest

import fedcore
from fedcore import local_deployment
from fedcore.cli import main as commands
from fedcore.errors import BadInput
from fedcore.identity.identities import read_roster
from fedcore.identity.peer import check_sites


@pytest.mark.parametrize("deployed", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "coordinator", "Coordinator", "operator", "observer", "authority", "con", "NUL", "aux.csv", "COM1",
        "lpt9.x", "north.", "", " ", "x" * 65, "a\nb", "../../etc", "a/b", "a\\b", " north", "\x1b[31m",
    ],
)  # fmt: skip
def test_a_name_that_no_site_may_have(name, deployed):
    with pytest.raises(BadInput, match="sites: found"):
        check_sites(["a", name, "b"], deployed=deployed)


@pytest.mark.parametrize(
    ("one", "other"), [("North", "north"), ("straße", "STRASSE"), ("zu\u0308rich", "zürich"), ("ﬁ", "fi")]
)  # fmt: skip
def test_names_that_one_folder_cannot_tell_apart(one, other):
    with pytest.raises(BadInput, match="expected names that differ in more"):
        check_sites([one, "b", other], deployed=False)


@pytest.mark.parametrize(
    "name", ["site", "site_1", "hospital.example.org", "10.0.0.1", "contra", "7", "n" * 64]
)
def test_other_names_are_taken_everywhere(name):
    check_sites(["a", name, "b"], deployed=True)
    check_sites(["a", name, "b"], deployed=False)


@pytest.mark.parametrize("name", ["St. Mary's", "zürich", "北京"])
def test_a_name_that_certificates_cannot_hold_is_for_simulations(name):
    check_sites(["a", name, "b"], deployed=False)
    with pytest.raises(BadInput, match="expected 1 to 64 letters, digits"):
        check_sites(["a", name, "b"], deployed=True)


TASK = """
import numpy as np, torch, fedcore

def data(source):
    raise AssertionError("a row is read")

task = fedcore.Task(
    "named", data, lambda: torch.nn.Linear(3, 2), torch.nn.functional.cross_entropy,
    sites={sites},
)
"""


@pytest.mark.parametrize("command", ["simulate", "compare", "plan", "check", "up"])
@pytest.mark.parametrize("name", ["coordinator", "B"])
def test_every_command_refuses_it_and_leaves_nothing(tmp_path, monkeypatch, capsys, command, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "named.py").write_text(TASK.replace("{sites}", repr({"a": 1, "b": 2, name: 3})))
    with pytest.raises(SystemExit) as ended:
        commands.main([command, *([] if command == "check" else ["--task"]), "named.py"])
    assert ended.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert f"{name!r}" in lines[-2] and lines[-2].startswith("error: sites: found")
    assert lines[-1].startswith("hint: ")
    assert {path.name for path in tmp_path.iterdir()} <= {"named.py", "__pycache__"}


def test_the_files_of_a_deployment_and_a_roster_refuse_it(tmp_path):
    for name in ("coordinator", "A"):
        with pytest.raises(BadInput, match=f"found .*{name!r}"):
            local_deployment.write(
                tmp_path / "fed", "f", {"a": {}, "b": {}, name: {}}, {}, policy={}
            )
        assert not (tmp_path / "fed").exists()
        roster = tmp_path / "roster.toml"
        lines = [
            f'"{each}" = {{ identity = "{number:064x}" }}'
            for number, each in enumerate(("a", "b", name), start=1)
        ]
        roster.write_text("[sites]\n" + "\n".join(lines) + "\n")
        with pytest.raises(BadInput, match=f"sites: found .*{name!r}"):
            read_roster(roster)


def test_the_api_refuses_it_too():
    with pytest.raises(BadInput, match="another party of a federation"):
        fedcore.simulate("heart", sites={"va": "va", "hungary": "hungary", "operator": "cleveland"})
