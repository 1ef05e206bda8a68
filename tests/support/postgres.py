"""A PostgreSQL server for tests: in a temporary folder, as an unprivileged user, one for each test process.

Debian's `postgresql` package has the programs; a cluster of the system's own is not used.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path

PASSWORD = secrets.token_urlsafe(16)
"""Of the role `fedcore` over TCP. Over the socket no password is asked for."""


@cache
def programs():
    """The folder with initdb and postgres, or None."""
    found = shutil.which("initdb")
    folders = [Path(found).resolve().parent] if found else []
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return next((each for each in folders if (each / "postgres").exists()), None)


def missing():
    """Why no server can be started here, or ""."""
    if programs() is None:
        return "no PostgreSQL here: apt-get install postgresql"
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return "no psycopg here: pip install '.[postgresql]'"
    return ""


class Server:
    """One server; `url()` is a new, empty database on it."""

    def __init__(self):
        self._bin, self._number = programs(), 0
        self.folder = Path(tempfile.mkdtemp(prefix="fedcore-pg-"))
        user = {}
        if os.getuid() == 0:  # PostgreSQL does not run as root
            who = pwd.getpwnam("nobody")
            os.chown(self.folder, who.pw_uid, who.pw_gid)
            user = {"user": who.pw_uid, "group": who.pw_gid, "extra_groups": []}
        password = self.folder / "password"
        password.write_text(PASSWORD)
        password.chmod(0o644)
        data = self.folder / "data"
        self._user = {**user, "cwd": self.folder, "stdin": subprocess.DEVNULL}
        self._run(
            "initdb", "-D", data, "-U", "fedcore", "-E", "UTF8", "--locale=C", "--no-sync",
            "--auth-local=trust", "--auth-host=scram-sha-256", f"--pwfile={password}",
        )  # fmt: skip
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        settings = {
            "listen_addresses": "127.0.0.1", "unix_socket_directories": self.folder, "fsync": "off",
            "shared_buffers": "16MB", "max_connections": "40", "autovacuum": "off",
        }  # fmt: skip
        self._command = [self._bin / "postgres", "-D", data, "-p", str(self.port)]
        for name, value in settings.items():
            self._command += ["-c", f"{name}={value}"]
        self.start()

    def _run(self, program, *arguments):
        done = subprocess.run(
            [self._bin / program, *arguments], capture_output=True, text=True, **self._user
        )
        assert done.returncode == 0, done.stderr

    def start(self):
        """Start it and wait until it answers."""
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, start_new_session=True, **self._user
            )
        while True:
            assert self._process.poll() is None, (self.folder / "log").read_text()
            with contextlib.suppress(Exception):
                self.sql("postgres", "SELECT 1")
                return
            time.sleep(0.05)

    def stop(self, how=signal.SIGINT):
        """End it: its clients are disconnected, nothing that was committed is lost."""
        self._process.send_signal(how)
        self._process.wait(60)

    def end(self):
        """End it at once and remove its folder."""
        self.stop(signal.SIGQUIT)
        shutil.rmtree(self.folder, ignore_errors=True)

    def sql(self, database, *statements):
        """The rows of the last of these statements."""
        import psycopg

        with psycopg.connect(
            f"host={self.folder} port={self.port} user=fedcore dbname={database}", autocommit=True
        ) as connection:
            for each in statements:
                found = connection.execute(each)
            return found.fetchall() if found.description else []

    def database(self):
        """The name of a new, empty database."""
        self._number += 1
        name = f"test{self._number}"
        self.sql("postgres", f"CREATE DATABASE {name} STRATEGY file_copy")
        return name

    def url(self, database=None):
        """The URL of a database (a new one), through the socket."""
        return f"postgresql://fedcore@:{self.port}/{database or self.database()}?host={self.folder}"

    def tcp(self, database="postgres", password=PASSWORD):
        """The URL of a database, with a password."""
        return f"postgresql://fedcore:{password}@127.0.0.1:{self.port}/{database}"
