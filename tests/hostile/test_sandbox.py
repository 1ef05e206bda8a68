"""A task that goes for the keys of its own site: it gets them without a sandbox, and in none of the others.

The real training process, started as `fed-site run` starts it, loads a real task file whose `data` tries
everything that a program of this user can try, and writes down what it got.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import tempfile
import textwrap
from pathlib import Path

import pytest
from fedcore_clients.config import read_config
from fedcore_clients.sandbox import choose, hidden
from fedcore_clients.trainer import Training, TrainingFailed

from fedcore.config import build_job
from fedcore.errors import BadInput, Refused, Unavailable
from fedcore.learning.data.split import FoldSplit
from fedcore.learning.task import load_task

SECRET = "TOP-SECRET"
PATIENCE = 120.0
"""Seconds: a task that waits for its standard input would wait for ever."""

METHODS = ("unshare", "bwrap")
IPC = Path("/proc/self/ns/ipc")

HOSTILE = """
import ctypes, json, os, socket, subprocess, sys, tempfile
from pathlib import Path
import fedcore

HERE = Path(__file__).parent
LIBC = ctypes.CDLL(None, use_errno=True)


def read(path):
    try:
        return {secret!r} in Path(path).read_text(errors="replace")
    except OSError:
        return False


def all_of(root):
    site = f"{{root}}{{HERE}}"
    names = ("identity.pem", "kit/key.pem", "state/journal.sqlite", "state/status.json", "state/spool/v")
    return [name for name in names if read(f"{{site}}/{{name}}")]


def uncovered():
    "Take the covers off, with the rights here and with those of a new user namespace."
    for flags in (0, 0x10000000 | 0x00020000):
        if flags:
            LIBC.unshare(flags)
        for path in (HERE / "state", HERE / "kit", HERE / "identity.pem"):
            LIBC.umount2(str(path).encode(), 2)
    return all_of("")


def processes():
    "Through other processes of this user, the site's own among them."
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        if int(each.name) != os.getpid():
            found += all_of(f"{{each}}/root")
    return found


def connects(port):
    try:
        socket.create_connection(("127.0.0.1", port), 5).close()
    except OSError:
        return False
    return True


def writes(path):
    try:
        with open(path, "a") as file:
            file.write("# mine\\n")
    except OSError:
        return False
    return True


def data(source):
    print("a task may write to its log", file=sys.stderr)
    os.close(os.memfd_create("x"))
    with tempfile.TemporaryFile() as file:
        file.write(b"x")
    found = {{
        "stdin": sys.stdin.read() + subprocess.run(["cat"], capture_output=True, text=True).stdout,
        "rows": (HERE / "rows.txt").read_text(),
        "direct": all_of(""), "processes": processes(), "connects": connects(source),
        "config": writes(HERE / "site.toml"), "package": writes(fedcore.__file__) if {package} else False,
        "uncovered": uncovered(), "pid": os.getpid(), "ipc": os.readlink("/proc/self/ns/ipc"),
    }}
    (HERE / "found.json").write_text(json.dumps(found))
    raise ValueError("enough")


task = fedcore.Task(name="hostile", data=data, model=lambda: None, loss=lambda model, batch: None)
"""


def install(folder, **keys):
    """A site's folder with secrets in the places where they are, a task and its data."""
    for name in ("kit", "state/spool"):
        (folder / name).mkdir(parents=True)
    for name in (
        "identity.pem",
        "kit/key.pem",
        "state/journal.sqlite",
        "state/status.json",
        "state/spool/v",
    ):
        (folder / name).write_text(SECRET)
    (folder / "rows.txt").write_text("a row")
    (folder / "roster.toml").write_text("")
    package = keys.get("sandbox", "auto") != "none"  # the control does not change the installation
    task = folder / "hostile.py"
    task.write_text(textwrap.dedent(HOSTILE.format(secret=SECRET, package=package)))
    digest = load_task(str(task)).digest()
    more = "".join(f"{key} = {json.dumps(value)}\n" for key, value in keys.items())
    (folder / "site.toml").write_text(
        'site = "a"\ncoordinator = "127.0.0.1:1"\nkit = "kit"\nidentity = "identity.pem"\n'
        f'roster = "roster.toml"\nfolder = "state"\n{more}'
        f'[tasks.hostile]\ntask = "{task}"\nsha256 = "{digest}"\n'
    )
    return read_config(folder / "site.toml")


def attacked(folder, config):
    """What the task got in the training process of this site."""
    command = choose(config).command

    async def load(port):
        training = Training(command)
        section = config.tasks["hostile"]
        settings = build_job({"rounds": 1, "max_examples": 64, "range": 0.1}).to_json()
        settings = {k: v for k, v in settings.items() if k not in {"task", "base"}}
        try:
            with pytest.raises(TrainingFailed):
                async with asyncio.timeout(PATIENCE):
                    await training.load_task(
                        "j", task=section.task, base=str(config.base), digest=section.sha256,
                        settings=settings, site="a", source=port, split=FoldSplit().to_json(),
                    )  # fmt: skip
        finally:
            await training.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        asyncio.run(load(server.getsockname()[1]))
    return json.loads((folder / "found.json").read_text())


EVERYTHING = [
    "identity.pem", "kit/key.pem", "state/journal.sqlite", "state/status.json", "state/spool/v",
]  # fmt: skip


def usable(config):
    """The sandbox, or a skip where the system does not offer it; one that hides nothing is no reason."""
    try:
        return choose(config)
    except Unavailable as error:
        if "can be read" in str(error):
            raise
        pytest.skip(f"{error}")


def test_control_without_a_sandbox_a_task_reads_every_key(tmp_path):
    found = attacked(tmp_path, install(tmp_path, sandbox="none"))
    assert found["direct"] == EVERYTHING
    assert found["processes"]
    assert found["connects"]
    assert found["config"]
    assert found["stdin"] == ""
    assert found["pid"] > 9 and found["ipc"] == str(IPC.readlink())


@pytest.mark.parametrize("method", METHODS)
def test_in_a_sandbox_a_task_reads_no_key_and_finds_no_network(tmp_path, method):
    config = install(tmp_path, sandbox=method)
    usable(config)
    found = attacked(tmp_path, config)
    assert found.pop("pid") < 10, "processes of its own only"
    assert found.pop("ipc") != str(IPC.readlink()), "shared memory of its own only"
    assert found == {
        "stdin": "", "rows": "a row", "direct": [], "processes": [], "connects": False,
        "config": False, "package": False, "uncovered": [],
    }  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_the_network_is_there_where_site_toml_gives_it(tmp_path, method):
    config = install(tmp_path, sandbox=method, task_network=True)
    usable(config)
    found = attacked(tmp_path, config)
    assert found["connects"]
    assert found["direct"] == found["processes"] == found["uncovered"] == []


@pytest.mark.parametrize("method", METHODS)
def test_a_killed_sandbox_leaves_no_process_behind(tmp_path, method):
    """What the site kills is the outer process: the training process inside ends with it."""
    config = install(tmp_path, sandbox=method)
    command = usable(config).command

    def inside(pid):
        found = Path(f"/proc/{pid}/task/{pid}/children")
        here = [int(each) for each in found.read_text().split()] if found.exists() else []
        return here + [each for child in here for each in inside(child)]

    def runs(pid):
        status = Path(f"/proc/{pid}/stat")
        return status.exists() and status.read_text().rsplit(")")[-1].split()[0] != "Z"

    async def scene():
        training = Training(command)
        await training.task_digest(str(tmp_path / "hostile.py"), "/")
        found = inside(training.child.pid)
        assert found
        training.child.kill()
        async with asyncio.timeout(60):
            while any(map(runs, found)):  # noqa: ASYNC110 - other processes
                await asyncio.sleep(0.02)
        await training.close()

    asyncio.run(scene())


def test_another_user_reads_no_key():
    """File rights hide the keys; the task's user can read what the operator lets everybody read."""
    if os.geteuid():
        pytest.skip("only root can start a process of another user")
    # Not pytest's folder: that is closed to other users, and every session closes it again.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = install(folder, sandbox="user:nobody")
        for path in [folder, *folder.rglob("*")]:
            secret = path.is_file() and path.read_bytes() == SECRET.encode()
            path.chmod(0o700 if path.name == "state" else 0o600 if secret else 0o777)
        usable(config)
        found = attacked(folder, config)
        assert found["direct"] == found["processes"] == found["uncovered"] == []
        assert not found["connects"]
        (folder / "identity.pem").chmod(0o644)
        with pytest.raises(Unavailable, match=r"identity\.pem can be read"):
            choose(config)
        (folder / "identity.pem").chmod(0o600)
        folder.chmod(0o700)
        with pytest.raises(Unavailable, match="cannot be read"):
            choose(config)


def test_auto_takes_what_holds_here_and_says_which(tmp_path):
    config = install(tmp_path)
    found = choose(config)
    if found.method == "none":
        assert found.why
        assert "can read this site's keys" in found.text
    else:
        assert found.method in METHODS
        assert attacked(tmp_path, config)["direct"] == []


def test_auto_without_any_method_says_why_and_a_named_one_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    config = install(tmp_path / "site")
    found = choose(config)
    assert found.method == "none"
    assert found.why == (
        "found no bwrap here, expected it installed; found no unshare here, expected it installed"
    )
    for name in METHODS:
        with pytest.raises(Unavailable, match=f"found no {name} here") as caught:
            choose(config.model_copy(update={"sandbox": name}))
        assert 'sandbox = "user:NAME"' in caught.value.remedy


def test_a_method_that_does_not_hide_is_not_used(tmp_path, monkeypatch):
    """The probe reads what is to be hidden: here a `bwrap` that covers nothing."""
    fake = tmp_path / "bin" / "bwrap"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done; shift; exec "$@"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fake.parent}:/bin")
    config = install(tmp_path / "site", sandbox="bwrap")
    with pytest.raises(Unavailable, match=r"identity\.pem can be read"):
        choose(config)


def test_a_folder_that_holds_the_task_cannot_be_hidden(tmp_path):
    config = install(tmp_path, sandbox="unshare").model_copy(update={"folder": tmp_path})
    with pytest.raises(BadInput, match="expected a folder of this site's own"):
        choose(config)
    assert "own" in choose(config.model_copy(update={"sandbox": "auto"})).why


def test_of_a_kit_beside_the_task_only_the_key_is_hidden(tmp_path):
    config = install(tmp_path).model_copy(update={"kit": tmp_path})
    (tmp_path / "key.pem").write_text(SECRET)
    assert set(hidden(config)) == {
        tmp_path / "key.pem", tmp_path / "identity.pem", tmp_path / "state",
    }  # fmt: skip


@pytest.mark.parametrize("word", ["jail", "user:", "user:a b"])
def test_a_word_that_is_no_sandbox_is_refused(tmp_path, word):
    with pytest.raises(BadInput, match="sandbox"):
        install(tmp_path, sandbox=word)


def test_a_user_nobody_knows_and_the_sites_own_are_refused(tmp_path):
    import pwd

    config = install(tmp_path, sandbox="user:no-such-user-here")
    with pytest.raises(BadInput, match="does not know"):
        choose(config)
    me = pwd.getpwuid(os.geteuid()).pw_name
    with pytest.raises(BadInput, match="runs this site"):
        choose(config.model_copy(update={"sandbox": f"user:{me}"}))
    assert issubclass(Unavailable, Refused)
