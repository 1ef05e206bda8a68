"""What an extra brings: without it one line names it before anything begins, and a site does without all of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from fedcore_server import cli as coordinator

import fedcore
from fedcore import report
from fedcore.cli import main as commands
from fedcore.errors import BadInput
from fedcore.experiment.run import Comparison
from fedcore.identity.tokens import TokenUri, open_token_key
from fedcore.learning.data import digits
from fedcore.learning.task import load_task
from fedcore.store.postgresql import PostgresqlDatabase


def hint(extra):
    return f"pip install 'fedcore-fl[{extra}]'"


@pytest.mark.parametrize(
    ("extra", "module", "use"),
    [
        ("report", "matplotlib", lambda: report.render([(None, [])])),
        ("report", "jinja2", lambda: report.write("nowhere")),
        ("report", "scipy", lambda: fedcore.simulate("heart", protection="plain", out="run")),
        ("digits", "sklearn", digits.sites),
        ("flower", "flwr", lambda: load_task("flower:app")),
        (
            "postgresql",
            "psycopg",
            lambda: PostgresqlDatabase.open("postgresql://h/d", party="", authority=""),
        ),
        ("pkcs11", "pkcs11", lambda: open_token_key(TokenUri(Path("/m")), lambda: None)),
        ("tables", "pandas", lambda: Comparison.table(SimpleNamespace())),
    ],
)
def test_what_needs_an_extra_names_it(monkeypatch, tmp_path, extra, module, use):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BadInput) as caught:
        use()
    assert f"found no {module} in this environment" in str(caught.value)
    assert caught.value.remedy == hint(extra)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("main", "arguments", "extra", "module"),
    [
        (commands.main, ["simulate", "--task", "heart", "--rounds", "1"], "report", "matplotlib"),
        (coordinator.main, ["serve"], "coordinator", "prometheus_client"),
    ],
)
def test_a_command_without_its_extra_ends_with_one_line(
    monkeypatch, tmp_path, capsys, main, arguments, extra, module
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert said[-2].startswith("error: ") and module in said[-2]
    assert said[-1] == f"hint: {hint(extra)}"
    assert not list(tmp_path.glob("runs/*/*"))


def test_a_site_s_processes_import_nothing_of_an_extra():
    """fed-site's commands, its session and its training process; torch brings jinja2 itself."""
    hidden = (
        "flwr", "grpc_health", "grpc_reflection", "matplotlib", "pandas", "prometheus_client", "pyarrow",
        "scipy", "sklearn", "tensorboard", "zstandard",
    )  # fmt: skip
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({hidden}))\n"
        "import fedcore_clients.app, fedcore_clients.check, fedcore_clients.cli, fedcore_clients.worker\n"
        "import fedcore.learning.site, fedcore.learning.scoring, fedcore.learning.training\n"
        "from fedcore.learning.task import load_task\n"
        "print(load_task('heart').name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "heart\n", done.stderr
