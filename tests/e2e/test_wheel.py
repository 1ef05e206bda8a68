"""The wheel works beside a stranger's `clients`, and in a folder full of strangers' names.

Built from a copy, installed into an environment of its own that borrows this interpreter's libraries
(but not our editable install), next to PyPI's `clients`.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STRANGER = "raise RuntimeError('a stranger was imported: ' + __name__)\n"


def run(*command: object, **options) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300, **options
    )


def checked(*command: object, **options) -> str:
    done = run(*command, **options)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("setuptools", reason="building without isolation needs setuptools")
    source = tmp_path_factory.mktemp("source")
    for folder in ("fedcore", "server", "clients"):
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    # Without isolation, so that nothing is fetched; from the copy, so that no build/ stays behind.
    checked(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def strangers_wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("download")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "1")
    done = run(*pip, "download", "--quiet", "--no-deps", "--dest", folder, "clients==1.6")
    found = list(folder.glob("clients-1.6*"))
    if done.returncode != 0 or not found:
        pytest.skip(f"PyPI's clients==1.6 cannot be fetched here: {done.stderr.strip()[-200:]}")
    return found[0]


@pytest.fixture(scope="module")
def environment(tmp_path_factory, wheel, strangers_wheel) -> Path:
    """The `bin` folder of a venv holding our wheel and the stranger's, our libraries borrowed."""
    venv = tmp_path_factory.mktemp("environment") / "venv"
    checked(sys.executable, "-m", "venv", "--without-pip", venv)
    python = venv / "bin" / "python"
    install = ("install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    checked(sys.executable, "-m", "pip", "--python", python, *install, wheel, strangers_wheel)
    # Folders that a .pth names join sys.path after our own, and .pth files inside them (such as the
    # one of an editable install) are not read.
    borrowed = {
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
        *site.getsitepackages(),
    }
    paths = json.loads(
        checked(python, "-c", "import json, sysconfig; print(json.dumps(sysconfig.get_paths()))")
    )
    Path(paths["purelib"], "borrowed.pth").write_text("\n".join(sorted(borrowed)) + "\n")
    return venv / "bin"


@pytest.fixture
def elsewhere(tmp_path) -> dict:
    """A working folder with every name that could be mistaken for ours, and a clean environment."""
    folder = tmp_path / "someone's work"
    (folder / "clients").mkdir(parents=True)
    for name in (
        "server.py",
        "client.py",
        "clients/__init__.py",
        "data.py",
        "plan.py",
        "types_.py",
    ):
        (folder / name).write_text(STRANGER)
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONSTARTUP")
    env = {key: value for key, value in os.environ.items() if key not in hidden}
    return {"cwd": folder, "env": env}


def test_the_wheel_holds_what_runs_need(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("fedcore", "fedcore_server", "fedcore_clients"):
        assert f"{folder}/py.typed" in names
    assert "fedcore/learning/data/heart.csv" in names
    assert any(name.startswith("fedcore/report/templates/") for name in names)
    assert "fedcore/cli/new_project/job.toml" in names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fedcore", "fedcore_server", "fedcore_clients", "fedcore_fl-0.1.0.dist-info"}
    text = zipfile.ZipFile(wheel).read("fedcore_fl-0.1.0.dist-info/METADATA").decode()
    assert "License-Expression: Apache-2.0" in text


def test_ours_and_the_strangers_both_import(environment, tmp_path, elsewhere):
    code = (
        "import fedcore, fedcore_server, fedcore_clients, clients;"
        "print(fedcore.__file__, fedcore_server.__file__, fedcore_clients.__file__, clients.__file__)"
    )
    out = checked(environment / "python", "-c", code, cwd=tmp_path, env=elsewhere["env"])
    venv = str(environment.parent)
    assert all(place.startswith(venv) for place in out.split()), out


def test_commands_run_among_strangers(environment, elsewhere):
    fedcore = environment / "fedcore"
    assert "simulate" in checked(fedcore, "--help", **elsewhere)
    checked(fedcore, "doctor", **elsewhere)
    out = checked(
        fedcore,
        *("simulate", "--task", "heart", "--rounds", "2", "--protection", "plain", "--json"),
        **elsewhere,
    )
    result = json.loads(out)
    assert (result["task"], result["rounds"], result["schema"]) == ("heart", 2, 1)


def test_the_command_runs_with_the_folder_first_on_the_path(environment, elsewhere):
    """`python -c` and notebooks search the working folder first: the case in which names clash."""
    code = "from fedcore.cli.main import main; main()"
    assert "simulate" in checked(environment / "python", "-c", code, "--help", **elsewhere)
